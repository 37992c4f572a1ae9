"""What Elasticsearch does to records behind one's back, and that the connector doesn't let it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elasticsearch import Elasticsearch

from migration_pipelines import batch as batches
from migration_pipelines import errors, filters
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import CollectionSchema, DType, Metric, VectorField, VectorKind
from migration_pipelines.stores.elasticsearch import ElasticsearchStore
from migration_pipelines.stores.elasticsearch.client import exact_json
from migration_pipelines.stores.elasticsearch.queries import query_for
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.conformance import adapted, ids_of, read_all, scanned, spans_of
from migration_pipelines_tests.records import Record, by_id, plain_records, plain_schema, to_batch
from migration_pipelines_tests.standins.elasticsearch import ElasticsearchStandin

SCHEMA = plain_schema("docs")
RECORDS = plain_records(20)
DENSE = {"type": "dense_vector", "dims": 3}
LANGCHAIN = {"properties": {"vector": DENSE, "text": {"type": "text"}, "metadata": {"type": "object"}}}


@pytest.fixture
def standin() -> Iterator[ElasticsearchStandin]:
    """A cluster of its own."""
    standin = ElasticsearchStandin()
    with standin.serving():
        yield standin


@pytest.fixture
def store(standin: ElasticsearchStandin) -> Iterator[ElasticsearchStore]:
    store = ElasticsearchStore(host="127.0.0.1", port=standin.port)
    yield store
    store.close()


@pytest.fixture
def client(standin: ElasticsearchStandin) -> Iterator[Elasticsearch]:
    """The vendor's client, by which an application writes."""
    client = Elasticsearch(f"http://127.0.0.1:{standin.port}", max_retries=0)
    yield client
    client.close()


def index(client: Elasticsearch, name: str, mappings: Any, sources: dict[str, Any], **settings: Any) -> None:
    """Make an index as an application does."""
    client.indices.create(index=name, mappings=mappings, settings=settings)
    put(client, name, sources)
    client.indices.refresh(index=name)


def put(client: Elasticsearch, name: str, sources: dict[str, Any], **meta: str) -> None:
    for key, source in sources.items():
        found = client.bulk(index=name, operations=[{"index": {"_id": key, **meta}}, source])
        assert not found["errors"], found


def found_in(store: ElasticsearchStore, name: str) -> dict[Any, Record]:
    return {record.id: record for record in read_all(store, name)}


# ── vectors that the server keeps apart ──────────────────────────────────────────────────────────────


def test_vectors_that_source_leaves_out_are_asked_for(
    store: ElasticsearchStore, client: Elasticsearch
) -> None:
    index(client, "docs", LANGCHAIN, {"a": {"vector": [3.0, 4.0, 0.0], "text": "x", "metadata": {"n": 1}}})
    plain = client.mget(index="docs", ids=["a"])["docs"][0]["_source"]
    assert plain == {"text": "x", "metadata": {"n": 1}}
    found = found_in(store, "docs")["a"]
    np.testing.assert_allclose(found.vectors[""], [3, 4, 0], rtol=1e-6)
    assert (found.document, found.metadata) == ("x", {"n": 1})


def test_the_tolerance_of_vectors_kept_apart_is_stated_and_true(
    store: ElasticsearchStore, client: Elasticsearch
) -> None:
    rng = np.random.default_rng(5)
    vectors = {str(n): rng.standard_normal(3).astype(np.float32) for n in range(200)}
    index(client, "docs", LANGCHAIN, {key: {"vector": v.tolist()} for key, v in vectors.items()})
    tolerance = store.vector_tolerance(store.describe("docs"))
    assert 0 < tolerance <= 1e-6
    found = found_in(store, "docs")
    off = [np.abs(found[key].vectors[""] / vector - 1).max() for key, vector in vectors.items()]
    assert 0 < max(off) <= tolerance


