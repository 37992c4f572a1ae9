"""The options that several commands share, each written down once, and the migration that they ask for."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from typer import Argument, Option

from migration_pipelines.cli.failures import say, wants_json
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.redaction import passwords

if TYPE_CHECKING:
    from migration_pipelines.declarations import Declarations, MigrationSpec
    from migration_pipelines.migration import Listener, Migration
    from migration_pipelines.store import Store

Opened = tuple["Store", str | None]  # a store, and the collection in it

_SHOWN_LAST = (  # in a command's help
    *("defs", "home", "report", "json", "quiet"),
    *("log_json", "metrics_port", "metrics_file", "metrics_push", "trace"),
)
_PASSWORD_VARIABLES = {
    "chroma": "CHROMA_TOKEN",
    "elasticsearch": "ELASTICSEARCH_PASSWORD",
    "milvus": "MILVUS_PASSWORD",
    "pgvector": "PGVECTOR_PASSWORD",
    "pinecone": "PINECONE_API_KEY",
    "qdrant": "QDRANT_API_KEY",
    "weaviate": "WEAVIATE_API_KEY",
}

Json = Annotated[bool, Option("--json", help="One JSON document on standard output.")]
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


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which two collections, and where to say what came of it."""

    name: Annotated[
        str | None,
        Argument(metavar="[NAME|FILE]", help="A declared migration, or a YAML file that declares one."),
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
    filter: Annotated[
        str | None,
        Option(
            metavar="FILTER",
            help="""Only records that match: 'lang=en,year>=2020', or '{"lang": {"$in": ["de", "en"]}}'.""",
        ),
    ] = None
    mapping: Annotated[
        Path | None,
        Option(metavar="FILE", help="YAML or JSON: fields, ids and vectors as they are to arrive."),
    ] = None
    defs: Defs = None
    home: Home = None
    report: Annotated[
        Path | None,
        Option(metavar="FILE", help="Write the JSON document to a file as well."),
    ] = None
    json: Json = False
    quiet: Quiet = False

    def settings(self) -> dict[str, Any]:
        """Return what was asked for beside the addresses, in the words of `MigrationConfig`."""
        found: dict[str, Any] = {} if self.filter is None else {"filter": parsed_filter(self.filter)}
        if self.mapping is not None:
            from migration_pipelines.declarations import read_mapping

            found["schema_mapping"] = read_mapping(self.mapping)
        return found

    @property
    def logs_json(self) -> bool:
        """Whether lines of JSON are asked for in place of progress."""
        return False

    def migration(self, *, home: Path, listener: Listener) -> Migration:
        """Return the migration that is asked for.

        Raises
        ------
        ConfigurationError
            Neither a declared migration nor two addresses are named, or both are.
        """
        if self.name is not None and not (self.source or self.target):
            return self._declared(self.name, home=home, listener=listener)
        source, target = self.opened()
        return between(source, target, self.settings(), home=home, listener=listener)

    def opened(self) -> tuple[Opened, Opened]:
        """Return both stores, not yet connected, and the collections that are named.

        Raises
        ------
        ConfigurationError
        """
        from migration_pipelines.store import open_address

        source, target = self.addresses()
        return open_address(source), open_address(target)

    def addresses(self) -> tuple[str, str]:
        """Return both addresses; a password in one earns a warning.

        Raises
        ------
        ConfigurationError
            One is missing, or a declared migration is named as well.
        """
        if self.name is not None or not (self.source and self.target):
            raise ConfigurationError("name a declared migration, or give both --source and --target")
        for address in (self.source, self.target):
            warn_of_password(address)
        return self.source, self.target

    def _declared(self, name: str, *, home: Path, listener: Listener) -> Migration:
        spec, declared = find_declared(name, defs_folder(self.defs))
        return declared.migration(spec.name, home=home, listener=listener, **self.settings())


@dataclass(frozen=True, kw_only=True)
class MoveRequest(Request):
    """Which migration, with all that may be said of it on the command line."""

    on_existing: Annotated[
        str | None,
        Option(
            metavar="HOW", help="A target that holds records: refuse (default), merge, skip, add or replace."
        ),
    ] = None
    allow_loss: Annotated[
        list[str] | None,
        Option(
            metavar="KIND", help="Accept a loss that plan lists: KIND, FIELD:KIND or all. May be repeated."
        ),
    ] = None
    metric: Annotated[
        str | None,
        Option(
            metavar="METRIC",
            help="Metric of the target: cosine, dot, euclidean, manhattan, …; else the source's.",
        ),
    ] = None
    max_rejects: Annotated[
        int | None,
        Option(metavar="N", min=0, help="Refused records that still count as complete; 0 by default."),
    ] = None
    partition_size: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Records in a partition."),
    ] = None
    batch_size: Annotated[int | None, Option(metavar="N", min=1, help="Records in a batch.")] = None
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
        same = ("on_existing", "metric", "max_rejects", "partition_size", "batch_size", "workers")
        found = super().settings() | {name: getattr(self, name) for name in same}
        found["allow_losses"] = tuple(self.allow_loss) if self.allow_loss else None
        found["retry"] = None if self.retry is None else {"attempts": self.retry + 1}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RunRequest(MoveRequest):
    """What to move, and who else is to hear of it."""

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


