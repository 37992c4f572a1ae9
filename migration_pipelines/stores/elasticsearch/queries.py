"""What of a filter an index of this tool's is asked: at least the right records, all checked again later.

A metadata field that is indexed has one type; a value of another type or too long isn't in its index and
stands in `_ignored` instead, so each query lets those records through as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from migration_pipelines import filters
from migration_pipelines.envelope import RESERVED
from migration_pipelines.filters import And, Comparison, Filter, Or

_RANGES = {"$lt": "lt", "$lte": "lte", "$gt": "gt", "$gte": "gte"}
OPERATORS = frozenset({"$eq", "$in", *_RANGES, "$and", "$or"})
_EXACT = 2**53
_LONGEST = 8191


def query_for(where: Filter | None, fields: Mapping[str, str], *, prefix: str) -> dict[str, Any] | None:
    """Return the query that lets through all that `where` does; None where every record has to be given.

    Parameters
    ----------
    fields
        Type of each metadata field that is indexed.
    prefix
        The path of the object that they are in, with a dot.
    """
    if where is None:
        return None

    def answers(part: Comparison) -> bool:
        if part.field in RESERVED:
            return False  # a field of the user's own that is called so lies in the envelope
        values = part.value if part.operator == "$in" else [part.value]
        return all(_fits(fields.get(part.field), value, part.operator) for value in values)

    asked = filters.superset(where, OPERATORS, answers=answers)
    return None if asked is None else _query(asked, prefix)


def _fits(kind: str | None, value: Any, operator: str) -> bool:
    """Whether a field of this type can be asked for a value without an error or a record too few."""
    if kind == "keyword":
        return isinstance(value, str) and len(value) <= _LONGEST and operator in ("$eq", "$in")
    if kind == "boolean":
        return isinstance(value, bool) and operator in ("$eq", "$in")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Both round: a long drops what is behind the point of a record's value, a double its last digits.
    return abs(value) <= _EXACT and (kind == "double" or (kind == "long" and isinstance(value, int)))


def _query(where: Filter, prefix: str) -> dict[str, Any]:
    if isinstance(where, And):
        return {"bool": {"filter": [_query(part, prefix) for part in where.parts]}}
    if isinstance(where, Or):
        return _any([_query(part, prefix) for part in where.parts])
    assert isinstance(where, Comparison)
    path = prefix + where.field
    if where.operator in _RANGES:
        # At the bound too: rounding may have brought a value there.
        bound = _RANGES[where.operator][:2] + "e"
        asked: dict[str, Any] = {"range": {path: {bound: where.value}}}
    elif where.operator == "$in":
        asked = {"terms": {path: list(where.value)}}
    else:
        asked = {"term": {path: {"value": where.value}}}
    return _any([asked, {"term": {"_ignored": {"value": path}}}])


def _any(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"bool": {"should": parts, "minimum_should_match": 1}}