def test_an_index_that_the_tool_makes_keeps_cosine_vectors_bit_for_bit(
    standin: ElasticsearchStandin, store: ElasticsearchStore
) -> None:
    schema = store.adapt(plain_schema("docs", metric=Metric.COSINE), {})
    records = plain_records(100)
    store.create(schema)
    store.upsert("docs", to_batch(records, schema))
    assert not standin.indices["docs"].hides_vectors
    assert store.vector_tolerance(store.describe("docs")) == 0
    assert by_id(read_all(store, "docs")) == by_id(records)


def test_a_vector_that_the_server_holds_back_is_an_error_and_one_that_is_not_there_is_none(
    standin: ElasticsearchStandin, store: ElasticsearchStore, client: Elasticsearch
) -> None:
    index(client, "docs", LANGCHAIN, {"a": {"vector": [1.0, 2.0, 2.0]}, "b": {"text": "without"}})
    assert found_in(store, "docs")["b"].vectors[""] is None
    standin.withholds = True
    with pytest.raises(errors.StoreRefusedError, match=r"1 of 2 .* without the vector"):
        read_all(store, "docs")


@pytest.mark.parametrize("version", ["8.11.4", "8.17.0", "9.1.4"])
def test_an_older_server_is_asked_nothing_that_it_does_not_know(version: str) -> None:
    standin = ElasticsearchStandin(version)
    with standin.serving():
        store = ElasticsearchStore(host="127.0.0.1", port=standin.port)
        store.create(SCHEMA)
        store.upsert("docs", to_batch(RECORDS, SCHEMA))
        assert by_id(read_all(store, "docs")) == by_id(RECORDS)
        store.finish_load("docs")
        assert store.search("docs", RECORDS[0].vectors[""], limit=1)[0][0] == RECORDS[0].id
        store.close()


@pytest.mark.parametrize(
    ("version", "asked", "made"),
    [
        ("8.17.0", {"type": "bbq_hnsw", "m": 16, "rescore_vector": {"oversample": 3.0}}, "bbq_hnsw"),
        ("8.17.0", {"type": "bbq_disk"}, "int8_hnsw"),
        ("8.11.4", {"type": "int8_hnsw", "m": 16, "ef_construction": 100}, None),
        ("9.2.0", {"type": "bbq_disk", "rescore_vector": {"oversample": 3.0}}, "bbq_disk"),
    ],
)
def test_settings_that_a_server_is_too_old_to_know_are_left_to_it(
    version: str, asked: dict[str, Any], made: str | None
) -> None:
    options = options_made(version, {"elasticsearch": {"index_options": asked}})
    assert options.get("type") == made
    assert ("rescore_vector" in options) is (version == "9.2.0")


def test_a_graph_is_asked_for_by_both_its_numbers() -> None:
    options = options_made("8.11.4", {"type": "hnsw", "m": 8})
    assert options == {"type": "hnsw", "m": 8, "ef_construction": 100}


def options_made(version: str, index: dict[str, Any]) -> dict[str, Any]:
    """What a server of a version has of the index that a schema asks for."""
    standin = ElasticsearchStandin(version)
    (field,) = SCHEMA.vectors
    asking = field.model_copy(update={"index": index})
    with standin.serving():
        store = ElasticsearchStore(host="127.0.0.1", port=standin.port)
        store.create(SCHEMA.model_copy(update={"vectors": (asking,)}))
        store.close()
    found: dict[str, Any] = standin.indices["docs"].mapper.fields["vector"].get("index_options", {})
    return found


def test_vectors_that_an_old_server_does_not_index_have_no_metric() -> None:
    standin = ElasticsearchStandin("8.9.2")
    mapping = {"properties": {"vector": {"type": "dense_vector", "dims": 3}}}
    with standin.serving():
        standin.make("docs", {}, mapping)
        store = ElasticsearchStore(host="127.0.0.1", port=standin.port)
        (field,) = store.describe("docs").vectors
        store.close()
    assert (field.dimensions, field.metric) == (3, None)


