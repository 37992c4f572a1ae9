"""The options that several commands share, each written down once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from typer import Argument, Option

from migration_pipelines.cli.config_file import Config
from migration_pipelines.cli.failures import wants_json
from migration_pipelines.cli.migrations import (
    Opened,
    between,
    complete_name,
    defs_folder,
    find_declared,
    parsed_filter,
    warn_of_password,
)
from migration_pipelines.cli.output import Shown
from migration_pipelines.errors import ConfigurationError

if TYPE_CHECKING:
    from migration_pipelines.migration import Listener, Migration

# In a command's help; arguments stand in this order on its command line.
_SHOWN_FIRST = ("name", "source", "folder", "target")
_SHOWN_LAST = (
    *("config", "defs", "home", "report", "output", "json", "quiet"),
    *("log_json", "metrics_port", "metrics_file", "metrics_push", "trace"),
)

Quiet = Annotated[bool, Option("--quiet", "-q", help="Nothing but warnings and errors.")]
Home = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Folder of ledgers, staging and Dagster's storage; else VECTOR_MIGRATE_HOME, else ./home.",
    ),
]
Defs = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Folder of declared migrations and connections; else VECTOR_MIGRATE_DEFS, else the package's.",
    ),
]
AllowLoss = Annotated[
    list[str] | None,
    Option(metavar="KIND", help="Accept a loss that plan lists: KIND, FIELD:KIND or all. May be repeated."),
]
OnExisting = Annotated[
    str | None,
    Option(metavar="HOW", help="A target that holds records: refuse (default), merge, skip, add or replace."),
]
Metric = Annotated[
    str | None,
    Option(
        metavar="METRIC",
        help="Metric of the target: cosine, dot, euclidean, manhattan, …; else the source's.",
    ),
]
BatchSize = Annotated[int | None, Option(metavar="N", min=1, help="Records in a batch.")]


@dataclass(frozen=True, kw_only=True)
class Options(Shown):
    """Which records of a collection, as what, and where to say what came of it."""

    filter: Annotated[
        str | None,
        Option(
            metavar="FILTER",
            help="""Only records that match: 'lang=en,year>=2020', or '{"lang": {"$in": ["de", "en"]}}'.""",
        ),
    ] = None
    mapping: Annotated[
        str | None,
        Option(metavar="FILE", help="YAML or JSON: fields, ids and vectors as they are to arrive."),
    ] = None
    config: Config = None
    home: Home = None
    report: Annotated[
        Path | None,
        Option(metavar="FILE", help="Write the JSON document to a file as well."),
    ] = None
    quiet: Quiet = False

    def settings(self) -> dict[str, Any]:
        """Return what was asked for beside the addresses, in the words of `MigrationConfig`."""
        found: dict[str, Any] = {} if self.filter is None else {"filter": parsed_filter(self.filter)}
        if self.mapping is not None:
            from migration_pipelines.declarations import parse_mapping, read_mapping

            inline = self.mapping.lstrip().startswith("{")
            found["schema_mapping"] = (
                parse_mapping(self.mapping, "mapping") if inline else read_mapping(Path(self.mapping))
            )
        return found

    def said(self, *names: str) -> dict[str, Any]:
        """Return those of these options that were given; losses in the words of `MigrationConfig`."""
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        losses = given.pop("allow_loss", None)
        return {**given, "allow_losses": tuple(losses)} if losses else given

    @property
    def logs_json(self) -> bool:
        """Whether lines of JSON are asked for in place of progress."""
        return False

    def addresses(self) -> tuple[str, str]:
        """Return both addresses.

        Raises
        ------
        ConfigurationError
            One is missing or can't be used.
        """
        raise NotImplementedError

    def opened(self) -> tuple[Opened, Opened]:
        """Return both stores, not yet connected, and the collections that are named; a password is warned of.

        Raises
        ------
        ConfigurationError
        """
        from migration_pipelines.store import open_address

        source, target = self.addresses()
        for address in (source, target):
            warn_of_password(address)
        return open_address(source), open_address(target)

    def migration(self, *, home: Path, listener: Listener, **changes: Any) -> Migration:
        """Return the migration that is asked for; `changes` go before its settings.

        Raises
        ------
        ConfigurationError
            Neither a declared migration nor two addresses are named, or both are.
        """
        source, target = self.opened()
        return between(source, target, {**self.settings(), **changes}, home=home, listener=listener)


@dataclass(frozen=True, kw_only=True)
class Request(Options):
    """Which two collections: those of a declared migration, or of two addresses."""

    name: Annotated[
        str | None,
        Argument(
            metavar="[NAME|FILE]",
            help="A declared migration, or a YAML file that declares one.",
            autocompletion=complete_name,
        ),
    ] = None
    source: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="Where to read: chroma:./chroma_db#docs, pgvector://user@host:5432/db/table, …",
        ),
    ] = None
    target: Annotated[
        str | None,
        Option(metavar="ADDRESS", help="Where to write; without a collection it takes the source's name."),
    ] = None
    defs: Defs = None

    def addresses(self) -> tuple[str, str]:
        """Return both addresses.

        Raises
        ------
        ConfigurationError
            One is missing, or a declared migration is named as well.
        """
        if self.name is not None or not (self.source and self.target):
            raise ConfigurationError("name a declared migration, or give both --source and --target")
        return self.source, self.target

    def migration(self, *, home: Path, listener: Listener, **changes: Any) -> Migration:
        """Return the migration that is asked for; `changes` go before its settings.

        Raises
        ------
        ConfigurationError
        """
        if self.name is None or self.source or self.target:
            return super().migration(home=home, listener=listener, **changes)
        spec, declared = find_declared(self.name, defs_folder(self.defs))
        settings = {**self.settings(), **changes}
        return declared.migration(spec.name, home=home, listener=listener, **settings)


@dataclass(frozen=True, kw_only=True)
class MoveOptions(Options):
    """All that may be said of a move on the command line."""

    on_existing: OnExisting = None
    allow_loss: AllowLoss = None
    metric: Metric = None
    max_rejects: Annotated[
        int | None,
        Option(metavar="N", min=0, help="Refused records that still count as complete; 0 by default."),
    ] = None
    partition_size: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Records in a partition."),
    ] = None
    batch_size: BatchSize = None
    workers: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Partitions in work at a time."),
    ] = None
    retry: Annotated[
        int | None,
        Option(metavar="N", min=0, help="How often what fails for a passing reason is tried again."),
    ] = None
    log_json: Annotated[
        bool, Option("--log-json", help="Log JSON lines on standard error; also VECTOR_MIGRATE_LOG=json.")
    ] = False

    @property
    def logs_json(self) -> bool:
        """Whether lines of JSON are asked for in place of progress, here or by the environment."""
        return self.log_json or wants_json()

    def settings(self) -> dict[str, Any]:
        """Return what was asked for beside the addresses, in the words of `MigrationConfig`."""
        same = (
            "on_existing",
            "allow_loss",
            "metric",
            "max_rejects",
            "partition_size",
            "batch_size",
            "workers",
        )
        retry = {} if self.retry is None else {"retry": {"attempts": self.retry + 1}}
        return {**super().settings(), **self.said(*same), **retry}


@dataclass(frozen=True, kw_only=True)
class RunOptions(MoveOptions):
    """How to move, and who else is to hear of it."""

    metrics_port: Annotated[
        int | None,
        Option(metavar="N", min=0, max=65535, help="Serve Prometheus metrics on 127.0.0.1:N; 0: any port."),
    ] = None
    metrics_file: Annotated[
        Path | None,
        Option(metavar="FILE", help="Write them to a file, for the node exporter's textfile collector."),
    ] = None
    metrics_push: Annotated[
        str | None, Option(metavar="URL", help="Push them to a Pushgateway at the end.")
    ] = None
    trace: Annotated[
        bool, Option("--trace", help="Send OpenTelemetry spans to OTEL_EXPORTER_OTLP_ENDPOINT.")
    ] = False

    @property
    def shows_metrics(self) -> bool:
        """Whether metrics are asked for."""
        return not (self.metrics_port is None and self.metrics_file is None and self.metrics_push is None)


@dataclass(frozen=True, kw_only=True)
class MoveRequest(MoveOptions, Request):
    """What to move, and how."""


@dataclass(frozen=True, kw_only=True)
class RunRequest(RunOptions, MoveRequest):
    """What to move, how, and who else is to hear of it."""


@dataclass(frozen=True, kw_only=True)
class SyncRequest(RunRequest):
    """What to keep in step, and how what changed is found."""

    delete: Annotated[
        bool, Option("--delete", help="Remove from the target what was moved and is gone from the source.")
    ] = False
    watermark: Annotated[
        str | None,
        Option(metavar="FIELD", help="A field that grows with every change: read only what may be newer."),
    ] = None
    overlap: Annotated[
        float | None,
        Option(metavar="N", min=0, help="Begin so far before the last run's watermark; moments: seconds."),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return what was asked for beside the addresses, in the words of `MigrationConfig`."""
        found = {**super().settings(), **self.said("watermark"), "incremental": True}
        if self.overlap is not None:
            found["watermark_overlap"] = self.overlap
        if self.delete:
            found["apply_deletes"] = True
        return found


Command = TypeVar("Command", bound=Callable[..., int])


def takes(request: type[Shown]) -> Callable[[Command], Command]:
    """Give a command the options of a request; it gets them as one value, before its own options."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [item.replace(kind=item.KEYWORD_ONLY) for item in list(signature.parameters.values())[1:]]
        names = [item.name for item in fields(request)]

        @functools.wraps(command)
        def call(**values: Any) -> int:
            asked = request(**{name: values.pop(name) for name in names})
            return command(asked, **values)

        # Typer reads options from the signature alone.
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            sorted([*_parameters(request), *own], key=lambda item: _place(item.name))
        )
        call.__annotations__ = {}
        return call  # type: ignore[return-value]

    return decorate


def _parameters(request: type[Shown]) -> list[inspect.Parameter]:
    hints = get_type_hints(request, include_extras=True)
    return [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if item.default is MISSING else item.default,
            annotation=hints[item.name],
        )
        for item in fields(request)
    ]


def _place(name: str) -> int:
    """Return where an option stands in a command's help."""
    if name in _SHOWN_FIRST:
        return _SHOWN_FIRST.index(name) - len(_SHOWN_FIRST)
    return 1 + _SHOWN_LAST.index(name) if name in _SHOWN_LAST else 0
