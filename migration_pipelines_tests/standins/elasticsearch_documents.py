"""How Elasticsearch takes a document: mapping rules, vectors, what a search can see, what `_source` keeps.

After the manual (dense-vector, sparse-vector, dynamic-mapping, ignore-malformed, subobjects,
mapping-limit-settings) and the server's source (DocumentParser, DotExpandingXContentParser,
DenseVectorFieldMapper).
"""

from __future__ import annotations

import base64
import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

# From the manual, as the connector's own table is, but not the same one: what that has wrong, this refuses.
_OPTIONS_FROM = {
    "int8_hnsw": (8, 12),
    "int8_flat": (8, 13),
    "flat": (8, 13),
    "int4_hnsw": (8, 15),
    "int4_flat": (8, 15),
    "bbq_hnsw": (8, 16),
    "bbq_flat": (8, 16),
    "bbq_disk": (9, 2),
}
VECTOR_TYPES = ("dense_vector", "sparse_vector", "rank_vectors")
_DATE = re.compile(
    r"\d{4}(-\d\d(-\d\d(T\d\d(:\d\d(:\d\d([.,]\d{1,9})?)?)?(Z|[+-]\d\d:?\d\d)?)?)?)|\d{4}/\d\d/\d\d"
)
_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*")
_WHOLE = {"long": 63, "integer": 31, "short": 15, "byte": 7}
_REAL = ("double", "float", "half_float")
_MOST_TERM_BYTES = 32_766


