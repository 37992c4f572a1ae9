"""What a schema mapping does to vectors: truncates, normalises, casts, renames or drops them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from migration_pipelines import batch as batches
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.model import DType, Value, VectorField, VectorKind

Label = Annotated[str, Field(pattern=r"^vector(:.+)?$")]
_FLOATS = (DType.FLOAT32, DType.FLOAT16)


class VectorMapping(Value):
    """What becomes of one vector: truncated, normalised, cast, renamed, in this order; or dropped.

    Parameters
    ----------
    truncate
        Keep this many dimensions, the first: for models that were trained for it (Matryoshka).
    normalise
        To unit length, computed in double precision. A zero vector stays as it is.
    dtype
        `float32` or `float16`. A number that would become infinite is an error of the record.
    rename
        The new label: `vector` is the default vector, `vector:title` the one called title.
    """

    truncate: int | None = Field(default=None, ge=1)
    normalise: bool = False
    dtype: Literal[DType.FLOAT32, DType.FLOAT16] | None = None
    rename: Label | None = None
    drop: bool = False

    @model_validator(mode="after")
    def _drop_alone(self) -> Self:
        if self.drop and self.model_dump(exclude_defaults=True) != {"drop": True}:
            raise ValueError("a vector that is dropped can't be changed as well")
        return self

    def field(self, found: VectorField) -> VectorField:
        """Return the schema of a vector after this, its name left as it is.

        Raises
        ------
        ConfigurationError
            The vector isn't one that this can be done to.
        """
        label = batches.vector_column(found.name)
        if self.truncate is None and not self.normalise and self.dtype is None:
            return found
        dtype = self.dtype or found.dtype
        if found.kind is not VectorKind.DENSE or found.dtype is DType.BIT or dtype not in _FLOATS:
            raise ConfigurationError(
                f"the mapping can't truncate, normalise or cast {label}, {found.kind} of {found.dtype}: "
                "that takes dense vectors of float32 or float16 (or a dtype that makes them such)"
            )
        if self.truncate is not None and self.truncate > (found.dimensions or 0):
            raise ConfigurationError(
                f"the mapping truncates {label} to {self.truncate} dimensions; it has {found.dimensions}",
                expected=self.truncate,
                found=found.dimensions,
            )
        return found.model_copy(update={"dtype": dtype, "dimensions": self.truncate or found.dimensions})


def map_vectors(column: pa.Array, rule: VectorMapping) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """Return dense vectors after a rule, and bool[n_records]: which of them became infinite.

    Vectors of other kinds pass as they are; `VectorMapping.field` refuses rules for them.
    """
    unharmed = np.zeros(len(column), bool)
    if rule.truncate is None and not rule.normalise and rule.dtype is None:
        return column, unharmed
    matrix = batches.dense_matrix(column)
    given = matrix[:, : rule.truncate]
    found = _normalised(given) if rule.normalise else given
    with np.errstate(over="ignore"):  # what overflows is found below
        found = found.astype(np.dtype(rule.dtype.value) if rule.dtype else matrix.dtype)
    missing = np.asarray(column.is_null())
    infinite = (np.isfinite(given) & ~np.isfinite(found)).any(axis=1) & ~missing
    missing_if_any = missing if missing.any() else None
    return batches.dense_vectors(np.ascontiguousarray(found), missing=missing_if_any), infinite


def _normalised(matrix: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    exact = matrix.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    np.divide(exact, norms, out=exact, where=np.isfinite(norms) & (norms > 0))
    return exact


def vector_changes(rule: VectorMapping, field: VectorField) -> Iterator[str]:
    """Yield what a rule changes of a vector, in words for people."""
    if rule.drop:
        yield "dropped"
    if rule.truncate is not None and rule.truncate < (field.dimensions or 0):
        yield f"the first {rule.truncate} of {field.dimensions} dimensions"
    if rule.normalise:
        yield "normalised"
    if rule.dtype is not None and rule.dtype is not field.dtype:
        rounded = ", rounded" if rule.dtype is DType.FLOAT16 else ""
        yield f"{field.dtype} written as {rule.dtype}{rounded}"
    if rule.rename:
        yield f"renamed to {rule.rename}"
