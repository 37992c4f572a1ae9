"""What is special to Qdrant: directions without lengths, doubles, ids of two kinds, filters and settings.

The server here is a stand-in over Qdrant's own engine: what it changes is what a server changes.
"""

from __future__ import annotations

import math
import random
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import qdrant_edge as edge

from migration_pipelines import batch as batches
from migration_pipelines import errors, filters
from migration_pipelines.metadata import value_kind
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import (
    CollectionSchema,
    DType,
    IdKind,
    Metric,
    ValueKind,
    VectorField,
    VectorKind,
)
from migration_pipelines.store import open_address
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines.stores.qdrant import QdrantStore
from migration_pipelines.stores.qdrant.numbers import json_rows, parsed
from migration_pipelines_tests.conformance import SAMPLES
from migration_pipelines_tests.records import (
    Record,
    by_id,
    from_batches,
    plain_records,
    plain_schema,
    to_batch,
)
from migration_pipelines_tests.standins.qdrant import QdrantStandin

SCHEMA = plain_schema("docs", id_kind=IdKind.INT)
COSINE = plain_schema("docs", metric=Metric.COSINE, id_kind=IdKind.INT)


def some_records(n: int, *, start: int = 0, dimensions: int = 8) -> list[Record]:
    """Records with integer ids."""
    rng = np.random.default_rng(start)
    return [
        Record(
            id=number,
            vectors={"": rng.standard_normal(dimensions).astype(np.float32)},
            document=f"passage {number}",
            metadata={"n": number},
        )
        for number in range(start, start + n)
    ]


def read_all(
    store: Any, collection: str = "docs", *, where: Any = None, span_records: int = 25
) -> list[Record]:
    """Every record, by spans; with a filter what the store lets through."""
    return [
        record
        for span, ids in store.split(collection, span_records=span_records)
        for record in from_batches(store.scan(collection, span, ids=ids, batch_records=10, where=where))
    ]


@pytest.fixture(scope="module")
def standin() -> Iterator[QdrantStandin]:
    server = QdrantStandin()
    with server.serving():
        yield server


@pytest.fixture
def store(standin: QdrantStandin) -> Iterator[QdrantStore]:
    """A store on the server, with no collection there."""
    opened = QdrantStore(host="127.0.0.1", port=standin.port)
    yield opened
    for name in opened.list_collections():
        opened.drop(name)
    opened.close()
    standin.requests.clear()


