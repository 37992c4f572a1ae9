"""Incremental migrations: exactly what changed is written, deletes included, whatever happens in between."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from migration_pipelines import MigrationResult, VectorStoreMigrator, open_address
from migration_pipelines.batch import id_batch
from migration_pipelines.errors import (
    ConfigurationError,
    MigrationError,
    RecordRejectedError,
    TargetNotEmptyError,
    UnsupportedOperationError,
)
from migration_pipelines.migration import Event, Migration, MigrationConfig, Stopped, default_home, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import IdKind
from migration_pipelines.quality import run_quality
from migration_pipelines.store import Store
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.conformance import load, new_name, new_schema, read_all, records_for
from migration_pipelines_tests.dagster_project import Project, fill, read
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import (
    Record,
    by_id,
    plain_records,
    plain_schema,
    to_batch,
)

_names = (f"sync{number}" for number in itertools.count())
WRITTEN: list[str] = []
DELETED: list[str] = []
REFUSED: set[str] = set()


class WatchedStore(MemoryStore):
    """A store in memory that notes which ids are written and deleted, and refuses those it is told to."""

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        if REFUSED & set(batch.column("id").to_pylist()):
            raise RecordRejectedError("a record is refused")
        super().upsert(collection, batch)
        WRITTEN.extend(batch.column("id").to_pylist())

    def delete(self, collection: str, ids: pa.RecordBatch) -> None:
        super().delete(collection, ids)
        DELETED.extend(ids.column("id").to_pylist())


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ledgers in a folder of the test's own; nothing noted outlives its test."""
    monkeypatch.setenv("VECTOR_MIGRATE_HOME", str(tmp_path / "home"))
    yield
    for noted in (WRITTEN, DELETED, REFUSED):
        noted.clear()


