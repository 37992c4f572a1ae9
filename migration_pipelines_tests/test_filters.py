"""The filter grammar against a second, naive reading of its meaning."""

from __future__ import annotations

import datetime as dt
import decimal
import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migration_pipelines.errors import FilterError
from migration_pipelines.filters import (
    MAX_LEVELS,
    And,
    Comparison,
    Filter,
    Not,
    Or,
    mask,
    matches,
    operators,
    parse,
    superset,
    to_json,
)
from migration_pipelines_tests.records import Record, plain_schema, to_batch

ALL_OPERATORS = ["$eq", "$ne", "$lt", "$lte", "$gt", "$gte", "$in", "$nin", "$exists", "$and", "$or", "$not"]

# ── a naive reading, straight from the documented rules ──────────────────────────────────────────────


def same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return Fraction(a) == Fraction(b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def ordered(a: Any, b: Any) -> int | None:
    """-1, 0 or 1, or None for values without an order."""
    if isinstance(a, str) and isinstance(b, str):
        x, y = list(map(ord, a)), list(map(ord, b))
        return (x > y) - (x < y)
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in (a, b)):
        return None
    return (Fraction(a) > Fraction(b)) - (Fraction(a) < Fraction(b))


def reference(where: dict[str, Any], metadata: dict[str, Any]) -> bool:
    (key, item), *rest = where.items()
    if rest:
        return all(reference({k: v}, metadata) for k, v in where.items())
    if key == "$not":
        return not reference(item, metadata)
    if key in ("$and", "$or"):
        found = [reference(part, metadata) for part in item]
        return all(found) if key == "$and" else any(found)
    ((name, value),) = item.items()
    there = key in metadata
    sign = ordered(metadata[key], value) if there else None
    rules: dict[str, Callable[[], bool]] = {
        "$exists": lambda: there == value,
        "$eq": lambda: there and same(metadata[key], value),
        "$ne": lambda: not (there and same(metadata[key], value)),
        "$in": lambda: there and any(same(metadata[key], v) for v in value),
        "$nin": lambda: not (there and any(same(metadata[key], v) for v in value)),
        "$lt": lambda: sign == -1,
        "$lte": lambda: sign in (-1, 0),
        "$gt": lambda: sign == 1,
        "$gte": lambda: sign in (0, 1),
    }
    return rules[name]()


# Few values that meet often, at the edges where types and precision meet.
NUMBERS = st.sampled_from([0, -0.0, 1, 1.0, 2, 1.5, 2**53, 2**53 + 1, 2.0**53, 2**64, 10**30, 1e30, -7])
TEXTS = st.sampled_from(["", "a", "b", "1", "true", "\uffff", "😀", "é", "a\0"])
VALUES = st.recursive(
    st.one_of(NUMBERS, TEXTS, st.booleans(), st.none()),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["x", "$y"]), inner, max_size=2)
    ),
    max_leaves=4,
)
FIELDS = st.sampled_from(["f", "g", "a.b", 'q"'])
COMPARISONS = st.one_of(
    st.tuples(FIELDS, st.sampled_from(["$eq", "$ne"]), VALUES),
    st.tuples(FIELDS, st.sampled_from(["$lt", "$lte", "$gt", "$gte"]), NUMBERS | TEXTS),
    st.tuples(FIELDS, st.sampled_from(["$in", "$nin"]), st.lists(VALUES, min_size=1, max_size=3)),
    st.tuples(FIELDS, st.just("$exists"), st.booleans()),
).map(lambda parts: {parts[0]: {parts[1]: parts[2]}})
FILTERS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        inner.map(lambda part: {"$not": part}),
        st.tuples(st.sampled_from(["$and", "$or"]), st.lists(inner, min_size=1, max_size=3)).map(
            lambda pair: {pair[0]: pair[1]}
        ),
    ),
    max_leaves=6,
)
METADATA = st.dictionaries(FIELDS, VALUES, max_size=4)


