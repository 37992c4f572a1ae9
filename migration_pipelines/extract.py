"""The extract phase: one partition of the source, staged."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines import filters
from migration_pipelines.buckets import sum_up
from migration_pipelines.envelope import decode
from migration_pipelines.ledger import Staged
from migration_pipelines.migration import Migration
from migration_pipelines.model import Partition
from migration_pipelines.transform import EXTRACTED
from migration_pipelines.watermark import greatest, mark_of


def extract(migration: Migration, key: str) -> Staged:
    """Read one partition in batches and stage the records in scope.

    Idempotent: what is staged and whole is not read again. A transient error starts the partition over.

    Raises
    ------
    DiskFullError
        Staging has no room; what is there stays valid.
    """
    done = migration.ledger.staged(key, EXTRACTED)
    if done is not None and migration.ledger.digests(key) is not None:
        return done
    partition = migration.partition(key)
    with migration.scanning, migration.phase("extract", key):
        staged = migration.retry(lambda: _extract_once(migration, partition), phase="extract", partition=key)
        migration.tell(
            "extracted", partition=key, records=staged.records, bytes=staged.bytes, seconds=staged.seconds
        )
    if staged.filtered:
        migration.tell("filtered", phase="extract", partition=key, records=staged.filtered)
    return staged


def _extract_once(migration: Migration, partition: Partition) -> Staged:
    started = time.monotonic()
    read = filtered = size = digest = 0
    watermark = migration.config.watermark
    marks: list[str | None] = []
    summed_up: list[pa.RecordBatch] = []

    def in_scope() -> Iterator[pa.RecordBatch]:
        nonlocal read, filtered, size, digest
        for batch in scan(migration, partition):
            kept = batch
            if migration.where is not None:
                kept = batch.filter(filters.mask(migration.where, batch))
            read += batch.num_rows
            filtered += batch.num_rows - kept.num_rows
            if kept.num_rows:
                size += kept.nbytes
                digests = batches.record_digests(kept)
                digest = batches.add_digests([digest, *digests])
                summed_up.append(sum_up(kept, batches.digest_column(digests)))
                if watermark is not None:
                    marks.append(mark_of(kept, watermark))
                migration.tell(
                    "batch-extracted", partition=partition.key, records=kept.num_rows, bytes=kept.nbytes
                )
                yield kept

    def describe(checksum: str) -> Staged:
        migration.ledger.write_digests(partition.key, summed_up)
        return Staged(
            checksum=checksum,
            read=read,
            filtered=filtered,
            rejected=0,
            records=read - filtered,
            bytes=size,
            digest=f"{digest:032x}",
            seconds=time.monotonic() - started,
            mark=None if watermark is None else greatest(marks, watermark),
        )

    schema = batches.arrow_schema(migration.plan.source_schema)
    return migration.ledger.stage(partition.key, EXTRACTED, schema, in_scope(), describe)


def scan(migration: Migration, partition: Partition) -> Iterator[pa.RecordBatch]:
    """Yield a partition's records as they were before any envelope, checked against the plan's schema."""
    plan = migration.plan
    for batch in _stored(migration, partition):
        batches.check_dimensions(batch, plan.source_schema, where=plan.source)
        yield batches.fit_namespaces(decode(batch), wanted=plan.source_schema.has_namespaces)


def _stored(migration: Migration, partition: Partition) -> Iterator[pa.RecordBatch]:
    source, collection, size = migration.source, migration.plan.source_collection, migration.config.batch_size
    ids = migration.span_ids(partition)
    if partition.change is None:
        return source.scan(collection, partition.span, ids=ids, batch_records=size, where=migration.where)
    assert ids is not None
    return source.fetch_all(collection, ids, batch_records=size)
