"""What lies where in those FAISS index files whose vectors lie there in one piece: reading and writing them.

FAISS reads a flat or a graph index whole, and writes it whole from memory. Its file is simple, though, and
has been the same for years: a header, what is special to the kind of index, and the vectors as one array of
float32, or of bytes that hold bits. Reading that array where it lies takes little memory, needs no driver,
and can't end the process, as mapping it into memory does when the file is cut. A file that doesn't add up is
left to FAISS to judge. A flat index is written so too, vector after vector: the bytes are FAISS's own.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.model import DType, Metric, VectorField

# faiss/impl/index_write.cpp: the first four bytes name the kind.
FLAT = frozenset({b"IxF2", b"IxFI", b"IxFl"})
ID_MAPS = frozenset({b"IxMp", b"IxM2"})
BINARY_FLAT = b"IBxF"
_GRAPH_OF_FLAT = b"IHNf"
# The kind and number that FAISS gives a flat index of each metric; any other is compared by L2.
_METRICS = {Metric.DOT: (b"IxFI", 0), Metric.COSINE: (b"IxFI", 0), Metric.MANHATTAN: (b"IxFl", 2)}
_L2 = (b"IxF2", 1)
# kind, dimensions, count, two numbers without a meaning, whether trained, metric; little-endian, packed.
_HEADER = struct.Struct("<4siqqq?i")
_MEANINGLESS = 1 << 20  # what FAISS writes for these two numbers
_TRAINED = True  # as a flat index always is
# kind, dimensions, bytes a vector, count, whether trained, metric.
_BINARY_HEADER = struct.Struct("<4siiq?i")
_ARGUMENT = struct.Struct("<f")
_LENGTH = struct.Struct("<Q")
# efConstruction, efSearch and a number without a meaning end what is special to a graph.
_GRAPH_END = struct.Struct("<iii")
# Metrics above this one carry an argument, a float, at the end of the header.
_LAST_PLAIN_METRIC = 1


@dataclass(frozen=True)
class Layout:
    """Where the vectors are; all offsets in bytes.

    `labels_at` is where the ids of an ID map begin, None where a vector's id is its position.
    """

    dimensions: int
    count: int
    metric: int
    vectors_at: int
    labels_at: int | None = None
    index: Mapping[str, Any] = field(default_factory=lambda: {"type": "flat"})
    dtype: DType = DType.FLOAT32

    @property
    def shape(self) -> tuple[int, np.dtype[Any]]:
        """How many numbers a vector takes in the file, and of which type."""
        if self.dtype is DType.BIT:
            return self.dimensions // 8, np.dtype(np.uint8)
        return self.dimensions, np.dtype("<f4")


@dataclass(frozen=True)
class _Header:
    kind: bytes
    dimensions: int
    count: int
    metric: int
    end: int


def find_layout(path: Path) -> Layout | None:
    """Return where the vectors of a file lie, None where they don't lie in one piece or don't add up."""
    with path.open("rb") as file:
        try:
            return _find(file, 0, path.stat().st_size)
        except (struct.error, ValueError, OverflowError):
            return None


class Vectors:
    """The vectors of a file, which is held open: they stay readable when another file takes its name."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._layout = layout
        self._file = path.open("rb")

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return float32[stop - start, dimensions], of bits uint8[stop - start, dimensions / 8]. Thread-safe.

        Raises
        ------
        StoreRefusedError
            The file was cut since it was opened.
        """
        numbers, dtype = self._layout.shape
        found = np.empty((stop - start, numbers), dtype)
        # A system call reads at most about 2 GB.
        wanted = found.reshape(-1).view(np.uint8).data
        at = self._layout.vectors_at + start * numbers * dtype.itemsize
        done = 0
        while done < len(wanted):
            n = os.preadv(self._file.fileno(), [wanted[done:]], at + done)
            if not n:
                raise StoreRefusedError(
                    f"{self._file.name} was cut while it was read: {len(wanted) - done:,} bytes are missing; "
                    "restore it",
                    file=self._file.name,
                )
            done += n
        return found


class FlatWriter:
    """Writes a flat index file, byte for byte as FAISS does.

    Parameters
    ----------
    path
        The file; what is there is replaced.
    field
        What vectors it holds: float32, or bits.
    """

    def __init__(self, path: Path, field: VectorField) -> None:
        self.count = 0
        self._field = field
        self._file = path.open("wb")
        self._file.write(self._header())

    def add(self, vectors: npt.NDArray[Any]) -> None:
        """Write float32[n, dimensions], of bits uint8[n, dimensions / 8], behind those that are there."""
        self._file.write(np.ascontiguousarray(vectors).data)
        self.count += len(vectors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with self._file:
                self._file.seek(0)
                self._file.write(self._header())
        else:
            with suppress(OSError):  # of a full disk, which is what failed already
                self._file.close()

    def _header(self) -> bytes:
        dimensions = self._field.dimensions or 0
        if self._field.dtype is DType.BIT:
            width = dimensions // 8
            header = _BINARY_HEADER.pack(BINARY_FLAT, dimensions, width, self.count, _TRAINED, _L2[1])
            return header + _LENGTH.pack(self.count * width)
        kind, metric = _METRICS.get(self._field.metric or Metric.EUCLIDEAN, _L2)
        unused = (_MEANINGLESS, _MEANINGLESS)
        header = _HEADER.pack(kind, dimensions, self.count, *unused, _TRAINED, metric)
        argument = _ARGUMENT.pack(0) if metric > _LAST_PLAIN_METRIC else b""
        return header + argument + _LENGTH.pack(self.count * dimensions)


def read_labels(path: Path, layout: Layout) -> npt.NDArray[np.int64] | None:
    """Return int64[count], the id of each vector, None where it is the position."""
    if layout.labels_at is None:
        return None
    return np.fromfile(path, "<i8", layout.count, offset=layout.labels_at)


def _find(file: BinaryIO, start: int, end: int) -> Layout | None:
    """Return where the vectors of the index lie that fills the file from `start` to `end`."""
    file.seek(start)
    if file.read(4) == BINARY_FLAT:
        return _binary_flat(file, start, end)
    header = _header_at(file, start)
    if header.kind in FLAT:
        return _flat(file, header, end)
    if header.kind in ID_MAPS:
        labels = end - 8 * header.count
        inner = _find(file, header.end, labels - _LENGTH.size)
        if inner is None or inner.labels_at is not None or inner.count != header.count:
            return None
        return replace(inner, labels_at=labels) if _length_at(file, labels - 8) == header.count else None
    if header.kind == _GRAPH_OF_FLAT:
        storage = end - (header.end - start) - _LENGTH.size - 4 * header.count * header.dimensions
        inner = _find(file, storage, end) if storage > header.end else None
        if inner is None or (inner.count, inner.dimensions) != (header.count, header.dimensions):
            return None
        return replace(inner, index=_graph(file, header.end, storage))
    return None


def _flat(file: BinaryIO, header: _Header, end: int) -> Layout | None:
    numbers = header.count * header.dimensions
    vectors = header.end + _LENGTH.size
    if _length_at(file, header.end) != numbers or vectors + 4 * numbers != end:
        return None
    return Layout(header.dimensions, header.count, header.metric, vectors)


def _binary_flat(file: BinaryIO, start: int, end: int) -> Layout | None:
    file.seek(start)
    _, dimensions, width, count, _, metric = _BINARY_HEADER.unpack(file.read(_BINARY_HEADER.size))
    length_at = start + _BINARY_HEADER.size
    vectors = length_at + _LENGTH.size
    if dimensions <= 0 or width * 8 != dimensions or _length_at(file, length_at) != count * width:
        return None
    if vectors + count * width != end:
        return None
    return Layout(dimensions, count, metric, vectors, dtype=DType.BIT)


def _graph(file: BinaryIO, start: int, end: int) -> dict[str, Any]:
    """Return the settings of a graph in the field's common words."""
    after_levels = start + _LENGTH.size + 8 * _length_at(file, start)
    found: dict[str, Any] = {"type": "hnsw"}
    if _length_at(file, after_levels) >= 2:
        file.seek(after_levels + _LENGTH.size)
        _, on_first_level = struct.unpack("<ii", file.read(8))
        found["m"] = on_first_level // 2
    file.seek(end - _GRAPH_END.size)
    found["ef_construction"] = _GRAPH_END.unpack(file.read(_GRAPH_END.size))[0]
    return found


def _header_at(file: BinaryIO, start: int) -> _Header:
    file.seek(start)
    kind, dimensions, count, _, _, _, metric = _HEADER.unpack(file.read(_HEADER.size))
    if dimensions <= 0 or count < 0:
        raise ValueError("no header")
    end = start + _HEADER.size + (4 if metric > _LAST_PLAIN_METRIC else 0)
    return _Header(kind, dimensions, count, metric, end)


def _length_at(file: BinaryIO, offset: int) -> int:
    file.seek(offset)
    length: int = _LENGTH.unpack(file.read(_LENGTH.size))[0]
    return length