def parsed(value: str | dict[str, Any]) -> Filter:
    where = parse(value)
    assert where is not None
    return where


@given(FILTERS, METADATA)
def test_evaluation_agrees_with_the_naive_reading(where: dict[str, Any], metadata: dict[str, Any]) -> None:
    assert matches(parsed(where), metadata) == reference(where, metadata)


def fields(where: Filter) -> set[str]:
    if isinstance(where, Comparison):
        return {where.field}
    if isinstance(where, Not):
        return fields(where.part)
    assert isinstance(where, (And, Or))
    return set().union(*map(fields, where.parts))


@given(FILTERS, METADATA, st.sets(st.sampled_from(ALL_OPERATORS)), st.sampled_from(["f", "g", "none"]))
def test_what_matches_a_filter_matches_its_superset(
    where: dict[str, Any], metadata: dict[str, Any], supported: set[str], unanswered: str
) -> None:
    full = parsed(where)
    weaker = superset(full, frozenset(supported), answers=lambda part: part.field != unanswered)
    if weaker is not None:
        assert operators(weaker) <= supported
        assert unanswered not in fields(weaker)
        assert matches(weaker, metadata) or not matches(full, metadata)


@given(FILTERS)
def test_a_store_that_supports_everything_is_asked_the_whole_filter(where: dict[str, Any]) -> None:
    assert superset(parsed(where), frozenset(ALL_OPERATORS)) == parsed(where)


@given(FILTERS)
def test_canonical_text_parses_to_the_same_filter(where: dict[str, Any]) -> None:
    text = to_json(parsed(where))
    assert to_json(parsed(text)) == text
    assert parsed(json.dumps(where)) == parsed(where)


@settings(deadline=None)  # pyarrow loads pandas on first use
@given(FILTERS, st.lists(st.none() | METADATA, min_size=1, max_size=4))
def test_mask_says_of_each_record_what_matches_says(
    where: dict[str, Any], rows: list[dict[str, Any] | None]
) -> None:
    batch = to_batch([Record(str(n), metadata=row) for n, row in enumerate(rows)], plain_schema("c"))
    found = mask(parsed(where), batch)
    assert found.to_pylist() == [matches(parsed(where), row) for row in rows]


# ── the rules, one by one ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("where", "metadata", "expected"),
    [
        ({"n": 2024}, {"n": 2024.0}, True),
        ({"n": 2**53 + 1}, {"n": 2.0**53}, False),
        ({"n": {"$gt": 2.0**53}}, {"n": 2**53 + 1}, True),
        ({"n": 1}, {"n": True}, False),
        ({"n": {"$lt": 2}}, {"n": True}, False),
        ({"n": {"$gte": 1}}, {"n": "1"}, False),
        ({"n": {"$ne": 1}}, {}, True),
        ({"n": {"$nin": [1]}}, None, True),
        ({"n": {"$exists": False}}, None, True),
        ({"n": None}, {}, False),
        ({"n": None}, {"n": None}, True),
        ({"n": {"$exists": True}}, {"n": None}, True),
        ({"$not": {"n": {"$lt": 5}}}, {"n": "text"}, True),
        ({"tags": "a"}, {"tags": ["a"]}, False),
        ({"tags": ["a"]}, {"tags": ["a"]}, True),
        ({"tags": ["b", "a"]}, {"tags": ["a", "b"]}, False),
        ({"o": {"x": 1}}, {"o": {"x": 1.0}}, True),
        ({"o": {"x": 1}}, {"o": {"x": 1, "y": 2}}, False),
        ({"o": {"$eq": {"$x": 1}}}, {"o": {"$x": 1}}, True),
        ({"o": {}}, {"o": {}}, True),
        ({"a.b": 1}, {"a": {"b": 1}}, False),
        ({"a.b": 1}, {"a.b": 1}, True),
        ({"$$price": 3}, {"$price": 3}, True),
        ({"$$typed": 3}, {"$typed": 3}, True),
        ({"n": {"$ne": float("nan")}}, {"n": float("nan")}, True),
        ({"n": {"$lt": decimal.Decimal("0.3")}}, {"n": 0.1}, True),
        ({"n": decimal.Decimal("0.1")}, {"n": 0.1}, False),
        ({"at": {"$gte": dt.date(2025, 1, 31)}}, {"at": dt.date(2025, 2, 1)}, True),
        ({"at": {"$gte": dt.date(2025, 1, 31)}}, {"at": "2025-02-01"}, False),
        ({"t": {"$lt": "😀"}}, {"t": "\uffff"}, True),
    ],
)
def test_rule(where: dict[str, Any], metadata: dict[str, Any] | None, *, expected: bool) -> None:
    assert matches(parsed(where), metadata) is expected