@pytest.fixture(params=["server", "folder", "memory"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[QdrantStore]:
    """A store of each sort, with no collection in it."""
    if request.param == "server":
        yield request.getfixturevalue("store")
        return
    opened = QdrantStore(path=":memory:" if request.param == "memory" else str(tmp_path / "folder"))
    yield opened
    for name in opened.list_collections():
        opened.drop(name)
    opened.close()


def bodies(standin: QdrantStandin, path: str, method: str = "POST") -> list[Any]:
    """The bodies of the requests to a path."""
    return [r.json() for r in standin.requests if r.path.endswith(path) and r.method == method]


def test_a_collection_in_strict_mode_is_read_in_the_pages_that_it_allows(
    store: QdrantStore, standin: QdrantStandin
) -> None:
    """A server refuses larger pages than the collection's `max_query_limit`."""
    strict = {"strict_mode_config": {"enabled": True, "max_query_limit": 7}}
    store.create(SCHEMA.model_copy(update={"options": {"qdrant": strict}}))
    store.upsert("docs", to_batch(some_records(30), SCHEMA))
    assert by_id(read_all(store)) == by_id(some_records(30))
    assert store.fingerprint("docs").startswith("30:")
    assert store.count("docs", filters.parse({"n": {"$lt": 9}})) == 9


def test_an_alias_is_not_dropped_as_a_collection(any_store: QdrantStore) -> None:
    """A server answers that it did nothing, which isn't worth another try."""
    any_store.create(SCHEMA)
    any_store.set_alias("current", "docs")
    with pytest.raises(errors.ConfigurationError, match="alias of docs"):
        any_store.drop("current")
    assert any_store.list_collections() == ["docs"]


# ── what the engine holds ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        vectors = {"": edge.EdgeVectorParams(size=2, distance=edge.Distance.Euclid)}
        yield edge.EdgeShard.create(folder, edge.EdgeConfig(vectors=vectors))


def stored(engine: Any, values: list[Any]) -> list[Any]:
    """The values as the engine gives them back from a payload."""
    points = [edge.Point(n, {"": [0.0, 1.0]}, {"value": value}) for n, value in enumerate(values)]
    engine.update(edge.UpdateOperation.upsert_points(points))
    engine.flush()
    found = engine.retrieve(list(range(len(values))), with_payload=True, with_vector=False)
    return [record.payload["value"] for record in sorted(found, key=lambda record: record.id)]


@pytest.mark.parametrize(
    "kind", sorted(QdrantStore.capabilities.value_kinds - {ValueKind.NO_FIELDS}), ids=str
)
def test_what_is_declared_to_come_back_exactly_does_so_from_the_engine(engine: Any, kind: ValueKind) -> None:
    values = list(SAMPLES[kind])
    assert list(map(repr, stored(engine, values))) == list(map(repr, values))


def test_short_floats_survive_the_engine_and_some_of_the_others_do_not(engine: Any) -> None:
    rng = random.Random(3)
    short = [float(f"{rng.uniform(-1e6, 1e6):.{rng.randint(1, 15)}g}") for _ in range(3000)]
    assert {value_kind(value) for value in short} == {ValueKind.SHORT_FLOAT}
    assert stored(engine, short) == short
    others = [value for value in (rng.random() for _ in range(3000)) if value_kind(value) is ValueKind.FLOAT]
    changed = sum(found != value for found, value in zip(stored(engine, others), others, strict=True))
    assert changed > 100  # an engine that changes none could be declared exact


def test_a_record_with_a_double_that_the_engine_would_change_moves_unchanged(
    store: QdrantStore, tmp_path: Path
) -> None:
    values = [random.Random(n).random() for n in range(300)]
    records = [
        Record(id=n, vectors={"": np.ones(8, np.float32)}, metadata={"x": v}) for n, v in enumerate(values)
    ]
    assert_moves(store, SCHEMA, records, tmp_path, name="doubles")


def test_text_ids_become_uuids_in_qdrant_and_text_again_behind_it(
    store: QdrantStore, standin: QdrantStandin, tmp_path: Path
) -> None:
    assert_moves(store, plain_schema("docs"), plain_records(120), tmp_path, name="texts")
    ids = [point["id"] for body in bodies(standin, "/points", "PUT") for point in body["points"]]
    assert [uuid.UUID(text).version for text in ids] == [5] * 120


def assert_moves(
    store: QdrantStore, schema: CollectionSchema, records: list[Record], tmp_path: Path, *, name: str
) -> None:
    """Move records from memory into the store and back, and compare what arrived."""
    origin, back = MemoryStore(name=f"{name}-origin"), MemoryStore(name=f"{name}-back")
    origin.create(schema)
    origin.upsert(schema.name, to_batch(records, schema))
    for source, target in ((origin, store), (store, back)):
        config = MigrationConfig(
            source=source.address(schema.name), target=target.address(schema.name), partition_size=100
        )
        report = run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path)))
        assert report.status == "complete"
    assert by_id(read_all(back)) == by_id(records)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"x": 0.1 + 0.2}, "float"),
        ({"x": 2**64}, "big-int"),
        ({"x": math.nan}, "non-finite"),
        ({"deep": [{"x": 1e300}]}, "integral-float"),
        ({"document": "mine"}, "document"),
        ({"_source_norm": {"": 2.0}}, "_source_norm"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_the_engine_would_change_is_refused_before_anything_is_written(
    any_store: QdrantStore, metadata: dict[str, Any], words: str
) -> None:
    any_store.create(SCHEMA)
    records = [*some_records(2), Record(id=9, vectors={"": np.ones(8, np.float32)}, metadata=metadata)]
    with pytest.raises(errors.RecordRejectedError, match=words):
        any_store.upsert("docs", to_batch(records, SCHEMA))
    assert any_store.count("docs") == 0


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("record_id", [-1, 2**64, "abc", "1"])
def test_an_id_that_only_local_mode_would_take_is_refused(any_store: QdrantStore, record_id: Any) -> None:
    any_store.create(SCHEMA)
    record = Record(id=record_id, vectors={"": np.ones(8, np.float32)}, metadata={})
    with pytest.raises(errors.RecordRejectedError, match="id"):
        any_store.upsert("docs", to_batch([record], SCHEMA))
    assert any_store.fetch("docs", batches.id_batch([record_id])).num_rows == 0
    any_store.delete("docs", batches.id_batch([record_id]))


def test_spans_of_integers_and_uuids_hold_while_others_write(any_store: QdrantStore) -> None:
    schema = SCHEMA.model_copy(update={"id_kinds": frozenset({IdKind.INT, IdKind.UUID})})
    any_store.create(schema)
    rng = random.Random(1)
    ids = [*(n * 10 for n in range(40)), *(uuid.UUID(int=rng.getrandbits(128)) for _ in range(40))]
    records = [Record(id=i, vectors={"": np.ones(8, np.float32)}, metadata={}) for i in ids]
    any_store.upsert("docs", to_batch(records, schema))
    spans = [span for span, _ in any_store.split("docs", span_records=7)]
    assert sum(span.records for span in spans) == 80

    others = [Record(id=n * 10 + 5, vectors={"": np.zeros(8, np.float32)}, metadata={}) for n in range(40)]
    any_store.upsert("docs", to_batch(others, schema))
    any_store.delete("docs", batches.id_batch([0, 70, ids[40], 390]))  # bounds among them
    found = [r.id for s in spans for r in from_batches(any_store.scan("docs", s, batch_records=3))]
    assert len(found) == len(set(found))
    assert set(ids) - {0, 70, ids[40], 390} <= set(found)


def test_a_span_is_read_in_as_few_pages_as_hold_it(store: QdrantStore, standin: QdrantStandin) -> None:
    store.create(SCHEMA)
    store.upsert("docs", to_batch(some_records(60), SCHEMA))
    assert len(read_all(store, span_records=20)) == 60  # in pages of ten
    pages = [body for body in bodies(standin, "/scroll") if body["with_payload"]]
    assert [(body["offset"], body["limit"]) for body in pages] == [(n * 10, 10) for n in range(6)]


# ── cosine ───────────────────────────────────────────────────────────────────────────────────────────


def test_cosine_vectors_of_any_length_come_back_and_the_engine_holds_directions(
    any_store: QdrantStore,
) -> None:
    lengths = [1e-25, 1e-12, 1.0, 5.0, 1e20, 3e38]
    direction = np.array([0.6, 0.8, 0, 0, 0, 0, 0, 0])
    vectors = [*((direction * length).astype(np.float32) for length in lengths), np.zeros(8, np.float32)]
    records = [Record(id=n, vectors={"": v}, metadata={"n": n}) for n, v in enumerate(vectors)]
    any_store.create(COSINE)
    any_store.upsert("docs", to_batch(records, COSINE))

    assert any_store.vector_tolerance(COSINE) == 1e-6
    for found, record in zip(read_all(any_store), records, strict=True):
        np.testing.assert_allclose(found.vectors[""], record.vectors[""], rtol=1e-6, atol=0)
        assert found.metadata == record.metadata
        assert np.isfinite(found.vectors[""]).all()
    np.testing.assert_array_equal(read_all(any_store)[2].vectors[""], vectors[2])  # of length one: untouched


def test_the_length_lies_in_the_payload_under_a_key_of_its_own(
    store: QdrantStore, standin: QdrantStandin
) -> None:
    store.create(COSINE)
    unit = np.eye(8, dtype=np.float32)[0]
    records = [Record(id=n, vectors={"": unit * n}, metadata={"n": n}) for n in (1, 5)]
    store.upsert("docs", to_batch(records, COSINE))
    first, second = bodies(standin, "/points", "PUT")[0]["points"]
    assert first["payload"] == {"n": 1}
    assert second["payload"] == {"n": 5, "_source_norm": {"": 5.0}}
    assert second["vector"] == unit.tolist()


def test_a_field_of_that_name_that_is_not_ours_stays_the_users(
    store: QdrantStore, standin: QdrantStandin
) -> None:
    store.create(COSINE)
    payloads = [{"_source_norm": value} for value in (5.0, {"": "5"}, {"other": 5.0}, {"": -1.0}, {}, None)]
    shard = standin.collections["docs"].shards[None]
    points = [edge.Point(n, {"": [1.0] * 8}, payload) for n, payload in enumerate(payloads)]
    shard.update(edge.UpdateOperation.upsert_points(points))
    assert [record.metadata for record in read_all(store)] == payloads


@pytest.mark.parametrize("dtype", [DType.UINT8, DType.FLOAT16], ids=str)
def test_small_numbers_under_cosine_come_back_as_the_tolerance_says(store: QdrantStore, dtype: DType) -> None:
    schema = COSINE.model_copy(
        update={"vectors": (VectorField(dimensions=8, metric=Metric.COSINE, dtype=dtype),)}
    )
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 256, (50, 8)).astype(dtype.value)
    records = [Record(id=n, vectors={"": v}, metadata={}) for n, v in enumerate(matrix)]
    store.create(schema)
    store.upsert("docs", to_batch(records, schema))
    tolerance = store.vector_tolerance(schema)
    assert tolerance == (0 if dtype is DType.UINT8 else 2e-3)
    for found, row in zip(read_all(store), matrix, strict=True):
        off = np.abs(found.vectors[""].astype(float) - row.astype(float)).max()
        assert off <= tolerance * row.astype(float).max()


