"""Namespaces: one of them, all, all in one place, from one to another; and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.compute as pc
import pytest

from migration_pipelines.compare import compare_collections
from migration_pipelines.errors import ConfigurationError, RecordRejectedError
from migration_pipelines.inspect import inspect_collection
from migration_pipelines.mapping import IdStrategy
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import Capabilities, CollectionSchema
from migration_pipelines.quality import run_quality
from migration_pipelines.store import open_address
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines.stores.parquet import ParquetStore
from migration_pipelines_tests.conformance import load, read_all
from migration_pipelines_tests.harnesses.pgvector import PgVectorHarness
from migration_pipelines_tests.records import Record, by_id, plain_records, plain_schema, to_batch
from migration_pipelines_tests.shell import shell

__all__ = ["shell"]

SPACES = ("a", "b", "")
SCHEMA = plain_schema("docs").model_copy(update={"has_namespaces": True})


@pytest.fixture
def memory(tmp_path: Path) -> MemoryStore:
    return MemoryStore(name=f"namespaces-{tmp_path}".replace("/", "-"))


@pytest.fixture
def folder(tmp_path: Path) -> ParquetStore:
    return ParquetStore(path=tmp_path / "parquet")


def repeated(n: int = 20) -> list[Record]:
    """Records of which each id stands in three namespaces, each time with something else under it."""
    return [
        replace(record, namespace=space)
        for seed, space in enumerate(SPACES)
        for record in plain_records(n, seed=seed)
    ]


def apart(n: int = 20) -> list[Record]:
    """Records of three namespaces, no id in two of them."""
    return [replace(record, namespace=SPACES[at % 3]) for at, record in enumerate(plain_records(n))]


def within(space: str, records: list[Record]) -> list[Record]:
    """The records of one namespace, as a collection without namespaces holds them."""
    return [replace(record, namespace=None) for record in records if record.namespace == space]


def prepared(source: Any, target: Any, home: Path, **settings: Any) -> Migration:
    """A migration between two addresses, or stores that hold `docs`."""
    stores = {}
    addresses = {}
    for side, given in (("source", source), ("target", target)):
        addresses[side] = given if isinstance(given, str) else given.address("docs")
        if not isinstance(given, str):
            stores[f"{side}_store"] = given
    config = MigrationConfig(partition_size=25, batch_size=10, **addresses, **settings)
    return Migration(config=config, ledger=ledger_for(config, home), **stores)


def move(source: Any, target: Any, home: Path, **settings: Any) -> Any:
    report = run_migration(prepared(source, target, home, **settings))
    assert report.status == "complete", report
    return report


# ── all ──────────────────────────────────────────────────────────────────────────────────────────────


def test_one_id_in_three_namespaces_goes_there_and_back(memory, folder, tmp_path):
    load(memory, SCHEMA, records := repeated())
    report = move(memory, folder, tmp_path)
    assert report.losses == ()
    assert by_id(read_all(folder, "docs")) == by_id(records)

    back = MemoryStore(name=f"{memory.name}-back")
    again = move(folder, back, tmp_path)
    assert by_id(read_all(back, "docs")) == by_id(records)
    assert again.digest == report.digest
    both = compare_collections(memory, "docs", folder, "docs")
    assert both.agrees
    assert both.equal == len(records) == 60


def test_what_differs_in_one_namespace_is_told_with_its_name(memory, folder, tmp_path):
    load(memory, SCHEMA, records := repeated(3))
    changed = [
        replace(r, document="other") if (r.id, r.namespace) == ("doc#00001", "b") else r for r in records
    ]
    load(folder, SCHEMA, [r for r in changed if (r.id, r.namespace) != ("doc#00002", "a")])
    found = compare_collections(memory, "docs", folder, "docs")
    assert (found.missing, found.different, found.equal) == (1, 1, 7)
    assert {(item.id, item.namespace, item.what) for item in found.examples} == {
        ("doc#00002", "a", "missing in the target"),
        ("doc#00001", "b", "document"),
    }


def test_a_record_rejected_in_one_namespace_is_set_aside_there_alone(memory, tmp_path):
    class Choosy(MemoryStore):
        def upsert(self, collection: str, batch: Any) -> None:
            rows = batch.select(["id", "namespace"]).to_pylist()
            if {"id": "doc#00003", "namespace": "b"} in rows:
                raise RecordRejectedError("the record is too odd")
            super().upsert(collection, batch)

    load(memory, SCHEMA, records := repeated())
    target = Choosy(name=f"{memory.name}-choosy")
    migration = prepared(memory, target, tmp_path, max_rejects=1)
    report = run_migration(migration)
    assert report.status == "complete"
    assert [(item["id"], item["namespace"]) for item in report.rejects] == [("doc#00003", "b")]
    arrived = by_id(read_all(target, "docs"))
    expected = by_id(r for r in records if (r.id, r.namespace) != ("doc#00003", "b"))
    assert arrived == expected

    # The rejects are a collection that can be moved again, into their namespace.
    mended = MemoryStore(name=f"{memory.name}-mended")
    move(f"parquet:{report.rejects_folder}", mended.address("docs"), tmp_path)
    assert [(r.id, r.namespace) for r in read_all(mended, "docs")] == [("doc#00003", "b")]


def test_a_vector_that_the_target_refuses_is_set_aside_in_its_namespace(memory, folder, tmp_path):
    class Finite(ParquetStore):
        capabilities: ClassVar[Capabilities] = ParquetStore.capabilities.model_copy(
            update={"non_finite_vectors": False}
        )

    records = repeated(5)
    odd = next(r for r in records if (r.id, r.namespace) == ("doc#00002", "b"))
    bad = replace(odd, vectors={"": np.full(8, np.nan, np.float32)})
    load(memory, SCHEMA, [bad if r is odd else r for r in records])
    target = Finite(path=folder.path)
    report = move(memory, target, tmp_path, max_rejects=1)
    assert [(item["id"], item["namespace"]) for item in report.rejects] == [("doc#00002", "b")]
    assert by_id(read_all(target, "docs")) == by_id(r for r in records if r is not odd)


def test_a_difference_in_one_namespace_is_found_on_reading_back(memory, tmp_path):
    class Forgetful(MemoryStore):
        def upsert(self, collection: str, batch: Any) -> None:
            kept = pc.not_equal(batch.column("namespace"), "b")
            super().upsert(collection, batch.filter(kept))

    load(memory, SCHEMA, repeated(4))
    report = run_migration(prepared(memory, Forgetful(name=f"{memory.name}-forgetful"), tmp_path))
    assert report.status == "incomplete"
    assert report.records["different"] == 4
    assert "missing" in report.errors[0]


def test_a_merge_changes_the_records_of_its_namespaces_alone(memory, folder, tmp_path):
    load(folder, SCHEMA, [replace(r, namespace=space) for r in plain_records(9, seed=7) for space in "bz"])
    load(memory, SCHEMA, records := repeated(6))
    migration = prepared(memory, folder, tmp_path, on_existing="merge")
    assert run_migration(migration).status == "complete"
    older = [replace(r, namespace=space) for r in plain_records(9, seed=7) for space in "bz"]
    assert by_id(read_all(folder, "docs")) == by_id(older) | by_id(records)
    quality = run_quality(migration)
    assert quality.success, [row for row in quality.rows if not row.success]


def test_the_quality_of_what_arrived_is_judged_within_namespaces(memory, folder, tmp_path):
    load(memory, SCHEMA, repeated(6))
    migration = prepared(memory, folder, tmp_path)
    run_migration(migration)
    found = run_quality(migration)
    assert found.success, [row for row in found.rows if not row.success]
    assert found.records == 18
    assert "namespace" in {row.column for row in found.rows}


def test_inspect_counts_records_by_namespace_and_ids_that_stand_in_several(memory):
    load(
        memory, SCHEMA, [*repeated(4), Record(id="once", vectors={"": np.ones(8, np.float32)}, namespace="a")]
    )
    profile = inspect_collection(memory, "docs").profile
    assert profile.namespaces == {"a": 5, "b": 4, "": 4}
    assert (profile.duplicate_ids, profile.repeated_ids) == (0, 8)


# ── one, and one to another ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_one_namespace_is_moved_by_itself(memory, folder, tmp_path, space):
    load(folder, SCHEMA, records := repeated())
    target = MemoryStore(name=f"{memory.name}-one")
    report = move(f"{folder.address()}?namespace={space}#docs", target.address("docs"), tmp_path)
    assert report.losses == ()
    assert not target.describe("docs").has_namespaces
    assert by_id(read_all(target, "docs")) == by_id(within(space, records))


def test_one_namespace_becomes_another_of_a_collection_that_stays_as_it_was(memory, folder, tmp_path):
    load(folder, SCHEMA, records := repeated())
    source, target = (f"{folder.address()}?namespace={space}#docs" for space in ("a", "new"))
    before = open_address(source)[0].fingerprint("docs")
    move(source, target, tmp_path)
    moved = [replace(r, namespace="new") for r in records if r.namespace == "a"]
    assert by_id(read_all(folder, "docs")) == by_id([*records, *moved])
    assert open_address(source)[0].fingerprint("docs") == before

    for refused in (f"{folder.address()}#docs", source):
        with pytest.raises(ConfigurationError, match="both source and target"):
            move(refused, source, tmp_path)


def test_a_namespace_is_replaced_and_no_other(memory, folder, tmp_path):
    load(folder, SCHEMA, records := repeated())
    load(memory, plain_schema("docs"), newer := plain_records(5, seed=9))
    bound = ParquetStore(path=folder.path, namespace="b")
    move(memory, bound, tmp_path, on_existing="replace")
    others = [r for r in records if r.namespace != "b"]
    assert by_id(read_all(bound, "docs")) == by_id(newer)
    assert by_id(read_all(folder, "docs")) == by_id([*others, *(replace(r, namespace="b") for r in newer)])


def test_moves_into_two_namespaces_leave_each_other_alone(memory, folder, tmp_path):
    """Both have a partition of the same number."""
    load(memory, plain_schema("docs"), records := plain_records(30))
    for space in ("x", "y"):
        move(memory, ParquetStore(path=folder.path, namespace=space), tmp_path)
    expected = [replace(r, namespace=space) for r in records for space in ("x", "y")]
    assert by_id(read_all(folder, "docs")) == by_id(expected)


def test_merging_a_second_collection_keeps_the_first(memory, folder, tmp_path):
    """Both have a partition of the same number."""
    load(memory, plain_schema("docs"), first := plain_records(30))
    move(memory, folder, tmp_path)
    other = MemoryStore(name=f"{memory.name}-other")
    load(other, plain_schema("docs"), second := plain_records(60, seed=3)[20:])
    move(other, folder, tmp_path, on_existing="merge")
    assert by_id(read_all(folder, "docs")) == by_id(first) | by_id(second)


# ── all in one place ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def without(tmp_path: Path) -> MemoryStore:
    """A store that has no namespaces."""

    class Flat(MemoryStore):
        capabilities: ClassVar[Capabilities] = MemoryStore.capabilities.model_copy(
            update={"namespaces": False}
        )

    return Flat(name=f"flat-{tmp_path}".replace("/", "-"))


def test_ids_stay_as_they_are_where_none_stands_in_two_namespaces(memory, without, tmp_path):
    load(memory, SCHEMA, records := apart())
    report = move(memory, without, tmp_path)
    (loss,) = report.losses
    assert (loss.kind, loss.count, loss.kept) == ("namespace", 20, "_source_namespace")
    found = {r.id: r for r in read_all(without, "docs")}
    assert set(found) == {r.id for r in records}
    assert all(found[r.id].metadata["_source_namespace"] == r.namespace for r in records)
    _goes_back(without, memory, records, tmp_path)


def test_an_id_of_several_namespaces_becomes_several(memory, without, tmp_path):
    load(memory, SCHEMA, records := repeated())
    migration = prepared(memory, without, tmp_path)
    assert run_migration(migration).status == "complete"
    assert migration.plan.id_strategy == IdStrategy.NAMESPACE_UUID5
    assert without.count("docs") == len(records)
    both = compare_collections(memory, "docs", without, "docs")
    assert both.agrees, both.examples
    quality = run_quality(migration)
    assert quality.success, [row for row in quality.rows if not row.success]
    _goes_back(without, memory, records, tmp_path)


def _goes_back(store: Any, memory: MemoryStore, records: list[Record], home: Path) -> None:
    back = MemoryStore(name=f"{memory.name}-back")
    report = move(store, back, home)
    assert report.losses == ()
    assert back.describe("docs").has_namespaces
    assert by_id(read_all(back, "docs")) == by_id(records)


def test_all_namespaces_go_into_one_and_come_back(memory, folder, tmp_path):
    load(memory, SCHEMA, records := repeated())
    bound = ParquetStore(path=folder.path, namespace="all")
    move(memory, bound, tmp_path)
    assert {r.namespace for r in read_all(folder, "docs")} == {"all"}
    assert compare_collections(memory, "docs", bound, "docs").agrees
    _goes_back(bound, memory, records, tmp_path)


@pytest.fixture(scope="module")
def pg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with PgVectorHarness.start(tmp_path_factory.mktemp("pgvector")) as harness:
        yield harness.store


@pytest.mark.parametrize("records", [repeated(), apart()], ids=["repeated", "apart"])
def test_namespaces_survive_a_store_that_has_none(memory, folder, pg, tmp_path, records):
    records = [replace(r, metadata=None) if r.namespace == "b" else r for r in records]
    load(memory, SCHEMA, records)
    move(memory, pg, tmp_path)
    assert compare_collections(memory, "docs", pg, "docs").agrees
    move(pg, folder, tmp_path)
    assert by_id(read_all(folder, "docs")) == by_id(records)
    pg.drop("docs")


def test_a_filter_keeps_to_what_is_in_scope(memory, without, tmp_path):
    """Two namespaces share ids, but not of the records that are in scope."""
    records = [replace(r, metadata={**r.metadata, "space": r.namespace}) for r in repeated()]
    load(memory, SCHEMA, records)
    migration = prepared(memory, without, tmp_path, filter={"space": "b"})
    assert run_migration(migration).status == "complete"
    assert migration.plan.id_strategy == IdStrategy.NATIVE
    _goes_back(without, memory, [r for r in records if r.namespace == "b"], tmp_path)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────


def test_names_that_the_target_refuses_stop_the_plan(memory, tmp_path):
    class Letters(MemoryStore):
        def accepts_namespace(self, name: str) -> bool:
            return name.isalpha()

    load(memory, SCHEMA, repeated(2))
    target = Letters(name=f"{memory.name}-letters")
    with pytest.raises(ConfigurationError, match=r"refuses 1 of 3 names of namespaces: ''; move each"):
        move(memory, target, tmp_path)
    assert target.list_collections() == []


def test_a_collection_without_namespaces_is_not_read_by_one(folder):
    load(folder, plain_schema("docs"), plain_records(2))
    with pytest.raises(ConfigurationError, match="no namespaces; leave"):
        ParquetStore(path=folder.path, namespace="a").count("docs")


def test_records_without_namespaces_come_into_the_default_one(memory, folder, tmp_path):
    load(folder, SCHEMA, [])
    load(memory, plain_schema("docs"), records := plain_records(3))
    move(memory, folder, tmp_path)
    assert by_id(read_all(folder, "docs")) == by_id(replace(r, namespace="") for r in records)


def test_validate_tells_namespaces_apart_by_its_exit_status(folder, tmp_path, shell):
    load(folder, SCHEMA, records := repeated(3))
    other = ParquetStore(path=tmp_path / "other")
    load(other, SCHEMA, records)
    compared = ("validate", "--source", folder.address("docs"), "--target", other.address("docs"))
    assert shell(*compared).status == 0
    other.upsert("docs", to_batch([replace(records[0], document="other")], SCHEMA))
    assert shell(*compared).status == 3


def test_a_null_is_the_default_namespace(memory, folder):
    for store in (memory, folder):
        schema = CollectionSchema(**{**SCHEMA.model_dump(), "name": "nulls"})
        load(store, schema, [replace(r, namespace=None) for r in plain_records(2)])
        assert [r.namespace for r in read_all(store, "nulls")] == ["", ""]
