"""The only module that imports what Dagster keeps private, all of it of 1.13 (pyproject pins it).

Dagster has no public way to launch a backfill without its webserver, nor to execute one without its daemon;
both are its own functions here, called as the webserver and the daemon call them.
`test_dagster_headless.py` fails where a new version changes them.
"""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.definitions.events import AssetKeyPartitionKey
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.execution.backfill import (
    BULK_ACTION_TERMINAL_STATUSES,
    BulkActionsFilter,
    BulkActionStatus,
    PartitionBackfill,
)
from dagster._core.execution.submit_asset_runs import submit_asset_run
from dagster._core.instance.ref import InstanceRef
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.utils import make_new_backfill_id, make_new_run_id
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster._daemon.backfill import execute_backfill_jobs

from migration_pipelines.errors import ConfigurationError

Opened = TypeVar("Opened")
INTERRUPTS = (KeyboardInterrupt, DagsterExecutionInterruptedError)
LOCATION = "migration_pipelines"
BACKFILL_TAG = "dagster/backfill"
_DEFINITIONS = "migration_pipelines.definitions"
_log = logging.getLogger(__name__)
# Its own loop beats every 30 s; a daemon that misses two beats is gone.
_HEARTBEAT_SECONDS = 75.0
_UNFINISHED_BACKFILLS = [BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING, BulkActionStatus.FAILING]
_UNFINISHED_RUNS = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, *IN_PROGRESS_RUN_STATUSES]
_IN_PROCESS: dict[str, Any] = {
    # A queue that this process serves itself: runs start one after the other, outside of any event loop.
    "run_coordinator": {"module": "dagster.core.run_coordinator", "class": "QueuedRunCoordinator"},
    "run_launcher": {
        "module": "dagster._core.launcher.sync_in_memory_run_launcher",
        "class": "SyncInMemoryRunLauncher",
    },
    # Capturing a step's output redirects the whole process's, a progress bar included.
    "compute_logs": {
        "module": "dagster._core.storage.noop_compute_log_manager",
        "class": "NoOpComputeLogManager",
    },
}


# ── backfills ────────────────────────────────────────────────────────────────────────────────────────


def add_backfill(
    instance: dg.DagsterInstance,
    asset_graph: BaseAssetGraph[Any],
    *,
    partitioned: Sequence[dg.AssetKey],
    keys: Iterable[str],
    whole: Sequence[dg.AssetKey],
    title: str,
    tags: Mapping[str, str],
    run_config: Mapping[str, Any] | None = None,
) -> str:
    """Add a backfill of some assets' partitions and some whole assets; returns its id.

    A daemon takes it up within half a minute, or `Session.iterate` at once.
    """
    targets = {AssetKeyPartitionKey(asset, key) for asset in partitioned for key in keys}
    targets |= {AssetKeyPartitionKey(asset, None) for asset in whole}
    backfill = PartitionBackfill.from_asset_graph_subset(
        backfill_id=make_new_backfill_id(),
        backfill_timestamp=time.time(),
        tags=tags,
        dynamic_partitions_store=instance,
        asset_graph_subset=AssetGraphSubset.from_asset_partition_set(targets, asset_graph),
        title=title,
        description=None,
        run_config=run_config,
    )
    instance.add_backfill(backfill)
    return str(backfill.backfill_id)


def is_finished(instance: dg.DagsterInstance, backfill_id: str) -> bool:
    """Whether a backfill has come to an end, of whatever kind: its status says nothing of its runs."""
    backfill = instance.get_backfill(backfill_id)
    return backfill is None or backfill.status in BULK_ACTION_TERMINAL_STATUSES


def materialized_partitions(
    instance: dg.DagsterInstance, asset: dg.AssetKey, partitions: dg.DynamicPartitionsDefinition
) -> set[str]:
    """Return the partitions of an asset that are materialized, and not failed since."""
    assert partitions.name is not None
    keys = instance.get_dynamic_partitions(partitions.name)
    statuses = instance.get_status_by_partition(asset, keys, partitions) or {}
    return {key for key, status in statuses.items() if status == AssetPartitionStatus.MATERIALIZED}


# ── what a dead process left ─────────────────────────────────────────────────────────────────────────


def close_abandoned(instance: dg.DagsterInstance, tags: Mapping[str, str], *, why: str) -> None:
    """End the runs and backfills with these tags that nobody is at work on any more."""
    for backfill in instance.get_backfills(filters=BulkActionsFilter(statuses=_UNFINISHED_BACKFILLS)):
        if tags.items() <= dict(backfill.tags or {}).items():
            ended = backfill._replace(status=BulkActionStatus.CANCELED)
            instance.update_backfill(ended.with_end_timestamp(time.time()))
    for run in instance.get_runs(dg.RunsFilter(tags=dict(tags), statuses=_UNFINISHED_RUNS)):
        if run.status in (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED):
            instance.report_run_canceled(run, why)
        else:
            instance.report_run_failed(run, why)
    _free_slots(instance)