def test_lengths_of_named_and_multivectors_are_kept_each(any_store: QdrantStore) -> None:
    schema = CollectionSchema(
        name="docs",
        vectors=(
            VectorField(name="a", dimensions=2, metric=Metric.COSINE),
            VectorField(name="b", dimensions=2, metric=Metric.EUCLIDEAN),
            VectorField(name="m", kind=VectorKind.MULTI, dimensions=2, metric=Metric.COSINE),
        ),
        id_kinds=frozenset({IdKind.INT}),
    )
    vectors = {
        "a": np.array([3, 4], np.float32),
        "b": np.array([3, 4], np.float32),
        "m": [[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1e-20]],
    }
    records = [Record(id=1, vectors=vectors, metadata={}), Record(id=2, vectors={"a": None}, metadata={})]
    any_store.create(schema)
    any_store.upsert("docs", to_batch(records, schema))
    first, second = read_all(any_store)
    np.testing.assert_array_equal(first.vectors["b"], vectors["b"])
    np.testing.assert_allclose(first.vectors["a"], vectors["a"], rtol=1e-6)
    np.testing.assert_allclose(first.vectors["m"], np.array(vectors["m"]), rtol=1e-6)
    assert all(vector is None for vector in second.vectors.values())


# ── numbers as text ──────────────────────────────────────────────────────────────────────────────────


