"""Runs in processes of their own, as the UI starts them: terminated, and killed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import ModuleTarget

from migration_pipelines.components.internals import LOCATION, Session
from migration_pipelines_tests.dagster_project import Project, fill, read, statuses
from migration_pipelines_tests.records import by_id, plain_records

pytestmark = pytest.mark.slow
RECORDS = plain_records(600)
PATIENCE_SECONDS = 60


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A migration that takes a while: single records go back and forth."""
    project = Project(tmp_path)
    fill(project.parquet("source"), RECORDS, part_records=100)
    project.declare(
        "docs",
        source=project.parquet("source"),
        target=project.parquet("target"),
        partition_size=100,
        batch_size=1,
    )
    return project


@pytest.fixture
def served(project: Project) -> Iterator[Session]:
    """The project's home with a code server, and Dagster's own launcher of runs."""
    target = ModuleTarget("migration_pipelines.definitions", None, None, LOCATION)
    with project.instance() as instance, WorkspaceProcessContext(instance, target) as workspace:
        yield Session(instance, workspace)


def start(session: Session) -> str:
    """Plan, then start one run over all partitions and wait until one of them is verified."""
    plan = session.submit([dg.AssetKey(["docs", "plan"])], tags={"mine": "plan"})
    session.execute_queued({"mine": "plan"})
    wait_for(lambda: status(session, plan) == "SUCCESS")
    tags = {
        "dagster/asset_partition_range_start": "g1_00000",
        "dagster/asset_partition_range_end": "g1_00005",
    }
    assets = [dg.AssetKey(["docs", step]) for step in ("extracted", "transformed", "loaded", "verified")]
    run_id = session.submit(assets, tags={"mine": "move", **tags})
    session.execute_queued({"mine": "move"})
    wait_for(lambda: "MATERIALIZED" in statuses(session.instance, "docs").values())
    assert status(session, run_id) == "STARTED"
    return run_id


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.1)


def status(session: Session, run_id: str) -> str:
    run = session.instance.get_run_by_id(run_id)
    assert run is not None
    return run.status.value


def worker(session: Session, run_id: str) -> int:
    """The process that executes a run."""
    for entry in session.instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        found = re.search(r"Executing steps in process \(pid: (\d+)\)", entry.message)
        if found:
            return int(found[1])
    raise AssertionError("nobody executes the run")


def test_terminate_cancels_at_once_and_retries_nothing(project: Project, served: Session) -> None:
    run_id = start(served)
    asked = time.monotonic()
    assert served.instance.run_launcher.terminate(run_id)
    wait_for(lambda: status(served, run_id) == "CANCELED")
    assert time.monotonic() - asked < 15
    assert not served.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_UP_FOR_RETRY)
    assert len(served.instance.get_runs()) == 2
    assert project.run("docs").status == "complete"
    assert by_id(read(project.parquet("target"))) == by_id(RECORDS)


def test_a_killed_worker_is_noticed_and_what_it_verified_stands(project: Project, served: Session) -> None:
    run_id = start(served)
    os.kill(worker(served, run_id), signal.SIGKILL)
    wait_for(lambda: status(served, run_id) == "FAILURE")
    verified = [key for key, state in statuses(served.instance, "docs").items() if state == "MATERIALIZED"]
    assert verified
    extracted: list[str] = []
    report = project.run(
        "docs",
        listener=lambda event: extracted.append(event.partition) if event.name == "extracted" else None,
    )
    assert report.status == "complete"
    assert not set(verified) & set(extracted)
    assert by_id(read(project.parquet("target"))) == by_id(RECORDS)
