"""Canonical JSON text of a record's metadata, and the classes of value in it.

Canonical: keys sorted, no white space, UTF-8, the shortest digits that give a double back. Integers
have no bound. A value that JSON can't hold stands as `{"$typed": [kind, text]}`; an object of the
user's that has the key `$typed` itself is wrapped as `{"$typed": ["object", {…}]}`, so that the form
is never ambiguous. A UUID is its text.
"""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import json
import math
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from migration_pipelines.model import ValueKind

TYPED = "$typed"
# orjson turns integers above 64 bits into doubles without a word: such texts go to a slower parser.
_TYPED_BYTES = TYPED.encode()
_LONG_DIGITS = re.compile(r"\d{19}")
_SEPARATOR = "\0"
_CUT = b',"\\u0000",'
_NINETEEN_ZEROS = b"0" * 19
_DIGITS_TO_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_FOUR_TRUE = 0x01010101
_INT64 = range(-(2**63), 2**63)
_UINT64 = range(2**63, 2**64)
_DUMP_OPTIONS = (
    orjson.OPT_SORT_KEYS
    | orjson.OPT_PASSTHROUGH_DATETIME
    | orjson.OPT_PASSTHROUGH_SUBCLASS
    | orjson.OPT_PASSTHROUGH_DATACLASS
)


def dump_metadata(value: Mapping[str, Any]) -> str:
    """Return the canonical JSON text of one record's metadata.

    Raises
    ------
    TypeError
        A value is of a type that has no form here.
    """
    try:
        text = orjson.dumps(value, option=_DUMP_OPTIONS)
    except (TypeError, orjson.JSONEncodeError):
        return _dump(value)
    # orjson writes NaN as null, and knows nothing of the reserved key: both are rare, both show in the text.
    if b"null" in text or _TYPED_BYTES in text:
        return _dump(value)
    return text.decode()


def dump_all(values: Sequence[Mapping[str, Any] | None]) -> list[bytes | None]:
    """Return the canonical JSON texts of many records' metadata, None for None; faster than one by one."""
    present = [value for value in values if value is not None]
    parts = _dump_at_once(present)
    if parts is None:
        return [None if value is None else dump_metadata(value).encode() for value in values]
    found = iter(parts)
    return [None if value is None else next(found) for value in values]


def _dump_at_once(values: Sequence[Mapping[str, Any]]) -> list[bytes] | None:
    """Return the texts of all values, cut from that of one list; None where only one by one is safe."""
    joined: list[Any] = [_SEPARATOR] * (2 * len(values) - 1)
    joined[::2] = values
    try:
        text = orjson.dumps(joined, option=_DUMP_OPTIONS)
    except (TypeError, orjson.JSONEncodeError):
        return None
    if b"null" in text or _TYPED_BYTES in text:
        return None
    parts = text[1:-1].split(_CUT) if values else []
    return parts if len(parts) == len(values) else None


def load_metadata(text: str) -> dict[str, Any]:
    """Return the metadata that `dump_metadata` wrote, or that any JSON object's text holds."""
    value: dict[str, Any] = load_json(text)
    if TYPED not in text:
        return value
    typed = value.get(TYPED)
    if len(value) == 1 and isinstance(typed, list) and typed[:1] == ["object"]:
        value = typed[1]
    return {key: _untyped(item) for key, item in value.items()}


