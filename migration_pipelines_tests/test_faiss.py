"""Collections of our own in FAISS files: which index they get, and that they are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from migration_pipelines.errors import (
    CollectionNotFoundError,
    ConfigurationError,
    DiskFullError,
    IncompleteError,
    MissingDriverError,
    RecordRejectedError,
    StoreRefusedError,
    UnsupportedOperationError,
)
from migration_pipelines.filters import parse
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import CollectionSchema, DType, Metric, VectorField
from migration_pipelines.store import open_address
from migration_pipelines.stores.faiss import FaissStore, build, collection
from migration_pipelines_tests.conformance import assert_same, ids_of, load, read_all, scanned, spans_of
from migration_pipelines_tests.harnesses.faiss import Faiss
from migration_pipelines_tests.harnesses.memory import Memory
from migration_pipelines_tests.records import Record, from_batches, plain_records, plain_schema, to_batch
from migration_pipelines_tests.shell import Shell, fill, shell

__all__ = ["shell"]


@pytest.fixture
def store(tmp_path: Path) -> FaissStore:
    return FaissStore(path=tmp_path / "faiss")


def native(store: FaissStore, name: str = "docs") -> Any:
    """The collection's index as FAISS reads it."""
    manifest = json.loads((store.path / name / "_collection.json").read_text())
    return faiss.read_index(str(store.path / name / manifest["index"]["name"]))


def files(store: FaissStore, name: str = "docs") -> list[str]:
    return sorted(path.name for path in (store.path / name).iterdir())


# ── which index ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asked", "kind"),
    [("flat", faiss.IndexFlatL2), ("hnsw", faiss.IndexHNSWFlat), ("ivf", faiss.IndexIVFFlat)],
)
def test_the_address_chooses_the_index_and_every_kind_keeps_every_bit(
    asked: str, kind: type, tmp_path: Path
) -> None:
    store, name = open_address(f"faiss:{tmp_path}/root?index={asked}#docs")
    assert isinstance(store, FaissStore)
    assert store.address(name) == f"faiss:{tmp_path}/root?index={asked}#docs"
    records = plain_records(500)
    load(store, plain_schema("docs"), records)
    assert type(native(store)) is kind
    assert store.describe("docs").vectors[0].index["type"] == asked
    assert_same(read_all(store, "docs"), records, store)
    assert store.search("docs", records[7].vectors[""], limit=1)[0] == (records[7].id, 0.0)

    newer = plain_records(50, start=480, seed=5)
    store.upsert("docs", to_batch(newer, plain_schema("docs")))
    store.delete("docs", ids_of(records[100:110]))
    expected = [*records[:100], *records[110:480], *newer]
    assert_same(read_all(store, "docs"), expected, store)
    assert_same(Faiss(store).read("docs"), expected, store)
    assert type(native(store)) is kind


@pytest.mark.parametrize("metric", [Metric.EUCLIDEAN, Metric.DOT, Metric.COSINE, Metric.MANHATTAN])
@pytest.mark.parametrize("asked", ["flat", "hnsw", "ivf"])
def test_each_index_is_searched_by_the_metric_of_the_collection(
    asked: str, metric: Metric, tmp_path: Path
) -> None:
    store = FaissStore.model_validate({"path": tmp_path, "index": asked})
    records = plain_records(400)
    load(store, plain_schema("docs", metric=metric), records)
    matrix = np.stack([record.vectors[""] for record in records]).astype(float)
    query = matrix[9] + 0.01
    expected = {
        Metric.EUCLIDEAN: np.linalg.norm(matrix - query, axis=1),
        Metric.MANHATTAN: np.abs(matrix - query).sum(axis=1),
        Metric.DOT: -(matrix @ query),
        Metric.COSINE: 1 - matrix @ query / np.linalg.norm(matrix, axis=1) / np.linalg.norm(query),
    }[metric]
    found = store.search("docs", query.astype(np.float32), limit=3)
    row = int(found[0][0][4:])
    assert found[0][1] == pytest.approx(expected[row], abs=1e-4)
    assert row in np.argsort(expected)[: 1 if metric is not Metric.DOT else 5]
    where = {"n": {"$gte": 200}}
    filtered = store.search("docs", query.astype(np.float32), limit=3, where=parse(where))
    assert all(int(name[4:]) >= 200 for name, _ in filtered)


