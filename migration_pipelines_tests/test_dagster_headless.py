"""A declared migration as a real backfill on a real Dagster home: its runs, its partitions, its end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from migration_pipelines import quality
from migration_pipelines.components import failures
from migration_pipelines.components.headless import close_abandoned_runs
from migration_pipelines.components.internals import BACKFILL_TAG, is_finished
from migration_pipelines.errors import (
    CollectionNotFoundError,
    LeaseHeldError,
    PlanChangedError,
    StoreUnavailableError,
    TransientError,
)
from migration_pipelines.quality import QualityReport
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.dagster_project import (
    Project,
    backfill_statuses,
    fill,
    read,
    run_statuses,
    statuses,
)
from migration_pipelines_tests.records import by_id, plain_records

RECORDS = plain_records(600)
KEYS = [f"g1_{number:05d}" for number in range(6)]
SECRET = "correct-horse-battery-staple"


@pytest.fixture(autouse=True)
def quick_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    """Great Expectations takes seconds to import; test_quality.py tests it."""
    found = QualityReport(success=True, records=0, rows=())
    monkeypatch.setattr(quality, "run_quality", lambda *_, **__: found)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A migration of 6 partitions between two sets of collections in memory."""
    project = Project(tmp_path)
    fill(f"memory:{tmp_path}/source#docs", RECORDS)
    project.declare(
        "docs",
        source=f"memory:{tmp_path}/source#docs",
        target=f"memory:{tmp_path}/target#docs",
        partition_size=100,
        batch_size=20,
        retry={"attempts": 1},
    )
    return project


def target(project: Project) -> str:
    return f"memory:{project.folder}/target#docs"


def test_a_backfill_runs_to_completion_and_dagster_shows_it(project: Project) -> None:
    report = project.run("docs")
    assert (report.status, report.exit_status) == ("complete", 0)
    assert report.records["verified"] == len(RECORDS)
    assert by_id(read(target(project))) == by_id(RECORDS)
    with project.instance() as instance:
        assert backfill_statuses(instance) == ["COMPLETED_SUCCESS"]
        assert run_statuses(instance) == ["SUCCESS"] * 3  # plan, all partitions, validated
        for step in ("extracted", "transformed", "loaded", "verified"):
            assert statuses(instance, "docs", step) == dict.fromkeys(KEYS, "MATERIALIZED")
        (run,) = [run for run in instance.get_runs() if "dagster/asset_partition_range_start" in run.tags]
        assert run.tags["vector-migrate/migration"] == "docs"
        assert run.tags["vector-migrate/generation"] == "1"
        validated = instance.get_latest_materialization_event(dg.AssetKey(["docs", "validated"]))
        assert validated is not None
        metadata = validated.asset_materialization.metadata  # type: ignore[union-attr]
        assert metadata["records verified"].value == len(RECORDS)
        assert "█" in str(metadata["rates"].value)
        assert " MB and " in str(metadata["resources"].value)


def test_run_again_a_complete_migration_does_no_partition_again(project: Project) -> None:
    project.run("docs")
    heard: list[str] = []
    report = project.run("docs", listener=lambda event: heard.append(event.name))
    assert report.status == "complete"
    assert "batch-extracted" not in heard
    assert "batch-loaded" not in heard


def test_what_the_engine_began_dagster_finishes(project: Project) -> None:
    from migration_pipelines.declarations import read_declarations
    from migration_pipelines.migrator import run_partition
    from migration_pipelines.plan import make_plan

    with read_declarations(project.defs).migration("docs", home=project.home) as migration:
        make_plan(migration)
        run_partition(migration, KEYS[0])
    extracted: list[str] = []

    def listen(event: Any) -> None:
        if event.name == "extracted":
            extracted.append(event.partition)

    assert project.run("docs", listener=listen).status == "complete"
    assert sorted(extracted) == KEYS[1:]


# ── partitions that fail ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Ids whose documents the target changes while it writes them, as long as they are in the set."""
    ids: set[str] = set()
    upsert = MemoryStore.upsert

    def change(self: MemoryStore, collection: str, batch: pa.RecordBatch) -> None:
        rows = batch.to_pylist()
        for row in rows:
            if row["id"] in ids:
                row["document"] = "another"
        upsert(self, collection, pa.RecordBatch.from_pylist(rows, schema=batch.schema))

    monkeypatch.setattr(MemoryStore, "upsert", change)
    yield ids
    ids.clear()


