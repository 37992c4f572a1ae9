"""Reading of FAISS index files: vectors in the order in which they lie there, their ids, the settings.

FAISS's own way to get vectors out, `reconstruct_n`, gives memory that was never written for inverted lists
with ids of their own, and ends the process for ID maps. So the kind of an index is looked at before
anything is asked of it, and each kind is read where its vectors really are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from migration_pipelines.errors import MissingDriverError, StoreRefusedError
from migration_pipelines.model import DType, Metric
from migration_pipelines.stores.faiss import in_place

# faiss/MetricType.h. The others have no name in common with other stores.
METRICS: Mapping[int, Metric] = {0: Metric.DOT, 1: Metric.EUCLIDEAN, 2: Metric.MANHATTAN}
# Binary index files, which FAISS reads with a function of their own, begin so.
_BINARY = b"IB"

Read = Callable[[int, int], npt.NDArray[Any]]


def driver() -> Any:
    """Return FAISS.

    Raises
    ------
    MissingDriverError
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDriverError(
            "FAISS isn't installed: pip install 'migration-pipelines[faiss]'", missing="faiss"
        ) from error
    return faiss


@dataclass
class IndexFile:
    """An index file, opened for reading alone.

    Parameters
    ----------
    count, dimensions, dtype, metric
        Of the vectors; `metric` is FAISS's number.
    read
        Gives dtype[stop - start, width] of the vectors from `start` to `stop`, in the order of `labels`.
    labels
        int64[count], FAISS's ids; None where they are 0, 1, 2, …
    index
        The settings in the field's common words.
    decoded
        Why the vectors are not those that were put in, where they aren't.
    loaded
        FAISS's own index, None until it is needed.
    """

    path: Path
    count: int
    dimensions: int
    metric: int
    read: Read
    labels: npt.NDArray[np.int64] | None = None
    dtype: DType = DType.FLOAT32
    index: Mapping[str, Any] = field(default_factory=dict)
    decoded: str | None = None
    loaded: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return dtype[len(rows), width], the vectors of these rows, which are sorted and at least one."""
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        return np.concatenate([self.read(int(run[0]), int(run[-1]) + 1) for run in runs])

    def searchable(self) -> Any:
        """Return FAISS's own index, loaded on first use."""
        with self._lock:
            if self.loaded is None:
                self.loaded = _load(self.path, is_binary=self.dtype is DType.BIT)
            return self.loaded


def open_index(path: Path, *, by_label: bool = False) -> IndexFile:
    """Return an index file opened.

    Parameters
    ----------
    by_label
        Read in the order of FAISS's ids, which are 0, 1, 2, …, also where the file has another order.

    Raises
    ------
    FileNotFoundError
    StoreRefusedError
        The file is cut, damaged, no index, or of a kind whose vectors can't be had back.
    """
    layout = in_place.find_layout(path)
    if layout is not None:
        return IndexFile(
            path=path,
            count=layout.count,
            dimensions=layout.dimensions,
            metric=layout.metric,
            read=in_place.Vectors(path, layout).read,
            labels=in_place.read_labels(path, layout),
            dtype=layout.dtype,
            index=layout.index,
        )
    return _open_by_driver(path, by_label=by_label)


def _load(path: Path, *, is_binary: bool) -> Any:
    faiss = driver()
    read = faiss.read_index_binary if is_binary else faiss.read_index
    try:
        # Inverted lists stay in the file. The rest is loaded: FAISS maps it only by a way that ends the
        # process on a file that was cut (IO_FLAG_MMAP_IFC).
        return read(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).rpartition("Error: ")[2].strip() or type(error).__name__
        raise StoreRefusedError(
            f"{path} can't be read as a FAISS index ({path.stat().st_size:,} bytes): {reason}; the file is "
            "cut, damaged, or something else: restore it, for nothing of it is skipped",
            file=str(path),
        ) from error


