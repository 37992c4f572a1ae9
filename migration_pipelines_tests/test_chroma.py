"""What is special to Chroma: the order of its answers, what it can't hold, and how it replaces records."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chromadb
import numpy as np
import pytest
from chromadb.config import Settings

from migration_pipelines import batch as batches
from migration_pipelines import errors
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.metadata import value_kind
from migration_pipelines.model import Metric, Span, ValueKind, VectorField
from migration_pipelines.stores.chroma import ChromaStore
from migration_pipelines.stores.chroma import records as chroma_records
from migration_pipelines_tests.harnesses.chroma import ChromaServer, EmbeddedChroma
from migration_pipelines_tests.records import (
    Record,
    by_id,
    from_batches,
    plain_records,
    plain_schema,
    to_batch,
)

SCHEMA = plain_schema("docs")
UNIT = np.eye(8, dtype=np.float32)[0]


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[EmbeddedChroma]:
    with EmbeddedChroma.start(tmp_path) as harness:
        yield harness


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaServer]:
    with ChromaServer.start(tmp_path_factory.mktemp("server")) as harness:
        yield harness


@pytest.fixture(params=["embedded", "server"])
def harness(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A folder or a server, with no collection in it."""
    started = request.getfixturevalue(request.param)
    yield started
    for collection in started.client.list_collections():
        started.client.delete_collection(collection.name)


def read_all(store: Any, collection: str = "docs", *, span_records: int = 25) -> list[Record]:
    spans = store.split(collection, span_records=span_records)
    return [
        record
        for span, ids in spans
        for record in from_batches(store.scan(collection, span, ids=ids, batch_records=10))
    ]


def test_a_folder_that_the_process_has_open_otherwise_says_so(tmp_path: Path) -> None:
    client = chromadb.PersistentClient(str(tmp_path), Settings(anonymized_telemetry=False, allow_reset=True))
    store = ChromaStore(path=str(tmp_path))
    with pytest.raises(ConfigurationError, match="this process has the folder open: close that client"):
        store.create(plain_schema("docs"))
    client.close()
    store.create(plain_schema("docs"))
    store.close()


def test_a_folder_that_had_no_room_is_opened_once_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chromadb.api.rust import RustBindingsAPI

    def refuse(_: Any) -> None:
        raise OSError("No space left on device")

    store = ChromaStore(path=str(tmp_path / "folder"))
    with monkeypatch.context() as full:
        full.setattr(RustBindingsAPI, "start", refuse)
        with pytest.raises(errors.DiskFullError):
            store.create(SCHEMA)
    store.create(SCHEMA)  # by an engine of its own: Chroma keeps the one that didn't start
    assert store.count("docs") == 0
    store.close()


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


def test_records_come_in_the_order_asked_for_not_in_chromas(harness: Any) -> None:
    records = plain_records(40)
    harness.write(SCHEMA, records)
    wanted = batches.id_batch([record.id for record in reversed(records)])
    found = from_batches(harness.store.scan("docs", Span(records=40), ids=wanted, batch_records=7))
    assert [record.exact() for record in found] == [record.exact() for record in reversed(records)]


def test_several_pages_make_one_batch(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chroma_records, "PAGE", 3)
    harness.write(SCHEMA, plain_records(10))
    ((span, ids),) = harness.store.split("docs", span_records=100)
    parts = list(harness.store.scan("docs", span, ids=ids, batch_records=8))
    assert [part.num_rows for part in parts] == [8, 2]
    assert by_id(from_batches(parts)) == by_id(plain_records(10))


def test_a_scan_without_its_ids_fails_rather_than_reading_nothing(embedded: EmbeddedChroma) -> None:
    embedded.write(SCHEMA, plain_records(2))
    with pytest.raises(errors.LedgerError, match="list of ids"):
        list(embedded.store.scan("docs", Span(records=2), batch_records=10))