def test_the_index_is_chosen_by_size_by_the_source_and_by_the_user() -> None:
    field = VectorField(dimensions=8, metric=Metric.EUCLIDEAN)
    sizes = {
        100: "flat",
        build.FLAT_RECORDS: "flat",
        build.FLAT_RECORDS + 1: "hnsw",
        build.HNSW_RECORDS: "hnsw",
        build.HNSW_RECORDS + 1: "ivf",
    }
    for count, kind in sizes.items():
        assert build.choose(field, build.Shape(count=count), None)["type"] == kind
        assert build.choose(field, build.Shape(count=count), "flat")["type"] == "flat"
    graph = field.model_copy(update={"index": {"type": "hnsw", "m": 5, "ef_construction": 7}})
    found = build.choose(graph, build.Shape(count=100), None)
    assert found == {"type": "hnsw", "m": 5, "ef_construction": 7}
    assert build.choose(field, build.Shape(count=10), "ivf")["type"] == "flat"  # too few to train
    huge = build.Shape(count=build.HNSW_RECORDS, greatest=1e30)
    assert build.choose(field, huge, "hnsw")["type"] == "flat"  # squares overflow


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "any-length"])
def test_cosine_vectors_keep_their_length_and_are_searched_normalised(unit: bool, store: FaissStore) -> None:
    records = plain_records(50)
    if unit:
        records = [
            replace(r, vectors={"": (r.vectors[""] / np.linalg.norm(r.vectors[""])).astype(np.float32)})
            for r in records
        ]
    else:
        records[3] = replace(records[3], vectors={"": np.zeros(8, np.float32)})
    load(store, plain_schema("docs", metric=Metric.COSINE), records)
    assert_same(read_all(store, "docs"), records, store)
    manifest = json.loads((store.path / "docs" / "_collection.json").read_text())
    assert manifest["normalised"] is not unit
    stored = "vector" in pq.read_schema(store.path / "docs" / "records.parquet").names
    assert stored is not unit
    lengths = np.linalg.norm(native(store).reconstruct_n(0, 50), axis=1)
    assert np.allclose(np.delete(lengths, 3), 1)
    found = store.search("docs", records[9].vectors[""] * 100, limit=1)
    assert found[0][0] == records[9].id
    assert found[0][1] == pytest.approx(0, abs=1e-6)


# ── whole or not at all ──────────────────────────────────────────────────────────────────────────────


def begun(store: FaissStore, records: list[Record], *, parts: int = 2) -> None:
    """A collection that is being loaded in parts."""
    store.create(plain_schema("docs"))
    size = len(records) // parts
    for part in range(parts):
        with store.load_part("docs", f"{part}") as write:
            write(to_batch(records[part * size : part * size + size], plain_schema("docs")))


def test_nothing_of_a_load_is_a_source_before_it_is_finished(store: FaissStore) -> None:
    records = plain_records(30)
    begun(store, records)
    assert files(store) == [".loading"]
    assert store.count("docs") == 30
    assert store.describe("docs").options["finished"] is False
    for read in (
        lambda: list(store.split("docs", span_records=10)),
        lambda: store.fingerprint("docs"),
        lambda: store.search("docs", np.ones(8), limit=1),
    ):
        with pytest.raises(IncompleteError, match="never finished"):
            read()
    store.finish_load("docs")
    assert files(store) == ["_collection.json", "index.faiss", "records.parquet"]
    assert_same(read_all(store, "docs"), records, store)


def test_while_it_is_loaded_the_later_of_two_parts_counts(store: FaissStore) -> None:
    records, newer = plain_records(30), plain_records(30, seed=9)
    begun(store, records)
    store.upsert("docs", to_batch(newer[5:8], plain_schema("docs")))
    store.delete("docs", ids_of([newer[0], newer[6]]))
    expected = [*records[1:5], newer[5], newer[7], *records[8:]]
    assert store.count("docs") == len(expected)
    store.finish_load("docs")
    assert_same(read_all(store, "docs"), expected, store)


def stage(store: FaissStore, part: str, records: list[Record]) -> None:
    with store.load_part("docs", part) as write:
        write(to_batch(records, plain_schema("docs")))


