"""The assets of the whole: source, inspected and plan before the partitions, validated after them."""

# Without `from __future__ import annotations`: Dagster looks for a run's config in the annotation itself.

import time
from collections.abc import Iterator

import dagster as dg

from migration_pipelines.components.backfills import launch_from
from migration_pipelines.components.checks import engine_check_specs, engine_checks
from migration_pipelines.components.declared import Declared, tag_run
from migration_pipelines.components.failures import engine_errors
from migration_pipelines.components.plots import losses_table, rates_plot, resources_plot, table
from migration_pipelines.components.progress import Progress
from migration_pipelines.inspect import inspect_collection
from migration_pipelines.load import publish
from migration_pipelines.migration import Migration
from migration_pipelines.model import CollectionSchema, Plan, Profile
from migration_pipelines.plan import make_plan
from migration_pipelines.resources import ResourceMonitor
from migration_pipelines.validate import Report, require_complete, validate


class PlanConfig(dg.Config):
    """How `plan` is materialized.

    `fresh` forgets a frozen plan and its receipts. `renew` does so only where that plan is complete
    and its target may be written again (merge or replace). `launch` then starts a backfill of every
    partition that isn't verified, and of `validated`.
    """

    fresh: bool = False
    renew: bool = False
    launch: bool = False


def source_asset(declared: Declared) -> dg.AssetSpec:
    """Return the source as an asset that others make."""
    return dg.AssetSpec(
        declared.key("source"),
        group_name=declared.slug,
        kinds={declared.kind(declared.spec.source)},
        description=f"`{declared.label(declared.spec.source)}`, which is only read.",
    )


def plan_assets(declared: Declared) -> dg.AssetsDefinition:
    """Return `inspected` and `plan`: together they read the source once."""

    @dg.multi_asset(
        name=f"{declared.slug}__plan",
        specs=[
            dg.AssetSpec(
                declared.key("inspected"),
                deps=[declared.key("source")],
                group_name=declared.slug,
                kinds={declared.kind(declared.spec.source)},
                description="What the source holds, counted record by record.",
            ),
            dg.AssetSpec(
                declared.key("plan"),
                deps=[declared.key("inspected")],
                group_name=declared.slug,
                description="The frozen decision: partitions, losses, estimate. Adds the partitions.",
            ),
        ],
        required_resource_keys=declared.resource_keys,
        can_subset=True,
    )
    def plan(context: dg.AssetExecutionContext, config: PlanConfig) -> Iterator[dg.MaterializeResult[None]]:
        chosen = context.selected_asset_keys
        asset = declared.key("plan" if declared.key("plan") in chosen else "inspected")
        progress = Progress(context, asset, counted="batch-planned")
        with engine_errors(context), declared.open(context, progress) as migration, progress:
            if declared.key("plan") not in chosen:
                tag_run(context, declared)
                yield _inspect(declared, migration)
                return
            with migration.ledger.lease():
                made = make_plan(migration, fresh=config.fresh or (config.renew and _is_done(migration)))
        tag_run(context, declared, made)
        _set_partitions(context, declared, made)
        if declared.key("inspected") in chosen:
            yield _inspected(declared, made.source, made.source_schema, made.profile)
        yield _planned(declared, migration, made)
        if config.launch:
            launch_from(context, declared, made)

    return plan


def _is_done(migration: Migration) -> bool:
    report = migration.ledger.report() or {}
    return report.get("status") == "complete" and migration.config.on_existing != "refuse"


def _inspect(declared: Declared, migration: Migration) -> dg.MaterializeResult[None]:
    with migration.ledger.lease(shared=True):
        found = inspect_collection(migration.source, migration.source_collection)
    return _inspected(declared, found.address, found.collection, found.profile)


def _inspected(
    declared: Declared, address: str, schema: CollectionSchema, profile: Profile
) -> dg.MaterializeResult[None]:
    fields = [
        {"field": field, "records": profile.present.get(field, 0), "kinds": ", ".join(sorted(kinds))}
        for field, kinds in profile.fields.items()
    ]
    vectors = [field.model_dump(mode="json", exclude={"index"}) for field in schema.vectors]
    return dg.MaterializeResult(
        asset_key=declared.key("inspected"),
        metadata={
            "address": address,
            "records": profile.records,
            "bytes": profile.bytes,
            "documents": profile.documents,
            "vectors": table(vectors),
            "metadata fields": table(fields),
            "read rate of a sample (records per second)": round(profile.sample_read_records_per_second, 1),
        },
    )


