"""Databases of Milvus Lite 2, a single file each: read whole, never written."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymilvus.grpc_gen import common_pb2, schema_pb2

from migration_pipelines import errors
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import DType, IdKind, Metric, VectorKind
from migration_pipelines.store import open_address
from migration_pipelines.stores.milvus import MilvusStore
from migration_pipelines.stores.milvus.schema import Kind
from migration_pipelines_tests import field
from migration_pipelines_tests.conformance import assert_same, ids_of, new_schema, read_all
from migration_pipelines_tests.harnesses.milvus import MilvusLite
from migration_pipelines_tests.records import Record
from migration_pipelines_tests.shell import Shell, fill, shell

__all__ = ["shell"]

FOUND = field.collections("milvus")
found_one = pytest.mark.skipif(not FOUND, reason="the folder of found stores isn't beside this checkout")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ── one that was found ───────────────────────────────────────────────────────────────────────────────


@found_one
@pytest.mark.parametrize(("path", "truth"), FOUND)
def test_a_found_file_is_read_whole_and_stays_as_it_is(path: Path, truth: Mapping[str, Any]) -> None:
    before = digest(path)
    store, name = open_address(f"milvus:{path}#{truth['name']}")
    assert name is not None
    assert store.for_reading(path.parent / "nowhere") is store
    assert store.list_collections() == [name]
    schema = store.describe(name)
    assert [(v.dimensions, v.metric) for v in schema.vectors] == [(truth["dim"], Metric.DOT)]
    assert store.count(name) == truth["rows"]
    first = store.fingerprint(name)
    found = field.truth(read_all(store, name, span_records=20))
    assert found.pop("vectors_checksum") == pytest.approx(truth["vectors_checksum"], abs=1e-3)
    assert found == {key: truth[key] for key in found}
    assert store.fingerprint(name) == first
    assert digest(path) == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@found_one
@pytest.mark.parametrize(("path", "truth"), FOUND)
def test_a_found_file_moves_whole(path: Path, truth: Mapping[str, Any], tmp_path: Path) -> None:
    with MilvusLite.start(tmp_path) as target:
        config = MigrationConfig(
            source=f"milvus:{path}#{truth['name']}", target=target.store.address("docs"), partition_size=30
        )
        report = run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path / "home")))
        assert report.status == "complete"
        found = field.truth(read_all(target.store, "docs"))
        assert (found["documents_sha256"], found["ids_sha256"]) == (
            truth["documents_sha256"],
            truth["ids_sha256"],
        )


@found_one
def test_searching_a_file_looks_at_every_record() -> None:
    path, truth = FOUND[0]
    store = MilvusStore(path=str(path))
    records = read_all(store, truth["name"])
    for record in records[:3]:
        nearest = store.search(truth["name"], record.vectors[""], limit=3)
        assert nearest[0][0] == record.id
        assert len(nearest) == 3


# ── ones that are made here, in the same form ────────────────────────────────────────────────────────


def pair(**values: Any) -> list[Any]:
    return [common_pb2.KeyValuePair(key=key, value=str(value)) for key, value in values.items()]


def text(name: str, *values: str, kind: int = Kind.VARCHAR) -> Any:
    return schema_pb2.FieldData(
        type=kind, field_name=name, scalars={"string_data": schema_pb2.StringArray(data=values)}
    )


def meta(value: bytes) -> Any:
    return schema_pb2.FieldData(
        type=Kind.JSON,
        field_name="$meta",
        is_dynamic=True,
        scalars={"json_data": schema_pb2.JSONArray(data=[value])},
    )


def write(path: Path, name: str, fields: Sequence[Any], rows: Mapping[str, Sequence[Any]]) -> None:
    """Make a file as Milvus Lite 2 does: its own two system fields, messages with the affinity of text."""
    system = [schema_pb2.FieldSchema(name=extra, data_type=Kind.INT64) for extra in ("RowID", "Timestamp")]
    dynamic = schema_pb2.FieldSchema(name="$meta", data_type=Kind.JSON, is_dynamic=True, fieldID=150)
    proto = schema_pb2.CollectionSchema(name=name, fields=[*fields, dynamic, *system])
    index = b"\x08\x65\x10\x07\x1a\x01v" + b"".join(
        b"\x2a" + bytes([len(raw := one.SerializeToString())]) + raw for one in pair(metric_type="L2")
    )
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE collection_meta (id INTEGER PRIMARY KEY, collection_name VARCHAR(1024), "
            "meta_type VARCHAR(1024), blob_field BLOB, string_field VARCHAR(1024))"
        )
        add = "INSERT INTO collection_meta (collection_name, meta_type, blob_field) VALUES (?, ?, ?)"
        database.execute(add, (name, "schema", proto.SerializeToString()))
        database.execute(add, (name, "index", index))
        database.execute(
            f'CREATE TABLE "{name}" (id INTEGER PRIMARY KEY, milvus_id VARCHAR(1024), data BLOB)'
        )
        for key, columns in rows.items():
            blob = schema_pb2.StructArrayField(fields=columns).SerializeToString()
            database.execute(f'INSERT INTO "{name}" (milvus_id, data) VALUES (?, ?)', (key, blob))
    database.close()


def fields_of(*vectors: Any) -> list[Any]:
    key = schema_pb2.FieldSchema(
        name="pk", data_type=Kind.VARCHAR, is_primary_key=True, fieldID=100, type_params=pair(max_length=99)
    )
    return [key, *vectors]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Three records with a dense, a binary and a sparse vector; keys that break expressions."""
    path = tmp_path / "legacy.db"
    vectors = [
        schema_pb2.FieldSchema(
            name="vector", data_type=Kind.FLOAT_VECTOR, fieldID=101, type_params=pair(dim=2)
        ),
        schema_pb2.FieldSchema(name="bits", data_type=Kind.BINARY, fieldID=102, type_params=pair(dim=16)),
        schema_pb2.FieldSchema(name="words", data_type=Kind.SPARSE, fieldID=103),
    ]
    rows = {}
    for number, key in enumerate(["a", "q'\"\\\n", "漢"]):
        dense = schema_pb2.FieldData(type=Kind.FLOAT_VECTOR, field_name="vector")
        dense.vectors.dim = 2
        dense.vectors.float_vector.data.extend([number, -0.5])
        bits = schema_pb2.FieldData(type=Kind.BINARY, field_name="bits")
        bits.vectors.binary_vector = bytes([number, 255])
        words = schema_pb2.FieldData(type=Kind.SPARSE, field_name="words")
        words.vectors.sparse_float_vector.contents.append(
            np.array([(number, 1.5)], [("i", "<u4"), ("v", "<f4")]).tobytes()
        )
        extra = b'{"text": "t%d", "n": 99999999999999999999}' % number if number != 1 else b'{"text": 1}'
        rows[key] = [text("pk", key), dense, bits, words, meta(extra)]
    write(path, "my docs", fields_of(*vectors), rows)
    return path