def test_instants_compare_across_time_zones_and_never_with_local_times() -> None:
    noon = dt.datetime(2025, 1, 31, 12, tzinfo=dt.UTC)
    where = parsed({"at": {"$lte": noon}})
    assert matches(where, {"at": noon.astimezone(dt.timezone(dt.timedelta(hours=5)))})
    assert not matches(where, {"at": noon.replace(tzinfo=None)})
    assert parsed(to_json(where)) == where


def test_metadata_nested_past_all_filters_equals_nothing() -> None:
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    assert not matches(parsed({"n": [[1]]}), {"n": deep})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("status=active", {"status": "active"}),
        ("status=active,year>=2025", {"status": "active", "year": {"$gte": 2025}}),
        (" year >= 2000 , year < 2024 ", {"year": {"$gte": 2000, "$lt": 2024}}),
        ("a!=null,b=true,c<=-1.5e3", {"a": {"$ne": None}, "b": True, "c": {"$lte": -1500.0}}),
        ('title="a,b=\\"c\\"",n=1', {"title": 'a,b="c"', "n": 1}),
        ('"odd,name"="1"', {"odd,name": "1"}),
        ("zip=007,city=New York", {"zip": "007", "city": "New York"}),
        ("n=9007199254740993", {"n": 2**53 + 1}),
        ("$$price>3", {"$$price": {"$gt": 3}}),
        ('e=""', {"e": ""}),
    ],
)
def test_short_text_says_the_same_as_a_mapping(text: str, expected: dict[str, Any]) -> None:
    assert parsed(text) == parsed(expected)


@pytest.mark.parametrize("nothing", [None, {}, "{}"])
def test_no_condition_is_no_filter(nothing: Any) -> None:
    assert parse(nothing) is None


@pytest.mark.parametrize(
    ("value", "named", "expected"),
    [
        ("", "", "field=value"),
        ("   ", "", "field=value"),
        ("status", "status", "field=value"),
        ("a=", "a=", "field=value"),
        ("a==1", "a==1", "field=value"),
        ("a=1,", "a=1,", "no comma"),
        ("a=1,,b=2", ",b=2", "field=value"),
        ("year>=2025 status=active", "year>=2025 status", "field=value"),
        ('a="open', "open", "field=value"),
        ('a="\\x"', "\\x", "a JSON value"),
        ("a<true", "$lt", "a number, a text or a date"),
        ("$price=1", "$price", "$$price"),
        ("{", "{", "JSON"),
        ("[1]", "[1]", "an object"),
        ('{"a": NaN}', "NaN", "JSON"),
        ('{"a": 1, "a": 2}', "a", "each key once"),
        ({"$foo": 1}, "$foo", "$and, $or, $not"),
        ({"a": {"$foo": 1}}, "$foo", "$eq, $ne"),
        ({"a": {"$gt": 1, "b": 2}}, "b", "$eq, $ne"),
        ({"a": {"$not": {"$gt": 1}}}, "$not", "around a whole condition"),
        ({"a": {"$gt": None}}, "$gt", "a number, a text or a date"),
        ({"a": {"$gt": float("nan")}}, "$gt", "a number, a text or a date"),
        ({"a": {"$in": "b"}}, "$in", "a list"),
        ({"a": {"$in": []}}, "$in", "a list"),
        ({"a": {"$exists": 1}}, "$exists", "true or false"),
        ({"$and": []}, "$and", "a list"),
        ({"$or": {"a": 1}}, "$or", "a list"),
        ({"$not": {}}, "{}", "at least one condition"),
        ({"$and": [1]}, "1", "at least one condition"),
        ({"a": object()}, "object", "JSON values"),
        ({"a": "\ud800"}, "a", "JSON values"),
        ('{"a": {"$typed": ["decimal", "x"]}}', "decimal", "JSON values"),
    ],
)
def test_error_names_the_part_and_what_was_expected(value: Any, named: str, expected: str) -> None:
    with pytest.raises(FilterError) as caught:
        parse(value)
    found, _, wanted = str(caught.value).partition(": expected ")
    assert named in found
    assert expected in wanted


