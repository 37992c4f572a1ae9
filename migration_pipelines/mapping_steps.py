"""The steps that a schema mapping takes a metadata value through: a fixed vocabulary of pure functions.

===============  =====================================================================================
`cast: TYPE`     to `int`, `float`, `text` or `bool`; only where nothing of the value is lost
`split: TEXT`    a text into a list of texts, at a separator
`join: TEXT`     a list into one text, with a separator
`lower`          a text in lower case; `upper` in upper case; `strip` without white space around it
`date: FORMAT`   a text of this `strptime` format as an ISO 8601 date, or date and time
`round: DIGITS`  a number to so many digits after the point
`template: TEXT` a text in which `{field}` stands for another field's value
===============  =====================================================================================

From Python a step may also be a function of one value. No step guesses: what it can't take raises a
`ValueError`, and the mapping's `on_error` says what becomes of the record.
"""

from __future__ import annotations

import datetime as dt
import decimal
import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import orjson

from migration_pipelines.metadata import dump_metadata

CALL = "call"
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_FIELD = re.compile(r"\{([^{}]+)\}")
_TIME_OF_DAY = re.compile(r"%[HIMSfpXcsTR]")

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One step: its name in the vocabulary and its argument; `function` where it is one of Python's."""

    name: str
    argument: Any = None
    function: Callable[[Any], Any] | None = None

    def __call__(self, value: Any, fields: Fields) -> Any:
        """Return the value after this step; `fields` are those of the record as they are now.

        Raises
        ------
        ValueError
            The step can't take this value.
        """
        if self.function is not None:
            return _called(self.function, value)
        if self.name == "template":
            return render(self.argument, fields)
        return _STEPS[self.name](value, self.argument)

    @property
    def makes_fields(self) -> bool:
        """Whether the step makes a value where there is none."""
        return self.name == "template"

    def document(self) -> Any:
        """Return the step as it is written in YAML; a function by its name."""
        return self.name if self.argument is None else {self.name: self.argument}


def parse_step(given: Any) -> Step:
    """Return a step from a word, an object of one key, or a function.

    Raises
    ------
    ValueError
        There is no such step, or its argument doesn't fit.
    """
    if isinstance(given, Step):
        return given
    if callable(given):
        return Step(CALL, name_of(given), given)
    if isinstance(given, Mapping) and len(given) == 1:
        ((name, argument),) = given.items()
    else:
        name, argument = given, None
    if name == CALL:
        raise ValueError("a function can be given from Python only")
    check = _ARGUMENTS.get(name) if isinstance(name, str) else None
    if check is None:
        raise ValueError(f"{name!r} is no step; there are: {', '.join(sorted(_ARGUMENTS))}")
    problem = check(argument)
    if problem:
        raise ValueError(f"step {name} {problem}, not {argument!r}")
    return Step(name, argument)


def name_of(function: Any) -> str:
    """Return `module.qualname` of a function, by which a plan knows it again.

    Raises
    ------
    ValueError
        It can't be found by that name: a lambda or a function within one. Two of those would look the same.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    try:
        found = reduce(getattr, name.split("."), importlib.import_module(module or ""))
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not function:
        raise ValueError(f"{function!r} can't be named in a plan: define it at the top level of a module")
    return f"{module}.{name}"


# ── templates ────────────────────────────────────────────────────────────────────────────────────────


def is_template(text: str) -> bool:
    """Whether a text has places for fields."""
    return "{" in text or "}" in text


def template_fields(text: str) -> list[str]:
    """Return the fields that a template names.

    Raises
    ------
    ValueError
        It names none, or has a brace that belongs to none.
    """
    found = _FIELD.findall(text)
    if not found or is_template(_FIELD.sub("", text)):
        raise ValueError(f"{text!r} is no template: fields stand in single braces, as in '{{title}}'")
    return found


def render(template: str, fields: Fields) -> str:
    """Return a template filled in.

    Raises
    ------
    ValueError
        A field is absent, null, or has no text.
    """
    # Not str.format: it would follow attributes of the values.
    return _FIELD.sub(lambda match: _in_template(match[1], fields), template)


def _in_template(name: str, fields: Fields) -> str:
    if fields.get(name) is None:
        raise ValueError(f"the template needs the field {name!r}, which isn't there")
    return to_text(fields[name])


# ── the steps ────────────────────────────────────────────────────────────────────────────────────────


def to_text(value: Any) -> str:
    """Return the text of a text, number, truth value, date or time.

    Raises
    ------
    ValueError
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, decimal.Decimal)):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return orjson.dumps(value).decode()  # the shortest digits that give it back
    if isinstance(value, (dt.datetime, dt.date, dt.time)):
        return value.isoformat()
    raise _wrong(value, "a text, a number or a date")


