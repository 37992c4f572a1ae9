"""Weaviate's traps: names, types, tenants, collections of other tools' making, what its client would drop."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from weaviate.classes.config import Configure, DataType, Property, ReferenceProperty
from weaviate.classes.tenants import Tenant, TenantActivityStatus

from migration_pipelines import batch as batches
from migration_pipelines import errors
from migration_pipelines.model import CollectionSchema, IdKind, Metric, VectorField, VectorKind
from migration_pipelines.store import open_address
from migration_pipelines.stores.weaviate import WeaviateStore
from migration_pipelines_tests.conformance import adapted, assert_same, ids_of, load, read_all
from migration_pipelines_tests.harnesses.weaviate import Weaviate
from migration_pipelines_tests.records import Record, by_id, from_batches, plain_records, to_batch
from migration_pipelines_tests.standins.weaviate import WeaviateStandin

SCHEMA = CollectionSchema(
    name="Docs",
    vectors=(VectorField(dimensions=8, metric=Metric.COSINE),),
    id_kinds=frozenset({IdKind.UUID}),
)


def some_records(n: int, *, start: int = 0, **changes: Any) -> list[Record]:
    """Ordinary records under UUIDs, in the order of their ids."""
    made = plain_records(n, start=start)
    return [replace(r, id=uuid.UUID(int=number), **changes) for number, r in enumerate(made, start)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weaviate]:
    with Weaviate.start(tmp_path_factory.mktemp("weaviate")) as running:
        yield running


@pytest.fixture
def store(server: Weaviate) -> Iterator[WeaviateStore]:
    """A store on the server; what a test creates there is removed after it."""
    aliases, classes = aliases_of(server), set(server.store.list_collections())
    yield server.store
    for alias in aliases_of(server) - aliases:
        server.client.alias.delete(alias_name=alias)
    for name in set(server.store.list_collections()) - classes:
        server.client.collections.delete(name)


@pytest.fixture
def client(server: Weaviate) -> Any:
    """The vendor's own client."""
    return server.client


@pytest.fixture
def standin(server: Weaviate) -> WeaviateStandin:
    """The stand-in, for what is looked at or changed behind the interface."""
    if server.standin is None:
        pytest.skip("a real server can't be looked into")
    server.standin.grpc_requests.clear()
    return server.standin


def aliases_of(server: Weaviate) -> set[str]:
    return set(server.client.alias.list_all())


def class_of(store: WeaviateStore, name: str = "Docs") -> Any:
    """A class as the server describes it."""
    return store._rest("GET", f"/schema/{name}")


def types_of(store: WeaviateStore) -> dict[str, str]:
    """The type of each property of `Docs`."""
    return {item["name"]: item["dataType"][0] for item in class_of(store).get("properties") or ()}


def bound(store: WeaviateStore, tenant: str) -> WeaviateStore:
    """The same server, one tenant of it alone."""
    return WeaviateStore(host=store.host, port=store.port, grpc_port=store.grpc_port, namespace=tenant)


# ── names and addresses ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "weaviate://localhost:8080/Docs",
        "weaviate://localhost:8080/Docs?grpc_port=50052&namespace=acme",
        "weaviate://x.weaviate.cloud:443/Docs?https=true&grpc_host=grpc-x.weaviate.cloud",
        "weaviate://[::1]:8080/Docs?document_field=text",
    ],
)
def test_addresses_come_back_as_they_were_given(text: str) -> None:
    store, collection = open_address(text)
    assert collection == "Docs"
    assert store.address("Docs") == text


