"""The command line where things go well: what is moved, what is said, in which form."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer

from migration_pipelines import batch as batches
from migration_pipelines.cli.entry import app
from migration_pipelines.store import open_address, store_kinds
from migration_pipelines_tests.shell import Outcome, Shell, fill, python, shell

__all__ = ["shell"]

SOURCE, TARGET = "parquet:source#docs", "parquet:target#docs"
MOVE = ("--source", SOURCE, "--target", TARGET)
# What takes long to import, and every driver but those of the stores in use.
HEAVY = (
    *("chromadb", "dagster", "great_expectations", "numpy", "opentelemetry", "pandas", "prometheus_client"),
    *("psutil", "psycopg", "pyarrow", "pydantic"),
)


@pytest.fixture
def moving(shell: Shell) -> Shell:
    """A shell in a folder where the source is there."""
    fill(SOURCE)
    return shell


# ── start ────────────────────────────────────────────────────────────────────────────────────────────


def modules_after(arguments: list[str], names: tuple[str, ...], folder: Path) -> Outcome:
    code = f"""
import sys
from migration_pipelines.cli import main
try:
    main({arguments!r})
except SystemExit as left:
    sys.stderr.write(str([name for name in {names!r} if name in sys.modules]))
    raise
"""
    return python(code, folder=folder)


def test_help_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    found = modules_after(["--help"], (*HEAVY, "rich"), tmp_path)
    assert found.status == 0
    assert found.err == "[]"
    assert "validate" in found.out


def test_a_move_imports_no_driver_of_another_store(tmp_path: Path) -> None:
    fill(f"parquet:{tmp_path}/source#docs")
    drivers = ("chromadb", "psycopg", "dagster", "great_expectations", "opentelemetry", "prometheus_client")
    found = modules_after(["run", *MOVE, "--quiet"], drivers, tmp_path)
    assert found.status == 0
    assert found.err == "[]"


def test_stores_are_listed_without_any_driver(tmp_path: Path) -> None:
    found = modules_after(["stores", "--json"], ("chromadb", "psycopg", "dagster"), tmp_path)
    assert found.err == "[]"
    assert list(found.document) == store_kinds()
    assert found.document["chroma"]["id_kinds"] == ["str"]


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize(
    "command",
    [
        *("inspect", "stores", "plan", "run", "validate", "estimate", "verify", "export", "import"),
        *("demo", "benchmark", "ui"),
    ],
)
def test_every_command_says_what_it_does_in_100_columns(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # however wide the terminal is
    found = shell(command, "--help")
    assert found.status == 0
    assert f"vector-migrate {command}" in found.out
    assert max(map(len, found.out.splitlines())) <= 100
    assert [item.name for item in COMMANDS[command].params if not getattr(item, "help", None)] == []


def test_no_command_is_left_out_above() -> None:
    assert len(COMMANDS) == 13


def test_help_of_all_commands_is_not_cut_off(shell: Shell) -> None:
    assert "..." not in re.sub(r"Usage:.*", "", shell().out)


def test_version_is_told(shell: Shell) -> None:
    assert re.fullmatch(r"vector-migrate (\d+\.\d+\.\d+|\(not installed\))\n", shell("--version").out)


# ── run ──────────────────────────────────────────────────────────────────────────────────────────────


def test_run_moves_everything_and_reports_it_as_json(moving: Shell, tmp_path: Path) -> None:
    found = moving("run", *MOVE, "--partition-size", 100, "--json", "--report", "report.json")
    assert found.status == 0
    report = found.document
    assert report["status"] == "complete"
    assert report["source"] == {"address": SOURCE, "count": 300}
    assert report["target"] == {"address": TARGET, "count": 300}
    assert report["partitions"] == {"total": 3, "verified": 3, "failed": 0}
    assert report["records"] == {
        "read": 300, "filtered": 0, "loaded": 300, "rejected": 0, "verified": 300, "different": 0,
    }  # fmt: skip
    assert report["losses"] == []
    assert len(report["digest"]) == 32
    assert report["seconds"] > 0
    assert report["records_per_second"] > 0
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_run_says_the_same_to_people(moving: Shell) -> None:
    found = moving("run", *MOVE)
    assert found.status == 0
    assert f"complete  {SOURCE} → {TARGET}" in found.out
    assert "300 read, 0 filtered, 300 loaded, 0 rejected, 300 verified, 0 different" in found.out


def test_progress_off_a_terminal_is_plain_lines_on_standard_error(moving: Shell) -> None:
    lines = moving("run", *MOVE, "--json").err.splitlines()
    assert lines[0].startswith("vector-migrate: planning: ")
    assert any(line.startswith("vector-migrate: publishing: 300 of 300 records verified") for line in lines)
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_quiet_says_nothing(moving: Shell) -> None:
    assert moving("run", *MOVE, "--quiet") == Outcome(0, "", "")


def test_a_second_run_does_nothing_again(moving: Shell, tmp_path: Path) -> None:
    moving("run", *MOVE)
    receipts = sorted(tmp_path.glob("home/migrations/*/receipts/*.json"))
    before = [receipt.stat().st_mtime_ns for receipt in receipts]
    assert len(before) == 3
    assert moving("run", *MOVE).status == 0
    assert [receipt.stat().st_mtime_ns for receipt in receipts] == before


def test_filter_moves_what_matches(moving: Shell) -> None:
    report = moving("run", *MOVE, "--filter", "even=true", "--json").document
    assert (report["records"]["read"], report["target"]["count"]) == (
        report["records"]["filtered"] + 150,
        150,
    )


def test_merge_and_replace_write_into_what_is_there(moving: Shell) -> None:
    fill(TARGET, dimensions=8, records=None)
    assert moving("run", *MOVE, "--on-existing", "merge", "--json").document["target"]["count"] == 300
    assert moving("run", *MOVE, "--on-existing", "replace", "--fresh").status == 0


def test_dry_run_writes_nothing_anywhere(moving: Shell, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for command in ("plan", "run"):
        found = moving(command, *MOVE, "--dry-run", "--json")
        assert found.status == 0
        assert found.document["status"] == "dry run"
    assert sorted(tmp_path.rglob("*")) == before


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────


def test_plan_freezes_what_run_then_does(moving: Shell) -> None:
    planned = moving("plan", *MOVE, "--partition-size", 100, "--json").document
    assert planned["status"] == "planned"
    assert planned["partitions"] == {"total": 3}
    assert planned["profile"]["records"] == 300
    assert planned["estimate"]["seconds"] > 0
    assert Path(planned["ledger"], "plan.json").exists()
    assert moving("plan", *MOVE, "--partition-size", 100, "--json").document["status"] == "planned earlier"
    assert moving("run", *MOVE, "--partition-size", 100, "--json").document["generation"] == 1


def test_plan_shows_people_estimate_and_warnings(shell: Shell) -> None:
    fill(SOURCE, records=[])
    found = shell("plan", *MOVE)
    assert found.status == 0
    assert "0 in scope" in found.out
    assert "warning: no record is in scope" in found.out


# ── declared migrations ──────────────────────────────────────────────────────────────────────────────

DECLARED = """
type: migration_pipelines.components.StoreConnection
attributes: {{name: lake, store: parquet, settings: {{path: {folder}/target}}}}
---
type: migration_pipelines.components.VectorMigration
attributes:
  name: passages
  source: "parquet:{folder}/source#docs"
  target: {{connection: lake, collection: docs}}
  partition_size: 100
