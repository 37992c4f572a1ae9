"""Records as tests write them down: plain Python, compared exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.metadata import dump_metadata, load_metadata
from migration_pipelines.model import CollectionSchema, DType, IdKind, Metric, VectorField, VectorKind


@dataclass(frozen=True)
class Record:
    """One record; `vectors` maps a field's name ("" is the default vector) to float32[dimensions]."""

    id: batches.RecordId
    vectors: Mapping[str, Any] = field(default_factory=dict)
    document: str | None = None
    metadata: Mapping[str, Any] | None = None
    namespace: str | None = None

    def key(self) -> tuple[str, str, str]:
        """The typed id within its namespace, hashable without `1 == True` or `1 == "1"` surprises."""
        return batches.id_kind(self.id).value, str(self.id), self.namespace or ""

    def exact(self) -> tuple[Any, ...]:
        """Everything as values that compare bit for bit: vectors as bytes, metadata as canonical JSON."""
        vectors = {name: None if v is None else _bytes(v) for name, v in self.vectors.items()}
        metadata = None if self.metadata is None else dump_metadata(self.metadata)
        return self.key(), vectors, self.document, metadata, self.namespace


def _bytes(vector: Any) -> bytes:
    if isinstance(vector, Mapping):
        return np.asarray(vector["indices"], "u4").tobytes() + np.asarray(vector["values"], "f4").tobytes()
    return np.asarray(vector).tobytes()


def plain_schema(
    name: str,
    *,
    dimensions: int = 8,
    metric: Metric = Metric.EUCLIDEAN,
    id_kind: IdKind = IdKind.STR,
) -> CollectionSchema:
    """One dense float32 vector, documents and metadata."""
    vector = VectorField(dimensions=dimensions, metric=metric)
    return CollectionSchema(name=name, vectors=(vector,), id_kinds=frozenset({id_kind}))


def plain_records(n: int, *, dimensions: int = 8, seed: int = 0, start: int = 0) -> list[Record]:
    """Ordinary records with text ids, deterministic in `seed`."""
    rng = np.random.default_rng(seed)
    return [
        Record(
            id=f"doc#{number:05d}",
            vectors={"": rng.standard_normal(dimensions).astype(np.float32)},
            document=f"Passage {number} über naïve 漢字 🦜",
            metadata={"n": number, "even": number % 2 == 0, "tag": f"t{number % 7}", "half": number / 2},
        )
        for number in range(start, start + n)
    ]


def to_batch(records: Sequence[Record], schema: CollectionSchema) -> pa.RecordBatch:
    """The batch of some records, in the layout of the schema."""
    ids, kinds = batches.id_columns([record.id for record in records])
    columns: dict[str, pa.Array] = {batches.ID: ids, batches.ID_TYPE: kinds}
    for vector in schema.vectors:
        columns[batches.vector_column(vector.name)] = _vector_column(records, vector)
    columns[batches.DOCUMENT] = pa.array([r.document for r in records], pa.string())
    texts = [None if r.metadata is None else dump_metadata(r.metadata) for r in records]
    columns[batches.METADATA] = pa.array(texts, pa.string())
    if schema.has_namespaces:
        columns[batches.NAMESPACE] = pa.array([r.namespace for r in records], pa.string())
    return pa.RecordBatch.from_pydict(columns, schema=batches.arrow_schema(schema))


def _vector_column(records: Sequence[Record], vector: VectorField) -> pa.Array:
    values = [record.vectors.get(vector.name) for record in records]
    kind = batches.vector_type(vector)
    if vector.kind is VectorKind.DENSE and vector.dtype is DType.FLOAT16:
        return pa.array([None if v is None else list(np.asarray(v, np.float16)) for v in values], kind)
    if vector.kind is VectorKind.SPARSE:
        return pa.array(values, kind)
    return pa.array([None if v is None else np.asarray(v).tolist() for v in values], kind)


def from_batches(parts: Iterable[pa.RecordBatch]) -> list[Record]:
    """The records of some batches."""
    return [record for part in parts for record in _from_batch(part)]


def _from_batch(part: pa.RecordBatch) -> list[Record]:
    names = batches.vector_columns(part.schema)
    rows = part.to_pylist()
    return [
        Record(
            id=record_id,
            vectors={
                name.partition(":")[2]: _vector(row[name], part.schema.field(name).type) for name in names
            },
            document=row[batches.DOCUMENT],
            metadata=None if row[batches.METADATA] is None else load_metadata(row[batches.METADATA]),
            namespace=row.get(batches.NAMESPACE),
        )
        for record_id, row in zip(batches.typed_ids(part), rows, strict=True)
    ]


def _vector(value: Any, kind: pa.DataType) -> Any:
    if value is None or isinstance(value, dict):
        return value
    element = kind.value_type.value_type if pa.types.is_fixed_size_list(kind.value_type) else kind.value_type
    return np.asarray(value, element.to_pandas_dtype())


def by_id(records: Iterable[Record]) -> dict[tuple[str, str, str], Any]:
    """Records in their exact form by typed id, to compare two sets of them."""
    return {record.key(): record.exact() for record in records}