def test_a_partition_that_differs_is_failed_and_it_alone_is_run_again(
    project: Project, faulty: set[str]
) -> None:
    faulty |= {"doc#00150", "doc#00451"}
    report = project.run("docs")
    assert (report.status, report.exit_status) == ("incomplete", 1)
    assert report.partitions == {"total": 6, "verified": 4, "failed": 2}
    assert report.records["different"] == 2
    assert [error.partition(":")[0] for error in report.errors] == [KEYS[1], KEYS[4]]
    failed = dict.fromkeys((KEYS[1], KEYS[4]), "FAILED")
    with project.instance() as instance:
        assert statuses(instance, "docs") == {**dict.fromkeys(KEYS, "MATERIALIZED"), **failed}
        assert statuses(instance, "docs", "loaded") == dict.fromkeys(KEYS, "MATERIALIZED")
        assert backfill_statuses(instance) == ["COMPLETED_FAILED"]
    faulty.clear()
    loaded: list[str] = []
    report = project.run(
        "docs", listener=lambda event: loaded.append(event.partition) if event.name == "loaded" else None
    )
    assert report.status == "complete"
    assert sorted(loaded) == [KEYS[1], KEYS[4]]
    assert by_id(read(target(project))) == by_id(RECORDS)


def test_only_verified_chosen_loads_again_what_differed(project: Project, faulty: set[str]) -> None:
    """What `reexecutePartitionBackfill(FROM_FAILURE)` chooses is the failed asset alone."""
    faulty.add("doc#00150")
    project.run("docs")
    faulty.clear()
    with project.session() as session:
        key = dg.AssetKey(["docs", "verified"])
        run_id = session.submit([key], tags={"dagster/partition": KEYS[1], "mine": "1"})
        session.execute_queued({"mine": "1"})
        run = session.instance.get_run_by_id(run_id)
        assert run is not None
        assert run.status == dg.DagsterRunStatus.SUCCESS
        assert statuses(session.instance, "docs") == dict.fromkeys(KEYS, "MATERIALIZED")


def test_a_transient_error_is_tried_again_and_nothing_else_is(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "DELAY_SECONDS", 0.01)
    scan, errors = MemoryStore.scan, [TransientError("busy"), TransientError("busy")]

    def flaky(self: MemoryStore, collection: str, span: Any, **options: Any) -> Any:
        if options.get("vectors", True) and options["batch_records"] == 20 and errors:
            raise errors.pop()
        return scan(self, collection, span, **options)

    monkeypatch.setattr(MemoryStore, "scan", flaky)
    assert project.run("docs").status == "complete"
    with project.instance() as instance:
        (run,) = [run for run in instance.get_runs() if "dagster/asset_partition_range_start" in run.tags]
        restarted = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_RESTARTED)
        assert 1 <= len(restarted) <= 2


# ── errors that fail the whole ───────────────────────────────────────────────────────────────────────


def test_the_engines_own_error_comes_out_of_the_runs(project: Project) -> None:
    project.declare("absent", source=f"memory:{project.folder}/source#absent", target="memory:x#docs")
    with pytest.raises(CollectionNotFoundError, match="absent") as caught:
        project.run("absent")
    assert caught.value.exit_status == 2


def test_a_store_that_stays_away_ends_with_its_own_error(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "DELAY_SECONDS", 0.01)

    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailableError("nothing answers")

    monkeypatch.setattr(MemoryStore, "upsert", away)
    with pytest.raises(StoreUnavailableError, match="nothing answers"):
        project.run("docs")