class RefusedError(Exception):
    """What the server answers to a request or an item with, in place of doing it."""

    def __init__(self, status: int, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.kind, self.reason = status, kind, reason

    def error(self) -> dict[str, Any]:
        return {"type": self.kind, "reason": self.reason}


def refuse(status: int, kind: str, reason: str) -> NoReturn:
    """Answer with an error."""
    raise RefusedError(status, kind, reason)


def _bad(reason: str) -> RefusedError:
    return RefusedError(400, "document_parsing_exception", f"[1:1] {reason}")


@dataclass
class Document:
    """One document: `source` is its text as it is kept, `vectors` what is kept apart of it."""

    id: str
    source: bytes
    vectors: dict[str, Any]
    fields: dict[str, list[Any]]
    knn: dict[str, Any]
    ignored: set[str]
    routing: str | None = None
    seq_no: int = 0
    shard: int = 0


@dataclass
class Mapper:
    """The mapping of an index, its objects and fields by their paths."""

    root: dict[str, Any]
    most_fields: int = 1000
    version: tuple[int, ...] = (9, 2)
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, mappings: Mapping[str, Any], most_fields: int, version: tuple[int, ...]) -> Mapper:
        root = {key: value for key, value in mappings.items() if key != "properties"}
        found = cls(root, most_fields, version)
        found._add(mappings.get("properties") or {}, "")
        found.check_limit()
        return found

    def _add(self, properties: Mapping[str, Any], prefix: str, *, literal: bool = False) -> None:
        for name, mapping in properties.items():
            path = prefix + name
            if not name.strip():
                raise RefusedError(400, "mapper_parsing_exception", "field name cannot be an empty string")
            if "properties" in mapping or mapping.get("type", "object") in ("object", "nested"):
                self.objects[path] = {key: value for key, value in mapping.items() if key != "properties"}
                literal_inside = mapping.get("subobjects") is False
                self._add(mapping.get("properties") or {}, f"{path}.", literal=literal_inside)
                continue
            if "." in name and not literal:
                for end in (match.start() for match in re.finditer(r"\.", path)):
                    self.objects.setdefault(path[:end], {})
            self.fields[path] = _checked(path, dict(mapping), self.version)

    def check_limit(self) -> None:
        count = len(self.fields) + len(self.objects)
        if count > self.most_fields:
            raise RefusedError(
                400,
                "illegal_argument_exception",
                f"Limit of total fields [{self.most_fields}] has been exceeded while adding new fields",
            )

    def shown(self) -> dict[str, Any]:
        """The mapping as the server describes it."""
        tree: dict[str, Any] = {}
        for path, mapping in sorted(self.objects.items()):
            inside = any(name.startswith(f"{path}.") for name in (*self.objects, *self.fields))
            # The type of an object that has fields goes without saying.
            plain = {"type"} if inside and mapping.get("type") == "object" else set()
            _put(tree, path, {key: mapping[key] for key in mapping.keys() - plain}, self.objects)
        for path, mapping in sorted(self.fields.items()):
            _put(tree, path, dict(mapping), self.objects)
        shown = {key: str(v).lower() if key == "dynamic" else v for key, v in self.root.items()}
        return {**shown, **({"properties": tree} if tree else {})}

    # ── documents ────────────────────────────────────────────────────────────────────────────────────

    def take(self, record_id: str, text: bytes, *, hides_vectors: bool) -> Document:
        """A document, and the mapping grown by what it brings; both or none."""
        try:
            source = json.loads(text)
        except ValueError as error:
            raise _bad(f"failed to parse: {error}") from None
        if not isinstance(source, dict):
            raise _bad("failed to parse: document must be an object")
        trial = copy.copy(self)
        trial.objects = dict(self.objects)
        trial.fields = {
            path: dict(mapping) if mapping["type"] in VECTOR_TYPES else mapping
            for path, mapping in self.fields.items()
        }
        found = Document(record_id, text, {}, {}, {}, set())
        trial._object(source, "", found)
        trial.check_limit()
        self.fields, self.objects = trial.fields, trial.objects
        if hides_vectors:
            kept = json.loads(text)
            for path in [path for path, mapping in self.fields.items() if mapping["type"] in VECTOR_TYPES]:
                value = pop_path(kept, path)
                if value is not None:
                    found.vectors[path] = _kept_apart(value, self.fields[path])
            found.source = json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode()
        return found

    def _object(self, value: Mapping[str, Any], prefix: str, found: Document) -> None:
        mapping = self.objects.get(prefix[:-1], {}) if prefix else self.root
        dynamic = str(self._inherited(prefix, "dynamic", "true")).lower()
        literal = mapping.get("subobjects") is False
        for name, item in value.items():
            for path in self._paths(name, prefix, literal=literal):
                for at, inner in self._flattened(path, item) if literal else ((path, item),):
                    self._field(at, inner, dynamic, found)

    def _flattened(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        """What a value is to an object that can have none inside: fields whose names have dots."""
        whole = self.fields.get(path, {}).get("type") in (*VECTOR_TYPES, "flattened")
        if whole or not any(isinstance(item, Mapping) for item in _flat(value)):
            yield path, value
            return
        for item in _flat(value):
            for name, inner in item.items() if isinstance(item, Mapping) else ():
                yield from self._flattened(f"{path}.{name}", inner)
            if not isinstance(item, Mapping):
                yield path, item

    def _inherited(self, prefix: str, key: str, default: Any) -> Any:
        path = prefix[:-1]
        while path:
            if key in self.objects.get(path, {}):
                return self.objects[path][key]
            path = path.rpartition(".")[0]
        return self.root.get(key, default)

    def _paths(self, name: str, prefix: str, *, literal: bool) -> list[str]:
        """The path that a name stands for; dots in it become objects, except where there can be none."""
        if not name:
            raise _bad("field name cannot be an empty string")
        if not name.strip():
            raise _bad(f"Field name cannot contain only whitespace: [{prefix}{name}]")
        if literal or "." not in name:
            return [prefix + name]
        parts = name.split(".")
        while parts and not parts[-1]:
            parts.pop()
        if not parts:
            raise _bad("field name cannot contain only dots")
        if any(not part.strip() for part in parts):
            raise _bad(f"field name cannot contain only whitespace: ['{name}']")
        for end in range(1, len(parts)):
            path = prefix + ".".join(parts[:end])
            if path in self.fields:
                raise _bad(
                    f"object mapping for [{path}] tried to parse field [{parts[end - 1]}] as object, but "
                    "found a concrete value"
                )
        return [prefix + ".".join(parts)]

    def _field(self, path: str, value: Any, dynamic: str, found: Document) -> None:
        if path in self.fields:
            self._typed(path, self.fields[path], value, found)
        elif path in self.objects:
            self._known_object(path, value, found)
        elif value is None or value == []:
            return
        elif dynamic == "strict":
            raise RefusedError(400, "strict_dynamic_mapping_exception", f"mapping set to strict: [{path}]")
        elif dynamic in ("true", "runtime"):
            self._grow(path, value)
            self._field(path, value, dynamic, found)

    def _known_object(self, path: str, value: Any, found: Document) -> None:
        mapping = self.objects[path]
        if mapping.get("enabled") is False or value is None:
            return
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, Mapping):
                raise _bad(
                    f"object mapping for [{path}] tried to parse field [{path}] as object, but found a "
                    "concrete value"
                )
            self._object(item, f"{path}.", found)

    def _grow(self, path: str, value: Any) -> None:
        """Map a field by its first value."""
        first = next((item for item in _flat(value) if item is not None), None)
        if isinstance(first, Mapping):
            self.objects[path] = {}
            return
        is_vector = isinstance(value, list) and 128 <= len(value) <= 4096
        if is_vector and all(isinstance(item, float) for item in value):
            self.fields[path] = _checked(path, {"type": "dense_vector", "dims": len(value)}, self.version)
        elif isinstance(first, bool):
            self.fields[path] = {"type": "boolean"}
        elif isinstance(first, int):
            self.fields[path] = {"type": "long"}
        elif isinstance(first, float):
            self.fields[path] = {"type": "float"}
        elif isinstance(first, str) and _DATE.fullmatch(first):
            self.fields[path] = {"type": "date"}
        elif first is not None:
            keyword = {"type": "keyword", "ignore_above": 256}
            self.fields[path] = {"type": "text", "fields": {"keyword": keyword}}

    def _typed(self, path: str, mapping: dict[str, Any], value: Any, found: Document) -> None:
        kind = mapping["type"]
        if kind in VECTOR_TYPES:
            if value is not None:
                found.knn[path] = _vector(path, mapping, value)
            return
        if kind == "flattened":
            if not isinstance(value, Mapping | None):
                raise _bad(f"failed to parse field [{path}] of type [flattened]")
            return
        for item in _flat(value):
            if item is None:
                continue
            if isinstance(item, Mapping):
                raise _bad(
                    f"failed to parse field [{path}] of type [{kind}] in document with id '{found.id}'"
                )
            try:
                indexed = _value(kind, item)
            except (ValueError, OverflowError):
                if not mapping.get("ignore_malformed"):
                    raise _bad(
                        f"failed to parse field [{path}] of type [{kind}] in document with id '{found.id}'. "
                        f"Preview of field's value: '{item}'"
                    ) from None
                found.ignored.add(path)
                continue
            self._index(path, mapping, indexed, found)

    def _index(self, path: str, mapping: dict[str, Any], value: Any, found: Document) -> None:
        if mapping["type"] == "keyword":
            if len(value) > mapping.get("ignore_above", 2**31):
                found.ignored.add(path)
                return
            if len(value.encode()) > _MOST_TERM_BYTES:
                raise _bad(f'Document contains at least one immense term in field="{path}"')
        found.fields.setdefault(path, []).append(value)


