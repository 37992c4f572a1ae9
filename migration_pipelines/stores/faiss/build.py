"""Which index a collection gets, and how it is built.

A flat index searches exactly, and reads every vector to do so: up to `FLAT_RECORDS` that takes a few
milliseconds. Above, a graph (HNSW, 32 neighbours); above `HNSW_RECORDS`, where a graph takes long to build
and memory of its own, inverted lists. A source's own index of one of these kinds travels with the collection,
and `?index=flat`, `hnsw` or `ivf` in the address overrides all. The three keep float32 vectors bit for bit.

Cosine similarity is the inner product of vectors of length one. Where all are of that length already (within
`UNIT`), they are put in as they are; else the index gets them normalised, and the originals stay beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from migration_pipelines.model import DType, Metric, VectorField
from migration_pipelines.stores.faiss.in_place import FlatWriter
from migration_pipelines.stores.faiss.index import driver

FLAT_RECORDS = 20_000
HNSW_RECORDS = 1_000_000
UNIT = 1e-6
KINDS = ("flat", "hnsw", "ivf")

_NEIGHBOURS, _EF_CONSTRUCTION = 32, 40
# k-means wants at least 39 vectors a list and takes at most 256 (faiss/Clustering.h).
_LEAST_PER_LIST, _MOST_PER_LIST = 39, 256
# Beyond, squared lengths overflow float32, and a graph or lists of such distances lead nowhere.
_GREATEST_NUMBER = 1e18


@dataclass
class Shape:
    """What the choice of an index depends on, gathered from all vectors before any is put in."""

    count: int = 0
    greatest: float = 0.0
    all_unit: bool = True

    def add(self, vectors: npt.NDArray[Any], metric: Metric | None) -> None:
        """Take account of float32[n, dimensions]."""
        self.count += len(vectors)
        if vectors.dtype != np.float32 or not len(vectors):
            return
        self.greatest = max(self.greatest, float(vectors.max()), -float(vectors.min()))
        if metric is Metric.COSINE and self.all_unit:
            self.all_unit = bool((np.abs(_lengths(vectors) - 1) <= UNIT).all())

    def join(self, other: Shape) -> None:
        """Take account of what another shape was gathered from."""
        self.count += other.count
        self.greatest = max(self.greatest, other.greatest)
        self.all_unit = self.all_unit and other.all_unit


def _lengths(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    lengths: npt.NDArray[np.float64] = np.linalg.norm(vectors.astype(np.float64), axis=1)
    return lengths


def normalised(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return float32[n, dimensions] of length one each; zeros stay zeros."""
    lengths = _lengths(vectors)[:, None]
    found = np.divide(vectors, lengths, out=np.zeros(vectors.shape), where=lengths > 0)
    return np.asarray(found, np.float32)


def is_normalised(field: VectorField, shape: Shape) -> bool:
    """Whether the index of such vectors gets them normalised, and something else has to keep them."""
    return field.metric is Metric.COSINE and not shape.all_unit


def is_plain(field: VectorField, shape: Shape, override: str | None) -> bool:
    """Whether the index is a flat one that holds the vectors as they are."""
    return choose(field, shape, override)["type"] == "flat" and not is_normalised(field, shape)


def choose(field: VectorField, shape: Shape, override: str | None) -> dict[str, Any]:
    """Return the settings of the index to build, in the field's common words."""
    asked = override or str(field.index.get("type", ""))
    kind = asked if asked in KINDS else by_size(shape.count)
    if field.dtype is DType.BIT or shape.greatest > _GREATEST_NUMBER:
        kind = "flat"
    if kind == "ivf" and (shape.count < _LEAST_PER_LIST or field.metric is Metric.MANHATTAN):
        kind = "flat" if shape.count <= FLAT_RECORDS else "hnsw"  # too few to train, or no such lists
    given: Mapping[str, Any] = field.index if field.index.get("type") == kind else {}
    if kind == "hnsw":
        m, depth = given.get("m", _NEIGHBOURS), given.get("ef_construction", _EF_CONSTRUCTION)
        return {"type": kind, "m": int(m), "ef_construction": int(depth)}
    if kind == "ivf":
        lists = int(given.get("lists", 4 * math.isqrt(shape.count)))
        return {"type": kind, "lists": max(1, min(lists, shape.count // _LEAST_PER_LIST))}
    return {"type": kind}


def by_size(count: int) -> Literal["flat", "hnsw", "ivf"]:
    """Return the kind of index that suits so many vectors."""
    if count <= FLAT_RECORDS:
        return "flat"
    return "hnsw" if count <= HNSW_RECORDS else "ivf"


def sample_rows(settings: Mapping[str, Any], count: int) -> npt.NDArray[np.int64]:
    """Return int64[n], the rows whose vectors an index is trained with, spread over all; none if it isn't."""
    if settings["type"] != "ivf":
        return np.empty(0, np.int64)
    wanted = min(count, settings["lists"] * _MOST_PER_LIST)
    return np.linspace(0, count - 1, wanted).astype(np.int64)


def write_index(
    field: VectorField,
    settings: Mapping[str, Any],
    vectors: Iterable[npt.NDArray[Any]],
    path: Path,
    *,
    sample: npt.NDArray[Any],
) -> int:
    """Write the file of an index that holds these vectors, in order; return how many they were.

    Parameters
    ----------
    sample
        float32[n, dimensions] to train with, normalised where the vectors are; nothing for most kinds.
    """
    if settings["type"] == "flat":
        with FlatWriter(path, field) as file:
            for part in vectors:
                file.add(part)
        return file.count
    index = _new_index(field, settings, sample)
    for part in vectors:
        index.add(np.ascontiguousarray(part))
    driver().write_index(index, str(path))
    return int(index.ntotal)


def _new_index(field: VectorField, settings: Mapping[str, Any], sample: npt.NDArray[Any]) -> Any:
    faiss = driver()
    metric = {
        Metric.DOT: faiss.METRIC_INNER_PRODUCT,
        Metric.COSINE: faiss.METRIC_INNER_PRODUCT,
        Metric.MANHATTAN: faiss.METRIC_L1,
    }.get(field.metric or Metric.EUCLIDEAN, faiss.METRIC_L2)
    if settings["type"] == "hnsw":
        index = faiss.IndexHNSWFlat(field.dimensions, settings["m"], metric)
        index.hnsw.efConstruction = settings["ef_construction"]
        return index
    quantizer = faiss.IndexFlat(field.dimensions, metric)
    index = faiss.IndexIVFFlat(quantizer, field.dimensions, settings["lists"], metric)
    index.train(np.ascontiguousarray(sample))
    return index
