"""Compare any two collections record by record, without a ledger, in bounded memory.

Both are read once. What is kept of each record, in scratch files, is its id and a 128-bit digest; the
files are divided by the id's hash, so that each pair of them fits into memory. Only records whose digests
differ are fetched again from both stores, to say what differs, or to find them equal within the tolerance
that a store states for its vectors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines import filters
from migration_pipelines.batch import ID, ID_TYPE, NAMESPACE
from migration_pipelines.envelope import decode
from migration_pipelines.ledger import writing
from migration_pipelines.model import Value
from migration_pipelines.schema_mapping import SchemaMapping
from migration_pipelines.store import Store
from migration_pipelines.verify import Difference, compare

_BUCKET_RECORDS = 200_000
_MAX_BUCKETS = 200
_PAGE_RECORDS = 2_000
_SHOWN = 20
_SUMMARY = pa.schema(
    [
        (ID, pa.string()),
        (ID_TYPE, pa.string()),
        (NAMESPACE, pa.string()),
        # What names it in the store, which is another where the record has an envelope.
        *((f"stored_{name}", pa.string()) for name in (ID, ID_TYPE, NAMESPACE)),
        ("digest", pa.binary(16)),
    ]
)


class Side(Value):
    """One of the two collections."""

    address: str
    count: int
    digest: str


class Comparison(Value):
    """What two collections have in common. `within_tolerance` records are equal but for vector rounding."""

    source: Side
    target: Side
    equal: int
    within_tolerance: int
    missing: int  # in the source only
    extra: int  # in the target only
    different: int
    examples: tuple[Difference, ...]

    @property
    def agrees(self) -> bool:
        """Whether the target holds exactly the source's records."""
        return not (self.missing or self.extra or self.different)


class _Collection:
    """A collection, and the scratch files that its records are summed up in."""

    def __init__(
        self,
        store: Store,
        name: str,
        where: filters.Filter | None,
        folder: Path,
        mapping: SchemaMapping | None = None,
    ) -> None:
        self.store, self.name, self._where, self._folder = store, name, where, folder
        self._mapping = mapping
        self.schema = store.describe(name)
        if mapping is not None:
            mapping.map_schema(self.schema)  # raises where a rule doesn't fit
        self.digest = self.count = 0

    def summarise(self, n_buckets: int, on_batch: Callable[[int], None]) -> None:
        """Read the whole collection into the buckets."""
        with ExitStack() as stack, writing(self._folder):
            self._folder.mkdir(parents=True)
            writers = [
                stack.enter_context(pa.ipc.new_file(str(self._path(bucket)), _SUMMARY))
                for bucket in range(n_buckets)
            ]
            for span, ids in self.store.split(self.name, span_records=50_000, where=self._where):
                for batch in self.store.scan(self.name, span, ids=ids, batch_records=_PAGE_RECORDS):
                    for bucket, rows in self._summary(batch, n_buckets):
                        writers[bucket].write_batch(rows)
                    on_batch(batch.num_rows)

    def _summary(self, stored: pa.RecordBatch, n_buckets: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        batch = batches.fit_namespaces(decode(stored), wanted=True)
        stored = batches.fit_namespaces(batches.ids_of(stored), wanted=True)
        if self._where is not None:
            mask = filters.mask(self._where, batch)
            batch, stored = batch.filter(mask), stored.filter(mask)
        if self._mapping is not None:
            mapped = self._mapping.apply(batch)
            batch, stored = mapped.batch, stored.take(pa.array(mapped.rows))
        digests = batches.record_digests(batch)
        self.digest = batches.add_digests([self.digest, *digests])
        self.count += batch.num_rows
        columns = [*batches.ids_of(batch).columns, *stored.columns]
        raw = pa.array([digest.to_bytes(16, "big") for digest in digests], pa.binary(16))
        rows = pa.RecordBatch.from_arrays([*columns, raw], schema=_SUMMARY)
        buckets = batches.id_hashes(batch).view("u8")[::2] % n_buckets
        for bucket in np.unique(buckets):
            yield int(bucket), rows.filter(pa.array(buckets == bucket))

    def bucket(self, number: int) -> pa.Table:
        """Return the summaries of one bucket."""
        with pa.memory_map(str(self._path(number))) as source:
            return pa.ipc.open_file(source).read_all()

    def fetch(self, summaries: pa.RecordBatch) -> pa.RecordBatch:
        """Return whole records of some summaries, as they were before any envelope."""
        names = (ID, ID_TYPE, NAMESPACE) if self.schema.has_namespaces else (ID, ID_TYPE)
        stored = [summaries.column(f"stored_{name}") for name in names]
        ids = pa.RecordBatch.from_arrays(stored, names=list(names))
        found = batches.fit_namespaces(decode(self.store.fetch(self.name, ids)), wanted=True)
        return found if self._mapping is None else self._mapping.apply(found).batch

    def side(self) -> Side:
        return Side(address=self.store.address(self.name), count=self.count, digest=f"{self.digest:032x}")

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:03d}.arrow"


