"""What the Python interface gives back: how a migration went, how far it is, what it would take."""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MigrationResult:
    """How a migration went.

    Attributes
    ----------
    success
        Whether every record in scope is in the target and was read back as it was in the source (or was left
        as the target held it, with `on_conflict="skip"`). In a dry run: whether it could start.
    vectors_migrated, vectors_failed
        Records that were read back and found right, and those in scope that were not: refused by the target,
        found different, or in a part of the collection that failed.
    duration_seconds, started_at, completed_at
        Wall time of this call; the times are in UTC.
    source_collection, target_collection
        Their names.
    errors
        One line for each refused record, `id: reason`, and each part of the collection that failed; after a
        thousand refused records, one that says where the others are listed.
    metadata
        `validated` (whether every record and every check of the whole is proven), `dry_run`, `in_scope`,
        `skipped`, `filtered`, `losses` (what the target changes in the data, accepted or undone on
        reading), `warnings`, and `report` (the whole report, as `vector-migrate run --json` prints it; None
        in a dry run). After a run also `ledger`: the folder of its plan and receipts.
    """

    success: bool
    vectors_migrated: int
    vectors_failed: int
    duration_seconds: float
    source_collection: str
    target_collection: str
    started_at: dt.datetime
    completed_at: dt.datetime
    errors: list[str] = field(default_factory=list)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total_vectors(self) -> int:
        """Records that were migrated or failed."""
        return self.vectors_migrated + self.vectors_failed

    @property
    def success_rate(self) -> float:
        """The share of the records that were migrated, from 0 to 1; 1 where there were none to migrate."""
        return self.vectors_migrated / self.total_vectors if self.total_vectors else 1.0


class Stopwatch:
    """When something began, by the wall clock, and how long it took, by one that is never set."""

    def __init__(self) -> None:
        self._started_at, self._started = dt.datetime.now(dt.UTC), time.monotonic()

    def stop(self) -> dict[str, Any]:
        """Return `started_at`, `completed_at` and `duration_seconds`."""
        seconds = time.monotonic() - self._started
        return {
            "started_at": self._started_at,
            "completed_at": self._started_at + dt.timedelta(seconds=seconds),
            "duration_seconds": seconds,
        }


@dataclass(frozen=True, kw_only=True)
class MigrationProgress:
    """How far a migration is.

    `vectors_processed` never falls, and at the end is `total_vectors`. `total_batches` is what the plan lets
    expect until the end tells. `errors` counts the records that failed so far.
    """

    vectors_processed: int
    total_vectors: int
    current_batch: int
    total_batches: int
    elapsed_seconds: float
    errors: int = 0

    @property
    def percentage(self) -> float:
        """From 0 to 100."""
        return 100.0 * self.vectors_processed / self.total_vectors if self.total_vectors else 100.0

    @property
    def eta_seconds(self) -> float:
        """How long the rest will take at the pace so far; infinite before anything is processed."""
        if not self.vectors_processed:
            return math.inf if self.total_vectors else 0.0
        rest = self.total_vectors - self.vectors_processed
        return self.elapsed_seconds * rest / self.vectors_processed


@dataclass(frozen=True, kw_only=True)
class MigrationEstimate:
    """What a migration would take.

    Attributes
    ----------
    total_vectors
        Records in scope, counted.
    estimated_duration_seconds, vectors_per_second
        From a sample that was read and, unless declined, written and read back; else from the target's
        typical rate of writing.
    estimated_batches
        Batches of `batch_size`.
    source_dimension, target_dimension
        Of the vector that is moved; None for one without a fixed number, and for the target where the move
        can't be made.
    compatible
        Whether the move could start as it is: nothing is lost that wasn't accepted, and nothing stands in its
        way. `warnings` say why not, and what else is worth knowing.
    bytes_to_move, target_bytes
        In memory, as batches: what is read, and what it comes to in the target (envelope and dtype included,
        the target's own indexes and compression left out).
    staging_bytes
        The most that lies in the ledger's folder at a time.
    egress_cost
        `bytes_to_move` in GB of 10**9 bytes times the price that was given; None without one.
    """

    total_vectors: int
    estimated_duration_seconds: float
    estimated_batches: int
    source_dimension: int | None
    target_dimension: int | None
    compatible: bool
    warnings: list[str] = field(default_factory=list)
    bytes_to_move: int = 0
    staging_bytes: int = 0
    target_bytes: int = 0
    egress_cost: float | None = None
    vectors_per_second: float = 0.0
