"""VectorStoreMigrator: migrations from Python, by the engine and the ledger that `vector-migrate` uses.

migrator = VectorStoreMigrator("chroma:./chroma_db", "qdrant:./qdrant_data")
result = migrator.migrate("passages")
assert result.success, result.errors
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import ValidationError as SettingsError

from migration_pipelines.checkpoint import open_checkpoint
from migration_pipelines.compare import Comparison, compare_collections
from migration_pipelines.errors import (
    ConfigurationError,
    DimensionMismatchError,
    LossNotAcceptedError,
    TargetNotEmptyError,
    UnsupportedOperationError,
    ValidationError,
)
from migration_pipelines.estimation import estimate
from migration_pipelines.filters import parse
from migration_pipelines.ledger import Ledger
from migration_pipelines.migration import (
    Event,
    Listener,
    Migration,
    MigrationConfig,
    default_home,
    ledger_for,
    together,
)
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import Plan
from migration_pipelines.plan import check_free, check_losses, draft
from migration_pipelines.processes import Processes, require_addresses, require_many_writers
from migration_pipelines.progress import OnProgress, ProgressTracker
from migration_pipelines.quality import QualityReport, run_quality
from migration_pipelines.results import MigrationEstimate, MigrationResult, Stopwatch
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.schema_mapping import SchemaMapping
from migration_pipelines.store import Store, open_address
from migration_pipelines.validate import Report

_SHOWN_REJECTS = 1_000
_PARTITION_RECORDS = 20_000
_ON_EXISTING = {"overwrite": "merge", "skip": "skip", "fail": "add"}
# What a dry run finds in the way of a move, and tells instead of raising it.
_IN_THE_WAY = (LossNotAcceptedError, TargetNotEmptyError, DimensionMismatchError)


class Exporter(Protocol):
    """Whatever wants to hear of every event of a migration."""

    def listen(self, event: Event) -> None:
        """Take an event; called from the threads that work, several at a time."""


@dataclass(frozen=True, kw_only=True)
class _Move:
    """From which collection to which."""

    source: Store
    source_collection: str
    target: Store
    target_collection: str

    def config(self, **settings: Any) -> MigrationConfig:
        """Return the configuration of this move.

        Raises
        ------
        ConfigurationError
            A setting can't be used.
        """
        addresses = {
            "source": self.source.address(self.source_collection),
            "target": self.target.address(self.target_collection),
        }
        try:
            return MigrationConfig(**addresses, **settings)
        except SettingsError as error:
            wrong = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
            raise ConfigurationError(f"these settings can't be used: {wrong}") from None

    def migration(self, config: MigrationConfig, ledger: Ledger) -> Migration:
        """Return the migration, on these very stores."""
        return Migration(config=config, ledger=ledger, source_store=self.source, target_store=self.target)

    @contextmanager
    def trial(self, config: MigrationConfig) -> Iterator[Migration]:
        """Give a migration whose ledger is thrown away."""
        with (
            tempfile.TemporaryDirectory(prefix="vector-migrate-") as home,
            self.migration(config, Ledger(Path(home))) as migration,
        ):
            yield migration


class VectorStoreMigrator:
    """Moves collections from one store to another.

    Parameters
    ----------
    source, target
        Stores, or their addresses. A collection that an address names is the default one of that side.
    validate
        Raise `ValidationError` where the proof of a migration finds a difference. Every record is read back
        and compared either way; without it a difference is only in the result.
    on_progress
        Called with a `MigrationProgress` after each batch and at the end. One that raises is logged, and not
        called again.
    max_retries, retry_delay, retry_backoff
        What fails for a passing reason is tried again so many times, the n-th time after `retry_delay *
        retry_backoff**(n - 1)` seconds with up to a quarter of jitter, a minute at most, or after as long as
        the store asks for.
    metrics_exporter
        Its `listen(event)` gets every `Event`. One that raises is logged, and told no more.

    Raises
    ------
    ConfigurationError
        An address or a number can't be used.
    """

    def __init__(
        self,
        source: Store | str,
        target: Store | str,
        *,
        validate: bool = True,
        on_progress: OnProgress | None = None,
        max_retries: int = 3,
        retry_delay: float = 1.0,
        retry_backoff: float = 2.0,
        metrics_exporter: Exporter | None = None,
    ) -> None:
        if max_retries < 0 or retry_delay < 0 or retry_backoff < 1:
            raise ConfigurationError(
                "max_retries and retry_delay are 0 or more and retry_backoff 1 or more, not "
                f"{max_retries}, {retry_delay} and {retry_backoff}"
            )
        self.source, self._source_collection = _opened(source)
        self.target, self._target_collection = _opened(target)
        self._validate = validate
        self._on_progress, self._exporter = on_progress, metrics_exporter
        self._retry = RetryPolicy(attempts=max_retries + 1, delay_seconds=retry_delay, backoff=retry_backoff)

    # ── migrate ──────────────────────────────────────────────────────────────────────────────────────

    def migrate(
        self,
        source_collection: str | None = None,
        target_collection: str | None = None,
        *,
        batch_size: int = 1_000,
        chunk_size: int | None = None,
        filter: Any = None,  # noqa: A002 - the word that those who use vector stores know
        dry_run: bool = False,
        incremental: bool = False,
        apply_deletes: bool = False,
        watermark: str | None = None,
        watermark_overlap: float = 0.0,
        resume: bool = False,
        checkpoint_file: str | Path | None = None,
        on_conflict: Literal["overwrite", "skip", "fail"] = "overwrite",
        schema_mapping: SchemaMapping | Mapping[str, Any] | None = None,
        parallel: bool = False,
        max_workers: int | None = None,
        worker_type: Literal["thread", "process"] = "thread",
        source_namespace: str | None = None,
        target_namespace: str | None = None,
        allow_losses: Sequence[str] = (),
    ) -> MigrationResult:
        """Move a collection, read every record back, and tell what was proven.

        A record that fails doesn't stop the others: the result counts and names it.

        Parameters
        ----------
        source_collection, target_collection
            By default the one of the address; the target's else the source's.
        batch_size
            Records in a batch, at most; a store's own limit comes first.
        chunk_size
            Records in a partition, the part that a resumed migration doesn't do again; 20,000 by default.
        filter
            Which records are in scope, as a mapping or in the short text (see `filters`).
        dry_run
            Only find out what would happen: nothing is written, but the counts, the losses and what stands
            in the way.
        incremental
            Move only what is new or changed since the last complete run between these collections, found by
            the digests of all records; everything where there was none. `metadata["changes"]` counts it.
        apply_deletes
            Remove from the target what an earlier run moved and the source doesn't have any more.
        watermark, watermark_overlap
            A metadata field that grows with every change of a record: then only records that aren't older
            than the greatest value of the last run, less the overlap, are read whole.
        schema_mapping
            What becomes of fields, ids and vectors on the way: a `SchemaMapping`, or its rules as a mapping.
        resume
            Go on with what an earlier call left, under the same settings; without it a migration starts
            afresh. Where there is nothing to go on with, it starts.
        checkpoint_file
            A small JSON file; the ledger lies beside it, so that another process can resume by it.
            Without it the ledger lies under `VECTOR_MIGRATE_HOME`, else `./home`.
        on_conflict
            Where the target holds an id in scope: `overwrite` the record under it, `skip` it (the target's
            record stays as it is), or `fail` before anything is written. Other records of the target stay
            in any case.
        parallel, max_workers
            Work on several partitions at a time: `max_workers`, by default as many as there are CPUs.
        worker_type
            Whether those work in threads or in processes, which open the stores by their addresses. A process
            that dies fails its partition alone.
        source_namespace, target_namespace
            Read from, or write into, one namespace, in stores whose addresses can name one.
        allow_losses
            Losses to accept, as the dry run names them: a kind, `field:kind`, or `all`.

        Raises
        ------
        CollectionNotFoundError
            There is no such source collection.
        LossNotAcceptedError, DimensionMismatchError, TargetNotEmptyError
            The move can't be made like this; nothing was written. A dry run returns these as errors.
        ValidationError
            What is in the target differs from the source; its facts hold the `result`.
        MigrationError
            Whatever else fails all partitions alike: a store is gone, a login refused, a disk full.
        """
        if worker_type not in ("thread", "process"):
            raise ConfigurationError(f"worker_type is 'thread' or 'process', not {worker_type!r}")
        move = self._move(source_collection, target_collection, source_namespace, target_namespace)
        config = move.config(
            filter=filter,
            batch_size=batch_size,
            partition_size=_PARTITION_RECORDS if chunk_size is None else chunk_size,
            workers=(max_workers or os.cpu_count() or 1) if parallel else 1,
            on_existing=_on_existing(on_conflict),
            allow_losses=tuple(allow_losses),
            retry=self._retry,
            schema_mapping=schema_mapping,
            incremental=incremental,
            apply_deletes=apply_deletes,
            watermark=watermark,
            watermark_overlap=watermark_overlap,
        )
        if worker_type == "process" and config.schema_mapping and config.schema_mapping.uses_functions:
            raise ConfigurationError(
                "a schema mapping with functions can't be told to processes: use threads"
            )
        watch = Stopwatch()
        if dry_run:
            return self._dry_run(move, config, checkpoint_file, watch)
        ledger = _ledger(config, checkpoint_file, resume=resume)
        migration = move.migration(config, ledger)
        migration.listener = self._listener(migration)
        if worker_type == "process":
            require_addresses(move.source, move.target)
            require_many_writers(move.target)
            with Processes() as processes:
                report = run_migration(migration, fresh=not resume, work=processes.run)
        else:
            report = run_migration(migration, fresh=not resume)
        return self._result(migration, report, watch)

    def _dry_run(
        self, move: _Move, config: MigrationConfig, checkpoint: str | Path | None, watch: Stopwatch
    ) -> MigrationResult:
        plan, problems = None, []
        with move.trial(config) as migration:
            if checkpoint is None or Path(checkpoint).exists():
                migration.history_ledger = _ledger(config, checkpoint, resume=True)
            try:
                plan = draft(migration)
                check_losses(plan)
                check_free(migration, plan)
            except _IN_THE_WAY as error:
                problems.append(str(error))
        return MigrationResult(
            success=not problems,
            vectors_migrated=0,
            vectors_failed=0,
            source_collection=move.source_collection,
            target_collection=move.target_collection,
            **watch.stop(),
            errors=problems,
            metadata={"validated": False, "dry_run": True, "report": None, **_of_plan(plan)},
        )

    def _listener(self, migration: Migration) -> Listener:
        listeners: list[Listener] = []
        if self._on_progress is not None:
            listeners.append(ProgressTracker(migration, self._on_progress))
        if self._exporter is not None:
            listeners.append(self._exporter.listen)
        return together(*listeners)

    def _result(self, migration: Migration, report: Report, watch: Stopwatch) -> MigrationResult:
        plan, counts = migration.plan, report.records
        proven = counts["verified"] + counts.get("skipped", 0)
        failed = max(0, plan.profile.records - proven)
        validated = bool(report.checks) and all(check.passed for check in report.checks)
        result = MigrationResult(
            success=report.status == "complete" and not failed,
            vectors_migrated=counts["verified"],
            vectors_failed=failed,
            source_collection=plan.source_collection,
            target_collection=plan.target_collection,
            **watch.stop(),
            errors=_errors(migration, report),
            metadata={
                **_of_plan(plan),
                "validated": validated,
                "dry_run": False,
                "skipped": counts.get("skipped", 0),
                "filtered": counts["filtered"],
                "ledger": str(migration.ledger.folder),
                "report": report.model_dump(mode="json"),
            },
        )
        if self._validate and (counts["different"] or report.status == "failed"):
            raise ValidationError(
                f"{plan.target} differs from {plan.source}: {'; '.join(result.errors[:3])}", result=result
            )
        return result

    # ── estimate, verify, quality ────────────────────────────────────────────────────────────────────

    def estimate(
        self,
        collection_name: str | None = None,
        *,
        batch_size: int = 1_000,
        filter: Any = None,  # noqa: A002 - as in `migrate`
        target_collection: str | None = None,
        write_sample: bool = True,
        price_per_gb: float | None = None,
        allow_losses: Sequence[str] = (),
    ) -> MigrationEstimate:
        """Measure what a migration by one worker would take.

        The records in scope are counted one by one, without their vectors; that is part of a migration, and
        of the time. The first eighth of them, at least 4,000 and at most 16,000, are then moved into a
        scratch collection of the target store, read back and compared, and the scratch collection is dropped;
        then a quarter of those, to see how much slower a larger collection is. Several workers may be
        faster; a target that others use is slower.

        Parameters
        ----------
        write_sample
            Whether the target may be written; else its typical rate stands in.
        price_per_gb
            Of egress, in your currency; GB are 10**9 bytes.

        Raises
        ------
        CollectionNotFoundError
            There is no such source collection.
        """
        move = self._move(collection_name, target_collection, None, None)
        config = move.config(
            filter=filter,
            batch_size=batch_size,
            workers=1,
            on_existing="merge",
            allow_losses=tuple(allow_losses),
            retry=self._retry,
        )
        with move.trial(config) as migration:
            return estimate(migration, write_sample=write_sample, price_per_gb=price_per_gb)

    def verify(
        self,
        source_collection: str | None = None,
        target_collection: str | None = None,
        *,
        filter: Any = None,  # noqa: A002 - as in `migrate`
        source_namespace: str | None = None,
        target_namespace: str | None = None,
    ) -> Comparison:
        """Compare two collections record by record, whoever wrote them: counts, ids and digests.

        Neither is written. `agrees` tells whether the target holds exactly the source's records; `missing`,
        `extra` and `different` count the others, `examples` name some.
        """
        move = self._move(source_collection, target_collection, source_namespace, target_namespace)
        where = parse(filter) if filter else None
        return compare_collections(
            move.source, move.source_collection, move.target, move.target_collection, where=where
        )

    def quality_report(
        self,
        source_collection: str | None = None,
        target_collection: str | None = None,
        *,
        sample_size: int = 50_000,
    ) -> QualityReport:
        """Check what the target holds of the source's records by expectations made from the source.

        A second opinion beside `verify`, in the terms of who uses the data: see `quality`.
        """
        move = self._move(source_collection, target_collection, None, None)
        config = move.config(on_existing="merge", allow_losses=("all",), retry=self._retry)
        with move.trial(config) as migration:
            migration.ledger.write_plan(draft(migration, keep=True))
            return run_quality(migration, max_records=sample_size)

    def _move(
        self,
        source_collection: str | None,
        target_collection: str | None,
        source_namespace: str | None,
        target_namespace: str | None,
    ) -> _Move:
        source, target = _bound(self.source, source_namespace), _bound(self.target, target_namespace)
        chosen = source_collection or self._source_collection
        if chosen is None:
            there_are = ", ".join(source.list_collections()) or "none"
            raise ConfigurationError(f"say which collection of {source.address()}; there are: {there_are}")
        return _Move(
            source=source,
            source_collection=chosen,
            target=target,
            target_collection=target_collection or self._target_collection or chosen,
        )


# ── what a call asks for ─────────────────────────────────────────────────────────────────────────────


def _opened(given: Store | str) -> tuple[Store, str | None]:
    return (given, None) if isinstance(given, Store) else open_address(given)


def _bound(store: Store, namespace: str | None) -> Store:
    """Return the store, bound to one namespace where one is named.

    A new one: what a store has opened already may belong to the namespace that it was bound to.
    """
    if namespace is None:
        return store
    fields = type(store).model_fields
    if "namespace" not in fields:
        raise UnsupportedOperationError(
            f"{store.address()}: {store.kind} can't be read or written one namespace at a time; "
            "leave the namespace out",
            store=store.kind,
            operation="namespace",
        )
    return type(store)(**{name: getattr(store, name) for name in fields} | {"namespace": namespace})


def _on_existing(on_conflict: str) -> str:
    if on_conflict not in _ON_EXISTING:
        raise ConfigurationError(f"on_conflict is one of {', '.join(_ON_EXISTING)}, not {on_conflict!r}")
    return _ON_EXISTING[on_conflict]


def _ledger(config: MigrationConfig, checkpoint_file: str | Path | None, *, resume: bool) -> Ledger:
    if checkpoint_file is None:
        return ledger_for(config, default_home())
    return open_checkpoint(
        Path(checkpoint_file).absolute(), resume=resume, source=config.source, target=config.target
    )


# ── what it finds ────────────────────────────────────────────────────────────────────────────────────


def _of_plan(plan: Plan | None) -> dict[str, Any]:
    """Return the part of a result's metadata that a plan tells."""
    if plan is None:
        return {"in_scope": None, "losses": [], "warnings": []}
    return {
        "in_scope": plan.profile.records,
        "bytes": plan.profile.bytes,
        "partitions": len(plan.partitions),
        "target_exists": plan.target_exists,
        "target_count": plan.target_count,
        "changes": None if plan.changes is None else plan.changes.model_dump(),
        "losses": [loss.model_dump() for loss in plan.losses],
        "warnings": list(plan.warnings),
    }


def _errors(migration: Migration, report: Report) -> list[str]:
    """Return one line for each thing that went wrong: refused records, partitions, checks of the whole."""
    rejects = migration.ledger.rejects()
    lines = [
        f"{row['namespace']}/{row['id']}: {row['reason']}"
        if row["namespace"]
        else f"{row['id']}: {row['reason']}"
        for row in islice(rejects, _SHOWN_REJECTS)
    ]
    rest = sum(1 for _ in rejects)
    if rest:
        lines.append(f"and {rest} more refused records, in {report.rejects_folder}")
    lines += report.errors
    lines += [
        f"{check.name}: expected {check.expected}, found {check.found}"
        for check in report.checks
        if not check.passed
    ]
    return lines
