"""What a migration would take, measured: its first records are moved into a scratch collection."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from math import log
from pathlib import Path

from migration_pipelines import batch as batches
from migration_pipelines.envelope import decode
from migration_pipelines.errors import CollectionNotFoundError, DimensionMismatchError, MigrationError
from migration_pipelines.ledger import Ledger
from migration_pipelines.load import publish
from migration_pipelines.migration import Event, Migration
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import CollectionSchema, Plan, Value
from migration_pipelines.plan import draft
from migration_pipelines.results import MigrationEstimate
from migration_pipelines.store import Store, open_address
from migration_pipelines.validate import require_complete

# An eighth of the records, within these bounds: a graph's cost shows only once it no longer fits into caches.
_SAMPLE_SHARE, _SMALLEST_SAMPLE, _LARGEST_SAMPLE = 8, 4_000, 16_000
_SMALLER = 4  # a smaller sample, by so many times, tells how much slower a larger collection is per record
# Building a graph takes n log n, and longer for all that no longer fits into caches, of which a sample shows
# little: from 12,500 to 100,000 vectors of 384 dimensions it grew by the power 1.26 (pgvector), 1.26 (Chroma)
# and 1.38 (FAISS). Beyond the highest, what two samples show is noise.
_BUILD_GROWTH, _MAX_GROWTH = 1.3, 1.5


class Rehearsal(Value):
    """What it took to move `records` of a collection. The scratch collection is gone again."""

    records: int
    written_bytes: int  # as batches, in the layout of the target
    other_seconds: float  # read, transform, read back and compare
    load_seconds: float  # in some stores a graph is built on the way
    build_seconds: float  # what finishing took beyond its fixed cost: search indexes
    fixed_seconds: float
    load_growth: float = 1.0  # loading n records takes as long as n ** load_growth
    build_growth: float = _BUILD_GROWTH

    def seconds(self, records: int) -> float:
        """Return how long that many records will take."""
        times = records / self.records
        grown: float = (
            self.load_seconds * times**self.load_growth + self.build_seconds * times**self.build_growth
        )
        return self.other_seconds * times + grown + self.fixed_seconds

    def beside(self, smaller: Rehearsal) -> Rehearsal:
        """Return the same with the growth that a rehearsal of fewer records shows."""
        times = self.records / smaller.records
        return self.model_copy(
            update={
                "load_growth": _growth(self.load_seconds, smaller.load_seconds, times, least=1.0),
                "build_growth": _growth(
                    self.build_seconds, smaller.build_seconds, times, least=_BUILD_GROWTH
                ),
            }
        )


def _growth(seconds: float, smaller: float, times: float, *, least: float) -> float:
    if seconds <= 0 or smaller <= 0 or times <= 1:
        return least
    return min(max(log(seconds / smaller) / log(times), least), _MAX_GROWTH)


def estimate(migration: Migration, *, write_sample: bool, price_per_gb: float | None) -> MigrationEstimate:
    """Return what a migration would take; see `VectorStoreMigrator.estimate`."""
    started = time.monotonic()
    try:
        plan = draft(migration)
    except DimensionMismatchError as error:
        return _incompatible(migration, str(error))
    counting_seconds = time.monotonic() - started
    warnings = [*plan.warnings, *_refused_losses(plan)]
    rehearsal = None
    if write_sample:
        try:
            rehearsal = rehearse(migration, plan)
        except MigrationError as error:
            warnings.append(f"the sample could not be written, so the rate is a typical one: {error}")
    records, size = plan.profile.records, plan.profile.bytes
    moving = rehearsal.seconds(records) if rehearsal else plan.estimate.seconds
    seconds = counting_seconds + moving
    return MigrationEstimate(
        total_vectors=records,
        estimated_duration_seconds=seconds,
        estimated_batches=-(-records // migration.config.batch_size),
        source_dimension=_dimension(plan.source_schema),
        target_dimension=_dimension(plan.target_schema),
        compatible=all(loss.accepted for loss in plan.losses),
        warnings=warnings,
        bytes_to_move=size,
        staging_bytes=plan.estimate.staging_bytes,
        target_bytes=round(records * rehearsal.written_bytes / rehearsal.records) if rehearsal else size,
        egress_cost=None if price_per_gb is None else size / 1e9 * price_per_gb,
        vectors_per_second=records / seconds if seconds else 0.0,
    )


def _refused_losses(plan: Plan) -> Iterator[str]:
    for loss in plan.losses:
        if not loss.accepted:
            yield f"{loss.field}: {loss.kind}, {loss.count} records ({loss.detail}); accept it by name"


def _dimension(schema: CollectionSchema) -> int | None:
    return schema.vectors[0].dimensions if schema.vectors else None


def _incompatible(migration: Migration, problem: str) -> MigrationEstimate:
    collection = migration.source_collection
    return MigrationEstimate(
        total_vectors=migration.source.count(collection, migration.where),
        estimated_duration_seconds=0.0,
        estimated_batches=0,
        source_dimension=_dimension(migration.source.describe(collection)),
        target_dimension=None,
        compatible=False,
        warnings=[problem],
    )


def rehearse(migration: Migration, plan: Plan) -> Rehearsal | None:
    """Move the first records of the plan's source; None where there are none.

    They are read as a migration reads them, and then moved by the engine out of this process's memory into
    a new collection of the target store, which is dropped in the end, whatever happens.

    Raises
    ------
    MigrationError
        The target refuses the scratch collection or its records.
    """
    wanted = min(max(plan.profile.records // _SAMPLE_SHARE, _SMALLEST_SAMPLE), _LARGEST_SAMPLE)
    found = _rehearsed(migration, plan, wanted)
    if found is None or found.records < wanted:
        return found
    smaller = _rehearsed(migration, plan, wanted // _SMALLER)
    return found if smaller is None else found.beside(smaller)


def _rehearsed(migration: Migration, plan: Plan, limit: int) -> Rehearsal | None:
    name = f"estimate{uuid.uuid4().hex[:8]}"  # letters and digits: a name in every store
    memory, _ = open_address(f"memory:{name}")
    memory.create(plan.source_schema.model_copy(update={"name": name}))
    try:
        started = time.monotonic()
        records = _take(migration, plan, memory, name, limit=limit)
        read_seconds = time.monotonic() - started
        target = migration.target.as_for(plan.profile.records)
        return _moved(migration, target, memory, name, read_seconds) if records else None
    finally:
        memory.drop(name)
        with suppress(CollectionNotFoundError):
            migration.target.drop(name)


def _take(migration: Migration, plan: Plan, memory: Store, name: str, *, limit: int) -> int:
    """Put the first records of the source into memory, at most `limit`; returns how many."""
    source, collection, records = migration.source, plan.source_collection, 0
    for stored in source.scan_all(collection, span_records=limit, batch_records=migration.config.batch_size):
        batch = batches.fit_namespaces(decode(stored), wanted=plan.source_schema.has_namespaces)
        memory.upsert(name, batch.slice(0, limit - records))
        records = memory.count(name)
        if records >= limit:
            break
    return records


def _moved(migration: Migration, target: Store, memory: Store, name: str, read_seconds: float) -> Rehearsal:
    seconds: defaultdict[str, float] = defaultdict(float)
    written: Counter[str] = Counter()

    def listen(event: Event) -> None:
        seconds[event.name] += event.seconds
        written[event.name] += event.bytes

    settings = {
        "source": memory.address(name),
        "target": target.address(name),
        "filter": None,
        "workers": 1,
        "on_existing": "refuse",
        "allow_losses": ("all",),
    }
    with tempfile.TemporaryDirectory(prefix="vector-migrate-") as folder:
        trial = Migration(
            config=migration.config.model_copy(update=settings),
            ledger=Ledger(Path(folder)),
            listener=listen,
            target_store=target,
        )
        report = run_migration(trial)
        require_complete(report)
        started = time.monotonic()
        publish(trial)  # again: what it takes now is its fixed cost
        fixed = time.monotonic() - started
        verify_seconds = sum(
            receipt.seconds["verify"] for receipt in trial.ledger.receipts(trial.plan).values()
        )
        trial.close()
    records = report.records["verified"]
    return Rehearsal(
        records=records,
        written_bytes=written["loaded"],
        other_seconds=read_seconds + seconds["transformed"] + verify_seconds,
        load_seconds=seconds["loaded"],
        build_seconds=max(0.0, seconds["published"] - fixed),
        fixed_seconds=fixed,
    )
