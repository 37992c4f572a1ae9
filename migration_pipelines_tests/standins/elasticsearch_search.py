"""How Elasticsearch answers queries: what matches a document, and how near it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from migration_pipelines_tests.standins.elasticsearch_documents import Document, Mapper, RefusedError

_ORDER = {
    "lt": lambda left, right: left < right,
    "lte": lambda left, right: left <= right,
    "gt": lambda left, right: left > right,
    "gte": lambda left, right: left >= right,
}


def matches(query: Mapping[str, Any] | None, document: Document, mapper: Mapper) -> bool:
    """Whether a document matches a query."""
    if not query:
        return True
    ((kind, body),) = query.items()
    if kind == "match_all":
        return True
    if kind == "ids":
        return document.id in body["values"]
    if kind == "bool":
        return _bool(body, document, mapper)
    if kind == "exists":
        path = body["field"]
        return path in document.fields or path in document.knn or path in document.vectors
    if kind in ("term", "terms", "range"):
        ((path, asked),) = body.items()
        return _compare(kind, path, asked, document, mapper)
    raise RefusedError(400, "parsing_exception", f"unknown query [{kind}]")


def _bool(body: Mapping[str, Any], document: Document, mapper: Mapper) -> bool:
    def parts(name: str) -> list[bool]:
        found = body.get(name) or []
        return [matches(part, document, mapper) for part in (found if isinstance(found, list) else [found])]

    should = parts("should")
    least = body.get("minimum_should_match", 0 if body.get("must") or body.get("filter") else 1)
    enough = not should or sum(should) >= least
    return all(parts("must")) and all(parts("filter")) and not any(parts("must_not")) and enough


def _compare(kind: str, path: str, asked: Any, document: Document, mapper: Mapper) -> bool:
    if path == "_ignored":
        return asked["value"] in document.ignored
    mapping = mapper.fields.get(path)
    if mapping is None:
        return False
    values = document.fields.get(path, [])
    if kind == "range":
        bounds = {name: _asked(path, mapping["type"], bound) for name, bound in asked.items()}
        return any(all(_ORDER[name](value, bound) for name, bound in bounds.items()) for value in values)
    wanted = asked if kind == "terms" else [asked["value"] if isinstance(asked, Mapping) else asked]
    return any(_asked(path, mapping["type"], item) in values for item in wanted)


def _asked(path: str, kind: str, value: Any) -> Any:
    """A value that is asked for, as the field's type has it."""
    if kind == "boolean":
        return value in (True, "true")
    if kind in ("long", "double", "float", "integer"):
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            raise RefusedError(
                400,
                "search_phase_execution_exception",
                f'failed to create query: For input string: "{value}"',
            ) from None
    return str(value).lower() if isinstance(value, bool) else str(value)


def rounded(vector: Any) -> Any:
    """A vector as a graph of int8 numbers has it; those of fewer bits are further off."""
    numbers = np.asarray(vector, np.float64)
    step = np.abs(numbers).max() / 127
    return np.round(numbers / step) * step if step else numbers


def score(vector: Any, query: Any, mapping: Mapping[str, Any]) -> float:
    """The score of a vector, as the manual has it under `similarity`."""
    kind, similarity = mapping["element_type"], mapping["similarity"]
    left, right = np.asarray(vector, np.float64), np.asarray(query, np.float64)
    if kind == "bit":
        bits = np.unpackbits((left.astype(np.int8) ^ right.astype(np.int8)).view(np.uint8))
        return float((len(bits) - bits.sum()) / len(bits))
    dot = float(left @ right)
    if similarity == "l2_norm":
        return float(1 / (1 + ((left - right) ** 2).sum()))
    if similarity == "cosine":
        return float((1 + dot / (np.linalg.norm(left) * np.linalg.norm(right))) / 2)
    if similarity == "dot_product":
        return 0.5 + dot / (32768 * len(left)) if kind == "byte" else (1 + dot) / 2
    return dot + 1 if dot >= 0 else 1 / (1 - dot)
