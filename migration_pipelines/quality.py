"""Data quality: a Great Expectations suite made from what inspect found in the source, run on what arrived.

The records are read back through the target and decoded, so that the expectations speak of the source's
own fields. What is checked are figures drawn from them, never the vectors themselves:

====================  ===================================================================================
`id`, `id_type`       text and kind of the id
`namespace`           where the source has namespaces
`norm`, `dimensions`  of a dense vector, `norm:<name>` of a named one; null where a record has none, and
                      the norm infinite where the vector isn't finite
`document_length`     characters; null where a record has no document
`metadata_fields`     how many there are; null where a record has no metadata
`metadata.<field>`    the kind of the value (`ValueKind`), or the first kind inside it that the source has
                      nowhere in this field; null where the field is absent or null
`new_field`           the first metadata field that the source has nowhere
====================  ===================================================================================

This is a second opinion on the whole, in the terms of who uses the data; that each record is the same is
what the receipts prove.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines import filters
from migration_pipelines.batch import DOCUMENT, ID, ID_TYPE, METADATA, NAMESPACE
from migration_pipelines.envelope import decode
from migration_pipelines.mapping import counterpart, ids_in_target
from migration_pipelines.metadata import load_metadata, value_kind, value_kinds
from migration_pipelines.migration import Migration
from migration_pipelines.model import DType, Plan, Profile, Value, VectorField, VectorKind
from migration_pipelines.store import Store

MAX_FIELDS = 100  # metadata fields with expectations of their own: the most frequent
_SPANS = 500
_BATCH_RECORDS = 2_000
_SHOWN = 20
_UNIT = (0.999, 1.001)
# 1 chance in 10,000 that an expectation on a sample fails though nothing is wrong: 2 * exp(-10).
_SURENESS = 10.0


class Expectation(Value):
    """One expectation: the name of its class in Great Expectations, and what it is told."""

    name: str
    column: str
    arguments: Mapping[str, Any]


class QualityRow(Value):
    """What became of one expectation.

    `observed` is the figure of an expectation on a whole column; those on single values count the
    unexpected ones, and show the first few with the ids of their records.
    """

    expectation: str
    column: str
    success: bool
    observed: Any = None
    unexpected_count: int = 0
    unexpected_percent: float = 0.0
    unexpected_values: tuple[Any, ...] = ()
    unexpected_ids: tuple[str, ...] = ()


class QualityReport(Value):
    """What the suite found in `records` records of the target."""

    success: bool
    records: int
    rows: tuple[QualityRow, ...]


def run_quality(migration: Migration, *, max_records: int = 50_000) -> QualityReport:
    """Run the suite on what arrived in the target; never raises for what it finds.

    Of an incremental migration that is what the last run moved.

    Parameters
    ----------
    max_records
        A collection with more records is sampled: it is divided into 500 spans, and the first part of each
        is read. Of a collection that was merged into another's records only its own are read, by the ids
        that the source has. Ids are then unique within the sample; the receipts prove it of the whole.

    Raises
    ------
    ConfigurationError
        There is no plan yet.
    """
    plan = migration.plan
    columns, spans = migration.config.retry.call(lambda: _read(migration, max_records))
    rejected = sum(receipt.rejected for receipt in migration.ledger.receipts(plan).values())
    rows = _run(build_suite(plan, spans=spans, rejected=rejected), columns)
    return QualityReport(success=all(row.success for row in rows), records=len(columns[ID]), rows=rows)


# ── the suite ────────────────────────────────────────────────────────────────────────────────────────


def build_suite(plan: Plan, *, spans: int | None = None, rejected: int = 0) -> list[Expectation]:
    """Return what is expected of the records that arrived, from what inspect found in the source.

    Parameters
    ----------
    spans
        How many spans a sample was taken from; None where every record is read.
    rejected
        How many of the source's records were set aside, so that they can't be in the target.
    """
    profile = plan.profile
    arrived = profile.records - rejected
    suite = list(_id_expectations(plan))
    if spans is None:
        suite.append(_expectation("ExpectTableRowCountToEqual", value=arrived))
    for vector in _dense_vectors(plan):
        suite += _vector_expectations(vector, profile)
    fields = _checked_fields(profile)
    shares = {f"metadata.{field}": profile.present[field] for field in fields}
    shares["metadata_fields"] = profile.with_metadata
    if plan.target_schema.has_documents:
        shares["document_length"] = profile.documents
    for field in fields:
        kinds = sorted(profile.fields[field])
        suite.append(_expectation("ExpectColumnValuesToBeInSet", f"metadata.{field}", value_set=kinds))
    suite.append(_expectation("ExpectColumnValuesToBeNull", "new_field"))
    for column, count in shares.items() if arrived > 0 else ():
        low, high = share_bounds(count, profile.records, rejected=rejected, spans=spans)
        name = "ExpectColumnProportionOfNonNullValuesToBeBetween"
        suite.append(_expectation(name, column, min_value=low, max_value=high))
    return suite


def _checked_fields(profile: Profile) -> list[str]:
    return sorted(profile.present, key=lambda name: (-profile.present[name], name))[:MAX_FIELDS]


def share_bounds(count: int, records: int, *, rejected: int, spans: int | None) -> tuple[float, float]:
    """Return the least and greatest share of the records that arrived that may have what `count` had.

    Any of the rejected records may have been among them. A sample may be off by what Bernstein's
    inequality allows, each span taken as if all its records were alike, as those of one document are:
    nothing where all or none of the source's records had it, 11 % where half of 500 spans did.
    """
    arrived = records - rejected
    low, high = max(0, count - rejected) / arrived, min(count, arrived) / arrived
    if spans is None:
        return low, high
    return max(0.0, low - _slack(low, spans)), min(1.0, high + _slack(high, spans))


def _slack(share: float, spans: int) -> float:
    variance = share * (1 - share)
    if not variance or not spans:
        return 0.0
    return math.sqrt(2 * variance * _SURENESS / spans) + 2 * _SURENESS / (3 * spans)


def norm_bounds(norms: tuple[float, float]) -> tuple[float, float]:
    """Return the range of norms to expect where a sample of the source had these, least and greatest.

    Unit vectors stay unit vectors within 0.001, more than a rounding to float16 changes. Of others, the
    sample has not seen all: half the least and twice the greatest are as good.
    """
    low, high = norms
    return _UNIT if _UNIT[0] <= low and high <= _UNIT[1] else (low / 2, high * 2)


def _id_expectations(plan: Plan) -> Iterator[Expectation]:
    profile, names = plan.profile, [ID, ID_TYPE]
    yield _expectation("ExpectColumnValuesToNotBeNull", ID)
    yield _expectation("ExpectColumnValuesToBeInSet", ID_TYPE, value_set=sorted(profile.id_kinds))
    if plan.source_schema.has_namespaces:
        names.append(NAMESPACE)
        found = sorted(profile.namespaces)
        yield _expectation("ExpectColumnValuesToBeInSet", NAMESPACE, value_set=found)
    # All that names a record: 1 and "1" are different ids.
    yield _expectation("ExpectCompoundColumnsToBeUnique", column_list=names)


def _vector_expectations(field: VectorField, profile: Profile) -> Iterator[Expectation]:
    norm, dimensions = _vector_names(batches.vector_column(field.name))
    yield _expectation("ExpectColumnValuesToBeInSet", dimensions, value_set=[field.dimensions])
    if profile.norms is not None:
        low, high = norm_bounds(profile.norms)
        # The range is that of a sample, the first records: 1 in 100 may lie outside.
        yield _expectation("ExpectColumnValuesToBeBetween", norm, min_value=low, max_value=high, mostly=0.99)


def _dense_vectors(plan: Plan) -> Iterator[VectorField]:
    """Yield the target's dense vectors with the source's dimensions; bits have neither norm nor width."""
    kept = {field.name: field for field in plan.target_schema.vectors}
    for field in plan.moved_schema.vectors:
        mapped = counterpart(field, plan.moved_schema, kept)
        if mapped is not None and field.kind is VectorKind.DENSE and field.dtype is not DType.BIT:
            yield mapped.model_copy(update={"dimensions": field.dimensions})


def _vector_names(column: str) -> tuple[str, str]:
    suffix = column.removeprefix(batches.VECTOR)
    return f"norm{suffix}", f"dimensions{suffix}"


def _expectation(name: str, column: str = "", **arguments: Any) -> Expectation:
    return Expectation(name=name, column=column, arguments=arguments)


# ── what arrived ─────────────────────────────────────────────────────────────────────────────────────


def _read(migration: Migration, max_records: int) -> tuple[dict[str, list[Any]], int | None]:
    """Return the columns to check, and how many spans they are a sample of; None where they are all."""
    plan = migration.plan
    columns: dict[str, list[Any]] = {name: [] for name in _names(plan)}
    merged = plan.joins
    if merged:
        store, collection, records = migration.source, plan.source_collection, plan.profile.records
    else:
        store, collection = migration.target, plan.target_collection
        records = store.count(collection)
    limit = None if records <= max_records else max_records
    spans = 0
    if plan.changes is not None:
        parts = _changed(migration, limit)
    else:
        parts = _spans(store, collection, limit=limit, vectors=not merged)
    for found in parts:
        spans += 1
        for batch in found:
            arrived = _fetch_merged(migration, decode(batch)) if merged else batch
            for name, values in _figures(decode(arrived), plan.profile):
                if name in columns:
                    columns[name] += values
    return columns, None if limit is None else spans


def _changed(migration: Migration, limit: int | None) -> Iterator[Iterator[pa.RecordBatch]]:
    """Yield the batches of what changed, by partition, from the source; at most about `limit` records."""
    source, plan = migration.source, migration.plan
    share = 1.0 if limit is None else limit / plan.profile.records
    for partition in plan.partitions:
        ids = migration.span_ids(partition)
        assert ids is not None
        first = ids.slice(0, math.ceil(ids.num_rows * share))
        yield source.fetch_all(plan.source_collection, first, batch_records=_BATCH_RECORDS, vectors=False)


def _spans(
    store: Store, collection: str, *, limit: int | None, vectors: bool
) -> Iterator[Iterator[pa.RecordBatch]]:
    """Yield the batches of each span: all of them, or the first part of each, `limit` records in all."""
    records = max(1, store.count(collection))
    span_records = 50_000 if limit is None else max(1, records // _SPANS)
    seen = taken = 0
    for span, ids in store.split(collection, span_records=span_records):
        seen += span.records
        quota = span.records if limit is None else round(seen * limit / records) - taken
        if limit is not None and quota <= 0:
            continue
        size = max(1, min(quota, _BATCH_RECORDS))
        found = store.scan(collection, span, ids=ids, batch_records=size, vectors=vectors)
        yield found if limit is None else _first(found, quota)
        taken += quota


def _first(found: Iterator[pa.RecordBatch], records: int) -> Iterator[pa.RecordBatch]:
    for batch in found:
        yield batch.slice(0, records)
        records -= batch.num_rows
        if records <= 0:
            return


def _fetch_merged(migration: Migration, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return what the target holds of the source's records that are in scope."""
    plan, target = migration.plan, migration.target
    if migration.where is not None:
        batch = batch.filter(filters.mask(migration.where, batch))
    ids = ids_in_target(migration.mapped(batch), plan=plan, target=target)
    return target.fetch(plan.target_collection, ids)


