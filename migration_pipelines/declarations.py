"""Connections and migrations as they are declared in YAML under `defs/`, read without Dagster.

One folder each, with a `defs.yaml` that Dagster's components read too:

    type: migration_pipelines.components.StoreConnection
    attributes:
      name: warehouse
      store: pgvector
      settings: {host: localhost, user: app, database: vectors, password: "{{ env.PGVECTOR_PASSWORD }}"}
    ---
    type: migration_pipelines.components.VectorMigration
    attributes:
      name: passages
      source: chroma:./chroma_db#passages
      target: {connection: warehouse, collection: passages}
      partition_size: 50000
      mapping: {exclude_fields: [draft], field_mapping: {title: name}}
      schedule: "0 3 * * *"

A `StoreMigration` lists the `collections` of a store and stands for a migration each, `<name>_<collection>`.
`{{ env.NAME }}` stands for an environment variable, or for a secret from where `credentials` finds it:
the only place for one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, model_validator
from pydantic import ValidationError as SchemaError

from migration_pipelines.credentials import secret
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.migration import Listener, Migration, MigrationConfig, ignore, ledger_for
from migration_pipelines.model import Value
from migration_pipelines.schema_mapping import SchemaMapping
from migration_pipelines.store import Store, open_address, store_class

CONNECTION = "migration_pipelines.components.StoreConnection"
MIGRATION = "migration_pipelines.components.VectorMigration"
STORE_MIGRATION = "migration_pipelines.components.StoreMigration"
_KINDS = (CONNECTION, MIGRATION, STORE_MIGRATION)
Spec = TypeVar("Spec", "ConnectionSpec", "MigrationSpec")
_ENVIRONMENT = re.compile(r"\{\{\s*env\.([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")


class ConnectionSpec(Value):
    """A store that migrations name: its kind and the fields of that store's model."""

    name: str
    store: str
    settings: Mapping[str, Any] = Field(default_factory=dict)

    def open(self) -> Store:
        """Return the store, not yet connected.

        Raises
        ------
        ConfigurationError
            There is no such kind of store, or a setting doesn't fit its model.
        """
        try:
            return store_class(self.store).model_validate(dict(self.settings))
        except SchemaError as error:
            raise ConfigurationError(f"connection {self.name!r}: {without_values(error)}") from None


class CollectionSpec(Value):
    """A collection in a declared connection, or in the store at an address."""

    connection: str | None = None
    address: str | None = None
    collection: str | None = None

    @model_validator(mode="after")
    def _one_store(self) -> CollectionSpec:
        if (self.connection is None) == (self.address is None):
            raise ValueError("name a connection or give the address of a store")
        return self


class MigrationSpec(Value):
    """A declared migration: a `MigrationConfig` whose sides may name connections, and its schedule."""

    name: str
    source: str | CollectionSpec
    target: str | CollectionSpec
    schedule: str | None = None
    settings: Mapping[str, Any] = Field(default_factory=dict)


class Declarations(Value):
    """All that is declared."""

    connections: Mapping[str, ConnectionSpec]
    migrations: Mapping[str, MigrationSpec]

    def migration(self, name: str, *, home: Path, listener: Listener = ignore, **changes: Any) -> Migration:
        """Return a declared migration, ready to run; `changes` override settings that aren't frozen.

        Raises
        ------
        ConfigurationError
        """
        spec = self.migrations.get(name)
        if spec is None:
            known = ", ".join(sorted(self.migrations)) or "none"
            raise ConfigurationError(f"no migration {name!r} is declared; there are: {known}", found=name)
        # Only what this migration needs: the variables of others may well be unset here.
        connections = {
            side.connection: _filled(self.connections[side.connection], f"connection {side.connection!r}")
            for side in (spec.source, spec.target)
            if isinstance(side, CollectionSpec) and side.connection and side.connection in self.connections
        }
        spec = _filled(spec, f"migration {name!r}")
        return bind(spec, connections, home=home, listener=listener, **changes)


def bind(
    spec: MigrationSpec,
    connections: Mapping[str, ConnectionSpec],
    *,
    home: Path,
    listener: Listener = ignore,
    **changes: Any,
) -> Migration:
    """Return a migration with its stores, ready to run."""
    source_store, source = _side(spec.source, connections)
    target_store, target = _side(spec.target, connections)
    try:
        config = MigrationConfig(
            **{**spec.settings, **changes, "name": spec.name, "source": source, "target": target}
        )
    except SchemaError as error:
        raise ConfigurationError(f"migration {spec.name!r}: {without_values(error)}") from None
    return Migration(
        config=config,
        ledger=ledger_for(config, home),
        listener=listener,
        source_store=source_store,
        target_store=target_store,
    )


def _side(side: str | CollectionSpec, connections: Mapping[str, ConnectionSpec]) -> tuple[Store, str]:
    """Return the store of one side and the address of its collection, without secrets."""
    if isinstance(side, str):
        store, collection = open_address(side)
        return store, store.address(collection)
    if side.address is not None:
        store, _ = open_address(side.address)
    elif side.connection is not None and side.connection in connections:
        store = connections[side.connection].open()
    else:
        known = ", ".join(sorted(connections)) or "none"
        raise ConfigurationError(f"no connection {side.connection!r} is declared; there are: {known}")
    return store, store.address(side.collection)