def test_every_float32_survives_the_text_both_ways() -> None:
    bits = np.random.default_rng(5).integers(0, 2**32, 200_000, dtype=np.uint32)
    numbers = bits.view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    sent = np.array([float(text) for text in json_rows(numbers.reshape(1, -1))[0][1:-1].split(b",")])
    for wrong in (
        sent,
        np.nextafter(sent, np.inf),
        np.nextafter(sent, -np.inf),
    ):  # as serde_json may parse them
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(wrong.astype(np.float32), numbers)
    shortest = [float(str(number)) for number in numbers[:20_000]]
    np.testing.assert_array_equal(parsed([shortest], np.float32)[0], numbers[:20_000])


def test_digits_that_read_as_the_middle_of_two_float32s_go_to_the_right_one() -> None:
    low = np.float32(1.0)
    high = np.nextafter(low, np.float32(2))
    middle = (float(low) + float(high)) / 2
    # Seventeen digits tell doubles apart; the digits of this one lie a little below the middle itself.
    exact, shown = f"{middle:.40f}", repr(middle)
    expected = high if float(shown) == middle and shown > exact.rstrip("0") else low
    assert parsed([[middle]], np.float32)[0, 0] == expected


# ── filters ──────────────────────────────────────────────────────────────────────────────────────────