def test_parts_loaded_into_a_collection_become_a_part_of_it_at_once(store: FaissStore) -> None:
    records, newer = plain_records(60), plain_records(40, start=40, seed=3)
    load(store, plain_schema("docs"), records)
    spans = spans_of(store, "docs", 25)
    stage(store, "0", [*newer[::-2], *records[:3]])
    stage(store, "1", newer[::2])
    stage(store, "1", [*newer[::2], newer[1]])
    assert_same(read_all(store, "docs"), records, store)
    asked = [newer[7], records[20]]
    assert_same(from_batches([store.read_part("docs", "0", ids_of(asked))]), asked, store)
    store.finish_load("docs")
    assert len(files(store)) == 3
    assert_same(read_all(store, "docs"), [*records[:40], *newer], store)
    # A record that was replaced keeps its number: what was read before meets it where it was.
    assert_same(from_batches(scanned(store, "docs", spans[:2])), [*records[:40], *newer[:10]], store)


def test_an_empty_part_changes_nothing(store: FaissStore) -> None:
    load(store, plain_schema("docs"), records := plain_records(5))
    before = store.fingerprint("docs")
    stage(store, "0", [])
    store.finish_load("docs")
    assert store.fingerprint("docs") == before
    assert_same(read_all(store, "docs"), records, store)
    assert len(files(store)) == 3


def test_finishing_again_removes_what_a_killed_writer_left(store: FaissStore) -> None:
    load(store, plain_schema("docs"), records := plain_records(5))
    (store.path / "docs" / ".index~2.faiss.tmp").touch()
    store.finish_load("docs")
    assert len(files(store)) == 3
    assert_same(read_all(store, "docs"), records, store)


def test_what_is_staged_is_put_in_before_anything_else_changes_the_collection(store: FaissStore) -> None:
    records, newer = plain_records(20), plain_records(10, start=15, seed=3)
    load(store, plain_schema("docs"), records)
    stage(store, "0", newer)
    store.delete("docs", ids_of(newer[:2]))
    assert_same(read_all(store, "docs"), [*records[:15], *newer[2:]], store)
    stage(store, "1", newer)
    store.upsert("docs", to_batch(records[15:16], plain_schema("docs")))
    assert_same(read_all(store, "docs"), [*records[:16], *newer[1:]], store)


def test_a_part_is_written_while_others_publish(store: FaissStore) -> None:
    records = plain_records(30)
    load(store, plain_schema("docs"), records[:10])
    with store.load_part("docs", "0") as write:
        write(to_batch(records[10:20], plain_schema("docs")))
        FaissStore(path=store.path).upsert("docs", to_batch(records[20:], plain_schema("docs")))
    store.finish_load("docs")
    assert_same(read_all(store, "docs"), records, store)
    assert len(files(store)) == 3