class Pair:
    """A source with records that tests change, and a watched target."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.source: Any = MemoryStore(name=next(_names))
        self.target: Any = WatchedStore(name=next(_names))
        self.source.create(plain_schema("docs"))
        self.put(*records)

    def put(self, *records: Record) -> None:
        self.source.upsert("docs", to_batch(records, plain_schema("docs")))

    def drop(self, *ids: str) -> None:
        self.source.delete("docs", id_batch(ids))

    def sync(self, **how: Any) -> MigrationResult:
        WRITTEN.clear()
        DELETED.clear()
        how = {"incremental": True, "chunk_size": 40, "batch_size": 16, **how}
        return VectorStoreMigrator(self.source, self.target, retry_delay=0.001).migrate("docs", "copy", **how)

    def agrees(self, **how: Any) -> bool:
        return VectorStoreMigrator(self.source, self.target).verify("docs", "copy", **how).agrees


@pytest.fixture
def pair() -> Pair:
    """A source of 100 records that a complete run has moved."""
    found = Pair(plain_records(100))
    assert found.sync().success
    return found


def changed(record: Record, **fields: Any) -> Record:
    return replace(record, metadata={**(record.metadata or {}), **fields})


def ids(*numbers: int) -> list[str]:
    return [f"doc#{number:05d}" for number in numbers]


def content(store: Store, collection: str) -> Any:
    return by_id(read_all(store, collection))


# ── what is written ──────────────────────────────────────────────────────────────────────────────────


def test_the_first_run_moves_everything_and_the_second_writes_nothing(pair: Pair) -> None:
    again = pair.sync()
    assert again.success
    assert (again.vectors_migrated, WRITTEN) == (0, [])
    expected = {"new": 0, "changed": 0, "unchanged": 100, "deleted": 0, "removes": False, "claimed": 0}
    assert again.metadata["changes"] == expected


def test_exactly_what_is_new_or_changed_is_written(pair: Pair) -> None:
    first, *rest = plain_records(100)
    vector = np.array(rest[4].vectors[""])
    vector[3] = np.nextafter(vector[3], np.float32(9))  # by one unit in the last place
    pair.put(
        changed(first, tag="another"),
        replace(rest[0], document="another"),
        replace(rest[1], document=None),
        replace(rest[4], vectors={"": vector}),
        *plain_records(3, start=100),
    )
    result = pair.sync()
    assert result.success
    assert sorted(WRITTEN) == ids(0, 1, 2, 5, 100, 101, 102)
    changes = result.metadata["changes"]
    assert (changes["new"], changes["changed"], changes["unchanged"]) == (3, 4, 96)
    assert pair.agrees()
    assert pair.sync().metadata["changes"]["unchanged"] == 103


def test_a_plain_run_is_built_on_as_well() -> None:
    pair = Pair(plain_records(50))
    assert pair.sync(incremental=False).success
    pair.put(*plain_records(1, start=50))
    assert pair.sync().vectors_migrated == 1


def test_deletes_are_counted_and_applied_only_when_asked(pair: Pair) -> None:
    pair.drop(*ids(7, 8, 9))
    counted = pair.sync()
    assert counted.success
    assert counted.metadata["changes"]["deleted"] == 3
    assert (DELETED, pair.target.count("copy")) == ([], 100)
    applied = pair.sync(apply_deletes=True)
    assert applied.success
    assert (sorted(DELETED), pair.target.count("copy")) == (ids(7, 8, 9), 97)
    assert pair.agrees()
    assert pair.sync(apply_deletes=True).metadata["changes"]["deleted"] == 0


def test_records_of_the_target_that_no_run_moved_are_never_deleted(pair: Pair) -> None:
    stranger = plain_records(1, start=900)
    MemoryStore(name=pair.target.name).upsert("copy", to_batch(stranger, plain_schema("copy")))
    pair.drop(*ids(1))
    assert pair.sync(apply_deletes=True).success
    assert ("str", *ids(900), "") in content(pair.target, "copy")


def test_a_record_that_came_back_is_written_again(pair: Pair) -> None:
    pair.drop(*ids(3))
    assert pair.sync(apply_deletes=True).success
    pair.put(plain_records(100)[3])
    assert pair.sync().success
    assert ids(3) == WRITTEN
    assert pair.agrees()


def test_a_narrower_filter_makes_deletes_and_a_wider_one_new_records(pair: Pair) -> None:
    narrowed = pair.sync(filter={"n": {"$lt": 90}}, apply_deletes=True)
    assert narrowed.success
    assert narrowed.metadata["changes"]["deleted"] == 10
    assert pair.agrees(filter={"n": {"$lt": 90}})
    widened = pair.sync()
    assert widened.metadata["changes"]["new"] == 10
    assert pair.agrees()


def test_another_mapping_moves_everything_again(pair: Pair) -> None:
    result = pair.sync(schema_mapping={"exclude_fields": ["tag"]})
    assert result.success
    assert len(WRITTEN) == 100
    assert pair.sync(schema_mapping={"exclude_fields": ["tag"]}).metadata["changes"]["unchanged"] == 100


def test_a_mapping_that_makes_ids_is_refused(pair: Pair) -> None:
    with pytest.raises(UnsupportedOperationError, match="id_from"):
        pair.sync(schema_mapping={"id_from": "tag"})


def test_a_dry_run_tells_the_changes_and_leaves_them(pair: Pair) -> None:
    pair.put(*plain_records(2, start=100))
    pair.drop(*ids(0))
    dry = pair.sync(dry_run=True)
    assert dry.success
    expected = {"new": 2, "changed": 0, "unchanged": 99, "deleted": 1, "removes": False, "claimed": 0}
    assert dry.metadata["changes"] == expected
    assert WRITTEN == []
    assert pair.sync().metadata["changes"] == expected


# ── conflicts ────────────────────────────────────────────────────────────────────────────────────────


def taken(pair: Pair, number: int) -> Record:
    """Have somebody else write a record into the target under an id that then comes to the source too."""
    (record,) = plain_records(1, start=number)
    theirs = replace(record, document="theirs")
    MemoryStore(name=pair.target.name).upsert("copy", to_batch([theirs], plain_schema("copy")))
    pair.put(record)
    return theirs


def test_skip_leaves_what_others_wrote_and_replaces_what_was_moved(pair: Pair) -> None:
    theirs = taken(pair, 200)
    pair.put(changed(plain_records(1)[0], tag="newer"))
    result = pair.sync(on_conflict="skip")
    assert result.success
    assert (ids(0), result.metadata["skipped"]) == (WRITTEN, 1)
    assert content(pair.target, "copy")[theirs.key()] == theirs.exact()
    again = pair.sync(on_conflict="skip")  # still somebody else's
    assert again.success
    assert content(pair.target, "copy")[theirs.key()] == theirs.exact()


def test_fail_refuses_before_anything_is_written(pair: Pair) -> None:
    taken(pair, 200)
    pair.put(changed(plain_records(1)[0], tag="newer"))
    with pytest.raises(TargetNotEmptyError, match=r"doc#00200"):
        pair.sync(on_conflict="fail")
    assert WRITTEN == []


def test_overwrite_replaces(pair: Pair) -> None:
    taken(pair, 200)
    assert pair.sync().success
    assert pair.agrees()


# ── interrupted, refused, lost ───────────────────────────────────────────────────────────────────────


def interrupted(pair: Pair, **how: Any) -> None:
    """Sync until the first partition is verified, and no further, as a killed process does."""
    config = MigrationConfig(
        source=pair.source.address("docs"),
        target=pair.target.address("copy"),
        incremental=True,
        partition_size=2,
        workers=1,
        **how,
    )
    WRITTEN.clear()
    migration = Migration(
        config=config,
        ledger=ledger_for(config, default_home()),
        source_store=pair.source,
        target_store=pair.target,
    )

    def stop(event: Event) -> None:
        if event.name == "verified":
            migration.stopping.set()

    migration.listener = stop
    with pytest.raises(Stopped):
        run_migration(migration)


def test_after_a_crash_a_fresh_run_knows_its_own_records(pair: Pair) -> None:
    pair.put(*plain_records(6, start=100))
    interrupted(pair, on_existing="skip")
    written = set(WRITTEN)
    assert 0 < len(written) < 6
    pair.put(*(changed(record, tag="newer") for record in plain_records(6, start=100)))
    result = pair.sync(on_conflict="skip")
    assert result.success
    assert result.metadata["skipped"] == 0
    assert pair.agrees()


def test_what_a_crashed_run_added_and_the_source_lost_is_deleted(pair: Pair) -> None:
    pair.put(*plain_records(6, start=100))
    interrupted(pair, on_existing="merge")
    pair.drop(*ids(*range(100, 106)))
    assert pair.target.count("copy") > 100
    assert pair.sync(apply_deletes=True).success
    assert pair.agrees()


def test_a_refused_record_is_tried_again_next_time(pair: Pair) -> None:
    pair.put(*plain_records(3, start=100))
    REFUSED.update(ids(101))
    result = pair.sync()
    assert not result.success
    assert (result.vectors_migrated, result.vectors_failed) == (2, 1)
    REFUSED.clear()
    assert pair.sync().success
    assert pair.agrees()


def test_records_that_the_target_lost_are_noticed(pair: Pair) -> None:
    MemoryStore(name=pair.target.name).delete("copy", id_batch(ids(5)))
    result = VectorStoreMigrator(pair.source, pair.target, validate=False).migrate(
        "docs", "copy", incremental=True
    )
    assert not result.success
    assert any("target count" in error for error in result.errors)


def test_a_target_that_is_gone_is_filled_anew(pair: Pair) -> None:
    pair.target.drop("copy")
    assert pair.sync().vectors_migrated == 100
    assert pair.agrees()


def test_a_plain_run_that_fails_leaves_no_baseline(pair: Pair) -> None:
    REFUSED.update(ids(*range(100)))
    assert not pair.sync(incremental=False).success
    REFUSED.clear()
    assert pair.sync().vectors_migrated == 100


def test_a_store_that_keeps_what_it_should_delete_is_not_believed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WatchedStore, "delete", lambda *_: None)
    pair.drop(*ids(1))
    with pytest.raises(MigrationError, match="still there"):
        pair.sync(apply_deletes=True)


def test_ids_of_another_kind_that_need_other_ids_in_the_target_are_refused(tmp_path: Path) -> None:
    source: Any = MemoryStore(name=next(_names))
    kinds = frozenset({IdKind.INT, IdKind.STR})
    source.create(plain_schema("docs").model_copy(update={"id_kinds": kinds}))
    numbered = [replace(record, id=number) for number, record in enumerate(plain_records(5))]
    source.upsert("docs", to_batch(numbered, plain_schema("docs")))
    migrator = VectorStoreMigrator(source, f"qdrant:{tmp_path}/q")
    assert migrator.migrate("docs", incremental=True).success
    source.upsert("docs", to_batch(plain_records(1), plain_schema("docs")))
    with pytest.raises(ConfigurationError, match="without incremental"):
        VectorStoreMigrator(source, f"qdrant:{tmp_path}/q").migrate("docs", incremental=True)


# ── by a watermark ───────────────────────────────────────────────────────────────────────────────────


class CountingStore(MemoryStore):
    """A store in memory that counts the records that are read with their vectors."""

    def scan(self, collection: str, span: Any, **how: Any) -> Iterator[pa.RecordBatch]:
        for batch in super().scan(collection, span, **how):
            if how.get("vectors", True):
                READ.append(batch.num_rows)
            yield batch


READ: list[int] = []


def stamped(record: Record, at: Any) -> Record:
    return changed(record, updated_at=at)


@pytest.mark.parametrize(
    ("before", "after", "overlap"),
    [
        (100, 101, 0),
        (1.5, 1.75, 0.25),
        ("2026-01-31", "2026-02-01", 86_400),
        ("2026-01-31T10:00:00Z", "2026-01-31T10:00:01Z", 5),
    ],
)
def test_only_records_that_may_be_newer_are_read(before: Any, after: Any, overlap: float) -> None:
    pair = Pair([stamped(record, before) for record in plain_records(20)])
    by = {"watermark": "updated_at", "watermark_overlap": overlap}
    assert pair.sync(**by).success
    pair.put(
        stamped(replace(plain_records(20)[3], document="newer"), after),
        stamped(plain_records(1, start=20)[0], after),
        plain_records(1, start=21)[0],  # without the field
    )
    pair.drop(*ids(4))
    result = pair.sync(**by, apply_deletes=True)
    assert result.success
    assert sorted(WRITTEN) == ids(3, 20, 21)
    assert ids(4) == DELETED
    assert pair.agrees()


def test_a_record_that_arrives_late_with_an_old_mark_is_moved_all_the_same() -> None:
    pair = Pair([stamped(record, 100) for record in plain_records(20)])
    assert pair.sync(watermark="updated_at").success
    pair.put(stamped(plain_records(1, start=20)[0], 7))
    assert pair.sync(watermark="updated_at").success
    assert ids(20) == WRITTEN


def test_a_record_that_becomes_newer_while_it_is_read_is_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair([stamped(record, 100) for record in plain_records(20)])
    assert pair.sync(watermark="updated_at").success
    twice = stamped(plain_records(1, start=20)[0], 7)
    pair.put(twice)
    monkeypatch.setattr(MemoryStore, "fingerprint", lambda *_: "misses updates in place")
    scan = MemoryStore.scan

    def scan_and_change(
        store: MemoryStore, collection: str, span: Any, **how: Any
    ) -> Iterator[pa.RecordBatch]:
        yield from scan(store, collection, span, **how)
        if collection == "docs" and not how.get("vectors", True):
            pair.put(stamped(twice, 200))

    with monkeypatch.context() as changing:
        changing.setattr(MemoryStore, "scan", scan_and_change)
        result = pair.sync(watermark="updated_at")
    assert result.success, result.errors
    assert ids(20) == WRITTEN
    assert result.metadata["changes"]["unchanged"] == 20


def test_another_field_is_no_watermark_of_the_last_run() -> None:
    pair = Pair([stamped(record, 100) for record in plain_records(20)])
    assert pair.sync(watermark="updated_at").success
    pair.put(changed(stamped(plain_records(1)[0], 7), tag="newer"))
    assert pair.sync(watermark="n").success
    assert ids(0) == WRITTEN


# ── every store ──────────────────────────────────────────────────────────────────────────────────────


def test_every_store_is_kept_in_step(harness: Harness) -> None:
    source: Any = MemoryStore(name=next(_names))
    source.create(plain_schema("docs"))
    source.upsert("docs", to_batch(plain_records(40), plain_schema("docs")))
    collection = new_name(harness.store)
    migrator = VectorStoreMigrator(source, harness.store)
    assert migrator.migrate("docs", collection, incremental=True, allow_losses=("all",)).success
    newer = [changed(record, tag="newer") for record in plain_records(3)]
    source.upsert("docs", to_batch([*newer, *plain_records(2, start=40)], plain_schema("docs")))
    source.delete("docs", id_batch(ids(10, 11)))
    result = migrator.migrate("docs", collection, incremental=True, apply_deletes=True, allow_losses=("all",))
    assert result.success, result.errors
    assert result.vectors_migrated == 5
    assert migrator.verify("docs", collection).agrees


def test_every_store_is_read_alike_by_scan_and_by_id(harness: Harness) -> None:
    store = harness.store
    schema = load(store, new_schema(store), records_for(store, 30))
    target, _ = open_address(f"memory:{next(_names)}")
    migrator = VectorStoreMigrator(store, target)
    assert migrator.migrate(schema.name, "copy", incremental=True).success
    assert migrator.migrate(schema.name, "copy", incremental=True).metadata["changes"]["unchanged"] == 30
    store.upsert(schema.name, to_batch(records_for(store, 4, start=30), schema))
    added = migrator.migrate(schema.name, "copy", incremental=True)
    assert added.success, added.errors
    assert added.vectors_migrated == 4
    assert migrator.migrate(schema.name, "copy", incremental=True).metadata["changes"]["unchanged"] == 34


@pytest.mark.parametrize("target", ["memory:{name}", "qdrant:{folder}/qdrant"])
def test_ids_that_stand_in_several_namespaces_are_kept_apart(target: str, tmp_path: Path) -> None:
    schema = plain_schema("docs").model_copy(update={"has_namespaces": True})
    spaces = [*(replace(r, namespace="a") for r in plain_records(6)), *plain_records(4, seed=1)]
    source: Any = MemoryStore(name=next(_names))
    source.create(schema)
    source.upsert("docs", to_batch(spaces, schema))
    address = target.format(name=next(_names), folder=tmp_path)
    assert VectorStoreMigrator(source, address).migrate("docs", "copy", incremental=True).success
    source.upsert(
        "docs", to_batch([changed(spaces[0], tag="newer"), changed(spaces[7], tag="newer")], schema)
    )
    gone = to_batch([spaces[1]], schema).select(["id", "id_type", "namespace"])
    source.delete("docs", gone)
    result = VectorStoreMigrator(source, address).migrate(
        "docs", "copy", incremental=True, apply_deletes=True
    )
    assert result.success, result.errors
    changes = result.metadata["changes"]
    assert (changes["changed"], changes["deleted"], changes["unchanged"]) == (2, 1, 7)
    assert VectorStoreMigrator(source, address).verify("docs", "copy").agrees


# ── in Dagster ───────────────────────────────────────────────────────────────────────────────────────


def test_a_declared_migration_moves_what_changed_in_each_run(tmp_path: Path) -> None:
    project = Project(tmp_path)
    source = f"memory:{tmp_path}/source#docs"
    fill(source, plain_records(60))
    project.declare(
        "docs",
        source=source,
        target=f"memory:{tmp_path}/target#docs",
        partition_size=20,
        incremental=True,
        apply_deletes=True,
    )
    assert project.run("docs").records["verified"] == 60
    store, _ = open_address(source)
    store.upsert("docs", to_batch(plain_records(15, start=60), plain_schema("docs")))
    store.delete("docs", id_batch(ids(0, 1)))
    report = project.run("docs")
    assert (report.status, report.records["verified"]) == ("complete", 15)
    assert report.changes is not None
    assert (report.changes.new, report.changes.deleted, report.target["count"]) == (15, 2, 73)
    assert by_id(read(f"memory:{tmp_path}/target#docs")) == content(store, "docs")
    unchanged = project.run("docs")
    assert (unchanged.status, unchanged.records["verified"], unchanged.generation) == ("complete", 0, 3)


def test_great_expectations_looks_at_what_was_moved(pair: Pair) -> None:
    pair.put(*plain_records(7, start=100))
    assert pair.sync().success
    config = MigrationConfig(
        source=pair.source.address("docs"),
        target=pair.target.address("copy"),
        incremental=True,
        partition_size=40,
        on_existing="merge",
    )
    migration = Migration(config=config, ledger=ledger_for(config, default_home()))
    found = run_quality(migration)
    assert found.success, [row for row in found.rows if not row.success]
    assert found.records == 7
