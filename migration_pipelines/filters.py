"""One filter grammar with one meaning, whatever the stores would answer.

    {"status": "active"}                                  equality; several keys are joined by and
    {"year": {"$gte": 2000, "$lt": 2024}}                 $eq $ne $lt $lte $gt $gte $in $nin $exists
    {"$or": [{"lang": "en"}, {"$not": {"draft": true}}]}  $and $or $not, around whole conditions
    status=active,year>=2025                              the short text: = != < <= > >= joined by and

In the short text a value is true, false, null, a JSON number, a quoted JSON string or else a bare text.
JSON writes a datetime, a decimal or bytes as metadata does, `{"$typed": ["date", "2025-01-31"]}`; Python and
YAML give the value itself. A field name is literal, a dot in it means nothing; where it begins
with `$`, that `$` is doubled: `{"$$price": 3}` is about the field `$price`.

What a comparison means:

- Numbers compare with numbers, exactly: 2024 equals 2024.0, and 2**53 + 1 doesn't equal 2.0**53. NaN equals
  nothing. Booleans are no numbers.
- Texts compare by code point; datetimes, dates and times each with their own sort, those with a time zone by
  the instant and never with those without. Any other pair of types never matches $lt $lte $gt $gte.
- A list or an object equals only another whole one; there is no match by element or by part.
- null equals null where the field is there. A field that isn't there, or a record without metadata, matches
  $ne, $nin, $not and `$exists: false`, and nothing else.
- $ne is not $eq, $nin is not $in.
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
import operator
import re
import reprlib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa

from migration_pipelines.batch import METADATA
from migration_pipelines.errors import FilterError
from migration_pipelines.metadata import dump_metadata, load_metadata

# Far above what people write, far below Python's recursion limit. Counted in JSON: a $not is one, an $or two.
MAX_LEVELS = 64

_ORDER: Mapping[str, Callable[[Any, Any], bool]] = {
    "$lt": operator.lt,
    "$lte": operator.le,
    "$gt": operator.gt,
    "$gte": operator.ge,
}
_OPPOSITE = {"$ne": "$eq", "$nin": "$in"}
_OPERATORS = ("$eq", "$ne", *_ORDER, "$in", "$nin", "$exists")
_LOGIC = ("$and", "$or", "$not")
OPERATORS = frozenset({*_OPERATORS, *_LOGIC})
_SHORT = {"=": "$eq", "!=": "$ne", "<": "$lt", "<=": "$lte", ">": "$gt", ">=": "$gte"}
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_CONDITION = re.compile(
    rf'\s*({_QUOTED}|[^\s=!<>,"][^=!<>,"]*?)\s*(!=|<=|>=|=|<|>)\s*({_QUOTED}|[^=<>,"]*?)\s*(?:,|$)'
)
_BARE_JSON = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_ORDERED_KINDS = frozenset({"number", "text", "datetime", "local datetime", "date", "time", "local time"})

_SHOWN = reprlib.Repr()  # of a hostile filter too, only so much
_SHOWN.maxstring = _SHOWN.maxother = 60

_Predicate = Callable[[Mapping[str, Any]], bool]
_Key = tuple[str, Any]


# ── the parsed form ──────────────────────────────────────────────────────────────────────────────────


class Filter:
    """A parsed filter. Two are equal where their canonical texts are."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filter) and to_json(self) == to_json(other)

    def __hash__(self) -> int:
        return hash(to_json(self))

    def __str__(self) -> str:
        return to_json(self)


@dataclass(frozen=True, eq=False)
class Comparison(Filter):
    """One field against one value; `operator` is `$eq`, `$ne`, `$lt`, … as in the grammar."""

    field: str
    operator: str
    value: Any


@dataclass(frozen=True, eq=False)
class And(Filter):
    """Every part matches."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, eq=False)
class Or(Filter):
    """At least one part matches."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, eq=False)
class Not(Filter):
    """The part doesn't match."""

    part: Filter


# ── parse ────────────────────────────────────────────────────────────────────────────────────────────


def parse(value: str | Mapping[str, Any] | None) -> Filter | None:
    """Return the filter that a mapping, its JSON text or the short text says; None for None and `{}`.

    A blank text is an error and not "everything": it is what an unset shell variable leaves behind.

    Raises
    ------
    FilterError
        The message names the part that can't be read and what was expected in its place.
    """
    if value is None:
        return None
    if isinstance(value, str) and not value.lstrip().startswith(("{", "[")):
        return _parse_short(value)
    conditions = _load(value)
    return _conditions(conditions) if conditions else None