def _checked(path: str, mapping: dict[str, Any], version: tuple[int, ...]) -> dict[str, Any]:
    """A field's mapping with the server's own choices in it."""
    if mapping.get("type") not in ("dense_vector", "rank_vectors"):
        return mapping
    kind, dims = mapping.setdefault("element_type", "float"), mapping.get("dims")
    if dims is not None and not 1 <= dims <= 4096 * (8 if kind == "bit" else 1):
        raise RefusedError(
            400,
            "mapper_parsing_exception",
            f"The number of dimensions should be in the range [1, 4096] but was [{dims}]",
        )
    if dims is not None and kind == "bit" and dims % 8:
        raise RefusedError(
            400, "mapper_parsing_exception", f"dims for bit must be a multiple of 8 but was [{dims}]"
        )
    if mapping["type"] == "rank_vectors":
        return mapping
    if version >= (8, 11):
        mapping.setdefault("index", True)
    if mapping.get("index"):
        default = "l2_norm" if kind == "bit" else "cosine"
        if mapping.setdefault("similarity", default) != "l2_norm" and kind == "bit":
            raise RefusedError(400, "mapper_parsing_exception", "[bit] only supports [l2_norm]")
        _check_options(path, mapping.get("index_options") or {}, version)
        if kind == "float" and dims is not None and version >= (8, 14):
            mapping.setdefault("index_options", _usual_options(dims, version))
    elif "similarity" in mapping or "index_options" in mapping:
        raise RefusedError(400, "mapper_parsing_exception", f"[{path}] only [index] true takes [similarity]")
    return mapping


