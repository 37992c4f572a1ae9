"""The migration that a command is asked for: a declared one, or one between two addresses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Context

from migration_pipelines.cli.failures import on_command_line, say
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.redaction import passwords

if TYPE_CHECKING:
    from migration_pipelines.declarations import Declarations, MigrationSpec
    from migration_pipelines.migration import Listener, Migration
    from migration_pipelines.store import Store

Opened = tuple["Store", str | None]  # a store, and the collection in it

PASSWORD_VARIABLES = {
    "chroma": "CHROMA_TOKEN",
    "elasticsearch": "ELASTICSEARCH_PASSWORD",
    "milvus": "MILVUS_PASSWORD",
    "pgvector": "PGVECTOR_PASSWORD",
    "pinecone": "PINECONE_API_KEY",
    "qdrant": "QDRANT_API_KEY",
    "weaviate": "WEAVIATE_API_KEY",
}


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


def complete_name(context: Context, incomplete: str) -> list[str]:
    """Return the declared migrations and YAML files that begin like this, for a shell that completes.

    A key was pressed: the files are looked into without the engine, which takes a second to import.
    """
    import re

    import yaml

    found: list[str] = [str(path) for path in Path().glob(f"{incomplete}*.yaml")] if incomplete else []
    try:
        for path in sorted(defs_folder(context.params.get("defs")).rglob("defs.yaml")):
            for item in yaml.safe_load_all(path.read_text(encoding="utf-8")):
                kind, attributes = item["type"].rpartition(".")[2], item.get("attributes") or {}
                name = attributes.get("name", path.parent.name)
                if kind == "VectorMigration":
                    found.append(name)
                elif kind == "StoreMigration":
                    slugs = (re.sub(r"[^A-Za-z0-9_]", "_", text) for text in attributes["collections"])
                    found += [f"{name}_{slug}" for slug in slugs]
    except Exception:  # noqa: BLE001 - whatever is wrong there, a command tells; here nobody would read it
        return found
    return [name for name in found if name.startswith(incomplete)]


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
    """Say that a password on the command line is seen by others, without repeating it."""
    if passwords(address) and on_command_line(address):
        kind = address.partition(":")[0]
        variable = PASSWORD_VARIABLES.get(kind, "an environment variable")
        say(
            f"warning: the {kind} address holds a password, which the list of processes and the shell's "
            f"history show to others: leave it out and set {variable}"
        )
