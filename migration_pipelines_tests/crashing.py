"""A migration in a process of its own, killed by SIGKILL at a named point or after a time.

A forkserver that has imported the engine starts each process in milliseconds: many kills fit into a test.
What the process did is appended to a log, event by event, which survives it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["migration_pipelines.migrator", "migration_pipelines.stores.parquet", "psycopg", "pyarrow.parquet"]
)
TIME_LIMIT_SECONDS = 120


def run(
    settings: Mapping[str, Any],
    home: Path,
    log: Path,
    *,
    die_after_seconds: float | None = None,
    die_at: tuple[str, int] | None = None,
) -> int | None:
    """Run a migration in its own process; returns the exit status, -9 where it was killed.

    `die_at` names an event and how often it must have happened.
    """
    process = _CONTEXT.Process(target=_work, args=(dict(settings), home, log, die_after_seconds, die_at))
    process.start()
    process.join(TIME_LIMIT_SECONDS)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"the migration still runs after {TIME_LIMIT_SECONDS} s")
    return process.exitcode


def events(log: Path) -> list[tuple[str, str]]:
    """The (name, partition) of every event that the last process told of."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("]")]


def _work(
    settings: dict[str, Any],
    home: Path,
    log: Path,
    die_after_seconds: float | None,
    die_at: tuple[str, int] | None,
) -> None:
    from migration_pipelines.migration import Event, Migration, MigrationConfig, ledger_for
    from migration_pipelines.migrator import run_migration

    log.unlink(missing_ok=True)
    handle = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    seen: dict[str, int] = {}

    def listen(event: Event) -> None:
        os.write(handle, (json.dumps([event.name, event.partition]) + "\n").encode())
        seen[event.name] = seen.get(event.name, 0) + 1
        if die_at is not None and die_at == (event.name, seen[event.name]):
            os.kill(os.getpid(), signal.SIGKILL)

    if die_after_seconds is not None:
        threading.Timer(die_after_seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    config = MigrationConfig(**settings)
    migration = Migration(config=config, ledger=ledger_for(config, home), listener=listen)
    report = run_migration(migration)
    os._exit(report.exit_status)