def test_an_empty_collection_has_no_dimensions_and_no_records(harness: Any) -> None:
    harness.store.create(SCHEMA)
    assert harness.store.describe("docs").vectors[0].dimensions is None
    assert harness.store.fetch("docs", batches.id_batch(["a"])).num_rows == 0
    assert list(harness.store.split("docs", span_records=10)) == []


@pytest.mark.parametrize("metadata", [{"chroma:uri": "s3://b/1"}, {"chroma:uri": "", "a": 1}, {"a": 1}, None])
def test_a_uri_travels_as_a_metadata_field(harness: Any, metadata: dict[str, Any] | None) -> None:
    record = Record(id="a", vectors={"": UNIT}, metadata=metadata)
    harness.write(SCHEMA, [record])
    assert [found.exact() for found in read_all(harness.store)] == [record.exact()]
    harness.store.create(plain_schema("again"))
    harness.store.upsert("again", to_batch([record], SCHEMA))
    assert [found.exact() for found in harness.read("again")] == [record.exact()]


def test_a_collection_with_a_model_opens_without_it(embedded: EmbeddedChroma) -> None:
    embedded.client.create_collection("docs")  # with Chroma's default model
    embedded.store.upsert("docs", to_batch(plain_records(2), SCHEMA))
    assert embedded.store.describe("docs").options["embedding_function"] == "default"
    assert by_id(read_all(embedded.store)) == by_id(plain_records(2))


def test_a_server_that_changes_tells_so(harness: Any) -> None:
    harness.write(SCHEMA, plain_records(5))
    before = harness.store.fingerprint("docs")
    harness.store.upsert("docs", to_batch(plain_records(1, start=5), SCHEMA))
    harness.store.delete("docs", batches.id_batch(["doc#00000"]))  # the count is what it was
    assert harness.store.fingerprint("docs") != before


# ── collections ──────────────────────────────────────────────────────────────────────────────────────


def test_index_metric_and_properties_travel(harness: Any) -> None:
    index = {"type": "hnsw", "m": 24, "ef_construction": 120, "ef_search": 50}
    vector = VectorField(dimensions=8, metric=Metric.DOT, index=index)
    properties = {"owner": "käthe", "version": 2, "share": 0.5, "live": True}
    options = {"hnsw": {"resize_factor": 1.5, "sync_threshold": 500}}
    schema = SCHEMA.model_copy(
        update={"vectors": (vector,), "properties": properties, "options": options, "has_documents": True}
    )
    harness.store.create(schema)
    harness.store.upsert("docs", to_batch(plain_records(1), SCHEMA))
    assert harness.store.describe("docs") == schema


def test_the_older_way_to_set_an_index_is_understood(embedded: EmbeddedChroma) -> None:
    embedded.client.create_collection(
        "docs", metadata={"hnsw:space": "cosine", "hnsw:M": 20, "topic": "law"}, embedding_function=None
    )
    schema = embedded.store.describe("docs")
    assert (schema.vectors[0].metric, schema.vectors[0].index["m"]) == (Metric.COSINE, 20)
    assert schema.properties == {"topic": "law"}


def test_properties_that_chroma_cannot_hold_are_adapted_or_refused(embedded: EmbeddedChroma) -> None:
    schema = SCHEMA.model_copy(update={"properties": {"tags": ["a", "b"], "n": 1}})
    with pytest.raises(errors.ConfigurationError, match="tags"):
        embedded.store.create(schema)
    embedded.store.create(embedded.store.adapt(schema, {}))
    assert embedded.store.describe("docs").properties == {"tags": '["a", "b"]', "n": 1}


