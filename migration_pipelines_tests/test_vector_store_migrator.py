"""The Python interface: counts, errors and retries exactly right, whatever fails."""

from __future__ import annotations

import itertools
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from migration_pipelines import (
    CollectionNotFoundError,
    Event,
    MigrationError,
    MigrationProgress,
    ValidationError,
    VectorStoreMigrator,
    processes,
)
from migration_pipelines.compare import compare_collections
from migration_pipelines.errors import (
    ConfigurationError,
    LossNotAcceptedError,
    PlanChangedError,
    RecordRejectedError,
    StoreUnavailableError,
    TargetNotEmptyError,
    TransientError,
    UnsupportedOperationError,
)
from migration_pipelines.estimation import Rehearsal
from migration_pipelines.filters import parse
from migration_pipelines.metrics import MetricsExporter
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.schema_mapping import SchemaMapping
from migration_pipelines.store import Store, open_address
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.conformance import read_all
from migration_pipelines_tests.records import (
    Record,
    by_id,
    plain_records,
    plain_schema,
    to_batch,
)
from migration_pipelines_tests.shell import Shell, shell

__all__ = ["shell"]

_names = (f"migrator{number}" for number in itertools.count())
FAULTS: dict[str, Callable[..., Any]] = {}


class FaultyStore(MemoryStore):
    """A store in memory that does, before each operation, as the test says."""

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        FAULTS.get("upsert", lambda batch: None)(batch)
        super().upsert(collection, batch)

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        found = super().fetch(collection, ids, vectors=vectors)
        return FAULTS.get("fetch", lambda found: found)(found)

    def scan(self, collection: str, span: Any, **how: Any) -> Iterator[pa.RecordBatch]:
        for batch in super().scan(collection, span, **how):
            if how.get("vectors", True):
                FAULTS.get("scan", lambda batch: None)(batch)
            yield batch


