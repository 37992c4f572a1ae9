"""The envelope: originals that a target can't hold, kept in three reserved metadata fields.

`_source_id` holds the typed id of a record whose id the target can't hold, as `{"int":"5"}`.
`_source_extra` holds, as JSON text, whatever else of the record would have changed:

    {"fields": {…}}      metadata fields with their exact values
    {"document": "…"}    the document
    {"namespace": "…"}   the namespace
    {"metadata": null}   the record had no metadata at all; `{}` where it had an empty object

Both are plain text, which every store with metadata holds exactly. `_source_namespace` says the namespace
again as it is, to filter by. `decode` undoes `encode`, so a record that went through any number of stores
reads as it was in the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import filters
from migration_pipelines.batch import DOCUMENT, ID, ID_TYPE, METADATA, NAMESPACE, fit_namespaces
from migration_pipelines.metadata import dump_metadata, load_metadata, value_kind, value_kinds
from migration_pipelines.model import IdKind, ValueKind

SOURCE_ID = "_source_id"
SOURCE_EXTRA = "_source_extra"
SOURCE_NAMESPACE = "_source_namespace"
RESERVED = frozenset({SOURCE_ID, SOURCE_EXTRA, SOURCE_NAMESPACE})
_NUMBERS = frozenset({ValueKind.FLOAT, ValueKind.INTEGRAL_FLOAT, ValueKind.NEGATIVE_ZERO})


def is_held(key: str, value: Any, *, exact: Set[str], accepts_key: Callable[[str], bool]) -> bool:
    """Whether a target gives this metadata field back exactly."""
    if key in RESERVED or not accepts_key(key):
        return False
    return all(kind in exact for kind in value_kinds(value))


def encode_metadata(
    metadata: Mapping[str, Any] | None,
    *,
    exact: Set[str],
    accepts_key: Callable[[str], bool],
    holds_none: bool,
    source_id: tuple[str, str] | None = None,
    document: str | None = None,
    namespace: str | None = None,
) -> dict[str, Any] | None:
    """Return the metadata that the target can hold, with what it can't in the envelope.

    Parameters
    ----------
    exact
        Kinds of value that come back exactly from the target.
    holds_none
        Whether a record without metadata stays different from one with an empty object.
    source_id
        Text and kind of the id, where the target gets another.
    document
        The document, where the target gets another.
    namespace
        The namespace, where the target has none.
    """
    fields: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in (metadata or {}).items():
        if is_held(key, value, exact=exact, accepts_key=accepts_key):
            fields[key] = value
            continue
        extra.setdefault("fields", {})[key] = value
        near = _nearest(value) if accepts_key(key) and key not in RESERVED else None
        if near is not None:
            fields[key] = near
    if document is not None:
        extra["document"] = document
    if namespace is not None:
        extra["namespace"] = namespace
        if all(kind in exact for kind in value_kinds(namespace)):
            fields[SOURCE_NAMESPACE] = namespace
    if source_id is not None:
        fields[SOURCE_ID] = orjson.dumps({source_id[1]: source_id[0]}).decode()
    says_nothing = metadata is None and (fields or extra or not holds_none)
    if says_nothing or (metadata == {} and ValueKind.NO_FIELDS not in exact):
        extra["metadata"] = metadata
    if extra:
        fields[SOURCE_EXTRA] = dump_metadata(extra)
    return fields if fields or metadata is not None else None


def _nearest(value: Any) -> Any:
    """Return a number near to one that the target would round in its own way, to filter by; else None."""
    if value_kind(value) not in _NUMBERS:
        return None
    near = float(f"{value:.15g}") + 0.0
    return near if value_kind(near) is ValueKind.SHORT_FLOAT and math.isfinite(near) else None


def decode(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch as it was before `encode`; batches without an envelope pass untouched.

    Where the envelope of any record holds a namespace, the batch has the column for it afterwards.
    """
    column = batch.column(METADATA)
    marked = pc.match_substring(column, '"_source_').fill_null(fill_value=False)
    if not pc.any(marked).as_py():
        return batch
    columns = {name: batch.column(name) for name in batch.schema.names}
    texts, kinds = columns[ID].to_pylist(), columns[ID_TYPE].to_pylist()
    documents, metadata = columns[DOCUMENT].to_pylist(), column.to_pylist()
    namespaces: dict[int, str] = {}
    for row in (index for index, is_marked in enumerate(marked.to_pylist()) if is_marked):
        fields = load_metadata(metadata[row])
        source_id, extra = _source_id(fields), _extra(fields)
        if source_id is not None:
            kinds[row], texts[row] = source_id
            del fields[SOURCE_ID]
        if extra is not None:
            del fields[SOURCE_EXTRA]
            if "namespace" in extra:
                namespaces[row] = extra["namespace"]
                fields.pop(SOURCE_NAMESPACE, None)
            fields |= extra.get("fields", {})
            documents[row] = extra.get("document", documents[row])
        empty = not fields and extra is not None and "metadata" in extra
        original = extra["metadata"] if empty and extra is not None else fields
        metadata[row] = None if original is None else dump_metadata(original)
    columns |= {
        ID: pa.array(texts, pa.string()),
        ID_TYPE: pa.array(kinds, pa.string()),
        DOCUMENT: pa.array(documents, pa.string()),
        METADATA: pa.array(metadata, pa.string()),
    }
    decoded = pa.RecordBatch.from_pydict(columns, schema=batch.schema)
    return _with_namespaces(decoded, namespaces) if namespaces else decoded


def matching(where: filters.Filter, stored: pa.RecordBatch) -> pa.BooleanArray:
    """Return bool[n_records]: which records of a batch, as a store holds them, match by what they were.

    What a store looks at itself it looks at by this: fields in the envelope are fields too.
    """
    return filters.mask(where, decode(stored))


def _with_namespaces(batch: pa.RecordBatch, found: Mapping[int, str]) -> pa.RecordBatch:
    """Return a batch in which these rows have the namespaces that their envelopes hold."""
    batch = fit_namespaces(batch, wanted=True)
    at = batch.schema.names.index(NAMESPACE)
    names = batch.column(at).to_pylist()
    for row, name in found.items():
        names[row] = name
    return batch.set_column(at, NAMESPACE, pa.array(names, pa.string()))


def _source_id(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return kind and text of the original id; None where the field isn't ours."""
    found = _json_object(fields.get(SOURCE_ID))
    if found is None or len(found) != 1:
        return None
    kind, text = next(iter(found.items()))
    return (kind, text) if kind in {member.value for member in IdKind} and isinstance(text, str) else None


def _extra(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what else was kept; None where the field isn't ours, by its keys and all their types."""
    found = _json_object(fields.get(SOURCE_EXTRA))
    if not found or not found.keys() <= {"fields", "document", "namespace", "metadata"}:
        return None
    ours = (
        isinstance(found.get("fields", {}), dict)
        and isinstance(found.get("document", ""), str)
        and isinstance(found.get("namespace", ""), str)
        and found.get("metadata") in (None, {})
    )
    return found if ours else None


def _json_object(text: Any) -> dict[str, Any] | None:
    if not isinstance(text, str) or not text.startswith("{"):
        return None
    try:
        return load_metadata(text)
    except ValueError:
        return None
