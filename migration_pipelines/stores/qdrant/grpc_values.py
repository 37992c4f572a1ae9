"""Payloads and vectors in the messages of Qdrant's gRPC interface, and back.

A vector goes as the very bytes of its float32s. A payload's integers have 64 bits with a sign there, and
Qdrant answers with a double where one is larger: `UnholdableError` says that a payload has to go by HTTP, and
`payload_of` which doubles may have been such an integer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_INT64 = range(-(2**63), 2**63)
# What unsigned integers of 64 bits above those become as doubles, the largest of them included.
_DOUBTFUL = (2.0**63, 2.0**64)
# Protobuf reads messages 100 levels deep, and a level of a payload takes up to three; JSON goes deeper.
_DEEPEST = 24
_FIELDS = {
    str: "string_value",
    bool: "bool_value",
    int: "integer_value",
    float: "double_value",
    type(None): "null_value",
}
_FLOATS_TAG = b"\x0a"  # field 1, of counted bytes: the floats of a DenseVector


class UnholdableError(Exception):
    """A payload that gRPC would change or can't carry."""


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────


def fill_payload(payload: Any, fields: Mapping[str, Any]) -> None:
    """Put a payload's fields into a message's map.

    Raises
    ------
    UnholdableError
        An integer has more than 64 bits with its sign, or values lie too deep within one another.
    """
    for key, value in fields.items():
        _fill(payload[key], value, 1)


def _fill(target: Any, value: Any, depth: int) -> None:
    if depth > _DEEPEST:
        raise UnholdableError
    if isinstance(value, dict):
        target.struct_value.SetInParent()  # an empty one is there too
        for key, item in value.items():
            _fill(target.struct_value.fields[key], item, depth + 1)
    elif isinstance(value, list):
        target.list_value.SetInParent()
        for item in value:
            _fill(target.list_value.values.add(), item, depth + 1)
    elif type(value) is int and value not in _INT64:
        raise UnholdableError
    else:
        setattr(target, _FIELDS[type(value)], 0 if value is None else value)


def fill_vector(vector: Any, value: Any) -> None:
    """Put a vector into a `Vector`: float32[dimensions], a matrix of several, or indices and values."""
    if isinstance(value, Mapping):
        vector.sparse.SetInParent()  # one of no entries is there too
        vector.sparse.indices.extend(value["indices"])
        vector.sparse.values.extend(value["values"])
    elif value.ndim == 2:
        for row in value:
            vector.multi_dense.vectors.add().MergeFromString(_packed(row))
    else:
        vector.dense.MergeFromString(_packed(value))


def _packed(row: npt.NDArray[np.float32]) -> bytes:
    data = row.astype("<f4", copy=False).tobytes()
    return _FLOATS_TAG + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


def payload_of(payload: Any) -> tuple[dict[str, Any], bool]:
    """Return a payload, and whether a double in it may have been an integer."""
    doubts: list[float] = []
    return {key: _value_of(value, doubts) for key, value in payload.items()}, bool(doubts)


def _value_of(value: Any, doubts: list[float]) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {key: _value_of(item, doubts) for key, item in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_value_of(item, doubts) for item in value.list_value.values]
    if kind in (None, "null_value"):
        return None
    found = getattr(value, kind)
    if kind == "double_value" and _DOUBTFUL[0] <= found <= _DOUBTFUL[1]:
        doubts.append(found)
    return found


def vector_of(vector: Any) -> Any:
    """Return what a `VectorOutput` holds, in the form of an answer in JSON, numbers as float32.

    Servers before 1.17 answer in the fields that are deprecated: `data` with `indices` or `vectors_count`.
    """
    kind = vector.WhichOneof("vector")
    if kind == "dense":
        return _floats(vector.dense)
    if kind == "sparse":
        return {"indices": list(vector.sparse.indices), "values": np.array(vector.sparse.values, np.float32)}
    if kind == "multi_dense":
        return [_floats(row) for row in vector.multi_dense.vectors]
    data = _floats(vector)
    if vector.HasField("indices"):
        return {"indices": list(vector.indices.data), "values": data}
    if vector.HasField("vectors_count"):
        return list(data.reshape(vector.vectors_count, -1))
    return data


def _floats(message: Any) -> npt.NDArray[np.float32]:
    """Return the floats of a message's first field, cut from its bytes: no Python object for each."""
    size = 4 * len(message.data)
    start = len(_FLOATS_TAG + _varint(size)) if size else 0
    return np.frombuffer(message.SerializeToString(), "<f4", size // 4, start)
