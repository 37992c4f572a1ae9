"""A folder of the client's local mode, read as data: its points are pickles, and none of them is run.

`meta.json` holds the settings of all collections, `collection/<name>/storage.sqlite` the points of one: a
table of `id` (the pickled id as base64) and `point` (a pickled `PointStruct`). The client unpickles whatever
stands there on opening the folder; here only what a point is made of is understood, all else is refused.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import contextlib
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from migration_pipelines.errors import CollectionNotFoundError, StoreRefusedError
from migration_pipelines.pickled import Built, read_pickle
from migration_pipelines.snapshot import folder_fingerprint
from migration_pipelines.stores.qdrant.scrolling import Id, order

META_FILE = "meta.json"
_POINTS_FILE = "storage.sqlite"
_OLD_POINTS_FILE = "storage.dbm"
_MODELS = "qdrant_client.http.models.models"
_POINT, _SPARSE = f"{_MODELS}.PointStruct", f"{_MODELS}.SparseVector"
_ALLOWED = (_POINT, _SPARSE)
# What the client pickles a UUID's text to: protocol 4 or 5, a frame, a text of 36 characters, an end.
_UUID_KEY = slice(13, 49)
_UUID_KEY_BYTES = 51
_ROWS = "SELECT rowid, id FROM points ORDER BY rowid"
_SOME_ROWS = 500  # SQLite takes 999 parameters at the least


class MetaFileError(Exception):
    """`meta.json` isn't what the client writes."""


@dataclass(frozen=True)
class _Index:
    """Where each point lies: ids in Qdrant's order, and the row of each."""

    fingerprint: str
    ids: tuple[Id, ...]
    keys: tuple[tuple[bool, Id], ...]
    rows: Mapping[Id, int]


class Folder:
    """The reading half of a folder; safe to use from several threads.

    Parameters
    ----------
    path
        The folder that is read.
    shown
        How it is called in errors.
    is_copy
        Whether it is ours: there SQLite may roll back what a killed writer left in the middle.
    """

    def __init__(self, path: Path, *, shown: str, is_copy: bool = False) -> None:
        self.path = path
        self._mode = "rw" if is_copy else "ro"
        self._shown = shown
        self._indexes: dict[str, _Index] = {}
        self._lock = threading.Lock()

    # ── settings ─────────────────────────────────────────────────────────────────────────────────────

    def names(self) -> list[str]:
        """Return the names of all collections; none where there is no folder yet."""
        return list(self._meta()["collections"])

    def aliases(self) -> dict[str, str]:
        """Return the collection of each alias."""
        return dict(self._meta()["aliases"])

    def info(self, collection: str) -> Mapping[str, Any]:
        """Return a collection's settings in the form in which a server answers with them."""
        config = self._meta()["collections"][self._name(collection)]
        params = {key: config.get(key) for key in ("vectors", "sparse_vectors", "shard_number")}
        params |= {key: config.get(key) for key in ("replication_factor", "on_disk_payload")}
        names = ("hnsw_config", "wal_config", "quantization_config", "metadata")
        settings = {key: config.get(key) for key in names}
        return {"config": {"params": params, "optimizer_config": config.get("optimizers_config"), **settings}}

    def fingerprint(self, collection: str) -> str:
        """Return a text that changes with the files of a collection, or its settings."""
        name = self._name(collection)
        settings = orjson.dumps(self._meta()["collections"][name], option=orjson.OPT_SORT_KEYS)
        return f"{folder_fingerprint(self._collection_path(name))}:{binascii.crc32(settings):08x}"

    def _meta(self) -> Mapping[str, Any]:
        file = self.path / META_FILE
        if not file.is_file():
            return {"collections": {}, "aliases": {}}
        try:
            found = orjson.loads(file.read_bytes())
            return {"collections": dict(found["collections"]), "aliases": dict(found.get("aliases") or {})}
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise MetaFileError(f"{META_FILE} can't be read: {error}") from None

    def _name(self, collection: str) -> str:
        """Return the name of a collection, or of that which an alias points at."""
        meta = self._meta()
        name = meta["aliases"].get(collection, collection)
        if name not in meta["collections"]:
            raise CollectionNotFoundError(
                f"{self._shown} has no collection {collection!r}; there are: "
                f"{', '.join(sorted(meta['collections'])) or 'none'}",
                collection=collection,
            )
        return str(name)

    def _collection_path(self, name: str) -> Path:
        path = (self.path / "collection" / name).resolve()
        if not path.is_relative_to((self.path / "collection").resolve()):
            raise StoreRefusedError(f"{self._shown}: the name {name!r} leads out of the folder")
        return path

    # ── points ───────────────────────────────────────────────────────────────────────────────────────

    def count(self, collection: str) -> int:
        """Return the exact number of points."""
        return len(self._index(collection).ids)

    def scroll(self, collection: str, body: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], Id | None]:
        """Return the points from `offset` on, and the id that the next page begins with; None at the end."""
        index = self._index(collection)
        offset, limit = body.get("offset"), body["limit"]
        start = 0 if offset is None else bisect.bisect_left(index.keys, order(offset))
        ids = index.ids[start : start + limit]
        following = index.ids[start + limit : start + limit + 1]
        if not body["with_payload"] and not body["with_vector"]:
            return [{"id": point_id} for point_id in ids], following[0] if following else None
        return self._points(collection, index, ids), following[0] if following else None

    def retrieve(self, collection: str, ids: Sequence[Id], *, vectors: bool) -> list[Mapping[str, Any]]:  # noqa: ARG002
        """Return the points of these ids that are there, their vectors always with them."""
        index = self._index(collection)
        return self._points(collection, index, [point_id for point_id in ids if point_id in index.rows])

    def check(self) -> None:
        """Read every point of every collection, before the client does so by running it.

        Raises
        ------
        StoreRefusedError
            A pickle would import or call what is no part of a point.
        """
        for name in self.names():
            index = self._index(name)
            for start in range(0, len(index.ids), _SOME_ROWS):
                self._points(name, index, index.ids[start : start + _SOME_ROWS])

    def _points(self, collection: str, index: _Index, ids: Sequence[Id]) -> list[Mapping[str, Any]]:
        rows = [index.rows[point_id] for point_id in ids]
        found: dict[int, bytes] = {}
        name = self._name(collection)
        with self._reading(name) as file:
            for start in range(0, len(rows), _SOME_ROWS):
                part = rows[start : start + _SOME_ROWS]
                marks = ",".join("?" * len(part))
                # Only question marks are put into the statement.
                found |= file.execute(f"SELECT rowid, point FROM points WHERE rowid IN ({marks})", part)  # noqa: S608
        source = f"{self._shown}, collection {name!r}"
        return [
            _point(found[row], point_id, source=f"{source}, point {point_id}")
            for row, point_id in zip(rows, ids, strict=True)
            if row in found
        ]

    def _index(self, collection: str) -> _Index:
        name = self._name(collection)
        with self._lock:
            known = self._indexes.get(name)
            fingerprint = folder_fingerprint(self._collection_path(name))
            if known is None or known.fingerprint != fingerprint:
                known = self._indexes[name] = self._read_index(name, fingerprint)
        return known

    def _read_index(self, name: str, fingerprint: str) -> _Index:
        source = f"{self._shown}, collection {name!r}"
        with self._reading(name) as file:
            # Older clients kept a point in several rows, by spelling of its UUID: the last one counts.
            rows = {_id_of(key, source=source): row for row, key in file.execute(_ROWS)}
        keys = tuple(sorted(map(order, rows)))
        return _Index(fingerprint, tuple(point_id for _, point_id in keys), keys, rows)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[sqlite3.Connection]:
        file = self._collection_path(name) / _POINTS_FILE
        if not file.is_file():
            is_old = (file.parent / _OLD_POINTS_FILE).exists()
            advice = "open it once with qdrant-client 1.1.7 to 1.13" if is_old else "the folder is damaged"
            raise StoreRefusedError(f"{self._shown}: collection {name!r} has no {_POINTS_FILE}; {advice}")
        with contextlib.closing(
            sqlite3.connect(f"{file.as_uri()}?mode={self._mode}", uri=True)
        ) as connection:
            yield connection


