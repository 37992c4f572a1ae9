"""What a schema mapping does to vectors: embeds them anew, projects, truncates, normalises, casts them, …"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from migration_pipelines import batch as batches
from migration_pipelines.errors import ConfigurationError, TransientError
from migration_pipelines.mapping_steps import name_of
from migration_pipelines.model import DType, Value, VectorField, VectorKind
from migration_pipelines.reduction import Projection, file_digest

Label = Annotated[str, Field(pattern=r"^vector(:.+)?$")]
_FLOATS = (DType.FLOAT32, DType.FLOAT16)
# What libraries of the network raise is an OSError; of these, what is about files doesn't pass by itself.
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class ProjectionFile(Value):
    """A file that `fit_pca` made, and the digest of its content: another content is another mapping."""

    file: str
    digest: str

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, given: Any) -> Any:
        if isinstance(given, (str, PathLike)):
            return {"file": str(Path(given).absolute()), "digest": file_digest(Path(given))}
        return given

    @cached_property
    def projection(self) -> Projection:
        """The projection.

        Raises
        ------
        ConfigurationError
            The file isn't the one that it was.
        """
        if file_digest(self.file) != self.digest:
            raise ConfigurationError(f"the projection {self.file} has changed: start afresh")
        return Projection.load(self.file)


class Embedder(Value):
    """A function from texts to float32[n, dimensions]; for people and plans its name."""

    name: str
    function: Callable[[list[str]], Any] | None = Field(default=None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _from_function(cls, given: Any) -> Any:
        if callable(given):
            return {"name": name_of(given), "function": given}
        raise ValueError("a function that embeds can be given from Python only")


class VectorMapping(Value):
    """What becomes of one vector.

    It is embedded anew, projected or truncated, normalised, cast, renamed, in this order; or dropped.

    Parameters
    ----------
    embed, dimensions
        Made anew from the record's document by a function of a list of texts, at the top level of a module,
        that returns float32[n, dimensions].
    pca
        Projected by a file that `reduction.fit_pca` made and saved. What lies outside its components is lost.
    truncate
        Keep this many dimensions, the first: for models that were trained for it (Matryoshka).
    normalise
        To unit length, computed in double precision. A zero vector stays as it is.
    dtype
        `float32` or `float16`. A number that would become infinite is an error of the record.
    rename
        The new label: `vector` is the default vector, `vector:title` the one called title.
    """

    embed: Embedder | None = None
    dimensions: int | None = Field(default=None, ge=1)
    pca: ProjectionFile | None = None
    truncate: int | None = Field(default=None, ge=1)
    normalise: bool = False
    dtype: Literal[DType.FLOAT32, DType.FLOAT16] | None = None
    rename: Label | None = None
    drop: bool = False

    @model_validator(mode="after")
    def _drop_alone(self) -> Self:
        if self.drop and self.model_dump(exclude_defaults=True) != {"drop": True}:
            raise ValueError("a vector that is dropped can't be changed as well")
        if (self.embed is None) != (self.dimensions is None):
            raise ValueError("`embed` and `dimensions` go together")
        if self.pca is not None and self.truncate is not None:
            raise ValueError("a vector is projected or truncated, not both")
        return self

    @property
    def leaves_numbers(self) -> bool:
        """Whether the numbers of the vector stay as they are."""
        return (
            self.embed is None
            and self.pca is None
            and self.truncate is None
            and self.dtype is None
            and not self.normalise
        )

    def field(self, found: VectorField) -> VectorField:
        """Return the schema of a vector after this, its name left as it is.

        Raises
        ------
        ConfigurationError
            The vector isn't one that this can be done to.
        """
        label = batches.vector_column(found.name)
        if self.leaves_numbers:
            return found
        if self.embed is not None:
            found = found.model_copy(update={"dtype": DType.FLOAT32, "dimensions": self.dimensions})
        dtype = self.dtype or found.dtype
        if found.kind is not VectorKind.DENSE or found.dtype is DType.BIT or dtype not in _FLOATS:
            raise ConfigurationError(
                f"the mapping can't change the numbers of {label}, {found.kind} of {found.dtype}: "
                "that takes dense vectors of float32 or float16 (or a dtype that makes them such)"
            )
        if self.truncate is not None and self.truncate > (found.dimensions or 0):
            raise ConfigurationError(
                f"the mapping truncates {label} to {self.truncate} dimensions; it has {found.dimensions}",
                expected=self.truncate,
                found=found.dimensions,
            )
        dimensions = self.truncate or found.dimensions
        if self.pca is not None:
            components = self.pca.projection.components
            if components.shape[1] != found.dimensions:
                raise ConfigurationError(
                    f"{self.pca.file} projects vectors of {components.shape[1]} dimensions; {label} has "
                    f"{found.dimensions}",
                    expected=components.shape[1],
                    found=found.dimensions,
                )
            dimensions = len(components)
        return found.model_copy(update={"dtype": dtype, "dimensions": dimensions})


def map_vectors(column: pa.Array, rule: VectorMapping) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """Return dense vectors after a rule, and bool[n_records]: which of them became infinite.

    Vectors of other kinds pass as they are; `VectorMapping.field` refuses rules for them.
    """
    unharmed = np.zeros(len(column), bool)
    if rule.leaves_numbers:
        return column, unharmed
    matrix = batches.dense_matrix(column)
    given = matrix[:, : rule.truncate] if rule.pca is None else rule.pca.projection.apply(matrix)
    found = _normalised(given) if rule.normalise else given
    with np.errstate(over="ignore"):  # what overflows is found below
        found = found.astype(np.dtype(rule.dtype.value) if rule.dtype else matrix.dtype)
    missing = np.asarray(column.is_null())
    infinite = (np.isfinite(given) & ~np.isfinite(found)).any(axis=1) & ~missing
    missing_if_any = missing if missing.any() else None
    return batches.dense_vectors(np.ascontiguousarray(found), missing=missing_if_any), infinite


def embedded(rule: VectorMapping, documents: Sequence[str | None]) -> pa.Array:
    """Return the vectors that a rule makes of documents; null where there is none.

    Raises
    ------
    ConfigurationError
        The function fails, or gives something else than float32[n, dimensions].
    TransientError
        What it asks doesn't answer: it raised this, or an error of the network.
    """
    assert rule.embed is not None
    assert rule.dimensions is not None
    rows = [row for row, text in enumerate(documents) if text is not None]
    matrix = np.zeros((len(documents), rule.dimensions), np.float32)
    if rows:
        matrix[rows] = _called(rule.embed, [documents[row] for row in rows], (len(rows), rule.dimensions))
    missing = np.ones(len(documents), bool)
    missing[rows] = False
    return batches.dense_vectors(matrix, missing=missing if missing.any() else None)


def _called(embed: Embedder, texts: list[Any], shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    if embed.function is None:
        raise ConfigurationError(f"{embed.name} is only a name here: give the function from Python")
    try:
        found = np.asarray(embed.function(texts), np.float32)
    except TransientError:
        raise
    except Exception as error:
        passes = isinstance(error, OSError) and not isinstance(error, _LASTING)
        kind = TransientError if passes else ConfigurationError
        raise kind(f"{embed.name} failed: {type(error).__name__}: {error}") from error
    if found.shape != shape:
        raise ConfigurationError(
            f"{embed.name} gave {found.shape}, {shape} was expected", expected=shape, found=found.shape
        )
    return found


def _normalised(matrix: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    exact = matrix.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    np.divide(exact, norms, out=exact, where=np.isfinite(norms) & (norms > 0))
    return exact


def vector_changes(rule: VectorMapping, field: VectorField) -> Iterator[str]:
    """Yield what a rule changes of a vector, in words for people."""
    if rule.drop:
        yield "dropped"
    if rule.embed is not None:
        yield f"made anew from the document by {rule.embed.name}, {rule.dimensions} dimensions"
    if rule.pca is not None:
        found = rule.pca.projection
        kept = f"{found.explained:.1%} of the variance"
        yield f"projected to {len(found.components)} of {field.dimensions} dimensions, which hold {kept}"
    if rule.truncate is not None and rule.truncate < (field.dimensions or 0):
        yield f"the first {rule.truncate} of {field.dimensions} dimensions"
    if rule.normalise:
        yield "normalised"
    if rule.dtype is not None and rule.dtype is not field.dtype:
        rounded = ", rounded" if rule.dtype is DType.FLOAT16 else ""
        yield f"{field.dtype} written as {rule.dtype}{rounded}"
    if rule.rename:
        yield f"renamed to {rule.rename}"
