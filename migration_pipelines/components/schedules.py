"""A job per migration that plans it, and where one is declared the schedule that runs it.

A schedule can't know the partitions before the plan is made. So the job materializes `plan`, which adds them
and then launches a backfill of those that aren't verified: the same that a person would launch, with
its own result for each partition (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dagster as dg

from migration_pipelines.components.declared import NAME_TAG, Declared


def plan_job(declared: Declared) -> Any:
    """Return the job that makes the plan and launches the backfill of what is pending."""
    return dg.define_asset_job(
        f"{declared.slug}__run",
        selection=dg.AssetSelection.assets(declared.key("inspected"), declared.key("plan")),
        description="Plans, then launches a backfill of every partition that isn't verified.",
        tags={NAME_TAG: declared.spec.name},
        config=_config(declared),
    )


def schedules(declared: Declared) -> Sequence[dg.ScheduleDefinition]:
    """Return the migration's schedule, stopped until somebody starts it; none where none is declared."""
    if declared.spec.schedule is None:
        return []
    return [
        dg.ScheduleDefinition(
            name=f"{declared.slug}__schedule",
            cron_schedule=declared.spec.schedule,
            job_name=f"{declared.slug}__run",
            description="Goes on with what is left; once complete, does it afresh where the target allows.",
        )
    ]


def _config(declared: Declared) -> dict[str, Any]:
    return {"ops": {f"{declared.slug}__plan": {"config": {"launch": True, "renew": True}}}}
