"""The entry point: the commands by name, and every way out of them as an exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from migration_pipelines.cli import archives, comparing, estimating, extras, looking, moving, output
from migration_pipelines.cli.failures import Failure, called_with, report_failure
from migration_pipelines.cli.observing import saying_as_asked
from migration_pipelines.redaction import redacted

_EPILOG = (
    "Exit status: 0 complete and verified; 1 incomplete, failed or too many records refused; 2 the request "
    "must change; 3 validation found differences; 4 a store is unreachable or refuses the login; "
    "130 interrupted, the same command goes on."
)

app = typer.Typer(
    name="vector-migrate",
    help="Move collections between vector stores, and prove that everything arrived.",
    epilog=_EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it reads as well, and starts three times as fast
    context_settings={"max_content_width": 100},
)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - Typer calls it so
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("migration-pipelines")
    except PackageNotFoundError:
        found = "(not installed)"
    sys.stdout.write(f"vector-migrate {found}\n")
    raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")]


EnvFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Variables that aren't set, secrets among them; else .env in this folder, where there is one.",
    ),
]


@app.callback()
def _options(*, version: Version = False, debug: Debug = False, env_file: EnvFile = None) -> None:  # noqa: ARG001
    # What goes before every command. `_status` looks at --debug, even where the command line can't be parsed.
    path = env_file or Path(".env")
    if env_file is not None or path.is_file():
        from migration_pipelines.credentials import read_env_file

        read_env_file(path, commands=env_file is not None)


for _group in (looking, moving, estimating, comparing, archives, extras):
    for _command in _group.COMMANDS:
        app.command(_command.__name__.strip("_"))(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status.

    Parameters
    ----------
    arguments
        In place of those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    sys.exit(_status(given))


def _status(arguments: list[str]) -> int:
    called_with(arguments)
    output.choose(None)
    try:
        return app(arguments, prog_name="vector-migrate", standalone_mode=False) or 0
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing may be written there at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - whatever happens ends as one clear line and an exit status
        failure = Failure.of(error, arguments)
        with saying_as_asked(arguments):
            report_failure(failure)
        output.show_document({"error": failure.document()}, output.form_of(arguments))
        if "--debug" in arguments:
            sys.stderr.write(redacted("".join(traceback.format_exception(error)), arguments))
        return failure.exit_status