class ReadOnlyStore(MemoryStore):
    """A store in memory on which every write is a mistake of ours."""

    def _written(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the target was written")

    create = drop = upsert = delete = begin_load = finish_load = load_part = set_alias = _written


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ledgers in a folder of the test's own; no fault outlives its test."""
    monkeypatch.setenv("VECTOR_MIGRATE_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    FAULTS.clear()


def new_store(kind: type[MemoryStore] = FaultyStore) -> Any:
    return kind(name=next(_names))


def put(store: Store, collection: str, records: list[Record]) -> None:
    """Create a collection where it isn't there, and write records into it."""
    schema = plain_schema(collection)
    if collection not in store.list_collections():
        store.create(schema)
    store.upsert(collection, to_batch(records, schema))


def content(store: Store, collection: str) -> Any:
    return by_id(read_all(store, collection))


@pytest.fixture
def source() -> Any:
    """A store with 1,000 records in `docs`."""
    store = MemoryStore(name=next(_names))
    put(store, "docs", plain_records(1_000))
    return FaultyStore(name=store.name)


def migrator(source: Store, target: Store, **settings: Any) -> VectorStoreMigrator:
    return VectorStoreMigrator(source, target, **{"retry_delay": 0.001, **settings})


# ── what arrives ─────────────────────────────────────────────────────────────────────────────────────


def test_a_collection_arrives_and_the_result_tells_it(source: Any) -> None:
    target = new_store()
    result = migrator(source, target).migrate("docs", "copy", batch_size=100, chunk_size=250)
    assert result.success
    assert (result.vectors_migrated, result.vectors_failed, result.total_vectors) == (1_000, 0, 1_000)
    assert result.success_rate == 1.0
    assert (result.source_collection, result.target_collection) == ("docs", "copy")
    assert result.errors == []
    assert result.metadata["validated"]
    assert result.metadata["partitions"] == 4
    assert result.metadata["report"]["status"] == "complete"
    took = (result.completed_at - result.started_at).total_seconds()
    assert 0 < result.duration_seconds == pytest.approx(took, abs=1e-5)
    assert content(target, "copy") == content(source, "docs")


def test_addresses_name_stores_and_default_collections(source: Any) -> None:
    target = f"memory:{next(_names)}"
    result = VectorStoreMigrator(source.address("docs"), f"{target}#copy").migrate()
    assert (result.source_collection, result.target_collection) == ("docs", "copy")
    assert VectorStoreMigrator(source, target).migrate("docs").target_collection == "docs"
    with pytest.raises(ConfigurationError, match="there are: docs"):
        VectorStoreMigrator(source, target).migrate()


def test_a_filter_leaves_the_others_out(source: Any) -> None:
    result = migrator(source, target := new_store()).migrate("docs", filter={"n": {"$lt": 10}})
    assert result.success
    assert result.vectors_migrated == target.count("docs") == 10


@pytest.mark.parametrize("workers", [None, 3])
def test_partitions_are_moved_side_by_side(source: Any, workers: int | None) -> None:
    target = new_store()
    done = migrator(source, target).migrate("docs", parallel=True, max_workers=workers, chunk_size=50)
    assert done.success
    assert content(target, "docs") == content(source, "docs")


# ── what fails ───────────────────────────────────────────────────────────────────────────────────────


def test_one_record_in_ten_thousand_fails_alone_and_is_named() -> None:
    source, target = new_store(), new_store()
    put(source, "docs", plain_records(10_000))

    def refuse(batch: pa.RecordBatch) -> None:
        if "doc#07777" in batch.column("id").to_pylist():
            raise RecordRejectedError("the store can't hold this one")

    FAULTS["upsert"] = refuse
    result = migrator(source, target).migrate("docs", "copy")
    assert not result.success
    assert (result.vectors_migrated, result.vectors_failed) == (9_999, 1)
    assert result.success_rate == 0.9999
    assert result.errors == ["doc#07777: the store can't hold this one"]
    assert result.metadata["validated"]  # all that arrived is right, and the one is accounted for
    assert target.count("copy") == 9_999


def test_one_batch_in_ten_fails_and_is_retried_exactly_as_often_as_it_takes(source: Any) -> None:
    calls = itertools.count(1)

    def fail(batch: pa.RecordBatch) -> None:
        if next(calls) % 10 == 0:
            raise TransientError("busy")

    FAULTS["upsert"] = fail
    result = migrator(source, target := new_store()).migrate("docs", batch_size=20)
    assert result.success
    assert content(target, "docs") == content(source, "docs")
    # 50 batches: each tenth call fails, and is one more call.
    assert next(calls) - 1 == 55


def test_a_batch_that_always_fails_is_tried_as_often_as_was_said_and_fails_its_part_alone(
    source: Any,
) -> None:
    calls: list[str] = []

    def fail(batch: pa.RecordBatch) -> None:
        if "doc#00500" in batch.column("id").to_pylist():
            calls.append("tried")
            raise TransientError("busy")

    FAULTS["upsert"] = fail
    result = migrator(source, new_store(), max_retries=2).migrate("docs", batch_size=50, chunk_size=100)
    assert len(calls) == 3
    assert not result.success
    assert not result.metadata["validated"]
    assert (result.vectors_migrated, result.vectors_failed) == (900, 100)
    assert len(result.errors) == 1
    assert "busy" in result.errors[0]


def test_a_source_that_fails_in_passing_is_read_again(source: Any) -> None:
    faults = iter([True, True])

    def fail(batch: pa.RecordBatch) -> None:
        if next(faults, False):
            raise TransientError("cut off")

    target = new_store()
    result = migrator(source, target, metrics_exporter=FaultsAfterThePlan("scan", fail)).migrate("docs")
    assert result.success
    assert list(faults) == []
    assert content(target, "docs") == content(source, "docs")


class FaultsAfterThePlan:
    """Lets the faults begin when there is a plan: its sample is read without retries."""

    def __init__(self, operation: str, fault: Callable[..., None]) -> None:
        self.operation, self.fault = operation, fault

    def listen(self, event: Event) -> None:
        if event.name == "planned":
            FAULTS[self.operation] = self.fault


@pytest.mark.parametrize("side", ["scan", "upsert"])
def test_a_store_that_is_gone_raises_after_the_retries(source: Any, side: str) -> None:
    calls: list[str] = []

    def gone(batch: pa.RecordBatch) -> None:
        calls.append(side)
        raise StoreUnavailableError("nothing answers")

    late = FaultsAfterThePlan(side, gone)
    with pytest.raises(MigrationError, match="nothing answers"):
        migrator(source, new_store(), max_retries=1, metrics_exporter=late).migrate("docs")
    assert len(calls) == 2


def test_the_waits_are_those_of_the_delay_and_the_backoff(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)

    def fail(batch: pa.RecordBatch) -> None:
        if len(waits) < 3:
            raise TransientError("busy")

    FAULTS["upsert"] = fail
    found = VectorStoreMigrator(source, new_store(), retry_delay=2, retry_backoff=3).migrate("docs")
    assert found.success
    for wait, least in zip(waits, (2, 6, 18), strict=True):
        assert least <= wait <= least * 1.25  # up to a quarter of jitter
    assert VectorStoreMigrator(source, source)._retry == RetryPolicy(attempts=4)


def alter(found: pa.RecordBatch) -> pa.RecordBatch:
    """Every document read back is another than was written."""
    at = found.schema.get_field_index("document")
    return found.set_column(at, "document", pa.array(["altered"] * found.num_rows, pa.string()))


def test_a_difference_raises_and_the_error_holds_the_result(source: Any) -> None:
    target = new_store()

    class AlteredStore(FaultyStore):
        def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
            return alter(super().fetch(collection, ids, vectors=vectors))

    altered = AlteredStore(name=target.name)
    with pytest.raises(ValidationError, match="differs from") as caught:
        migrator(source, altered).migrate("docs")
    result = caught.value.facts["result"]
    assert not result.success
    assert (result.vectors_migrated, result.vectors_failed) == (0, 1_000)
    silent = migrator(source, altered, validate=False).migrate("docs")
    assert not silent.success
    assert not silent.metadata["validated"]
    assert "1000 records differ" in silent.errors[0]


def test_a_collection_that_is_not_there_is_a_usage_error(source: Any) -> None:
    with pytest.raises(CollectionNotFoundError):
        migrator(source, new_store()).migrate("nothing")


@pytest.mark.parametrize(
    "asked",
    [
        {"on_conflict": "merge"},
        {"batch_size": 0},
        {"worker_type": "fibre"},
        {"chunk_size": 0},
        {"schema_mapping": {"a": "b"}},
        {"schema_mapping": {"transforms": {"n": math.sqrt}}, "worker_type": "process"},
    ],
)
def test_settings_that_mean_nothing_are_refused(source: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        migrator(source, new_store(ReadOnlyStore)).migrate("docs", **asked)


def test_a_schema_mapping_is_applied_on_the_way(source: Any) -> None:
    target = new_store()
    rules = {"field_mapping": {"n": "number"}, "exclude_fields": ["half"]}
    result = migrator(source, target).migrate("docs", schema_mapping=rules)
    assert (result.success, result.vectors_migrated) == (True, 1_000)
    assert compare_collections(source, "docs", target, "docs", mapping=SchemaMapping(**rules)).agrees


def test_numbers_of_retries_that_mean_nothing_are_refused(source: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_retries"):
        VectorStoreMigrator(source, source, max_retries=-1)


# ── what the target holds already ────────────────────────────────────────────────────────────────────


def test_overwrite_replaces_what_is_there_and_leaves_the_others(source: Any) -> None:
    target = new_store()
    put(target, "docs", plain_records(20, seed=9, start=990))
    assert migrator(source, target).migrate("docs").success
    assert target.count("docs") == 1_010
    theirs, ours = content(target, "docs"), content(source, "docs")
    assert all(theirs[key] == record for key, record in ours.items())


def test_skip_leaves_what_is_there_and_counts_it(source: Any) -> None:
    target = new_store()
    put(target, "docs", before := plain_records(20, seed=9, start=990))
    result = migrator(source, target).migrate("docs", on_conflict="skip", chunk_size=300)
    assert result.success
    assert (result.vectors_migrated, result.vectors_failed, result.metadata["skipped"]) == (990, 0, 10)
    theirs = content(target, "docs")
    assert len(theirs) == 1_010
    assert all(theirs[key] == record for key, record in by_id(before).items())


def test_skip_tells_its_own_records_from_those_that_were_there_when_it_resumes(source: Any) -> None:
    target = new_store()
    put(target, "docs", plain_records(10, seed=9))
    calls = itertools.count(1)

    def fail(batch: pa.RecordBatch) -> None:
        if next(calls) == 3:  # in the middle of a part, some of which is written
            raise StoreUnavailableError("gone")

    FAULTS["upsert"] = fail
    by = {"on_conflict": "skip", "batch_size": 100, "chunk_size": 500}
    with pytest.raises(StoreUnavailableError):
        migrator(source, target, max_retries=0).migrate("docs", **by)
    assert target.count("docs") == 200
    result = migrator(source, target).migrate("docs", resume=True, **by)
    assert result.success
    assert (result.vectors_migrated, result.metadata["skipped"]) == (990, 10)


def test_fail_refuses_ids_that_are_taken_before_anything_is_written(source: Any) -> None:
    target = new_store()
    put(target, "docs", plain_records(1, start=999))
    with pytest.raises(TargetNotEmptyError, match="1 of the ids in scope \\('doc#00999'\\)"):
        migrator(source, ReadOnlyStore(name=target.name)).migrate("docs", on_conflict="fail")
    assert target.count("docs") == 1


def test_fail_takes_a_target_whose_ids_are_others(source: Any) -> None:
    target = new_store()
    put(target, "docs", plain_records(5, start=5_000))
    assert migrator(source, target).migrate("docs", on_conflict="fail").success
    assert target.count("docs") == 1_005
    half = {"filter": {"n": {"$lt": 0}}, "on_conflict": "fail"}
    assert migrator(source, target).migrate("docs", **half).vectors_migrated == 0


def test_ids_that_the_target_writes_otherwise_are_found_there(source: Any, tmp_path: Path) -> None:
    """Qdrant holds text ids as UUIDs made from them."""
    by = VectorStoreMigrator(source, f"qdrant:{tmp_path / 'folder'}")
    assert by.migrate("docs", filter={"n": {"$lt": 10}}).vectors_migrated == 10
    taken = by.migrate("docs", filter={"n": {"$lt": 20}}, on_conflict="fail", dry_run=True)
    assert "10 of the ids in scope" in taken.errors[0]
    result = by.migrate("docs", filter={"n": {"$lt": 20}}, on_conflict="skip")
    assert result.success
    assert (result.vectors_migrated, result.metadata["skipped"]) == (10, 10)


def test_the_command_line_skips_and_adds_as_well(shell: Shell, tmp_path: Path) -> None:
    source, _ = open_address("parquet:./from/")
    put(source, "docs", plain_records(20))
    source.finish_load("docs")
    target, _ = open_address("chroma:./to")
    put(target, "docs", plain_records(5, seed=9))
    target.close()
    move = ("run", "--source", "parquet:./from/#docs", "--target", "chroma:./to#docs", "--json", "--quiet")
    refused = shell(*move, "--on-existing", "add")
    assert refused.status == 2
    assert "5 of the ids in scope" in refused.everything
    done = shell(*move, "--on-existing", "skip")
    assert done.status == 0
    assert (done.document["records"]["skipped"], done.document["records"]["verified"]) == (5, 15)


# ── dry run ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_dry_run_writes_nothing_and_counts_what_is_in_scope(source: Any, home: Path) -> None:
    target = new_store(ReadOnlyStore)
    result = migrator(source, target).migrate("docs", dry_run=True, filter={"even": True})
    assert result.success
    assert (result.vectors_migrated, result.vectors_failed) == (0, 0)
    assert result.metadata["dry_run"]
    assert result.metadata["in_scope"] == 500
    assert result.metadata["report"] is None
    assert not result.metadata["validated"]
    assert target.list_collections() == []
    assert not home.exists()


@pytest.mark.parametrize("kind", ["chroma", "qdrant", "parquet"])
def test_a_dry_run_makes_no_folder(source: Any, kind: str, tmp_path: Path) -> None:
    result = VectorStoreMigrator(source, f"{kind}:{tmp_path / 'new'}/").migrate("docs", dry_run=True)
    assert result.metadata["in_scope"] == 1_000
    assert not (tmp_path / "new").exists()


def test_a_dry_run_tells_what_stands_in_the_way(source: Any) -> None:
    target = new_store()
    put(target, "docs", plain_records(3))
    taken = migrator(source, target).migrate("docs", dry_run=True, on_conflict="fail")
    assert not taken.success
    assert "3 of the ids in scope" in taken.errors[0]
    target.create(plain_schema("narrow", dimensions=3))
    narrow = migrator(source, target).migrate("docs", "narrow", dry_run=True)
    assert not narrow.success
    assert "3 dimensions" in narrow.errors[0]


def test_a_loss_is_told_by_the_dry_run_and_refused_by_the_run_until_it_is_named(tmp_path: Path) -> None:
    source = new_store()
    put(source, "docs", plain_records(10))
    by = VectorStoreMigrator(source.address(), f"faiss:{tmp_path / 'f'}")
    dry = by.migrate("docs", dry_run=True)
    losses = sorted({loss["kind"] for loss in dry.metadata["losses"] if not loss["accepted"]})
    if not losses:
        assert by.migrate("docs").success
        return
    assert not dry.success
    with pytest.raises(LossNotAcceptedError):
        by.migrate("docs")
    assert by.migrate("docs", allow_losses=losses).success


# ── resume, checkpoints ──────────────────────────────────────────────────────────────────────────────


def interrupted(source: Any, target: Any, **how: Any) -> None:
    """Run a migration of ten parts whose target is gone at the sixth."""
    calls = itertools.count(1)

    def fail(batch: pa.RecordBatch) -> None:
        if next(calls) == 6:
            raise StoreUnavailableError("gone")

    FAULTS["upsert"] = fail
    with pytest.raises(StoreUnavailableError):
        migrator(source, target, max_retries=0).migrate("docs", chunk_size=100, **how)


def test_resume_goes_on_where_it_was_and_a_fresh_start_does_not(source: Any) -> None:
    target, written = new_store(), []
    interrupted(source, target)
    FAULTS["upsert"] = lambda batch: written.append(batch.num_rows)
    result = migrator(source, target).migrate("docs", chunk_size=100, resume=True)
    assert result.success
    assert (sum(written), result.vectors_migrated) == (500, 1_000)
    written.clear()
    assert migrator(source, target).migrate("docs", chunk_size=100).vectors_migrated == sum(written) == 1_000


def test_resume_with_other_settings_is_refused(source: Any) -> None:
    target = new_store()
    interrupted(source, target)
    with pytest.raises(PlanChangedError, match="filter"):
        migrator(source, target).migrate("docs", chunk_size=100, resume=True, filter={"n": 1})


def test_resume_with_nothing_to_go_on_with_starts(source: Any) -> None:
    assert migrator(source, new_store()).migrate("docs", resume=True).vectors_migrated == 1_000


def test_a_checkpoint_file_names_the_ledger_beside_it(source: Any, tmp_path: Path, home: Path) -> None:
    target, file = new_store(), tmp_path / "nightly.json"
    interrupted(source, target, checkpoint_file=file)
    assert json.loads(file.read_bytes())["ledger"] == "nightly.json.ledger"
    assert (tmp_path / "nightly.json.ledger" / "plan.json").exists()
    assert not home.exists()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (file, tmp_path / "nightly.json.ledger"):
        path.rename(moved / path.name)
    written: list[int] = []
    FAULTS["upsert"] = lambda batch: written.append(batch.num_rows)
    result = migrator(source, target).migrate(
        "docs", chunk_size=100, resume=True, checkpoint_file=moved / "nightly.json"
    )
    assert result.success
    assert sum(written) == 500


def test_another_process_resumes_by_the_checkpoint_file(tmp_path: Path) -> None:
    store, _ = open_address(f"parquet:{tmp_path / 'there'}/")
    for start in (0, 100, 200):
        put(store, "docs", plain_records(100, start=start))
    store.finish_load("docs")
    file, target = tmp_path / "job.json", f"chroma:{tmp_path / 'here'}"
    script = (
        "import sys, os\n"
        "from migration_pipelines import VectorStoreMigrator\n"
        "def stop(progress):\n"
        "    if progress.vectors_processed >= 150:\n"
        "        os._exit(9)\n"
        f"VectorStoreMigrator({store.address()!r}, {target!r}, on_progress=stop).migrate(\n"
        f"    'docs', chunk_size=100, batch_size=50, checkpoint_file={str(file)!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=120)
    assert killed.returncode == 9, killed.stderr
    seen: list[MigrationProgress] = []
    result = VectorStoreMigrator(store, target, on_progress=seen.append).migrate(
        "docs", chunk_size=100, batch_size=50, resume=True, checkpoint_file=file
    )
    assert result.success
    assert result.vectors_migrated == 300
    assert seen[-1].current_batch == 4  # of six: what the first process had verified was not loaded again


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 2, "ledger": "x"}', '{"version": 1, "ledger": "../x"}']
)
def test_a_file_that_is_no_checkpoint_is_refused(source: Any, tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes.json"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match="no checkpoint"):
        migrator(source, new_store()).migrate("docs", resume=True, checkpoint_file=file)


# ── processes ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def files(tmp_path: Path) -> Store:
    """A store of files with 400 records in four parts of `docs`."""
    store, _ = open_address(f"parquet:{tmp_path / 'from'}/")
    for start in range(0, 400, 100):
        put(store, "docs", plain_records(100, start=start))
    store.finish_load("docs")
    return store


IN_PROCESSES: dict[str, Any] = {"parallel": True, "max_workers": 2, "worker_type": "process"}


def test_processes_move_what_threads_move(files: Store, tmp_path: Path) -> None:
    seen: list[MigrationProgress] = []
    by = VectorStoreMigrator(files, f"parquet:{tmp_path / 'to'}/", on_progress=seen.append)
    result = by.migrate("docs", chunk_size=100, filter={"n": {"$gte": 50}}, **IN_PROCESSES)
    assert result.success
    assert result.vectors_migrated == 350
    assert by.verify("docs", filter={"n": {"$gte": 50}}).agrees
    assert [progress.vectors_processed for progress in seen] == sorted(p.vectors_processed for p in seen)
    assert seen[0].vectors_processed < 350 == seen[-1].vectors_processed


def test_processes_apply_a_schema_mapping(files: Store, tmp_path: Path) -> None:
    by = VectorStoreMigrator(files, f"parquet:{tmp_path / 'to'}/")
    rules = {"field_mapping": {"n": "number"}}
    assert by.migrate("docs", chunk_size=100, schema_mapping=rules, **IN_PROCESSES).success
    assert by.target.count("docs", parse({"number": {"$gte": 0}})) == 400


def test_a_process_that_dies_fails_its_partition_alone(
    files: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    start = processes._start

    def start_one_that_dies(migration: Any) -> Any:
        process = start(migration)
        started.append(process)
        if len(started) == 1:
            process.kill()
            process.wait()
        return process

    monkeypatch.setattr(processes, "_start", start_one_that_dies)
    by = VectorStoreMigrator(files, f"parquet:{tmp_path / 'to'}/")
    result = by.migrate("docs", chunk_size=100, **IN_PROCESSES)
    assert not result.success
    assert (result.vectors_migrated, result.vectors_failed) == (300, 100)
    assert "died" in result.errors[0]
    assert by.migrate("docs", chunk_size=100, resume=True, **IN_PROCESSES).success
    assert all(process.poll() is not None for process in started)


def test_an_error_of_a_process_is_the_same_as_one_of_a_thread() -> None:
    told = processes._told(CollectionNotFoundError("no such", collection="docs"))
    found = processes._error(json.loads(json.dumps(told)))
    assert type(found) is CollectionNotFoundError
    assert (str(found), found.facts) == ("no such", {"collection": "docs"})


def test_stores_that_another_process_cannot_open_are_refused(
    files: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="lies in this process"):
        VectorStoreMigrator(files, new_store()).migrate("docs", **IN_PROCESSES)
    with pytest.raises(ConfigurationError, match="one process at a time"):
        VectorStoreMigrator(files, f"chroma:{tmp_path / 'c'}").migrate("docs", **IN_PROCESSES)
    monkeypatch.setenv("PGVECTOR_PASSWORD", "hidden")
    secret, _ = open_address("pgvector://app@localhost:5432/vectors")
    monkeypatch.delenv("PGVECTOR_PASSWORD")
    with pytest.raises(ConfigurationError, match="into the environment") as caught:
        VectorStoreMigrator(files, secret).migrate("docs", **IN_PROCESSES)
    assert "hidden" not in str(caught.value)


# ── progress, metrics ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [1, 4])
def test_progress_never_falls_and_ends_at_a_hundred(source: Any, workers: int) -> None:
    seen: list[MigrationProgress] = []
    by = migrator(source, new_store(), on_progress=seen.append)
    by.migrate("docs", batch_size=30, chunk_size=100, parallel=True, max_workers=workers)
    shares = [progress.percentage for progress in seen]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 10
    assert shares[-1] == 100.0
    assert seen[-1].eta_seconds == 0.0
    assert seen[-1].current_batch == seen[-1].total_batches == 40  # 30 + 30 + 30 + 10 in each of ten parts
    assert seen[0].total_vectors == 1_000
    assert all(progress.current_batch <= progress.total_batches for progress in seen)
    assert all(progress.errors == 0 for progress in seen)


def test_progress_counts_what_is_loaded_twice_once_and_what_fails_as_errors(source: Any) -> None:
    seen: list[MigrationProgress] = []

    def refuse(batch: pa.RecordBatch) -> None:
        if "doc#00007" in batch.column("id").to_pylist():
            raise RecordRejectedError("no")

    FAULTS["upsert"] = refuse
    migrator(source, new_store(), on_progress=seen.append).migrate("docs", chunk_size=200, batch_size=50)
    assert seen[-1].vectors_processed == 1_000
    assert seen[-1].errors == 1


def test_progress_of_a_resumed_migration_starts_where_it_was(source: Any) -> None:
    target, seen = new_store(), list[MigrationProgress]()
    interrupted(source, target)
    FAULTS.clear()
    migrator(source, target, on_progress=seen.append).migrate("docs", chunk_size=100, resume=True)
    assert seen[0].vectors_processed == 600
    assert seen[-1].percentage == 100.0


def test_a_callback_that_raises_is_logged_once_and_hurts_nothing(
    source: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(progress: MigrationProgress) -> None:
        raise RuntimeError("no terminal")

    heard: list[str] = []

    class Exporter:
        def listen(self, event: Event) -> None:
            heard.append(event.name)

    with caplog.at_level(logging.WARNING):
        by = migrator(source, new_store(), on_progress=fail, metrics_exporter=Exporter())
        result = by.migrate("docs", chunk_size=100)
    assert result.success
    assert len([record for record in caplog.records if "no terminal" in record.getMessage()]) == 1
    assert heard.count("verified") == 10  # the other listener hears all of it
    assert {"planned", "prepared", "published", "validated"} <= set(heard)


def test_the_metrics_of_prometheus_hear_of_a_migration(source: Any, tmp_path: Path) -> None:
    with MetricsExporter(textfile=tmp_path / "migration.prom") as exporter:
        migrator(source, new_store(), metrics_exporter=exporter).migrate("docs")
    written = (tmp_path / "migration.prom").read_text()
    assert 'migration_vectors_total{phase="verify"} 1000.0' in written


# ── estimate, verify, quality ────────────────────────────────────────────────────────────────────────


def test_an_estimate_is_near_what_it_takes_and_leaves_nothing(tmp_path: Path) -> None:
    source, _ = open_address(f"parquet:{tmp_path / 'from'}/")
    put(source, "docs", plain_records(20_000))
    source.finish_load("docs")
    target, _ = open_address(f"parquet:{tmp_path / 'to'}/")
    by = VectorStoreMigrator(source, target)
    found = by.estimate("docs", price_per_gb=0.09)
    assert target.list_collections() == []
    assert (found.total_vectors, found.estimated_batches) == (20_000, 20)
    assert (found.source_dimension, found.target_dimension, found.compatible) == (8, 8, True)
    assert found.warnings == []
    assert found.egress_cost == pytest.approx(found.bytes_to_move / 1e9 * 0.09)
    assert 0.8 < found.target_bytes / found.bytes_to_move < 1.25
    assert found.vectors_per_second == pytest.approx(20_000 / found.estimated_duration_seconds)
    took = by.migrate("docs").duration_seconds
    assert took / 4 < found.estimated_duration_seconds < took * 4


@pytest.mark.parametrize(
    ("smaller", "sample", "whole"),
    [
        ((0.13, 0.14, 1.44, 0.04), (0.46, 0.41, 5.09, 0.11), (3.93, 3.52, 70.38, 0.38)),
        ((0.41, 2.26, 0.0, 0.02), (1.47, 12.93, 0.0, 0.02), (13.35, 178.65, 0.01, 0.02)),
        ((0.09, 0.04, 0.66, 0.0), (0.41, 0.09, 2.42, 0.0), (2.74, 0.77, 42.7, 0.0)),
    ],
    ids=["pgvector", "chroma", "faiss"],
)
def test_an_estimate_knows_how_graphs_grow(
    smaller: tuple[float, ...], sample: tuple[float, ...], whole: tuple[float, ...]
) -> None:
    """As 3,125, 12,500 and 100,000 vectors of 384 dimensions were measured: rest, load, build, fixed."""
    small, found, real = (
        Rehearsal(
            records=records,
            written_bytes=0,
            other_seconds=parts[0],
            load_seconds=parts[1],
            build_seconds=parts[2],
            fixed_seconds=parts[3],
        )
        for records, parts in ((3_125, smaller), (12_500, sample), (100_000, whole))
    )
    assert 0.7 < found.beside(small).seconds(100_000) / real.seconds(100_000) < 1.3


def test_an_estimate_without_a_sample_writes_nothing(source: Any) -> None:
    found = migrator(source, new_store(ReadOnlyStore)).estimate("docs", write_sample=False, batch_size=300)
    assert found.estimated_duration_seconds > 0
    assert found.estimated_batches == 4
    assert found.egress_cost is None


def test_an_estimate_whose_sample_is_refused_says_so_and_leaves_nothing(source: Any) -> None:
    target = new_store()

    def refuse(batch: pa.RecordBatch) -> None:
        raise StoreUnavailableError("down for repairs")

    FAULTS["upsert"] = refuse
    found = migrator(source, target, max_retries=0).estimate("docs")
    assert "down for repairs" in found.warnings[-1]
    assert target.list_collections() == []


def test_an_estimate_tells_what_does_not_fit(source: Any) -> None:
    target = new_store()
    target.create(plain_schema("docs", dimensions=3))
    found = migrator(source, target).estimate("docs")
    assert not found.compatible
    assert found.total_vectors == 1_000
    assert found.source_dimension == 8
    assert "3 dimensions" in found.warnings[0]


def test_verify_tells_missing_extra_and_different_records(source: Any) -> None:
    target = new_store()
    by = migrator(source, target)
    by.migrate("docs")
    assert by.verify("docs").agrees
    target.delete("docs", to_batch(plain_records(2), plain_schema("docs")).select(["id", "id_type"]))
    put(target, "docs", plain_records(3, seed=5, start=999))
    found = by.verify("docs")
    assert (found.missing, found.extra, found.different, found.agrees) == (2, 2, 1, False)
    assert by.verify("docs", filter={"n": {"$lt": 900, "$gt": 5}}).agrees


def test_a_quality_report_says_what_became_of_the_records(source: Any) -> None:
    target = new_store()
    by = migrator(source, target)
    by.migrate("docs")
    assert by.quality_report("docs").success
    spoilt = [
        Record(id=record.id, vectors=record.vectors, document=record.document, metadata={"n": "a text"})
        for record in plain_records(100)
    ]
    put(target, "docs", spoilt)
    assert not by.quality_report("docs", sample_size=2_000).success


# ── namespaces ───────────────────────────────────────────────────────────────────────────────────────


def test_one_namespace_is_moved_into_another(tmp_path: Path) -> None:
    source, _ = open_address(f"parquet:{tmp_path / 'from'}/")
    schema = plain_schema("docs").model_copy(update={"has_namespaces": True})
    source.create(schema)
    records = [
        Record(id=f"r{n}", vectors=record.vectors, document=record.document, namespace=name)
        for name in ("eu", "us")
        for n, record in enumerate(plain_records(10, seed=len(name)))
    ]
    source.upsert("docs", to_batch(records, schema))
    source.finish_load("docs")
    target, _ = open_address(f"parquet:{tmp_path / 'to'}/")
    by = VectorStoreMigrator(source, target)
    spaces = {"source_namespace": "eu", "target_namespace": "archive"}
    result = by.migrate("docs", **spaces)
    assert result.success
    assert result.vectors_migrated == 10
    assert by.verify("docs", **spaces).agrees
    assert {space for _, _, space in content(target, "docs")} == {"archive"}
    assert by.verify("docs").missing == 20
    with pytest.raises(UnsupportedOperationError, match="one namespace at a time"):
        VectorStoreMigrator("memory:a", target).migrate("docs", source_namespace="eu")
