"""Qdrant's settings of a collection, as it answers with them and as it takes them, and our words for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from migration_pipelines.errors import ConfigurationError
from migration_pipelines.model import CollectionSchema, DType, IdKind, Metric, VectorField, VectorKind

OPTIONS = "qdrant"  # where in a schema's options ours lie
_METRICS = {
    "Cosine": Metric.COSINE,
    "Dot": Metric.DOT,
    "Euclid": Metric.EUCLIDEAN,
    "Manhattan": Metric.MANHATTAN,
}
_DISTANCES = {metric: distance for distance, metric in _METRICS.items()}
# What a vector's own settings say that is in our fields already.
_OURS = frozenset({"size", "distance", "datatype"})
# Settings of `params`, and of the rest of the configuration, that a new collection takes under the same name.
_PARAMS = (
    *("shard_number", "sharding_method", "replication_factor", "write_consistency_factor"),
    *("read_fan_out_factor", "on_disk_payload"),
)
_SETTINGS = ("hnsw_config", "wal_config", "quantization_config", "strict_mode_config")
# Read on its own; not among what create takes.
SHARD_KEYS = "shard_keys"
PAYLOAD_SCHEMA = "payload_schema"

# An optimizer's threshold, in kB, that no collection reaches, added to the declared one while a load runs: to
# take it away again needs no memory of what was declared, in this process or after a crash.
_OUT_OF_REACH = 10**12
_USUAL_THRESHOLD = 20_000  # kB; what Qdrant documents where none is declared


def schema_of(name: str, info: Mapping[str, Any], shard_keys: list[Any] | None = None) -> CollectionSchema:
    """Return what a collection is made of, from the answer to `GET /collections/{name}`."""
    config = info["config"]
    params = config["params"]
    dense, sparse = vector_params(params), dict(params.get("sparse_vectors") or {})
    hnsw = config.get("hnsw_config") or {}
    options: dict[str, Any] = {key: params[key] for key in _PARAMS if params.get(key) is not None}
    options |= {key: _present(config[key]) for key in _SETTINGS if config.get(key)}
    optimizers = _present(config.get("optimizer_config") or {})
    if "indexing_threshold" in optimizers:
        optimizers["indexing_threshold"] = declared_threshold(optimizers["indexing_threshold"])
    own = {key: _own(vector) for key, vector in dense.items()} | {
        key: _present(vector or {}) for key, vector in sparse.items()
    }
    options |= {
        key: value
        for key, value in (
            ("optimizers_config", optimizers),
            ("vectors", {key: settings for key, settings in own.items() if settings}),
            (PAYLOAD_SCHEMA, payload_schema(info)),
            (SHARD_KEYS, shard_keys),
        )
        if value
    }
    return CollectionSchema(
        name=name,
        vectors=(
            *(_dense_field(key, vector, hnsw) for key, vector in dense.items()),
            *(_sparse_field(key) for key in sparse),
        ),
        id_kinds=frozenset({IdKind.INT, IdKind.UUID}),
        properties=dict(config.get("metadata") or {}),
        options={OPTIONS: options} if options else {},
    )


def vector_params(params: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the settings of each dense vector or multivector by name; the unnamed one is ""."""
    vectors = params.get("vectors") or {}
    is_unnamed = not isinstance(vectors.get("size", {}), Mapping)  # a vector may well be called "size"
    return {"": vectors} if is_unnamed else dict(vectors)


def _dense_field(name: str, vector: Mapping[str, Any], hnsw: Mapping[str, Any]) -> VectorField:
    built = {**hnsw, **_present(vector.get("hnsw_config") or {})}
    index = {"type": "hnsw", "m": built.get("m"), "ef_construction": built.get("ef_construct")}
    return VectorField(
        name=name,
        kind=VectorKind.MULTI if vector.get("multivector_config") else VectorKind.DENSE,
        dtype=DType(vector.get("datatype") or DType.FLOAT32),
        dimensions=vector["size"],
        metric=_METRICS[vector["distance"]],
        index=_present(index) if hnsw or vector.get("hnsw_config") else {},
    )