def _names(plan: Plan) -> list[str]:
    vectors = [_vector_names(batches.vector_column(field.name)) for field in _dense_vectors(plan)]
    named = [name for pair in vectors for name in pair]
    fields = [f"metadata.{field}" for field in _checked_fields(plan.profile)]
    spaces = [NAMESPACE] if plan.source_schema.has_namespaces else []
    return [ID, ID_TYPE, *spaces, *named, "document_length", "metadata_fields", "new_field", *fields]


def _figures(batch: pa.RecordBatch, profile: Profile) -> Iterator[tuple[str, list[Any]]]:
    """Yield the columns to check of one batch."""
    yield ID, batch.column(ID).to_pylist()
    yield ID_TYPE, batch.column(ID_TYPE).to_pylist()
    yield NAMESPACE, batches.fit_namespaces(batch, wanted=True).column(NAMESPACE).to_pylist()
    yield "document_length", pc.utf8_length(batch.column(DOCUMENT)).to_pylist()
    for name in batches.vector_columns(batch.schema):
        if batches.is_dense(batch.column(name)):
            norm, dimensions = _vector_names(name)
            missing, norms, width = _norms(batch.column(name))
            yield norm, [None if gone else value for gone, value in zip(missing, norms, strict=True)]
            yield dimensions, [None if gone else width for gone in missing]
    texts = batch.column(METADATA).to_pylist()
    records = [None if text is None else load_metadata(text) for text in texts]
    yield "metadata_fields", [None if record is None else len(record) for record in records]
    yield (
        "new_field",
        [next((key for key in record or () if key not in profile.fields), None) for record in records],
    )
    for field in _checked_fields(profile):
        known = profile.fields[field]
        yield f"metadata.{field}", [_kind((record or {}).get(field), known) for record in records]