@pytest.mark.parametrize(
    ("metric", "mapping", "vector", "why"),
    [
        (Metric.COSINE, {}, [0.0, 0.0, 0.0], "length zero"),
        (Metric.COSINE, {}, [1e-30, 0.0, 0.0], "length zero"),
        (Metric.DOT, {"similarity": "dot_product"}, [1.0, 1.0, 0.0], "length one"),
    ],
)
def test_a_length_that_the_similarity_has_no_place_for_is_refused_before_anything_is_written(
    standin: ElasticsearchStandin,
    store: ElasticsearchStore,
    metric: Metric,
    mapping: dict[str, Any],
    vector: list[float],
    why: str,
) -> None:
    field = VectorField(dimensions=3, metric=metric, index={"elasticsearch": mapping} if mapping else {})
    schema = SCHEMA.model_copy(update={"vectors": (field,)})
    store.create(schema)
    good = Record(id="good", vectors={"": np.array([1, 0, 0], np.float32)})
    bad = Record(id="bad", vectors={"": np.array(vector, np.float32)})
    with pytest.raises(errors.RecordRejectedError, match=f"'bad'.*{why}"):
        store.upsert("docs", to_batch([good, bad], schema))
    assert not standin.indices["docs"].live
    store.upsert("docs", to_batch([good], schema))


def test_a_dot_product_of_any_length_is_kept(store: ElasticsearchStore) -> None:
    schema = plain_schema("docs", metric=Metric.DOT)
    store.create(schema)
    store.upsert("docs", to_batch(RECORDS, schema))
    assert store.describe("docs").vectors[0].metric is Metric.DOT


@pytest.mark.parametrize(
    "field",
    [
        VectorField(dimensions=12, dtype=DType.BIT, metric=Metric.HAMMING),
        VectorField(dimensions=16, dtype=DType.BIT, metric=Metric.COSINE),
        VectorField(dimensions=16, metric=Metric.HAMMING),
        VectorField(name="document", dimensions=3),
    ],
    ids=["not-eights", "bits-by-cosine", "floats-by-hamming", "taken-name"],
)
def test_a_vector_field_that_can_not_be_is_refused(store: ElasticsearchStore, field: VectorField) -> None:
    with pytest.raises(errors.ConfigurationError):
        store.create(SCHEMA.model_copy(update={"vectors": (field,)}))
    assert store.list_collections() == []


def test_a_sparse_weight_that_is_not_positive_is_refused(store: ElasticsearchStore) -> None:
    field = VectorField(kind=VectorKind.SPARSE, dimensions=None)
    schema = SCHEMA.model_copy(update={"vectors": (field,)})
    store.create(schema)
    for weight in (0.0, -1.0, 1e-40):
        record = Record(id="a", vectors={"": {"indices": [1, 2], "values": [1.0, weight]}})
        with pytest.raises(errors.RecordRejectedError, match="above zero"):
            store.upsert("docs", to_batch([record], schema))


def test_vectors_written_as_text_are_read(store: ElasticsearchStore, client: Elasticsearch) -> None:
    mappings = {
        "properties": {"vector": DENSE, "code": {"type": "dense_vector", "dims": 2, "element_type": "byte"}}
    }
    numbers = np.array([1.5, -2, 3], ">f4").tobytes()
    source = {"vector": base64.b64encode(numbers).decode(), "code": "ff7f"}
    index(client, "docs", mappings, {"a": source}, **{"mapping.exclude_source_vectors": False})
    found = found_in(store, "docs")["a"].vectors
    assert (found[""].tolist(), found["code"].tolist()) == ([1.5, -2, 3], [-1, 127])


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────


