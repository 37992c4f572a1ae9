"""Records and collections as Chroma gives and takes them, checked so that it changes none of them.

A `handle` is chromadb's `Collection`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.errors import (
    ConfigurationError,
    DimensionMismatchError,
    RecordRejectedError,
    TransientError,
    UsageError,
)
from migration_pipelines.metadata import dump_all, load_metadata, value_kinds
from migration_pipelines.model import CollectionSchema, IdKind, Metric, ValueKind, VectorField

METRICS = {"l2": Metric.EUCLIDEAN, "cosine": Metric.COSINE, "ip": Metric.DOT}
_SPACES = {metric: space for space, metric in METRICS.items()}
# Our word for a search index's parameter, and Chroma's.
_HNSW = {"m": "max_neighbors", "ef_construction": "ef_construction", "ef_search": "ef_search"}
_HNSW_OWN = ("resize_factor", "sync_threshold")
PAGE = 250  # records: measured, smaller and larger pages are slower
# Chroma has a place of its own for a record's URI; here it is a metadata field of the name that Chroma's
# own database gives it. All other names with this prefix are dropped by Chroma without a word.
_URI = "chroma:uri"
_OWN_KEYS = "chroma:"
# A cosine collection divides by a length computed in float32: above 1.8e19 its square overflows and the
# vector comes back as NaN, below 1e-22 as zeros; below 1e-19 the length is inexact. Measured, with a margin.
_COSINE_LENGTHS = (1e-18, 1e18)

HELD = frozenset(
    {
        ValueKind.TEXT,
        ValueKind.EMPTY_TEXT,
        ValueKind.NUL_TEXT,
        ValueKind.BOOL,
        ValueKind.INT53,
        ValueKind.INT64,
        ValueKind.SHORT_FLOAT,
        ValueKind.LIST_OF_TEXT,
        ValueKind.LIST_OF_NUMBERS,
        ValueKind.LIST_OF_BOOLS,
    }
)


# ── collections ──────────────────────────────────────────────────────────────────────────────────────


def schema_of(handle: Any) -> CollectionSchema:
    """Return what a collection is made of; before its first record it has no dimensions."""
    return collection_schema(
        handle.name,
        dimensions=dimensions_of(handle),
        index=_index(handle),
        embedder=(handle.configuration_json.get("embedding_function") or {}).get("name"),
        metadata=handle.metadata or {},
    )


def collection_schema(
    name: str,
    *,
    dimensions: int | None,
    index: Mapping[str, Any],
    embedder: str | None,
    metadata: Mapping[str, Any],
) -> CollectionSchema:
    """Return the schema of a collection by what Chroma says of it; `index` has Chroma's own names."""
    own = {key: index[key] for key in _HNSW_OWN if key in index}
    vector = VectorField(
        dimensions=dimensions,
        metric=METRICS[index.get("space", "l2")],
        index={"type": "hnsw"} | {ours: index[theirs] for ours, theirs in _HNSW.items() if theirs in index},
    )
    return CollectionSchema(
        name=name,
        vectors=(vector,),
        id_kinds=frozenset({IdKind.STR}),
        # Older Chroma kept the index's parameters among the user's properties.
        properties={key: value for key, value in metadata.items() if not key.startswith("hnsw:")},
        options=({"hnsw": own} if own else {}) | ({"embedding_function": embedder} if embedder else {}),
    )


def creation_options(schema: CollectionSchema, *, where: str) -> dict[str, Any]:
    """Return what `create_collection` takes beside the name.

    Raises
    ------
    ConfigurationError
        The metric or a property is none that Chroma has.
    """
    vector = schema.vectors[0]
    # A list here makes Chroma's engine panic, which no caller can catch.
    if refused := sorted(key for key, value in schema.properties.items() if not is_property(value)):
        raise ConfigurationError(
            f"{where}: a property of a Chroma collection is text, number or boolean; drop {refused}"
        )
    space = _SPACES.get(vector.metric or Metric.EUCLIDEAN)
    if space is None:
        raise ConfigurationError(
            f"{where}: Chroma has no {vector.metric} distance; choose one of {sorted(_SPACES)}"
        )
    index = {theirs: vector.index[ours] for ours, theirs in _HNSW.items() if ours in vector.index}
    own = schema.options.get("hnsw", {})
    index |= {key: own[key] for key in _HNSW_OWN if key in own}
    return {
        "configuration": {"hnsw": {"space": space, **index}},
        "metadata": dict(schema.properties) or None,
    }