def test_a_load_of_more_parts_than_files_may_be_open(store: FaissStore) -> None:
    records, soft = plain_records(120), resource.getrlimit(resource.RLIMIT_NOFILE)
    schema = plain_schema("docs")
    store.create(schema)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 30, soft[1]))
    try:
        for number, record in enumerate(records):
            with store.load_part("docs", str(number)) as write:
                write(to_batch([record], schema))
        assert store.count("docs") == 120
        for number in (0, 60, 119):
            found = store.read_part("docs", str(number), ids_of([records[number]]))
            assert_same(from_batches([found]), [records[number]], store)
        store.finish_load("docs")
        assert_same(read_all(store, "docs"), records, store)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, soft)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_files_of_a_load_of_one_part_become_the_collection(
    links: bool, store: FaissStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    begun(store, records := plain_records(30), parts=1)
    staged = {path.stat().st_ino for path in (store.path / "docs" / ".loading").iterdir()}
    store.finish_load("docs")
    kept = {(store.path / "docs" / name).stat().st_ino for name in ("index.faiss", "records.parquet")}
    assert kept <= staged if links else kept.isdisjoint(staged)
    assert_same(read_all(store, "docs"), records, store)
    newer = plain_records(10, start=25, seed=8)
    store.upsert("docs", to_batch(newer, plain_schema("docs")))
    assert_same(read_all(store, "docs"), [*records[:25], *newer], store)


def test_one_part_that_holds_an_id_twice_is_loaded_with_the_later_record(store: FaissStore) -> None:
    records, newer = plain_records(30), plain_records(30, seed=9)
    begun(store, [*records, newer[7]], parts=1)
    store.finish_load("docs")
    assert_same(read_all(store, "docs"), [*records[:7], newer[7], *records[8:]], store)


def test_a_removal_while_loading_leaves_the_order_of_the_parts(store: FaissStore) -> None:
    records, newer = plain_records(20), plain_records(10, start=5, seed=9)
    begun(store, records)
    store.upsert("docs", to_batch(newer, plain_schema("docs")))
    for gone in (records[0], records[1]):  # twice out of the oldest part, whose others stay older
        store.delete("docs", ids_of([gone]))
    store.finish_load("docs")
    assert_same(read_all(store, "docs"), [*records[2:5], *newer, *records[15:]], store)


def test_spans_hold_while_records_are_replaced_added_and_removed(store: FaissStore) -> None:
    records = plain_records(60)
    load(store, plain_schema("docs"), records)
    store.delete("docs", ids_of(records[:10]))
    spans = spans_of(store, "docs", 20)
    newer = plain_records(3, start=30, seed=4)
    store.delete("docs", ids_of(records[20:25]))
    store.upsert("docs", to_batch([*newer, *plain_records(5, start=900)], plain_schema("docs")))
    found = from_batches(scanned(store, "docs", spans))
    assert_same(found, [*records[10:20], *records[25:30], *newer, *records[33:]], store)


def test_a_writer_killed_anywhere_leaves_the_old_collection_or_the_new(
    store: FaissStore, tmp_path: Path
) -> None:
    """Killed before each change to the file system in turn, and finished by the next writer."""
    records, newer = plain_records(30), plain_records(10, start=25, seed=8)
    load(store, plain_schema("docs"), records)
    after = [*records[:25], *newer]

    def upsert() -> None:
        FaissStore(path=store.path).upsert("docs", to_batch(newer, plain_schema("docs")))

    kills = 0
    while killed_at(kills, upsert):
        again = FaissStore(path=store.path)
        found = read_all(again, "docs")
        assert_same(found, records if len(found) == 30 else after, store)
        kills += 1
        if len(found) == 35:  # published: begin again from the old state
            again.delete("docs", ids_of(newer))
            again.upsert("docs", to_batch(records[25:], plain_schema("docs")))
    assert kills >= 6
    assert_same(read_all(store, "docs"), after, store)
    assert len(files(store)) == 3


@pytest.mark.parametrize("parts", [1, 2])
def test_a_first_load_killed_anywhere_is_finished_by_running_it_again(parts: int, store: FaissStore) -> None:
    records = plain_records(30)
    kills = 0
    while True:
        begun(store, records, parts=parts)
        if not killed_at(kills, lambda: FaissStore(path=store.path).finish_load("docs")):
            break
        assert FaissStore(path=store.path).count("docs") == 30
        store.finish_load("docs")
        assert_same(read_all(FaissStore(path=store.path), "docs"), records, store)
        assert len(files(store)) == 3
        store.drop("docs")
        assert not (store.path / "docs").exists()
        kills += 1
    assert kills >= 4


def test_a_merge_killed_anywhere_is_finished_by_running_it_again(store: FaissStore) -> None:
    records, newer = plain_records(30), plain_records(20, start=20, seed=8)
    after, kills = [*records[:20], *newer], 0

    def merge(store: FaissStore) -> None:
        stage(store, "0", newer[:12])
        stage(store, "1", newer[12:])
        store.finish_load("docs")

    while True:
        load(store, plain_schema("docs"), records)
        if not killed_at(kills, lambda: merge(FaissStore(path=store.path))):
            break
        again = FaissStore(path=store.path)
        found = read_all(again, "docs")
        assert_same(found, records if len(found) == 30 else after, store)
        merge(again)
        assert_same(read_all(again, "docs"), after, store)
        assert len(files(store)) == 3
        store.drop("docs")
        kills += 1
    assert kills >= 15


def killed_at(step: int, action: Callable[[], None]) -> bool:
    """Do it in a process that kills itself before the change to the file system of that number."""
    child = os.fork()
    if not child:
        left = [step]

        def counting(change: Callable[..., Any]) -> Callable[..., Any]:
            def changed(*args: Any, **options: Any) -> Any:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return change(*args, **options)

            return changed

        for name in ("rename", "unlink", "mkdir", "hardlink_to"):
            setattr(Path, name, counting(getattr(Path, name)))
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_a_reader_goes_on_with_what_it_opened(store: FaissStore) -> None:
    records = plain_records(40)
    load(store, plain_schema("docs"), records)
    (span, _), *_ = spans_of(store, "docs", 40)
    reading = store.scan("docs", span, batch_records=10)
    first = next(reading)
    FaissStore(path=store.path).delete("docs", ids_of(records[20:]))
    assert_same(from_batches([first, *reading]), records, store)
    assert store.count("docs") == 20


def test_a_full_disk_is_told_and_leaves_the_old_collection(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = plain_records(10)
    load(store, plain_schema("docs"), records)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(collection, "_sync", full)
        with pytest.raises(DiskFullError, match="no room"):
            store.upsert("docs", to_batch(plain_records(5, start=50), plain_schema("docs")))
    assert_same(read_all(store, "docs"), records, store)
    assert sum(path.is_file() for path in (store.path / "docs").rglob("*")) == 3


@pytest.mark.parametrize("what", ["vectors", "texts"])
def test_a_disk_that_is_full_while_a_part_is_written_is_told(what: str, store: FaissStore) -> None:
    before, rng = plain_records(20), np.random.default_rng(0)
    schema = plain_schema("docs", dimensions=4_000 if what == "vectors" else 8)
    long = 20_000 if what == "texts" else 1
    large = [
        Record(
            id=f"n{number}",
            vectors={"": rng.random(schema.vectors[0].dimensions or 0, np.float32)},
            document=rng.bytes(long).hex(),
        )
        for number in range(20)
    ]
    if what == "texts":
        load(store, schema, before)
    else:
        store.create(schema)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskFullError, match="make room"), store.load_part("docs", "1") as write:
            write(to_batch(large, schema))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    left = {path.name for path in (store.path / "docs").rglob("*") if path.is_file()}
    assert left <= {"_collection.json", "index.faiss", "records.parquet"}
    with store.load_part("docs", "1") as write:
        write(to_batch(large, schema))
    store.finish_load("docs")
    assert store.count("docs") == (40 if what == "texts" else 20)


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("file", ["index.faiss", "records.parquet"])
@pytest.mark.parametrize("damage", ["cut", "gone", "of-another"])
def test_a_damaged_file_is_named_and_nothing_is_skipped(file: str, damage: str, store: FaissStore) -> None:
    load(store, plain_schema("docs"), plain_records(40))
    path = store.path / "docs" / file
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[:-10])
    else:
        load(store, plain_schema("other"), plain_records(39))
        path.write_bytes((store.path / "other" / file).read_bytes())
    with pytest.raises(StoreRefusedError, match=file):
        store.count("docs")


