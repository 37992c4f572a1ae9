"""What an index is made of, and what makes one.

An index has one dense field, one sparse field or both, under two fixed names. What it has no place for, the
name of the sparse field and whether a new index is to have namespaces, is kept in its tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from migration_pipelines.errors import ConfigurationError, UnsupportedOperationError
from migration_pipelines.model import CollectionSchema, IdKind, Metric, VectorField, VectorKind

METRICS = {"cosine": Metric.COSINE, "euclidean": Metric.EUCLIDEAN, "dotproduct": Metric.DOT}
_WORDS = {metric: word for word, metric in METRICS.items()}
DENSE, SPARSE = "_values", "_sparse_values"  # reserved by the service: the fields of its vectors API
_NAMESPACES_TAG, _SPARSE_TAG = "migration-namespaces", "migration-sparse-field"
_OWN_TAGS = frozenset({_NAMESPACES_TAG, _SPARSE_TAG})
_TAG_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_MAX_TAGS, _MAX_TAG_TEXT = 20, 120
_UNNAMED_SPARSE = "sparse"


def vector_fields(
    model: Any, *, dimensions: int | None, undeclared_sparse: bool, where: str
) -> tuple[VectorField, ...]:
    """Return the vector fields of an index.

    Parameters
    ----------
    model
        pinecone's `IndexModel`.
    dimensions
        What the index itself says of its dense vectors, for an index that makes its own embeddings.
    undeclared_sparse
        Whether records hold sparse vectors that an index of an older API doesn't declare.

    Raises
    ------
    UnsupportedOperationError
        Its records aren't those of the vectors API.
    """
    fields = model.schema.fields
    kinds = {name: type(field).__name__ for name, field in fields.items()}
    found: list[VectorField] = []
    if DENSE in fields:
        found.append(VectorField(dimensions=fields[DENSE].dimension, metric=METRICS[fields[DENSE].metric]))
    elif "SemanticTextField" in kinds.values():
        (name,) = (name for name, kind in kinds.items() if kind == "SemanticTextField")
        metric = METRICS[fields[name].metric or "cosine"]
        found.append(VectorField(dimensions=dimensions, metric=metric))
    if SPARSE in fields or undeclared_sparse:
        name = tags_of(model).get(_SPARSE_TAG, _UNNAMED_SPARSE) if found else ""
        found.append(VectorField(name=name, kind=VectorKind.SPARSE, dimensions=None, metric=Metric.DOT))
    if not found:
        raise UnsupportedOperationError(
            f"{where} is a document index, with the fields {sorted(fields)}: only the records of Pinecone's "
            "vectors API can be moved",
            found=sorted(fields),
        )
    return tuple(found)


def check_deployment(model: Any, *, where: str) -> None:
    """Raise where the ids of an index can't be listed.

    Raises
    ------
    UnsupportedOperationError
    """
    if type(model.deployment).__name__ == "PodDeployment":
        raise UnsupportedOperationError(
            f"{where} is a pod-based index, which can't list its ids: let Pinecone migrate it to a "
            "serverless one first"
        )


def schema_of(model: Any, vectors: Sequence[VectorField], *, has_namespaces: bool) -> CollectionSchema:
    """Return what a collection is made of."""
    deployment = model.deployment
    options = {key: getattr(deployment, key) for key in ("cloud", "region") if getattr(deployment, key, None)}
    tags = tags_of(model)
    return CollectionSchema(
        name=model.name,
        vectors=tuple(vectors),
        id_kinds=frozenset({IdKind.STR}),
        has_namespaces=has_namespaces,
        properties={key: value for key, value in tags.items() if key not in _OWN_TAGS},
        options=options,
    )


def is_made_for_namespaces(model: Any) -> bool:
    """Whether an index was created to have namespaces, even while all its records are in the default one."""
    return _NAMESPACES_TAG in tags_of(model)


def tags_of(model: Any) -> dict[str, str]:
    """Return the tags of an index."""
    return dict(model.tags or {})


def creation_options(schema: CollectionSchema, *, where: str) -> dict[str, Any]:
    """Return the index's fields and tags, as `indexes.create` takes them.

    Raises
    ------
    ConfigurationError
        The service has no such index.
    """
    fields: dict[str, Any] = {}
    tags = dict(schema.properties)
    for vector in schema.vectors:
        if vector.kind is VectorKind.SPARSE:
            fields[SPARSE] = {"type": "sparse_vector"}
            if vector.name not in ("", _UNNAMED_SPARSE):
                tags[_SPARSE_TAG] = vector.name
        elif vector.dimensions is None:
            raise ConfigurationError(f"{where}: a Pinecone index needs to know its vectors' dimensions")
        else:
            metric = _WORDS.get(vector.metric or Metric.COSINE)
            if metric is None:
                raise ConfigurationError(
                    f"{where}: Pinecone has no metric {vector.metric}; choose one of {sorted(_WORDS)}"
                )
            fields[DENSE] = {"type": "dense_vector", "dimension": vector.dimensions, "metric": metric}
    if not fields or len(fields) != len(schema.vectors):
        raise ConfigurationError(
            f"{where}: a Pinecone index holds one dense vector a record, one sparse vector, or both; found "
            f"{[(field.name, field.kind.value) for field in schema.vectors]}"
        )
    if schema.has_namespaces:
        tags[_NAMESPACES_TAG] = "true"
    if refused := sorted(key for key, value in tags.items() if not is_tag(key, value)):
        raise ConfigurationError(f"{where}: Pinecone can't hold the tags {refused}")
    return {"schema": {"fields": fields}, **({"tags": tags} if tags else {})}


def is_tag(key: str, value: Any) -> bool:
    """Whether an index can have this tag."""
    fits = isinstance(value, str) and len(value) <= _MAX_TAG_TEXT and value.isascii() and value.isprintable()
    return fits and _TAG_KEY.fullmatch(key) is not None


def as_tags(properties: Mapping[str, Any]) -> dict[str, str]:
    """Return those properties of a collection that tags can hold, what isn't text as JSON."""
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in properties.items()
        if key not in _OWN_TAGS
    }
    fitting = [(key, text) for key, text in sorted(texts.items()) if is_tag(key, text)]
    return dict(fitting[: _MAX_TAGS - len(_OWN_TAGS)])