def test_types_that_conflict_dates_and_a_thousand_fields_change_nothing(
    standin: ElasticsearchStandin, store: ElasticsearchStore
) -> None:
    values = [1, "one", {"a": 1}, [1, 2], None, "2024-01-01", 1.5, True, 2**70, -0.0, 1e22, "x" * 40_000]
    records = [
        Record(
            id=str(n), vectors={"": np.ones(8, np.float32)}, metadata={"mixed": value, f"d.{n}": "2024-02-30"}
        )
        for n, value in enumerate(values)
    ]
    many = {f"field{n}": n for n in range(1500)}
    records.append(Record(id="many", vectors={"": np.ones(8, np.float32)}, metadata=many))
    schema = adapted(store, SCHEMA, records)
    store.create(schema)
    store.upsert("docs", to_batch(records, schema))
    assert by_id(read_all(store, "docs")) == by_id(records)
    assert len(standin.indices["docs"].mapper.fields) < 600
    kinds = {mapping["type"] for mapping in standin.indices["docs"].mapper.fields.values()}
    assert "date" not in kinds


def test_fields_of_one_simple_kind_are_indexed_for_the_users_queries(
    store: ElasticsearchStore, client: Elasticsearch
) -> None:
    schema = adapted(store, SCHEMA, RECORDS)
    store.create(schema)
    store.upsert("docs", to_batch(RECORDS, schema))
    store.finish_load("docs")
    mapping = client.indices.get_mapping(index="docs")["docs"]["mappings"]["properties"]["metadata"]
    types = {name: field["type"] for name, field in mapping["properties"].items()}
    assert types == {"n": "long", "even": "boolean", "tag": "keyword", "half": "double"}
    found = client.count(index="docs", query={"range": {"metadata.n": {"lt": 5}}})
    assert found["count"] == 5


def test_a_filter_is_asked_of_the_server_and_its_answer_is_the_same(
    standin: ElasticsearchStandin, store: ElasticsearchStore
) -> None:
    odd = [2**70, "5", 5.5, None, [5, 6], True, "y" * 9_000]
    records = [
        *plain_records(200),
        *(
            Record(id=f"odd{n}", vectors={"": np.ones(8, np.float32)}, metadata={"n": v, "tag": str(v)})
            for n, v in enumerate(odd)
        ),
    ]
    schema = adapted(store, SCHEMA, plain_records(5))
    store.create(schema)
    store.upsert("docs", to_batch(records, schema))
    batch = to_batch(records, schema)
    fewer = 0
    for text in ("n=5", "n>=190", "n<5", "tag=t3", "even=true,n<50", "half=2.5", "n>1000", 'tag="5"'):
        where = filters.parse(text)
        assert where is not None
        expected = batches.typed_ids(batch.filter(filters.mask(where, batch)))
        listed = {
            i
            for _, ids in store.split("docs", span_records=1000, where=where)
            for i in batches.typed_ids(ids)
        }
        assert set(expected) <= listed, text
        assert store.count("docs", where) == len(expected), text
        fewer += len(listed) < len(records)
    assert fewer == 8


@pytest.mark.parametrize("text", ["missing=1", "n=x", 'tag="' + "y" * 9_000 + '"', "n!=5", "tag<m"])
def test_what_the_server_would_answer_otherwise_it_is_not_asked(text: str) -> None:
    fields = {"n": "long", "tag": "keyword"}
    assert query_for(filters.parse(text), fields, prefix="metadata.") is None


def test_numbers_of_any_size_are_parsed_exactly() -> None:
    text = b'{"a":18446744073709551616,"b":-0.0,"c":1e22,"d":9007199254740993,"e":0.1}'
    found = exact_json(text)
    assert found == json.loads(text)
    assert str(found["b"]) == "-0.0"
    assert isinstance(found["a"], int)


def test_a_blank_name_goes_to_the_envelope_and_comes_back(store: ElasticsearchStore, tmp_path: Path) -> None:
    metadata = {"": 1, " ": 2, "a.b": 3, ".": 4, "$typed": 5}
    records = [Record(id=str(n), vectors={"": np.ones(8, np.float32)}, metadata=metadata) for n in range(3)]
    ids = ["x" * 600, "", 7]
    records += [Record(id=i, vectors={"": np.ones(8, np.float32)}) for i in ids]
    origin, back = MemoryStore(name="es-blank"), MemoryStore(name="es-blank-back")
    schema = SCHEMA.model_copy(update={"id_kinds": frozenset(batches.IdKind)})
    origin.create(schema)
    origin.upsert("docs", to_batch(records, schema))
    move(origin, store, tmp_path)
    move(store, back, tmp_path)
    assert by_id(read_all(back, "docs")) == by_id(records)