def _free_slots(instance: dg.DagsterInstance) -> None:
    """Free the slots in pools that runs still hold whose process was killed; else others wait for ever."""
    storage = instance.event_log_storage
    for run_id in storage.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            storage.free_concurrency_slots_for_run(run_id)


def newest_backfill(folder: Path, tags: Mapping[str, str]) -> str | None:
    """Return the id of the newest backfill with these tags in a Dagster home; the UI shows `/runs/b/<id>`."""
    with dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(folder))) as instance:
        found = instance.get_backfills(filters=BulkActionsFilter(tags=tags), limit=1)
        return found[0].backfill_id if found else None


# ── executing in this process ────────────────────────────────────────────────────────────────────────


@contextmanager
def open_session(folder: Path) -> Iterator[Session]:
    """Open the Dagster home in a folder, to execute runs and backfills in this process."""
    reference = InstanceRef.from_dir(str(folder), overrides=_IN_PROCESS)
    with dg.DagsterInstance.from_ref(reference) as instance:
        origin = InProcessCodeLocationOrigin(
            LoadableTargetOrigin(module_name=_DEFINITIONS), location_name=LOCATION
        )
        with _quietly(WorkspaceProcessContext, instance, InProcessWorkspaceLoadTarget([origin])) as workspace:
            entry = workspace.create_request_context().get_location_entry(LOCATION)
            failure = entry.load_error if entry else None
            if failure is not None:
                causes = [failure.message, *(cause.message for cause in _causes(failure))]
                raise ConfigurationError(f"the declarations can't be loaded: {causes[-1].strip()}")
            yield Session(instance, workspace)


def _quietly(make: Callable[..., Opened], *arguments: Any) -> Opened:
    """Make something of Dagster's, without its warnings: what they tell of is raised as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments)


def _causes(failure: Any) -> Iterator[Any]:
    while failure.cause is not None:
        failure = failure.cause
        yield failure


class Session:
    """A Dagster home, and the definitions in this process."""

    def __init__(self, instance: dg.DagsterInstance, workspace: WorkspaceProcessContext) -> None:
        self.instance, self._workspace = instance, workspace

    @property
    def asset_graph(self) -> BaseAssetGraph[Any]:
        """All assets of the definitions."""
        return self._workspace.create_request_context().asset_graph

    def daemon_is_alive(self) -> bool:
        """Whether a daemon serves this home: then it is the one to take up backfills and runs."""
        beat = self.instance.get_daemon_heartbeats().get("BACKFILL")
        return beat is not None and time.time() - beat.timestamp < _HEARTBEAT_SECONDS

    def submit(
        self,
        assets: Sequence[dg.AssetKey],
        *,
        tags: Mapping[str, str],
        run_config: Mapping[str, Any] | None = None,
        checks: Sequence[dg.AssetCheckKey] | None = None,
    ) -> str:
        """Put a run of some whole assets into the queue; returns its id."""
        request = dg.RunRequest(
            asset_selection=list(assets),
            tags=dict(tags),
            run_config=dict(run_config or {}),
            asset_check_keys=list(checks) if checks is not None else None,
        )
        run = asyncio.run(
            submit_asset_run(
                make_new_run_id(),
                request,
                0,
                self.instance,
                self._workspace,
                self._workspace.create_request_context(),
                {},
                {},
                _log,
            )
        )
        return run.run_id

    def iterate(self, backfill_id: str) -> None:
        """Take one backfill a step further, as the daemon would: it puts its runs into the queue."""
        backfill = self.instance.get_backfill(backfill_id)
        assert backfill is not None
        for _ in execute_backfill_jobs(self._workspace, _log, [backfill]):
            pass

    def execute_queued(self, tags: Mapping[str, str]) -> int:
        """Execute the queued runs with these tags, one after the other; returns how many there were."""
        queued = self.instance.get_runs(
            dg.RunsFilter(tags=dict(tags), statuses=[dg.DagsterRunStatus.QUEUED]), ascending=True
        )
        for run in queued:
            self.instance.launch_run(run.run_id, self._workspace.create_request_context())
        return len(queued)

    def failure_of(self, run_id: str) -> tuple[str, Mapping[str, dg.MetadataValue[Any]]] | None:
        """Return description and metadata of what failed a run's step; None where nothing did."""
        for entry in self.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
            event = entry.dagster_event
            data = event.step_failure_data if event else None
            if data is None:
                continue
            if data.user_failure_data is not None:
                return data.user_failure_data.description or "", data.user_failure_data.metadata
            return data.error.message if data.error else "", {}
        return None
