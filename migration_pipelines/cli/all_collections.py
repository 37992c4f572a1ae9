"""`run --all-collections`: every collection of a store, one migration each, one document for all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from migration_pipelines.cli.failures import INTERRUPTED, Failure, report_failure, resuming, say
from migration_pipelines.cli.migrations import between, home_folder
from migration_pipelines.cli.observing import heard
from migration_pipelines.cli.progress import listening
from migration_pipelines.cli.reporting import emit
from migration_pipelines.cli.signals import stopping
from migration_pipelines.errors import ConfigurationError, MigrationError

if TYPE_CHECKING:
    from migration_pipelines.cli.migrations import Opened
    from migration_pipelines.cli.options import MoveRequest
    from migration_pipelines.migration import Migration

_GRACE_SECONDS = 1.5

AllCollections = Annotated[
    bool,
    Option("--all-collections", help="Every collection of the source, one after the other, by its name."),
]
Documents = dict[str, dict[str, Any]]
Drive = Callable[["Migration"], dict[str, Any]]  # moves one collection and returns its document


def run_all(request: MoveRequest, drive: Drive) -> int:
    """Move every collection of the source; one that fails doesn't stop the others.

    Returns
    -------
    The exit status: that of the failed collections, 1 where they failed in different ways.
    """
    source, target = _whole_stores(request)
    found: Documents = {}
    try:
        with stopping(lambda: _say_interrupted(request, found), grace_seconds=_GRACE_SECONDS):
            names = _collections(source)
            for number, name in enumerate(names, 1):
                say(f"{name}: collection {number} of {len(names)}")
                found[name] = _move(request, (source[0], name), target, drive)
    except KeyboardInterrupt:
        _say_interrupted(request, found)
        return INTERRUPTED
    _show(request, found, "complete" if all(map(_arrived, found.values())) else "incomplete")
    failed = {document["exit_status"] for document in found.values()} - {0}
    return failed.pop() if len(failed) == 1 else int(bool(failed))


def _whole_stores(request: MoveRequest) -> tuple[Opened, Opened]:
    source, target = request.opened()
    for side, (store, collection) in (("--source", source), ("--target", target)):
        if collection is not None:
            raise ConfigurationError(
                f"--all-collections moves a whole store, but {side} {store.address(collection)} "
                "names a collection (a folder of collections ends in /)"
            )
    return source, target


def _collections(source: Opened) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="vector-migrate-") as scratch:
        reader = source[0].for_reading(Path(scratch))
        try:
            names = reader.list_collections()
        finally:
            reader.close()
    if not names:
        raise ConfigurationError(f"{source[0].address()} has no collections")
    return names


def _move(request: MoveRequest, source: Opened, target: Opened, drive: Drive) -> dict[str, Any]:
    try:
        with listening(quiet=request.quiet or request.logs_json) as meter:
            home, settings = home_folder(request.home), request.settings()
            with between(source, target, settings, home=home, listener=heard(meter)) as migration:
                meter.migration = migration
                return drive(migration)
    except MigrationError as error:
        failure = Failure.of(error)
        report_failure(failure)
        return {"status": "failed", "error": failure.document(), "exit_status": failure.exit_status}


def _arrived(document: dict[str, Any]) -> bool:
    return bool(document["exit_status"] == 0)


def _say_interrupted(request: MoveRequest, found: Documents) -> None:
    say(
        f"interrupted: {sum(map(_arrived, found.values()))} collections are complete; "
        f"run it again to go on: {resuming()}"
    )
    _show(request, found, "interrupted")


def _show(request: MoveRequest, found: Documents, status: str) -> None:
    if emit(request, {"status": status, "collections": found}) or request.quiet:
        return
    from migration_pipelines.cli.show import console, table

    rows = [(name, document["status"], _verified(document)) for name, document in found.items()]
    title = f"{status}: {sum(map(_arrived, found.values()))} of {len(found)} collections"
    console().print(table(title, ("collection", "status", "verified"), rows, right=("verified",)))


def _verified(document: dict[str, Any]) -> str:
    return f"{document['records']['verified']:,}" if "records" in document else ""
