"""The harmless values that a pickle makes by calling something: known by name, made here by our own code.

Each function takes what the stream would have handed to the call of that name, checks that it is what that
call writes itself, and makes the value. Nothing is looked up by a name from the stream.
"""

from __future__ import annotations

import datetime as dt
import decimal
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

ATOMS = frozenset({type(None), bool, int, float, str, bytes})
_MAX_AXES = 32
_ITEM_SIZES = (1, 2, 4, 8)
# datetime, date and time write their fields as this many bytes.
_DATETIME_BYTES, _DATE_BYTES, _TIME_BYTES = 10, 4, 6


class NotAValueError(ValueError):
    """A pickle hands to the call of a plain value what that value never writes."""


def _expect(fits: bool, what: str) -> None:  # noqa: FBT001 - reads as an assertion
    if not fits:
        raise NotAValueError(f"what it calls {what} with is not what {what} writes")


# ── made at the call ─────────────────────────────────────────────────────────────────────────────────


def _set(*args: Any) -> set[Any]:
    return set(_scalars("set", *args))


def _frozenset(*args: Any) -> frozenset[Any]:
    return frozenset(_scalars("frozenset", *args))


def _scalars(what: str, *args: Any) -> list[Any]:
    _expect(len(args) <= 1 and all(type(arg) is list for arg in args), what)
    items = args[0] if args else []
    _expect(ATOMS.issuperset(map(type, items)), what)
    return list(items)


def _bytes(*args: Any) -> bytes:
    """Return the bytes of `bytes()`, `bytearray(b"…")` or `bytearray("…", "latin-1")`, never of a length."""
    if not args:
        return b""
    if len(args) == 1:
        _expect(type(args[0]) is bytes, "bytes")
        return args[0]  # type: ignore[no-any-return]
    return _encoded(*args)


def _encoded(*args: Any) -> bytes:
    """Return the bytes that a protocol before 3 writes as a text in Latin-1."""
    _expect(len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1"), "bytes")
    return args[0].encode("latin-1")  # type: ignore[no-any-return]


def _ordered_dict(*args: Any) -> dict[Any, Any]:
    pairs = args[0] if args else []
    _expect(len(args) <= 1 and type(pairs) is list, "OrderedDict")
    _expect(all(len(pair) == 2 and type(pair[0]) in ATOMS for pair in pairs), "OrderedDict")
    return dict(pairs)


def _datetime(*args: Any) -> dt.datetime:
    _expect_packed("datetime", _DATETIME_BYTES, args)
    year, micro = int.from_bytes(args[0][:2], "big"), int.from_bytes(args[0][7:], "big")
    month, day, hour, minute, second = args[0][2:7]
    zone = args[1] if len(args) == 2 else None
    # The second turn of an hour that the clock goes through twice is the month's highest bit.
    return dt.datetime(year, month & 127, day, hour, minute, second, micro, zone, fold=month >> 7)


def _date(*args: Any) -> dt.date:
    _expect_packed("date", _DATE_BYTES, args)
    return dt.date(args[0][0] * 256 + args[0][1], args[0][2], args[0][3])


def _time(*args: Any) -> dt.time:
    _expect_packed("time", _TIME_BYTES, args)
    hour, minute, second = args[0][:3]
    micro, zone = int.from_bytes(args[0][3:6], "big"), args[1] if len(args) == 2 else None
    return dt.time(hour & 127, minute, second, micro, zone, fold=hour >> 7)


def _expect_packed(what: str, size: int, args: tuple[Any, ...]) -> None:
    _expect(1 <= len(args) <= 2 and type(args[0]) is bytes and len(args[0]) == size, what)
    _expect(all(isinstance(zone, dt.timezone) for zone in args[1:]), what)


def _timedelta(*args: Any) -> dt.timedelta:
    _expect(len(args) == 3 and all(type(arg) is int for arg in args), "timedelta")
    return dt.timedelta(*args)


def _timezone(*args: Any) -> dt.timezone:
    _expect(len(args) == 1 and isinstance(args[0], dt.timedelta), "timezone")
    return dt.timezone(args[0])


def _decimal(*args: Any) -> decimal.Decimal:
    _expect(len(args) == 1 and type(args[0]) is str, "Decimal")
    try:
        return decimal.Decimal(args[0])
    except decimal.InvalidOperation:
        raise NotAValueError("a Decimal in it isn't a number") from None


MADE_AT_ONCE: Mapping[str, Callable[..., Any]] = {
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _encoded,
    "collections.OrderedDict": _ordered_dict,
    "datetime.datetime": _datetime,
    "datetime.date": _date,
    "datetime.time": _time,
    "datetime.timedelta": _timedelta,
    "datetime.timezone": _timezone,
    "decimal.Decimal": _decimal,
}


# ── made from the call and the state after it ────────────────────────────────────────────────────────


def _uuid(args: tuple[Any, ...], state: Any) -> uuid.UUID:
    number = state.get("int") if isinstance(state, dict) else None
    _expect(not args and type(number) is int, "UUID")
    return uuid.UUID(int=number)


def _dtype(args: tuple[Any, ...], state: Any) -> np.dtype[Any]:
    """Return a plain number's type; of any other array the bytes mean nothing by themselves."""
    code = args[0] if args else None
    plain = type(code) is str and code[:1] in "biuf" and code[1:].isdigit() and int(code[1:]) in _ITEM_SIZES
    if not plain:
        raise NotAValueError(f"an array in it has the type {code!r}; arrays of plain numbers are read")
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
    _expect(order in ("<", ">", "|", "="), "dtype")
    return np.dtype(f"{order}{code}")


def _array(_: tuple[Any, ...], state: Any) -> npt.NDArray[Any]:
    fits = isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], np.dtype)
    _expect(fits, "ndarray")
    _, shape, dtype, by_columns, data = state
    return _filled(data, dtype, shape, "F" if by_columns else "C")


def _array_of_buffer(args: tuple[Any, ...], state: Any) -> npt.NDArray[Any]:
    _expect(len(args) == 4 and isinstance(args[1], np.dtype) and state is None, "ndarray")
    data, dtype, shape, order = args
    _expect(order in ("C", "F"), "ndarray")
    return _filled(data, dtype, shape, order)


def _filled(data: Any, dtype: np.dtype[Any], shape: Any, order: Any) -> npt.NDArray[Any]:
    """Return dtype[shape] over bytes that are exactly as many as that takes."""
    _expect(type(data) is bytes and type(shape) is tuple and len(shape) <= _MAX_AXES, "ndarray")
    _expect(all(type(axis) is int and axis >= 0 for axis in shape), "ndarray")
    _expect(len(data) == math.prod(shape) * dtype.itemsize, "ndarray")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _scalar(args: tuple[Any, ...], state: Any) -> Any:
    fits = len(args) == 2 and isinstance(args[0], np.dtype) and type(args[1]) is bytes and state is None
    _expect(fits and len(args[1]) == args[0].itemsize, "a number of NumPy")
    return np.frombuffer(args[1], args[0])[0].item()


def _ndarray_class(_: tuple[Any, ...], __: Any) -> Any:
    raise NotAValueError("it makes an array by its class, which NumPy never does")


MADE_WHEN_WHOLE: Mapping[str, Callable[[tuple[Any, ...], Any], Any]] = {
    "uuid.UUID": _uuid,
    "numpy.dtype": _dtype,
    "numpy.ndarray": _ndarray_class,
    **{
        f"numpy.{core}.{name}": maker
        for core in ("core", "_core")
        for name, maker in (
            ("multiarray._reconstruct", _array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _array_of_buffer),
        )
    },
}