def test_more_collections_than_a_page_are_all_listed(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migration_pipelines.stores.chroma.store._NAMES_PAGE", 2)
    names = [f"c{number:03}" for number in range(5)]
    for name in names:
        harness.store.create(plain_schema(name))
    assert harness.store.list_collections() == names


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────


def test_an_upsert_leaves_nothing_of_the_old_record(harness: Any) -> None:
    old = Record(id="a", vectors={"": UNIT}, document="old", metadata={"k": 1, "chroma:uri": "u"})
    new = Record(id="a", vectors={"": UNIT * 2}, metadata={"other": 2})
    harness.write(SCHEMA, [old, *plain_records(3)])
    harness.store.upsert("docs", to_batch([new], SCHEMA))
    assert by_id(harness.read("docs")) == by_id([new, *plain_records(3)])


def test_what_chroma_holds_comes_back_exactly(harness: Any) -> None:
    dice = random.Random(3)
    floats = [float(f"{dice.randint(-(10**15) + 1, 10**15 - 1)}e{dice.randint(-22, 0)}") for _ in range(400)]
    floats = [value for value in floats if value_kind(value) is ValueKind.SHORT_FLOAT]
    values: list[Any] = [*floats, "", "a\0b", True, 2**53, 2**63 - 1, -(2**63), 1.0, 0.1, ["", "a\0"]]
    values += [[1, 2**63 - 1], [0.5, 0.1, 1.0], [True, False]]
    records = [
        Record(id=f"{row}\0\n🦜", vectors={"": UNIT}, document="\0ü", metadata={"käse.$#": value})
        for row, value in enumerate(values)
    ]
    harness.store.create(SCHEMA)
    harness.store.upsert("docs", to_batch(records, SCHEMA))
    assert by_id(harness.read("docs")) == by_id(records)
    assert by_id(read_all(harness.store, span_records=1000)) == by_id(records)


UNHOLDABLE_METADATA: list[dict[str, Any]] = [
    {},
    {"k": None},
    {"k": math.nan},
    {"k": -0.0},
    {"k": [-0.0]},
    {"k": 0.47547327193434563},
    {"k": 1e22},
    {"k": 2**63},
    {"k": {"a": 1}},
    {"k": [1, "a"]},
    {"k": []},
    {"": 1},
    {"$k": 1},
    {"#k": 1},
    {"chroma:document": "d"},
    {"chroma:else": "dropped without a word"},
    {"chroma:uri": 1},
]


@pytest.mark.parametrize("metadata", UNHOLDABLE_METADATA, ids=repr)
def test_metadata_that_chroma_would_change_is_refused_and_the_old_record_stays(
    embedded: EmbeddedChroma, metadata: dict[str, Any]
) -> None:
    old = Record(id="a", vectors={"": UNIT}, document="old", metadata={"k": 1})
    embedded.write(SCHEMA, [old])
    good = Record(id="b", vectors={"": UNIT})
    new = Record(id="a", vectors={"": UNIT}, metadata=metadata)
    with pytest.raises(errors.RecordRejectedError, match="'a'"):
        embedded.store.upsert("docs", to_batch([good, new], SCHEMA))
    assert by_id(embedded.read("docs")) == by_id([old])


@pytest.mark.parametrize(
    "record",
    [
        Record(id=1, vectors={"": UNIT}),
        Record(id="", vectors={"": UNIT}),
        Record(id="a", vectors={}),
        Record(id="a", vectors={"": np.full(8, np.nan, np.float32)}),
        Record(id="a", vectors={"": np.full(8, -np.inf, np.float32)}),
    ],
    ids=["int id", "empty id", "no vector", "NaN", "infinity"],
)
def test_records_that_chroma_cannot_hold_are_refused(embedded: EmbeddedChroma, record: Record) -> None:
    embedded.write(SCHEMA, plain_records(1))
    with pytest.raises(errors.RecordRejectedError):
        embedded.store.upsert("docs", to_batch([record], SCHEMA))
    assert by_id(embedded.read("docs")) == by_id(plain_records(1))


@pytest.mark.parametrize("length", [1e20, 1e-24])
def test_cosine_refuses_lengths_that_it_would_lose(embedded: EmbeddedChroma, length: float) -> None:
    schema = plain_schema("docs", metric=Metric.COSINE)
    embedded.store.create(schema)
    record = Record(id="a", vectors={"": UNIT * np.float32(length)})
    with pytest.raises(errors.RecordRejectedError, match="cosine"):
        embedded.store.upsert("docs", to_batch([record], schema))
    embedded.store.create(plain_schema("euclid"))
    embedded.store.upsert("euclid", to_batch([record], schema))
    assert by_id(embedded.read("euclid")) == by_id([record])


def test_cosine_keeps_the_lengths_that_it_takes_within_its_tolerance(harness: Any) -> None:
    schema = plain_schema("docs", metric=Metric.COSINE)
    dice = np.random.default_rng(0)
    matrix = dice.standard_normal((300, 8))
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix *= np.resize([1.01e-18, 1e-9, 1.0, 5.0, 1e9, 0.99e18], 300)[:, np.newaxis]
    matrix[7] = 0
    records = [Record(id=str(row), vectors={"": vector}) for row, vector in enumerate(matrix.astype("f4"))]
    harness.store.create(schema)
    harness.store.upsert("docs", to_batch(records, schema))
    tolerance = harness.store.vector_tolerance(schema)
    for wanted, found in zip(records, read_all(harness.store), strict=True):
        np.testing.assert_allclose(found.vectors[""], wanted.vectors[""], rtol=tolerance, atol=0)


def test_vectors_of_another_width_are_refused_before_the_old_ones_go(harness: Any) -> None:
    harness.write(SCHEMA, plain_records(3))
    wide = plain_schema("docs", dimensions=9)
    for start in (0, 3):  # records that are there, and new ones
        with pytest.raises(errors.DimensionMismatchError, match="9"):
            harness.store.upsert("docs", to_batch(plain_records(1, dimensions=9, start=start), wide))
    assert by_id(harness.read("docs")) == by_id(plain_records(3))


def test_a_column_that_chroma_has_no_place_for_is_refused(embedded: EmbeddedChroma) -> None:
    embedded.store.create(SCHEMA)
    schema = SCHEMA.model_copy(update={"has_namespaces": True})
    with pytest.raises(errors.UsageError, match="namespace"):
        embedded.store.upsert("docs", to_batch(plain_records(1), schema))


def test_a_write_that_does_not_show_is_no_success() -> None:
    deaf = SimpleNamespace(get=lambda **_: {"ids": []}, add=lambda **_: None)
    with pytest.raises(errors.TransientError, match="doesn't show all of 2"):
        chroma_records.replace_records(deaf, {"ids": ["a", "b"]}, where="chroma:x#docs")


def test_batches_larger_than_the_store_takes_are_cut(
    embedded: EmbeddedChroma, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(embedded.client), "get_max_batch_size", lambda _: 4)
    embedded.store.create(SCHEMA)
    embedded.store.upsert("docs", to_batch(plain_records(10), SCHEMA))
    assert by_id(embedded.read("docs")) == by_id(plain_records(10))


def test_a_closed_store_lets_go_of_its_folder_and_opens_again(tmp_path: Path) -> None:
    store = ChromaStore(path=str(tmp_path / "db"))
    for _ in range(2):
        store.create(SCHEMA)
        store.upsert("docs", to_batch(plain_records(3), SCHEMA))
        assert store.count("docs") == 3
        store.close()
        shutil.rmtree(tmp_path / "db")
    assert store.list_collections() == []


def test_tenants_and_databases_that_are_not_there_are_a_matter_of_configuration(harness: Any) -> None:
    harness.write(SCHEMA, plain_records(1))
    for division in ({"tenant": "nobody"}, {"database": "nothing"}):
        store = ChromaStore(**{**harness.store.model_dump(), **division})
        with pytest.raises(errors.ConfigurationError, match="not found"):
            store.count("docs")


def test_a_collection_that_is_not_there_is_answered_with_those_that_are(harness: Any) -> None:
    harness.store.create(plain_schema("tenants"))
    for ask in (harness.store.describe, harness.store.count, harness.store.drop):
        with pytest.raises(errors.CollectionNotFoundError, match="there are: tenants"):
            ask("Tenant")
    with pytest.raises(errors.CollectionExistsError):
        harness.store.create(plain_schema("tenants"))