def read_declarations(folder: Path) -> Declarations:
    """Read every `defs.yaml` under a folder, as Dagster does, or one file of any name.

    `{{ env.NAME }}` stays as it is written until a migration is bound.

    Raises
    ------
    ConfigurationError
        A file can't be read, or declares a name twice.
    """
    paths = [folder] if folder.is_file() else sorted(folder.rglob("defs.yaml"))
    connections: dict[str, ConnectionSpec] = {}
    migrations: dict[str, MigrationSpec] = {}
    for path in paths:
        for kind, attributes in _documents(path):
            attributes.setdefault("name", path.parent.name)
            if kind == CONNECTION:
                _add(connections, [_validated(ConnectionSpec, attributes, path)], path)
            elif kind == MIGRATION:
                _add(migrations, [migration_spec(attributes, where=str(path))], path)
            else:
                _add(migrations, store_migration_specs(attributes, where=str(path)), path)
    return Declarations(connections=connections, migrations=migrations)


def _add(known: dict[str, Any], specs: Iterable[ConnectionSpec | MigrationSpec], path: Path) -> None:
    for spec in specs:
        if spec.name in known:
            raise ConfigurationError(f"{path}: {spec.name!r} is declared twice")
        known[spec.name] = spec


def migration_spec(attributes: Mapping[str, Any], *, where: str) -> MigrationSpec:
    """Return the migration that a component's attributes declare."""
    own = {key: value for key, value in attributes.items() if key in MigrationSpec.model_fields}
    settings = {key: value for key, value in attributes.items() if key not in own}
    if "mapping" in settings:
        settings["schema_mapping"] = settings.pop("mapping")
    unknown = sorted(settings.keys() - MigrationConfig.model_fields.keys())
    if unknown:
        raise ConfigurationError(f"{where}: a migration has no setting {', '.join(unknown)}")
    spec: MigrationSpec = _validated(MigrationSpec, {**own, "settings": settings}, where)
    return spec


def read_mapping(path: Path) -> SchemaMapping:
    """Return the schema mapping that a YAML or JSON file holds.

    Raises
    ------
    ConfigurationError
        The file can't be read, or a rule in it can't be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} can't be read as YAML: {error}") from None
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {error.strerror}") from None
    return parse_mapping(text, str(path))


def parse_mapping(text: str, where: str) -> SchemaMapping:
    """Return the schema mapping that a text in YAML or JSON holds.

    Raises
    ------
    ConfigurationError
        It can't be read, or a rule in it can't be used.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{where} can't be read as YAML: {error}") from None
    mapping: SchemaMapping = _validated(SchemaMapping, found, where)
    return mapping


def store_migration_specs(attributes: Mapping[str, Any], *, where: str) -> list[MigrationSpec]:
    """Return the migrations, one a collection, that a `StoreMigration`'s attributes declare.

    Raises
    ------
    ConfigurationError
        No collection is named, a side names one itself, or two would give migrations of one name.
    """
    own = dict(attributes)
    collections, name = own.pop("collections", None), own["name"]
    if not isinstance(collections, list) or not all(isinstance(item, str) and item for item in collections):
        raise ConfigurationError(f"{where}: {name!r} needs `collections`, a list of names")
    specs = []
    for collection in collections:
        sides = {side: _within(own.get(side), collection, where) for side in ("source", "target")}
        one = {**own, **sides, "name": f"{name}_{re.sub(r'[^A-Za-z0-9_]', '_', collection)}"}
        specs.append(migration_spec(one, where=where))
    if len({spec.name for spec in specs}) < len(specs):
        raise ConfigurationError(
            f"{where}: {name!r}: some of its collections' names are too alike: declare them apart"
        )
    return specs


def _within(side: Any, collection: str, where: str) -> dict[str, Any]:
    """Return one side of a whole store's migration, narrowed to a collection."""
    found = {"address": side} if isinstance(side, str) else dict(side or {})
    if found.get("collection"):
        raise ConfigurationError(f"{where}: a side names the collection {found['collection']!r} already")
    return {**found, "collection": collection}


def _documents(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} can't be read as YAML: {error}") from None
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {error.strerror}") from None
    for document in documents:
        if isinstance(document, dict) and document.get("type") in _KINDS:
            yield document["type"], dict(document.get("attributes") or {})


def _filled(spec: Spec, where: str) -> Spec:
    """Return a declaration with every `{{ env.NAME }}` in it filled in."""
    return type(spec).model_validate(with_environment(spec.model_dump(), where))


def with_environment(value: Any, path: object) -> Any:
    """Return a value with every `{{ env.NAME }}` in it filled in; `path` says where it was declared.

    Raises
    ------
    ConfigurationError
        The variable isn't set.
    """
    if isinstance(value, dict):
        return {key: with_environment(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [with_environment(item, path) for item in value]
    return (
        _ENVIRONMENT.sub(lambda match: _variable(match[1], path), value) if isinstance(value, str) else value
    )


def _variable(name: str, path: object) -> str:
    if name in os.environ:
        return os.environ[name]
    if found := secret(name):  # from a keyring, or printed by a command
        return found
    raise ConfigurationError(f"{path} needs the environment variable {name}, which isn't set")


def _validated(kind: type[Any], attributes: Mapping[str, Any], where: object) -> Any:
    try:
        return kind.model_validate(attributes)
    except SchemaError as error:
        raise ConfigurationError(f"{where}: {without_values(error)}") from None


def without_values(error: SchemaError) -> str:
    """Return what pydantic found wrong, without the values: one of them may be a secret."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}"
        for item in error.errors(include_input=False, include_url=False, include_context=False)
    )