Command = TypeVar("Command", bound=Callable[..., int])


def takes(request: type[Request]) -> Callable[[Command], Command]:
    """Give a command the options of a request; it gets them as one value, before its own options."""

    def decorate(command: Command) -> Command:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        names = [item.name for item in fields(request)]

        @functools.wraps(command)
        def call(**values: Any) -> int:
            asked = request(**{name: values.pop(name) for name in names})
            return command(asked, **values)

        # Typer reads options from the signature alone.
        first = [item for item in _parameters(request) if item.name not in _SHOWN_LAST]
        last = [item for item in _parameters(request) if item.name in _SHOWN_LAST]
        call.__signature__ = inspect.Signature([*first, *own, *last])  # type: ignore[attr-defined]
        call.__annotations__ = {}
        return call  # type: ignore[return-value]

    return decorate


def _parameters(request: type[Request]) -> list[inspect.Parameter]:
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


def home_folder(home: Path | None) -> Path:
    """Return the folder of ledgers that is asked for."""
    from migration_pipelines.migration import default_home

    return default_home() if home is None else home.absolute()


def defs_folder(defs: Path | None) -> Path:
    """Return the folder of declarations that is asked for.

    Raises
    ------
    ConfigurationError
        It isn't there.
    """
    import migration_pipelines

    asked = defs or os.environ.get("VECTOR_MIGRATE_DEFS")
    folder = Path(asked) if asked else Path(migration_pipelines.__path__[0]) / "defs"
    if not folder.exists():
        raise ConfigurationError(f"{folder} isn't there: name the folder of declared migrations with --defs")
    return folder


def find_declared(name: str, defs: Path) -> tuple[MigrationSpec, Declarations]:
    """Return a declared migration by its name, or the one that a YAML file declares, with all connections.

    Raises
    ------
    ConfigurationError
    """
    from migration_pipelines.declarations import Declarations, read_declarations

    declared = read_declarations(defs)
    if not name.endswith((".yaml", ".yml")):
        if name not in declared.migrations:
            known = ", ".join(sorted(declared.migrations)) or "none"
            raise ConfigurationError(f"no migration {name!r} is declared in {defs}; there are: {known}")
        return declared.migrations[name], declared
    found = read_declarations(Path(name))
    if len(found.migrations) != 1:
        listing = ", ".join(sorted(found.migrations)) or "none"
        raise ConfigurationError(f"{name} must declare one migration; it declares: {listing}")
    connections = {**declared.connections, **found.connections}
    (spec,) = found.migrations.values()
    return spec, Declarations(connections=connections, migrations=found.migrations)


def between(
    source: Opened, target: Opened, settings: dict[str, Any], *, home: Path, listener: Listener
) -> Migration:
    """Return the migration between two collections; secrets of the stores get no farther than the stores.

    Raises
    ------
    ConfigurationError
    """
    from pydantic import ValidationError

    from migration_pipelines.declarations import without_values
    from migration_pipelines.migration import Migration, MigrationConfig, ledger_for

    addresses = {"source": source[0].address(source[1]), "target": target[0].address(target[1])}
    try:
        config = MigrationConfig(**{**settings, **addresses})
    except ValidationError as error:
        raise ConfigurationError(without_values(error)) from None
    return Migration(
        config=config,
        ledger=ledger_for(config, home),
        listener=listener,
        source_store=source[0],
        target_store=target[0],
    )


def parsed_filter(text: str) -> Any:
    """Return the JSON form of a filter that is written as JSON or as the short text.

    Raises
    ------
    FilterError
    """
    import json

    from migration_pipelines import filters

    where = filters.parse(text)
    return None if where is None else json.loads(filters.to_json(where))


def warn_of_password(address: str) -> None:
    """Say that a password in an address is seen by others, without repeating it."""
    if passwords(address):
        kind = address.partition(":")[0]
        variable = _PASSWORD_VARIABLES.get(kind, "an environment variable")
        say(
            f"warning: the {kind} address holds a password, which the list of processes and the shell's "
            f"history show to others: leave it out and set {variable}"
        )
