"""The canonical form of metadata: one text per value, and the same value back, type for type."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
import re
import struct
import uuid
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration_pipelines.metadata import (
    canonical,
    count_kinds,
    dump_all,
    dump_metadata,
    has_long_digits,
    load_all,
    load_metadata,
    value_kind,
    value_kinds,
)
from migration_pipelines.model import ValueKind

TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
KEYS = st.sampled_from(["a", "b", "$typed", "$", "", "é", "\uffff", "😀", "null"]) | TEXT
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**53, 2**53 + 1, -(2**63), 2**63, 2**64 - 1, 2**64, 10**40, 0, -0.0, 1e16, 5e-324]),
    st.floats(),
    TEXT,
    st.datetimes(timezones=st.sampled_from([None, dt.UTC, dt.timezone(dt.timedelta(hours=5, minutes=45))])),
    st.dates(),
    st.times(),
    st.decimals(allow_nan=False),
    st.binary(max_size=6),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
METADATA = st.dictionaries(KEYS, VALUES, max_size=4)


def exact(value: Any) -> Any:
    """A form in which two values are equal only if they are of one type and one value, to the last bit."""
    if isinstance(value, dict):
        return "dict", sorted((key, exact(item)) for key, item in value.items())
    if isinstance(value, list):
        return "list", [exact(item) for item in value]
    if isinstance(value, float):
        return "float", "nan" if math.isnan(value) else struct.pack("<d", value).hex()
    # Of a clock time that is told twice, "fold" says which one is meant; no store keeps that.
    return type(value).__name__, value.isoformat() if hasattr(value, "isoformat") else repr(value)


@given(METADATA)
def test_what_is_dumped_is_loaded_with_its_types(metadata: dict[str, Any]) -> None:
    assert exact(load_metadata(dump_metadata(metadata))) == exact(metadata)


@given(METADATA)
def test_dumped_text_is_json_and_its_own_canonical_form(metadata: dict[str, Any]) -> None:
    text = dump_metadata(metadata)
    assert isinstance(json.loads(text), dict)
    assert canonical(text) == text


@given(st.dictionaries(TEXT, SCALARS, max_size=5), st.randoms())
def test_order_of_keys_does_not_show(metadata: dict[str, Any], random: Any) -> None:
    shuffled = list(metadata.items())
    random.shuffle(shuffled)
    assert dump_metadata(dict(shuffled)) == dump_metadata(metadata)


@pytest.mark.parametrize("rare", [None, 2**70, 1.5])
def test_keys_are_sorted_by_code_point_on_the_fast_and_on_the_slow_path(rare: Any) -> None:
    metadata = {"😀": 1, "\uffff": 2, "b": {"z": rare, "a": 0}, "B": 3}
    assert list(load_metadata(dump_metadata(metadata))) == ["B", "b", "\uffff", "😀"]
    assert list(load_metadata(dump_metadata(metadata))["b"]) == ["a", "z"]


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({}, "{}"),
        ({"b": 1, "a": "é"}, '{"a":"é","b":1}'),
        ({"n": 2**64 + 1}, '{"n":18446744073709551617}'),
        ({"x": -0.0, "y": 1.0, "z": 0.1}, '{"x":-0.0,"y":1.0,"z":0.1}'),
        ({"x": math.nan}, '{"x":{"$typed":["float","nan"]}}'),
        ({"x": -math.inf}, '{"x":{"$typed":["float","-inf"]}}'),
        ({"x": None}, '{"x":null}'),
        ({"x": dt.date(2025, 1, 31)}, '{"x":{"$typed":["date","2025-01-31"]}}'),
        ({"x": decimal.Decimal("1.50")}, '{"x":{"$typed":["decimal","1.50"]}}'),
        ({"x": b"\0\xff"}, '{"x":{"$typed":["bytes","AP8="]}}'),
        ({"x": uuid.UUID(int=1)}, '{"x":"00000000-0000-0000-0000-000000000001"}'),
        ({"x": {"$typed": ["float", "nan"]}}, '{"x":{"$typed":["object",{"$typed":["float","nan"]}]}}'),
        ({"$typed": 1}, '{"$typed":["object",{"$typed":1}]}'),
        ({"x": (1, 2)}, '{"x":[1,2]}'),
        ({"x": np.float64(0.5)}, '{"x":0.5}'),
    ],
)
def test_canonical_text(metadata: dict[str, Any], text: str) -> None:
    assert dump_metadata(metadata) == text


@pytest.mark.parametrize(
    "value", [{1}, object(), 1j, pd.Timestamp("2025-01-31T00:00:00.123456789"), "\ud800"]
)
def test_value_without_a_form_is_refused_and_not_changed(value: Any) -> None:
    with pytest.raises(TypeError):
        dump_metadata({"x": value})


@pytest.mark.parametrize("integer", [2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400])
def test_integer_of_any_size_is_exact_beside_floats(integer: int) -> None:
    loaded = load_metadata(dump_metadata({"n": [integer, 0.1], "x": 1.2345678901234567e-19}))
    assert loaded == {"n": [integer, 0.1], "x": 1.2345678901234567e-19}


def test_text_that_is_not_canonical_is_brought_to_canonical_form() -> None:
    assert canonical(' { "b" : 1e2 , "a" : "\\u00e9" } ') == '{"a":"é","b":100.0}'


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("a", ValueKind.TEXT),
        (uuid.UUID(int=1), ValueKind.TEXT),
        ("", ValueKind.EMPTY_TEXT),
        ("a\0", ValueKind.NUL_TEXT),
        (True, ValueKind.BOOL),
        (2**53, ValueKind.INT53),
        (-(2**53), ValueKind.INT53),
        (2**53 + 1, ValueKind.INT64),
        (-(2**63), ValueKind.INT64),
        (2**63 - 1, ValueKind.INT64),
        (2**63, ValueKind.UINT64),
        (2**64 - 1, ValueKind.UINT64),
        (2**64, ValueKind.BIG_INT),
        (-(2**63) - 1, ValueKind.BIG_INT),
        (0.0, ValueKind.SHORT_FLOAT),
        (0.1, ValueKind.SHORT_FLOAT),
        (1e15, ValueKind.SHORT_FLOAT),
        (1e-22, ValueKind.SHORT_FLOAT),
        (1e-23, ValueKind.FLOAT),
        (1 / 3, ValueKind.FLOAT),
        (5e-324, ValueKind.FLOAT),
        (-1e16, ValueKind.INTEGRAL_FLOAT),
        (-0.0, ValueKind.NEGATIVE_ZERO),
        (math.nan, ValueKind.NON_FINITE),
        (math.inf, ValueKind.NON_FINITE),
        (None, ValueKind.NULL),
        ({}, ValueKind.OBJECT),
        ({"a": 1}, ValueKind.OBJECT),
        ([], ValueKind.EMPTY_LIST),
        (["a", ""], ValueKind.LIST_OF_TEXT),
        ([1, 2], ValueKind.LIST_OF_NUMBERS),
        ([1.0, 2.5], ValueKind.LIST_OF_NUMBERS),
        ([True], ValueKind.LIST_OF_BOOLS),
        ([1, 1.0], ValueKind.MIXED_LIST),
        ([1, True], ValueKind.MIXED_LIST),
        (["a", None], ValueKind.MIXED_LIST),
        ([[1]], ValueKind.MIXED_LIST),
        (dt.datetime(2025, 1, 1, tzinfo=dt.UTC), ValueKind.DATETIME),
        (dt.date(2025, 1, 1), ValueKind.DATETIME),
        (dt.time(1), ValueKind.DATETIME),
        (decimal.Decimal("0.1"), ValueKind.DECIMAL),
        (b"", ValueKind.BYTES),
    ],
)
def test_kind_of_a_value(value: Any, kind: ValueKind) -> None:
    assert value_kind(value) is kind


def test_kinds_of_a_value_reach_everything_inside_it() -> None:
    kinds = set(value_kinds({"a": [1, {"b": None}], "c": 2**70}))
    assert kinds == {
        ValueKind.OBJECT,
        ValueKind.MIXED_LIST,
        ValueKind.INT53,
        ValueKind.NULL,
        ValueKind.BIG_INT,
    }


@given(st.lists(st.none() | METADATA))
def test_many_texts_at_once_are_those_of_each_alone(metadatas: list[Any]) -> None:
    alone = [None if item is None else dump_metadata(item).encode() for item in metadatas]
    assert dump_all(metadatas) == alone


@pytest.mark.parametrize("hazard", ["\0", ["a", "\0", "b"], None, [None], float("nan"), {"$typed": 1}, 2**70])
def test_hazards_among_many_texts_are_kept_apart(hazard: Any) -> None:
    metadatas = [{"a": 1}, {"hazard": hazard}, None, {}]
    alone = [None if item is None else dump_metadata(item).encode() for item in metadatas]
    assert dump_all(metadatas) == alone


@given(st.lists(METADATA))
def test_many_texts_are_read_at_once_as_each_alone(metadatas: list[Any]) -> None:
    texts = list(map(dump_metadata, metadatas))
    assert [dump_metadata(item) for item in load_all(texts)] == texts


@given(st.lists(VALUES) | st.lists(st.floats()) | st.lists(TEXT) | st.lists(st.integers()))
def test_kinds_of_many_values_are_those_of_each(values: list[Any]) -> None:
    assert count_kinds(values) == Counter(kind for value in values for kind in set(value_kinds(value)))


@given(st.text("07.9,a", max_size=24), st.integers(0, 24), st.text("-1. ,", max_size=9))
def test_nineteen_digits_in_a_row_are_found_wherever_they_stand(before: str, digits: int, after: str) -> None:
    text = before + "9" * digits + after
    assert has_long_digits(text.encode()) == bool(re.search(r"\d{19}", text))