def _open_by_driver(path: Path, *, by_label: bool) -> IndexFile:
    with path.open("rb") as file:
        is_binary = file.read(2) == _BINARY
    index = _load(path, is_binary=is_binary)
    reader = _binary(index, path) if is_binary else _reader(index, path)
    if by_label and reader.labels is not None:
        reader = _by_label(index, reader)
    if reader.count != index.ntotal or (reader.labels is not None and len(reader.labels) != reader.count):
        raise StoreRefusedError(
            f"{path} says that it holds {index.ntotal:,} vectors, {reader.count:,} are there; it is damaged",
            expected=index.ntotal,
            found=reader.count,
        )
    return IndexFile(
        path=path,
        count=reader.count,
        dimensions=index.d,
        metric=index.metric_type,
        read=reader.read,
        labels=reader.labels,
        dtype=DType.BIT if is_binary else DType.FLOAT32,
        index=reader.settings,
        decoded=reader.decoded,
        loaded=index,
    )


# ── where each kind keeps its vectors ────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Reader:
    count: int
    read: Read
    settings: Mapping[str, Any]
    labels: npt.NDArray[np.int64] | None = None
    decoded: str | None = None


def _reader(index: Any, path: Path) -> _Reader:
    """Return the way to an index's vectors; `index` must outlive it."""
    faiss = driver()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):  # IDMap2 is one too
        return _labelled(_reader(index.index, path), faiss.vector_to_array(index.id_map))
    # By class, not by family: there are flat indexes that lay their numbers out otherwise.
    if type(index) in (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP, faiss.IndexFlat1D):
        return _Reader(index.ntotal, _copied(index.get_xb, index), {"type": "flat"})
    if isinstance(index, faiss.IndexHNSW):
        settings = {
            "type": "hnsw",
            "m": index.hnsw.nb_neighbors(1),
            "ef_construction": index.hnsw.efConstruction,
        }
        return _with(_reader(index.storage, path), settings=settings)
    if isinstance(index, faiss.IndexNSG):
        return _with(_reader(index.storage, path), settings={"type": "nsg"})
    if isinstance(index, faiss.IndexRefine):
        return _reader(index.refine_index, path)
    if isinstance(index, faiss.IndexPreTransform):
        return _untransformed(index, path)
    if isinstance(index, faiss.IndexIVF):
        return _inverted_lists(index, path)
    if isinstance(index, faiss.IndexFlatCodes):
        return _Reader(
            index.ntotal,
            lambda start, stop: index.reconstruct_n(start, stop - start),
            {"type": _kind(index)},
            decoded=f"{_kind(index)} keeps a code in place of each vector",
        )
    raise _unreadable(path, index)


def _unreadable(path: Path, index: Any) -> StoreRefusedError:
    return StoreRefusedError(
        f"{path} is a FAISS index of the kind {_kind(index)}, from which vectors can't be had back; read the "
        "collection from where it was made",
        found=_kind(index),
    )


def _kind(index: Any) -> str:
    return type(index).__name__


def _with(reader: _Reader, **changes: Any) -> _Reader:
    return _Reader(**{**reader.__dict__, **changes})


def _labelled(inner: _Reader, ids: npt.NDArray[np.int64]) -> _Reader:
    """Return an ID map's reader: it numbers what is inside by its own ids."""
    if inner.labels is None:
        return _with(inner, labels=ids)
    if len(ids) and not (inner.labels.min() >= 0 and inner.labels.max() < len(ids)):
        return _with(inner, labels=ids[:0])  # doesn't add up, which the caller tells
    return _with(inner, labels=ids[inner.labels])


def _copied(pointer: Callable[[], Any], index: Any) -> Read:
    """Return copies of float32 vectors that lie in the index's memory in one piece."""

    def read(start: int, stop: int) -> npt.NDArray[Any]:
        # A view's memory is freed with the index, whatever still looks at it.
        whole = driver().rev_swig_ptr(pointer(), index.ntotal * index.d)
        return np.array(whole.reshape(index.ntotal, index.d)[start:stop])

    return read


