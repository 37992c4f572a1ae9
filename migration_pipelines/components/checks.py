"""The checks of `validated`: what the engine checks of the whole, and the quality of what arrived."""

# Without `from __future__ import annotations`: Dagster looks at the annotation of a context itself.

from collections.abc import Iterator

import dagster as dg

from migration_pipelines.components.declared import Declared
from migration_pipelines.components.plots import table
from migration_pipelines.migration import ignore
from migration_pipelines.validate import Report

# The engine's checks, by the names that Dagster takes for them.
ENGINE_CHECKS = {
    "records in scope": "records_in_scope",
    "read = filtered + rejected + verified": "every_record_accounted_for",
    "target count": "target_count",
    "source unchanged": "source_unchanged",
}
QUALITY = "quality"


def engine_check_specs(declared: Declared) -> list[dg.AssetCheckSpec]:
    """Return the checks that the validate phase makes."""
    asset = declared.key("validated")
    return [dg.AssetCheckSpec(name, asset=asset) for name in ENGINE_CHECKS.values()]


def engine_checks(declared: Declared, report: Report) -> Iterator[dg.AssetCheckResult]:
    """Yield the result of each check of a report; what wasn't checked hasn't passed."""
    found = {check.name: check for check in report.checks}
    for label, name in ENGINE_CHECKS.items():
        check = found.get(label)
        yield dg.AssetCheckResult(
            asset_key=declared.key("validated"),
            check_name=name,
            passed=check is not None and check.passed,
            description=None if check else "Not checked: some partitions aren't verified.",
            metadata={"expected": check.expected, "found": check.found} if check else {},
        )


def quality_check(declared: Declared) -> dg.AssetChecksDefinition:
    """Return the check that runs the Great Expectations suite on what arrived."""

    @dg.asset_check(
        asset=declared.key("validated"),
        name=QUALITY,
        description="Great Expectations on what arrived, by what inspect found in the source.",
        required_resource_keys=declared.resource_keys,
    )
    def quality(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        from migration_pipelines.quality import run_quality

        with declared.open(context, ignore) as migration:
            report = run_quality(migration)
        return dg.AssetCheckResult(
            passed=report.success,
            metadata={
                "records": report.records,
                "expectations": table([row.model_dump() for row in report.rows]),
            },
        )

    return quality
