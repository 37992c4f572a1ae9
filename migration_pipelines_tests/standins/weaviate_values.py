"""Property values as Weaviate's server takes, keeps and returns them.

After `usecases/objects/validation/properties_validation.go`, `auto_schema.go` and `grpc/v1/mapping.go`.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import re
import struct
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from google.protobuf import struct_pb2
from weaviate.proto.v1 import properties_pb2

NESTED = ("object", "object[]")
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")


class InvalidValueError(Exception):
    """An object that the server refuses, by itself."""


# ── from a batch ─────────────────────────────────────────────────────────────────────────────────────


def given(properties: Any) -> dict[str, Any]:
    """The properties of one object of a batch: numbers of any kind are doubles."""
    found = {name: _plain(value) for name, value in properties.non_ref_properties.fields.items()}
    for item in properties.boolean_array_properties:
        found[item.prop_name] = list(item.values)
    for item in properties.number_array_properties:
        raw = item.values_bytes
        found[item.prop_name] = np.frombuffer(raw, "<f8").tolist() if raw else list(item.values)
    for item in properties.text_array_properties:
        found[item.prop_name] = list(item.values)
    for item in properties.int_array_properties:
        found[item.prop_name] = list(item.values)
    for item in properties.object_properties:
        found[item.prop_name] = given(item.value)
    for item in properties.object_array_properties:
        found[item.prop_name] = [given(value) for value in item.values]
    for name in properties.empty_list_props:
        found[name] = []
    return found


def _plain(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {name: _plain(item) for name, item in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    return None if kind == "null_value" else getattr(value, kind or "string_value")


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────


def kept(name: str, value: Any, item: Mapping[str, Any], class_name: str) -> Any:
    """The value that is stored for a property.

    Raises
    ------
    InvalidValueError
    """
    kind = item["dataType"][0]
    if kind in NESTED:
        return _kept_nested(name, value, item, class_name)
    try:
        return _kept_list(value, kind[:-2]) if kind.endswith("[]") else _KEPT[kind](value)
    except InvalidValueError as error:
        shown = kind.replace("int", "integer") if kind in ("int", "int[]") else kind
        raise InvalidValueError(
            f"invalid {shown} property '{name}' on class '{class_name}': {error}"
        ) from None


def _kept_list(value: Any, kind: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidValueError(f"not a {kind} array, but {type(value).__name__}")
    return [_KEPT[kind](part) for part in value]


def _kept_nested(name: str, value: Any, item: Mapping[str, Any], class_name: str) -> Any:
    if item["dataType"][0] == "object[]":
        if not isinstance(value, list):
            raise InvalidValueError(f"invalid object[] property '{name}': not an object array")
        return [_kept_object(name, part, item, class_name) for part in value]
    return _kept_object(name, value, item, class_name)


def _kept_object(name: str, value: Any, item: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidValueError(f"invalid object property '{name}': object must be a map")
    inside = {part["name"]: part for part in item.get("nestedProperties") or ()}
    for key in value:
        if key not in inside:
            raise InvalidValueError(f"unknown property '{name}.{key}'")
    return {
        key: kept(f"{name}.{key}", part, inside[key], class_name)
        for key, part in value.items()
        if part is not None
    }


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidValueError(f"not a string, but {type(value).__name__}")
    return value


def _int(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise InvalidValueError(f"requires an integer, the given value is '{value}'")
    return float(value)  # the server's intVal returns a float64


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidValueError(f"requires a float, the given value is '{value}'")
    return float(value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidValueError(f"not a bool, but {type(value).__name__}")
    return value


def _date(value: Any) -> str:
    if not isinstance(value, str) or not _RFC3339.fullmatch(value):
        raise InvalidValueError(f"requires a string with a RFC3339 formatted date, but got '{value}'")
    head, dot, tail = value.partition(".")
    if not dot:
        return value
    digits = re.match(r"\d+", tail).group()  # type: ignore[union-attr]
    zone, fraction = tail[len(digits) :], digits[:9].rstrip("0")  # Go's time: nanoseconds, no trailing zeros
    return f"{head}.{fraction}{zone}" if fraction else f"{head}{zone}"


def _uuid(value: Any) -> str:
    try:
        return str(uuid.UUID(value))
    except (ValueError, AttributeError, TypeError):
        raise InvalidValueError(f"requires a string of UUID format, but got '{value}'") from None


def _blob(value: Any) -> str:
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise InvalidValueError("not a valid blob base64 string") from None
    return str(value)


def _geo(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not {"latitude", "longitude"} <= value.keys():
        raise InvalidValueError("geoCoordinates is missing a required field")
    return {key: float(np.float32(value[key])) for key in ("latitude", "longitude")}


def _phone(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("input"), str):
        raise InvalidValueError("phoneNumber is missing required field 'input'")
    return {"input": value["input"], "defaultCountry": value.get("defaultCountry", "")}


_KEPT: Mapping[str, Callable[[Any], Any]] = {
    "text": _text,
    "string": _text,
    "int": _int,
    "number": _number,
    "boolean": _bool,
    "date": _date,
    "uuid": _uuid,
    "blob": _blob,
    "geoCoordinates": _geo,
    "phoneNumber": _phone,
}


def guessed(value: Any) -> str:
    """The type that auto-schema takes a value to be of."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, list):
        kinds = {guessed(item) for item in value} or {"text"}
        if len(kinds) > 1 and not kinds <= {"text", "uuid", "date"}:
            raise InvalidValueError(f"mismatched data type - {sorted(kinds)}")
        return f"{kinds.pop() if len(kinds) == 1 else 'text'}[]"
    if isinstance(value, dict):
        return "object"
    if _RFC3339.fullmatch(value):
        return "date"
    try:
        uuid.UUID(value)
    except ValueError:
        return "text"
    return "uuid"


