"""The backfill of what is pending: the same one for a schedule, the command line and a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg
from dagster import DagsterInstance

from migration_pipelines.components.declared import NAME_TAG, Declared
from migration_pipelines.components.internals import add_backfill, materialized_partitions
from migration_pipelines.model import Plan


def pending_partitions(instance: DagsterInstance, declared: Declared, plan: Plan) -> list[str]:
    """Return the partitions whose `verified` isn't materialized, in the plan's order."""
    done = materialized_partitions(instance, declared.key("verified"), declared.partitions)
    return [partition.key for partition in plan.partitions if partition.key not in done]


def launch_backfill(
    instance: DagsterInstance,
    asset_graph: Any,
    declared: Declared,
    plan: Plan,
    *,
    tags: Mapping[str, str] | None = None,
    run_config: Mapping[str, Any] | None = None,
) -> str:
    """Add a backfill of every pending partition and, after them, of `validated`; returns its id."""
    return add_backfill(
        instance,
        asset_graph,
        partitioned=[declared.key(step) for step in ("extracted", "transformed", "loaded", "verified")],
        keys=pending_partitions(instance, declared, plan),
        whole=[declared.key("validated")],
        title=f"{declared.spec.name}, plan {plan.generation}",
        tags={NAME_TAG: declared.spec.name, **(tags or {})},
        run_config=run_config,
    )


def launch_from(context: dg.AssetExecutionContext, declared: Declared, plan: Plan) -> None:
    """Launch the backfill from within a run; a daemon takes it up."""
    backfill_id = launch_backfill(context.instance, context.repository_def.asset_graph, declared, plan)
    context.log.info(f"launched backfill {backfill_id}")
