"""What a Chroma folder's SQLite file says of a collection before any record is read."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from migration_pipelines.stores.chroma.file import collection_row, has_table, rows_of
from migration_pipelines.stores.chroma.queue import number_of

# The latest migration of each part of Chroma's schema, of those that were tested here: 0.4.0 to 1.5.9.
_OLDEST = {"sysdb": 3, "metadb": 1, "embeddings_queue": 1}
_NEWEST = {"sysdb": 10, "metadb": 6, "embeddings_queue": 2}
_METADATA = "SELECT * FROM collection_metadata WHERE collection_id = ?"
_SEGMENT_METADATA = "SELECT * FROM segment_metadata WHERE segment_id = ?"
_SEGMENTS = """
    SELECT scope, segments.id AS id, seq_id FROM segments
    LEFT JOIN max_seq_id ON max_seq_id.segment_id = segments.id WHERE collection = ?"""
# What Chroma takes where nothing is said: rust/types/src/hnsw_configuration.rs.
_DEFAULTS: Mapping[str, Any] = {
    "space": "l2",
    "ef_construction": 100,
    "ef_search": 100,
    "max_neighbors": 16,
    "resize_factor": 1.2,
    "sync_threshold": 1000,
}
# Before 1.0 the index was set by properties of the collection, copied to its segment when that was made.
_LEGACY = {
    "hnsw:space": "space",
    "hnsw:construction_ef": "ef_construction",
    "hnsw:search_ef": "ef_search",
    "hnsw:M": "max_neighbors",
    "hnsw:resize_factor": "resize_factor",
    "hnsw:sync_threshold": "sync_threshold",
}


@dataclass(frozen=True, kw_only=True)
class CollectionFacts:
    """A collection as Chroma's own tables have it.

    Parameters
    ----------
    text_segment, vector_segment
        Under which its records stand in the tables, and its folder of index files.
    texts_applied, vectors_applied
        Number of the last write that has reached either; None where the tables don't say.
    metadata
        Properties, those of Chroma's own included.
    index
        Parameters of the search index, by Chroma's names.
    """

    id: str
    dimensions: int | None
    text_segment: str
    vector_segment: str
    texts_applied: int
    vectors_applied: int | None
    metadata: Mapping[str, Any]
    index: Mapping[str, Any]
    embedder: str | None
    has_bools: bool
    has_arrays: bool

    @property
    def is_cosine(self) -> bool:
        """Whether Chroma divides the vectors by their lengths."""
        return bool(self.index["space"] == "cosine")


def unknown_level(file: sqlite3.Connection) -> str | None:
    """Return what of the schema is of another version than those that are understood; None where all is."""
    levels = dict(file.execute("SELECT dir, max(version) FROM migrations GROUP BY dir").fetchall())
    for part, version in levels.items():
        if part not in _OLDEST or not _OLDEST[part] <= version <= _NEWEST[part]:
            return f"{part} {version}"
    missing = _OLDEST.keys() - levels.keys()
    return f"no {', '.join(sorted(missing))}" if missing else None


def read_facts(
    file: sqlite3.Connection, name: str, *, tenant: str, division: str, where: str
) -> CollectionFacts:
    """Return the facts of one collection.

    Raises
    ------
    CollectionNotFoundError
    """
    row = collection_row(file, name, tenant=tenant, database=division, where=where)
    segments = {item["scope"]: item for item in rows_of(file, _SEGMENTS, row["id"])}
    text, vector = segments["METADATA"], segments["VECTOR"]
    uuid.UUID(vector["id"])  # it becomes the name of a folder, which may not lie elsewhere
    metadata = {item["key"]: _value(item) for item in rows_of(file, _METADATA, row["id"])}
    legacy = {item["key"]: _value(item) for item in rows_of(file, _SEGMENT_METADATA, vector["id"])}
    settings, embedder = _configuration(row)
    return CollectionFacts(
        id=row["id"],
        dimensions=row["dimension"],
        text_segment=text["id"],
        vector_segment=vector["id"],
        texts_applied=number_of(text["seq_id"]),
        vectors_applied=None if vector["seq_id"] is None else number_of(vector["seq_id"]),
        metadata=metadata,
        index=index_of(settings, {**metadata, **legacy}),
        embedder=embedder,
        has_bools=has_table(file, "embedding_metadata", column="bool_value"),
        has_arrays=_has_rows(file, "embedding_metadata_array"),
    )


def index_of(settings: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, Any]:
    """Return the index's parameters; the older way to set them counts only where no other is used."""
    found = {**_DEFAULTS, **{key: settings[key] for key in _DEFAULTS if settings.get(key) is not None}}
    if found != dict(_DEFAULTS):
        return found
    return found | {ours: legacy[theirs] for theirs, ours in _LEGACY.items() if theirs in legacy}


def _configuration(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the settings of the index and the name of the embedding function.

    What 0.5 and 0.6 wrote as `hnsw_configuration` is left alone: their indexes didn't go by it.
    """
    schema = json.loads(row.get("schema_str") or "null") or {}
    for place in ((schema.get("keys") or {}).get("#embedding"), schema.get("defaults")):
        config = (((place or {}).get("float_list") or {}).get("vector_index") or {}).get("config")
        if config:
            return {**(config.get("hnsw") or {}), "space": config.get("space")}, _embedder(config)
    config = json.loads(row.get("config_json_str") or "null") or {}
    return (config.get("vector_index") or config).get("hnsw") or {}, _embedder(config)


def _embedder(config: Mapping[str, Any]) -> str | None:
    found: str | None = (config.get("embedding_function") or {}).get("name")
    return found


def _value(row: Mapping[str, Any]) -> Any:
    for column in ("str_value", "int_value", "float_value"):
        if row[column] is not None:
            return row[column]
    return bool(row["bool_value"]) if row.get("bool_value") is not None else None


def _has_rows(file: sqlite3.Connection, table: str) -> bool:
    if not has_table(file, table):
        return False
    (found,) = file.execute(f"SELECT EXISTS (SELECT 1 FROM {table})").fetchone()  # noqa: S608 - a constant
    return bool(found)
