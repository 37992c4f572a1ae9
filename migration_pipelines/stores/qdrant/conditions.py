"""Filters as Qdrant takes them, where its answer is sure to hold every right record.

Its answers hold more: a condition on a list is true where any of its items is, and numbers are compared as
doubles. The caller looks at every record again. A record whose exact values we keep in the envelope, because
Qdrant would have changed them, is always let through.
"""

from __future__ import annotations

import math
from typing import Any

from migration_pipelines import filters
from migration_pipelines.filters import And, Comparison, Filter, Or

OPERATORS = frozenset({"$and", "$or", "$eq", "$in", "$gt", "$gte", "$lt", "$lte"})
_ENVELOPE = "_source_extra"
_BOUNDS = {"$gt": "gte", "$gte": "gte", "$lt": "lte", "$lte": "lte"}
# The bound is parsed from text, and so was the number: each may be off by one in the last place.
_WIDER = 4 * 2.0**-52


def condition(where: Filter | None, *, reserved: frozenset[str]) -> dict[str, Any] | None:
    """Return what of a filter Qdrant can be asked, as JSON; None where it has to give every record.

    Parameters
    ----------
    reserved
        Keys of the payload that are no metadata fields of those names.
    """
    if where is None:
        return None
    asked = filters.superset(where, OPERATORS, answers=lambda part: _is_answered(part, reserved))
    if asked is None:
        return None
    in_envelope = {"must_not": [{"is_empty": {"key": _ENVELOPE}}]}
    return {"should": [_plain(asked), in_envelope]}


def _is_answered(part: Comparison, reserved: frozenset[str]) -> bool:
    # A path can't quote a quotation mark, nor name an empty key.
    if not part.field or '"' in part.field or "\\" in part.field or part.field in reserved:
        return False
    values = part.value if part.operator == "$in" else [part.value]
    kinds: tuple[type, ...] = (str, bool, int, float) if part.operator in ("$eq", "$in") else (int, float)
    is_bool_in_order = part.operator in _BOUNDS and isinstance(part.value, bool)
    return not is_bool_in_order and all(isinstance(value, kinds) and _is_finite(value) for value in values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, str) or abs(value) <= 1e300


def _plain(where: Filter) -> dict[str, Any]:
    if isinstance(where, And):
        return {"must": [_plain(part) for part in where.parts]}
    if isinstance(where, Or):
        return {"should": [_plain(part) for part in where.parts]}
    assert isinstance(where, Comparison)
    key = f'"{where.field}"'  # without quotes a dot is a path
    if where.operator == "$in":
        return {"should": [_equal(key, value) for value in where.value]}
    if where.operator == "$eq":
        return _equal(key, where.value)
    return {"key": key, "range": {_BOUNDS[where.operator]: _wide(where.value, _BOUNDS[where.operator])}}


def _equal(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, (bool, str)):
        return {"key": key, "match": {"value": value}}
    # As a range: Qdrant's own equality holds 2024 and 2024.0 apart.
    return {"key": key, "range": {side: _wide(value, side) for side in ("gte", "lte")}}


def _wide(value: float, side: str) -> float:
    room = abs(float(value)) * _WIDER
    return math.nextafter(
        float(value) + (room if side == "lte" else -room), math.inf if side == "lte" else -math.inf
    )