def _sparse_field(name: str) -> VectorField:
    return VectorField(name=name, kind=VectorKind.SPARSE, dimensions=None, metric=Metric.DOT)


def _own(vector: Mapping[str, Any]) -> dict[str, Any]:
    """Return a vector's settings that have no word of ours."""
    return {key: value for key, value in _present(vector).items() if key not in _OURS}


def _present(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are set, inside one another too."""
    kept = {key: _present(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    return {key: value for key, value in kept.items() if value not in (None, {})}


def payload_schema(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the payload's indexes by field, each as `PUT /collections/{name}/index` takes it."""
    found = info.get("payload_schema") or {}
    return {key: _present(index.get("params") or {}) or index["data_type"] for key, index in found.items()}


# ── creating ─────────────────────────────────────────────────────────────────────────────────────────


def creation(schema: CollectionSchema, *, where: str) -> dict[str, Any]:
    """Return the body of `PUT /collections/{name}`: what the schema says and carries of Qdrant's own.

    Raises
    ------
    ConfigurationError
        Qdrant has no such vectors.
    """
    options = dict(schema.options.get(OPTIONS, {}))
    own, body = options.pop("vectors", {}), {}
    dense = {
        field.name: _dense_params(field, own.get(field.name, {}), where=where)
        for field in schema.vectors
        if field.kind is not VectorKind.SPARSE
    }
    sparse = {
        field.name: own.get(field.name, {}) for field in schema.vectors if field.kind is VectorKind.SPARSE
    }
    if "" in sparse:
        raise ConfigurationError(f"{where}: a sparse vector of Qdrant's needs a name; give it one")
    body["vectors"] = dense[""] if list(dense) == [""] else dense
    if sparse:
        body["sparse_vectors"] = sparse
    if schema.properties:
        body["metadata"] = dict(schema.properties)
    return body | {key: value for key, value in options.items() if key not in (SHARD_KEYS, PAYLOAD_SCHEMA)}


def _dense_params(field: VectorField, own: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    if field.dimensions is None:
        raise ConfigurationError(
            f"{where}: Qdrant needs the dimensions of vector {field.name or '(default)'}, and the source, "
            "which has no record yet, doesn't say them; run again once it has one"
        )
    distance = _DISTANCES.get(field.metric or Metric.EUCLIDEAN)
    if distance is None:
        raise ConfigurationError(
            f"{where}: Qdrant has no metric {field.metric}; choose one of {sorted(_DISTANCES)}",
            expected=sorted(_DISTANCES),
            found=field.metric,
        )
    params = {"size": field.dimensions, "distance": distance, **own}
    if field.dtype is not DType.FLOAT32:
        params["datatype"] = field.dtype.value
    if field.kind is VectorKind.MULTI:
        params.setdefault("multivector_config", {"comparator": "max_sim"})
    if field.index.get("type") == "hnsw":
        words = {"m": field.index.get("m"), "ef_construct": field.index.get("ef_construction")}
        params["hnsw_config"] = {**own.get("hnsw_config", {}), **_present(words)}
        if not params["hnsw_config"]:
            del params["hnsw_config"]
    return params


# ── indexing after the load ──────────────────────────────────────────────────────────────────────────


def paused_threshold(info: Mapping[str, Any]) -> int | None:
    """Return the threshold that keeps a collection from being indexed; None where nothing changes."""
    found = (info["config"].get("optimizer_config") or {}).get("indexing_threshold")
    found = _USUAL_THRESHOLD if found is None else found
    return None if found == 0 or found >= _OUT_OF_REACH else found + _OUT_OF_REACH


def resumed_threshold(info: Mapping[str, Any]) -> int | None:
    """Return the threshold that was declared; None where it is in force."""
    found = (info["config"].get("optimizer_config") or {}).get("indexing_threshold") or 0
    return found - _OUT_OF_REACH if found >= _OUT_OF_REACH else None


def declared_threshold(found: int) -> int:
    """Return the threshold that was declared, whether or not a load keeps it out of reach."""
    return found - _OUT_OF_REACH if found >= _OUT_OF_REACH else found
