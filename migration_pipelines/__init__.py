"""Move collections between vector stores, and prove that everything arrived."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from migration_pipelines.compare import Comparison, compare_collections
    from migration_pipelines.errors import CollectionNotFoundError, MigrationError, ValidationError
    from migration_pipelines.inspect import Inspection, inspect_collection
    from migration_pipelines.metrics import MetricsExporter
    from migration_pipelines.migration import Event, Migration, MigrationConfig, ledger_for
    from migration_pipelines.migrator import run_migration
    from migration_pipelines.plan import make_plan
    from migration_pipelines.reduction import fit_pca
    from migration_pipelines.results import MigrationEstimate, MigrationProgress, MigrationResult
    from migration_pipelines.schema_mapping import SchemaMapping
    from migration_pipelines.store import Store, open_address
    from migration_pipelines.validate import Report
    from migration_pipelines.vector_store_migrator import VectorStoreMigrator

__all__ = [
    "CollectionNotFoundError",
    "Comparison",
    "Event",
    "Inspection",
    "MetricsExporter",
    "Migration",
    "MigrationConfig",
    "MigrationError",
    "MigrationEstimate",
    "MigrationProgress",
    "MigrationResult",
    "Report",
    "SchemaMapping",
    "Store",
    "ValidationError",
    "VectorStoreMigrator",
    "compare_collections",
    "fit_pca",
    "inspect_collection",
    "ledger_for",
    "make_plan",
    "open_address",
    "run_migration",
]

_HOMES = {
    "CollectionNotFoundError": "errors",
    "Comparison": "compare",
    "Event": "migration",
    "Inspection": "inspect",
    "MetricsExporter": "metrics",
    "Migration": "migration",
    "MigrationConfig": "migration",
    "MigrationError": "errors",
    "MigrationEstimate": "results",
    "MigrationProgress": "results",
    "MigrationResult": "results",
    "Report": "validate",
    "SchemaMapping": "schema_mapping",
    "Store": "store",
    "ValidationError": "errors",
    "VectorStoreMigrator": "vector_store_migrator",
    "compare_collections": "compare",
    "fit_pca": "reduction",
    "inspect_collection": "inspect",
    "ledger_for": "migration",
    "open_address": "store",
    "make_plan": "plan",
    "run_migration": "migrator",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `vector-migrate --help` starts at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
