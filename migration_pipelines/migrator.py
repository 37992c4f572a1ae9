"""Drives the phases in one process: partitions side by side in threads, over the shared ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

from migration_pipelines.errors import (
    AuthenticationError,
    DiskFullError,
    MigrationError,
    StoreUnavailableError,
    UsageError,
)
from migration_pipelines.extract import extract
from migration_pipelines.load import load, publish
from migration_pipelines.migration import Migration
from migration_pipelines.model import Receipt
from migration_pipelines.plan import make_plan
from migration_pipelines.resources import ResourceMonitor
from migration_pipelines.transform import transform
from migration_pipelines.validate import Report, validate
from migration_pipelines.verify import verify

Done = TypeVar("Done")

# What fails one partition of these ways fails all of them: the run stops instead of trying each.
_STOPS_ALL = (UsageError, StoreUnavailableError, AuthenticationError, DiskFullError)


def run_partition(migration: Migration, key: str) -> Receipt:
    """Take one partition through extract, transform, load and verify; returns its receipt.

    Idempotent: what an earlier attempt finished is not done again.
    """
    done = migration.ledger.receipt(key)
    if done is not None:
        return done
    with migration.phase("partition", key), migration.ledger.partition_lease(key):
        extract(migration, key)
        transform(migration, key)
        load(migration, key)
        return verify(migration, key)


def run_migration(
    migration: Migration,
    *,
    fresh: bool = False,
    work: Callable[[Migration, str], Receipt] = run_partition,
) -> Report:
    """Run a migration, or what is left of it, and return the report.

    Parameters
    ----------
    fresh
        Forget an earlier plan and its receipts.
    work
        What is done with each partition, such as `run_partition` in another process.

    Raises
    ------
    UsageError, StoreUnavailableError, AuthenticationError, DiskFullError
        What would fail every partition alike. What fails one partition is in the report.
    LeaseHeldError
        Another process is at work on this migration.
    KeyboardInterrupt
        Interrupted; the same call goes on with it.
    """
    started = time.monotonic()
    with (
        migration,
        migration.phase("migration"),
        migration.ledger.lease(),
        ResourceMonitor(home=migration.ledger.folder) as monitor,
    ):
        make_plan(migration, fresh=fresh)
        outcomes = dict(run_partitions(migration, migration.pending(), work))
        failed = {key: found for key, found in outcomes.items() if isinstance(found, MigrationError)}
        if not migration.pending():
            publish(migration)
        different = sum(error.facts.get("different", 0) for error in failed.values())
        report = validate(
            migration,
            seconds=time.monotonic() - started,
            failed=failed,
            different=different,
            resources=monitor.summary(),
        )
        if report.status == "complete":
            migration.source.close()
            migration.ledger.discard_scratch()
        return report


def run_partitions(
    migration: Migration, keys: Iterable[str], work: Callable[[Migration, str], Done]
) -> Iterator[tuple[str, Done | MigrationError]]:
    """Run partitions, `config.workers` at a time; yield what each gave, or its error, as they finish.

    Leaving the iterator early stops the partitions in work at their next batch.

    Raises
    ------
    UsageError, StoreUnavailableError, AuthenticationError, DiskFullError
        What would fail every partition alike.
    """
    waiting = iter(list(keys))
    migration.stopping.clear()
    with ThreadPoolExecutor(migration.config.workers, thread_name_prefix="partition") as pool:
        running: dict[Future[Done], str] = {}
        try:
            while True:
                for key in islice(waiting, migration.config.workers - len(running)):
                    running[pool.submit(work, migration, key)] = key
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), _outcome(future)
        except BaseException:
            migration.stopping.set()
            raise


def _outcome(future: Future[Any]) -> Any:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, _STOPS_ALL) or not isinstance(error, MigrationError):
        raise error
    return error