def _usual_options(dims: int, version: tuple[int, ...]) -> dict[str, Any]:
    if dims < 384 or version < (9, 1):
        return {"type": "int8_hnsw", "m": 16, "ef_construction": 100}
    return {"type": "bbq_hnsw", "m": 16, "ef_construction": 100, "rescore_vector": {"oversample": 3.0}}


def _check_options(path: str, options: Mapping[str, Any], version: tuple[int, ...]) -> None:
    kind = options.get("type", "hnsw")
    if version < _OPTIONS_FROM.get(kind, (0,)):
        raise RefusedError(400, "mapper_parsing_exception", f"Unknown vector index options type [{kind}]")
    if version < (8, 18) and "rescore_vector" in options:
        raise RefusedError(
            400,
            "mapper_parsing_exception",
            f"Mapping definition for [{path}] has unsupported parameters: [rescore_vector]",
        )
    if (
        version < (8, 12)
        and kind == "hnsw"
        and options
        and len(options.keys() & {"m", "ef_construction"}) < 2
    ):
        raise RefusedError(400, "mapper_parsing_exception", f"[{path}] requires [m] and [ef_construction]")


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────────


def _vector(path: str, mapping: dict[str, Any], value: Any) -> Any:
    """A vector as it is indexed; a dense one without dimensions fixes them."""
    if mapping["type"] == "sparse_vector":
        return _sparse(path, value)
    if mapping["type"] == "rank_vectors":
        if not isinstance(value, list) or not value:
            raise _bad(f"[rank_vectors] field [{path}] needs at least one vector")
        return [_dense(path, mapping, item) for item in value]
    return _dense(path, mapping, value)