_FIELDS: list[dict[str, Any]] = [
    {"n": 2024, "tag": "a", "a.b": 1, "ok": True},
    {"n": 2024.0, "tag": ["a", "b"], "a.b": 2, "ok": False},
    {"n": 2023, "tag": "b", "ok": 1},
    {"n": "2024", "tag": None},
    {"n": [2024, 1], "nested": {"n": 2024}},
    {"n": 0.1, "naïve": "ü", "with space": "x"},
    {"n": 1e-20, "tag": ""},
    {"n": 2**53, "tag": "A"},
    {"n": 2**53 + 1},
    {"n": -5, "a": {"b": 1}},
    {},
]
_FILTERS: list[Any] = [
    {"n": 2024},
    {"n": {"$gte": 2024}},
    {"n": {"$gt": 0.1}},
    {"n": {"$lte": 0.1}},
    {"n": {"$lt": 2**53 + 1}},
    {"n": 2**53 + 1},
    {"n": {"$in": [2024, "2024", -5]}},
    {"tag": "a"},
    {"tag": {"$ne": "a"}},
    {"tag": {"$exists": False}},
    {"tag": None},
    {"tag": ["a", "b"]},
    {"tag": {"$gt": "a"}},
    {"a.b": 1},
    {"naïve": "ü"},
    {"with space": "x"},
    {"ok": True},
    {"ok": 1},
    {"$and": [{"n": {"$gte": 2024}}, {"tag": {"$ne": "b"}}]},
    {"$or": [{"n": 2024}, {"tag": {"$exists": False}}]},
    {"$not": {"n": 2024}},
]


@pytest.mark.parametrize("text", _FILTERS, ids=str)
def test_what_is_handed_to_the_engine_lets_through_every_right_record(store: QdrantStore, text: Any) -> None:
    store.create(SCHEMA)
    records = [
        Record(id=n, vectors={"": np.ones(8, np.float32)}, metadata=fields)
        for n, fields in enumerate(_FIELDS)
    ]
    store.upsert("docs", to_batch(records, SCHEMA))
    where = filters.parse(text)
    assert where is not None
    right = {n for n, fields in enumerate(_FIELDS) if filters.matches(where, fields)}
    assert right <= {record.id for record in read_all(store, where=where)}
    assert store.count("docs", where) == len(right)
    found = store.search("docs", np.ones(8, np.float32), limit=20, where=where)
    assert {record_id for record_id, _ in found} == right


def test_a_filter_saves_reading_and_never_misses_what_lies_in_the_envelope(
    store: QdrantStore, standin: QdrantStandin, tmp_path: Path
) -> None:
    values = [1, 2**70, 2**70 + 1, 5, 2]
    origin = MemoryStore(name="filtered")
    origin.create(SCHEMA)
    records = [
        Record(id=n, vectors={"": np.ones(8, np.float32)}, metadata={"n": v}) for n, v in enumerate(values)
    ]
    origin.upsert("docs", to_batch(records, SCHEMA))
    back = MemoryStore(name="filtered-back")
    for source, target, where in ((origin, store, None), (store, back, {"n": {"$gte": 5}})):
        config = MigrationConfig(source=source.address("docs"), target=target.address("docs"), filter=where)
        assert (
            run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path))).status == "complete"
        )
    assert {record.metadata["n"] for record in read_all(back) if record.metadata} == {2**70, 2**70 + 1, 5}
    asked = [body["filter"] for body in bodies(standin, "/scroll") if "filter" in body]
    assert asked
    assert (
        len(read_all(store, where=filters.parse({"n": {"$gte": 5}}))) == 3
    )  # two of five stay on the server


