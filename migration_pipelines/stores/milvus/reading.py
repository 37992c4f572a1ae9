"""Records from Milvus's columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError, TransientError
from migration_pipelines.metadata import canonical_texts, dump_metadata, load_json
from migration_pipelines.model import CollectionSchema, IdKind
from migration_pipelines.stores.milvus.columns import scalars, vectors
from migration_pipelines.stores.milvus.schema import Field, Kind, Layout

_DYNAMIC = "$meta"


def batch_of(
    found: Iterable[Any],
    layout: Layout,
    schema: CollectionSchema,
    *,
    with_vectors: bool,
    namespace: str | None,
    where: str,
) -> pa.RecordBatch:
    """Return the records of an answer's columns.

    Parameters
    ----------
    found
        Milvus's `FieldData` messages.
    namespace
        That of all of them, in a collection with namespaces.

    Raises
    ------
    TransientError
        The answer was cut: columns that were asked for are missing, or not of one length.
    """
    columns = {_DYNAMIC if data.is_dynamic else data.field_name: data for data in found}
    wanted = [layout.key.name, *layout.output_fields(vectors=with_vectors)]
    if missing := [name for name in wanted if name not in columns]:
        raise TransientError(
            f"{where}: the answer lacks the fields {missing}; try again", found=sorted(columns)
        )
    keys = scalars(columns[layout.key.name])
    kind = IdKind.STR if layout.key_is_text else IdKind.INT
    arrays: dict[str, pa.Array] = {
        batches.ID: pa.array(keys if layout.key_is_text else list(map(str, keys)), pa.string()),
        batches.ID_TYPE: batches.constant(kind.value, len(keys)),
    }
    for column in layout.vectors if with_vectors else ():
        arrays[batches.vector_column(column.field.name)] = vectors(columns[column.name], column)
    documents, metadata = _texts(columns, layout, len(keys), where)
    arrays[batches.DOCUMENT] = pa.array(documents, pa.string())
    arrays[batches.METADATA] = pa.array(metadata, pa.binary()).view(pa.string())
    if schema.has_namespaces:
        arrays[batches.NAMESPACE] = batches.constant(namespace or "", len(keys))
    lengths = {name: len(array) for name, array in arrays.items()}
    if set(lengths.values()) != {len(keys)}:
        raise TransientError(f"{where}: the answer's columns differ in length; try again", found=lengths)
    return pa.RecordBatch.from_pydict(arrays, schema=batches.arrow_schema(schema, vectors=with_vectors))


def _texts(
    columns: Mapping[str, Any], layout: Layout, n_records: int, where: str
) -> tuple[list[str | None], list[bytes | None]]:
    """Return the documents, and the metadata as canonical JSON texts."""
    documents: list[str | None] = [None] * n_records
    if isinstance(layout.document, Field):
        documents = scalars(columns[layout.document.name])
    if layout.rest is not None:
        rests = scalars(columns[layout.rest.name])
        documents = [
            text if not rest else "".join([text or "", *rest])
            for text, rest in zip(documents, rests, strict=True)
        ]
    if layout.metadata is not None:
        texts = [_object(text, where) for text in scalars(columns[layout.metadata.name])]
        return documents, canonical_texts(texts)
    dynamic: Sequence[bytes | None] = [None] * n_records
    if layout.dynamic:
        dynamic = scalars(columns[_DYNAMIC])
        if isinstance(layout.document, str):
            documents, dynamic = _documents_apart(dynamic, layout.document)
    members = [_members(columns[field.name], field) for field in layout.fields]
    rows = zip(*members, strict=True) if members else [()] * n_records
    joined = [_joined(row, text, where) for row, text in zip(rows, dynamic, strict=True)]
    return documents, canonical_texts(joined)


def _documents_apart(
    dynamic: Sequence[bytes | None], key: str
) -> tuple[list[str | None], list[bytes | None]]:
    """Return the documents that stand among the dynamic fields, and the fields without them."""
    documents: list[str | None] = []
    others: list[bytes | None] = []
    for text in dynamic:
        fields = load_json((text or b"{}").decode())
        found = fields.get(key) if isinstance(fields, dict) else None
        documents.append(found if isinstance(found, str) else None)
        if isinstance(found, str):
            del fields[key]
            # Not `dump_metadata`: values in an envelope of their own stay as they are.
            text = json.dumps(fields, ensure_ascii=False).encode()
        others.append(text)
    return documents, others


def _members(data: Any, field: Field) -> list[bytes | None]:
    """Return `"name":value` of each record, None where it is null."""
    name = orjson.dumps(field.name) + b":"
    values = scalars(data)
    if field.kind == Kind.JSON:
        return [None if value is None else name + value for value in values]
    return [None if value is None else name + _json(value) for value in values]


def _json(value: Any) -> bytes:
    text = orjson.dumps(value)
    if b"null" not in text:
        return text
    # NaN or an infinity, which orjson writes as null; or a text with that word.
    return dump_metadata({"": value}).encode()[len(b'{"":') : -1]


def _joined(members: Sequence[bytes | None], dynamic: bytes | None, where: str) -> bytes | None:
    """Return the JSON object of a record's fields; None where it has none."""
    inner = (_object(dynamic, where) or b"{}").strip()[1:-1].strip()
    parts = [part for part in (*members, inner) if part]
    return b"{" + b",".join(parts) + b"}" if parts else None


def _object(text: bytes | None, where: str) -> bytes | None:
    if text is None or text == b"null":
        return None
    if text.lstrip()[:1] != b"{":
        raise StoreRefusedError(
            f"{where}: a record's metadata is the JSON {text[:50]!r}, an object was expected; mend the source"
        )
    return text
