"""The partitioned assets: extracted → transformed → loaded → verified.

They are one step of a run, which takes many partitions through the phases side by side, as the command
line does: reading one partition overlaps writing another, and what a run costs is shared by all of its
partitions (docs/decisions/0001). Each partition has a result of its own: it is materialized the moment it is
verified, and where some failed the step fails at the end, which leaves those partitions, and only
those, failed.
"""

# Without `from __future__ import annotations`: Dagster looks at the annotation of a context itself.

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from migration_pipelines.components.declared import Declared, tag_run
from migration_pipelines.components.failures import (
    different,
    engine_errors,
    partitions_failure,
    retry_request,
)
from migration_pipelines.components.progress import Progress
from migration_pipelines.errors import MigrationError, TransientError
from migration_pipelines.extract import extract
from migration_pipelines.load import load
from migration_pipelines.migration import Migration
from migration_pipelines.migrator import run_partitions
from migration_pipelines.model import Receipt, Value
from migration_pipelines.transform import transform
from migration_pipelines.verify import verify

PHASES = {"extracted": extract, "transformed": transform, "loaded": load, "verified": verify}
READ_BACK = "read_back_equals_staged"
# A run costs 4 to 6 seconds to start, a partition of the default size takes a little over one: a hundred of
# them in one run keep the cost under five percent, and a backfill of more has runs that fail and end alone.
PARTITIONS_PER_RUN = 100


def partition_assets(declared: Declared) -> dg.AssetsDefinition:
    """Return the four assets that take partitions from the source into the target."""
    kinds = {
        "extracted": {declared.kind(declared.spec.source), "arrow"},
        "transformed": {"arrow"},
        "loaded": {declared.kind(declared.spec.target)},
        "verified": {declared.kind(declared.spec.target)},
    }
    said = {
        "extracted": "Read from the source and staged.",
        "transformed": "Staged as the target will hold it; the same batches where nothing changes.",
        "loaded": "Written into the target.",
        "verified": "Read back from the target and equal, record by record, to what was staged.",
    }
    steps = ["plan", *PHASES]

    @dg.multi_asset(
        name=f"{declared.slug}__partitions",
        specs=[
            dg.AssetSpec(
                declared.key(phase),
                deps=[declared.key(before)],
                kinds=kinds[phase],
                description=said[phase],
                group_name=declared.slug,
            )
            for before, phase in zip(steps, PHASES, strict=False)
        ],
        check_specs=[
            dg.AssetCheckSpec(
                READ_BACK, asset=declared.key("verified"), description="Of the last run's partitions."
            )
        ],
        partitions_def=declared.partitions,
        backfill_policy=dg.BackfillPolicy.multi_run(PARTITIONS_PER_RUN),
        required_resource_keys=declared.resource_keys,
        can_subset=True,
        pool=declared.pool,
    )
    def partitions(context: dg.AssetExecutionContext) -> Iterator[dg.AssetCheckResult]:
        yield from _Run(context, declared).move()

    return partitions


class _Run:
    """One run over some partitions."""

    def __init__(self, context: dg.AssetExecutionContext, declared: Declared) -> None:
        self._context, self._declared = context, declared
        chosen = [phase for phase in PHASES if declared.key(phase) in context.selected_asset_keys]
        # A phase needs what the ones before it staged, and a partition that differed must be loaded again
        # before it is compared again: all phases run up to the last chosen one, and skip what stands.
        self._phases = list(PHASES)[: list(PHASES).index(chosen[-1]) + 1] if chosen else list(PHASES)
        self._results: dict[str, dict[str, Value]] = {}

    def move(self) -> Iterator[dg.AssetCheckResult]:
        """Take the run's partitions through the phases; raise at the end where some failed."""
        context, declared = self._context, self._declared
        keys, failed = list(context.partition_keys), dict[str, MigrationError]()
        verified = declared.key("verified")
        progress = Progress(context, verified, counted="batch-loaded")
        with (
            engine_errors(context),
            declared.open(context, progress) as migration,
            migration.ledger.lease(shared=True),
            progress,
        ):
            tag_run(context, declared, migration.plan)
            for key, outcome in run_partitions(migration, keys, self._work):
                if isinstance(outcome, MigrationError):
                    failed[key] = outcome
                    context.log.error(f"partition {key} failed: {outcome}")
                self._materialize(key)
        if context.selected_asset_check_keys:
            yield self._check(failed)
        self._raise_for(failed, len(keys))

    def _work(self, migration: Migration, key: str) -> None:
        results = self._results.setdefault(key, {})
        receipt = migration.ledger.receipt(key)
        if receipt is not None:
            results.update(dict.fromkeys(self._phases, receipt))
            return
        with migration.ledger.partition_lease(key):
            for phase in self._phases:
                results[phase] = PHASES[phase](migration, key)

    def _materialize(self, key: str) -> None:
        for phase, result in self._results.pop(key, {}).items():
            self._context.log_event(
                dg.AssetMaterialization(self._declared.key(phase), partition=key, metadata=_figures(result))
            )

    def _check(self, failed: Mapping[str, MigrationError]) -> dg.AssetCheckResult:
        differing = {key: different(error) for key, error in failed.items() if different(error)}
        return dg.AssetCheckResult(
            asset_key=self._declared.key("verified"),
            check_name=READ_BACK,
            passed=not differing,
            metadata={"records that differ": sum(differing.values()), "partitions": sorted(differing)},
        )

    def _raise_for(self, failed: Mapping[str, MigrationError], total: int) -> None:
        if not failed:
            return
        if all(isinstance(error, TransientError) for error in failed.values()):
            retry = retry_request(self._context)
            if retry is not None:
                raise retry from next(iter(failed.values()))
        raise partitions_failure(failed, total)


def _figures(result: Value) -> dict[str, Any]:
    """Return the numbers of a phase's result, for the UI's plots."""
    dumped = result.model_dump()
    found: dict[str, Any] = {name: item for name, item in dumped.items() if isinstance(item, int | float)}
    seconds = sum(result.seconds.values()) if isinstance(result, Receipt) else found.get("seconds", 0.0)
    records = found.get("records", found.get("loaded", 0))
    if seconds:
        found |= {"seconds": round(seconds, 3), "records per second": round(records / seconds, 1)}
    if isinstance(result, Receipt):
        found["digest"] = result.digest
    return found