def test_a_changed_declaration_is_refused_until_a_fresh_plan_is_asked_for(project: Project) -> None:
    project.run("docs")
    source, into = f"memory:{project.folder}/source#docs", target(project)
    project.declare("docs", source=source, target=into, partition_size=300, on_existing="replace")
    with pytest.raises(PlanChangedError):
        project.run("docs")
    assert project.run("docs", fresh=True).generation == 2
    with project.instance() as instance:
        assert statuses(instance, "docs") == dict.fromkeys(["g2_00000", "g2_00001"], "MATERIALIZED")


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_secret_is_in_no_file_of_the_home(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", SECRET)
    project.connect("wall", "pgvector", host="127.0.0.1", port=1, user="u", password="{{ env.PLANTED }}")
    into = {"connection": "wall", "collection": "docs"}
    project.declare("leak", source=f"memory:{project.folder}/source#docs", target=into)
    monkeypatch.setattr(failures, "ATTEMPTS", 0)
    with pytest.raises(StoreUnavailableError) as caught:
        project.run("leak")
    assert SECRET not in str(caught.value)
    files = [path for path in project.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


# ── stopped and killed ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def slow(tmp_path: Path) -> Project:
    """A migration of 6 partitions between two folders, which other processes can see."""
    project = Project(tmp_path)
    fill(project.parquet("source"), RECORDS, part_records=100)
    project.declare(
        "docs",
        source=project.parquet("source"),
        target=project.parquet("target"),
        partition_size=100,
        batch_size=20,
    )
    return project


def stop(project: Project, number: int) -> int:
    """Start a run, send it a signal in mid-extract of its second pair of partitions; returns how it ended."""
    process = project.start("docs", seconds_per_batch=0.05)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("verified"):
            break
    time.sleep(0.2)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert "LeaseHeldError" not in errors
    return process.returncode


def test_an_interrupted_run_is_canceled_not_retried_and_goes_on(slow: Project) -> None:
    assert stop(slow, signal.SIGINT) != 0
    with slow.instance() as instance:
        assert backfill_statuses(instance) == ["CANCELED"]
        assert run_statuses(instance) == ["CANCELED", "SUCCESS"]
        assert set(statuses(instance, "docs").values()) <= {"MATERIALIZED", ""}
    assert slow.run("docs").status == "complete"
    assert by_id(read(slow.parquet("target"))) == by_id(RECORDS)


@pytest.mark.slow
def test_terminate_in_the_ui_reaches_a_process_that_dagster_did_not_start(slow: Project) -> None:
    process = slow.start("docs", seconds_per_batch=0.5)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("batch-extracted"):
        pass
    with slow.instance() as instance:
        (run,) = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        assert not instance.run_launcher.terminate(run.run_id)  # it only notes that it was asked to
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert run_statuses(instance) == ["CANCELED", "SUCCESS"]
        assert backfill_statuses(instance) == ["CANCELED"]


def test_a_killed_run_is_closed_and_costs_at_most_one_partition_a_worker(slow: Project) -> None:
    assert stop(slow, signal.SIGKILL) == -signal.SIGKILL
    receipts = len(list((slow.ledger("docs").folder / "receipts").iterdir()))
    with slow.instance() as instance:
        assert run_statuses(instance)[0] == "STARTED"
    close_abandoned_runs(slow.home)
    with slow.instance() as instance:
        assert run_statuses(instance) == ["FAILURE", "SUCCESS"]
        assert backfill_statuses(instance) == ["CANCELED"]
    extracted: list[str] = []
    report = slow.run(
        "docs",
        listener=lambda event: extracted.append(event.partition) if event.name == "extracted" else None,
    )
    assert report.status == "complete"
    assert len(extracted) <= len(KEYS) - receipts
    assert by_id(read(slow.parquet("target"))) == by_id(RECORDS)
    with slow.instance() as instance:
        assert statuses(instance, "docs") == dict.fromkeys(KEYS, "MATERIALIZED")


def test_a_second_process_is_told_that_one_is_at_work(slow: Project) -> None:
    process = slow.start("docs", seconds_per_batch=0.05)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with pytest.raises(LeaseHeldError, match="another process runs 'docs'"):
            slow.run("docs")
    finally:
        process.kill()
        process.communicate()


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────


def test_a_schedules_job_plans_and_launches_a_backfill_of_what_is_pending(
    project: Project, faulty: set[str]
) -> None:
    faulty.add("doc#00150")
    project.run("docs")
    faulty.clear()
    with project.session() as session:
        config = {"ops": {"docs__plan": {"config": {"launch": True, "renew": True}}}}
        session.submit([dg.AssetKey(["docs", "plan"])], tags={"mine": "1"}, run_config=config)
        session.execute_queued({"mine": "1"})
        backfill = session.instance.get_backfills()[0]
        assert backfill.status.value == "REQUESTED"
        while not is_finished(session.instance, backfill.backfill_id):
            session.iterate(backfill.backfill_id)
            session.execute_queued({BACKFILL_TAG: backfill.backfill_id})
        runs = session.instance.get_runs(dg.RunsFilter(tags={BACKFILL_TAG: backfill.backfill_id}))
        assert [run.status.value for run in runs] == ["SUCCESS", "SUCCESS"]
        assert runs[1].tags["dagster/asset_partition_range_start"] == KEYS[1]
        assert runs[1].tags["dagster/asset_partition_range_end"] == KEYS[1]
        assert statuses(session.instance, "docs") == dict.fromkeys(KEYS, "MATERIALIZED")
    report = project.ledger("docs").report()
    assert report is not None
    assert report["status"] == "complete"