# ── documents ────────────────────────────────────────────────────────────────────────────────────────


def test_a_langchain_collection_is_read_without_loss_whatever_is_called_the_document(
    store: QdrantStore, standin: QdrantStandin
) -> None:
    store.create(SCHEMA)
    payload = {"page_content": "the text", "metadata": {"source": "a.pdf", "page": 3}}
    point = edge.Point(1, {"": [1.0] * 8}, payload)
    standin.collections["docs"].shards[None].update(edge.UpdateOperation.upsert_points([point]))

    (plain,) = read_all(store)
    assert (plain.document, plain.metadata) == (None, payload)
    by_address, _ = open_address(f"qdrant://127.0.0.1:{standin.port}/docs?document_field=page_content")
    (record,) = read_all(by_address)
    assert (record.document, record.metadata) == ("the text", {"metadata": payload["metadata"]})
    by_address.upsert("docs", to_batch([record], SCHEMA))
    assert by_id(read_all(store)) == by_id([plain])
    by_address.close()


def test_a_document_key_that_holds_no_text_is_metadata(store: QdrantStore, standin: QdrantStandin) -> None:
    store.create(SCHEMA)
    point = edge.Point(1, {"": [1.0] * 8}, {"document": {"title": "x"}})
    standin.collections["docs"].shards[None].update(edge.UpdateOperation.upsert_points([point]))
    (record,) = read_all(store)
    assert (record.document, record.metadata) == (None, {"document": {"title": "x"}})


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────

_SETTINGS: dict[str, Any] = {
    "vectors": {
        "title": {
            "size": 4,
            "distance": "Manhattan",
            "on_disk": True,
            "hnsw_config": {"m": 24, "ef_construct": 150, "payload_m": 16},
            "quantization_config": {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}},
        },
        "size": {"size": 2, "distance": "Dot", "datatype": "float16"},
        "many": {"size": 2, "distance": "Cosine", "multivector_config": {"comparator": "max_sim"}},
    },
    "sparse_vectors": {"words": {"modifier": "idf", "index": {"on_disk": True}}},
    "hnsw_config": {"m": 8, "ef_construct": 64},
    "optimizers_config": {"indexing_threshold": 12345, "default_segment_number": 2},
    "quantization_config": {"binary": {"always_ram": True}},
    "shard_number": 3,
    "replication_factor": 2,
    "write_consistency_factor": 2,
    "on_disk_payload": False,
    "metadata": {"owner": "search", "made": {"by": "us"}},
}


def test_every_setting_travels_from_qdrant_to_qdrant(
    store: QdrantStore, standin: QdrantStandin, tmp_path: Path
) -> None:
    writer = store._writer()
    writer.create("docs", _SETTINGS)
    writer.create_index("docs", "tag", "keyword")
    writer.create_index("docs", "n", {"type": "integer", "lookup": False, "range": True})
    vectors = {
        "title": [1.0, 2.0, 3.0, 4.0],
        "many": [[1.0, 0.0]],
        "words": {"indices": [5, 1], "values": [1.0, 2.0]},
    }
    point = {"id": 1, "vector": vectors, "payload": {"n": 1, "tag": "x"}}
    writer.upsert("docs", [orjson.dumps(point)])
    config = MigrationConfig(
        source=store.address("docs"), target=store.address("copy"), allow_losses=("all",)
    )
    assert run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path))).status == "complete"

    first, second = (standin.collections[name].info() for name in ("docs", "copy"))
    assert second["payload_schema"] == first["payload_schema"]
    for key in ("params", "optimizer_config", "quantization_config", "metadata"):
        if key != "params":
            assert second["config"][key] == first["config"][key], key
    for name, params in first["config"]["params"]["vectors"].items():
        copied = second["config"]["params"]["vectors"][name]
        assert {**copied, "hnsw_config": {**params.get("hnsw_config", {}), **copied["hnsw_config"]}} == {
            **copied,
            **params,
            "hnsw_config": copied["hnsw_config"],
        }
    for key in (
        "sparse_vectors",
        "shard_number",
        "replication_factor",
        "write_consistency_factor",
        "on_disk_payload",
    ):
        assert second["config"]["params"][key] == first["config"]["params"][key]
    assert store.describe("copy").vectors == store.describe("docs").vectors
    assert by_id(read_all(store, "copy")) == by_id(read_all(store, "docs"))


