"""Dagster's face of the engine: the components that a `defs.yaml` names, and what they are built into.

`StoreConnection` becomes a resource, `VectorMigration` a group of assets, `StoreMigration` one for each of
a store's collections:

    source → inspected → plan → extracted → transformed → loaded → verified → validated
"""

from migration_pipelines.components.connection import StoreConnection
from migration_pipelines.components.migration import StoreMigration, VectorMigration

__all__ = ["StoreConnection", "StoreMigration", "VectorMigration"]
