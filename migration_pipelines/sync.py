"""The sync phase: a migration that moves only what changed since the last complete run.

What changed is found by reading the source whole and comparing the digest of every record with the baseline;
or, where a field is named that grows with every change, by reading only records that may be newer than the
last run's, and the ids of all. The target isn't read: what complete runs left there is taken as proven.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines import filters
from migration_pipelines.baseline import (
    Baseline,
    baseline_rows,
    keep_baseline,
    read_baseline,
    undigested,
)
from migration_pipelines.batch import ID, ID_TYPE
from migration_pipelines.buckets import (
    N_BUCKETS,
    SUMMARY,
    Buckets,
    keys,
    names_of,
    one_batch,
    stored_ids,
    summary,
    without,
)
from migration_pipelines.envelope import decode
from migration_pipelines.errors import UnsupportedOperationError, VerificationError
from migration_pipelines.inspect import DistinctIds
from migration_pipelines.ledger import NAMES, SUMMED_UP, Ledger
from migration_pipelines.mapping import ids_in_target
from migration_pipelines.migration import Migration
from migration_pipelines.model import Changes, IdKind, Partition, Plan, Receipt, Span
from migration_pipelines.watermark import greatest, not_older

_ON_EXISTING = {"refuse": "add", "replace": "merge"}  # what was moved before is no stranger's


# ── what changed ─────────────────────────────────────────────────────────────────────────────────────


def baseline_of(migration: Migration) -> Baseline | None:
    """Return the baseline that an incremental run builds on; None where everything is new.

    Raises
    ------
    UnsupportedOperationError
        The migration makes ids of its own from what records hold.
    """
    config = migration.config
    if not config.incremental:
        return None
    if config.schema_mapping is not None and config.schema_mapping.id_from is not None:
        raise UnsupportedOperationError(
            "incremental migration needs the source's own ids, and the schema mapping makes others "
            "(id_from): leave incremental or id_from out",
            operation="incremental",
        )
    frozen = config.frozen_part()
    found = read_baseline(migration.history)
    return found if found is not None and found.is_of(frozen["source"], frozen["target"]) else None


def is_done(migration: Migration, plan: Plan) -> bool:
    """Whether a plan is complete, so that an incremental run asks what changed since."""
    found = read_baseline(migration.ledger)
    return found is not None and found.generation == plan.generation


def on_existing(asked: str) -> str:
    """Return what an incremental run does with records that the target holds and no earlier run moved."""
    return _ON_EXISTING.get(asked, asked)


class SourceChanges:
    """The source, summed up record by record, beside the baseline; bucket by bucket.

    `id_kinds` are those of all records in scope and of the baseline's; `repeated_ids` counts records in scope
    whose id stands in another namespace too.
    """

    def __init__(self, ledger: Ledger, rows: Buckets, claims: Buckets, *, all_differ: bool) -> None:
        self._ledger, self._rows, self._claims, self._all_differ = ledger, rows, claims, all_differ
        distinct, kinds = DistinctIds(), set[str]()
        self.records = 0
        for bucket in range(N_BUCKETS):
            here = self._here(bucket)
            self.records += len(here)
            for table in (here, self._known(bucket)):
                kinds |= set(pc.unique(table[ID_TYPE]).to_pylist())
            for batch in here.to_batches():
                distinct.add(names_of(batch))
        self.id_kinds = frozenset(map(IdKind, kinds))
        self.repeated_ids = distinct.count() - distinct.count(namespaces=False)

    def _here(self, bucket: int) -> pa.Table:
        """Return the rows of the records in scope, each once: as it was read whole, where it was."""
        rows = self._rows.read(bucket)
        whole = rows.filter(rows["digest"].is_valid())
        if len(whole) == len(rows):
            return rows
        return pa.concat_tables([whole, without(rows.filter(rows["digest"].is_null()), whole)])

    def _known(self, bucket: int) -> pa.Table:
        """Return the rows of what was moved and, without digests, of what was only claimed."""
        kept, claimed = baseline_rows(self._ledger, bucket), self._claims.read(bucket)
        return pa.concat_tables([kept, without(claimed, kept)])

    def new(self, bucket: int) -> pa.Table:
        """Return the rows of records that no complete run has moved and none has claimed."""
        return without(self._here(bucket), self._known(bucket))

    def changed(self, bucket: int) -> pa.Table:
        """Return the rows of records that differ from what was moved."""
        rows, before = self._here(bucket), self._known(bucket)
        at = pc.index_in(keys(rows), value_set=keys(before))
        rows, before = rows.filter(at.is_valid()), before.take(at.drop_null())
        if self._all_differ:
            return rows
        # A record that wasn't read whole is as it was, by its watermark; one only claimed isn't known to be.
        unread = pc.and_(rows["digest"].is_null(), before["digest"].is_valid())
        same = pc.fill_null(pc.equal(rows["digest"], before["digest"]), fill_value=False)
        return rows.filter(pc.invert(pc.or_(unread, same)))

    def claimed(self, bucket: int) -> int:
        """Return how many records in scope were claimed and never seen moved."""
        rows, kept = self._here(bucket), baseline_rows(self._ledger, bucket)
        claims = without(self._claims.read(bucket), kept)
        return int(pc.sum(pc.is_in(keys(rows), value_set=keys(claims))).as_py() or 0)

    def deleted(self, bucket: int) -> pa.Table:
        """Return the names of records that were moved or claimed and aren't in scope any more."""
        return without(self._known(bucket), self._here(bucket)).select(NAMES.names)


