"""VectorMigration and StoreMigration: declared migrations, built into assets, checks and schedules."""

from __future__ import annotations

from typing import Any

import dagster as dg
from dagster import ComponentLoadContext
from pydantic import BaseModel, create_model
from pydantic import ValidationError as SchemaError

from migration_pipelines.components.assets import plan_assets, source_asset, validated_asset
from migration_pipelines.components.checks import quality_check
from migration_pipelines.components.connection import StoreConnection
from migration_pipelines.components.declared import Declared
from migration_pipelines.components.partitions import partition_assets
from migration_pipelines.components.schedules import plan_job, schedules
from migration_pipelines.components.templates import holds_template
from migration_pipelines.declarations import (
    CollectionSpec,
    MigrationSpec,
    migration_spec,
    store_migration_specs,
    without_values,
)
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.migration import MigrationConfig

_SIDE = str | CollectionSpec
_OWN: dict[str, Any] = {
    "name": (str | None, None),
    "source": (_SIDE, ...),
    "target": (_SIDE, ...),
    "schedule": (str | None, None),
    "mapping": (dict[str, Any] | None, None),  # as it is written: `_check_settings` reads it
}
_SETTINGS: dict[str, Any] = {
    name: (field.annotation | str, field.default)
    for name, field in MigrationConfig.model_fields.items()
    if name not in (*_OWN, "schema_mapping") and field.annotation is not None
}
MigrationAttributes = create_model("MigrationAttributes", __base__=dg.Model, **_OWN, **_SETTINGS)
StoreMigrationAttributes = create_model(
    "StoreMigrationAttributes", __base__=MigrationAttributes, collections=(list[str], ...)
)


class VectorMigration(dg.Component):
    """A collection that moves from one store to another; the attributes are those of `MigrationConfig`.

    A side is an address, or a `connection` and a `collection` in it. `schedule` is a cron expression.
    """

    def __init__(self, spec: MigrationSpec) -> None:
        self.spec = spec

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        """Return the schema of the YAML."""
        return MigrationAttributes

    @classmethod
    def load(cls, attributes: BaseModel | None, context: ComponentLoadContext) -> VectorMigration:
        """Read the attributes as they are written, templates and all."""
        spec = migration_spec(_written(attributes, context), where=str(context.path))
        _check_settings(spec)
        return cls(spec)

    def build_defs(self, context: ComponentLoadContext) -> dg.Definitions:
        """Return the migration's assets, checks, job and schedule."""
        return _definitions(self.spec, context)


class StoreMigration(dg.Component):
    """Several collections that move from one store to another, a migration each.

    The attributes are those of `VectorMigration`, but that the sides name no collection: `collections` lists
    them. The list is written down because definitions load without asking any store.
    """

    def __init__(self, specs: list[MigrationSpec]) -> None:
        self.specs = specs

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        """Return the schema of the YAML."""
        return StoreMigrationAttributes

    @classmethod
    def load(cls, attributes: BaseModel | None, context: ComponentLoadContext) -> StoreMigration:
        """Read the attributes as they are written, templates and all."""
        specs = store_migration_specs(_written(attributes, context), where=str(context.path))
        for spec in specs:
            _check_settings(spec)
        return cls(specs)

    def build_defs(self, context: ComponentLoadContext) -> dg.Definitions:
        """Return the assets, checks, jobs and schedules of all the migrations."""
        return dg.Definitions.merge(*(_definitions(spec, context) for spec in self.specs))


def _written(attributes: BaseModel | None, context: ComponentLoadContext) -> dict[str, Any]:
    assert attributes is not None
    written = attributes.model_dump(exclude_unset=True)
    written["name"] = written.get("name") or context.path.name
    return written


def _definitions(spec: MigrationSpec, context: ComponentLoadContext) -> dg.Definitions:
    found = context.component_tree.get_all_components(StoreConnection)
    declared = Declared(spec, {component.spec.name: component.spec for component in found})
    declared.check()
    return dg.Definitions(
        assets=[
            source_asset(declared),
            plan_assets(declared),
            partition_assets(declared),
            validated_asset(declared),
        ],
        asset_checks=[quality_check(declared)],
        jobs=[plan_job(declared)],
        schedules=schedules(declared),
    )


def _check_settings(spec: MigrationSpec) -> None:
    known = {name: value for name, value in spec.settings.items() if not holds_template(value)}
    try:
        MigrationConfig(source="", target="", **known)
    except SchemaError as error:
        raise ConfigurationError(f"migration {spec.name!r}: {without_values(error)}") from None