def _load(value: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return plain Python values of either form, so that both mean the same from here on."""
    try:
        text = value if isinstance(value, str) else dump_metadata(value)
        json.loads(text, object_pairs_hook=_distinct)
        loaded = load_metadata(text)
    except FilterError:
        raise
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        _refuse(value, "an object of JSON values, not nested beyond reason", error)
    if not isinstance(loaded, Mapping):
        _refuse(loaded, 'an object such as {"year": {"$gte": 2024}}')
    level: list[Any] = [loaded]
    for _ in range(MAX_LEVELS):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        _refuse(loaded, f"at most {MAX_LEVELS} levels of nesting")
    return loaded


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _refuse(
            [key for key, _ in pairs], "each key once in an object; use $and for two conditions on a field"
        )
    return found


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


def _conditions(found: Any) -> Filter:
    if not isinstance(found, Mapping) or not found:
        _refuse(found, 'an object with at least one condition, such as {"year": 2024}')
    return _joined([part for key, item in found.items() for part in _condition(key, item)])


def _condition(key: str, item: Any) -> list[Filter]:
    if key == "$not":
        return [Not(_conditions(item))]
    if key in ("$and", "$or"):
        if not isinstance(item, list) or not item:
            _refuse({key: item}, "a list with at least one condition")
        parts = tuple(map(_conditions, item))
        return [_joined(list(parts)) if key == "$and" or len(parts) == 1 else Or(parts)]
    field = _field(key)
    if not isinstance(item, Mapping) or not any(name.startswith("$") for name in item):
        return [Comparison(field, "$eq", item)]
    return [_comparison(field, name, value) for name, value in item.items()]


def _joined(parts: list[Filter]) -> Filter:
    return parts[0] if len(parts) == 1 else And(tuple(parts))


def _field(key: str) -> str:
    if not key.startswith("$"):
        return key
    if not key.startswith("$$"):
        _refuse(
            key, f"{', '.join(_LOGIC)} or a field name; the field {key!r} itself is written {'$' + key!r}"
        )
    return key[1:]


def _comparison(field: str, name: str, value: Any) -> Comparison:
    part = {field: {name: value}}
    if name in _LOGIC:
        _refuse(part, f'{name} around a whole condition, such as {{"$not": {{{json.dumps(field)}: …}}}}')
    if name not in _OPERATORS:
        _refuse(part, f"one of {', '.join(_OPERATORS)}; an object to compare with goes under $eq")
    if name in ("$in", "$nin") and not (isinstance(value, list) and value):
        _refuse(part, "a list with at least one value")
    if name == "$exists" and not isinstance(value, bool):
        _refuse(part, "true or false")
    if name in _ORDER and _key(value)[0] not in _ORDERED_KINDS:
        _refuse(part, f"a number, a text or a date for {name}: nothing else has an order")
    return Comparison(field, name, value)


def _parse_short(text: str) -> Filter:
    parts: list[Filter] = []
    at = 0
    while at < len(text) or not parts:
        match = _CONDITION.match(text, at)
        if match is None or not match[3]:
            _refuse(
                text[at:], 'field=value, field>=value, …, joined by commas; put "…" around , = < > in a text'
            )
        field, name, value = match.groups()
        parts.append(_comparison(_field(_bare(field, quoted_only=True)), _SHORT[name], _bare(value)))
        at = match.end()
    if text[-1] == ",":
        _refuse(text, "no comma at the end")
    return _joined(parts)


def _bare(text: str, *, quoted_only: bool = False) -> Any:
    if text[0] != '"' and (quoted_only or not _BARE_JSON.fullmatch(text)):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        _refuse(text, "a JSON value", error)


def _refuse(found: Any, expected: str, cause: Exception | None = None) -> NoReturn:
    shown = _SHOWN.repr(found)
    raise FilterError(f"filter: at {shown}: expected {expected}", found=shown, expected=expected) from cause


# ── canonical form ───────────────────────────────────────────────────────────────────────────────────


def to_json(where: Filter) -> str:
    """Return the canonical text: `parse` reads it back, and the order in which parts were written is gone."""
    return dump_metadata(_plain(where))


def _plain(where: Filter) -> dict[str, Any]:
    if isinstance(where, Comparison):
        field = f"${where.field}" if where.field.startswith("$") else where.field
        return {field: {where.operator: where.value}}
    if isinstance(where, Not):
        return {"$not": _plain(where.part)}
    assert isinstance(where, (And, Or))
    parts = {dump_metadata(plain): plain for plain in map(_plain, where.parts)}
    ordered = [parts[text] for text in sorted(parts)]
    return ordered[0] if len(ordered) == 1 else {_name(where): ordered}


def _name(where: Filter) -> str:
    if isinstance(where, Comparison):
        return where.operator
    return "$not" if isinstance(where, Not) else "$and" if isinstance(where, And) else "$or"


def _parts(where: Filter) -> tuple[Filter, ...]:
    if isinstance(where, (And, Or)):
        return where.parts
    return (where.part,) if isinstance(where, Not) else ()


# ── evaluate ─────────────────────────────────────────────────────────────────────────────────────────


def matches(where: Filter, metadata: Mapping[str, Any] | None) -> bool:
    """Whether a record with this metadata, as `load_metadata` gives it, matches."""
    return _compile(where)(metadata or {})


def mask(where: Filter, batch: pa.RecordBatch) -> pa.BooleanArray:
    """Return bool[n_records]: which records of a batch match; never null."""
    predicate = _compile(where)
    without = predicate({})
    texts = batch.column(METADATA).to_pylist()
    found = [without if text is None else predicate(load_metadata(text)) for text in texts]
    return pa.array(found, pa.bool_())


def _compile(where: Filter) -> _Predicate:
    if isinstance(where, Comparison):
        return _compile_comparison(where)
    if isinstance(where, Not):
        inner = _compile(where.part)
        return lambda metadata: not inner(metadata)
    parts = [_compile(part) for part in _parts(where)]
    joined = all if isinstance(where, And) else any
    return lambda metadata: joined(part(metadata) for part in parts)


def _compile_comparison(where: Comparison) -> _Predicate:
    field, name, value = where.field, where.operator, where.value
    if name == "$exists":
        return lambda metadata: (field in metadata) is value
    if name in _OPPOSITE:
        opposite = _compile_comparison(Comparison(field, _OPPOSITE[name], value))
        return lambda metadata: not opposite(metadata)
    if name in ("$eq", "$in"):
        keys = {_key(item) for item in (value if name == "$in" else [value])}
        return lambda metadata: field in metadata and _key(metadata[field]) in keys
    kind, bound = _key(value)
    compare = _ORDER[name]

    def in_order(metadata: Mapping[str, Any]) -> bool:
        found_kind, found = _key(metadata.get(field))  # null has no order, so a missing field has none
        return found_kind == kind and kind in _ORDERED_KINDS and compare(found, bound)

    return in_order


def _key(value: Any, levels: int = MAX_LEVELS) -> _Key:
    """Return the kind of a value and a hashable form; two values are equal where both are.

    Python's own `==` won't do: it has True equal 1. Its numbers of different types compare exactly.
    """
    if isinstance(value, (bool, str)) or value is None:
        return ("text" if isinstance(value, str) else "word"), value
    if isinstance(value, (int, float, decimal.Decimal)):
        return ("NaN", object()) if math.isnan(value) else ("number", value)
    if isinstance(value, (list, tuple)) and levels:
        return "list", tuple(_key(item, levels - 1) for item in value)
    if isinstance(value, Mapping) and levels:
        return "object", frozenset((name, _key(item, levels - 1)) for name, item in value.items())
    return _rare_key(value)


def _rare_key(value: Any) -> _Key:
    if isinstance(value, uuid.UUID):
        return "text", str(value)
    if isinstance(value, (dt.datetime, dt.time)):
        sort = "datetime" if isinstance(value, dt.datetime) else "time"
        return (sort if value.utcoffset() is not None else f"local {sort}"), value
    if isinstance(value, dt.date):
        return "date", value
    if isinstance(value, (bytes, memoryview)):
        return "bytes", bytes(value)
    return "unknown", object()  # nested deeper than any filter: equal to nothing


# ── push down ────────────────────────────────────────────────────────────────────────────────────────


def operators(where: Filter) -> frozenset[str]:
    """Return every operator in a filter, `$and`, `$or` and `$not` included."""
    return frozenset({_name(where)}).union(*map(operators, _parts(where)))


def superset(
    where: Filter,
    supported: frozenset[str],
    *,
    answers: Callable[[Comparison], bool] = lambda _: True,
) -> Filter | None:
    """Return what of a filter a store can be asked: it lets through all that `where` does, and maybe more.

    Parameters
    ----------
    supported
        Operators that the store answers by at least the right records. `$not` says more: what is inside
        must be answered by exactly the right ones, since what is let through too much there is lost.
    answers
        Further says of a single comparison whether the store can be asked it, by its field or its value.

    Returns
    -------
    None where nothing is left to ask: the store has to give every record.
    """
    if isinstance(where, And):
        kept = [part for part in (superset(item, supported, answers=answers) for item in where.parts) if part]
        return _joined(kept if "$and" in supported else kept[:1]) if kept else None
    if isinstance(where, Or):
        branches = [superset(part, supported, answers=answers) for part in where.parts]
        whole = tuple(part for part in branches if part)
        return Or(whole) if "$or" in supported and len(whole) == len(branches) else None
    return where if operators(where) <= supported and _all_answered(where, answers) else None


def _all_answered(where: Filter, answers: Callable[[Comparison], bool]) -> bool:
    if isinstance(where, Comparison):
        return answers(where)
    return all(_all_answered(part, answers) for part in _parts(where))