@contextmanager
def compared(migration: Migration, baseline: Baseline) -> Iterator[SourceChanges]:
    """Read the source, without what is surely as it was, and give what differs from the baseline."""
    mapping = migration.mapping
    all_differ = baseline.schema_mapping != (None if mapping is None else mapping.digest())
    since = None if all_differ else _newer(migration, baseline)
    with tempfile.TemporaryDirectory(dir=migration.ledger.scratch) as scratch:
        rows = Buckets(Path(scratch) / "source", SUMMARY)
        with rows.writing() as put:
            _sum_up(migration, since, put)
        claims = Buckets(Path(scratch) / "claims", SUMMED_UP)
        with claims.writing() as put:
            for batch in undigested(migration.history.claimed()).to_batches():
                put(batch)
        yield SourceChanges(migration.history, rows, claims, all_differ=all_differ)


def _sum_up(
    migration: Migration, since: filters.Filter | None, put: Callable[[pa.RecordBatch], None]
) -> None:
    """Put a row of each record in scope; of those that can't be newer than `since` without a digest."""
    if since is not None:
        # First, so that a record which becomes newer meanwhile is read twice and not left out.
        for batch, stored in _records(migration, migration.where, vectors=False):
            older = pc.invert(filters.mask(since, batch))
            put(summary(batch.filter(older), stored.filter(older)))
    where = migration.where if since is None else _both(migration.where, since)
    for batch, stored in _records(migration, where, vectors=True):
        put(summary(batch, stored, batches.digest_column(batches.record_digests(batch))))


def _records(
    migration: Migration, where: filters.Filter | None, *, vectors: bool
) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Yield the records that match: as they were before any envelope, and what names them in the store."""
    found = migration.source.scan_all(
        migration.source_collection,
        batch_records=migration.config.batch_size,
        where=where,
        vectors=vectors,
    )
    for stored in found:
        batch, names = decode(stored), batches.ids_of(stored)
        if where is not None:
            matches = filters.mask(where, batch)
            batch, names = batch.filter(matches), names.filter(matches)
        migration.tell("batch-compared", records=batch.num_rows)
        yield batch, names


def _newer(migration: Migration, baseline: Baseline) -> filters.Filter | None:
    """Return which records may have changed by their watermark; None where all have to be read."""
    field = migration.config.watermark
    if field is None or baseline.watermark != field or baseline.mark is None:
        return None
    return not_older(field, baseline.mark, overlap=migration.config.watermark_overlap)


def _both(where: filters.Filter | None, other: filters.Filter) -> filters.Filter:
    return other if where is None else filters.And((where, other))


# ── the plan ─────────────────────────────────────────────────────────────────────────────────────────


def change_partitions(
    migration: Migration, found: SourceChanges, *, generation: int
) -> tuple[tuple[Partition, ...], Changes]:
    """Fix the partitions of what changed, and write into the ledger what a run of them has to know."""
    ledger, config = migration.ledger, migration.config
    has_namespaces = migration.source.describe(migration.source_collection).has_namespaces
    counts = {"new": 0, "changed": 0}
    partitions: list[Partition] = []
    for change, rows_of in (("new", found.new), ("changed", found.changed)):
        rows = (rows_of(bucket) for bucket in range(N_BUCKETS))
        for ids in _portions(rows, config.partition_size, has_namespaces=has_namespaces):
            key = f"g{generation}_{len(partitions):05d}"
            span = Span(records=ids.num_rows, ids_file=ledger.write_span_ids(key, ids))
            partitions.append(Partition(key=key, span=span, change=change))
            counts[change] += ids.num_rows
    deleted = ledger.write_deleted(map(found.deleted, range(N_BUCKETS)))
    return tuple(partitions), Changes(
        **counts,
        claimed=sum(map(found.claimed, range(N_BUCKETS))),
        unchanged=found.records - sum(counts.values()),
        deleted=deleted,
        removes=config.apply_deletes and deleted > 0,
    )


def _portions(rows: Iterable[pa.Table], size: int, *, has_namespaces: bool) -> Iterator[pa.RecordBatch]:
    """Yield what names the records of some rows in their store, `size` at a time."""
    waiting = SUMMARY.empty_table()
    for table in rows:
        waiting = pa.concat_tables([waiting, table])
        while len(waiting) >= size:
            yield stored_ids(waiting.slice(0, size), has_namespaces=has_namespaces)
            waiting = waiting.slice(size)
    if len(waiting):
        yield stored_ids(waiting, has_namespaces=has_namespaces)


# ── around the load ──────────────────────────────────────────────────────────────────────────────────


def claim_added(migration: Migration, partition: Partition) -> None:
    """Note which records of a partition are about to be added to the target, without those that it skips."""
    if partition.change != "new":
        return
    names = migration.ledger.digests(partition.key)
    skipped = migration.ledger.skipped_ids(partition.key)
    assert names is not None
    if skipped is not None:
        names = _left(migration, names, [skipped])
    migration.ledger.claim(partition.key, names.select(NAMES.names))


def sum_up_moved(migration: Migration, key: str, left_out: Sequence[pa.RecordBatch]) -> None:
    """Keep what names and sums up a partition's records that are proven to be in the target.

    Parameters
    ----------
    left_out
        What names those in the target that aren't: refused by it, or skipped.
    """
    names = migration.ledger.digests(key)
    if names is None:  # extracted by a version that kept no digests
        return
    unmapped = migration.ledger.rejected_ids(f"{key}.transform")
    if unmapped.num_rows:
        names = without(names, pa.Table.from_batches([names_of(unmapped)]))
    migration.ledger.write_moved(key, _left(migration, names, left_out))


def _left(migration: Migration, names: pa.Table, left_out: Sequence[pa.RecordBatch]) -> pa.Table:
    """Return the rows whose ids in the target aren't among others."""
    others = [ids for ids in left_out if ids.num_rows]
    mapping = migration.mapping
    if not others or (mapping is not None and mapping.id_from is not None):
        return names
    ids = ids_in_target(one_batch(names), plan=migration.plan, target=migration.target)
    for other in others:
        kept = pc.invert(batches.is_among(ids, other))
        names, ids = names.filter(kept), ids.filter(kept)
    return names