@pytest.mark.parametrize("levels", [MAX_LEVELS + 1, 900, 100_000])
def test_hostile_nesting_is_refused_and_never_exhausts_the_stack(levels: int) -> None:
    for opening, closing in (('{"$not":', "}"), ('{"a":', "}"), ('{"$and":[', "]}")):
        with pytest.raises(FilterError):
            parse(opening * levels + '{"a":12345678901234567890}' + closing * levels)


def test_a_mapping_that_holds_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["$not"] = endless
    with pytest.raises(FilterError):
        parse(endless)


def test_reasonable_nesting_is_accepted() -> None:
    levels = MAX_LEVELS - 2
    assert matches(parsed('{"$not":' * levels + '{"a":1}' + "}" * levels), {}) is bool(levels % 2)


def test_canonical_text_forgets_the_order_and_repetition_of_parts() -> None:
    assert to_json(parsed("b=2,a=1,b=2")) == to_json(parsed({"a": 1, "b": 2}))
    assert to_json(parsed({"a": {"$lt": 2, "$gt": 1}})) == '{"$and":[{"a":{"$gt":1}},{"a":{"$lt":2}}]}'


def test_filters_of_different_types_of_value_differ() -> None:
    assert parsed("a=1") != parsed("a=true")
    assert parsed("a=1") != parsed('a="1"')


def test_operators_are_all_that_occur() -> None:
    where = parsed({"$or": [{"a": 1}, {"$not": {"b": {"$gt": 2, "$exists": True}}}]})
    assert operators(where) == {"$or", "$eq", "$not", "$and", "$gt", "$exists"}


def test_superset_keeps_the_strongest_part_that_is_supported() -> None:
    a, b, c = Comparison("a", "$eq", 1), Comparison("b", "$lt", 2), Comparison("c", "$ne", 3)
    supported = frozenset({"$eq", "$lt", "$and", "$or"})
    assert superset(And((a, b, c)), supported) == And((a, b))
    assert superset(And((a, b)), supported - {"$and"}) == a
    assert superset(Or((And((a, c)), b)), supported) == Or((a, b))
    assert superset(Or((a, c)), supported) is None
    assert superset(Not(And((a, c))), supported | {"$not"}) is None
    assert superset(Not(a), supported) is None
    assert superset(Not(a), supported | {"$not"}) == Not(a)


def test_superset_leaves_out_a_comparison_that_the_store_cannot_be_asked_by_its_value() -> None:
    where = parsed({"a": 1.5, "b": 2})

    def whole_numbers(part: Comparison) -> bool:
        return isinstance(part.value, int)

    assert superset(where, frozenset({"$eq", "$and"}), answers=whole_numbers) == parsed({"b": 2})
    assert superset(Not(where), frozenset({"$eq", "$and", "$not"}), answers=whole_numbers) is None
