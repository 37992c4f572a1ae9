"""Databases of Milvus Lite 2: one SQLite file, which today's Milvus Lite can't open. It is only ever read.

Its tables: `collection_meta` with Milvus's own messages for schema and indexes, and one table a collection
with a row a record: the key as text, and the record's fields as a message `1: repeated FieldData`.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from migration_pipelines.errors import CollectionNotFoundError, StoreRefusedError
from migration_pipelines.stores.milvus.client import mapping
from migration_pipelines.stores.milvus.columns import scalars
from migration_pipelines.stores.milvus.expressions import Key
from migration_pipelines.stores.milvus.schema import DEFAULT_PARTITION, Described, Layout

_PAGE = 500
_SYSTEM_FIELDS = frozenset({"RowID", "Timestamp"})
_DYNAMIC = "$meta"
_VECTORS_AS_BYTES = frozenset({"binary_vector", "float16_vector", "bfloat16_vector", "int8_vector"})
_DOCUMENT_KEYS = ("document", "text", "page_content")


class LegacyFile:
    """One such file.

    Raises
    ------
    StoreRefusedError
        Beside it lies the journal of a write that was cut off, without which it can't be read.
    """

    def __init__(self, path: Path) -> None:
        for journal in (Path(f"{path}-wal"), Path(f"{path}-journal")):
            if journal.exists() and journal.stat().st_size:
                raise StoreRefusedError(
                    f"milvus: {path} was not closed: {journal.name} lies beside it; open and close it once "
                    "with milvus-lite 2.5"
                )
        self._path = path

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        # Immutable: neither a lock nor a journal is made, so that a read-only folder will do.
        uri = f"{self._path.as_uri()}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(uri, uri=True, check_same_thread=False)) as database:
            database.text_factory = bytes  # messages are stored as text as well
            yield database

    def names(self) -> list[str]:
        """Return the names of all collections."""
        with self._opened() as database:
            rows = database.execute("SELECT collection_name FROM collection_meta WHERE meta_type = 'schema'")
            return [name.decode() for (name,) in rows]

    def describe(self, name: str, *, indexes: bool) -> Described:
        """Return what a collection is made of."""
        from pymilvus.grpc_gen import schema_pb2

        with self._opened() as database:
            query = "SELECT meta_type, blob_field FROM collection_meta WHERE collection_name = ? ORDER BY id"
            found = [(kind.decode(), blob) for kind, blob in database.execute(query, (name,))]
        schemas = [blob for kind, blob in found if kind == "schema"]
        if not schemas:
            there = ", ".join(sorted(self.names())) or "none"
            raise CollectionNotFoundError(
                f"milvus: {self._path} has no collection {name!r}; there are: {there}", collection=name
            )
        proto = schema_pb2.CollectionSchema.FromString(schemas[0])
        kept = [field for field in proto.fields if field.name not in _SYSTEM_FIELDS]
        proto.enable_dynamic_field |= any(field.name == _DYNAMIC for field in kept)
        kept = [field for field in kept if field.name != _DYNAMIC]
        del proto.fields[:]
        proto.fields.extend(kept)
        names = {field.fieldID: field.name for field in kept}
        told = [blob for kind, blob in found if kind == "index" and indexes]
        return Described(
            name=name,
            number=0,
            proto=proto,
            indexes=dict(_index(blob, names) for blob in told),
            partitions=(DEFAULT_PARTITION,),
            properties={},
        )

    def document_key(self, described: Described) -> str | None:
        """Return the dynamic field that is a text in every record and called as documents are.

        None where there is a field for the document, or no such text. The file doesn't change, so what is
        said of all its records holds.
        """
        import orjson

        if any(field.name in _DOCUMENT_KEYS for field in described.proto.fields):
            return None
        candidates: set[str] | None = None
        query = f"SELECT data FROM {_quoted(described.name)}"  # noqa: S608 - quoted
        with self._opened() as database:
            for (blob,) in database.execute(query):
                column = next((data for data in _fields(blob) if data.field_name == _DYNAMIC), None)
                values = scalars(column) if column is not None else []
                fields = orjson.loads(values[0]) if values else {}
                texts = {key for key in _DOCUMENT_KEYS if isinstance(fields.get(key), str)}
                candidates = texts if candidates is None else candidates & texts
                if not candidates:
                    return None
        return next((key for key in _DOCUMENT_KEYS if key in (candidates or ())), None)

    def count(self, found: Described, layout: Layout, partition: str | None) -> int:  # noqa: ARG002
        """Return how many records there are."""
        with self._opened() as database:
            (number,) = database.execute(f"SELECT count(*) FROM {_quoted(found.name)}").fetchone()  # noqa: S608
            return int(number)

    def keys(self, found: Described, layout: Layout, partition: str | None) -> Iterator[list[Key]]:  # noqa: ARG002
        """Yield all keys, in the order of their rows."""
        with self._opened() as database:
            rows = database.execute(f"SELECT milvus_id FROM {_quoted(found.name)} ORDER BY id")  # noqa: S608
            while part := rows.fetchmany(_PAGE):
                texts = [text.decode() for (text,) in part]
                yield list(texts) if layout.key_is_text else list(map(int, texts))

    def records(
        self,
        found: Described,
        layout: Layout,
        keys: Sequence[Key],
        partition: str | None,  # noqa: ARG002
        *,
        vectors: bool,
    ) -> Sequence[Any]:
        """Return the columns of the records of these keys."""
        from pymilvus.grpc_gen import schema_pb2

        columns: dict[str, Any] = {}
        for name in [layout.key.name, *layout.output_fields(vectors=vectors)]:
            columns[name] = schema_pb2.FieldData(field_name=name, is_dynamic=name == _DYNAMIC)
        marks = ",".join("?" * len(keys))
        query = f"SELECT data FROM {_quoted(found.name)} WHERE milvus_id IN ({marks})"  # noqa: S608
        with self._opened() as database:
            for (blob,) in database.execute(query, list(map(str, keys))):
                for data in _fields(blob):
                    if data.field_name in columns:
                        _append(columns[data.field_name], data)
        _set_types(columns, found)
        return list(columns.values())

    def close(self) -> None:
        """Do nothing: the file is opened for each read."""


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _fields(blob: bytes) -> Sequence[Any]:
    # A message of ours has the same form: one repeated field of FieldData, of number 1.
    from pymilvus.grpc_gen import schema_pb2

    found: Sequence[Any] = schema_pb2.StructArrayField.FromString(blob).fields
    return found


def _index(blob: bytes, names: Mapping[int, str]) -> tuple[str, dict[str, str]]:
    """Return field and parameters of an index: segcore's `FieldIndexMeta`, which pymilvus doesn't define.

    1: number of the field, 5: a parameter, key and value.
    """
    from pymilvus.grpc_gen import common_pb2

    name = ""
    params: dict[str, str] = {}
    for number, value in _members(blob):
        if number == 1 and isinstance(value, int):
            name = names.get(value, "")
        elif number == 5 and isinstance(value, bytes):
            params |= mapping([common_pb2.KeyValuePair.FromString(value)])
    return name, params


def _members(blob: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of a message's members: integers, or bytes."""
    at = 0
    while at < len(blob):
        tag, at = _varint(blob, at)
        value, at = _varint(blob, at)
        if tag & 7 == 0:
            yield tag >> 3, value
        elif tag & 7 == 2:
            yield tag >> 3, blob[at : at + value]
            at += value
        else:
            raise StoreRefusedError("milvus: an index's description has an unknown form")


def _varint(blob: bytes, at: int) -> tuple[int, int]:
    found = shift = 0
    while True:
        byte = blob[at]
        found |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return found, at


def _append(column: Any, one: Any) -> None:
    """Put a column of one record after those that are there.

    Protobuf appends what is repeated when it merges, but replaces bytes, in which some kinds of vector lie.
    """
    slot = one.vectors.WhichOneof("data") or ""
    before = getattr(column.vectors, slot) if slot in _VECTORS_AS_BYTES else b""
    column.MergeFrom(one)
    if before:
        setattr(column.vectors, slot, before + getattr(one.vectors, slot))


def _set_types(columns: dict[str, Any], found: Described) -> None:
    """Give columns without a record their types, by which an empty answer is read."""
    types = {field.name: field.data_type for field in found.proto.fields} | {_DYNAMIC: 23}
    for name, column in columns.items():
        column.type = types[name]