def test_a_page_that_was_changed_is_refused(store: FaissStore) -> None:
    load(store, plain_schema("docs"), plain_records(40))
    path = store.path / "docs" / "records.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(StoreRefusedError, match=r"records\.parquet"):
        read_all(store, "docs")


def test_a_manifest_of_something_else_is_refused(store: FaissStore) -> None:
    load(store, plain_schema("docs"), plain_records(4))
    path = store.path / "docs" / "_collection.json"
    text = path.read_text()
    for changed in (
        "{",
        text.replace('"format": 1', '"format": 2'),
        text.replace("index.faiss", "../x.faiss"),
    ):
        path.write_text(changed)
        with pytest.raises(StoreRefusedError, match=r"_collection\.json"):
            store.count("docs")


def test_what_no_index_can_hold_is_refused(store: FaissStore) -> None:
    like = plain_schema("docs")
    (field,) = like.vectors
    for vectors in (
        (field, field.model_copy(update={"name": "other"})),
        (field.model_copy(update={"dtype": DType.BIT}),),
        (field.model_copy(update={"dtype": DType.BIT, "metric": Metric.HAMMING, "dimensions": 12}),),
        (field.model_copy(update={"metric": Metric.HAMMING}),),
    ):
        with pytest.raises(UnsupportedOperationError):
            store.create(like.model_copy(update={"vectors": vectors}))
    assert store.list_collections() == []


def test_vectors_without_a_place_in_space_are_rejected_by_id(store: FaissStore) -> None:
    load(store, plain_schema("docs"), plain_records(4))
    bad = replace(plain_records(1, start=50)[0], vectors={"": np.full(8, np.nan, np.float32)})
    with pytest.raises(RecordRejectedError, match=r"doc#00050"):
        store.upsert("docs", to_batch([*plain_records(3, start=60), bad], plain_schema("docs")))
    assert store.count("docs") == 4


def test_a_missing_driver_names_the_extra(store: FaissStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FaissStore(path=store.path, index="hnsw")
    begun(store, plain_records(4))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDriverError, match=r"migration-pipelines\[faiss\]"):
        store.finish_load("docs")