def _set_partitions(context: dg.AssetExecutionContext, declared: Declared, made: Plan) -> None:
    """Make the plan's partitions the only ones: an older plan's were verified against other bounds."""
    name, keys = declared.partitions.name, [partition.key for partition in made.partitions]
    assert name is not None
    there = set(context.instance.get_dynamic_partitions(name))
    for key in there - set(keys):
        context.instance.delete_dynamic_partition(name, key)
    context.instance.add_dynamic_partitions(name, [key for key in keys if key not in there])


def _planned(declared: Declared, migration: Migration, made: Plan) -> dg.MaterializeResult[None]:
    warnings = "\n".join(f"- {warning}" for warning in made.warnings) or "none"
    return dg.MaterializeResult(
        asset_key=declared.key("plan"),
        metadata={
            "source": made.source,
            "target": made.target,
            "records": made.profile.records,
            "bytes": made.profile.bytes,
            "partitions": len(made.partitions),
            "generation": made.generation,
            "losses": losses_table(made.losses),
            "warnings": dg.MetadataValue.md(warnings),
            "estimate (seconds)": round(made.estimate.seconds, 1),
            "estimate (records per second)": round(made.estimate.records_per_second, 1),
            "estimate rests on": made.estimate.basis,
            "staging (bytes)": made.estimate.staging_bytes,
            "ledger": dg.MetadataValue.path(str(migration.ledger.folder)),
        },
    )


def validated_asset(declared: Declared) -> dg.AssetsDefinition:
    """Return `validated`: search indexes are built, the whole is checked, the report written."""

    @dg.asset(
        name="validated",
        key_prefix=declared.slug,
        deps=[dg.AssetDep(declared.key("verified"), partition_mapping=dg.AllPartitionMapping())],
        group_name=declared.slug,
        kinds={declared.kind(declared.spec.target)},
        description="The whole: every receipt, counts, the source unchanged. Complete, or it fails.",
        check_specs=engine_check_specs(declared),
        required_resource_keys=declared.resource_keys,
        pool=declared.pool,
    )
    def validated(
        context: dg.AssetExecutionContext,
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
        progress = Progress(context, declared.key("validated"), counted="validated")
        with (
            engine_errors(context),
            declared.open(context, progress) as migration,
            migration.ledger.lease(),
            ResourceMonitor(home=migration.ledger.folder) as monitor,
        ):
            tag_run(context, declared, migration.plan)
            if not migration.pending():
                publish(migration)
            report = validate(migration, seconds=_seconds(context), resources=monitor.summary())
            yield from engine_checks(declared, report)
            require_complete(report)
            result = _validated(declared, migration, report)
            migration.source.close()
            migration.ledger.discard_scratch()
        yield result

    return validated


def _seconds(context: dg.AssetExecutionContext) -> float:
    """Return how long the backfill has been at work that this run belongs to; 0 outside of one."""
    backfill_id = context.run.tags.get("dagster/backfill")
    backfill = context.instance.get_backfill(backfill_id) if backfill_id else None
    return time.time() - backfill.backfill_timestamp if backfill else 0.0


def _validated(declared: Declared, migration: Migration, report: Report) -> dg.MaterializeResult[None]:
    receipts = list(migration.ledger.receipts(migration.plan).values())
    return dg.MaterializeResult(
        asset_key=declared.key("validated"),
        metadata={
            "status": report.status,
            **{f"records {name}": count for name, count in report.records.items()},
            "partitions": report.partitions["total"],
            "bytes": report.bytes,
            "seconds": round(report.seconds, 1),
            "records per second": round(report.records_per_second, 1),
            "digest": report.digest,
            "losses": losses_table(report.losses),
            "rejects": table([dict(reject) for reject in report.rejects]),
            "rates": rates_plot(receipts),
            "resources": resources_plot(report.resources),
            "report": dg.MetadataValue.path(str(migration.ledger.folder / "report.json")),
        },
    )