def _id_of(key: str, *, source: str) -> Id:
    try:
        data = base64.b64decode(key, validate=True)
    except binascii.Error:
        raise StoreRefusedError(f"{source}: the id {key!r:.80} isn't base64; the file is damaged") from None
    if len(data) == _UUID_KEY_BYTES and data[-2:] == b"\x94." and data[11:13] == b"\x8c\x24":
        return _canonical(data[_UUID_KEY].decode(), source)
    return _canonical(read_pickle(data, source=f"{source}, an id", allowed=()), source)


def _canonical(value: Any, source: str) -> Id:
    if type(value) is int:
        return value
    try:
        return str(value if isinstance(value, uuid.UUID) else uuid.UUID(value))
    except (ValueError, AttributeError, TypeError):
        raise StoreRefusedError(
            f"{source}: {value!r:.80} is no id of Qdrant's; the file is damaged"
        ) from None


def _point(data: bytes, point_id: Id, *, source: str) -> Mapping[str, Any]:
    """Return a pickled point as a server would answer with it."""
    found = read_pickle(data, source=source, allowed=_ALLOWED)
    fields = _fields(found, _POINT, source)
    payload = _plain(fields.get("payload") or {}, source)
    return {"id": point_id, "vector": _vector(fields.get("vector"), source), "payload": payload}


def _fields(value: Any, expected: str, source: str) -> Mapping[str, Any]:
    """Return the fields of a pydantic model: as version 2 keeps them, or version 1."""
    state = value.state if isinstance(value, Built) and str(value) == expected else None
    fields = state.get("__dict__") if isinstance(state, dict) else None
    if not isinstance(fields, dict):
        raise StoreRefusedError(f"{source}: found {value!s:.80} where {expected} was expected")
    return fields


def _vector(value: Any, source: str) -> Any:
    if isinstance(value, Built):
        fields = _fields(value, _SPARSE, source)
        return {"indices": fields["indices"], "values": fields["values"]}
    if isinstance(value, dict):
        return {name: _vector(item, source) for name, item in value.items()}
    return value


def _plain(value: Any, source: str) -> Any:
    """Return a payload's value as JSON has it, which is how the client gives it to its users."""
    if isinstance(value, dict):
        return {str(key): _plain(item, source) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, source) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, uuid.UUID):
        return str(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise StoreRefusedError(f"{source}: a payload holds {type(value).__name__}, which is no JSON")
