"""Logs as lines of JSON: every line, with the migration's id, and nowhere a secret."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from migration_pipelines.cli.failures import say
from migration_pipelines.errors import StoreUnavailableError, TransientError
from migration_pipelines.logs import JsonLog
from migration_pipelines.migration import Event
from migration_pipelines.migrator import run_migration
from migration_pipelines.retry import RetryPolicy
from migration_pipelines_tests.dagster_project import Project
from migration_pipelines_tests.observed import failing_first, migration, refusing
from migration_pipelines_tests.shell import Shell, fill, shell

__all__ = ["shell"]

MOVE = ("--source", "parquet:source#docs", "--target", "parquet:target#docs")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def plan_id(folder: Path) -> str:
    (found,) = folder.glob("migrations/*/plan.json")
    plan = json.loads(found.read_text())
    return f"{plan['config_digest'][:12]}-g{plan['generation']}"


# ── the lines ────────────────────────────────────────────────────────────────────────────────────────


def test_every_phase_of_every_partition_is_a_line_with_the_figures_of_the_report(tmp_path: Path) -> None:
    stream = io.StringIO()
    with migration(tmp_path, JsonLog(stream).listen) as moving:
        report = run_migration(moving)
    found = lines(stream.getvalue())
    for event, what in (("extracted", "read"), ("loaded", "loaded"), ("verified", "verified")):
        told = [line for line in found if line["event"] == event]
        assert len(told) == 10
        assert sum(line["records"] for line in told) == report.records[what]
    assert found[-1]["event"] == "ended"
    assert found[-1]["phase"] == "migration"
    assert not any(line["event"].startswith("batch") for line in found)
    assert {line["level"] for line in found} == {"info"}


def test_every_line_has_the_id_of_the_plan_or_its_beginning_before_there_is_one(tmp_path: Path) -> None:
    stream = io.StringIO()
    with migration(tmp_path, JsonLog(stream).listen) as moving:
        run_migration(moving)
    ids = [line["migration_id"] for line in lines(stream.getvalue())]
    whole = plan_id(tmp_path)
    begins = ids.index(whole)
    assert set(ids[:begins]) == {whole.rpartition("-")[0]}
    assert set(ids[begins:]) == {whole}
    planned = [line["event"] for line in lines(stream.getvalue())].index("planned")
    assert begins == planned


def test_trouble_has_a_level_and_says_why(tmp_path: Path) -> None:
    stream = io.StringIO()
    refuse, fail = refusing("doc#00123"), failing_first(1, TransientError("busy"))
    with migration(
        tmp_path, JsonLog(stream).listen, fault=lambda batch: (fail(batch), refuse(batch))
    ) as moving:
        run_migration(moving)
    (retried,) = [line for line in lines(stream.getvalue()) if line["event"] == "retried"]
    assert (retried["level"], retried["error"], retried["message"], retried["attempt"]) == (
        "warning", "TransientError", "busy", 1
    )  # fmt: skip
    (rejected,) = [line for line in lines(stream.getvalue()) if line["event"] == "rejected"]
    assert (rejected["level"], rejected["phase"], rejected["records"]) == ("warning", "load", 1)
    assert rejected["message"] == "the record is too odd"


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────


def test_secrets_are_blacked_out_of_every_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVIATE_API_KEY", "planted-in-the-environment")
    stream = io.StringIO()
    log = JsonLog(stream, arguments=["--source", "pgvector://me:planted%40typed@host/db/t"])
    gone = StoreUnavailableError(
        "planted-in-the-environment planted%40typed planted@typed pgvector://me:planted-elsewhere@host/db"
    )
    with (
        migration(
            tmp_path, log.listen, fault=failing_first(9, gone), workers=1, retry=RetryPolicy(attempts=2)
        ) as moving,
        log.collecting(),
        pytest.raises(StoreUnavailableError),
    ):
        run_migration(moving)
    text = stream.getvalue()
    assert "***" in text
    assert "planted" not in text
    events = {line["event"] for line in lines(text)}
    assert {"failed", "retried", "logged"} <= events


def test_a_stores_secret_is_known_whatever_its_variable_is_called(tmp_path: Path) -> None:
    from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
    from migration_pipelines.stores.pgvector import STORE as PGVECTOR

    config = MigrationConfig(source="pgvector://me@127.0.0.1:9/db/t", target="memory:unused#t")
    store = PGVECTOR(host="127.0.0.1", port=9, user="me", database="db", password="planted-by-a-connection")
    stream = io.StringIO()
    log = JsonLog(stream)
    ledger = ledger_for(config, tmp_path)
    with Migration(config=config, ledger=ledger, source_store=store, listener=log.listen) as moving:
        assert moving.source is not None
        moving.tell("failed", error=StoreUnavailableError("password planted-by-a-connection was refused"))
    (line,) = lines(stream.getvalue())
    assert line["message"] == "password *** was refused"


# ── the command line ─────────────────────────────────────────────────────────────────────────────────


def test_log_json_makes_every_line_on_standard_error_json(shell: Shell, tmp_path: Path) -> None:
    fill("parquet:source#docs")
    found = shell("run", *MOVE, "--log-json", "--json")
    assert found.status == 0
    told = lines(found.err)
    assert [line["event"] for line in told if line["event"] in ("planned", "validated")] == [
        "planned", "validated",
    ]  # fmt: skip
    assert told[-1]["migration_id"] == plan_id(tmp_path / "home")
    assert found.document["status"] == "complete"


def test_the_environment_asks_for_it_too_and_plan_logs_as_well(shell, monkeypatch) -> None:
    monkeypatch.setenv("VECTOR_MIGRATE_LOG", "json")
    fill("parquet:source#docs")
    assert "planned" in {line["event"] for line in lines(shell("plan", *MOVE).err)}


def test_an_error_is_a_line_of_json_too(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGVECTOR_PASSWORD", "planted-password")
    found = shell(
        "run", "--source", "pgvector://me@127.0.0.1:9/planted-password/t", "--target", "parquet:t#docs",
        "--retry", 0, "--log-json",
    )  # fmt: skip
    assert found.status == 4
    last = lines(found.err)[-1]
    assert (last["level"], last["event"]) == ("error", "said")
    assert "planted" not in found.everything


def test_afterwards_things_are_said_and_logged_as_before(shell: Shell, capsys) -> None:
    fill("parquet:source#docs")
    shell("run", *MOVE, "--log-json")
    say("plainly")
    assert capsys.readouterr().err == "vector-migrate: plainly\n"
    assert logging.getLogger("migration_pipelines").propagate
    assert logging.getLogger("migration_pipelines").handlers == []


# ── Dagster ──────────────────────────────────────────────────────────────────────────────────────────


def test_dagsters_runs_carry_the_id_that_the_lines_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path)
    fill(f"parquet:{tmp_path}/source#docs")
    project.declare(
        "docs", source=f"parquet:{tmp_path}/source#docs", target=f"parquet:{tmp_path}/target#docs"
    )
    monkeypatch.setenv("VECTOR_MIGRATE_LOG", "json")
    project.run("docs")
    told = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    whole = plan_id(project.home)
    assert {line["migration_id"] for line in told if line["event"] == "verified"} == {whole}
    with project.instance() as instance:
        runs = instance.get_runs()
    assert [run.tags["vector-migrate/migration-id"] for run in runs] == [whole] * 3


def test_an_event_without_figures_is_a_short_line() -> None:
    stream = io.StringIO()
    JsonLog(stream).listen(Event(name="prepared", migration="abc-g1"))
    (line,) = lines(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {"level": "info", "event": "prepared", "migration_id": "abc-g1"}