def load_all(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the metadata of many records' texts, none of them null; faster than one by one."""
    joined = ",".join(texts)
    if TYPED in joined or has_long_digits(joined.encode()):
        return [load_metadata(text) for text in texts]
    found: list[dict[str, Any]] = orjson.loads(f"[{joined}]")
    return found


def has_long_digits(data: bytes) -> bool:
    """Return whether `data` has 19 digits in a row: as an integer it may exceed 64 bits.

    Any 19 octets hold four whole words of four: octets are looked at one by one, which takes six times as
    long, only where four words of digits follow each other.
    """
    octets = np.frombuffer(data, np.uint8, len(data) // 4 * 4)
    words = (octets - np.uint8(ord("0")) < 10).view(np.uint32) == _FOUR_TRUE  # below "0", it wraps
    if not (words[:-3] & words[1:-2] & words[2:-1] & words[3:]).any():
        return False
    return _NINETEEN_ZEROS in data.translate(_DIGITS_TO_ZEROS)


def load_json(text: str) -> Any:
    """Return the JSON value of `text`, integers of any size exact."""
    if _LONG_DIGITS.search(text):
        return json.loads(text)
    return orjson.loads(text)


def canonical(text: str) -> str:
    """Return the canonical form of a JSON object's text."""
    return dump_metadata(load_metadata(text))


def canonical_texts(texts: Sequence[bytes | None]) -> list[bytes | None]:
    """Return the canonical forms of valid texts of JSON objects, None for None.

    All of them are parsed and dumped as one list, several times faster than one by one, with a text between
    them that shows where to cut. Long digits, the reserved key, or that text in a value need the slow way.
    """
    present = [text for text in texts if text is not None]
    joined = _CUT.join(present)
    if _TYPED_BYTES in joined or has_long_digits(joined):
        return [None if text is None else canonical(text.decode()).encode() for text in texts]
    dumped = orjson.dumps(orjson.loads(b"[" + joined + b"]"), None, _DUMP_OPTIONS)
    parts = dumped[1:-1].split(_CUT) if present else []
    if len(parts) != len(present):
        return [None if text is None else canonical(text.decode()).encode() for text in texts]
    found = iter(parts)
    return [None if text is None else next(found) for text in texts]


def _dump(value: Any) -> str:
    if isinstance(value, Mapping):
        items = ",".join(f"{_dump(str(key))}:{_dump(value[key])}" for key in sorted(value))
        text = "{" + items + "}"
        return f'{{"{TYPED}":["object",{text}]}}' if TYPED in value else text
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_dump, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        return orjson.dumps(float(value)).decode()  # a subclass, such as numpy's, included
    typed = _typed(value)
    if typed is not None:
        return f'{{"{TYPED}":{orjson.dumps(typed).decode()}}}'
    return orjson.dumps(value).decode()


def _typed(value: Any) -> list[str] | None:
    if isinstance(value, float) and not math.isfinite(value):
        return ["float", repr(float(value))]
    if type(value) in (dt.datetime, dt.date, dt.time):  # a subclass may hold more, as pandas' nanoseconds
        return [type(value).__name__, value.isoformat()]
    if isinstance(value, decimal.Decimal):
        return ["decimal", str(value)]
    if isinstance(value, (bytes, memoryview)):
        return ["bytes", base64.b64encode(bytes(value)).decode()]
    return None


_FROM_TYPED: Mapping[str, Callable[[Any], Any]] = {
    "float": float,
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "time": dt.time.fromisoformat,
    "decimal": decimal.Decimal,
    "bytes": base64.b64decode,
    "object": lambda fields: {key: _untyped(item) for key, item in fields.items()},
}


def _untyped(value: Any) -> Any:
    if isinstance(value, dict):
        typed = value.get(TYPED)
        if len(value) == 1 and isinstance(typed, list) and len(typed) == 2 and typed[0] in _FROM_TYPED:
            return _FROM_TYPED[typed[0]](typed[1])
        return {key: _untyped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_untyped(item) for item in value]
    return value


def value_kind(value: Any) -> ValueKind:
    """Return the class of one metadata value; a list or object only by its own outline."""
    if value is None:
        return ValueKind.NULL
    if isinstance(value, bool):
        return ValueKind.BOOL
    if isinstance(value, str):
        return _text_kind(value)
    if isinstance(value, int):
        return _int_kind(value)
    if isinstance(value, float):
        return _float_kind(value)
    if isinstance(value, Mapping):
        return ValueKind.OBJECT
    if isinstance(value, Sequence) and not isinstance(value, (bytes, memoryview)):
        return _list_kind(value)
    return _other_kind(value)


def value_kinds(value: Any) -> Iterator[ValueKind]:
    """Yield the class of a value and of everything inside it."""
    yield value_kind(value)
    if isinstance(value, Mapping):
        for item in value.values():
            yield from value_kinds(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from value_kinds(item)


def count_kinds(values: Sequence[Any]) -> Counter[ValueKind]:
    """Return how many of many values are made of each kind; values of one plain type are counted at once."""
    found: Counter[ValueKind] = Counter()
    for kind, same in _by_type(values).items():
        if kind is bool:
            found[ValueKind.BOOL] += len(same)
        elif kind is type(None):
            found[ValueKind.NULL] += len(same)
        elif kind is str and "" not in same and "\0" not in "".join(same):
            found[ValueKind.TEXT] += len(same)
        elif kind is int and max(map(abs, same)) <= 2**53:
            found[ValueKind.INT53] += len(same)
        elif kind is float:
            found.update(map(_float_kind, same))
        else:
            for value in same:
                found.update(set(value_kinds(value)))
    return found


def _by_type(values: Sequence[Any]) -> dict[type, Sequence[Any]]:
    types = set(map(type, values))
    if len(types) == 1:
        return {types.pop(): values}
    return {kind: [value for value in values if type(value) is kind] for kind in types}


def _text_kind(value: str) -> ValueKind:
    if not value:
        return ValueKind.EMPTY_TEXT
    return ValueKind.NUL_TEXT if "\0" in value else ValueKind.TEXT


def _int_kind(value: int) -> ValueKind:
    if abs(value) <= 2**53:
        return ValueKind.INT53
    if value in _INT64:
        return ValueKind.INT64
    return ValueKind.UINT64 if value in _UINT64 else ValueKind.BIG_INT


def _float_kind(value: float) -> ValueKind:
    if not math.isfinite(value):
        return ValueKind.NON_FINITE
    if value == 0:
        return ValueKind.NEGATIVE_ZERO if math.copysign(1, value) < 0 else ValueKind.SHORT_FLOAT
    if abs(value) >= 1e16:
        return ValueKind.INTEGRAL_FLOAT
    # Most prices, scores and pages: at most 15 digits before and after the point, and no exponent.
    text = repr(value)
    if len(text) <= 16 and "e" not in text:
        return ValueKind.SHORT_FLOAT
    _, digits, exponent = decimal.Decimal(text).normalize().as_tuple()
    short = len(digits) <= 15 and abs(int(exponent)) <= 22
    return ValueKind.SHORT_FLOAT if short else ValueKind.FLOAT


def _list_kind(value: Sequence[Any]) -> ValueKind:
    types = {type(item) for item in value}
    if not types:
        return ValueKind.EMPTY_LIST
    if types == {str}:
        return ValueKind.LIST_OF_TEXT
    if types in ({int}, {float}):
        return ValueKind.LIST_OF_NUMBERS
    return ValueKind.LIST_OF_BOOLS if types == {bool} else ValueKind.MIXED_LIST


def _other_kind(value: Any) -> ValueKind:
    if isinstance(value, (dt.datetime, dt.date, dt.time)):
        return ValueKind.DATETIME
    if isinstance(value, (bytes, memoryview)):
        return ValueKind.BYTES
    if isinstance(value, decimal.Decimal):
        return ValueKind.DECIMAL
    return ValueKind.TEXT if isinstance(value, uuid.UUID) else ValueKind.OBJECT
