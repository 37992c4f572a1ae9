"""Pure: from what a source holds and what a target can, the target's schema, the id map and the losses.

Every change that a target would force is decided here and made by the transform phase, before it reaches
the target: what is then staged must come back exactly, or within the tolerance that the store states.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.batch import DOCUMENT, ID, ID_TYPE, METADATA, NAMESPACE
from migration_pipelines.errors import ConfigurationError, DimensionMismatchError
from migration_pipelines.model import (
    APPROXIMATE,
    Capabilities,
    CollectionSchema,
    DType,
    IdKind,
    Loss,
    Metric,
    Plan,
    Profile,
    ValueKind,
    VectorField,
)
from migration_pipelines.store import Store

# Fixed for good: the ids of all migrations that ever mapped one depend on it.
_ID_NAMESPACE = uuid.UUID("6f0c1d1e-5d0f-5e5c-9a41-7f3a3c1b2d10")
_WIDER = {DType.FLOAT16: DType.FLOAT32, DType.INT8: DType.FLOAT32, DType.UINT8: DType.FLOAT32}


class IdStrategy(StrEnum):
    """How the ids of a collection are written; one decision for the whole collection.

    `native`: as they are. `text`: as their text. `uuid5`: as a UUID made from kind and text.
    `namespace-uuid5`: as one made from the namespace too, where one id stands in several of them and the
    target has none. With the last three, and for single ids that a `native` target can't hold, the original
    goes to `_source_id`.
    """

    NATIVE = "native"
    TEXT = "text"
    UUID5 = "uuid5"
    NAMESPACE_UUID5 = "namespace-uuid5"

    @property
    def is_hashed(self) -> bool:
        """Whether every id becomes a UUID."""
        return self in (IdStrategy.UUID5, IdStrategy.NAMESPACE_UUID5)


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────────


def choose_id_strategy(
    kinds: Mapping[str, int] | frozenset[IdKind], target: Capabilities, *, needs_namespace: bool = False
) -> IdStrategy:
    """Return how to write ids of these kinds into a target.

    `needs_namespace`: one id stands in several namespaces, and the target keeps them together.
    """
    if needs_namespace:
        return IdStrategy.NAMESPACE_UUID5
    found = {IdKind(kind) for kind in kinds}
    mixed = len(found) > 1
    if found <= target.id_kinds and (target.mixed_ids or not mixed):
        return IdStrategy.NATIVE
    return IdStrategy.TEXT if IdKind.STR in target.id_kinds and not mixed else IdStrategy.UUID5


def awkward_ids(
    batch: pa.RecordBatch, target: Capabilities, accepts_id: Callable[[str], bool] | None = None
) -> npt.NDArray[np.bool_]:
    """Return bool[n_records]: text ids that the target can't hold for their length or characters.

    `accepts_id` is the target's own, for what its capabilities can't say.
    """
    column = batch.column(ID)
    bad = np.zeros(batch.num_rows, bool)
    if not target.empty_ids:
        bad |= pc.equal(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
    if target.max_id_bytes is not None:
        bad |= pc.greater(pc.binary_length(column), target.max_id_bytes).to_numpy(zero_copy_only=False)
    for refused in target.id_text_refuses:
        bad |= pc.match_substring(column, refused).to_numpy(zero_copy_only=False)
    if accepts_id is not None:
        bad |= np.fromiter((not accepts_id(text) for text in column.to_pylist()), bool, batch.num_rows)
    is_text = pc.equal(batch.column(ID_TYPE), IdKind.STR.value).to_numpy(zero_copy_only=False)
    return np.asarray(bad & is_text)


def hashed_id(text: str, kind: str, namespace: str | None = None) -> uuid.UUID:
    """Return the UUID that stands for a typed id, or for one within its namespace."""
    # A space: no kind has one, so that no id alone gives the same text.
    within = "" if namespace is None else f"{len(namespace)} {namespace}:"
    return uuid.uuid5(_ID_NAMESPACE, f"{within}{kind}:{text}")


def target_ids(
    batch: pa.RecordBatch,
    strategy: IdStrategy,
    target: Capabilities,
    accepts_id: Callable[[str], bool] | None = None,
) -> tuple[pa.Array, pa.Array, npt.NDArray[np.bool_]]:
    """Return the columns `id` and `id_type` for the target, and bool[n_records]: which ids changed.

    With `NAMESPACE_UUID5` the batch has the column `namespace`.
    """
    rows = batch.num_rows
    if strategy is IdStrategy.TEXT:
        return batch.column(ID), batches.constant(IdKind.STR.value, rows), np.ones(rows, bool)
    everything = strategy.is_hashed
    changed = np.ones(rows, bool) if everything else awkward_ids(batch, target, accepts_id)
    if not changed.any():
        return batch.column(ID), batch.column(ID_TYPE), changed
    kind = IdKind.UUID if IdKind.UUID in target.id_kinds and everything else IdKind.STR
    texts, kinds = batch.column(ID).to_pylist(), batch.column(ID_TYPE).to_pylist()
    spaces: list[str | None] = [None] * rows
    if strategy is IdStrategy.NAMESPACE_UUID5:
        spaces = batches.fit_namespaces(batch, wanted=True).column(NAMESPACE).to_pylist()
    for row in np.flatnonzero(changed):
        texts[row], kinds[row] = str(hashed_id(texts[row], kinds[row], spaces[row])), kind.value
    return pa.array(texts, pa.string()), pa.array(kinds, pa.string()), changed


def ids_in_target(batch: pa.RecordBatch, *, plan: Plan, target: Store) -> pa.RecordBatch:
    """Return what names these records of the source in the target: `batch.ids_of` of what is loaded."""
    texts, kinds, _ = target_ids(batch, IdStrategy(plan.id_strategy), target.capabilities, target.accepts_id)
    ids = pa.RecordBatch.from_arrays([texts, kinds], names=[ID, ID_TYPE])
    if not plan.target_schema.has_namespaces:
        return ids
    spaces = batches.fit_namespaces(batch, wanted=True).column(NAMESPACE)
    return ids.append_column(NAMESPACE, spaces)


# ── schema ───────────────────────────────────────────────────────────────────────────────────────────


def keeps_namespaces(source: CollectionSchema, target: Store, existing: CollectionSchema | None) -> bool:
    """Whether the target collection, a new one or the existing one, has namespaces as the source has."""
    if existing is not None:
        return existing.has_namespaces
    return source.has_namespaces and target.capabilities.namespaces and not target.is_bound


def check_namespaces(names: Collection[str], target: Store, *, where: str) -> None:
    """Raise where the target refuses the name of a namespace.

    Raises
    ------
    ConfigurationError
    """
    refused = sorted(name for name in names if not target.accepts_namespace(name))
    if refused:
        shown = ", ".join(repr(name) for name in refused[:5])
        raise ConfigurationError(
            f"{where}: {target.kind} refuses {len(refused)} of {len(names)} names of namespaces: {shown}; "
            "move each by itself into one that it takes, with ?namespace= in both addresses",
            found=refused,
        )


def map_schema(
    source: CollectionSchema,
    target: Store,
    *,
    name: str,
    strategy: IdStrategy,
    metric: Metric | None = None,
) -> CollectionSchema:
    """Return the schema that a new collection in the target gets, before the store adapts it.

    Raises
    ------
    ConfigurationError
        The target has no such metric, and no other was named.
    DimensionMismatchError
        The vectors have more dimensions than the target takes.
    """
    can = target.capabilities
    return CollectionSchema(
        name=name,
        vectors=tuple(
            _map_vector(field, target, name, metric) for field in target.select_vectors(source.vectors)
        ),
        id_kinds=_target_id_kinds(source, can, strategy),
        has_documents=source.has_documents and can.documents,
        has_namespaces=keeps_namespaces(source, target, None),
        properties=source.properties,
        # What only a store itself understands, under its kind: it travels between two of them.
        options={kind: own for kind, own in source.options.items() if kind == target.kind},
    )


def _target_id_kinds(source: CollectionSchema, can: Capabilities, strategy: IdStrategy) -> frozenset[IdKind]:
    if strategy is IdStrategy.NATIVE:
        return source.id_kinds
    uses_uuid = strategy.is_hashed and IdKind.UUID in can.id_kinds
    return frozenset({IdKind.UUID if uses_uuid else IdKind.STR})


def _map_vector(field: VectorField, target: Store, name: str, metric: Metric | None) -> VectorField:
    can = target.capabilities
    chosen = metric or field.metric
    where = target.address(name)
    if chosen is not None and chosen not in can.metrics:
        raise ConfigurationError(
            f"{where}: {target.kind} has no metric {chosen.value}; it has "
            f"{', '.join(sorted(can.metrics))}: name one with --metric",
            expected=sorted(can.metrics),
            found=chosen.value,
        )
    if can.max_dimensions and (field.dimensions or 0) > can.max_dimensions:
        raise DimensionMismatchError(
            f"{where}: the source's vectors have {field.dimensions} dimensions, {target.kind} takes at most "
            f"{can.max_dimensions}",
            expected=can.max_dimensions,
            found=field.dimensions,
        )
    dtype = field.dtype if field.dtype in can.dtypes else _WIDER.get(field.dtype, DType.FLOAT32)
    return field.model_copy(update={"dtype": dtype, "metric": chosen})


def check_existing(mapped: CollectionSchema, existing: CollectionSchema, *, where: str) -> None:
    """Raise where the source's vectors don't fit a target collection that is there already.

    Raises
    ------
    DimensionMismatchError
    """
    found = {field.name: field for field in existing.vectors}
    for field in mapped.vectors:
        other = counterpart(field, mapped, found)
        if other is None:
            raise DimensionMismatchError(
                f"{where} has no vector called {field.name or '(default)'}; it has "
                f"{', '.join(name or '(default)' for name in found) or 'none'}"
            )
        if other.dimensions not in (None, field.dimensions):
            raise DimensionMismatchError(
                f"{where} takes vectors of {other.dimensions} dimensions, the source has {field.dimensions}; "
                "choose another target collection",
                expected=other.dimensions,
                found=field.dimensions,
            )


def counterpart(
    field: VectorField, source: CollectionSchema, kept: Mapping[str, VectorField]
) -> VectorField | None:
    """Return the target's field for one of the source's: of its name, or the only one for the first."""
    if len(kept) != 1:
        found = kept.get(field.name)
        return found if found is not None and found.kind is field.kind else None
    (only,) = kept.values()
    fitting = [other.name for other in source.vectors if other.kind is only.kind]
    chosen = only.name if only.name in fitting else next(iter(fitting), None)
    return only if field.kind is only.kind and field.name == chosen else None


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────


def find_losses(
    source: CollectionSchema,
    target_schema: CollectionSchema,
    profile: Profile,
    target: Store,
    strategy: IdStrategy,
) -> Iterator[Loss]:
    """Yield every change that the target forces on the source's records, counted from the data."""
    yield from _id_losses(profile, strategy)
    yield from _vector_losses(source, target_schema, profile, target)
    yield from _text_losses(source, target_schema, profile, target)
    exact = target.exact_kinds(target_schema)
    for field, kinds in sorted(profile.fields.items()):
        renamed = not target.accepts_key(field)
        for kind, count in sorted(kinds.items()):
            if renamed or kind not in exact:
                what = "the store refuses the field's name" if renamed else f"{target.kind} would change it"
                yield Loss(
                    field=field, kind=kind, count=count, detail=what, kept="_source_extra", accepted=True
                )