def compare_collections(
    source: Store,
    source_collection: str,
    target: Store,
    target_collection: str,
    *,
    where: filters.Filter | None = None,
    mapping: SchemaMapping | None = None,
    on_batch: Callable[[int], None] = lambda records: None,  # noqa: ARG005 - the default listens to nothing
) -> Comparison:
    """Compare two collections; neither is written.

    With a `mapping` the source's records are compared as it maps them, without those that it rejects, and
    `where` looks at the source's alone: the target's may have lost the fields that it names.

    `on_batch` is told how many records were read, of both together.
    """
    with tempfile.TemporaryDirectory(prefix="vector-migrate-") as scratch:
        folder = Path(scratch)
        stores = [source.for_reading(folder / "a"), target.for_reading(folder / "b")]
        try:
            left = _Collection(stores[0], source_collection, where, folder / "source", mapping)
            right = _Collection(
                stores[1], target_collection, where if mapping is None else None, folder / "target"
            )
            counts = max(stores[0].count(source_collection), stores[1].count(target_collection))
            n_buckets = min(_MAX_BUCKETS, 1 + counts // _BUCKET_RECORDS)
            left.summarise(n_buckets, on_batch)
            right.summarise(n_buckets, on_batch)
            return _compare(left, right, n_buckets)
        finally:
            for store in stores:
                store.close()


def _compare(left: _Collection, right: _Collection, n_buckets: int) -> Comparison:
    tally = dict.fromkeys(("equal", "within_tolerance", "missing", "extra", "different"), 0)
    examples: list[Difference] = []

    def note(kind: str, found: list[Difference]) -> None:
        tally[kind] += len(found)
        examples.extend(found[: max(0, _SHOWN - len(examples))])

    for number in range(n_buckets):
        ours, theirs = left.bucket(number), right.bucket(number)
        position = pc.index_in(_keys(ours), _keys(theirs))
        note("missing", _named(ours.filter(position.is_null()), "missing in the target"))
        extra = pc.invert(pc.is_in(_keys(theirs), _keys(ours)))
        note("extra", _named(theirs.filter(extra), "only in the target"))
        ours = ours.filter(position.is_valid())
        theirs = theirs.take(position.drop_null())
        same = _equal(ours["digest"], theirs["digest"])
        tally["equal"] += int(same.sum())
        for differences, near in _look_closer(left, right, ours, theirs, ~same):
            note("different", differences)
            tally["within_tolerance"] += near
    return Comparison(source=left.side(), target=right.side(), examples=tuple(examples), **tally)


def _look_closer(
    left: _Collection,
    right: _Collection,
    ours: pa.Table,
    theirs: pa.Table,
    rows: npt.NDArray[np.bool_],
) -> Iterator[tuple[list[Difference], int]]:
    """Fetch records whose digests differ, page by page; yield what differs and how many were near enough."""
    tolerance = max(left.store.vector_tolerance(left.schema), right.store.vector_tolerance(right.schema))
    where = np.flatnonzero(rows)
    for at in range(0, len(where), _PAGE_RECORDS):
        picked = pa.array(where[at : at + _PAGE_RECORDS])
        expected = left.fetch(_one_batch(ours.take(picked)))
        found = _like(right.fetch(_one_batch(theirs.take(picked))), expected)
        differences = list(compare(expected, found, tolerance=tolerance))
        yield differences, expected.num_rows - len(differences)


def _like(found: pa.RecordBatch, expected: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch in another's columns: an only vector under the other's name, its dtype widened."""
    wanted, there = batches.vector_columns(expected.schema), batches.vector_columns(found.schema)
    renamed = dict(zip(there, wanted, strict=True)) if len(wanted) == len(there) == 1 else {}
    names = [renamed.get(name, name) for name in found.schema.names]
    found = found.rename_columns(names)
    columns = []
    for item in expected.schema:
        missing = pa.nulls(found.num_rows, item.type)
        column = found.column(item.name) if item.name in names else missing
        castable = batches.is_dense(column) and batches.is_dense(missing)
        columns.append(column.cast(item.type) if castable and column.type != item.type else column)
    return pa.RecordBatch.from_arrays(columns, names=expected.schema.names)


def _keys(table: pa.Table) -> pa.Array:
    return batches.id_keys(table).combine_chunks()


def _named(table: pa.Table, what: str) -> list[Difference]:
    names = zip(table[ID].to_pylist(), table[NAMESPACE].to_pylist(), strict=True)
    return [Difference(id=text, what=what, namespace=namespace) for text, namespace in names]


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    if not len(left):
        return np.zeros(0, bool)
    return np.asarray(pc.equal(left, right).to_numpy())


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0]
