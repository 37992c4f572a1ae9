"""`export` and `import`: a collection into a folder of Parquet files, and out of one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from migration_pipelines.cli.comparing import compared, document_of, judge
from migration_pipelines.cli.moving import Fresh, driven, show_report
from migration_pipelines.cli.observing import observing
from migration_pipelines.cli.options import RunOptions, takes
from migration_pipelines.cli.reporting import reporting
from migration_pipelines.errors import ConfigurationError

if TYPE_CHECKING:
    from migration_pipelines.migration import Migration
    from migration_pipelines.validate import Report


@dataclass(frozen=True, kw_only=True)
class ArchiveRequest(RunOptions):
    """A folder of Parquet files, what of it, and how."""

    folder: Annotated[
        str | None,
        Argument(
            metavar="FOLDER",
            help="Parquet files: ./backup, s3://bucket/backup; backups/ holds several, by name.",
        ),
    ] = None
    validate: Annotated[
        bool,
        Option("--validate", help="Afterwards compare both collections from scratch, as verify does."),
    ] = False

    def archive(self) -> str:
        """Return the address of the folder.

        Raises
        ------
        ConfigurationError
            None is named, or the address of another store.
        """
        if not self.folder:
            raise ConfigurationError(
                "say which FOLDER of Parquet files, such as ./backup or s3://bucket/backup"
            )
        from migration_pipelines.store import store_kinds

        kind = re.match(r"([a-z]+):(?!//)|([a-z]+)://", self.folder)
        named = kind and (kind[1] or kind[2])
        if named == "parquet":
            return self.folder
        if named in store_kinds():
            raise ConfigurationError(
                f"FOLDER is a folder of Parquet files, not the address of a {named} store: use run for that"
            )
        return f"parquet:{self.folder}"


@dataclass(frozen=True, kw_only=True)
class ExportRequest(ArchiveRequest):
    """Which collection to write into which folder."""

    source: Annotated[
        str | None, Argument(metavar="SOURCE", help="The address of a collection, as for run --source.")
    ] = None

    def addresses(self) -> tuple[str, str]:
        """Return both addresses."""
        if not self.source:
            raise ConfigurationError("say which SOURCE, such as chroma:./chroma_db#docs")
        return self.source, self.archive()


@dataclass(frozen=True, kw_only=True)
class ImportRequest(ArchiveRequest):
    """Which folder to write into which collection."""

    target: Annotated[
        str | None, Argument(metavar="TARGET", help="The address of a collection, as for run --target.")
    ] = None

    def addresses(self) -> tuple[str, str]:
        """Return both addresses."""
        if not self.target:
            raise ConfigurationError("say which TARGET, such as qdrant://host:6333/docs")
        return self.archive(), self.target


@takes(ExportRequest)
def export(request: ExportRequest, *, fresh: Fresh = False) -> int:
    """Move a collection into a folder of Parquet files, and prove it."""
    return _moved(request, fresh=fresh)


@takes(ImportRequest)
def import_(request: ImportRequest, *, fresh: Fresh = False) -> int:
    """Move a folder of Parquet files into a collection, and prove it.

    Folders that export wrote, and those of other tools (see docs/stores.md).
    """
    return _moved(request, fresh=fresh)


COMMANDS = (export, import_)


def _moved(request: ArchiveRequest, *, fresh: bool) -> int:
    from migration_pipelines.migrator import run_migration

    show = partial(_compare, request) if request.validate else None
    with reporting(request), observing(request):
        return driven(request, lambda migration: run_migration(migration, fresh=fresh), show=show)


def _compare(request: ArchiveRequest, migration: Migration, report: Report) -> int:
    if report.exit_status:
        return show_report(request, report)
    found = compared(request, migration)
    show_report(request, report, validation=document_of(found))
    if not request.form.is_for_machines and not request.quiet:
        from migration_pipelines.cli.show import show_comparison

        show_comparison(found)
    return judge(found)
