"""Declared: one migration as Dagster sees it: its names there, and how a run opens it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import dagster as dg

from migration_pipelines.components.connection import StoreResource, resource_key
from migration_pipelines.declarations import (
    CollectionSpec,
    ConnectionSpec,
    MigrationSpec,
    bind,
    with_environment,
)
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.migration import Listener, Migration, default_home
from migration_pipelines.model import Plan
from migration_pipelines.store import Address

# Kinds for which Dagster has an icon under another name.
_ICONS = {"pgvector": "postgres"}
NAME_TAG = "vector-migrate/migration"
# On runs that a headless process executes itself.
SESSION_TAG = "vector-migrate/headless"
GENERATION_TAG = "vector-migrate/generation"
# What its lines of log and its spans carry as well.
ID_TAG = "vector-migrate/migration-id"


@dataclass(frozen=True)
class Declared:
    """A declared migration.

    Parameters
    ----------
    spec
        As it is written: `{{ env.NAME }}` is filled in when a run opens it.
    connections
        The declared connections, by name, likewise.
    """

    spec: MigrationSpec
    connections: Mapping[str, ConnectionSpec]

    @cached_property
    def slug(self) -> str:
        """The migration's name as Dagster takes it: key prefix and group."""
        return slug(self.spec.name)

    def key(self, step: str) -> dg.AssetKey:
        """Return the key of one of the migration's assets."""
        return dg.AssetKey([self.slug, step])

    @cached_property
    def partitions(self) -> dg.DynamicPartitionsDefinition:
        """The partitions of the plan; materializing `plan` adds them."""
        return dg.DynamicPartitionsDefinition(name=f"{self.slug}_partitions")

    @property
    def resource_keys(self) -> set[str]:
        """The resources that a run of any of its assets needs."""
        return {resource_key(name) for name in self._named()}

    @property
    def pool(self) -> str:
        """The pool of the target store: so many runs write to it at a time as the pool has slots."""
        address = _address(self.spec.target)
        if address is None:
            return slug(_connection(self.spec.target))
        where = f"{address.host}_{address.port or ''}" if address.host else address.path
        return slug(f"{address.kind}_{where}".rstrip("_"))

    def kind(self, side: str | CollectionSpec) -> str:
        """Return the kind of store of one side, as Dagster's icons call it."""
        address = _address(side)
        kind = self.connections[_connection(side)].store if address is None else address.kind
        return _ICONS.get(kind, kind)

    def label(self, side: str | CollectionSpec) -> str:
        """Return where one side lies, for people; a password in it isn't shown."""
        address = _address(side)
        if isinstance(side, CollectionSpec):
            return f"{address or side.connection}/{side.collection or '(named like the source)'}"
        return str(address)

    def open(
        self, context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, listener: Listener
    ) -> Migration:
        """Return the migration, ready to run, from the environment and resources of a run.

        Raises
        ------
        ConfigurationError
        """
        resources = {name: getattr(context.resources, resource_key(name)) for name in self._named()}
        connections = {
            name: resource.spec(name, self.connections[name].store)
            for name, resource in resources.items()
            if isinstance(resource, StoreResource)
        }
        where = f"migration {self.spec.name!r}"
        spec = MigrationSpec.model_validate(with_environment(self.spec.model_dump(), where))
        return bind(spec, connections, home=default_home(), listener=listener)

    def check(self) -> None:
        """Refuse a declaration that can't work, as far as that shows without opening anything.

        Raises
        ------
        ConfigurationError
        """
        for name in self._named():
            if name not in self.connections:
                known = ", ".join(sorted(self.connections)) or "none"
                raise ConfigurationError(
                    f"migration {self.spec.name!r}: no connection {name!r} is declared; there are: {known}"
                )
        for side in (self.spec.source, self.spec.target):
            self.label(side)

    def _named(self) -> set[str]:
        sides = (self.spec.source, self.spec.target)
        return {_connection(side) for side in sides if _address(side) is None}


def _address(side: str | CollectionSpec) -> Address | None:
    """Return the address that a side gives; None where it names a connection."""
    text = side.address if isinstance(side, CollectionSpec) else side
    return None if text is None else Address.parse(text)


def _connection(side: str | CollectionSpec) -> str:
    assert isinstance(side, CollectionSpec)
    assert side.connection is not None
    return side.connection


def slug(name: str) -> str:
    """Return a name that Dagster takes for keys, groups and pools."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


def tag_run(context: dg.AssetExecutionContext, declared: Declared, plan: Plan | None = None) -> None:
    """Tag a run with what it works on, however it was started."""
    tags = {NAME_TAG: declared.spec.name}
    if plan is not None:
        tags |= {GENERATION_TAG: str(plan.generation), ID_TAG: plan.migration_id}
    context.instance.add_run_tags(context.run.run_id, tags)