def move(source: Any, target: Any, folder: Path, *, to: str = "docs", **options: Any) -> None:
    """Move `docs` from one store to another, everything verified."""
    config = MigrationConfig(source=source.address("docs"), target=target.address(to), **options)
    report = run_migration(Migration(config=config, ledger=ledger_for(config, folder)))
    assert report.status == "complete", report


# ── indices of others ────────────────────────────────────────────────────────────────────────────────


def test_an_index_of_fields_is_read_with_all_of_them_as_metadata(
    store: ElasticsearchStore, client: Elasticsearch
) -> None:
    mappings = {"properties": {"title_vector": DENSE, "title": {"type": "text"}, "body": {"type": "text"}}}
    source = {"title_vector": [1.0, 2.0, 2.0], "title": "t", "body": "b", "year": 2024, "when": "2024-01-01"}
    index(client, "docs", mappings, {"a": source})
    found = found_in(store, "docs")["a"]
    assert (found.document, found.metadata) == (
        None,
        {"title": "t", "body": "b", "year": 2024, "when": "2024-01-01"},
    )
    assert list(found.vectors) == ["title_vector"]
    chosen = store.model_copy(update={"document_field": "body", "vector_field": "title_vector"})
    found = found_in(chosen, "docs")["a"]
    assert (found.document, sorted(found.metadata or {}), list(found.vectors)) == (
        "b",
        ["title", "when", "year"],
        [""],
    )


def test_vectors_inside_objects_are_found_under_their_path(
    store: ElasticsearchStore, client: Elasticsearch
) -> None:
    mappings = {"properties": {"inner": {"properties": {"v": DENSE, "n": {"type": "long"}}}}}
    index(
        client, "docs", mappings, {"a": {"inner": {"v": [1.0, 0.0, 0.0], "n": 1}}, "b": {"inner": {"n": 2}}}
    )
    found = found_in(store, "docs")
    assert found["a"].vectors["inner.v"].tolist() == [1, 0, 0]
    assert (found["a"].metadata, found["b"].metadata) == ({"inner": {"n": 1}}, {"inner": {"n": 2}})


def test_a_field_that_the_layout_has_no_place_for_is_an_error_and_not_lost(
    store: ElasticsearchStore, client: Elasticsearch
) -> None:
    mappings = {**LANGCHAIN, "dynamic": False}
    index(client, "docs", mappings, {"a": {"vector": [1.0, 0.0, 0.0], "metadata": {}, "extra": 1}})
    with pytest.raises(errors.StoreRefusedError, match="extra"):
        read_all(store, "docs")
    flat = store.model_copy(update={"metadata_field": ""})
    assert found_in(flat, "docs")["a"].metadata == {"extra": 1, "metadata": {}}


def test_records_with_a_routing_of_their_own_are_read(
    store: ElasticsearchStore, client: Elasticsearch
) -> None:
    client.indices.create(index="docs", mappings=LANGCHAIN, settings={"number_of_shards": 5})
    for n in range(20):
        put(client, "docs", {str(n): {"vector": [1.0, n, 0.0]}}, routing=f"tenant{n % 3}")
    client.indices.refresh(index="docs")
    assert len(found_in(store, "docs")) == 20
    assert store.fetch("docs", ids_of([Record(id=str(n)) for n in range(20)])).num_rows == 20


def test_an_index_without_source_is_refused(store: ElasticsearchStore, client: Elasticsearch) -> None:
    client.indices.create(index="docs", mappings={"_source": {"enabled": False}, **LANGCHAIN})
    with pytest.raises(errors.StoreRefusedError, match="_source"):
        store.describe("docs")