@pytest.mark.parametrize(
    "text",
    [
        "weaviate:Docs",
        "weaviate://h/Docs?colour=red",
        "weaviate://h/Docs?https=maybe",
        "weaviate://h/Docs?grpc_port=x",
        "weaviate://h/Docs?namespace=a%20b",
        "weaviate://h/Docs?document_field=Title",
    ],
)
def test_addresses_that_say_too_little_or_too_much_are_refused(text: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        open_address(text)


def test_two_spellings_of_a_name_are_one_collection(store: WeaviateStore) -> None:
    """Were they two, `replace` could drop the source of a migration as its target."""
    assert store.address("docs") == store.address("Docs")
    load(store, SCHEMA.model_copy(update={"name": "docs"}), some_records(3))
    assert [name for name in store.list_collections() if name.lower() == "docs"] == ["Docs"]
    assert store.count("docs") == store.count("Docs") == 3


@pytest.mark.parametrize(
    "key",
    [
        *("Title", "id", "_id", "_additional", "vector", "document", "_more_fields", "a b", "", "ключ"),
        *("x" * 232, "__typename", "a_temp", "a_nullState", "a_searchable"),
    ],
)
def test_names_that_weaviate_changes_or_forbids_are_left_to_the_envelope(
    store: WeaviateStore, key: str
) -> None:
    assert not store.accepts_key(key)


def test_title_and_lower_case_title_stay_two_fields(store: WeaviateStore) -> None:
    """The server lower-cases the first letter: one would overwrite the other."""
    records = some_records(2, metadata={"Title": "a", "title": "b"})
    load(store, SCHEMA, records)
    assert_same(read_all(store, "Docs"), records, store)


@pytest.mark.parametrize("name", ["my-docs", "1docs", "naïve"])
def test_a_collection_that_weaviate_can_not_name_is_refused_before_anything_is_read(
    store: WeaviateStore, name: str
) -> None:
    with pytest.raises(errors.ConfigurationError, match="letters, digits and _"):
        store.adapt(SCHEMA.model_copy(update={"name": name}), {})


@pytest.mark.parametrize("name", ["text-embedding", "default"])
def test_a_vector_that_weaviate_can_not_name_is_refused(store: WeaviateStore, name: str) -> None:
    fields = (VectorField(dimensions=8), VectorField(name=name, dimensions=2))
    with pytest.raises(errors.ConfigurationError, match=name):
        store.adapt(SCHEMA.model_copy(update={"vectors": fields}), {})


def test_an_alias_is_told_by_what_it_points_at(store: WeaviateStore) -> None:
    """Were it taken for a collection, `replace` could drop the source of a migration under another name."""
    load(store, SCHEMA, some_records(3))
    store.set_alias("current", "Docs")
    assert store.aliases("Docs") == ["Current"]
    for operation in (store.describe, store.drop):
        with pytest.raises(errors.ConfigurationError, match="alias of Docs"):
            operation("Current")
    assert store.count("Docs") == 3


def test_a_collection_whose_name_differs_in_case_alone_is_told(store: WeaviateStore) -> None:
    """On disk they would be one, so that Weaviate has only one of them."""
    load(store, SCHEMA, some_records(1))
    with pytest.raises(errors.CollectionExistsError, match="Docs"):
        store.create(SCHEMA.model_copy(update={"name": "DOCS"}))
    assert store.list_collections().count("Docs") == 1


def test_an_alias_can_not_take_the_name_of_a_collection(store: WeaviateStore) -> None:
    """The server answers 500, which is not to be tried again."""
    load(store, SCHEMA, some_records(1))
    with pytest.raises(errors.CollectionExistsError):
        store.set_alias("Docs", "Docs")


# ── types ────────────────────────────────────────────────────────────────────────────────────────────


def test_fields_get_a_property_of_the_type_that_most_of_their_values_are_of(store: WeaviateStore) -> None:
    records = some_records(5, metadata={"n": 1, "half": 0.5, "yes": True, "tags": ["a"], "mixed": 1})
    records[0] = replace(records[0], metadata={"mixed": "text", "n": 2})
    load(store, SCHEMA, records)
    kinds = types_of(store)
    assert (kinds["n"], kinds["half"], kinds["yes"], kinds["mixed"]) == ("int", "number", "boolean", "int")
    assert_same(read_all(store, "Docs"), records, store)


def test_the_servers_guessing_of_types_never_sees_a_value(store: WeaviateStore) -> None:
    """It would take a text for a date or a UUID, and refuse the next one that is neither."""
    load(store, SCHEMA, some_records(1))
    before = types_of(store)
    values = ["2024-01-01T00:00:00Z", str(uuid.uuid4()), "neither"]
    records = [replace(r, metadata={"new": v}) for r, v in zip(some_records(3), values, strict=True)]
    store.upsert("Docs", to_batch(records, SCHEMA))
    assert types_of(store) == before
    assert_same(read_all(store, "Docs"), records, store)


def test_integers_beyond_doubles_do_not_go_into_a_property(store: WeaviateStore) -> None:
    records = [replace(r, metadata={"n": 2**53 + at}) for at, r in enumerate(some_records(3))]
    load(store, SCHEMA, records)
    assert_same(read_all(store, "Docs"), records, store)
    assert "int64" not in store.exact_kinds(SCHEMA)


def test_an_integer_in_a_field_of_floats_stays_an_integer(store: WeaviateStore) -> None:
    records = [replace(r, metadata={"x": v}) for r, v in zip(some_records(3), [0.5, 1.5, 2], strict=True)]
    load(store, SCHEMA, records)
    found = read_all(store, "Docs")
    assert [type(record.metadata["x"]) for record in found if record.metadata] == [float, float, int]


def test_no_metadata_and_empty_metadata_stay_different(store: WeaviateStore) -> None:
    records = [replace(r, metadata=m) for r, m in zip(some_records(2), [None, {}], strict=True)]
    load(store, SCHEMA, records)
    assert_same(read_all(store, "Docs"), records, store)


def test_a_collection_of_very_many_fields_gets_properties_for_the_most_common(store: WeaviateStore) -> None:
    records = some_records(2, metadata={f"f{number}": number for number in range(300)})
    load(store, SCHEMA, records)
    assert len(types_of(store)) < 210
    assert_same(read_all(store, "Docs"), records, store)


# ── collections of others' making ────────────────────────────────────────────────────────────────────


def own_vectors() -> Any:
    return Configure.Vectors.self_provided()


@pytest.mark.parametrize("key", ["text", "page_content", "document"])
def test_a_frameworks_document_is_found_and_written_where_it_is(
    store: WeaviateStore, client: Any, key: str
) -> None:
    made = client.collections.create(
        "Docs",
        properties=[Property(name=key, data_type=DataType.TEXT), Property(name="n", data_type=DataType.INT)],
        vector_config=own_vectors(),
    )
    made.data.insert({key: "hello", "n": 1}, uuid=uuid.UUID(int=1), vector=[1.0, 2.0])
    (record,) = read_all(store, "Docs")
    assert (record.document, record.metadata) == ("hello", {"n": 1})

    schema = store.describe("Docs")
    store.upsert("Docs", to_batch([replace(record, document="bye")], schema))
    assert made.query.fetch_object_by_id(record.id).properties == {key: "bye", "n": 1}


def test_a_field_called_text_is_no_document_in_a_collection_of_ours(store: WeaviateStore) -> None:
    schema = SCHEMA.model_copy(update={"has_documents": False})
    records = some_records(2, document=None, metadata={"text": "metadata"})
    load(store, schema, records)
    assert not store.describe("Docs").has_documents
    assert_same(read_all(store, "Docs"), records, store)


def test_what_a_foreign_collection_has_no_property_for_is_rejected_by_name(
    store: WeaviateStore, client: Any
) -> None:
    client.collections.create(
        "Docs", properties=[Property(name="n", data_type=DataType.INT)], vector_config=own_vectors()
    )
    schema = store.describe("Docs")
    for metadata in ({"n": "text"}, {"other": 1}, None):
        record = replace(some_records(1)[0], document=None, metadata=metadata)
        with pytest.raises(errors.RecordRejectedError):
            store.upsert("Docs", to_batch([record], schema.model_copy(update={"vectors": SCHEMA.vectors})))
    assert store.count("Docs") == 0
    assert types_of(store) == {"n": "int"}


def test_properties_of_every_type_are_read(store: WeaviateStore, client: Any) -> None:
    deep = [Property(name="b", data_type=DataType.TEXT)]
    inside = [
        Property(name="a", data_type=DataType.INT),
        Property(name="deep", data_type=DataType.OBJECT, nested_properties=deep),
        Property(name="raw", data_type=DataType.BLOB),
    ]
    kinds = {
        "when": DataType.DATE, "whens": DataType.DATE_ARRAY, "ref": DataType.UUID,
        "refs": DataType.UUID_ARRAY, "place": DataType.GEO_COORDINATES, "phone": DataType.PHONE_NUMBER,
        "raw": DataType.BLOB, "ints": DataType.INT_ARRAY, "empty": DataType.TEXT_ARRAY, "fine": DataType.DATE,
    }  # fmt: skip
    made = client.collections.create(
        "Docs",
        properties=[
            *(Property(name=name, data_type=kind) for name, kind in kinds.items()),
            Property(name="thing", data_type=DataType.OBJECT, nested_properties=inside),
            Property(name="things", data_type=DataType.OBJECT_ARRAY, nested_properties=inside[:1]),
        ],
        vector_config=own_vectors(),
    )
    ref, when = uuid.uuid4(), dt.datetime(2024, 2, 29, 1, 2, 3, 456789, dt.UTC)
    made.data.insert(
        {
            "when": when, "whens": [when], "ref": ref, "refs": [ref], "raw": "AP8=",
            "ints": [1, 2], "empty": [], "place": {"latitude": 52.5, "longitude": 13.25},
            "phone": {"input": "030 1", "defaultCountry": "de"}, "fine": "2024-01-01T00:00:00.123456789Z",
            "thing": {"a": 1, "deep": {"b": "x"}, "raw": "AP8="}, "things": [{"a": 1}, {"a": 2}],
        },
        vector=[1.0],
    )  # fmt: skip
    (record,) = read_all(store, "Docs")
    assert record.metadata is not None
    phone = record.metadata["phone"]
    assert {**record.metadata, "phone": phone["input"]} == {
        "when": when, "whens": [when], "ref": str(ref), "refs": [str(ref)], "raw": b"\x00\xff",
        "ints": [1, 2], "empty": [], "place": {"latitude": 52.5, "longitude": 13.25}, "phone": "030 1",
        "fine": "2024-01-01T00:00:00.123456789Z",  # a datetime would lose its nanoseconds
        "thing": {"a": 1, "deep": {"b": "x"}, "raw": b"\x00\xff"}, "things": [{"a": 1}, {"a": 2}],
    }  # fmt: skip


def test_a_reference_is_refused_by_its_name_and_not_left_out(store: WeaviateStore, client: Any) -> None:
    client.collections.create("Authors", vector_config=own_vectors())
    client.collections.create(
        "Docs",
        references=[ReferenceProperty(name="writtenBy", target_collection="Authors")],
        vector_config=own_vectors(),
    )
    with pytest.raises(errors.StoreRefusedError, match=r"writtenBy.*Authors"):
        store.describe("Docs")


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_vector_that_few_records_have_is_found(store: WeaviateStore) -> None:
    fields = (VectorField(dimensions=8), VectorField(name="image", dimensions=3))
    schema = SCHEMA.model_copy(update={"vectors": fields})
    records = [replace(r, vectors={**r.vectors, "image": None}) for r in some_records(600)]
    records[-1] = replace(records[-1], vectors={**records[-1].vectors, "image": np.ones(3, np.float32)})
    load(store, schema, records)
    assert [field.dimensions for field in store.describe("Docs").vectors] == [8, 3]
    assert_same(read_all(store, "Docs"), records, store)


def test_a_multivector_alone_and_an_empty_one(store: WeaviateStore) -> None:
    field = VectorField(kind=VectorKind.MULTI, dimensions=2, metric=Metric.COSINE)
    schema = SCHEMA.model_copy(update={"vectors": (field,)})
    records = some_records(2, vectors={"": [[1.0, 2.0], [3.0, 4.0]]})
    load(store, schema, records)
    found = store.fetch("Docs", ids_of(records))
    assert sorted(batches.record_digests(found)) == sorted(batches.record_digests(to_batch(records, schema)))
    with pytest.raises(errors.RecordRejectedError, match="without vectors"):
        store.upsert("Docs", to_batch(some_records(1, vectors={"": []}), schema))


@pytest.mark.parametrize("metric", [Metric.MANHATTAN, Metric.HAMMING], ids=str)
def test_metrics_that_few_stores_have_are_kept(store: WeaviateStore, metric: Metric) -> None:
    schema = SCHEMA.model_copy(update={"vectors": (VectorField(dimensions=8, metric=metric),)})
    load(store, schema, some_records(3))
    assert store.describe("Docs").vectors[0].metric is metric


def test_the_settings_of_an_index_and_a_class_travel(store: WeaviateStore) -> None:
    index = {"ef": 77, "maxConnections": 9, "distance": "dot", "rq": {"enabled": True, "bits": 8}}
    store._rest(
        "POST",
        "/schema",
        body={
            "class": "Docs",
            "description": "about",
            "replicationConfig": {"factor": 1, "deletionStrategy": "NoAutomatedResolution"},
            "vectorConfig": {"default": {"vectorizer": {"none": {}}, "vectorIndexConfig": index}},
        },
    )
    found = store.describe("Docs")
    assert (found.vectors[0].index["m"], found.vectors[0].index["ef_search"]) == (9, 77)
    store.create(store.adapt(found.model_copy(update={"name": "Copy"}), {}))
    copy = class_of(store, "Copy")
    assert copy["description"] == "about"
    assert copy["replicationConfig"]["deletionStrategy"] == "NoAutomatedResolution"
    assert copy["vectorConfig"] == class_of(store)["vectorConfig"]


def test_a_class_of_a_cluster_gets_fewer_copies_where_there_are_fewer_nodes(store: WeaviateStore) -> None:
    settings = {"class": {"replicationConfig": {"factor": 99, "deletionStrategy": "NoAutomatedResolution"}}}
    store.create(SCHEMA.model_copy(update={"options": {"weaviate": settings}}))
    found = class_of(store)["replicationConfig"]
    assert 1 <= found["factor"] < 99
    assert found["deletionStrategy"] == "NoAutomatedResolution"


# ── walking ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_id_of_zeros_is_walked_over_too(store: WeaviateStore) -> None:
    """The cursor begins after an id: asked to begin after this one it would leave it out."""
    records = some_records(3)
    assert records[0].id == uuid.UUID(int=0)
    load(store, SCHEMA, records)
    assert_same(read_all(store, "Docs", span_records=1), records, store)


def test_fetching_from_an_empty_collection_finds_nothing(store: WeaviateStore) -> None:
    load(store, SCHEMA, [])
    assert store.fetch("Docs", ids_of(some_records(2))).num_rows == 0


def test_nothing_is_asked_for_by_offset(store: WeaviateStore, standin: WeaviateStandin) -> None:
    load(store, SCHEMA, some_records(50))
    read_all(store, "Docs", span_records=7)
    assert not [request for method, request in standin.grpc_requests if method == "Search" and request.offset]


def test_pages_shrink_where_a_reply_would_be_too_large(
    store: WeaviateStore, standin: WeaviateStandin, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = some_records(40, document="x" * 2_000)
    load(store, SCHEMA, records)
    monkeypatch.setattr(standin, "max_message_bytes", 20_000)
    assert_same(read_all(store, "Docs"), records, store)
    assert_same(from_batches([store.fetch("Docs", ids_of(records))]), records, store)
    monkeypatch.setattr(standin, "max_message_bytes", 1_000)
    with pytest.raises(errors.StoreRefusedError, match="GRPC_MAX_MESSAGE_SIZE"):
        read_all(store, "Docs")


def test_a_server_that_gives_few_objects_at_a_time_is_read_and_deleted_from_all_the_same(
    store: WeaviateStore, standin: WeaviateStandin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with a small QUERY_MAXIMUM_RESULTS refuses larger pages, and deletes no more than that."""
    load(store, SCHEMA, records := some_records(700))
    monkeypatch.setattr(standin, "maximum_results", 100)
    assert_same(read_all(store, "Docs", span_records=300), records, store)
    assert store.fetch("Docs", ids_of(records)).num_rows == 700
    assert store.fingerprint("Docs").startswith("700:")
    store.delete("Docs", ids_of(records[:650]))
    assert_same(read_all(store, "Docs"), records[650:], store)


def test_an_update_in_place_changes_the_fingerprint(store: WeaviateStore) -> None:
    schema = load(store, SCHEMA, records := some_records(20))
    before = store.fingerprint("Docs")
    store.upsert("Docs", to_batch(records[3:4], schema))
    assert store.fingerprint("Docs") != before


# ── tenants ──────────────────────────────────────────────────────────────────────────────────────────

SPACED = SCHEMA.model_copy(update={"has_namespaces": True})


def spaced_records(n: int) -> list[Record]:
    return [replace(r, namespace=["acme", "Beta-2"][at % 2]) for at, r in enumerate(some_records(n))]


def test_tenants_are_added_as_they_are_needed(store: WeaviateStore, client: Any) -> None:
    load(store, SPACED, records := spaced_records(20))
    assert store.describe("Docs").has_namespaces
    found = client.collections.get("Docs").tenants.get()
    assert {name: tenant.activity_status.value for name, tenant in found.items()} == {
        "Beta-2": "ACTIVE",
        "acme": "ACTIVE",
    }
    assert_same(read_all(store, "Docs", span_records=3), records, store)


def test_one_tenant_is_a_collection_of_its_own(store: WeaviateStore, client: Any) -> None:
    load(store, SPACED, records := spaced_records(20))
    acme = bound(store, "acme")
    own = [replace(r, namespace=None) for r in records if r.namespace == "acme"]
    assert not acme.describe("Docs").has_namespaces
    assert acme.count("Docs") == len(own)
    assert_same(read_all(acme, "Docs"), own, acme)
    acme.delete("Docs", ids_of(own[:1]))
    assert (acme.count("Docs"), store.count("Docs")) == (len(own) - 1, 19)
    acme.drop("Docs")
    assert set(client.collections.get("Docs").tenants.get()) == {"Beta-2"}
    with pytest.raises(errors.CollectionNotFoundError, match="Beta-2"):
        acme.count("Docs")
    acme.close()


def test_a_tenant_is_created_with_its_class_and_then_beside_others(store: WeaviateStore) -> None:
    for name in ("one", "two"):
        single = bound(store, name)
        load(single, SCHEMA, some_records(4))
        with pytest.raises(errors.CollectionExistsError):
            single.create(SCHEMA)
        single.close()
    assert store.count("Docs") == 8


def test_a_tenant_that_is_asleep_is_told_and_not_left_out(store: WeaviateStore, client: Any) -> None:
    load(store, SPACED, spaced_records(6))
    docs = client.collections.get("Docs")
    docs.tenants.update([Tenant(name="acme", activity_status=TenantActivityStatus.INACTIVE)])
    for look in (
        store.count,
        store.describe,
        store.fingerprint,
        lambda n: list(store.split(n, span_records=9)),
    ):
        with pytest.raises(errors.StoreRefusedError, match="acme"):
            look("Docs")
    awake = bound(store, "Beta-2")
    assert awake.count("Docs") == 3
    awake.close()


@pytest.mark.parametrize("name", ["", "a b", "naïve", "x" * 65])
def test_a_record_of_a_tenant_that_can_not_be_is_rejected(store: WeaviateStore, name: str) -> None:
    assert not store.accepts_namespace(name)
    load(store, SPACED, [])
    with pytest.raises(errors.RecordRejectedError, match="tenant"):
        store.upsert("Docs", to_batch([replace(some_records(1)[0], namespace=name)], SPACED))


def test_a_collection_without_tenants_has_no_namespace_to_name(store: WeaviateStore) -> None:
    load(store, SCHEMA, some_records(1))
    with pytest.raises(errors.StoreRefusedError, match="namespace"):
        bound(store, "acme").count("Docs")


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown() -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        WeaviateStore(host="localhost", api_key=SecretStr("hush\nhush"))
    assert "hush" not in str(caught.value)


def test_adapted_schemas_hold_what_the_records_hold(store: WeaviateStore) -> None:
    schema = adapted(store, SCHEMA, records := some_records(3))
    store.create(schema)
    store.upsert("Docs", to_batch(records, schema))
    assert by_id(read_all(store, "Docs")) == by_id(records)