def _untransformed(index: Any, path: Path) -> _Reader:
    inner = _reader(index.index, path)
    chain = [driver().downcast_VectorTransform(index.chain.at(at)) for at in range(index.chain.size())]
    names = ", ".join(type(transform).__name__ for transform in chain)

    def read(start: int, stop: int) -> npt.NDArray[Any]:
        found = np.ascontiguousarray(inner.read(start, stop))
        for transform in reversed(chain):
            found = transform.reverse_transform(found)
        return found

    why = f"the vectors were transformed before they were put in ({names}), and are transformed back"
    return _with(inner, read=read, decoded="; ".join(filter(None, [why, inner.decoded])))


def _inverted_lists(index: Any, path: Path) -> _Reader:
    """Return the reader of inverted lists, in the order of the lists."""
    faiss = driver()
    lists = index.invlists
    sizes = np.array([lists.list_size(at) for at in range(index.nlist)], np.int64)
    ends = np.cumsum(sizes)
    count = int(ends[-1]) if len(ends) else 0
    labels = np.empty(count, np.int64)
    for at in np.flatnonzero(sizes).tolist():
        labels[ends[at] - sizes[at] : ends[at]] = faiss.rev_swig_ptr(lists.get_ids(at), int(sizes[at]))
    settings = {"type": "ivf", "lists": index.nlist}
    if type(index) is not faiss.IndexIVFFlat:
        return _by_label(index, _decoded_lists(index, count, labels, settings, path))

    def read(start: int, stop: int) -> npt.NDArray[Any]:
        found = np.empty((stop - start, index.d), np.float32)
        at = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            begin = int(ends[at] - sizes[at])
            upto = min(stop, int(ends[at]))
            codes = faiss.rev_swig_ptr(lists.get_codes(at), int(sizes[at]) * index.code_size)
            rows = codes.view(np.float32).reshape(-1, index.d)[start - begin : upto - begin]
            found[len(found) - (stop - start) : len(found) - (stop - upto)] = rows
            start, at = upto, at + 1
        return found

    return _Reader(count, read, settings, labels)


def _decoded_lists(
    index: Any, count: int, labels: npt.NDArray[np.int64], settings: Mapping[str, Any], path: Path
) -> _Reader:
    if len(np.unique(labels)) != count:
        raise StoreRefusedError(
            f"{path} ({_kind(index)}) gives one id to several vectors, {count - len(np.unique(labels)):,} of "
            f"{count:,}: of this kind of index they can't be told apart",
            found=count - len(np.unique(labels)),
        )
    why = f"{_kind(index)} keeps a code in place of each vector"
    return _Reader(count, lambda start, stop: np.empty((stop - start, 0)), settings, labels, decoded=why)


def _by_label(index: Any, reader: _Reader) -> _Reader:
    """Return the reader that finds vectors by their ids: sorted, each there once."""
    assert reader.labels is not None
    labels = np.sort(reader.labels)
    index.set_direct_map_type(driver().DirectMap.Hashtable)

    def read(start: int, stop: int) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = index.reconstruct_batch(labels[start:stop])
        return found

    numbered = np.array_equal(labels, np.arange(len(labels)))
    return _with(reader, read=read, labels=None if numbered else labels)


def _binary(index: Any, path: Path) -> _Reader:
    """Return the reader of an index of bits: uint8[n, dimensions / 8]."""
    faiss = driver()
    index = faiss.downcast_IndexBinary(index)
    if isinstance(index, faiss.IndexBinaryIDMap):
        inner, ids = index.index, faiss.vector_to_array(index.id_map)
        return _labelled(_binary(inner, path), ids)
    if isinstance(index, faiss.IndexBinaryHNSW):
        return _binary(index.storage, path)
    if not isinstance(index, faiss.IndexBinaryFlat):
        raise _unreadable(path, index)
    width = index.code_size

    def read(start: int, stop: int) -> npt.NDArray[Any]:
        return np.array(faiss.vector_to_array(index.xb).reshape(-1, width)[start:stop])

    return _Reader(index.ntotal, read, {"type": "flat"})