def _sparse(path: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise _bad(
            f"[sparse_vector] fields take hashes that map a feature to a strictly positive float [{path}]"
        )
    for name, weight in value.items():
        if "." in name or not float(np.float32(weight)) >= float(np.finfo(np.float32).tiny):
            raise _bad(f"[sparse_vector] only strictly positive normal floats, without dots: [{path}.{name}]")
    return dict(value)


def _dense(path: str, mapping: dict[str, Any], value: Any) -> Any:
    kind = mapping["element_type"]
    if isinstance(value, str):
        if kind == "float":
            value = np.frombuffer(base64.b64decode(value), ">f4").tolist()
        else:
            value = np.frombuffer(bytes.fromhex(value), np.int8).tolist()
    if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
        raise _bad(f"failed to parse field [{path}] of type [dense_vector]")
    numbers = np.asarray(value, np.float64)
    dims = len(value) * (8 if kind == "bit" else 1)
    if mapping.setdefault("dims", dims) != dims:
        raise _bad(
            f"The [{mapping['type']}] field [{path}] has a different number of dimensions [{dims}] than "
            f"defined in the mapping [{mapping['dims']}]"
        )
    is_whole = (numbers == np.round(numbers)) & (np.abs(numbers + 0.5) < 128)
    if kind != "float" and not is_whole.all():
        raise _bad(f"element_type [{kind}] vectors only support integers between [-128, 127]")
    with np.errstate(over="ignore", under="ignore"):
        narrow = numbers.astype(np.float32)
        square = float(np.dot(narrow, narrow))
    if not np.isfinite(narrow).all():
        raise _bad(f"element_type [{kind}] vectors do not support [NaN] or infinite values")
    similarity = mapping.get("similarity")
    if similarity and kind == "float" and not np.isfinite(square):
        raise _bad("NaN or Infinite magnitude detected: the vector values are too extreme to fit in a float")
    if similarity == "cosine" and square == 0:
        raise _bad("The [cosine] similarity does not support vectors with zero magnitude.")
    if similarity == "dot_product" and kind == "float" and abs(square - 1) > 1e-4:
        raise _bad("The [dot_product] similarity can only be used with unit-length vectors.")
    return narrow


def _kept_apart(value: Any, mapping: Mapping[str, Any]) -> Any:
    """What `_source` gets back of a vector that isn't kept in it."""
    if mapping["type"] == "sparse_vector":  # nine significant bits
        weights = {
            name: np.float32(weight).view(np.uint32) & np.uint32(0xFFFF8000) for name, weight in value.items()
        }
        return {name: float(bits.view(np.float32)) for name, bits in weights.items()}
    if mapping["type"] == "rank_vectors":
        return [_shortest(_dense("", dict(mapping), item)) for item in value]
    numbers = _dense("", dict(mapping), value)
    if mapping["element_type"] != "float":
        return numbers.astype(int).tolist()
    if mapping.get("similarity") == "cosine":
        magnitude = np.float32(np.sqrt(np.dot(numbers, numbers)))
        numbers = (numbers / magnitude) * magnitude
    return _shortest(numbers)


def _shortest(numbers: Any) -> list[float]:
    return [float(str(number)) for number in numbers.astype(np.float32)]


# ── values ───────────────────────────────────────────────────────────────────────────────────────────


def _value(kind: str, item: Any) -> Any:
    """A value as it is indexed."""
    if kind in _WHOLE or kind in _REAL:
        if isinstance(item, bool) or (isinstance(item, str) and not _NUMBER.fullmatch(item)):
            raise ValueError
        if kind in _REAL:
            number = float(item)
            if not np.isfinite(number):
                raise ValueError
            return float(np.float32(number)) if kind == "float" else number
        whole = int(float(item)) if isinstance(item, str | float) else item
        if not -(2 ** _WHOLE[kind]) <= whole < 2 ** _WHOLE[kind]:
            raise ValueError
        return whole
    if kind == "boolean":
        if not isinstance(item, bool) and item not in ("true", "false", ""):
            raise ValueError
        return item is True or item == "true"
    if kind == "date":
        if isinstance(item, bool) or (isinstance(item, str) and not _DATE.fullmatch(item)):
            raise ValueError
        return str(item)
    return str(item).lower() if isinstance(item, bool) else str(item)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _put(tree: dict[str, Any], path: str, mapping: dict[str, Any], objects: Mapping[str, Any]) -> None:
    """Put a mapping where the objects above it are."""
    above = max((p for p in objects if path.startswith(f"{p}.")), key=len, default=None)
    if above is None:
        inner, name = tree, path
    else:
        inner, name = _node(tree, above, objects), path[len(above) + 1 :]
    inner[name] = {**mapping, **({"properties": inner[name]["properties"]} if name in inner else {})}


def _node(tree: dict[str, Any], path: str, objects: Mapping[str, Any]) -> dict[str, Any]:
    above = max((p for p in objects if path.startswith(f"{p}.")), key=len, default=None)
    inner = tree if above is None else _node(tree, above, objects)
    name = path if above is None else path[len(above) + 1 :]
    found: dict[str, Any] = inner.setdefault(name, {}).setdefault("properties", {})
    return found


def pop_path(source: dict[str, Any], path: str) -> Any:
    """Take a field out of a document."""
    if path in source:
        return source.pop(path)
    head, _, rest = path.partition(".")
    inner = source.get(head)
    return pop_path(inner, rest) if rest and isinstance(inner, dict) else None


def put_path(source: dict[str, Any], path: str, value: Any) -> None:
    """Put a field back into a document."""
    head, _, rest = path.partition(".")
    if rest and isinstance(source.get(head), dict):
        put_path(source[head], rest, value)
    else:
        source[path] = value
