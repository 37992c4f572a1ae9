"""Where a command's document goes: standard output, a report file, both or neither."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migration_pipelines.cli.failures import Failure
from migration_pipelines.cli.output import as_json_text
from migration_pipelines.errors import ConfigurationError

if TYPE_CHECKING:
    from migration_pipelines.cli.options import Options


def emit(request: Options, document: dict[str, Any]) -> bool:
    """Write the command's document where it was asked for; returns whether standard output has it."""
    if request.report is not None:
        write_report(request.report, document)
    return request.show(document)


def write_report(path: Path, document: dict[str, Any]) -> None:
    """Write a report file: whole or not at all."""
    from migration_pipelines.ledger import write_file

    write_file(path.absolute(), as_json_text(document).encode())


@contextmanager
def reporting(request: Options) -> Iterator[None]:
    """See that a report file never tells of an earlier run: an error is written there as well."""
    if request.report is not None and request.report.is_dir():
        raise ConfigurationError(f"--report {request.report} is a folder: name a file")
    try:
        yield
    except Exception as error:
        if request.report is not None:
            failure = Failure.of(error, sys.argv)
            write_report(request.report, {"status": "failed", "error": failure.document()})
        raise
