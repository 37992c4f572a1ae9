"""Fewer dimensions by a fitted projection (principal components), kept in a plain file of numbers.

A projection loses what lies outside its components, and that for good: a mapping uses one only where it is
named. Distances between projected vectors are near to those between the centred ones; the mean is taken away,
so that cosine and dot product, which look from the origin, mean something else afterwards than before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from migration_pipelines import batch as batches
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.store import Store

_BATCH_RECORDS = 2_000


@dataclass(frozen=True, eq=False)
class Projection:
    """`mean`, float32[D]; `components`, float32[d, D] of length one; `explained`, their share of variance."""

    mean: npt.NDArray[np.float32]
    components: npt.NDArray[np.float32]
    explained: float

    def apply(self, matrix: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return float64[n, d] of vectors, [n, D]; computed in double precision, row by row the same."""
        centred = matrix.astype(np.float64) - self.mean.astype(np.float64)
        return np.asarray(np.einsum("nd,kd->nk", centred, self.components.astype(np.float64)), np.float64)

    def save(self, path: str | Path) -> None:
        """Write the projection to a file: NumPy's `.npz`, of numbers alone."""
        with Path(path).open("wb") as file:
            np.savez(
                file,
                mean=self.mean,
                components=self.components,
                explained=np.array(self.explained, np.float64),
            )

    @classmethod
    def load(cls, path: str | Path) -> Projection:
        """Read a projection; nothing in the file is run.

        Raises
        ------
        ConfigurationError
            The file isn't there, or isn't a projection.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, components = file["mean"], file["components"]
                found = cls(mean, components, float(file["explained"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise ConfigurationError(f"{path} is no projection that fit_pca saved: {error}") from None
        fits = components.ndim == 2 and mean.shape == components.shape[1:] and components.dtype == np.float32
        if not fits or not (np.isfinite(mean).all() and np.isfinite(components).all()):
            raise ConfigurationError(
                f"{path} is no projection: mean {mean.shape}, components {components.shape}"
            )
        return found


def file_digest(path: str | Path) -> str:
    """Return the digest of a projection's file, by which a plan knows it again.

    Raises
    ------
    ConfigurationError
        The file can't be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigurationError(f"the projection {path} can't be read: {error.strerror}") from None


def fit_pca(
    store: Store, collection: str, *, dimensions: int, vector: str = "", sample: int = 20_000, seed: int = 0
) -> Projection:
    """Fit a projection to some of a collection's vectors, drawn by lot; the source is only read.

    Parameters
    ----------
    dimensions
        Of the projected vectors.
    vector
        The name of a dense vector field; "" is the default one.
    sample
        About how many records to fit to; more than a few times the vectors' dimensions change little.
    seed
        Of the lot: the same seed and collection give the same projection.

    Raises
    ------
    ConfigurationError
        There are too few vectors for so many dimensions.
    """
    vectors = _drawn(store, collection, vector, sample, np.random.default_rng(seed))
    if not 1 <= dimensions <= min(vectors.shape):
        raise ConfigurationError(
            f"{store.address(collection)}: {len(vectors)} vectors of {vectors.shape[1]} dimensions can't be "
            f"projected to {dimensions}",
            expected=dimensions,
            found=vectors.shape,
        )
    mean = vectors.mean(axis=0)
    _, sizes, components = np.linalg.svd(vectors - mean, full_matrices=False)
    # A component and its negative are the same one: the largest number in it is made positive.
    largest = np.abs(components).argmax(axis=1)
    components *= np.sign(components[np.arange(len(components)), largest])[:, None]
    total = float((sizes**2).sum())
    explained = float((sizes[:dimensions] ** 2).sum()) / total if total else 1.0
    return Projection(mean.astype(np.float32), components[:dimensions].astype(np.float32), explained)


def _drawn(
    store: Store, collection: str, vector: str, sample: int, lot: np.random.Generator
) -> npt.NDArray[np.float64]:
    label, share = batches.vector_column(vector), min(1.0, sample / max(1, store.count(collection)))
    found: list[npt.NDArray[np.float64]] = []
    for batch in store.scan_all(collection, batch_records=_BATCH_RECORDS):
        if label not in batch.schema.names or not batches.is_dense(batch.column(label)):
            raise ConfigurationError(f"{store.address(collection)} has no dense {label}")
        column = batch.column(label)
        drawn = (lot.random(batch.num_rows) < share) & np.asarray(column.is_valid())
        matrix = batches.dense_matrix(column)[drawn]
        found.append(matrix[np.isfinite(matrix).all(axis=1)].astype(np.float64))
    if not found:
        raise ConfigurationError(f"{store.address(collection)} holds no vectors to fit a projection to")
    return np.concatenate(found)