@pytest.mark.parametrize("declared", [20_000, 12_345, 0])
def test_a_load_is_not_indexed_until_it_is_whole_and_then_as_declared(
    store: QdrantStore, standin: QdrantStandin, declared: int
) -> None:
    options = {"qdrant": {"optimizers_config": {"indexing_threshold": declared}}}
    store.create(SCHEMA.model_copy(update={"options": options}))

    def in_force() -> int:
        return int(standin.collections["docs"].optimizer["indexing_threshold"])

    for _ in range(2):  # the second time as after a crash
        store.begin_load("docs")
        assert in_force() == 0 or in_force() > 10**9
        found = store.describe("docs").options["qdrant"]["optimizers_config"]["indexing_threshold"]
        assert found == declared
    for _ in range(2):
        QdrantStore(host="127.0.0.1", port=standin.port).finish_load("docs")
        assert in_force() == declared


def test_points_go_to_the_shards_that_their_keys_name_and_keep_them(
    store: QdrantStore, standin: QdrantStandin, tmp_path: Path
) -> None:
    options = {"qdrant": {"sharding_method": "custom", "shard_keys": ["acme", 7]}}
    store.create(SCHEMA.model_copy(update={"options": options}))
    keys = ["acme", 7, "acme", 7, 7]
    records = [
        Record(id=n, vectors={"": np.ones(8, np.float32)}, metadata={"n": n, "_source_shard_key": key})
        for n, key in enumerate(keys)
    ]
    store.upsert("docs", to_batch(records, SCHEMA))
    assert {key: shard.info().points_count for key, shard in standin.collections["docs"].shards.items()} == {
        "acme": 2,
        7: 3,
    }
    assert by_id(read_all(store)) == by_id(records)
    with pytest.raises(errors.RecordRejectedError, match="_source_shard_key"):
        store.upsert("docs", to_batch(some_records(1, start=50), SCHEMA))

    config = MigrationConfig(source=store.address("docs"), target=store.address("copy"))
    assert run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path))).status == "complete"
    assert set(standin.collections["copy"].shards) == {"acme", 7}
    assert by_id(read_all(store, "copy")) == by_id(records)


def test_half_a_collection_does_not_stay(store: QdrantStore) -> None:
    options = {"qdrant": {"shard_keys": ["a"]}}  # without the sharding method that takes keys
    with pytest.raises(errors.StoreRefusedError, match="Auto sharding"):
        store.create(SCHEMA.model_copy(update={"options": options}))
    assert store.list_collections() == []


@pytest.mark.parametrize(
    "text",
    [
        "qdrant://localhost:6333/docs",
        "qdrant://example.org:443/docs?https=true",
        "qdrant://[::1]:6333/docs?document_field=page_content",
        "qdrant:./folder#docs",
        "qdrant::memory:#docs",
        "qdrant:./folder?document_field=text#docs",
        "qdrant://localhost:6333/docs?grpc=true",
        "qdrant://localhost:6333/docs?https=true&grpc_port=7334",
    ],
)
def test_addresses_come_back_as_they_were_given(text: str) -> None:
    found, collection = open_address(text)
    assert collection == "docs"
    assert found.address("docs") == text


@pytest.mark.parametrize(
    "text",
    [
        "qdrant:#docs",
        "qdrant:./db?colour=red#docs",
        "qdrant://h/docs?https=maybe",
        "qdrant:./db?https=true#d",
        "qdrant://h/docs?grpc=maybe",
        "qdrant://h/docs?grpc_port=http",
        "qdrant:./db?grpc=true#d",
    ],
)
def test_addresses_that_say_too_little_or_too_much_are_refused(text: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        open_address(text)