def test_an_index_moves_to_another_with_its_mapping_and_settings(
    store: ElasticsearchStore, client: Elasticsearch, tmp_path: Path
) -> None:
    analysis = {"analyzer": {"mine": {"type": "custom", "tokenizer": "whitespace"}}}
    options = {"type": "int8_hnsw", "m": 24, "ef_construction": 200}
    mappings = {
        "properties": {
            "vector": {**DENSE, "similarity": "l2_norm", "index_options": options},
            "title": {"type": "text", "analyzer": "mine"},
            "year": {"type": "integer"},
        }
    }
    sources = {str(n): {"vector": [1.0, n, 0.5], "title": f"t{n}", "year": n} for n in range(50)}
    index(client, "docs", mappings, sources, number_of_shards=3, analysis=analysis)
    move(store, store, tmp_path, to="copy")
    made = client.indices.get(index="copy", flat_settings=True)["copy"]
    assert made["mappings"]["properties"]["title"] == {"type": "text", "analyzer": "mine"}
    assert made["mappings"]["properties"]["vector"]["index_options"] == options
    assert made["settings"]["index.number_of_shards"] == "3"
    assert made["settings"]["index.analysis.analyzer.mine.tokenizer"] == "whitespace"
    assert by_id(read_all(store, "copy")) == by_id(read_all(store, "docs"))
    assert client.count(index="copy", query={"range": {"year": {"gte": 40}}})["count"] == 10


# ── visibility ───────────────────────────────────────────────────────────────────────────────────────


def test_what_was_not_refreshed_is_listed_and_counted_too(
    standin: ElasticsearchStandin, store: ElasticsearchStore, client: Elasticsearch
) -> None:
    index(client, "docs", LANGCHAIN, {"a": {"vector": [1.0, 0.0, 0.0]}}, refresh_interval="-1")
    put(client, "docs", {"b": {"vector": [0.0, 1.0, 0.0]}})
    assert (store.count("docs"), set(found_in(store, "docs"))) == (2, {"a", "b"})
    put(client, "docs", {"c": {"vector": [0.0, 1.0, 0.0]}})
    standin.forbidden = {"/_refresh"}
    with pytest.raises(errors.AuthenticationError):
        store.count("docs")


def test_a_login_that_may_only_read_reads_an_index_that_refreshes_by_itself(
    standin: ElasticsearchStandin, store: ElasticsearchStore, client: Elasticsearch
) -> None:
    index(client, "docs", LANGCHAIN, {"a": {"vector": [1.0, 0.0, 0.0]}})
    standin.forbidden = {"/_refresh", "/_bulk"}
    assert set(found_in(store, "docs")) == {"a"}