"""


def test_a_declared_migration_runs_by_its_name_and_by_its_file(moving: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "defs" / "passages"
    folder.mkdir(parents=True)
    (folder / "defs.yaml").write_text(DECLARED.format(folder=tmp_path))
    by_name = moving("run", "passages", "--defs", "defs", "--json").document
    assert (by_name["name"], by_name["partitions"]["total"]) == ("passages", 3)
    by_file = moving("run", folder / "defs.yaml", "--json").document
    assert (by_file["status"], by_file["generation"]) == ("complete", 1)
    assert moving("validate", "passages", "--defs", "defs").status == 0


NEEDS_A_VARIABLE = """
type: migration_pipelines.components.VectorMigration
attributes: {name: other, source: "parquet:{{ env.NOT_SET_ANYWHERE }}#docs", target: "parquet:x#docs"}
"""


def test_a_variable_is_asked_for_only_by_the_migration_that_names_it(
    moving: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "defs" / "other").mkdir(parents=True)
    (tmp_path / "defs" / "other" / "defs.yaml").write_text(NEEDS_A_VARIABLE)
    failed = moving("plan", "other", "--defs", "defs")
    assert failed.status == 2
    assert "NOT_SET_ANYWHERE" in failed.err


def test_settings_of_the_command_line_go_before_the_declared_ones(
    moving: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "defs" / "one").mkdir(parents=True)
    (tmp_path / "defs" / "one" / "defs.yaml").write_text(DECLARED.format(folder=tmp_path))
    (tmp_path / "defs" / "other").mkdir()
    (tmp_path / "defs" / "other" / "defs.yaml").write_text(NEEDS_A_VARIABLE)
    monkeypatch.setenv("VECTOR_MIGRATE_DEFS", "defs")
    planned = moving("plan", "passages", "--filter", '{"even": true}', "--dry-run", "--json").document
    assert planned["profile"]["records"] == 150


# ── validate ─────────────────────────────────────────────────────────────────────────────────────────


def test_validate_compares_any_two_collections(moving: Shell) -> None:
    moving("run", *MOVE)
    found = moving("validate", *MOVE, "--json")
    assert (found.status, found.document["status"], found.document["equal"]) == (0, "equal", 300)
    assert found.document["source"]["digest"] == found.document["target"]["digest"]


def test_validate_names_what_differs(moving: Shell) -> None:
    moving("run", *MOVE)
    store, collection = open_address(TARGET)
    store.delete(collection, batches.id_batch(["doc#00007"]))
    found = moving("validate", *MOVE)
    assert found.status == 3
    assert "doc#00007" in found.out
    assert "1 records missing, 0 too many, 0 different" in found.err
    assert moving("validate", *MOVE, "--json").document["missing"] == 1
    assert moving("validate", *MOVE, "--filter", '{"n": {"$gt": 7}}').status == 0


def test_validate_checks_a_migration_by_its_ledger(moving: Shell, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(DECLARED.format(folder=tmp_path))
    assert moving("run", "one.yaml").status == 0
    assert moving("validate", "one.yaml", "--json").document["status"] == "complete"
    store, collection = open_address(TARGET)
    store.delete(collection, batches.id_batch(["doc#00007"]))
    found = moving("validate", "one.yaml")
    assert found.status == 3
    assert "target count: expected 300, found 299" in found.out


# ── inspect, stores ──────────────────────────────────────────────────────────────────────────────────


def test_inspect_tells_what_a_collection_holds(moving: Shell) -> None:
    found = moving("inspect", SOURCE, "--json").document
    assert found["count"] == 300
    assert found["collection"]["vectors"][0]["dimensions"] == 8
    assert found["profile"]["fields"]["tag"] == {"text": 300}
    text = moving("inspect", SOURCE).out
    for expected in ("300", "dense float32 × 8, euclidean", "str 300", "half", "short-float 300"):
        assert expected in text


def test_inspect_of_a_store_lists_its_collections(moving: Shell) -> None:
    fill("chroma:chroma#one")
    found = moving("inspect", "chroma:chroma", "--json").document
    assert found["collections"] == [{"name": "one", "address": "chroma:chroma#one", "count": 300}]
    assert "chroma:chroma#one" in moving("inspect", "chroma:chroma").out


def test_stores_shows_a_table_and_one_store_whole(shell: Shell) -> None:
    text = shell("stores").out
    assert all(kind in text for kind in store_kinds())
    assert "max dimensions" in shell("stores", "pgvector").out


# ── every collection of a store ──────────────────────────────────────────────────────────────────────


def test_all_collections_of_a_store_arrive_under_their_names(shell: Shell) -> None:
    for name in ("a", "b"):
        fill(f"parquet:source#{name}")
    sides = ("--source", "parquet:source/", "--target", "parquet:target/")
    done = shell("run", *sides, "--all-collections", "--json", "--quiet")
    assert done.status == 0
    assert done.document["status"] == "complete"
    assert {name: one["status"] for name, one in done.document["collections"].items()} == {
        "a": "complete",
        "b": "complete",
    }
    for name in ("a", "b"):
        both = ("--source", f"parquet:source#{name}", "--target", f"parquet:target#{name}")
        assert shell("validate", *both).status == 0


def test_a_collection_that_fails_does_not_stop_the_others(shell: Shell) -> None:
    for name in ("a", "b"):
        fill(f"parquet:source#{name}")
    fill("parquet:target#a")
    sides = ("--source", "parquet:source/", "--target", "parquet:target/")
    done = shell("run", *sides, "--all-collections", "--json", "--quiet")
    assert done.status == 2
    assert done.document["status"] == "incomplete"
    assert done.document["collections"]["a"]["error"]["type"] == "TargetNotEmptyError"
    assert done.document["collections"]["b"]["status"] == "complete"


@pytest.mark.parametrize("sides", [("source/", "target#docs"), ("source#docs", "target/")])
def test_all_collections_go_from_a_whole_store_to_a_whole_store(shell: Shell, sides: tuple[str, str]) -> None:
    fill("parquet:source#docs")
    source, target = (f"parquet:{side}" for side in sides)
    done = shell("run", "--source", source, "--target", target, "--all-collections")
    assert done.status == 2
    assert "names a collection" in done.err