def expected(*, with_documents: bool = False) -> list[Record]:
    """What `made` holds."""
    records = []
    for number, key in enumerate(["a", "q'\"\\\n", "漢"]):
        fields: dict[str, Any] = {"text": f"t{number}", "n": 99999999999999999999}
        if number == 1:
            fields = {"text": 1}
        document = fields.pop("text") if with_documents and number != 1 else None
        records.append(
            Record(
                id=key,
                vectors={
                    "": np.array([number, -0.5], np.float32),
                    "bits": np.array([number, 255], np.uint8),
                    "words": {"indices": [number], "values": [1.5]},
                },
                document=document,
                metadata=fields,
            )
        )
    return records


def test_a_file_with_vectors_of_every_kind_is_read_whole(made: Path) -> None:
    store = MilvusStore(path=str(made))
    found = store.describe("my docs")
    assert found.id_kinds == {IdKind.STR}
    assert [(v.name, v.kind, v.dtype, v.dimensions, v.metric) for v in found.vectors] == [
        ("", VectorKind.DENSE, DType.FLOAT32, 2, Metric.EUCLIDEAN),
        ("bits", VectorKind.DENSE, DType.BIT, 16, None),
        ("words", VectorKind.SPARSE, DType.FLOAT32, None, None),
    ]
    assert not found.has_documents  # not a text in all of them
    assert_same(read_all(store, "my docs", span_records=2), expected(), store)
    (second,) = store.fetch("my docs", ids_of(expected()[1:2])).to_pylist()
    assert second["id"] == expected()[1].id


def test_the_document_of_a_file_can_be_named(made: Path) -> None:
    store = MilvusStore(path=str(made), document_field="text")
    assert_same(read_all(store, "my docs"), expected(with_documents=True), store)


def test_a_file_is_no_target_and_is_not_touched(made: Path, shell: Shell) -> None:
    before = digest(made)
    store = MilvusStore(path=str(made))
    for change in (
        lambda: store.create(new_schema(MilvusStore(host="h"))),
        lambda: store.drop("my docs"),
        lambda: store.delete("my docs", ids_of(expected())),
        lambda: store.set_alias("alias", "my docs"),
    ):
        with pytest.raises(errors.UnsupportedOperationError, match="only read"):
            change()
    fill("parquet:source#docs")
    refused = shell("run", "--source", "parquet:source#docs", "--target", f"milvus:{made}#new")
    assert refused.status == 2
    assert "only read" in refused.err
    assert digest(made) == before
    assert [path.name for path in made.parent.glob("legacy*")] == [made.name]


def test_a_missing_collection_of_a_file_is_2_and_names_those_that_are_there(made: Path, shell: Shell) -> None:
    refused = shell("inspect", f"milvus:{made}#nope")
    assert refused.status == 2
    assert "there are: my docs" in refused.err


def test_a_file_that_was_not_closed_is_refused(made: Path) -> None:
    Path(f"{made}-wal").write_bytes(b"more")
    with pytest.raises(errors.StoreRefusedError, match=r"legacy\.db-wal"):
        MilvusStore(path=str(made)).count("my docs")


def test_a_file_of_something_else_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE notes (text)")
    database.close()
    with pytest.raises(errors.StoreRefusedError, match="collection_meta"):
        MilvusStore(path=str(path)).list_collections()