def _id_losses(profile: Profile, strategy: IdStrategy) -> Iterator[Loss]:
    count = profile.awkward_ids if strategy is IdStrategy.NATIVE else profile.records
    if count:
        made_from = "id and namespace" if strategy is IdStrategy.NAMESPACE_UUID5 else "id"
        as_text = strategy is IdStrategy.TEXT
        detail = "written as text" if as_text else f"written as a UUID made from the {made_from}"
        yield Loss(field="id", kind="id", count=count, detail=detail, kept="_source_id", accepted=True)


def _vector_losses(
    source: CollectionSchema, target_schema: CollectionSchema, profile: Profile, target: Store
) -> Iterator[Loss]:
    kept = {field.name: field for field in target_schema.vectors}
    for field in source.vectors:
        label = batches.vector_column(field.name)
        mapped = counterpart(field, source, kept)
        if mapped is None:
            detail = f"{target.kind} can't hold this {field.kind.value} vector beside the others"
            yield Loss(field=label, kind="vector-dropped", count=profile.records, detail=detail)
        elif mapped.dtype is not field.dtype:
            yield _dtype_loss(label, field.dtype, mapped.dtype, profile.records)
        if mapped is not None and mapped.metric is not field.metric and field.metric is not None:
            detail = f"searched by {mapped.metric} instead of {field.metric}"
            yield Loss(field=label, kind="metric", count=profile.records, detail=detail)
    approximate = source.options.get(APPROXIMATE)
    if approximate:
        yield Loss(field="vector", kind="approximate-vector", count=profile.records, detail=str(approximate))
    tolerance = target.vector_tolerance(target_schema)
    if tolerance:
        detail = f"comes back within {tolerance:g} of each component, relative"
        yield Loss(field="vector", kind="vector-rounding", count=profile.records, detail=detail)
    for count, kind in (
        (profile.missing_vectors, "missing-vector"),
        (profile.non_finite_vectors, "non-finite-vector"),
    ):
        if count:
            detail = f"{target.kind} refuses it: these records go to the rejects file"
            yield Loss(field="vector", kind=kind, count=count, detail=detail, kept="rejects", accepted=True)


