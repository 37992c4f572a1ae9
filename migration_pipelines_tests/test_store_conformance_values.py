"""What every store gives back: ids, documents, metadata and vectors, exactly or not at all.

It is read through the connector and natively, around it: the connector's own reading can't hide what is wrong
in its writing.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from migration_pipelines import batch as batches
from migration_pipelines.errors import RecordRejectedError
from migration_pipelines.metadata import value_kinds
from migration_pipelines.model import DType, IdKind, Metric, ValueKind, VectorField, VectorKind
from migration_pipelines_tests.conformance import (
    SAMPLES,
    assert_same,
    holdable_ids,
    ids_of,
    load,
    new_schema,
    read_all,
    records_for,
    require,
    scanned,
    spans_of,
)
from migration_pipelines_tests.records import Record, from_batches, to_batch


def round_trip(harness, schema, records):
    """Write records through the connector; read them through it and natively, and compare both."""
    store = harness.store
    schema = load(store, schema, records)
    assert_same(read_all(store, schema.name), records, store)
    assert_same(from_batches([store.fetch(schema.name, ids_of(records))]), records, store)
    assert_same(harness.read(schema.name), records, store)


def test_awkward_text_ids_stay_apart_and_exact(harness, store):
    require(IdKind.STR in store.capabilities.id_kinds, "text ids")
    like = records_for(store, 1)[0]
    records = [replace(like, id=text, metadata={"n": n}) for n, text in enumerate(holdable_ids(store))]
    schema = new_schema(store)
    round_trip(harness, schema, records)
    if store.capabilities.deletes:
        store.delete(schema.name, ids_of(records[::2]))
        assert_same(harness.read(schema.name), records[1::2], store)


@pytest.mark.parametrize("kind", [IdKind.INT, IdKind.UUID], ids=str)
def test_ids_of_other_kinds_come_back_exactly(harness, store, kind):
    require(kind in store.capabilities.id_kinds, f"{kind} ids")
    ids = {
        IdKind.INT: [0, 1, 2**31, 2**53 + 1, 2**63 - 1],
        IdKind.UUID: [batches.typed_id(f"{n:032x}", "uuid") for n in (0, 1, 2**127 + 12345, 2**128 - 1)],
    }[kind]
    like = records_for(store, 1)[0]
    records = [replace(like, id=record_id) for record_id in ids]
    round_trip(harness, new_schema(store, id_kinds=frozenset({kind})), records)


def test_ids_of_several_kinds_stay_different(harness, store):
    require(store.capabilities.mixed_ids, "mixed ids")
    text = "00000000-0000-0000-0000-000000000001"
    like = records_for(store, 1)[0]
    ids = [1, "1", text, batches.typed_id(text, "uuid")]
    ids = [value for value in ids if batches.id_kind(value) in store.capabilities.id_kinds]
    records = [replace(like, id=record_id, metadata={"n": n}) for n, record_id in enumerate(ids)]
    round_trip(harness, new_schema(store, id_kinds=frozenset(IdKind)), records)


def test_awkward_documents_come_back_exactly(harness, store):
    require(store.capabilities.documents, "documents")
    texts = [
        "",
        None,
        "🦜 naïve 漢字 e\u0301",
        "'; DROP TABLE x; --",
        "\\N",
        "\\.",
        "\t\r\n",
        "a\0b",
        "é" * 100_000,
    ]
    refused = set(store.capabilities.document_refuses)
    held = [text for text in texts if text is None or refused.isdisjoint(text)]
    records = [replace(r, document=text) for r, text in zip(records_for(store, 20), held, strict=False)]
    round_trip(harness, new_schema(store), records)


def test_awkward_metadata_keys_come_back_exactly(harness, store):
    keys = [
        "naïve",
        "漢字",
        "🦜",
        "a b",
        "a.b",
        "$set",
        "'",
        '"',
        "\\",
        "id",
        "vector",
        "document",
        "metadata",
    ]
    keys += ["select", "UPPER", "x" * 200, "_id", "#", "chroma:document", "$typed", ""]
    fields = {key: number for number, key in enumerate(keys) if store.accepts_key(key)}
    assert len({"naïve", "漢字", "🦜"} & fields.keys()) in (0, 3)  # Weaviate's and Milvus's names are ASCII
    records = [replace(record, metadata=fields) for record in records_for(store, 2)]
    round_trip(harness, new_schema(store), records)


def test_metadata_and_none_come_back_exactly(harness, store):
    records = records_for(store, 3)
    if ValueKind.NO_FIELDS in store.capabilities.value_kinds:
        records[1] = replace(records[1], metadata={})
    if store.capabilities.no_metadata:
        records[2] = replace(records[2], metadata=None)
    round_trip(harness, new_schema(store), records)


@pytest.mark.parametrize("foreseen", [True, False], ids=["foreseen", "unforeseen"])
@pytest.mark.parametrize("kind", SAMPLES, ids=str)
def test_a_metadata_value_comes_back_exactly_or_is_refused(harness, store, kind, foreseen):
    like = records_for(store, 1)[0]
    records = [
        replace(record, metadata={"before": 1, "field": value})
        for record, value in zip(records_for(store, 1000, start=1), SAMPLES[kind], strict=False)
    ]
    schema = load(store, new_schema(store), [like], adapt_to=records if foreseen else None)
    exact = store.exact_kinds(schema)
    held = [r for r in records if {found.value for found in value_kinds(r.metadata["field"])} <= exact]
    expected = {record.key(): record for record in [like, *held]}
    if held:
        store.upsert(schema.name, to_batch(held, schema))
    for record in records:
        if all(record is not other for other in held):
            with suppress(RecordRejectedError):
                store.upsert(schema.name, to_batch([record], schema))
                expected[record.key()] = record

    assert_same(read_all(store, schema.name), expected.values(), store)
    assert_same(harness.read(schema.name), expected.values(), store)


def _special_vectors() -> np.ndarray:
    numbers = [0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 0.1, 1 / 3, 16777217.0, -1e18, 1e18]
    rng = np.random.default_rng(7)
    spread = rng.standard_normal((60, 8)) * 10.0 ** rng.integers(-30, 15, (60, 8))
    return np.vstack([rng.choice(numbers, (60, 8)), spread]).astype(np.float32)


def test_vectors_come_back_bit_for_bit(harness, store):
    require(Metric.EUCLIDEAN in store.capabilities.metrics, "euclidean")
    schema = new_schema(store, metric=Metric.EUCLIDEAN)
    assert store.vector_tolerance(schema) == 0
    vectors = _special_vectors()
    records = [replace(r, vectors={"": v}) for r, v in zip(records_for(store, 120), vectors, strict=True)]
    round_trip(harness, schema, records)


@pytest.mark.parametrize("value", [np.finfo(np.float32).max, -np.finfo(np.float32).max], ids=["max", "min"])
def test_the_largest_float_comes_back_or_is_refused(harness, store, value):
    schema = load(store, new_schema(store), before := records_for(store, 2))
    record = Record(id=records_for(store, 1, start=50)[0].id, vectors={"": np.full(8, value, np.float32)})
    record = replace(record, metadata={"n": 1})
    try:
        store.upsert(schema.name, to_batch([record], schema))
    except RecordRejectedError:
        assert_same(harness.read(schema.name), before, store)
    else:
        assert_same(harness.read(schema.name), [*before, record], store)


def test_cosine_vectors_come_back_within_the_stated_tolerance(store):
    require(Metric.COSINE in store.capabilities.metrics, "cosine")
    schema = load(store, new_schema(store, metric=Metric.COSINE), records := records_for(store, 100))
    tolerance = store.vector_tolerance(schema)
    assert tolerance < 1e-5
    found = {record.key(): record.vectors[""] for record in read_all(store, schema.name)}
    for record in records:
        vector = record.vectors[""]
        off = np.abs(found[record.key()].astype(float) - vector.astype(float)).max()
        assert off <= tolerance * np.abs(vector).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_non_finite_vectors_come_back_where_they_are_declared(harness, store, value):
    require(store.capabilities.non_finite_vectors, "non-finite vectors")
    records = [replace(r, vectors={"": np.full(8, value, np.float32)}) for r in records_for(store, 2)]
    round_trip(harness, new_schema(store), records)


def test_a_record_without_a_vector_comes_back_or_is_refused(harness, store):
    schema = new_schema(store)
    records = records_for(store, 3)
    records[1] = replace(records[1], vectors={"": None})
    if store.capabilities.missing_vectors:
        round_trip(harness, schema, records)
        return
    load(store, schema, [])
    with pytest.raises(RecordRejectedError):
        store.upsert(schema.name, to_batch(records, schema))
    assert store.count(schema.name) == 0


def _numbers(dtype: DType) -> np.ndarray:
    rng = np.random.default_rng(3)
    if dtype in (DType.FLOAT32, DType.FLOAT16):
        return rng.standard_normal((6, 16)).astype(dtype.value)
    if dtype is DType.BIT:
        return rng.integers(0, 256, (6, 2)).astype(np.uint8)
    return rng.integers(*((-128, 128) if dtype is DType.INT8 else (0, 256)), (6, 16)).astype(dtype.value)


@pytest.mark.parametrize("dtype", DType, ids=str)
def test_vectors_of_each_declared_type_come_back_exactly(harness, store, dtype):
    require(dtype in store.capabilities.dtypes, dtype)
    metric = Metric.HAMMING if dtype is DType.BIT else None
    require(metric is None or metric in store.capabilities.metrics, str(metric))
    like = new_schema(store, metric=metric)
    schema = like.model_copy(
        update={"vectors": (like.vectors[0].model_copy(update={"dtype": dtype, "dimensions": 16}),)}
    )
    records = [
        replace(r, vectors={"": v}) for r, v in zip(records_for(store, 6), _numbers(dtype), strict=True)
    ]
    round_trip(harness, schema, records)


_SPARSE = {"indices": [3, 70_000, 2**29], "values": [0.5, -1.0, 1e-20]}
_MULTI = [[1.0, 2.0, 3.0], [-0.0, 1e-45, 0.1]]


@pytest.mark.parametrize(
    ("kind", "value"),
    [(VectorKind.SPARSE, _SPARSE), (VectorKind.MULTI, _MULTI), (VectorKind.MULTI, _MULTI[:1])],
    ids=["sparse", "multi", "multi-of-one"],
)
def test_vectors_of_other_kinds_come_back_exactly(harness, store, kind, value):
    require(kind in store.capabilities.vector_kinds, kind)
    if kind is VectorKind.SPARSE and harness.sparse_is_positive:
        value = {**value, "values": [abs(number) for number in value["values"]]}
    like = new_schema(store)
    dimensions = 3 if kind is VectorKind.MULTI else None
    other = VectorField(name="other", kind=kind, dimensions=dimensions, metric=Metric.DOT)
    schema = like.model_copy(update={"vectors": (*like.vectors, other)})
    records = [replace(r, vectors={**r.vectors, "other": value}) for r in records_for(store, 2)]
    schema = load(store, schema, records)
    expected = to_batch(records, schema)

    for found in (
        store.fetch(schema.name, ids_of(records)),
        pa.concat_batches(scanned(store, schema.name, spans_of(store, schema.name, 10))),
    ):
        assert sorted(batches.record_digests(found)) == sorted(batches.record_digests(expected))


def test_named_vectors_come_back_under_their_names(harness, store):
    require(store.capabilities.named_vectors, "named vectors")
    like = new_schema(store)
    metric = like.vectors[0].metric
    names = {"title": 3, "image": 5}
    fields = tuple(VectorField(name=name, dimensions=n, metric=metric) for name, n in names.items())
    rng = np.random.default_rng(1)
    records = [
        replace(r, vectors={name: rng.random(n).astype(np.float32) for name, n in names.items()})
        for r in records_for(store, 5)
    ]
    round_trip(harness, like.model_copy(update={"vectors": fields}), records)


def test_one_id_in_several_namespaces_is_several_records(harness, store):
    require(store.shares_ids, "one id in several namespaces")
    ids = [record.id for record in records_for(store, 3)]
    records = [
        replace(record, id=ids[number // 3], namespace=["a", "b", "C_2"][number % 3])
        for number, record in enumerate(records_for(store, 9))
    ]
    schema = new_schema(store, has_namespaces=True)
    round_trip(harness, schema, records)
    if store.capabilities.deletes:
        store.delete(schema.name, ids_of(records[::2]))
        assert_same(harness.read(schema.name), records[1::2], store)
