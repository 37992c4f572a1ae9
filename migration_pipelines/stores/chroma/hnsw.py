"""The vectors of a Chroma collection, read from the files of its search index.

A folder named by the collection's vector segment holds what hnswlib, in Chroma's variant, writes:
`header.bin` says how long an element is and where its parts lie, `data_level0.bin` holds the elements one
after the other (links, vector, label), `length.bin` the length of each vector. `index_metadata.pickle` says
which id has which label; it is read as data, nothing in it is run.

Deleted elements stay in the files, marked. Under cosine the files hold vectors divided by their length:
multiplied again they are what Chroma answers, bit for bit, and at most a rounding from what was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from migration_pipelines.pickled import Built, read_pickle

# hnswlib/hnswalg.h of Chroma's variant, HEADER_FIELDS: packed, in this order.
_HEADER = np.dtype(
    [
        ("version", "<i4"),
        ("level0_offset", "<u8"),
        ("max_elements", "<u8"),
        ("elements", "<u8"),
        ("element_bytes", "<u8"),
        ("label_offset", "<u8"),
        ("vector_offset", "<u8"),
        ("max_level", "<i4"),
        ("entry_point", "<u4"),
        ("max_m", "<u8"),
        ("max_m0", "<u8"),
        ("m", "<u8"),
        ("level_factor", "<f8"),
        ("ef_construction", "<u8"),
    ]
)
_VERSION = 1
# Of the four bytes that count an element's links, the third marks a deleted one.
_DELETED_BYTE, _DELETED = 2, 0x01
_LABEL_BYTES = 8
_ID_MAP = "index_metadata.pickle"
# Before 1.0 the map was an object of this class; later it is a plain dict.
_ID_MAP_CLASS = "chromadb.segment.impl.vector.local_persistent_hnsw.PersistentData"
NOWHERE = -1


class VectorFiles:
    """The files of one search index, mapped into memory.

    Files that are missing, cut or inconsistent hold fewer vectors; who asks for others is told `NOWHERE`.

    Parameters
    ----------
    folder
        The folder of the vector segment; it need not exist.
    dimensions
        Of every vector.
    is_cosine
        Whether the vectors are to be multiplied by their lengths.

    Attributes
    ----------
    is_there
        Whether the index was ever written; if not, all vectors are in Chroma's queue.
    applied
        Number of the last write that the files hold, where they say so (before 0.6); None elsewhere.
    """

    def __init__(self, folder: Path, *, dimensions: int, is_cosine: bool) -> None:
        self._vectors: npt.NDArray[np.float32] = np.empty((0, dimensions), np.float32)
        self._lengths: npt.NDArray[np.float32] | None = None
        id_map = _read_id_map(folder / _ID_MAP)
        self._ids: dict[str, int] = id_map.get("id_to_label") or {}
        self.applied: int | None = id_map.get("max_seq_id")
        self._labels: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._elements: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self.is_there = bool(self._ids)
        if self.is_there:
            self._map(folder, dimensions=dimensions, is_cosine=is_cosine)

    def _map(self, folder: Path, *, dimensions: int, is_cosine: bool) -> None:
        header = _read_header(folder / "header.bin")
        path = folder / "data_level0.bin"
        if header is None or not path.is_file():
            return
        size, start = int(header["element_bytes"]), int(header["vector_offset"])
        label = int(header["label_offset"])
        if start + 4 * dimensions > label or label + _LABEL_BYTES > size:
            return
        count = min(int(header["elements"]), path.stat().st_size // size)
        if is_cosine:
            lengths = np.fromfile(folder / "length.bin", "<f4") if (folder / "length.bin").is_file() else ()
            count = min(count, len(lengths))
            self._lengths = np.asarray(lengths[:count], np.float32)
        if not count:
            return
        data = np.memmap(path, np.uint8, "r", shape=(count * size,))
        self._vectors = np.ndarray((count, dimensions), "<f4", data, start, (size, 4))
        self._labels = np.ndarray((count,), "<u8", data, label, (size,)).copy()
        marks = np.ndarray((count,), np.uint8, data, _DELETED_BYTE, (size,))
        self._elements = np.flatnonzero((marks & _DELETED) == 0)

    def take_places(self) -> dict[str, int]:
        """Return, once, where each id's vector stands, for `read`; `NOWHERE` where the files don't hold it.

        The ids aren't kept: they are most of what an index takes in memory.
        """
        ids, self._ids = self._ids, {}
        wanted = np.fromiter(ids.values(), np.uint64, len(ids))
        if not len(self._elements):
            return dict.fromkeys(ids, NOWHERE)
        labels = self._labels[self._elements]
        order = np.argsort(labels, kind="stable")
        at = np.searchsorted(labels[order], wanted, side="right") - 1
        elements = self._elements[order[at]]
        elements[(at < 0) | (self._labels[elements] != wanted)] = NOWHERE
        return dict(zip(ids, elements.tolist(), strict=True))

    def read(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return float32[n, dimensions] of the vectors at these places."""
        found: npt.NDArray[np.float32] = self._vectors[_as_slice(places)]
        if self._lengths is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # as Chroma, where it can't hold a length
                return found * self._lengths[places, np.newaxis]
        return np.ascontiguousarray(found)


def _as_slice(places: npt.NDArray[np.int64]) -> Any:
    """Return the same rows as a slice where they follow each other: copied in one go."""
    if len(places) and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def _read_header(path: Path) -> Any:
    """Return the header's fields; None where there is none that is understood."""
    content = path.read_bytes() if path.is_file() else b""
    if len(content) < _HEADER.itemsize:
        return None
    header = np.frombuffer(content, _HEADER, 1)[0]
    return header if header["version"] == _VERSION and header["element_bytes"] else None


def _read_id_map(path: Path) -> dict[str, Any]:
    """Return what the index says of its ids.

    Raises
    ------
    StoreRefusedError
        The file holds anything but data.
    """
    if not path.is_file():
        return {}
    found = read_pickle(path.read_bytes(), source=str(path), allowed=[_ID_MAP_CLASS])
    if isinstance(found, Built):
        found = found.state
    return found if isinstance(found, dict) else {}