def property_of(name: str, value: Any) -> dict[str, Any]:
    """The property that auto-schema adds for a value."""
    kind = guessed(value)
    made: dict[str, Any] = {"name": name, "dataType": [kind]}
    if kind in NESTED:
        example = value if kind == "object" else value[0]
        made["nestedProperties"] = [
            property_of(key, item) for key, item in example.items() if item is not None
        ]
    return made


# ── into a reply ─────────────────────────────────────────────────────────────────────────────────────


def returned(value: Any, item: Mapping[str, Any], wanted: Any = None) -> properties_pb2.Value:
    """A stored value as a search returns it; `wanted` is what is asked of an object."""
    kind = item["dataType"][0]
    made = properties_pb2.Value()
    if value is None:
        made.null_value = struct_pb2.NULL_VALUE
    elif kind == "object":
        made.object_value.CopyFrom(_object(value, item, wanted))
    elif kind == "object[]":
        parts = [_object(part, item, wanted) for part in value]
        made.list_value.object_values.CopyFrom(properties_pb2.ObjectValues(values=parts))
    elif kind.endswith("[]"):
        _add_list(made.list_value, kind[:-2], value)
    elif kind == "geoCoordinates":
        made.geo_value.CopyFrom(properties_pb2.GeoCoordinate(**value))
    elif kind == "phoneNumber":
        made.phone_value.input, made.phone_value.default_country = value["input"], value["defaultCountry"]
    elif kind == "int":
        made.int_value = int(value)
    else:
        fields = {"text": "text_value", "string": "text_value", "boolean": "bool_value"}
        setattr(made, fields.get(kind, f"{kind}_value"), value)
    return made


def _object(value: Mapping[str, Any], item: Mapping[str, Any], wanted: Any) -> properties_pb2.Properties:
    inside = {part["name"]: part for part in item.get("nestedProperties") or ()}
    made = properties_pb2.Properties()
    for name in wanted.primitive_properties:
        if name in value:
            made.fields[name].CopyFrom(returned(value[name], inside[name]))
    for part in wanted.object_properties:
        if part.prop_name in value:
            made.fields[part.prop_name].CopyFrom(
                returned(value[part.prop_name], inside[part.prop_name], part)
            )
    return made


def _add_list(made: Any, kind: str, value: list[Any]) -> None:
    if kind == "number":
        made.number_values.values = struct.pack(f"<{len(value)}d", *value)
    elif kind == "int":
        made.int_values.values = struct.pack(f"<{len(value)}q", *map(int, value))
    else:
        fields = {"text": "text_values", "string": "text_values", "boolean": "bool_values"}
        holder = getattr(made, fields.get(kind, f"{kind}_values"))
        holder.SetInParent()
        holder.values.extend(value)


def now_ms() -> int:
    """The time that the server stamps an object with."""
    return int(dt.datetime.now(dt.UTC).timestamp() * 1000)
