"""Numbers of vectors on their way through JSON, so that not one of them changes.

Qdrant parses numbers as doubles that may be off by one in the last place (its JSON parser trades that for
speed) and rounds those to float32. The digits of a float32's *double* survive that; the fewest digits that
tell float32s apart may lie so near to the middle between two of them that they don't. Qdrant itself answers
with the fewest digits, so that what is read is rounded with the same care.
"""

from __future__ import annotations

import decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

# The bits of a double that a float32 has no room for, and those of a double halfway between two of them.
_BELOW_FLOAT32 = np.uint64(0x1FFFFFFF)
_HALFWAY = np.uint64(0x10000000)
# Qdrant leaves a vector alone whose squared length is within 1e-6 of 1; half of that on the length itself.
_UNIT_WITHIN = 4e-7


def json_rows(matrix: npt.NDArray[Any]) -> list[bytes]:
    """Return the JSON text of each row of numeric[n_records, dimensions]."""
    if not matrix.size:
        return [b"[]"] * len(matrix)
    exact = matrix.astype(np.float64 if matrix.dtype.kind == "f" else matrix.dtype, order="C")
    text = orjson.dumps(exact, option=orjson.OPT_SERIALIZE_NUMPY)
    return [b"[%b]" % row for row in text[2:-2].split(b"],[")]


def parsed(rows: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return dtype[n_records, dimensions] of rows of Python numbers, as they were before they became text."""
    wide = np.array(rows, np.float64)
    if np.dtype(dtype) != np.float32:
        return wide.astype(dtype)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    # Below the normal float32s the middle shows in other bits: one in some 1e8 of those might be off by one.
    for at in np.flatnonzero((wide.view(np.uint64) & _BELOW_FLOAT32) == _HALFWAY):
        narrow.flat[at] = _by_its_digits(float(wide.flat[at]), narrow.flat[at])
    return narrow


def _by_its_digits(middle: float, rounded: np.float32) -> np.float32:
    """Return the float32 nearest to the digits that were parsed as the middle between two."""
    digits, exact = decimal.Decimal(repr(middle)), decimal.Decimal(middle)
    if digits == exact:
        return rounded
    towards = np.float32(np.inf if digits > exact else -np.inf)
    is_there = (rounded > middle) == (digits > exact)
    return rounded if is_there else np.nextafter(rounded, towards)


def to_unit(matrix: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Return the rows divided by their lengths, and the lengths, float64[n_records].

    A length is 1 where a row stays as it is: of length one already, or without a direction.
    """
    wide = matrix.astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    lengths[(lengths == 0) | (np.abs(lengths - 1) <= _UNIT_WITHIN) | ~np.isfinite(lengths)] = 1.0
    unit: npt.NDArray[Any] = (wide / lengths[:, np.newaxis]).astype(matrix.dtype)
    return unit, lengths


def from_unit(matrix: npt.NDArray[Any], lengths: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Return the rows multiplied by their lengths; what was finite stays finite."""
    long = np.flatnonzero(lengths != 1)
    if not len(long):
        return matrix
    most = np.finfo(matrix.dtype).max.astype(np.float64)
    matrix = matrix.copy()
    matrix[long] = np.clip(matrix[long].astype(np.float64) * lengths[long, np.newaxis], -most, most)
    return matrix
