"""The transform phase: batches as the target will hold them; skipped where nothing changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.batch import DOCUMENT, ID, ID_TYPE, METADATA, NAMESPACE
from migration_pipelines.envelope import encode_metadata
from migration_pipelines.errors import ConfigurationError, StagingCorruptError
from migration_pipelines.ledger import Staged
from migration_pipelines.mapping import IdStrategy, counterpart, target_ids
from migration_pipelines.metadata import dump_metadata, load_metadata
from migration_pipelines.migration import Migration
from migration_pipelines.model import Capabilities, DType, Plan, VectorField, VectorKind
from migration_pipelines.schema_mapping import SchemaMapping
from migration_pipelines.store import Store

EXTRACTED = "extracted"
TRANSFORMED = "transformed"


def transform(migration: Migration, key: str) -> Staged:
    """Make one partition's staged batches fit the target; what can't fit goes to the rejects file.

    Idempotent. Where the plan changes nothing, the extracted batches stand as they are.
    """
    ledger, plan = migration.ledger, migration.plan
    extracted = require_staged(migration, key, EXTRACTED)
    if is_identity(plan):
        return extracted
    if done := ledger.staged(key, TRANSFORMED):
        return done
    with migration.phase("transform", key):
        return _transform(migration, key, extracted)


def _transform(migration: Migration, key: str, extracted: Staged) -> Staged:
    ledger, plan = migration.ledger, migration.plan
    started = time.monotonic()
    refused: list[pa.RecordBatch] = []
    reasons: list[str] = []
    schema = batches.arrow_schema(plan.target_schema)

    def transformed() -> Iterator[pa.RecordBatch]:
        for batch in ledger.staged_batches(key, EXTRACTED):
            # A function that embeds may ask a service, which is away for a moment.
            fit, unfit, why = migration.retry(
                partial(set_aside, batch, migration.target.capabilities, migration.mapping),
                phase="transform",
                partition=key,
            )
            if unfit is not None:
                refused.append(unfit)
                reasons.extend(why)
            if fit.num_rows:
                yield transform_batch(fit, plan=plan, target=migration.target)

    def describe(checksum: str) -> Staged:
        return extracted.model_copy(
            update={
                "checksum": checksum,
                "rejected": len(reasons),
                "records": extracted.records - len(reasons),
                "seconds": time.monotonic() - started,
            }
        )

    result = ledger.stage(key, TRANSFORMED, schema, transformed(), describe)
    ledger.write_rejects(f"{key}.transform", refused, reasons)
    if reasons:
        migration.tell("rejected", phase="transform", partition=key, records=len(reasons), message=reasons[0])
    migration.tell(
        "transformed", partition=key, records=result.records, bytes=result.bytes, seconds=result.seconds
    )
    return result


def require_staged(migration: Migration, key: str, phase: str) -> Staged:
    """Return what a phase staged of a partition.

    Raises
    ------
    StagingCorruptError
        Nothing is staged, or it fails its checksum: the phase must be run again.
    """
    staged = migration.ledger.staged(key, phase)
    if staged is None:
        raise StagingCorruptError(
            f"{migration.ledger.folder}: partition {key} has nothing {phase} that is whole; "
            "run it again from extract",
            partition=key,
        )
    return staged


def staged_phase(plan: Plan) -> str:
    """Return the phase whose staged batches are loaded: the last one that has anything to do."""
    return EXTRACTED if is_identity(plan) else TRANSFORMED


def is_identity(plan: Plan) -> bool:
    """Whether the target holds the source's batches as they are."""
    profile = plan.profile
    return (
        plan.mapped_schema is None
        and not plan.encodes
        and plan.id_strategy == IdStrategy.NATIVE
        and not profile.missing_vectors
        and not profile.non_finite_vectors
        and batches.arrow_schema(plan.source_schema) == batches.arrow_schema(plan.target_schema)
    )


def set_aside(
    batch: pa.RecordBatch, can: Capabilities, mapping: SchemaMapping | None = None
) -> tuple[pa.RecordBatch, pa.RecordBatch | None, list[str]]:
    """Return the records that can fit the target, mapped; those that can't, as they were; and why not."""
    moved, rows, reasons = batch, np.arange(batch.num_rows), dict[int, str]()
    if mapping is not None:
        mapped = mapping.apply(batch)
        moved, rows, reasons = mapped.batch, mapped.rows, dict(mapped.refused)
    refused = refused_rows(moved, can)
    reasons |= {int(rows[row]): why for row, why in refused.items()}
    if not reasons:
        return moved, None, []
    fits = np.ones(moved.num_rows, bool)
    fits[list(refused)] = False
    unfit = sorted(reasons)
    return moved.filter(pa.array(fits)), batch.take(pa.array(unfit)), [reasons[row] for row in unfit]


