"""The inspect phase: what a collection is made of and what it holds, counted record by record."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from migration_pipelines import batch as batches
from migration_pipelines import filters
from migration_pipelines.batch import DOCUMENT, ID, ID_TYPE, METADATA, NAMESPACE
from migration_pipelines.envelope import decode
from migration_pipelines.mapping import awkward_ids
from migration_pipelines.metadata import count_kinds, load_all
from migration_pipelines.model import Capabilities, CollectionSchema, IdKind, Loss, Profile, Span, Value
from migration_pipelines.schema_mapping import SchemaMapping
from migration_pipelines.store import Store

SAMPLE_RECORDS = 2_000
_BATCH_RECORDS = 5_000


class Inspection(Value):
    """What there is to know of a collection before it is moved."""

    address: str
    count: int
    collection: CollectionSchema
    profile: Profile
    fingerprint: str


def inspect_collection(store: Store, collection: str) -> Inspection:
    """Return what a collection is made of and holds. Reads all but the vectors; writes nothing."""
    schema = store.describe(collection)
    counter = ProfileCounter(schema)
    for span, ids in store.split(collection, span_records=50_000):
        counter.add_span(store, collection, span, ids)
    sample = take_sample(store, collection)
    return Inspection(
        address=store.address(collection),
        count=store.count(collection),
        collection=schema.model_copy(update={"id_kinds": counter.id_kinds() or schema.id_kinds}),
        profile=counter.profile(sample),
        fingerprint=store.fingerprint(collection),
    )


class Sample(Value):
    """The first records of a collection, read with their vectors to see how fast that goes."""

    records: int
    bytes: int
    seconds: float
    norms: tuple[float, float] | None


def take_sample(store: Store, collection: str, *, mapping: SchemaMapping | None = None) -> Sample:
    """Read up to `SAMPLE_RECORDS` records with their vectors; the norms are those after a mapping."""
    found = next(iter(store.split(collection, span_records=SAMPLE_RECORDS)), None)
    if found is None:
        return Sample(records=0, bytes=0, seconds=0.0, norms=None)
    span, ids = found
    records = size = 0
    norms: list[npt.NDArray[np.float64]] = []
    started = time.monotonic()
    for batch in store.scan(collection, span, ids=ids, batch_records=500):
        records += batch.num_rows
        size += batch.nbytes
        norms += _norms(batch if mapping is None else mapping.vectors_only(batch))
    seconds = time.monotonic() - started
    every = np.concatenate(norms) if norms else np.empty(0)
    bounds = (float(every.min()), float(every.max())) if every.size else None
    return Sample(records=records, bytes=size, seconds=seconds, norms=bounds)


def _norms(batch: pa.RecordBatch) -> Iterator[npt.NDArray[np.float64]]:
    for name in batches.vector_columns(batch.schema):
        column = batch.column(name).drop_null()
        if batches.is_dense(column) and len(column):
            norms = np.linalg.norm(batches.dense_matrix(column).astype(np.float64), axis=1)
            yield norms[np.isfinite(norms)]


class DistinctIds:
    """Counts distinct ids, within their namespaces and without, in 16 to 20 bytes a record."""

    def __init__(self) -> None:
        self._hashes: list[npt.NDArray[np.void]] = []
        self._spaces: list[npt.NDArray[np.int32]] = []  # each record's namespace by its number
        self._numbers = {"": 0}

    def add(self, batch: pa.RecordBatch) -> None:
        self._hashes.append(batches.id_hashes(batch.select([ID, ID_TYPE])))
        spaces = np.zeros(batch.num_rows, np.int32)
        if NAMESPACE in batch.schema.names:
            names = pc.fill_null(batch.column(NAMESPACE), "").dictionary_encode()
            found = names.dictionary.to_pylist()
            numbers = [self._numbers.setdefault(name, len(self._numbers)) for name in found]
            spaces = np.array(numbers, np.int32)[np.asarray(names.indices)]
        self._spaces.append(spaces)

    def count(self, *, namespaces: bool = True) -> int:
        """Return how many ids there are, each once in every namespace or once at all."""
        if not self._hashes:
            return 0
        hashes = np.concatenate(self._hashes)
        if namespaces and len(self._numbers) > 1:
            # Each namespace turns other bits of its records' hashes.
            turns = np.array([xxhash.xxh3_128_digest(name.encode()) for name in self._numbers], "V16")
            turns[0] = bytes(16)
            turned = hashes.view("u8") ^ turns[np.concatenate(self._spaces)].view("u8")
            hashes = turned.view("V16")
        return int(np.unique(hashes).size)


class ProfileCounter:
    """Counts what records hold, span after span.

    Parameters
    ----------
    schema
        The collection that is read; of its records after the mapping, where there is one.
    where
        Only records that match count.
    target
        What the target can hold: where given, awkward ids, refused documents and vectors that it refuses
        are counted too. Vectors are read only where the source may hold such that the target refuses.
    accepts_id
        The target's own, for ids that its capabilities can't tell of.
    source
        What the source can hold.
    mapping
        Applied to the records that match, before anything else of them counts. Where it may make a vector
        infinite, vectors are read.
    """

    def __init__(
        self,
        schema: CollectionSchema,
        *,
        where: filters.Filter | None = None,
        source: Capabilities | None = None,
        target: Capabilities | None = None,
        accepts_id: Callable[[str], bool] | None = None,
        mapping: SchemaMapping | None = None,
    ) -> None:
        self._schema, self._where, self._target = schema, where, target
        self._accepts_id, self._mapping = accepts_id, mapping
        self._mapped: Counter[tuple[str, str]] = Counter()
        self._unmapped: Counter[str] = Counter()
        self._looks_at_vectors = (
            source is not None
            and target is not None
            and (
                source.missing_vectors > target.missing_vectors
                or source.non_finite_vectors > target.non_finite_vectors
            )
        ) or (mapping is not None and mapping.narrows)
        self._counts: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._namespaces: Counter[str] = Counter()
        self._fields: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._present: Counter[str] = Counter()
        self._ids = DistinctIds()

    def add_span(self, store: Store, collection: str, span: Span, ids: pa.RecordBatch | None) -> int:
        """Count the records of one span; returns how many are in scope."""
        before = self._counts["records"]
        for batch in store.scan(
            collection,
            span,
            ids=ids,
            batch_records=_BATCH_RECORDS,
            where=self._where,
            vectors=self._looks_at_vectors,
        ):
            self._add(decode(batch))
        return self._counts["records"] - before

    def add_ids(self, store: Store, collection: str, ids: pa.RecordBatch) -> None:
        """Count the records of these ids."""
        for batch in store.fetch_all(
            collection, ids, batch_records=_BATCH_RECORDS, vectors=self._looks_at_vectors
        ):
            self._add(decode(batch))

    def _add(self, batch: pa.RecordBatch) -> None:
        if self._where is not None:
            batch = batch.filter(filters.mask(self._where, batch))
        counts = self._counts
        counts["records"] += batch.num_rows
        if self._mapping is not None:
            mapped = self._mapping.apply(batch)
            batch = mapped.batch
            self._mapped += mapped.changes
            self._unmapped.update(mapped.refused.values())
        counts["bytes"] += batch.nbytes
        counts["documents"] += batch.num_rows - batch.column(DOCUMENT).null_count
        self._kinds.update(batch.column(ID_TYPE).to_pylist())
        self._ids.add(batch)
        if NAMESPACE in batch.schema.names:
            self._namespaces.update(pc.fill_null(batch.column(NAMESPACE), "").to_pylist())
        self._add_metadata(load_all(batch.column(METADATA).drop_null().to_pylist()))
        if self._target is not None:
            self._add_refused(batch, self._target)

    def _add_metadata(self, records: list[dict[str, Any]]) -> None:
        self._counts["with_metadata"] += len(records)
        columns: defaultdict[str, list[Any]] = defaultdict(list)
        for metadata in records:
            self._counts["empty_metadata"] += not metadata
            for key, value in metadata.items():
                columns[key].append(value)
        for key, values in columns.items():
            kinds = count_kinds(values)
            self._fields[key].update({kind.value: count for kind, count in kinds.items()})
            self._present[key] += sum(value is not None for value in values)

    def _add_refused(self, batch: pa.RecordBatch, target: Capabilities) -> None:
        self._counts["awkward_ids"] += int(awkward_ids(batch, target, self._accepts_id).sum())
        for character in target.document_refuses:
            found = pc.sum(pc.match_substring(batch.column(DOCUMENT), character)).as_py()
            self._counts["refused_documents"] += found or 0
        for name in batches.vector_columns(batch.schema):
            column = batch.column(name)
            if not target.missing_vectors:
                self._counts["missing_vectors"] += column.null_count
            if not target.non_finite_vectors:
                self._counts["non_finite_vectors"] += int(batches.non_finite_rows(column).sum())

    def id_kinds(self) -> frozenset[IdKind]:
        """Return the kinds of id that were found."""
        return frozenset(map(IdKind, self._kinds))

    def losses(self, source: CollectionSchema) -> Iterator[Loss]:
        """Yield what the mapping changes of the records of a source: accepted, since it was asked for."""
        if self._mapping is None:
            return
        moved = self._counts["records"] - self._unmapped.total()
        yield from self._mapping.changed(source, self._mapped, moved)
        if self._unmapped:
            ((why, _),) = self._unmapped.most_common(1)
            yield Loss(
                field="record",
                kind="mapping-rejected",
                count=self._unmapped.total(),
                detail=f"the mapping can't be applied ({why}): these records go to the rejects file",
                kept="rejects",
                accepted=True,
            )

    def profile(self, sample: Sample) -> Profile:
        """Return what was counted."""
        counts, records = self._counts, self._counts["records"]
        moved, distinct = records - self._unmapped.total(), self._ids.count()
        in_default = moved - self._namespaces.total()
        if self._namespaces and in_default:
            self._namespaces[""] += in_default
        vector_bytes = sum(
            field.dimensions * 4 for field in self._schema.vectors if field.dimensions is not None
        )
        return Profile(
            records=records,
            bytes=counts["bytes"] + (0 if self._looks_at_vectors else records * vector_bytes),
            id_kinds=dict(self._kinds),
            awkward_ids=counts["awkward_ids"],
            duplicate_ids=moved - distinct,
            repeated_ids=distinct - self._ids.count(namespaces=False),
            documents=counts["documents"],
            refused_documents=counts["refused_documents"],
            with_metadata=counts["with_metadata"],
            empty_metadata=counts["empty_metadata"],
            fields={field: dict(kinds) for field, kinds in sorted(self._fields.items())},
            present=dict(sorted(self._present.items())),
            namespaces=dict(self._namespaces),
            missing_vectors=counts["missing_vectors"],
            non_finite_vectors=counts["non_finite_vectors"],
            norms=sample.norms,
            sample_read_records_per_second=sample.records / sample.seconds if sample.seconds else 0.0,
        )
