"""The engine from plan to report, on stores in memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from migration_pipelines.compare import compare_collections
from migration_pipelines.envelope import decode
from migration_pipelines.errors import (
    ConfigurationError,
    LeaseHeldError,
    PlanChangedError,
    RecordRejectedError,
    SourceChangedError,
    StoreUnavailableError,
    TargetNotEmptyError,
    TransientError,
)
from migration_pipelines.migration import Event, Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import CollectionSchema
from migration_pipelines.plan import make_plan
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.store import open_address
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines.validate import require_complete
from migration_pipelines_tests.records import (
    Record,
    by_id,
    from_batches,
    plain_records,
    plain_schema,
    to_batch,
)

_names = (f"engine{number}" for number in itertools.count())
QUICK = RetryPolicy(delay_seconds=0.001)


@pytest.fixture
def source() -> MemoryStore:
    """A store that holds 1,000 records in `docs`."""
    store, _ = open_address(f"memory:{next(_names)}")
    assert isinstance(store, MemoryStore)
    store.create(plain_schema("docs"))
    store.upsert("docs", to_batch(plain_records(1_000), plain_schema("docs")))
    return store


@pytest.fixture
def target() -> MemoryStore:
    """An empty store."""
    store, _ = open_address(f"memory:{next(_names)}")
    assert isinstance(store, MemoryStore)
    return store


@pytest.fixture
def prepared(source: MemoryStore, target: MemoryStore, tmp_path: Path) -> Callable[..., Migration]:
    """Make a migration from source to target; keyword arguments are settings, or stores to put in."""

    def make(listener: Callable[[Event], None] = lambda event: None, **settings: Any) -> Migration:
        stores = {name: settings.pop(name, None) for name in ("source_store", "target_store")}
        config = MigrationConfig(
            source=source.address("docs"),
            target=target.address("copy"),
            **{"partition_size": 100, "batch_size": 30, "retry": QUICK, **settings},
        )
        return Migration(config=config, ledger=ledger_for(config, tmp_path), listener=listener, **stores)

    return make


def content(store: MemoryStore, collection: str) -> dict[tuple[str, str], Any]:
    batches: list[pa.RecordBatch] = []
    for span, ids in store.split(collection, span_records=10_000):
        batches += store.scan(collection, span, ids=ids, batch_records=10_000)
    return by_id(from_batches(batches))


class FaultyStore(MemoryStore):
    """A store in memory that does as it is told by the test; shares the registry of what it stands for."""

    def _fault(self, operation: str, batch: pa.RecordBatch | None) -> None:
        FAULTS.get(operation, lambda batch: None)(batch)

    def describe(self, collection: str) -> CollectionSchema:
        self._fault("describe", None)
        return super().describe(collection)

    def split(self, collection: str, **how: Any) -> Iterator[Any]:
        for span in super().split(collection, **how):
            self._fault("split", None)
            yield span

    def create(self, schema: CollectionSchema) -> None:
        self._fault("create", None)
        super().create(schema)

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        self._fault("upsert", batch)
        super().upsert(collection, batch)

    def fetch(self, collection: str, ids: pa.RecordBatch, *, vectors: bool = True) -> pa.RecordBatch:
        found = super().fetch(collection, ids, vectors=vectors)
        change = FAULTS.get("fetch")
        return change(found) if change else found

    def scan(self, collection: str, span: Any, **how: Any) -> Iterator[pa.RecordBatch]:
        for batch in super().scan(collection, span, **how):
            self._fault("scan", batch)
            yield batch


FAULTS: dict[str, Callable[[Any], Any]] = {}


@pytest.fixture
def faults() -> Iterator[dict[str, Callable[[Any], Any]]]:
    yield FAULTS
    FAULTS.clear()


def faulty(store: MemoryStore) -> FaultyStore:
    return FaultyStore(**store.model_dump())


def test_everything_arrives_and_the_report_says_so(prepared, source, target):
    report = run_migration(prepared())
    assert report.status == "complete"
    assert report.exit_status == 0
    assert report.records == {
        "read": 1_000, "filtered": 0, "loaded": 1_000, "rejected": 0, "verified": 1_000, "different": 0
    }  # fmt: skip
    assert report.partitions == {"total": 10, "verified": 10, "failed": 0}
    assert report.source["count"] == report.target["count"] == 1_000
    assert content(target, "copy") == content(source, "docs")
    both = compare_collections(source, "docs", target, "copy")
    assert both.agrees
    assert both.source.digest == both.target.digest == report.digest


def test_a_filter_moves_what_it_matches_and_nothing_else(prepared, target):
    report = run_migration(prepared(filter={"n": {"$lt": 250}, "even": True}))
    assert report.status == "complete"
    assert {key[1] for key in content(target, "copy")} == {f"doc#{n:05d}" for n in range(0, 250, 2)}


def test_a_second_run_writes_nothing(prepared, faults, target):
    run_migration(prepared())
    faults["upsert"] = lambda batch: pytest.fail("wrote again")
    report = run_migration(prepared(target_store=faulty(target)))
    assert report.status == "complete"


@pytest.mark.parametrize(
    "change",
    [{"partition_size": 50}, {"filter": {"n": 1}}, {"on_existing": "replace"}, {"allow_losses": ("all",)}],
)
def test_a_changed_setting_is_refused_once_the_plan_is_frozen(prepared, change):
    make_plan(prepared())
    with pytest.raises(PlanChangedError, match=next(iter(change))):
        run_migration(prepared(**change))


def test_settings_that_decide_nothing_may_change(prepared):
    make_plan(prepared())
    report = run_migration(prepared(batch_size=7, workers=4, max_rejects=3))
    assert report.status == "complete"


def test_a_target_that_holds_records_is_refused_and_left_alone(prepared, target):
    target.create(plain_schema("copy"))
    target.upsert("copy", to_batch(plain_records(3, start=5_000), plain_schema("copy")))
    before = content(target, "copy")
    with pytest.raises(TargetNotEmptyError, match="3 records"):
        run_migration(prepared())
    assert content(target, "copy") == before


def test_records_that_came_after_the_plan_are_not_overwritten(prepared, target):
    make_plan(prepared())
    target.create(plain_schema("copy"))
    target.upsert("copy", to_batch(plain_records(3), plain_schema("copy")))
    with pytest.raises(TargetNotEmptyError, match="now holds 3"):
        run_migration(prepared())


def test_merge_keeps_what_was_there_and_replaces_what_is_in_scope(prepared, source, target):
    target.create(plain_schema("copy"))
    old = [Record(id="doc#00001", vectors={"": np.ones(8, np.float32)}, metadata={"old": True})]
    target.upsert("copy", to_batch([*old, *plain_records(2, start=9_000)], plain_schema("copy")))
    report = run_migration(prepared(on_existing="merge"))
    assert report.status == "complete"
    arrived = content(target, "copy")
    assert len(arrived) == 1_002
    assert arrived["str", "doc#00001", ""] == content(source, "docs")["str", "doc#00001", ""]


def test_replace_drops_what_was_there(prepared, source, target):
    target.create(plain_schema("copy", dimensions=3))
    target.upsert("copy", to_batch(plain_records(5, dimensions=3), plain_schema("copy", dimensions=3)))
    assert run_migration(prepared(on_existing="replace")).status == "complete"
    assert content(target, "copy") == content(source, "docs")


def test_another_dimension_in_the_target_is_refused(prepared, target):
    target.create(plain_schema("copy", dimensions=3))
    with pytest.raises(Exception, match="3 dimensions, the source has 8") as caught:
        run_migration(prepared())
    assert caught.value.exit_status == 2


def test_transient_errors_are_retried_and_nothing_is_lost(prepared, faults, source, target):
    calls = itertools.count()

    def now_and_then(_batch: Any) -> None:
        if next(calls) % 3 == 0:
            raise TransientError("busy")

    faults["upsert"] = faults["scan"] = now_and_then
    migration = prepared(source_store=source, target_store=faulty(target), batch_size=100, workers=1)
    assert run_migration(migration).status == "complete"
    assert content(target, "copy") == content(source, "docs")


@pytest.mark.parametrize(
    ("operation", "phase", "failing"),
    [
        ("describe", "plan", {1, 2}),
        ("split", "plan", {3, 4}),  # in the middle of the spans, and at the first when begun again
        ("create", "load", {1, 2}),
    ],
)
def test_planning_and_making_the_target_ready_are_tried_again(
    prepared, faults, source, target, operation, phase, failing
):
    calls = itertools.count(1)

    def at_first(_: None) -> None:
        if next(calls) in failing:
            raise TransientError("busy")

    faults[operation] = at_first
    events: list[Event] = []
    stores = {"source_store": faulty(source), "target_store": faulty(target)}
    report = run_migration(prepared(events.append, **stores))
    assert (report.status, report.records["read"]) == ("complete", 1_000)
    assert report.partitions == {"total": 10, "verified": 10, "failed": 0}
    assert [event.phase for event in events if event.name == "retried"] == [phase, phase]


def test_looking_for_ids_that_are_taken_is_tried_again(prepared, faults, target):
    target.create(plain_schema("copy"))
    target.upsert("copy", to_batch(plain_records(1, start=5_000), plain_schema("copy")))
    calls = itertools.count(1)

    def at_first(found: pa.RecordBatch) -> pa.RecordBatch:
        if next(calls) in (2, 3):
            raise TransientError("busy")
        return found

    faults["fetch"] = at_first
    events: list[Event] = []
    report = run_migration(prepared(events.append, target_store=faulty(target), on_existing="add"))
    assert (report.status, report.records["verified"]) == ("complete", 1_000)
    assert [event.phase for event in events if event.name == "retried"] == ["plan", "plan"]


def test_a_refused_record_is_set_aside_and_all_others_arrive(prepared, faults, target):
    def refuse(batch: pa.RecordBatch) -> None:
        if {"doc#00123", "doc#00777"} & set(batch.column("id").to_pylist()):
            raise RecordRejectedError("the record is too odd")

    faults["upsert"] = refuse
    report = run_migration(prepared(target_store=faulty(target)))
    assert report.status == "incomplete"
    assert report.exit_status == 1
    assert report.records["rejected"] == 2
    assert report.records["verified"] == 998
    assert [item["id"] for item in report.rejects] == ["doc#00123", "doc#00777"]
    assert all(item["reason"] == "the record is too odd" for item in report.rejects)
    assert len(content(target, "copy")) == 998


def test_rejects_under_the_threshold_are_complete(prepared, faults, target):
    def refuse(batch: pa.RecordBatch) -> None:
        if "doc#00123" in batch.column("id").to_pylist():
            raise RecordRejectedError("no")

    faults["upsert"] = refuse
    assert run_migration(prepared(target_store=faulty(target), max_rejects=1)).status == "complete"


def test_rejects_can_be_migrated_once_the_target_takes_them(prepared, faults, source, target, tmp_path):
    def refuse(batch: pa.RecordBatch) -> None:
        if "doc#00123" in batch.column("id").to_pylist():
            raise RecordRejectedError("no")

    faults["upsert"] = refuse
    report = run_migration(prepared(target_store=faulty(target)))
    config = MigrationConfig(
        source=f"parquet:{report.rejects_folder}", target=target.address("copy"), on_existing="merge"
    )
    replay = Migration(config=config, ledger=ledger_for(config, tmp_path / "replay"))
    assert run_migration(replay).status == "complete"
    assert content(target, "copy").keys() == content(source, "docs").keys()


def test_a_target_that_refuses_everything_stops_the_partition(prepared, faults, target):
    def refuse(_batch: Any) -> None:
        raise RecordRejectedError("not today")

    faults["upsert"] = refuse
    report = run_migration(prepared(target_store=faulty(target), batch_size=100))
    assert report.status == "incomplete"
    assert report.partitions["failed"] == 10
    assert all("every one of 100 records" in error for error in report.errors)


def test_a_difference_on_reading_back_fails_its_partition_and_a_rerun_mends_it(prepared, faults, target):
    def one_bit(found: pa.RecordBatch) -> pa.RecordBatch:
        if "doc#00150" not in found.column("id").to_pylist():
            return found
        return found.set_column(
            found.schema.get_field_index("document"), "document", pa.array(["other"] * found.num_rows)
        )

    faults["fetch"] = one_bit
    report = run_migration(prepared(target_store=faulty(target)))
    assert report.status == "incomplete"
    assert report.partitions == {"total": 10, "verified": 9, "failed": 1}
    assert report.records["different"] > 0
    assert "document" in report.errors[0]
    faults.clear()
    assert run_migration(prepared()).status == "complete"


def test_a_record_that_is_lost_in_the_target_is_noticed(prepared, faults, target):
    faults["fetch"] = lambda found: found.slice(1)
    report = run_migration(prepared(target_store=faulty(target)))
    assert report.exit_status == 1
    assert "missing" in report.errors[0]


def test_a_source_that_changes_is_noticed_and_completion_refused(prepared, source):
    def change(event: Event) -> None:
        if event.name == "loaded" and event.partition.endswith("00003"):
            source.upsert("docs", to_batch(plain_records(1, seed=9, start=55), plain_schema("docs")))

    report = run_migration(prepared(change, workers=1))
    assert report.status == "failed"
    assert report.exit_status == 1
    with pytest.raises(SourceChangedError, match="source unchanged"):
        require_complete(report)


def test_a_store_that_is_gone_stops_the_run_at_once(prepared, faults, target):
    def gone(_batch: Any) -> None:
        raise StoreUnavailableError("nothing answers")

    faults["upsert"] = gone
    with pytest.raises(StoreUnavailableError) as caught:
        run_migration(prepared(target_store=faulty(target), retry=RetryPolicy(attempts=1)))
    assert caught.value.exit_status == 4


def test_duplicate_ids_are_refused_before_anything_is_written(prepared, source, target, faults):
    double = source.fetch("docs", to_batch(plain_records(1), plain_schema("docs")).select(["id", "id_type"]))

    class Doubling(FaultyStore):
        def scan(self, collection: str, span: Any, **how: Any) -> Iterator[pa.RecordBatch]:
            yield from MemoryStore.scan(self, collection, span, **how)
            yield double if how.get("vectors", True) else double.drop_columns(["vector"])

    with pytest.raises(ConfigurationError, match="share their id"):
        run_migration(prepared(source_store=Doubling(**source.model_dump())))
    assert target.list_collections() == []


def test_a_migration_onto_itself_is_refused(source, tmp_path):
    config = MigrationConfig(source=source.address("docs"), target=source.address("docs"))
    with pytest.raises(ConfigurationError, match="both source and target"):
        run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path)))


def test_two_runs_of_one_migration_exclude_each_other(prepared):
    first = prepared()
    with first.ledger.lease(), pytest.raises(LeaseHeldError):
        run_migration(prepared())


def test_a_listener_that_fails_does_not_hurt(prepared):
    def fail(_event: Event) -> None:
        raise RuntimeError("the bar broke")

    assert run_migration(prepared(fail)).status == "complete"


def test_an_empty_collection_is_complete_too(source, target, tmp_path):
    source.create(plain_schema("empty"))
    config = MigrationConfig(source=source.address("empty"), target=target.address())
    report = run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path)))
    assert report.status == "complete"
    assert target.count("empty") == 0


def test_staging_is_gone_when_all_is_verified(prepared):
    migration = prepared()
    run_migration(migration)
    staged = migration.ledger.folder / "staged"
    assert not staged.exists() or not list(staged.iterdir())


def test_a_corrupt_staged_file_is_extracted_again_and_never_loaded(prepared, faults, source, target):
    def stop(_batch: Any) -> None:
        raise StoreUnavailableError("gone")

    faults["upsert"] = stop
    with pytest.raises(StoreUnavailableError):
        run_migration(prepared(target_store=faulty(target), retry=RetryPolicy(attempts=1)))
    for path in (prepared().ledger.folder / "staged").rglob("*.arrow"):
        content_bytes = bytearray(path.read_bytes())
        content_bytes[len(content_bytes) // 2] ^= 1
        path.write_bytes(content_bytes)
    faults.clear()
    assert run_migration(prepared()).status == "complete"
    assert content(target, "copy") == content(source, "docs")


def test_a_users_field_called_as_the_envelope_is_stays_the_users(prepared, source, target):
    odd = {"_source_id": "12", "_source_extra": "more"}
    record = Record(id="odd", vectors={"": np.ones(8, np.float32)}, metadata=odd)
    source.upsert("docs", to_batch([record], plain_schema("docs")))
    assert run_migration(prepared()).status == "complete"
    ids = to_batch([record], plain_schema("docs")).select(["id", "id_type"])
    assert from_batches([decode(target.fetch("copy", ids))])[0].metadata == odd


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_workers_read_at_a_time_than_the_source_is_best_read_by(prepared, source, limit):
    class Narrow(MemoryStore):
        def scans_at_once(self) -> int:
            return limit

        def scan(self, collection: str, span: Any, **how: Any) -> Iterator[pa.RecordBatch]:
            reading.append(span)
            seen.append(len(reading))
            time.sleep(0.01)
            yield from super().scan(collection, span, **how)
            reading.pop()

    reading: list[Any] = []
    seen: list[int] = []
    migration = prepared(source_store=Narrow(**source.model_dump()), workers=5)
    assert run_migration(migration).status == "complete"
    assert max(seen) == limit


def test_a_relative_address_means_another_migration_in_another_folder(tmp_path, monkeypatch):
    config = MigrationConfig(source="parquet:./a#docs", target="parquet:./b#docs")
    names = set()
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        names.add(config.ledger_name())
    assert len(names) == 2