def test_flat_collections_are_written_and_read_without_the_driver(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    load(store, plain_schema("docs"), records := plain_records(20))
    assert_same(read_all(FaissStore(path=store.path), "docs"), records, store)


def test_addresses(tmp_path: Path) -> None:
    fill(f"faiss:{tmp_path}/root#docs")
    for text, path, name in [
        (f"faiss:{tmp_path}/root#docs", tmp_path / "root", "docs"),
        (f"faiss:{tmp_path}/root/docs", tmp_path / "root", "docs"),
        (f"faiss:{tmp_path}/root", tmp_path / "root", "docs"),
        (f"faiss:{tmp_path}/root/", tmp_path / "root", None),
        (f"faiss:{tmp_path}/new", tmp_path, "new"),
        (f"faiss:{tmp_path}/new/", tmp_path / "new", None),
        (f"faiss:{tmp_path}/new.faiss", tmp_path / "new.faiss", "new"),
    ]:
        store, found = open_address(text)
        assert (getattr(store, "path", None), found) == (path, name)
    for text in ("faiss:x?index=annoy#docs", "faiss:x?frob=1#docs", "faiss:s3://bucket/x#docs"):
        with pytest.raises(ConfigurationError):
            open_address(text)
    for name in ("..", "a/b", ".loading"):
        with pytest.raises((ConfigurationError, CollectionNotFoundError)):
            FaissStore(path=tmp_path / "root").count(name)


# ── through the engine ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("index", ["flat", "hnsw", "ivf"])
def test_a_collection_moves_there_and_back(index: str, metric: str, tmp_path: Path) -> None:
    with Memory.start(tmp_path) as memory:
        records = plain_records(300)
        memory.write(plain_schema("there", metric=Metric(metric)), records)
        there, back = f"faiss:{tmp_path}/root?index={index}#docs", memory.store.address("back")
        for number, (source, target) in enumerate([(memory.store.address("there"), there), (there, back)]):
            config = MigrationConfig(source=source, target=target, partition_size=70, batch_size=30)
            home = ledger_for(config, tmp_path / f"home{number}")
            report = run_migration(Migration(config=config, ledger=home))
            assert report.status == "complete"
            assert report.records["verified"] == 300
        assert_same(memory.read("back"), records, memory.store)


def test_a_migration_merges_into_a_finished_collection(shell: Shell) -> None:
    fill("parquet:source#docs", plain_records(50, start=30, seed=2))
    fill("faiss:target#docs", plain_records(40))
    found = shell("run", "--source", "parquet:source#docs", "--target", "faiss:target#docs")
    assert found.status == 2
    assert "holds 40 records" in found.err
    arguments = ("--on-existing", "merge", "--partition-size", "20")
    found = shell("run", "--source", "parquet:source#docs", "--target", "faiss:target#docs", *arguments)
    assert found.status == 0
    store, _ = open_address("faiss:target#docs")
    assert_same(read_all(store, "docs"), [*plain_records(30), *plain_records(50, start=30, seed=2)], store)


def test_poison_records_are_set_aside_and_the_others_arrive(shell: Shell, tmp_path: Path) -> None:
    records = plain_records(30)
    records[7] = replace(records[7], vectors={"": np.full(8, np.inf, np.float32)})
    fill("parquet:source#docs", records)
    found = shell("run", "--source", "parquet:source#docs", "--target", "faiss:target#docs")
    assert found.status == 1
    assert "29 of 30 records verified" in found.err
    (rejects,) = tmp_path.rglob("rejects/*.parquet")
    assert pq.read_table(rejects).column("id").to_pylist() == [records[7].id]
    store, _ = open_address("faiss:target#docs")
    assert store.count("docs") == 29


def test_collections_of_bits_move(tmp_path: Path) -> None:
    field = VectorField(dimensions=32, dtype=DType.BIT, metric=Metric.HAMMING)
    schema = CollectionSchema(name="docs", vectors=(field,), id_kinds=plain_schema("x").id_kinds)
    rng = np.random.default_rng(0)
    records = [replace(r, vectors={"": rng.integers(0, 256, 4).astype(np.uint8)}) for r in plain_records(40)]
    store = FaissStore(path=tmp_path)
    load(store, schema, records)
    assert_same(read_all(store, "docs"), records, store)
    query = np.unpackbits(records[11].vectors[""]).astype(np.float32)
    assert store.search("docs", query, limit=1) == [(records[11].id, 0.0)]
