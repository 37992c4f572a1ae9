"""Partitions in processes of their own: one for each worker, which opens the stores by their addresses.

A process takes keys of partitions from its standard input and answers in JSON lines: every event, and for
each partition its end. It works on the ledger that all share; where it dies, its partition fails alone.

    python -m migration_pipelines.processes
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from migration_pipelines import errors
from migration_pipelines.errors import ConfigurationError, MigrationError
from migration_pipelines.ledger import Ledger
from migration_pipelines.migration import Event, Migration, MigrationConfig
from migration_pipelines.migrator import run_partition
from migration_pipelines.model import Receipt
from migration_pipelines.store import Address, Store, open_address

_GRACE_SECONDS = 10.0


class Processes:
    """`run_partition`, in other processes; leaving the context ends them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._idle:
            _end(process)

    def run(self, migration: Migration, key: str) -> Receipt:
        """Take one partition through its phases in another process; returns its receipt.

        Raises
        ------
        MigrationError
            As in this process; or the other one died, and the partition can be run again.
        """
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or _start(migration)
        try:
            error = _work(process, migration, key)
        except BaseException:  # stopped, or dead
            process.kill()
            _end(process)
            raise
        with self._lock:
            self._idle.append(process)
        if error is not None:
            raise error
        receipt = migration.ledger.receipt(key)
        assert receipt is not None
        return receipt


def require_addresses(*stores: Store) -> None:
    """Raise where another process can't open the same stores by their addresses.

    Raises
    ------
    ConfigurationError
    """
    for store in stores:
        address = store.address()
        if store.kind == "memory":
            raise ConfigurationError(f"{address} lies in this process: worker_type='process' can't reach it")
        found, _ = open_address(address)
        if _settings(found) != _settings(store):
            raise ConfigurationError(
                f"{address} alone doesn't open the same store in another process: put its secrets into the "
                "environment and its other settings into the address, or use worker_type='thread'"
            )


def require_many_writers(target: Store) -> None:
    """Raise where a target is a folder that one process writes at a time.

    Raises
    ------
    ConfigurationError
    """
    if target.kind != "parquet" and Address.parse(target.address()).host is None:
        raise ConfigurationError(
            f"{target.address()} is written by one process at a time: use worker_type='thread'"
        )


def _settings(store: Store) -> dict[str, Any]:
    return {name: getattr(store, name) for name in type(store).model_fields}


# ── this process ─────────────────────────────────────────────────────────────────────────────────────


def _start(migration: Migration) -> subprocess.Popen[bytes]:
    # Its own copy of this package, wherever that was imported from.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(  # noqa: S603 - this very interpreter, and this module
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    frozen = migration.config.frozen_part()  # in the words of JSON
    config = migration.config.model_dump(mode="json", exclude={"filter", "schema_mapping"})
    config |= {name: frozen.get(name) for name in ("filter", "schema_mapping")}
    _say(process.stdin, {"config": config, "ledger": str(migration.ledger.folder.absolute())})
    return process


def _work(process: subprocess.Popen[bytes], migration: Migration, key: str) -> MigrationError | None:
    """Have a partition done, passing its events on; return how it failed, if it did."""
    _say(process.stdin, {"key": key})
    assert process.stdout is not None
    for line in process.stdout:
        found = orjson.loads(line)
        if "event" not in found:
            return None if found["error"] is None else _error(found["error"])
        event = found["event"]
        event.pop("migration")
        migration.tell(**event | {"error": event["error"] and _error(event["error"])})
    raise MigrationError(
        f"the process at work on partition {key} died with status {process.wait()}: run it again",
        partition=key,
    )


def _say(stream: Any, message: Any) -> None:
    with suppress(BrokenPipeError):  # it is dead: whoever reads from it finds out, and says so
        stream.write(orjson.dumps(message, default=str) + b"\n")
        stream.flush()


def _error(told: dict[str, Any]) -> MigrationError:
    kind = getattr(errors, told["kind"], MigrationError)
    found: MigrationError = kind(told["message"], **told["facts"])
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # it is dead already
        process.stdin.close()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


# ── the other process ────────────────────────────────────────────────────────────────────────────────


def _told(error: BaseException | None) -> dict[str, Any] | None:
    if error is None:
        return None
    if isinstance(error, MigrationError):
        return {"kind": type(error).__name__, "message": str(error), "facts": error.facts}
    return {"kind": "MigrationError", "message": f"{type(error).__name__}: {error}", "facts": {}}


def _serve(read: Any, write: Callable[[Any], None]) -> None:
    """Do partitions until there are no more."""
    asked = orjson.loads(read.readline())

    def pass_on(event: Event) -> None:
        fields = {name: value for name, value in vars(event).items() if name != "error"}
        write({"event": fields | {"error": _told(event.error)}})

    config = MigrationConfig.model_validate(asked["config"])
    with Migration(config=config, ledger=Ledger(Path(asked["ledger"])), listener=pass_on) as migration:
        for line in read:
            error: Exception | None = None
            try:
                run_partition(migration, orjson.loads(line)["key"])
            except Exception as found:  # noqa: BLE001 - told to the process that asked
                error = found
            write({"error": _told(error)})


def main() -> None:
    """Serve the process that started this one."""
    # What drivers print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def write(message: Any) -> None:
        with lock:
            _say(answers, message)

    _serve(sys.stdin.buffer, write)


if __name__ == "__main__":
    main()