def refused_rows(batch: pa.RecordBatch, can: Capabilities) -> dict[int, str]:
    """Return the reason by row of each record that no mapping can make fit the target."""
    reasons: dict[int, str] = {}
    for name in batches.vector_columns(batch.schema):
        column = batch.column(name)
        if not can.missing_vectors and column.null_count:
            reasons |= dict.fromkeys(_rows(column.is_null()), f"{name}: the record has no vector")
        if not can.non_finite_vectors:
            bad = batches.non_finite_rows(column)
            reasons |= dict.fromkeys(_rows(bad), f"{name}: the vector holds NaN or an infinity")
    return reasons


def transform_batch(batch: pa.RecordBatch, *, plan: Plan, target: Store) -> pa.RecordBatch:
    """Return a batch as the target will hold it."""
    can = target.capabilities
    ids, kinds, changed = target_ids(batch, IdStrategy(plan.id_strategy), can, target.accepts_id)
    documents, cut = _documents(batch, can)
    columns: dict[str, Any] = {ID: ids, ID_TYPE: kinds, DOCUMENT: documents}
    columns |= _vectors(batch, plan)
    columns[METADATA] = batch.column(METADATA)
    if plan.encodes:
        columns[METADATA] = _encode_rows(batch, plan, target, changed=changed, cut=cut)
    schema = batches.arrow_schema(plan.target_schema)
    if NAMESPACE in schema.names:
        columns[NAMESPACE] = batches.fit_namespaces(batch, wanted=True).column(NAMESPACE)
    arrays = [columns.get(item.name, pa.nulls(batch.num_rows, item.type)) for item in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _vectors(batch: pa.RecordBatch, plan: Plan) -> dict[str, pa.Array]:
    kept = {field.name: field for field in plan.target_schema.vectors}
    columns = {}
    for field in plan.moved_schema.vectors:
        mapped = counterpart(field, plan.moved_schema, kept)
        if mapped is not None:
            column = batch.column(batches.vector_column(field.name))
            columns[batches.vector_column(mapped.name)] = _cast(column, mapped)
    return columns


def _cast(column: pa.Array, field: VectorField) -> pa.Array:
    wanted = batches.vector_type(field)
    if column.type == wanted:
        return column
    if field.kind is not VectorKind.DENSE or field.dtype is DType.BIT:
        raise ConfigurationError(f"vectors of {column.type} can't be written as {wanted}")
    matrix = batches.dense_matrix(column).astype(field.dtype.value)
    missing = np.asarray(column.is_null()) if column.null_count else None
    return batches.dense_vectors(np.ascontiguousarray(matrix), missing=missing)


def _documents(batch: pa.RecordBatch, can: Capabilities) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """Return the documents without the characters that the target refuses, and which ones were cut."""
    column = batch.column(DOCUMENT)
    cut = np.zeros(batch.num_rows, bool)
    for character in can.document_refuses:
        found = pc.match_substring(column, character).fill_null(fill_value=False)
        cut |= found.to_numpy(zero_copy_only=False)
        if pc.any(found).as_py():
            column = pc.replace_substring(column, character, "")
    return column, cut


def _encode_rows(
    batch: pa.RecordBatch,
    plan: Plan,
    target: Store,
    *,
    changed: npt.NDArray[np.bool_],
    cut: npt.NDArray[np.bool_],
) -> pa.Array:
    exact, holds_none = target.exact_kinds(plan.target_schema), target.capabilities.no_metadata
    texts, kinds = batch.column(ID).to_pylist(), batch.column(ID_TYPE).to_pylist()
    documents = batch.column(DOCUMENT).to_pylist()
    spaces: list[str | None] = [None] * batch.num_rows
    if plan.source_schema.has_namespaces and not plan.target_schema.has_namespaces:
        spaces = batch.column(NAMESPACE).to_pylist()
    encoded: list[str | None] = []
    for row, text in enumerate(batch.column(METADATA).to_pylist()):
        metadata = encode_metadata(
            None if text is None else load_metadata(text),
            exact=exact,
            accepts_key=target.accepts_key,
            holds_none=holds_none,
            source_id=(texts[row], kinds[row]) if changed[row] else None,
            document=documents[row] if cut[row] else None,
            namespace=spaces[row],
        )
        encoded.append(None if metadata is None else dump_metadata(metadata))
    return pa.array(encoded, pa.string())


def _rows(flags: Any) -> list[int]:
    return [int(row) for row in np.flatnonzero(np.asarray(flags))]
