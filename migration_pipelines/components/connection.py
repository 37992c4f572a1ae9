"""StoreConnection: a declared connection, and the resource that it becomes.

There is one class of resource for each kind of store, made from the store's own model, so that the UI
shows its fields. Nothing connects and no driver is imported before an asset runs.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import dagster as dg
from dagster import ComponentLoadContext
from pydantic import BaseModel, Field, SecretStr, create_model
from pydantic.fields import FieldInfo

from migration_pipelines.components.templates import as_variable, holds_template
from migration_pipelines.declarations import ConnectionSpec
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.store import store_class

_SECRETS: tuple[Any, ...] = (SecretStr, SecretStr | None)


class ConnectionAttributes(dg.Model):
    """What a connection's `attributes` may say."""

    name: str | None = None
    store: str
    settings: dict[str, Any] = Field(default_factory=dict)


class StoreConnection(dg.Component):
    """A store that migrations name: `store` is its kind, `settings` the fields of that store's model."""

    def __init__(self, spec: ConnectionSpec) -> None:
        self.spec = spec

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        """Return the schema of the YAML."""
        return ConnectionAttributes

    @classmethod
    def load(cls, attributes: BaseModel | None, context: ComponentLoadContext) -> StoreConnection:
        """Read the attributes as they are written, templates and all."""
        assert isinstance(attributes, ConnectionAttributes)
        name = attributes.name or context.path.name
        return cls(ConnectionSpec(name=name, store=attributes.store, settings=attributes.settings))

    def build_defs(self, context: ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002 - Dagster's signature
        """Return the connection as a resource."""
        return dg.Definitions(resources={resource_key(self.spec.name): connection_resource(self.spec)})


class StoreResource(dg.ConfigurableResource[Any]):
    """A connection in Dagster; the fields of its kind of store are added by `resource_class`."""

    def spec(self, name: str, kind: str) -> ConnectionSpec:
        """Return the connection with every variable filled in."""
        settings = {field: getattr(self, field) for field in type(self).model_fields}
        return ConnectionSpec(name=name, store=kind, settings=settings)


def resource_key(connection: str) -> str:
    """Return the name of a connection's resource, which Dagster wants to be an identifier."""
    return re.sub(r"\W|^(?=\d)", "_", connection)


@cache
def resource_class(kind: str) -> type[StoreResource]:
    """Return the class of resource for a kind of store."""
    store = store_class(kind)
    fields: dict[str, Any] = {
        name: (_annotation(field.annotation), FieldInfo(default=_plain(field.default)))
        for name, field in store.model_fields.items()
    }
    return create_model(f"{store.__name__}Resource", __base__=StoreResource, __doc__=store.__doc__, **fields)


def connection_resource(spec: ConnectionSpec) -> StoreResource:
    """Return the resource of a connection, its variables left for a run to fill in.

    Raises
    ------
    ConfigurationError
        A setting isn't one of the store's, or a secret stands in the YAML itself.
    """
    fields, where = store_class(spec.store).model_fields, f"connection {spec.name!r}"
    unknown = sorted(spec.settings.keys() - fields.keys())
    if unknown:
        raise ConfigurationError(f"{where}: a {spec.store} store has no setting {', '.join(unknown)}")
    for name, value in spec.settings.items():
        if fields[name].annotation in _SECRETS and value is not None and not holds_template(value):
            raise ConfigurationError(
                f"{where}: {name} is a secret and Dagster would keep it in its history: "
                f"put it into an environment variable and say {name}: '{{{{ env.NAME }}}}'"
            )
    settings = {
        name: as_variable(value, fields[name].annotation, where=f"{where}, {name}")
        for name, value in spec.settings.items()
    }
    return resource_class(spec.store)(**settings)


def _annotation(kind: Any) -> Any:
    """Return the type that Dagster knows for a field's: a path is a text, a secret one from a variable."""
    if kind in (SecretStr, Path):
        return str
    if get_origin(kind) in (Union, UnionType):
        return Union[tuple(_annotation(item) for item in get_args(kind))]  # noqa: UP007 - from a tuple
    return kind


def _plain(default: Any) -> Any:
    return str(default) if isinstance(default, Path) else default
