"""Milvus: keys that break expressions, long documents, collections that were found, partitions, folders."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from milvus_lite.server_manager import server_manager_instance
from pymilvus import DataType, MilvusClient
from pymilvus.grpc_gen import schema_pb2

from migration_pipelines import batch as batches
from migration_pipelines import errors
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import CollectionSchema, DType, IdKind, Metric, VectorField, VectorKind
from migration_pipelines.store import open_address
from migration_pipelines.stores.milvus import MilvusStore, server
from migration_pipelines.stores.milvus.columns import scalars, vectors
from migration_pipelines.stores.milvus.schema import Kind, VectorColumn
from migration_pipelines.stores.milvus.writing import cut
from migration_pipelines_tests.conformance import assert_same, ids_of, load, new_name, new_schema, read_all
from migration_pipelines_tests.harnesses.milvus import MilvusLite
from migration_pipelines_tests.records import Record, from_batches, plain_records, to_batch

VECTOR = np.arange(4, dtype=np.float32)
_HOLD = """
import sys
from milvus_lite import MilvusLite
MilvusLite(sys.argv[1])
print("open", flush=True)
input()
"""


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusLite]:
    with MilvusLite.start(tmp_path_factory.mktemp("milvus")) as harness:
        yield harness


@pytest.fixture
def store(lite: MilvusLite) -> MilvusStore:
    return lite.store


def on(store: MilvusStore, **options: Any) -> MilvusStore:
    """The same folder with other options."""
    return MilvusStore(path=store.path, **options)


def moved(source: str, target: str, home: Path, **options: Any) -> Any:
    config = MigrationConfig(source=source, target=target, partition_size=20, batch_size=7, **options)
    return run_migration(Migration(config=config, ledger=ledger_for(config, home)))


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "milvus:./demo.db#docs",
        "milvus:/srv/folder?db=prod&namespace=eu#docs",
        "milvus://localhost:19530/docs",
        "milvus://ada@example.org:443/docs?db=prod&https=true",
        "milvus://h:1/docs?namespace=&document_field=body",
    ],
)
def test_addresses_come_back_as_they_were_given(text: str) -> None:
    store, collection = open_address(text)
    assert collection == "docs"
    assert store.address("docs") == text


@pytest.mark.parametrize(
    "text", ["milvus:#docs", "milvus:./db?colour=red#docs", "milvus://h/docs?https=maybe"]
)
def test_addresses_that_say_too_little_or_too_much_are_refused(text: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        open_address(text)


# ── keys, documents, values ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", [1, 2, 7])
def test_keys_that_break_expressions_are_paged_each_once(
    store: MilvusStore, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    texts = [
        "",
        "'",
        '"',
        "\\",
        '\\"',
        "\n",
        "\r\n",
        "\t",
        "\0",
        "a\\",
        'x" or id >= "',
        "é",
        "漢",
        "🦜",
        "a",
        "b",
    ]
    like = plain_records(1)[0]
    records = [replace(like, id=text, metadata={"n": n}) for n, text in enumerate(texts)]
    schema = load(store, new_schema(store), records)
    monkeypatch.setattr(server, "KEYS_PAGE", page)
    assert_same(read_all(store, schema.name, span_records=3), records, store)
    store.delete(schema.name, ids_of(records[4:12]))
    assert_same(read_all(store, schema.name), records[:4] + records[12:], store)


@pytest.mark.parametrize("page", [1, 3, 100])
def test_integer_keys_are_paged_from_the_least_to_the_greatest(
    store: MilvusStore, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    numbers = [-(2**63), -(2**53) - 1, -1, 0, 1, 2**63 - 1]
    like = plain_records(1)[0]
    records = [replace(like, id=number) for number in numbers]
    schema = load(store, new_schema(store, id_kinds=frozenset({IdKind.INT})), records)
    monkeypatch.setattr(server, "KEYS_PAGE", page)
    assert_same(read_all(store, schema.name), records, store)
    assert store.fetch(schema.name, ids_of([replace(like, id=2**64), replace(like, id="1")])).num_rows == 0


def test_a_document_of_any_length_comes_back_in_parts_that_milvus_takes(lite: MilvusLite) -> None:
    texts = ["x" * 65_535, "x" * 65_536, "é" * 70_000, "🦜" * 40_000 + "\n", ""]
    records = [replace(r, document=text) for r, text in zip(plain_records(5), texts, strict=True)]
    schema = load(lite.store, new_schema(lite.store), records)
    assert_same(read_all(lite.store, schema.name), records, lite.store)
    assert_same(lite.read(schema.name), records, lite.store)


@pytest.mark.parametrize("limit", [4, 5, 7])
def test_a_text_is_never_cut_within_a_character(limit: int) -> None:
    text = "aé漢🦜" * 5
    parts = cut(text, limit)
    assert "".join(parts) == text
    assert all(0 < len(part.encode()) <= limit for part in parts)


def test_sparse_vectors_come_back_exactly_and_what_milvus_would_drop_is_refused(store: MilvusStore) -> None:
    like = new_schema(store)
    words = VectorField(name="words", kind=VectorKind.SPARSE, dimensions=None, metric=Metric.DOT)
    schema = like.model_copy(update={"vectors": (*like.vectors, words)})
    good = {"indices": [3, 70_000, 2**32 - 2], "values": [0.5, np.float32(1 / 3), 1e-30]}
    records = [replace(r, vectors={**r.vectors, "words": good}) for r in plain_records(2)]
    load(store, schema, records)
    found = store.fetch(schema.name, ids_of(records))
    assert sorted(batches.record_digests(found)) == sorted(batches.record_digests(to_batch(records, schema)))
    for bad in (
        {"indices": [], "values": []},
        {"indices": [1], "values": [0.0]},
        {"indices": [1], "values": [-1.0]},
        {"indices": [1, 1], "values": [1.0, 2.0]},
        {"indices": [2**32 - 1], "values": [1.0]},
    ):
        with pytest.raises(errors.RecordRejectedError, match="sparse"):
            store.upsert(
                schema.name,
                to_batch([replace(records[0], vectors={**records[0].vectors, "words": bad})], schema),
            )


# ── collections that were found ──────────────────────────────────────────────────────────────────────


def typed(lite: MilvusLite, rows: list[dict[str, Any]], *, dynamic: bool = True) -> str:
    """A collection with fields of its own types."""
    name = new_name(lite.store)
    with lite.client() as client:
        made = client.create_schema(auto_id=False, enable_dynamic_field=dynamic)
        made.add_field("pk", DataType.INT64, is_primary=True)
        made.add_field("text", DataType.VARCHAR, max_length=100, nullable=True)
        made.add_field("price", DataType.FLOAT, nullable=True)
        made.add_field("stock", DataType.INT8, nullable=True)
        made.add_field("sold", DataType.BOOL, default_value=False)
        made.add_field(
            "tags", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=3, max_length=9, nullable=True
        )
        made.add_field("more", DataType.JSON, nullable=True)
        made.add_field("embedding", DataType.FLOAT_VECTOR, dim=4)
        params = client.prepare_index_params()
        params.add_index("embedding", index_type="AUTOINDEX", metric_type="IP")
        client.create_collection(name, schema=made, index_params=params)
        client.insert(name, rows)
    return name


ROWS = [
    {
        "pk": 1,
        "text": "a passage",
        "price": 0.5,
        "stock": -3,
        "sold": True,
        "tags": ["a", "b"],
        "more": {"x": [1, None]},
        "embedding": VECTOR,
        "extra": {"deep": 2**53 + 1},
        "null": None,
    },
    {
        "pk": 2,
        "text": None,
        "price": None,
        "stock": None,
        "tags": None,
        "more": None,
        "embedding": VECTOR + 1,
    },
]
RECORDS = [
    Record(
        id=1,
        vectors={"": VECTOR},
        document="a passage",
        metadata={
            "price": 0.5,
            "stock": -3,
            "sold": True,
            "tags": ["a", "b"],
            "more": {"x": [1, None]},
            "extra": {"deep": 2**53 + 1},
            "null": None,
        },
    ),
    Record(id=2, vectors={"": VECTOR + 1}, metadata={"sold": False}),
]


def test_a_collection_with_fields_of_its_own_is_read_whole(lite: MilvusLite) -> None:
    name = typed(lite, ROWS)
    found = lite.store.describe(name)
    assert found.id_kinds == {IdKind.INT}
    assert [(v.name, v.dimensions, v.metric) for v in found.vectors] == [("", 4, Metric.DOT)]
    assert_same(read_all(lite.store, name), RECORDS, lite.store)


def test_a_record_replaces_another_with_all_its_dynamic_fields(lite: MilvusLite) -> None:
    name = typed(lite, ROWS)
    new = Record(id=1, vectors={"": VECTOR}, metadata={"sold": False, "other": "only this"})
    lite.store.upsert(name, to_batch([new], lite.store.describe(name)))
    assert_same(read_all(lite.store, name), [new, RECORDS[1]], lite.store)
    assert lite.store.count(name) == 2


@pytest.mark.parametrize(
    "metadata",
    [
        {"sold": True, "price": 0.1},  # FLOAT would round it
        {"sold": True, "price": 1},  # and give back 1.0
        {"sold": True, "stock": 128},
        {"sold": True, "stock": True},  # 1
        {"sold": 1},  # true
        {"sold": True, "tags": ["a"] * 4},
        {"sold": True, "stock": None},  # the same as absent
        {"price": 0.5},  # `sold` would become its default
        {},
        {"sold": True, "pk": 1},
        {"sold": True, "$meta": 1},
        {"sold": True, "embedding": 1},
    ],
)
def test_what_a_field_would_change_is_refused_and_nothing_is_written(
    lite: MilvusLite, metadata: dict[str, Any]
) -> None:
    name = typed(lite, ROWS)
    bad = Record(id=3, vectors={"": VECTOR}, metadata=metadata)
    with pytest.raises(errors.RecordRejectedError):
        lite.store.upsert(name, to_batch([replace(RECORDS[1], id=4), bad], lite.store.describe(name)))
    assert_same(read_all(lite.store, name), RECORDS, lite.store)


def test_a_field_that_is_not_there_is_refused_without_dynamic_ones(lite: MilvusLite) -> None:
    rows = [{key: value for key, value in row.items() if key not in ("extra", "null")} for row in ROWS]
    name = typed(lite, rows, dynamic=False)
    bad = Record(id=3, vectors={"": VECTOR}, metadata={"sold": True, "extra": 1})
    with pytest.raises(errors.RecordRejectedError, match="'extra'"):
        lite.store.upsert(name, to_batch([bad], lite.store.describe(name)))


def test_a_dynamic_field_can_be_the_document(lite: MilvusLite) -> None:
    name = new_name(lite.store)
    with lite.client() as client:  # as the quick start has it
        client.create_collection(name, dimension=4, metric_type="IP")
        client.insert(
            name, [{"id": 1, "vector": VECTOR, "body": "hello", "n": 1}, {"id": 2, "vector": VECTOR}]
        )
    store = on(lite.store, document_field="body")
    expected = [
        Record(id=1, vectors={"": VECTOR}, document="hello", metadata={"n": 1}),
        Record(id=2, vectors={"": VECTOR}),
    ]
    assert_same(read_all(store, name), expected, store)
    store.upsert(name, to_batch([replace(expected[1], document="too")], store.describe(name)))
    assert_same(read_all(store, name), [expected[0], replace(expected[1], document="too")], store)
    with pytest.raises(errors.ConfigurationError, match="no text field 'price'"):
        on(lite.store, document_field="price").describe(typed(lite, []))
    store.close()


def test_fields_with_their_limits_travel_from_milvus_to_milvus(lite: MilvusLite, tmp_path: Path) -> None:
    name = typed(lite, ROWS)
    lite.store.close()
    target = MilvusStore(path=str(tmp_path / "other.db"))
    report = moved(lite.store.address(name), target.address("docs"), tmp_path / "home")
    assert report.status == "complete"
    assert_same(read_all(target, "docs"), RECORDS, target)
    made, origin = (
        s.describe(n).options["milvus"]["schema"] for s, n in ((target, "docs"), (lite.store, name))
    )
    assert made["fields"] == origin["fields"]
    assert made["enable_dynamic_field"]
    target.close()


@pytest.mark.parametrize(
    ("kind", "slot", "dtype", "stored", "expected"),
    [
        (Kind.FLOAT16, "float16_vector", DType.FLOAT32, "<f2", np.float32),
        (Kind.INT8_VECTOR, "int8_vector", DType.INT8, "i1", np.int8),
        (Kind.BINARY, "binary_vector", DType.BIT, "u1", np.uint8),
    ],
)
@pytest.mark.parametrize("valid", [[], [True, False, True]], ids=["all", "compact"])
def test_vectors_of_other_types_are_read_as_a_server_sends_them(
    kind: int, slot: str, dtype: DType, stored: str, expected: type, valid: list[bool]
) -> None:
    matrix = np.arange(16).reshape(2, 8).astype(stored)
    field = VectorField(dimensions=64 if dtype is DType.BIT else 8, dtype=dtype)
    data = schema_pb2.FieldData(type=kind, field_name="v", valid_data=valid)
    setattr(data.vectors, slot, matrix.tobytes())
    found = vectors(data, VectorColumn(name="v", kind=kind, nullable=bool(valid), field=field)).to_pylist()
    there = [item for item in found if item is not None]
    assert [item is not None for item in found] == (valid or [True, True])
    assert np.array_equal(np.array(there, expected), matrix.astype(expected))


def test_bfloat16_is_read_as_float32() -> None:
    numbers = np.array([[1.5, -2.0, 2.0**100, 0.0]], np.float32)
    data = schema_pb2.FieldData(type=Kind.BFLOAT16, field_name="v")
    data.vectors.bfloat16_vector = (numbers.view("<u4") >> 16).astype("<u2").tobytes()
    column = VectorColumn(name="v", kind=Kind.BFLOAT16, nullable=False, field=VectorField(dimensions=4))
    assert np.array_equal(batches.dense_matrix(vectors(data, column)), numbers)


@pytest.mark.parametrize("values", [["a", "b"], ["a", "", "b"]], ids=["compact", "whole"])
def test_nulls_are_told_by_the_validity_of_either_form(values: list[str]) -> None:
    data = schema_pb2.FieldData(type=Kind.VARCHAR, valid_data=[True, False, True])
    data.scalars.string_data.data.extend(values)
    assert scalars(data) == ["a", None, "b"]


# ── partitions, aliases, databases ───────────────────────────────────────────────────────────────────


def spaced(n: int) -> list[Record]:
    """Records in three namespaces, one of them the default one."""
    return [
        replace(record, namespace=["", "eu", "us_1"][row % 3]) for row, record in enumerate(plain_records(n))
    ]


def test_partitions_are_namespaces(store: MilvusStore) -> None:
    schema = load(store, new_schema(store, has_namespaces=True), records := spaced(30))
    assert store.describe(schema.name).has_namespaces
    assert_same(read_all(store, schema.name, span_records=4), records, store)
    assert_same(from_batches([store.fetch(schema.name, ids_of(records))]), records, store)
    elsewhere = [replace(record, namespace="us_1") for record in records if record.namespace == "eu"]
    assert store.fetch(schema.name, ids_of(elsewhere)).num_rows == 0
    assert store.count(schema.name) == 30
    store.delete(schema.name, ids_of(records[:6]))
    assert_same(read_all(store, schema.name), records[6:], store)


def test_an_empty_collection_with_namespaces_is_one(store: MilvusStore) -> None:
    schema = load(store, new_schema(store, has_namespaces=True), [])
    assert store.describe(schema.name).has_namespaces
    assert read_all(store, schema.name) == []


@pytest.mark.parametrize("space", ["", "eu", "none_such"])
def test_a_store_bound_to_a_namespace_shows_it_alone(store: MilvusStore, space: str) -> None:
    schema = load(store, new_schema(store, has_namespaces=True), records := spaced(30))
    bound = on(store, namespace=space)
    mine = [replace(record, namespace=None) for record in records if record.namespace == space]
    assert not bound.describe(schema.name).has_namespaces
    assert bound.count(schema.name) == len(mine)
    assert_same(read_all(bound, schema.name), mine, bound)
    assert_same(from_batches([bound.fetch(schema.name, ids_of(plain_records(30)))]), mine, bound)
    flat = schema.model_copy(update={"has_namespaces": False})
    bound.upsert(schema.name, to_batch(new := plain_records(2, start=900), flat))
    assert_same(read_all(bound, schema.name), [*mine, *new], bound)
    assert store.count(schema.name) == 32
    bound.close()


def test_an_id_that_stands_in_another_partition_is_refused_not_moved(store: MilvusStore) -> None:
    schema = load(store, new_schema(store, has_namespaces=True), records := spaced(9))
    for space in ("eu", "new_one"):
        with pytest.raises(errors.RecordRejectedError, match="another partition"):
            store.upsert(schema.name, to_batch([replace(records[0], namespace=space)], schema))
    assert_same(read_all(store, schema.name), records, store)


def test_one_id_in_several_namespaces_moves_and_reads_as_it_was(store: MilvusStore, tmp_path: Path) -> None:
    origin, name = open_address(f"memory:{tmp_path.name}#docs")
    schema = new_schema(origin, has_namespaces=True).model_copy(update={"name": name})
    same = [replace(record, id=f"doc#{row // 3}") for row, record in enumerate(spaced(12))]
    load(origin, schema, same)
    target = new_name(store)
    assert moved(origin.address(name), store.address(target), tmp_path).status == "complete"
    assert store.count(target) == 12
    back = f"memory:{tmp_path.name}-back#docs"
    assert moved(store.address(target), back, tmp_path / "back").status == "complete"
    assert_same(read_all(open_address(back)[0], "docs"), same, origin)


def test_a_partition_key_divides_without_namespaces(lite: MilvusLite) -> None:
    name = new_name(lite.store)
    with lite.client() as client:
        made = client.create_schema(auto_id=False)
        made.add_field("id", DataType.VARCHAR, is_primary=True, max_length=99)
        made.add_field("tenant", DataType.VARCHAR, max_length=99, is_partition_key=True)
        made.add_field("vector", DataType.FLOAT_VECTOR, dim=4)
        client.create_collection(name, schema=made)
        client.insert(name, [{"id": str(n), "tenant": f"t{n % 5}", "vector": VECTOR + n} for n in range(20)])
    records = [
        Record(id=str(n), vectors={"": VECTOR + n}, metadata={"tenant": f"t{n % 5}"}) for n in range(20)
    ]
    assert not lite.store.describe(name).has_namespaces
    assert_same(read_all(lite.store, name), records, lite.store)
    new = Record(id="20", vectors={"": VECTOR}, metadata={"tenant": "t1"})
    lite.store.upsert(name, to_batch([new], lite.store.describe(name)))
    assert_same(read_all(lite.store, name), [*records, new], lite.store)


@pytest.mark.parametrize("name", ["a b", "é", "1a", "a-b", "_default", "x" * 256])
def test_namespaces_that_no_partition_can_be_called_are_refused(store: MilvusStore, name: str) -> None:
    assert not store.accepts_namespace(name)
    assert store.accepts_namespace("")


def test_an_alias_reads_as_its_collection(store: MilvusStore) -> None:
    schema = load(store, new_schema(store), records := plain_records(5))
    alias = new_name(store)
    store.set_alias(alias, schema.name)
    assert_same(read_all(store, alias), records, store)
    with pytest.raises(errors.CollectionExistsError):
        store.create(schema.model_copy(update={"name": alias}))
    store.drop(schema.name)
    assert schema.name not in store.list_collections()


def test_a_database_has_collections_of_its_own(lite: MilvusLite) -> None:
    with lite.client() as client:
        client.create_database("prod")
    prod = on(lite.store, db="prod")
    schema = load(prod, new_schema(prod), records := plain_records(5))
    assert prod.list_collections() == [schema.name]
    assert schema.name not in lite.store.list_collections()
    assert_same(read_all(prod, schema.name), records, prod)
    prod.close()


def test_a_key_that_is_counted_twice_is_told(store: MilvusStore, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = load(store, new_schema(store), plain_records(5))
    monkeypatch.setattr(server.Server, "count", lambda *_: 6)  # a server keeps what is inserted twice
    with pytest.raises(errors.StoreRefusedError, match="6 records are counted under 5 keys"):
        list(store.split(schema.name, span_records=2))


def test_keys_that_milvus_makes_cannot_be_written(lite: MilvusLite) -> None:
    name = new_name(lite.store)
    with lite.client() as client:
        client.create_collection(name, dimension=4, auto_id=True)
        client.insert(name, [{"vector": VECTOR, "n": 1}])
    (found,) = read_all(lite.store, name)
    assert found.metadata == {"n": 1}
    with pytest.raises(errors.StoreRefusedError, match="makes its keys"):
        lite.store.upsert(name, to_batch([found], lite.store.describe(name)))


@pytest.mark.parametrize("name", ["my-vector", "vector", "id", "metadata", "漢"])
def test_a_vector_name_that_milvus_cannot_have_is_refused(store: MilvusStore, name: str) -> None:
    vector = VectorField(name=name, dimensions=2, metric=Metric.COSINE)
    schema = CollectionSchema(name=new_name(store), vectors=(vector,), id_kinds=frozenset({IdKind.STR}))
    with pytest.raises(errors.ConfigurationError, match="can't be called"):
        store.create(schema)
    assert schema.name not in store.list_collections()


def test_one_named_vector_keeps_its_name(store: MilvusStore) -> None:
    vector = VectorField(name="title", dimensions=4, metric=Metric.COSINE)
    schema = CollectionSchema(name=new_name(store), vectors=(vector,), id_kinds=frozenset({IdKind.STR}))
    load(store, schema, records := [Record(id="a", vectors={"title": VECTOR}, metadata={})])
    assert_same(read_all(store, schema.name), records, store)


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_copy_of_an_open_folder_has_what_was_acknowledged(tmp_path: Path) -> None:
    store = MilvusStore(path=str(tmp_path / "open.db"))
    schema = new_schema(store)
    store.create(schema)
    store.upsert(schema.name, to_batch(records := plain_records(30), schema))
    source = store.for_reading(tmp_path / "scratch")
    assert source.path != store.path
    assert_same(read_all(source, schema.name), records, store)
    first = source.fingerprint(schema.name)
    store.upsert(schema.name, to_batch(plain_records(1, seed=5), schema))
    assert source.fingerprint(schema.name) != first
    source.close()
    store.close()


def test_a_folder_that_another_process_has_open_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "busy.db"
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    store = MilvusStore(path=str(folder))
    with pytest.raises(errors.TransientError, match="another process"):
        store.list_collections()
    other.communicate("\n", timeout=30)
    assert store.list_collections() == []
    store.close()


def test_two_stores_of_one_folder_close_it_when_both_are_done(tmp_path: Path) -> None:
    first, second = (MilvusStore(path=str(tmp_path / "shared.db")) for _ in range(2))
    schema = load(first, new_schema(first), records := plain_records(5))
    assert second.count(schema.name) == 5
    first.close()
    assert_same(read_all(second, schema.name), records, second)
    second.close()
    script = (
        "import sys; from milvus_lite import MilvusLite; print(MilvusLite(sys.argv[1]).list_collections())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "shared.db")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert schema.name in ran.stdout


def test_a_folder_that_somebody_else_of_this_process_opened_stays_open(tmp_path: Path) -> None:
    client = MilvusClient(str(tmp_path / "theirs.db"))
    store = MilvusStore(path=str(tmp_path / "theirs.db"))
    schema = load(store, new_schema(store), plain_records(5))
    store.close()
    assert client.list_collections() == [schema.name]
    client.close()
    server_manager_instance.release_server(str(tmp_path / "theirs.db"))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    store = MilvusStore(path=str(tmp_path))
    assert store.list_collections() == []
    with pytest.raises(errors.StoreRefusedError, match="neither empty"):
        store.create(new_schema(store))
    with pytest.raises(errors.StoreUnavailableError):
        store.for_reading(tmp_path.parent / "scratch")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_asking_for_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    store = MilvusStore(path=str(tmp_path / "absent.db"))
    assert store.list_collections() == []
    with pytest.raises(errors.CollectionNotFoundError):
        store.count("docs")
    assert not (tmp_path / "absent.db").exists()