def _index(handle: Any) -> dict[str, Any]:
    configuration = handle.configuration_json
    index = configuration.get("hnsw") or configuration.get("spann") or {}
    return {key: value for key, value in index.items() if value is not None}


def metric_of(handle: Any) -> Metric:
    """Return the metric that the collection was made with."""
    return METRICS[_index(handle).get("space", "l2")]


def dimensions_of(handle: Any) -> int | None:
    """Return the dimensions of the vectors, which a collection learns from its first record."""
    found: int | None = handle.get_model().dimension
    return found


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────────


def all_ids(handle: Any) -> list[str]:
    """Return every id, from one answer.

    Raises
    ------
    TransientError, UsageError
        The answer is shorter than the count.
    """
    expected, texts = handle.count(), handle.get(include=[])["ids"]
    if len(texts) < expected:
        raise TransientError(
            f"chroma: {handle.name}: {len(texts)} ids arrived where {expected} records were counted; the "
            "answer was cut, or records were deleted meanwhile: try again",
            expected=expected,
            found=len(texts),
        )
    return list(texts)


def held_ids(ids: pa.RecordBatch) -> list[str]:
    """Return the distinct ids that Chroma can hold."""
    texts = ids.column(batches.ID).filter(pc.equal(ids.column(batches.ID_TYPE), IdKind.STR.value))
    return [text for text in dict.fromkeys(texts.to_pylist()) if text]


# ── records that Chroma answers ──────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=64)
def plain_schema(dimensions: int) -> CollectionSchema:
    """Return the schema of any collection of Chroma's with vectors of these dimensions."""
    vector = VectorField(dimensions=dimensions)
    return CollectionSchema(name="", vectors=(vector,), id_kinds=frozenset({IdKind.STR}))


def read_records(handle: Any, texts: Sequence[str], *, vectors: bool) -> pa.RecordBatch | None:
    """Return the records of any number of ids, in the order of `texts`; None where there are none."""
    starts = range(0, len(texts), PAGE)
    pages = (read_page(handle, texts[at : at + PAGE], vectors=vectors) for at in starts)
    found = [page for page in pages if page is not None]
    return pa.concat_batches(found) if found else None


def read_page(handle: Any, texts: Sequence[str], *, vectors: bool) -> pa.RecordBatch | None:
    """Return the records of at most a page of ids, in the order of `texts`; None where there are none."""
    include = ["documents", "metadatas", "uris"] + ["embeddings"] * vectors
    # What `handle.get` calls, without its copy of the vectors as float64: a fifth of a reader's time.
    reply = handle._client._get(  # noqa: SLF001
        collection_id=handle.id,
        ids=texts,
        include=include,
        tenant=handle.tenant,
        database=handle.database,
    )
    ids = reply["ids"]
    if not ids:
        return None
    columns = [pa.array(ids, pa.string()), batches.constant(IdKind.STR.value, len(ids))]
    dimensions = 0
    if vectors:
        matrix = _matrix(reply["embeddings"])
        dimensions = matrix.shape[1]
        columns.append(batches.dense_vectors(matrix))
    columns += [pa.array(reply["documents"], pa.string()), _metadata(reply["metadatas"], reply["uris"])]
    layout = batches.arrow_schema(plain_schema(dimensions), vectors=vectors)
    page = pa.RecordBatch.from_arrays(columns, schema=layout)
    if ids == texts:
        return page
    rows = {text: row for row, text in enumerate(ids)}
    return page.take(pa.array([rows[text] for text in texts if text in rows], pa.int64()))


def _matrix(rows: Sequence[Sequence[float]]) -> npt.NDArray[np.float32]:
    """Return float32[n_records, dimensions] of lists of floats, in a third of the time that numpy takes."""
    pack = struct.Struct(f"{len(rows[0])}f").pack
    return np.frombuffer(b"".join([pack(*row) for row in rows]), np.float32).reshape(len(rows), -1)


def _metadata(found: Sequence[Mapping[str, Any] | None], uris: Sequence[str | None] | None) -> pa.Array:
    if uris is not None and any(uri is not None for uri in uris):
        found = [
            fields if uri is None else {**(fields or {}), _URI: uri}
            for fields, uri in zip(found, uris, strict=True)
        ]
    return pa.array(dump_all(found), pa.binary()).view(pa.string())


# ── records that Chroma is given ─────────────────────────────────────────────────────────────────────