def _dtype_loss(label: str, found: DType, written: DType, count: int) -> Loss:
    exact = written is _WIDER.get(found)
    detail = f"{found} written as {written}" + (", every value exact" if exact else ", rounded")
    return Loss(
        field=label,
        kind="vector-widened" if exact else "vector-rounding",
        count=count,
        detail=detail,
        kept="the value itself" if exact else None,
        accepted=exact,
    )


def _text_losses(
    source: CollectionSchema, target_schema: CollectionSchema, profile: Profile, target: Store
) -> Iterator[Loss]:
    can = target.capabilities
    if profile.refused_documents:
        detail = "characters that the store refuses are left out"
        yield Loss(
            field=DOCUMENT,
            kind="nul-text",
            count=profile.refused_documents,
            detail=detail,
            kept="_source_extra",
            accepted=True,
        )
    if profile.documents and not target_schema.has_documents:
        yield Loss(field=DOCUMENT, kind="document-dropped", count=profile.documents, detail="no documents")
    if source.has_namespaces and not target_schema.has_namespaces and profile.records:
        names = f"{len(profile.namespaces)} namespaces" if len(profile.namespaces) != 1 else "one namespace"
        yield Loss(
            field=NAMESPACE,
            kind="namespace",
            count=profile.records,
            detail=f"{names} in one place",
            kept="_source_namespace",
            accepted=True,
        )
    exact = target.exact_kinds(target_schema)
    if profile.empty_metadata and not (ValueKind.NO_FIELDS.value in exact and can.no_metadata):
        yield Loss(
            field=METADATA,
            kind=ValueKind.NO_FIELDS.value,
            count=profile.empty_metadata,
            detail="an empty object would become no metadata",
            kept="_source_extra",
            accepted=True,
        )