def remove_deleted(migration: Migration) -> None:
    """Remove from the target what is gone from the source, where that was asked for; idempotent.

    Raises
    ------
    VerificationError
        Records are still there afterwards.
    """
    plan, ledger, target = migration.plan, migration.ledger, migration.target
    if plan.changes is None or not plan.changes.removes or ledger.removed() is not None:
        return
    removed = 0
    for table in ledger.deleted():
        ids = ids_in_target(one_batch(table), plan=plan, target=target)
        _remove(migration, ids)
        removed += ids.num_rows
    ledger.mark_removed(removed)
    migration.tell("removed", phase="publish", records=removed)


def _remove(migration: Migration, ids: pa.RecordBatch) -> None:
    target, collection = migration.target, migration.plan.target_collection
    migration.retry(partial(target.delete, collection, ids), phase="publish")
    left = migration.retry(partial(target.fetch, collection, ids, vectors=False), phase="publish")
    if left.num_rows:
        raise VerificationError(
            f"{migration.plan.target}: {left.num_rows} records are still there after they were deleted, such "
            f"as {left.column(ID)[0].as_py()!r}; run it again",
            found=left.num_rows,
        )


def keep_what_was_moved(migration: Migration, receipts: Iterable[Receipt]) -> None:
    """Make what a complete run has left in the target the baseline of the next; may be called again."""
    plan, ledger, config = migration.plan, migration.ledger, migration.config
    before = read_baseline(ledger)
    if before is not None and before.generation == plan.generation:
        return
    parts = [partition.key for partition in plan.partitions]
    if not all(map(ledger.has_moved, parts)):
        return  # receipts of a version that kept no digests
    marks = [receipt.mark for receipt in receipts]
    if before is not None and before.watermark == config.watermark:
        marks.append(before.mark)
    found = Baseline(
        generation=plan.generation,
        source=plan.config["source"],
        target=plan.config["target"],
        id_strategy=plan.id_strategy,
        schema_mapping=plan.schema_mapping,
        watermark=config.watermark,
        mark=None if config.watermark is None else greatest(marks, config.watermark),
    )
    was_removed = ledger.removed() is not None
    keep_baseline(ledger, found, map(ledger.moved, parts), ledger.deleted() if was_removed else ())
    claimed = ledger.claimed()
    left = [] if was_removed else [_among(claimed, table) for table in ledger.deleted()]
    ledger.settle_claims(pa.concat_tables([NAMES.empty_table(), *left]))
    ledger.discard_moved()


def _among(names: pa.Table, others: pa.Table) -> pa.Table:
    return names.filter(pc.is_in(keys(names), value_set=keys(others)))
