"""Compare any two collections record by record, without a ledger, in bounded memory.

Both are read once. What is kept of each record, in scratch files, is its id and a 128-bit digest; the
files are divided by the id's hash, so that each pair of them fits into memory. Only records whose digests
differ are fetched again from both stores, to say what differs, or to find them equal within the tolerance
that a store states for its vectors.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines import filters
from migration_pipelines.batch import ID, NAMESPACE
from migration_pipelines.buckets import N_BUCKETS, SUMMARY, Buckets, keys, stored_ids, summary
from migration_pipelines.envelope import decode
from migration_pipelines.model import Value
from migration_pipelines.schema_mapping import SchemaMapping
from migration_pipelines.store import Store
from migration_pipelines.verify import Difference, compare

_PAGE_RECORDS = 2_000
_SHOWN = 20


class Side(Value):
    """One of the two collections."""

    address: str
    count: int
    digest: str
    namespaces: Mapping[str, int]  # records in each; empty in a collection without namespaces


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

    def namespaces(self) -> Iterator[tuple[str, int, int]]:
        """Yield each namespace that one of them has, with the records of both in it."""
        ours, theirs = self.source.namespaces, self.target.namespaces
        for name in sorted({*ours, *theirs}):
            yield name, ours.get(name, 0), theirs.get(name, 0)


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
        self.namespaces: Counter[str] = Counter()

    def summarise(self, on_batch: Callable[[int], None]) -> Buckets:
        """Read the whole collection into buckets."""
        found = Buckets(self._folder, SUMMARY)
        with found.writing() as put:
            for batch in self.store.scan_all(self.name, batch_records=_PAGE_RECORDS, where=self._where):
                put(self._summary(batch))
                on_batch(batch.num_rows)
        return found

    def _summary(self, stored: pa.RecordBatch) -> pa.RecordBatch:
        batch = batches.fit_namespaces(decode(stored), wanted=True)
        stored = batches.fit_namespaces(batches.ids_of(stored), wanted=True)
        if self._where is not None:
            mask = filters.mask(self._where, batch)
            batch, stored = batch.filter(mask), stored.filter(mask)
        if self._mapping is not None:
            mapped = self._mapping.apply(batch)
            batch, stored = mapped.batch, stored.take(pa.array(mapped.rows))
        for found in pc.value_counts(batch.column(NAMESPACE)).to_pylist():
            self.namespaces[found["values"]] += found["counts"]
        digests = batches.record_digests(batch)
        self.digest = batches.add_digests([self.digest, *digests])
        self.count += batch.num_rows
        return summary(batch, stored, batches.digest_column(digests))

    def fetch(self, rows: pa.Table) -> pa.RecordBatch:
        """Return whole records of some summaries, as they were before any envelope."""
        ids = stored_ids(rows, has_namespaces=self.schema.has_namespaces)
        found = batches.fit_namespaces(decode(self.store.fetch(self.name, ids)), wanted=True)
        return found if self._mapping is None else self._mapping.apply(found).batch

    def side(self) -> Side:
        return Side(
            address=self.store.address(self.name),
            count=self.count,
            digest=f"{self.digest:032x}",
            namespaces=dict(self.namespaces) if self.namespaces.keys() - {""} else {},
        )


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
            summaries = left.summarise(on_batch), right.summarise(on_batch)
            return _compare(left, right, summaries)
        finally:
            for store in stores:
                store.close()


def _compare(left: _Collection, right: _Collection, summaries: tuple[Buckets, Buckets]) -> Comparison:
    tally = dict.fromkeys(("equal", "within_tolerance", "missing", "extra", "different"), 0)
    examples: list[Difference] = []

    def note(kind: str, found: list[Difference]) -> None:
        tally[kind] += len(found)
        examples.extend(found[: max(0, _SHOWN - len(examples))])

    for number in range(N_BUCKETS):
        ours, theirs = (buckets.read(number) for buckets in summaries)
        position = pc.index_in(keys(ours), keys(theirs))
        note("missing", _named(ours.filter(position.is_null()), "missing in the target"))
        extra = pc.invert(pc.is_in(keys(theirs), keys(ours)))
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
        expected = left.fetch(ours.take(picked))
        found = _like(right.fetch(theirs.take(picked)), expected)
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


def _named(table: pa.Table, what: str) -> list[Difference]:
    names = zip(table[ID].to_pylist(), table[NAMESPACE].to_pylist(), strict=True)
    return [Difference(id=text, what=what, namespace=namespace) for text, namespace in names]


def _equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    if not len(left):
        return np.zeros(0, bool)
    return np.asarray(pc.equal(left, right).to_numpy())