def _to_int(value: Any) -> int:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    is_number = isinstance(value, (float, decimal.Decimal)) and math.isfinite(value)
    if is_number and int(value) == value:
        return int(value)
    raise _wrong(value, "a whole number")


def _to_float(value: Any) -> float:
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise _wrong(value, "a number")
    if not isinstance(value, (str, int, float, decimal.Decimal)):
        raise _wrong(value, "a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    is_given = isinstance(value, float)
    if not is_given and not math.isfinite(found):
        raise _wrong(value, "a number in the range of a double")
    if isinstance(value, int) and int(found) != value:
        raise _wrong(value, "a number that a double holds exactly")
    return found


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    found = _TRUTH.get(value.lower()) if isinstance(value, str) else None
    if found is None and isinstance(value, int) and value in (0, 1):
        found = bool(value)
    if found is None:
        raise _wrong(value, f"one of {', '.join(_TRUTH)}")
    return found


_CASTS: Mapping[str, Callable[[Any], Any]] = {
    "int": _to_int,
    "float": _to_float,
    "text": to_text,
    "bool": _to_bool,
}


def _join(value: Any, separator: str) -> str:
    if not isinstance(value, (list, tuple)):
        raise _wrong(value, "a list")
    return separator.join(map(to_text, value))


def _date(value: Any, form: str) -> str:
    if isinstance(value, (dt.date, dt.time)):  # a datetime is a date as well
        return value.isoformat()
    try:
        found = dt.datetime.strptime(_text(value), form)  # noqa: DTZ007 - a time without a zone stays one
    except ValueError:
        raise _wrong(value, f"a date of the form {form}") from None
    return (found if _TIME_OF_DAY.search(form) else found.date()).isoformat()


def _round(value: Any, digits: int) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, decimal.Decimal)):
        raise _wrong(value, "a number")
    return round(value, digits)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(value, "a text")
    return value


_STEPS: Mapping[str, Callable[[Any, Any], Any]] = {
    "cast": lambda value, kind: _CASTS[kind](value),
    "join": _join,
    "split": lambda value, separator: _text(value).split(separator),
    "lower": lambda value, _: _text(value).lower(),
    "upper": lambda value, _: _text(value).upper(),
    "strip": lambda value, _: _text(value).strip(),
    "date": _date,
    "round": _round,
}


def _called(function: Callable[[Any], Any], value: Any) -> Any:
    try:
        found = function(value)
        dump_metadata({"": found})
    except Exception as error:
        raise ValueError(f"{function.__qualname__} failed: {type(error).__name__}: {error}") from error
    return found


def _wrong(value: Any, expected: str) -> ValueError:
    shown = repr(value)
    return ValueError(f"{expected} was expected, found {shown if len(shown) <= 60 else shown[:59] + '…'}")


# ── their arguments ──────────────────────────────────────────────────────────────────────────────────


def _takes_none(argument: Any) -> str:
    return "" if argument is None else "takes no argument"


def _takes_text(argument: Any) -> str:
    return "" if isinstance(argument, str) else "takes a text"


def _takes_some_text(argument: Any) -> str:
    return "" if isinstance(argument, str) and argument else "takes a text that isn't empty"


def _takes_digits(argument: Any) -> str:
    return "" if type(argument) is int and 0 <= argument <= 20 else "takes a number of digits, 0 to 20"


def _takes_type(argument: Any) -> str:
    known = isinstance(argument, str) and argument in _CASTS
    return "" if known else f"takes one of {', '.join(_CASTS)}"


def _takes_template(argument: Any) -> str:
    try:
        template_fields(argument if isinstance(argument, str) else "")
    except ValueError:
        return "takes a text with fields in single braces, such as '{title} ({year})'"
    return ""


_ARGUMENTS: Mapping[str, Callable[[Any], str]] = {
    "cast": _takes_type,
    "join": _takes_text,
    "split": _takes_some_text,
    "lower": _takes_none,
    "upper": _takes_none,
    "strip": _takes_none,
    "date": _takes_some_text,
    "round": _takes_digits,
    "template": _takes_template,
}