def test_ids_are_those_of_one_moment_and_each_once_over_many_pages(
    store: ElasticsearchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migration_pipelines.stores.elasticsearch.index.PAGE", 7)
    store.create(SCHEMA)
    store.upsert("docs", to_batch(plain_records(100), SCHEMA))
    seen: list[Any] = []
    for number, (_, ids) in enumerate(store.split("docs", span_records=5)):
        assert ids is not None
        seen += batches.typed_ids(ids)
        store.delete("docs", ids_of(plain_records(1, start=number)))
        store.upsert("docs", to_batch(plain_records(1, start=500 + number), SCHEMA))
    assert sorted(seen) == sorted(record.id for record in plain_records(100))


def test_spans_hold_when_the_view_is_gone(standin: ElasticsearchStandin, store: ElasticsearchStore) -> None:
    store.create(SCHEMA)
    store.upsert("docs", to_batch(RECORDS, SCHEMA))
    spans = spans_of(store, "docs", 6)
    assert not standin.views  # closed, not left to expire
    found = [i for part in scanned(store, "docs", spans) for i in batches.typed_ids(part)]
    assert sorted(found) == sorted(record.id for record in RECORDS)


def test_the_fingerprint_sees_an_update_in_place(store: ElasticsearchStore) -> None:
    store.create(SCHEMA)
    store.upsert("docs", to_batch(RECORDS, SCHEMA))
    before = store.fingerprint("docs")
    store.upsert("docs", to_batch(plain_records(1, seed=4), SCHEMA))
    assert store.fingerprint("docs") != before


def test_an_alias_moves_in_one_request_and_never_hides_an_index(
    standin: ElasticsearchStandin, store: ElasticsearchStore
) -> None:
    for name in ("one", "two"):
        store.create(plain_schema(name))
    store.set_alias("live", "one")
    store.set_alias("live", "two")
    sent = [request.json() for request in standin.requests if request.path == "/_aliases"][-1]
    assert [next(iter(action)) for action in sent["actions"]] == ["remove", "add"]
    assert store.describe("live").name == "live"
    with pytest.raises(errors.ConfigurationError, match="name"):
        store.set_alias("one", "two")
    with pytest.raises(errors.StoreRefusedError, match="alias"):
        store.drop("live")
    assert store.list_collections() == ["one", "two"]


def test_distances_are_those_of_the_vectors_whatever_the_server_scores(store: ElasticsearchStore) -> None:
    vectors = np.stack([record.vectors[""] for record in RECORDS]).astype(float)
    query = vectors[3] + 0.1
    expected = {
        Metric.EUCLIDEAN: np.linalg.norm(vectors - query, axis=1),
        Metric.COSINE: 1 - vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query),
        Metric.DOT: -(vectors @ query),
    }
    for metric, distances in expected.items():
        schema = plain_schema(f"by-{metric}", metric=metric)
        store.create(schema)
        store.upsert(schema.name, to_batch(RECORDS, schema))
        store.finish_load(schema.name)
        found = [distance for _, distance in store.search(schema.name, query, limit=20)]
        np.testing.assert_allclose(found, np.sort(distances), atol=1e-4)


def test_every_request_is_paced(standin: ElasticsearchStandin, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(ElasticsearchStore, "pace", lambda _, size=0: sent.append(size))
    store = ElasticsearchStore(host="127.0.0.1", port=standin.port)
    store.create(SCHEMA)
    store.upsert("docs", to_batch(RECORDS, SCHEMA))
    read_all(store, "docs")
    store.fingerprint("docs")
    assert len(sent) == len(standin.requests)
    assert sum(sent) == sum(len(request.body) for request in standin.requests)
    store.close()


def test_a_schema_of_two_vectors_moves_with_their_names(store: ElasticsearchStore, tmp_path: Path) -> None:
    fields = (
        VectorField(name="title", dimensions=3, metric=Metric.COSINE, index={"type": "hnsw", "m": 8}),
        VectorField(name="bits", dimensions=16, dtype=DType.BIT, metric=Metric.HAMMING),
        VectorField(name="tokens", kind=VectorKind.MULTI, dimensions=2, metric=Metric.DOT),
        VectorField(name="words", kind=VectorKind.SPARSE, dimensions=None, metric=Metric.DOT),
    )
    schema = CollectionSchema(
        name="docs", vectors=fields, id_kinds=SCHEMA.id_kinds, properties={"owner": "me"}
    )
    record = Record(
        id="a",
        vectors={
            "title": np.array([1, 2, 3], np.float32),
            "bits": np.array([255, 1], np.uint8),
            "tokens": [[1.0, 2.0], [3.0, 4.0]],
            "words": {"indices": [4, 9], "values": [0.5, 1.0]},
        },
        document="d",
    )
    origin, back = MemoryStore(name="es-many"), MemoryStore(name="es-many-back")
    origin.create(schema)
    origin.upsert("docs", to_batch([record], schema))
    move(origin, store, tmp_path)
    made = store.describe("docs")
    assert made.properties == {"owner": "me"}
    assert {(f.name, f.kind, f.dtype, f.dimensions, f.metric) for f in made.vectors} == {
        (f.name, f.kind, f.dtype, f.dimensions, f.metric) for f in fields
    }
    assert next(f for f in made.vectors if f.name == "title").index["m"] == 8
    move(store, back, tmp_path)
    wanted, ids = to_batch([record], schema), ids_of([record])
    assert batches.digest([back.fetch("docs", ids)]) == batches.digest([wanted.select(wanted.schema.names)])
