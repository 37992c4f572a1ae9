"""Turns the events of a migration into `MigrationProgress`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from migration_pipelines.migration import Event, Migration
from migration_pipelines.model import Partition, Receipt
from migration_pipelines.results import MigrationProgress

OnProgress = Callable[[MigrationProgress], None]

_COUNTED = ("batch-loaded", "verified", "validated")


class ProgressTracker:
    """Listens to a migration and tells `on_progress` after each batch, one call at a time.

    A record counts as processed when it is loaded or refused, or was by an earlier run. What a partition
    loads again, after a fault, is not counted twice.
    """

    def __init__(self, migration: Migration, on_progress: OnProgress) -> None:
        self._migration, self._on_progress = migration, on_progress
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._partitions: dict[str, Partition] = {}
        self._done: dict[str, int] = {}  # records by partition
        self._failed: dict[str, int] = {}  # likewise
        self._total = self._total_batches = self._batches = self._shown = 0

    def __call__(self, event: Event) -> None:
        """Count an event."""
        if event.name not in _COUNTED:
            return
        with self._lock:
            if not self._partitions:
                self._begin()
            if event.name == "batch-loaded":
                self._loaded(event)
            elif event.name == "verified":
                self._verified(event.partition)
            else:
                self._end()

    def _begin(self) -> None:
        plan = self._migration.plan
        self._total = plan.profile.records
        self._partitions = {partition.key: partition for partition in plan.partitions}
        can, config = self._migration.target.capabilities, self._migration.config
        size = min(config.batch_size, can.max_batch_records or config.batch_size)
        # With a filter spans may hold more than is in scope.
        found = sum(math.ceil(partition.span.records / size) for partition in plan.partitions)
        self._total_batches = min(found, math.ceil(self._total / size) + len(plan.partitions))
        for key, receipt in self._migration.ledger.receipts(plan).items():
            self._settle(key, receipt)

    def _loaded(self, event: Event) -> None:
        done = self._done.get(event.partition, 0) + event.records
        self._done[event.partition] = min(done, self._partitions[event.partition].span.records)
        self._batches += 1
        self._tell(sum(self._done.values()))

    def _verified(self, key: str) -> None:
        receipt = self._migration.ledger.receipt(key)
        if receipt is not None:
            self._settle(key, receipt)
            self._tell(sum(self._done.values()))

    def _settle(self, key: str, receipt: Receipt) -> None:
        self._done[key] = receipt.read - receipt.filtered
        self._failed[key] = receipt.rejected

    def _end(self) -> None:
        receipts = self._migration.ledger.receipts(self._migration.plan).values()
        proven = sum(receipt.loaded + receipt.skipped for receipt in receipts)
        self._failed = {"": max(0, self._total - proven)}
        self._total_batches = self._batches
        self._tell(self._total)

    def _tell(self, processed: int) -> None:
        self._shown = min(self._total, max(self._shown, processed))
        self._on_progress(
            MigrationProgress(
                vectors_processed=self._shown,
                total_vectors=self._total,
                current_batch=self._batches,
                total_batches=max(self._batches, self._total_batches),
                elapsed_seconds=time.monotonic() - self._started,
                errors=sum(self._failed.values()),
            )
        )