def _norms(column: pa.Array) -> tuple[list[bool], list[float], int]:
    """Return of dense vectors: which are missing, the norms (infinite where not finite), the dimensions."""
    matrix = batches.dense_matrix(column).astype(np.float64)
    norms = np.linalg.norm(matrix, axis=1)
    norms[~np.isfinite(norms)] = np.inf
    return np.asarray(column.is_null()).tolist(), norms.tolist(), matrix.shape[1]


def _kind(value: Any, known: Container[str]) -> str | None:
    if value is None:
        return None
    return next((kind.value for kind in value_kinds(value) if kind not in known), value_kind(value).value)


# ── Great Expectations ───────────────────────────────────────────────────────────────────────────────


def _run(suite: list[Expectation], columns: Mapping[str, list[Any]]) -> tuple[QualityRow, ...]:
    """Run a suite; returns its rows in the suite's order."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read on import: nothing may be sent anywhere
    with _quietly():
        import great_expectations as gx
        import pandas as pd
        from great_expectations.data_context.types.base import ProgressBarsConfig

        # As objects: pandas would make integers with gaps, and columns without a value, into doubles.
        frame = pd.DataFrame(
            {name: pd.Series(values, dtype=_dtype(name)) for name, values in columns.items()}
        )
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        asset = context.data_sources.add_pandas("target").add_dataframe_asset("arrived")
        batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
        result = batch.validate(
            gx.ExpectationSuite(
                name="arrived as it was",
                expectations=[_build(gx.expectations, item, position) for position, item in enumerate(suite)],
            ),
            result_format={
                "result_format": "SUMMARY",
                "partial_unexpected_count": _SHOWN,
                "unexpected_index_column_names": [ID],
            },
        )
    outcomes: list[Any] = result.results
    found = {outcome.expectation_config.meta["position"]: outcome for outcome in outcomes}
    return tuple(_row(item, found[position]) for position, item in enumerate(suite))


def _dtype(name: str) -> str:
    return "float64" if name.partition(":")[0] == "norm" else "object"


def _build(expectations: Any, item: Expectation, position: int) -> Any:
    column = {"column": item.column} if item.column else {}
    return getattr(expectations, item.name)(**column, **item.arguments, meta={"position": position})


def _row(item: Expectation, outcome: Any) -> QualityRow:
    found = outcome.result
    failure = outcome.exception_info.get("exception_message")
    records = found.get("partial_unexpected_index_list") or ()
    return QualityRow(
        expectation=item.name,
        column=item.column,
        success=bool(outcome.success),
        observed=_plain(failure or found.get("observed_value")),
        unexpected_count=found.get("unexpected_count") or 0,
        unexpected_percent=found.get("unexpected_percent") or 0.0,
        unexpected_values=tuple(map(_plain, found.get("partial_unexpected_list") or ())),
        unexpected_ids=tuple(str(record[ID]) for record in records),
    )


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the warnings and log lines of Great Expectations off the terminal."""
    log, nowhere = logging.getLogger("great_expectations"), logging.NullHandler()
    propagates = log.propagate
    log.addHandler(nowhere)  # without any, Python would print warnings by itself
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.propagate = propagates
        log.removeHandler(nowhere)
