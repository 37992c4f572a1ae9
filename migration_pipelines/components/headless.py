"""A declared migration as a real backfill, without webserver or daemon.

The runs are executed in this process, one import for all of them, and Dagster's UI shows plan, backfill and
runs afterwards. Where a daemon serves the same home it executes them instead, and this process waits.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from migration_pipelines.components.backfills import launch_backfill
from migration_pipelines.components.declared import NAME_TAG, SESSION_TAG, Declared
from migration_pipelines.components.failures import errors_of
from migration_pipelines.components.home import dagster_home, environment
from migration_pipelines.components.internals import (
    BACKFILL_TAG,
    Session,
    close_abandoned,
    is_finished,
    open_session,
)
from migration_pipelines.components.progress import listening
from migration_pipelines.declarations import read_declarations
from migration_pipelines.errors import LeaseHeldError, MigrationError
from migration_pipelines.migration import Listener, Migration, default_home, ignore
from migration_pipelines.validate import Report, validate

_DEFS = Path(__file__).parents[1] / "defs"
# The daemon must not run again what this process reports as failed.
_NO_RETRIES = {"dagster/max_retries": "0"}
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
_POLL_SECONDS = 1.0


def run_declared(
    name: str,
    *,
    defs: Path | None = None,
    home: Path | None = None,
    fresh: bool = False,
    listener: Listener = ignore,
) -> Report:
    """Run a declared migration, or what is left of it, as a Dagster backfill; return the report.

    Parameters
    ----------
    defs
        The folder with the declarations; `VECTOR_MIGRATE_DEFS` or the package's own where left out.
    home
        The project's home; `default_home()` where left out.
    fresh
        Forget an earlier plan and its receipts.
    listener
        Hears of every batch; of nothing where a daemon does the work.

    Raises
    ------
    MigrationError
        What failed the plan, or every partition alike: the engine's own error. What failed one
        partition is in the report.
    LeaseHeldError
        Another process runs this migration.
    KeyboardInterrupt
        Interrupted; the same call goes on with it.
    """
    home = (home or default_home()).absolute()
    defs = defs or Path(os.environ.get("VECTOR_MIGRATE_DEFS") or _DEFS)
    declarations = read_declarations(defs)
    with declarations.migration(name, home=home) as migration:
        declared = Declared(declarations.migrations[name], declarations.connections)
        with (
            _variables(environment(home, defs)),
            _alone(home, declared),
            listening(listener),
            open_session(dagster_home(home)) as session,
        ):
            return _Headless(session, declared, migration).run(fresh=fresh)


def close_abandoned_runs(home: Path) -> None:
    """End what headless processes that are gone have left unfinished on a home, before its UI is opened."""
    with open_session(dagster_home(home)) as session:
        for lock in (dagster_home(home) / "headless").glob("*.lock"):
            with _locked(lock) as free:
                if free:
                    _close(session, lock.stem)


@dataclass(frozen=True)
class _Headless:
    session: Session
    declared: Declared
    migration: Migration

    @property
    def _name(self) -> dict[str, str]:
        return {NAME_TAG: self.declared.spec.name}

    def _tags(self) -> dict[str, str]:
        """Return the tags of what is launched now: a daemon's work isn't abandoned with us."""
        if self.session.daemon_is_alive():
            return self._name
        return {**self._name, SESSION_TAG: self.declared.slug, **_NO_RETRIES}

    def run(self, *, fresh: bool) -> Report:
        started = time.monotonic()
        _close(self.session, self.declared.slug)
        try:
            self._plan(fresh=fresh)
            backfill_id = launch_backfill(
                self.session.instance,
                self.session.asset_graph,
                self.declared,
                self.migration.plan,
                tags=self._tags(),
                run_config=_QUIET,
            )
            self._finish(backfill_id)
        except BaseException:
            _close(self.session, self.declared.slug)
            raise
        return self._report(backfill_id, seconds=time.monotonic() - started)

    def _plan(self, *, fresh: bool) -> None:
        config = {"ops": {f"{self.declared.slug}__plan": {"config": {"fresh": fresh}}}}
        run_id = self.session.submit(
            [self.declared.key("inspected"), self.declared.key("plan")],
            tags=self._tags(),
            run_config={**config, **_QUIET},
        )
        while not self._run(run_id).is_finished:
            self._step()
        self._raise_unless_succeeded(run_id)
        self.migration.__dict__.pop("plan", None)

    def _finish(self, backfill_id: str) -> None:
        while not is_finished(self.session.instance, backfill_id):
            if not self.session.daemon_is_alive():
                self.session.iterate(backfill_id)
            self._step()
            if self._is_canceled(backfill_id):
                raise KeyboardInterrupt

    def _is_canceled(self, backfill_id: str) -> bool:
        canceled = dg.RunsFilter(tags={BACKFILL_TAG: backfill_id}, statuses=[dg.DagsterRunStatus.CANCELED])
        return bool(self.session.instance.get_runs(canceled, limit=1))

    def _step(self) -> None:
        """Execute what is queued, or wait for the daemon to do so."""
        if self.session.daemon_is_alive():
            time.sleep(_POLL_SECONDS)
        else:
            self.session.execute_queued(self._name)

    def _run(self, run_id: str) -> dg.DagsterRun:
        run = self.session.instance.get_run_by_id(run_id)
        assert run is not None
        return run

    def _raise_unless_succeeded(self, run_id: str) -> None:
        run = self._run(run_id)
        if run.status == dg.DagsterRunStatus.CANCELED:
            raise KeyboardInterrupt
        if run.status != dg.DagsterRunStatus.SUCCESS:
            raise self._errors(run_id).popitem()[1]

    def _errors(self, run_id: str) -> dict[str, MigrationError]:
        """Return what failed a run, by partition; under "" what failed it as a whole."""
        failure = self.session.failure_of(run_id)
        if failure is None:
            return {"": MigrationError(f"run {run_id} ended without a result; the UI shows its log")}
        return errors_of(failure[1], failure[0])

    def _report(self, backfill_id: str, *, seconds: float) -> Report:
        """Return the report; the statuses of the runs and the receipts decide, never the backfill's."""
        runs = self.session.instance.get_runs(dg.RunsFilter(tags={BACKFILL_TAG: backfill_id}))
        failed: dict[str, MigrationError] = {}
        for run in runs:
            is_last = self.declared.key("validated") in (run.asset_selection or ())
            if is_last and run.status == dg.DagsterRunStatus.SUCCESS:
                return Report.model_validate(self.migration.ledger.report())
            if not is_last and run.status != dg.DagsterRunStatus.SUCCESS:
                failed |= self._errors(run.run_id)
        if "" in failed:
            raise failed[""]
        different = sum(error.facts.get("different", 0) for error in failed.values())
        return validate(self.migration, seconds=seconds, failed=failed, different=different)


# ── one process a migration ──────────────────────────────────────────────────────────────────────────


@contextmanager
def _alone(home: Path, declared: Declared) -> Iterator[None]:
    with _locked(dagster_home(home) / "headless" / f"{declared.slug}.lock") as free:
        if not free:
            raise LeaseHeldError(
                f"another process runs {declared.spec.name!r} on {home}; wait until it is done, or stop it"
            )
        yield


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock that a crash releases; gives False where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _close(session: Session, slug: str) -> None:
    """End what an earlier process left: whoever holds the lock knows that nobody is at work on it."""
    close_abandoned(session.instance, {SESSION_TAG: slug}, why="The process that executed this run is gone.")


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for as long as the context is open."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
