"""The load phase: one partition into the target; before it, the target made ready, after all, published."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.baseline import forget_baseline
from migration_pipelines.errors import (
    CollectionExistsError,
    CollectionNotFoundError,
    RecordRejectedError,
    TargetNotEmptyError,
    TooManyRejectsError,
)
from migration_pipelines.migration import Migration
from migration_pipelines.model import Plan, Value
from migration_pipelines.sync import claim_added, remove_deleted
from migration_pipelines.transform import require_staged, staged_phase

# A batch of which every single record is refused says that something else is wrong than its records.
_HOPELESS_RECORDS = 100

Write = Callable[[pa.RecordBatch], None]
Call = Callable[[Callable[[], None]], None]  # calls what it is given, with retries or without


class Loaded(Value):
    """What one partition's load did."""

    loaded: int
    rejected: int
    bytes: int
    seconds: float


def prepare(migration: Migration) -> None:
    """Make the target ready for the plan's records: create it, or find it as the plan found it.

    Idempotent and safe to call from several workers.

    Raises
    ------
    TargetNotEmptyError
        Records came into the target since the plan was frozen (G7).
    """
    plan, ledger = migration.plan, migration.ledger
    with ledger.preparing():
        if ledger.is_prepared(plan):
            return
        if plan.on_existing == "replace":
            migration.target.drop(plan.target_collection) if _exists(migration) else None
            migration.target.create(plan.target_schema)
        elif not plan.target_exists:
            _create_empty(migration, plan)
        elif plan.on_existing == "refuse":
            _check_still_empty(migration, plan)
        if plan.changes is None:
            forget_baseline(ledger)  # before the first write: what comes doesn't build on it
        if not plan.target_exists or plan.on_existing == "replace":
            migration.target.begin_load(plan.target_collection)
        ledger.mark_prepared(plan)
    migration.tell("prepared")


def _exists(migration: Migration) -> bool:
    try:
        migration.target.count(migration.plan.target_collection)
    except CollectionNotFoundError:
        return False
    return True


def _create_empty(migration: Migration, plan: Plan) -> None:
    try:
        migration.target.create(plan.target_schema)
    except CollectionExistsError:
        # Ours, from a run that was killed before it could say so; or somebody else's.
        _check_still_empty(migration, plan)


def _check_still_empty(migration: Migration, plan: Plan) -> None:
    found = migration.target.count(plan.target_collection)
    if found:
        raise TargetNotEmptyError(
            f"{plan.target} was empty when the plan was frozen and now holds {found} records: "
            "say --on-existing merge or replace, or choose another target",
            expected=0,
            found=found,
        )


def load(migration: Migration, key: str) -> Loaded:
    """Write one partition's staged batches into the target; idempotent.

    Raises
    ------
    TooManyRejectsError
        Every record of a whole batch was refused.
    """
    with migration.phase("load", key):
        migration.retry(partial(prepare, migration), phase="load", partition=key)
        return _load(migration, key)


def _load(migration: Migration, key: str) -> Loaded:
    started = time.monotonic()
    require_staged(migration, key, staged_phase(migration.plan))
    partition = migration.partition(key)
    skips = migration.plan.on_existing == "skip" and partition.change != "changed"
    if skips and migration.ledger.skipped_ids(key) is None:
        # Before the first write: after it, what this partition wrote looks like what was there.
        skipped = _already_there(migration, key)
        migration.ledger.write_skipped(key, skipped)
        migration.tell("skipped", phase="load", partition=key, records=skipped.num_rows)
    claim_added(migration, partition)
    retry = partial(migration.retry, phase="load", partition=key)
    if migration.target.writes_whole_parts:
        loaded, size, refused, reasons = retry(lambda: _write_part(migration, key, lambda write: write()))
    else:
        loaded, size, refused, reasons = _write_part(migration, key, retry)
    migration.ledger.write_rejects(f"{key}.load", refused, reasons)
    seconds = time.monotonic() - started
    if reasons:
        migration.tell("rejected", phase="load", partition=key, records=len(reasons), message=reasons[0])
    migration.tell("loaded", partition=key, records=loaded, bytes=size, seconds=seconds)
    return Loaded(loaded=loaded, rejected=len(reasons), bytes=size, seconds=seconds)


def _already_there(migration: Migration, key: str) -> pa.RecordBatch:
    """Return which of a partition's ids the target holds."""
    plan, target, config = migration.plan, migration.target, migration.config
    retry = partial(migration.retry, phase="load", partition=key)
    found = []
    for batch in migration.ledger.staged_batches(key, staged_phase(plan)):
        for part in batches.split(batches.ids_of(batch), max_records=config.batch_size, max_bytes=None):
            fetch = partial(target.fetch, plan.target_collection, part, vectors=False)
            found.append(part.filter(batches.is_among(part, batches.ids_of(retry(fetch)))))
    return pa.concat_batches(found) if found else batches.id_batch([])


def _write_part(
    migration: Migration, key: str, call: Call
) -> tuple[int, int, list[pa.RecordBatch], list[str]]:
    """Write a partition; return the records and bytes that went in, and what was refused with the reasons."""
    plan, can = migration.plan, migration.target.capabilities
    staged: Iterable[pa.RecordBatch] = migration.ledger.staged_batches(key, staged_phase(plan))
    skipped = migration.ledger.skipped_ids(key)
    if skipped is not None:
        staged = (batches.without(batch, skipped) for batch in staged)
    whole = batches.rebatch(
        staged,
        max_records=min(migration.config.batch_size, can.max_batch_records or migration.config.batch_size),
        max_bytes=min(
            migration.config.max_batch_bytes, can.max_batch_bytes or migration.config.max_batch_bytes
        ),
    )
    loaded = size = 0
    refused: list[pa.RecordBatch] = []
    reasons: list[str] = []
    with migration.target.load_part(plan.target_collection, key) as write:
        for batch in whole:
            bad, why = _write(call, write, batch)
            if len(why) == batch.num_rows >= _HOPELESS_RECORDS:
                raise TooManyRejectsError(
                    f"{plan.target} refuses every one of {batch.num_rows} records; the first: {why[0]}",
                    rejected=batch.num_rows,
                )
            refused += bad
            reasons += why
            loaded += batch.num_rows - len(why)
            size += batch.nbytes
            migration.tell("batch-loaded", partition=key, records=batch.num_rows, bytes=batch.nbytes)
    return loaded, size, refused, reasons


def _write(call: Call, write: Write, batch: pa.RecordBatch) -> tuple[list[pa.RecordBatch], list[str]]:
    """Write a batch; where the store refuses it, halve it until what is refused is one record."""
    try:
        call(lambda: write(batch))
    except RecordRejectedError as error:
        if batch.num_rows == 1:
            return [batch], [str(error)]
        middle = batch.num_rows // 2
        left = _write(call, write, batch.slice(0, middle))
        right = _write(call, write, batch.slice(middle))
        return left[0] + right[0], left[1] + right[1]
    return [], []


def publish(migration: Migration) -> None:
    """Finish the load when every partition is verified: deletes are applied, indexes built, files published.

    Idempotent. A collection that held records before keeps the indexes that it has.
    """
    plan = migration.plan
    remove_deleted(migration)
    held = plan.target_count and plan.on_existing != "replace"
    if held and not migration.target.merges_at_the_end:
        return
    started = time.monotonic()
    with migration.phase("publish"):
        migration.retry(partial(prepare, migration), phase="publish")
        migration.retry(lambda: migration.target.finish_load(plan.target_collection), phase="publish")
        migration.tell("published", seconds=time.monotonic() - started)
