"""One place for the guarantees of docs/guarantees.md: that each is tested, and those not tested elsewhere.

The numbers are those of the page, which names for each guarantee the tests that would fail without it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import migration_pipelines
from migration_pipelines.errors import LeaseHeldError
from migration_pipelines.extract import extract
from migration_pipelines.load import load
from migration_pipelines.migration import Event, Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.plan import make_plan
from migration_pipelines.store import Store, open_address
from migration_pipelines.transform import transform
from migration_pipelines_tests.harnesses.parquet import Parquet
from migration_pipelines_tests.records import by_id, from_batches, plain_records, plain_schema, to_batch

TESTS = Path(__file__).parent
PACKAGE = Path(migration_pipelines.__file__).parent
PAGE = TESTS.parent / "docs" / "guarantees.md"


def memory_migration(name: str, home: Path, **settings: object) -> Migration:
    """A migration of 300 records from one store in memory to another."""
    store, _ = open_address(f"memory:{name}-source")
    if "docs" not in store.list_collections():
        store.create(plain_schema("docs"))
        store.upsert("docs", to_batch(plain_records(300), plain_schema("docs")))
    config = MigrationConfig(
        source=store.address("docs"), target=f"memory:{name}-target#docs", partition_size=100, **settings
    )
    return Migration(config=config, ledger=ledger_for(config, home))


def test_every_guarantee_names_tests_that_exist() -> None:
    text = PAGE.read_text()
    sections = dict(re.findall(r"^## (G\d+)[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == [f"G{number}" for number in range(1, 17)]
    for number, section in sections.items():
        named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", section)
        assert named or "not built yet" in section, number
        for module, test in named:
            source = (TESTS / f"{module}.py").read_text()
            assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{number}: {module}.py::{test}"


def test_g2_the_plan_is_durable_before_anything_is_written(tmp_path: Path) -> None:
    migration = memory_migration("g2", tmp_path)
    plans: list[bool] = []

    def look(event: Event) -> None:
        if event.name in ("extracted", "prepared"):
            plans.append((migration.ledger.folder / "plan.json").exists())

    migration.listener = look
    run_migration(migration)
    assert plans
    assert all(plans)


def test_g8_a_partition_has_one_worker_and_a_stale_ones_late_write_is_harmless(tmp_path: Path) -> None:
    stale = memory_migration("g8", tmp_path)
    make_plan(stale)
    key = stale.pending()[0]
    with stale.ledger.partition_lease(key):
        extract(stale, key)
        transform(stale, key)
        with pytest.raises(LeaseHeldError), memory_migration("g8", tmp_path).ledger.partition_lease(key):
            pass
    late = list(stale.ledger.staged_batches(key, "extracted"))
    assert run_migration(memory_migration("g8", tmp_path)).status == "complete"
    target, _ = open_address("memory:g8-target")
    for batch in late:
        target.upsert("docs", batch)
    source, _ = open_address("memory:g8-source")
    assert target.count("docs") == source.count("docs") == 300
    assert run_migration(memory_migration("g8", tmp_path)).status == "complete"


def test_g8_workers_share_a_migration_but_nobody_plans_meanwhile(tmp_path: Path) -> None:
    migration = memory_migration("g8-shared", tmp_path)
    make_plan(migration)
    with migration.ledger.lease(shared=True), migration.ledger.lease(shared=True):
        load_one(migration)
        with pytest.raises(LeaseHeldError), migration.ledger.lease():
            pass


def load_one(migration: Migration) -> None:
    """Take the first partition as far as the target."""
    key = migration.pending()[0]
    extract(migration, key)
    transform(migration, key)
    load(migration, key)


PEAK = """
import sys
from pathlib import Path
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
sizes = {"partition_size": 5000, "batch_size": 1000, "workers": 2}
config = MigrationConfig(source=sys.argv[1], target=sys.argv[2], **sizes)
run_migration(Migration(config=config, ledger=ledger_for(config, Path(sys.argv[3]))))
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_g11_memory_does_not_grow_with_the_collection(tmp_path: Path) -> None:
    """Of 200 MB more that are moved, hardly anything stays: allocators alone differ by tens of megabytes."""
    peaks, moved = [], []
    for records in (60_000, 180_000):
        folder = tmp_path / str(records)
        folder.mkdir()
        with Parquet.start(folder) as harness:
            schema = plain_schema("docs", dimensions=384)
            harness.store.create(schema)
            batch = to_batch(plain_records(5_000, dimensions=384), schema)
            with harness.store.load_part("docs", "all") as write:
                for start in range(0, records, 5_000):
                    ids = pa.array([f"doc-{number}" for number in range(start, start + 5_000)])
                    write(batch.set_column(0, "id", ids))
            harness.store.finish_load("docs")
            addresses = [harness.store.address("docs"), harness.store.address("copy")]
            command = [sys.executable, "-c", PEAK, *addresses, str(folder / "home")]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
            assert harness.store.count("copy") == records
        peaks.append(int(done.stdout) * 1024)
        moved.append(batch.nbytes * records // 5_000)
    assert peaks[1] - peaks[0] < (moved[1] - moved[0]) / 3


def test_g13_nothing_in_the_engine_reads_the_wall_clock() -> None:
    """Durations come from the monotonic clock; no decision could be made from a date.

    Only stamps that are shown do: those of log lines, and of a result in Python.
    """
    shown = {"logs.py", "results.py"}
    wall = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today", "datetime.today"}
    engine = [*PACKAGE.glob("*.py"), *PACKAGE.glob("stores/*.py")]
    found = []
    for path in engine:
        for node in ast.walk(ast.parse(path.read_text())) if path.name not in shown else ():
            if isinstance(node, ast.Call) and ".".join(ast.unparse(node.func).split(".")[-2:]) in wall:
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_g14_a_drivers_own_text_is_not_behind_our_errors() -> None:
    """A traceback shows the exceptions behind an error; a driver's may repeat the login."""
    store, _ = open_address("pgvector://app@127.0.0.1:1/db/docs")
    with pytest.raises(Exception, match=r"127\.0\.0\.1") as caught:
        store.count("docs")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_no_code_is_loaded_from_data() -> None:
    """No pickle, no eval or exec, only YAML's safe loader, anywhere in the package."""
    banned = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in banned:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node.func)}")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{path.name}:{node.lineno}: {name}" for name in names if name in modules]
    assert found == []


def test_the_same_records_arrive_whoever_finishes(tmp_path: Path) -> None:
    """A migration begun phase by phase is finished by the engine in one go, over the same ledger."""
    migration = memory_migration("handover", tmp_path)
    make_plan(migration)
    load_one(migration)
    assert run_migration(memory_migration("handover", tmp_path)).status == "complete"
    source, target = (open_address(f"memory:handover-{side}")[0] for side in ("source", "target"))
    assert content(source) == content(target)


def content(store: Store) -> dict[tuple[str, str], Any]:
    """All records of a store's `docs`."""
    spans = list(store.split("docs", span_records=1_000))
    batches = [b for span, ids in spans for b in store.scan("docs", span, ids=ids, batch_records=500)]
    return by_id(from_batches(batches))
