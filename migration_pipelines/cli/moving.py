"""`plan`, `run`, `sync`, `validate`: the commands that work on a migration and its ledger."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from migration_pipelines.cli.all_collections import AllCollections, run_all
from migration_pipelines.cli.comparing import DIFFERENT, compare
from migration_pipelines.cli.failures import INTERRUPTED, Failure, report_failure, resuming, say
from migration_pipelines.cli.migrations import defs_folder, home_folder
from migration_pipelines.cli.observing import heard, observing
from migration_pipelines.cli.options import (
    MoveOptions,
    MoveRequest,
    Options,
    Request,
    RunRequest,
    SyncRequest,
    takes,
)
from migration_pipelines.cli.progress import listening
from migration_pipelines.cli.reporting import emit, reporting
from migration_pipelines.cli.signals import stopping
from migration_pipelines.errors import ConfigurationError, LossNotAcceptedError

if TYPE_CHECKING:
    from migration_pipelines.migration import Migration
    from migration_pipelines.model import Plan
    from migration_pipelines.validate import Report

# Workers stop at their next batch, Dagster's runs have to be closed besides; what takes longer is left.
_GRACE_SECONDS, _DAGSTER_GRACE_SECONDS = 1.5, 15.0

DryRun = Annotated[
    bool,
    Option("--dry-run", help="Plan without freezing: nothing is written anywhere."),
]
Fresh = Annotated[
    bool,
    Option(
        "--fresh/--resume",
        help="Forget an earlier plan and its receipts, or go on with them (default).",
        show_default=False,
    ),
]
Dagster = Annotated[
    bool,
    Option("--dagster", help="Run a declared migration as a Dagster backfill."),
]


@takes(MoveRequest)
def plan(request: MoveRequest, *, fresh: Fresh = False, dry_run: DryRun = False) -> int:
    """Check a move, count its losses, estimate it, freeze it.

    The target is not written.
    """
    with reporting(request), observing(request):
        return _drafted(request) if dry_run else _planned(request, fresh=fresh)


@takes(RunRequest)
def run(
    request: RunRequest,
    *,
    all_collections: AllCollections = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    dagster: Dagster = False,
) -> int:
    """Move a collection and prove it, or go on with it.

    What an interrupted run verified is not done again.
    """
    with reporting(request), observing(request):
        if all_collections:
            if dagster:
                raise ConfigurationError("--all-collections and --dagster exclude each other")
            return run_all(request, _draft_one if dry_run else partial(_run_one, fresh=fresh))
        if dry_run:
            return _drafted(request)
        return _run_by_dagster(request, fresh=fresh) if dagster else _run(request, fresh=fresh)


@takes(SyncRequest)
def sync(request: SyncRequest, *, fresh: Fresh = False, dry_run: DryRun = False) -> int:
    """Move only what is new or changed since the last complete run.

    Everything, where there was none. What is gone from the source is counted, and removed with --delete.
    """
    with reporting(request), observing(request):
        return _drafted(request) if dry_run else _run(request, fresh=fresh)


@takes(Request)
def validate(request: Request) -> int:
    """Check a migration by its ledger, or compare as verify does.

    By its ledger: every receipt, the counts, the source unchanged. With --source and --target it is verify.
    """
    with reporting(request):
        return compare(request) if request.source or request.target else _validated(request)


COMMANDS = (plan, run, sync, validate)


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────


def _planned(request: MoveRequest, *, fresh: bool) -> int:
    from migration_pipelines.plan import make_plan

    with _migration(request) as migration, migration.ledger.lease():
        earlier = migration.ledger.plan()
        try:
            made = make_plan(migration, fresh=fresh)
        except LossNotAcceptedError as error:
            return _refused(request, error.facts["plan"], error)
        heading = "planned" if fresh or earlier is None else "planned earlier"
        return _show_plan(request, made, heading=heading, ledger=migration.ledger.folder)


def _drafted(request: MoveRequest) -> int:
    from migration_pipelines.migration import ledger_for
    from migration_pipelines.plan import check_losses, draft

    with (
        tempfile.TemporaryDirectory(prefix="vector-migrate-") as home,
        _migration(request, Path(home)) as migration,
    ):
        migration.history_ledger = ledger_for(migration.config, home_folder(request.home))
        made = draft(migration)
        try:
            check_losses(made)
        except LossNotAcceptedError as error:
            return _refused(request, made, error)
        return _show_plan(request, made, heading="dry run", ledger=None)


def _show_plan(request: MoveRequest, made: Plan, *, heading: str, ledger: Path | None) -> int:
    document = plan_document(made) | {"status": heading, "ledger": ledger and str(ledger)}
    if not emit(request, document) and not request.quiet:
        from migration_pipelines.cli.show import show_plan

        show_plan(made, heading=heading)
    return 0


def _refused(request: MoveOptions, made: Plan, error: LossNotAcceptedError) -> int:
    failure = Failure.of(error)
    if not emit(request, plan_document(made) | {"status": "refused", "error": failure.document()}):
        from migration_pipelines.cli.show import show_plan

        show_plan(made, heading="refused")
    report_failure(failure)
    return failure.exit_status


def plan_document(made: Plan) -> dict[str, Any]:
    """Return what a plan says, without the bounds of its partitions."""
    document = made.model_dump(mode="json", exclude={"partitions", "config_digest"})
    return {**document, "partitions": {"total": len(made.partitions)}}


# ── run ──────────────────────────────────────────────────────────────────────────────────────────────


def _run(request: MoveRequest, *, fresh: bool) -> int:
    from migration_pipelines.migrator import run_migration

    return driven(request, lambda migration: run_migration(migration, fresh=fresh))


def _run_one(migration: Migration, *, fresh: bool) -> dict[str, Any]:
    from migration_pipelines.migrator import run_migration

    report = run_migration(migration, fresh=fresh)
    return {**report.model_dump(mode="json"), "exit_status": report.exit_status}


def _draft_one(migration: Migration) -> dict[str, Any]:
    from migration_pipelines.plan import check_losses, draft

    made = draft(migration)
    check_losses(made)
    return {**plan_document(made), "status": "dry run", "exit_status": 0}


def _run_by_dagster(request: MoveRequest, *, fresh: bool) -> int:
    name = request.name
    if name is None or request.settings():
        raise ConfigurationError(
            "--dagster runs a migration as it is declared: give its name and no settings"
        )

    def drive(migration: Migration) -> Report:
        from migration_pipelines.components.headless import run_declared

        defs, home = defs_folder(request.defs), home_folder(request.home)
        with migration.phase("migration"):
            return run_declared(name, defs=defs, home=home, fresh=fresh, listener=migration.listener)

    return driven(request, drive, grace_seconds=_DAGSTER_GRACE_SECONDS)


def driven(
    request: MoveOptions,
    drive: Callable[[Migration], Report],
    *,
    grace_seconds: float = _GRACE_SECONDS,
    show: Callable[[Migration, Report], int] | None = None,
) -> int:
    """Make a move, and show its report; an interrupted one says how to go on.

    Parameters
    ----------
    drive
        Makes it and returns the report.
    show
        Shows the report in another way and returns the exit status.
    """
    with _migration(request) as migration:

        def say_goodbye() -> None:
            _say_interrupted(request, migration)

        try:
            with stopping(say_goodbye, grace_seconds=grace_seconds):
                report = drive(migration)
        except LossNotAcceptedError as error:
            if "plan" not in error.facts:
                raise
            return _refused(request, error.facts["plan"], error)
        except KeyboardInterrupt:
            say_goodbye()
            return INTERRUPTED
    return show_report(request, report) if show is None else show(migration, report)


def _say_interrupted(request: MoveOptions, migration: Migration) -> None:
    made = migration.ledger.plan()
    if made is None:
        where = "nothing was written to the target"
    else:
        verified, total = len(migration.ledger.receipts(made)), len(made.partitions)
        where = f"{verified} of {total} partitions are verified"
    message = f"interrupted: {where}; run the same command again to go on: {resuming()}"
    say(message)
    emit(request, {"error": {"type": "Interrupted", "message": message, "exit_status": INTERRUPTED}})


def show_report(request: Options, report: Report, **more: Any) -> int:
    """Show a report, and with it in one document what else was found; returns its exit status."""
    if not emit(request, {**report.model_dump(mode="json"), **more}) and not request.quiet:
        from migration_pipelines.cli.show import show_report as show_to_people

        show_to_people(report)
    return report.exit_status


# ── validate ─────────────────────────────────────────────────────────────────────────────────────────


def _validated(request: Request) -> int:
    from migration_pipelines.validate import validate as validate_ledger

    with _migration(request) as migration:
        report = validate_ledger(migration)
    status = show_report(request, report)
    return DIFFERENT if report.status == "failed" else status


# ── what all of them do ────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _migration(request: Options, home: Path | None = None) -> Iterator[Migration]:
    folder = home or home_folder(request.home)
    with (
        listening(quiet=request.quiet or request.logs_json) as meter,
        request.migration(home=folder, listener=heard(meter)) as migration,
    ):
        meter.migration = migration
        yield migration