def is_property(value: Any) -> bool:
    """Whether a collection's property can have this value."""
    return isinstance(value, (str, bool, int, float))


def accepts_key(key: str) -> bool:
    """Whether a metadata field may have this name."""
    return key == _URI or not (key == "" or key[0] in "$#" or key.startswith(_OWN_KEYS))


def to_chroma(batch: pa.RecordBatch, *, where: str, is_cosine: bool) -> dict[str, Any]:
    """Return what `add` takes, by parameter.

    Raises
    ------
    RecordRejectedError
        Chroma would refuse a record, or change it.
    """
    column = _vectors(batch, where=where)
    ids, matrix = batch.column(batches.ID).to_pylist(), batches.dense_matrix(column)
    problems = [
        (np.asarray(pc.not_equal(batch.column(batches.ID_TYPE), IdKind.STR.value)), "its id is not a text"),
        (np.asarray(pc.equal(batch.column(batches.ID), "")), "its id is empty"),
        (np.asarray(column.is_null()), "it has no vector"),
        (batches.non_finite_rows(column), "its vector holds NaN or an infinity"),
    ]
    if is_cosine:
        problems.append(
            (_beyond_cosine(matrix), "cosine can't hold a vector of such a length, see docs/limits.md")
        )
    for rows, problem in problems:
        for row in np.flatnonzero(rows)[:1]:
            raise RecordRejectedError(f"{where}: record {ids[row]!r}: {problem}", record=ids[row])
    metadatas, uris = [], []
    for record_id, text in zip(ids, batch.column(batches.METADATA).to_pylist(), strict=True):
        fields = None if text is None else load_metadata(text)
        if fields is not None and (fault := _fault(fields)):
            raise RecordRejectedError(f"{where}: record {record_id!r}: {fault}", record=record_id)
        uris.append(fields.pop(_URI, None) if fields else None)
        metadatas.append(fields or None)
    documents = batch.column(batches.DOCUMENT).to_pylist()
    return {"ids": ids, "embeddings": matrix, "documents": documents, "metadatas": metadatas, "uris": uris}


def _vectors(batch: pa.RecordBatch, *, where: str) -> pa.Array:
    expected = batches.arrow_schema(plain_schema(1)).names
    if sorted(batch.schema.names) != sorted(expected):
        raise UsageError(
            f"{where}: the batch has the columns {batch.schema.names}, Chroma takes {expected}: map them",
            expected=expected,
            found=batch.schema.names,
        )
    column = batch.column(batches.VECTOR)
    batches.check_dimensions(batch, plain_schema(getattr(column.type, "list_size", 1)), where=where)
    return column


def _beyond_cosine(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    lengths = np.linalg.norm(matrix.astype(np.float64), axis=1)
    shortest, longest = _COSINE_LENGTHS
    return np.asarray((lengths != 0) & ((lengths < shortest) | (lengths > longest)))


def _fault(fields: Mapping[str, Any]) -> str | None:
    """Return why Chroma wouldn't give this metadata back as it is, or None."""
    if not fields:
        return "its metadata is {}, which Chroma can't hold"
    for key, value in fields.items():
        if not accepts_key(key):
            return f"Chroma refuses or drops a metadata field called {key!r}"
        if key == _URI and not isinstance(value, str):
            return f"its {_URI} is not a text"
        if not HELD.issuperset(value_kinds(value)):
            return f"Chroma would refuse or change the value of {key!r}"
    return None


def replace_records(handle: Any, records: Mapping[str, Any], *, where: str) -> None:
    """Write what `to_chroma` returned, in place of whatever is under these ids.

    Raises
    ------
    DimensionMismatchError
    TransientError
        Chroma doesn't show all of the records afterwards.
    """
    ids = records["ids"]
    there = handle.get(ids=ids, include=[])["ids"]
    if there:
        # Were `add` to refuse the new records, the old ones would be gone.
        expected, found = dimensions_of(handle), records["embeddings"].shape[1]
        if found != expected:
            raise DimensionMismatchError(
                f"{where}: the vectors have {found} dimensions, the collection's have {expected}; choose "
                "another target collection",
                expected=expected,
                found=found,
            )
        handle.delete(ids=there)
    handle.add(**records)
    # `add` answers nothing: only what can be read was written.
    if len(handle.get(ids=ids, include=[])["ids"]) != len(ids):
        raise TransientError(
            f"{where}: Chroma doesn't show all of {len(ids)} records just written; write them again"
        )
