"""What is special to Parquet folders: publishing, crashes, damage, other tools' files, names."""

from __future__ import annotations

import json
import resource
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migration_pipelines import batch as batches
from migration_pipelines import filters
from migration_pipelines.errors import (
    ConfigurationError,
    DiskFullError,
    IncompleteError,
    StoreRefusedError,
    UnsupportedOperationError,
    UsageError,
)
from migration_pipelines.model import IdKind
from migration_pipelines.store import open_address
from migration_pipelines.stores.parquet import ParquetStore
from migration_pipelines_tests.conformance import assert_same, ids_of, load, read_all, scanned, spans_of
from migration_pipelines_tests.harnesses.parquet import Parquet
from migration_pipelines_tests.records import Record, from_batches, plain_records, plain_schema, to_batch

SCHEMA = plain_schema("docs")


class Killed(BaseException):
    """What the process would not live to see."""


@pytest.fixture
def store(tmp_path):
    return ParquetStore(path=tmp_path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "docs"


def visible(folder: Path) -> list[Record]:
    """What any reader of Parquet folders finds."""
    return Parquet(ParquetStore(path=folder.parent)).read(folder.name)


def kill_at(monkeypatch, step: int) -> list[str]:
    """From the given change of a file's name on, nothing is changed any more; return what was changed."""
    done: list[str] = []

    def dying(original):
        def change(path, *arguments, **options):
            if len(done) >= step:
                raise Killed
            done.append(f"{original.__name__} {path.name}")
            return original(path, *arguments, **options)

        return change

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    return done


def steps_of(change, tmp_path, monkeypatch):
    """Yield a store for each step at which `change` can be killed, just after that."""
    for step in range(100):
        store = ParquetStore(path=tmp_path / str(step))
        prepared = change.prepare(store)
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            try:
                change.run(store, prepared)
            except Killed:
                finished = False
            else:
                finished = True
        yield step, store, prepared, finished
        if finished:
            return
    raise AssertionError("never finished")


# ── loading and publishing ───────────────────────────────────────────────────────────────────────────


def test_a_load_is_invisible_until_it_is_finished(store, folder):
    records = plain_records(40)
    store.create(SCHEMA)
    with store.load_part("docs", "0") as write:
        write(to_batch(records, SCHEMA))
        assert store.count("docs") == 0
    assert store.count("docs") == 40
    assert_same(from_batches([store.read_part("docs", "0", ids_of(records))]), records, store)
    assert store.describe("docs").options == {"finished": False}
    assert list(folder.glob("*")) == [folder / ".loading"]
    for read in (lambda: list(store.split("docs", span_records=9)), lambda: store.fingerprint("docs")):
        with pytest.raises(IncompleteError, match="never finished"):
            read()

    store.finish_load("docs")
    assert store.describe("docs") == SCHEMA
    assert sorted(path.name for path in folder.iterdir()) == ["_collection.json", "part-0.parquet"]
    assert_same(visible(folder), records, store)


class Finishing:
    """The end of a load of three parts."""

    def prepare(self, store):
        records = plain_records(30)
        store.create(SCHEMA)
        for part in range(3):
            with store.load_part("docs", str(part)) as write:
                write(to_batch(records[part * 10 : part * 10 + 10], SCHEMA))
        return records

    def run(self, store, _):
        store.finish_load("docs")


def test_a_load_killed_at_any_step_of_its_end_is_unfinished_or_whole(tmp_path, monkeypatch):
    outcomes = set()
    for _, store, records, _finished in steps_of(Finishing(), tmp_path, monkeypatch):
        loading = store.describe("docs").options == {"finished": False}
        outcomes.add(loading)
        assert store.count("docs") == 30
        if not loading:
            assert_same(read_all(store, "docs"), records, store)
        store.begin_load("docs")
        for _ in range(2):
            store.finish_load("docs")
        assert_same(read_all(store, "docs"), records, store)
        assert_same(visible(store.path / "docs"), records, store)
        assert not (store.path / "docs" / ".loading").exists()
    assert outcomes == {True, False}


class Replacing:
    """An upsert into a finished collection of two files, which changes both and adds records."""

    def prepare(self, store):
        load(store, SCHEMA, plain_records(20))
        with store.load_part("docs", "1") as write:
            write(to_batch(plain_records(40)[20:], SCHEMA))
        return plain_records(45, seed=9)[15:]

    def run(self, store, newer):
        store.upsert("docs", to_batch(newer, SCHEMA))


def test_an_upsert_killed_at_any_step_leaves_the_old_state_or_the_new(tmp_path, monkeypatch):
    outcomes = set()
    for _, store, newer, _finished in steps_of(Replacing(), tmp_path, monkeypatch):
        old, new = plain_records(40), [*plain_records(15), *newer]
        is_new = store.count("docs") == len(new)
        outcomes.add(is_new)
        assert_same(read_all(store, "docs"), new if is_new else old, store)
        store.upsert("docs", to_batch(newer, SCHEMA))
        assert_same(read_all(store, "docs"), new, store)
        assert_same(visible(store.path / "docs"), new, store)
        store.finish_load("docs")
        assert not (store.path / "docs" / ".loading").exists()
    assert outcomes == {True, False}


class Dropping:
    """The removal of a finished collection."""

    def prepare(self, store):
        load(store, SCHEMA, plain_records(20))

    def run(self, store, _):
        store.drop("docs")


def test_a_drop_killed_at_any_step_can_be_done_again(tmp_path, monkeypatch):
    for _, store, _, _finished in steps_of(Dropping(), tmp_path, monkeypatch):
        if store.list_collections():
            store.drop("docs")
        assert store.list_collections() == []
        assert not [path for path in store.path.rglob("*") if path.is_file()]
        load(store, SCHEMA, plain_records(2))
        assert store.count("docs") == 2


def test_a_part_that_is_written_again_replaces_what_it_wrote_before(store):
    store.create(SCHEMA)
    for records in (plain_records(30), plain_records(10, seed=4)):
        with store.load_part("docs", "0") as write:
            write(to_batch(records, SCHEMA))
    store.finish_load("docs")
    assert_same(read_all(store, "docs"), plain_records(10, seed=4), store)


def test_a_part_that_fails_leaves_nothing_and_its_error_is_not_disguised(store, folder):
    store.create(SCHEMA)
    records = to_batch(plain_records(5), SCHEMA)

    def fail():
        with store.load_part("docs", "0") as write:
            write(records)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.count("docs") == 0
    assert [path.name for path in (folder / ".loading").iterdir()] == ["_collection.json"]


def test_a_batch_that_is_refused_leaves_the_part_usable(store):
    records = plain_records(10)
    lacking = to_batch(records[5:], SCHEMA).drop_columns(["document"])
    store.create(SCHEMA)
    with store.load_part("docs", "0") as write:
        write(to_batch(records[:5], SCHEMA))
        with pytest.raises(UsageError, match="document"):
            write(lacking)
        write(to_batch(records[5:], SCHEMA))
    store.finish_load("docs")
    assert_same(read_all(store, "docs"), records, store)


def test_a_worker_that_comes_late_is_harmless(store, folder):
    store.create(SCHEMA)
    with store.load_part("docs", "0") as write:
        write(to_batch(plain_records(10), SCHEMA))

    def write_late():
        with store.load_part("docs", "0") as late:
            late(to_batch(plain_records(10, seed=8), SCHEMA))
            store.finish_load("docs")

    with pytest.raises(StoreRefusedError):
        write_late()
    assert_same(visible(folder), plain_records(10), store)


def test_the_manifest_carries_counts_and_the_digest_of_the_records(store, folder):
    load(store, SCHEMA, plain_records(50))
    newer = plain_records(60, seed=2)[40:]
    store.upsert("docs", to_batch(newer, SCHEMA))
    expected = [*plain_records(40), *newer]

    manifest = json.loads((folder / "_collection.json").read_text())
    assert manifest["records"] == 60
    assert int(manifest["digest"], 16) == batches.digest([to_batch(expected, SCHEMA)])
    assert manifest["metrics"] == {"vector": "euclidean"}
    assert manifest["schema"]["vectors"][0]["dimensions"] == 8


def test_files_are_compressed_split_by_byte_and_of_bounded_row_groups(store, folder):
    schema = plain_schema("docs", dimensions=256)
    n = 10_000
    ids, kinds = batches.id_columns([f"{number}" for number in range(n)])
    vectors = batches.dense_vectors(np.random.default_rng(0).random((n, 256)).astype(np.float32))
    texts = pa.nulls(n, pa.string())
    store.create(schema)
    with store.load_part("docs", "0") as write:
        columns = [ids, kinds, vectors, texts, texts]
        write(pa.RecordBatch.from_arrays(columns, schema=batches.arrow_schema(schema)))
    store.finish_load("docs")

    metadata = pq.ParquetFile(folder / "part-0.parquet").metadata
    column = metadata.row_group(0).column(2)
    assert column.path_in_schema == "vector.list.element"
    assert column.compression == "ZSTD"
    assert "BYTE_STREAM_SPLIT" in column.encodings
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    assert all(group.num_rows <= 8192 and group.total_byte_size <= 9 * 2**20 for group in groups)
    assert sum(group.num_rows for group in groups) == n


def test_writers_at_once_lose_nothing_and_readers_meanwhile_see_whole_states(store):
    load(store, SCHEMA, first := plain_records(40))
    newer = plain_records(120, seed=5)

    def write(start):
        store.upsert("docs", to_batch(newer[start : start + 10], SCHEMA))

    def read(_):
        return store.fetch("docs", ids_of(first)).num_rows, store.count("docs") % 10

    with ThreadPoolExecutor(6) as pool:
        reading = [pool.submit(read, number) for number in range(12)]
        list(pool.map(write, range(0, 120, 10)))
        assert all(future.result() == (40, 0) for future in reading)
    assert_same(read_all(store, "docs"), newer, store)


def test_dropping_leaves_what_is_not_of_the_collection(store, folder):
    load(store, SCHEMA, plain_records(3))
    (folder / "notes.txt").write_text("mine")
    store.drop("docs")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert store.list_collections() == []


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink], ids=["cut", "one-bit", "gone"])
def test_a_damaged_file_is_told_by_its_name_and_never_skipped(store, folder, damage):
    load(store, SCHEMA, plain_records(3000))
    spans = spans_of(store, "docs", 100)
    damage(folder / "part-0.parquet")

    with pytest.raises(StoreRefusedError, match=r"part-0\.parquet"):
        list(scanned(store, "docs", spans))
    with pytest.raises(StoreRefusedError, match=r"part-0\.parquet"):
        store.fetch("docs", ids_of(plain_records(3000)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": 2}, "format 1"),
        (
            {"files": [{"name": "../x.parquet", "records": 1, "bytes": 1, "digest": "0"}]},
            "isn't a file of this",
        ),
        ({"replaced": ["/etc/passwd"]}, "isn't a file of this folder"),
        ({"schema": None}, "damaged"),
    ],
)
def test_a_manifest_that_can_not_be_trusted_is_refused(store, folder, change, expected):
    load(store, SCHEMA, plain_records(3))
    path = folder / "_collection.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StoreRefusedError, match=expected):
        store.describe("docs")


def test_a_full_disk_is_told_and_leaves_what_was_there(store, folder):
    load(store, SCHEMA, before := plain_records(20))
    rng = np.random.default_rng(0)
    large = [
        Record(id=f"n{number}", vectors={"": np.ones(8, np.float32)}, document=rng.bytes(20_000).hex())
        for number in range(20)
    ]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskFullError, match="make room"):
            store.upsert("docs", to_batch(large, SCHEMA))
        with pytest.raises(DiskFullError, match="make room"), store.load_part("docs", "1") as write:
            write(to_batch(large, SCHEMA))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert_same(read_all(store, "docs"), before, store)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "_collection.json",
        "part-0.parquet",
    ]
    store.upsert("docs", to_batch(large, SCHEMA))
    assert store.count("docs") == 40


# ── files of other tools ─────────────────────────────────────────────────────────────────────────────


def plain_folder(folder: Path, **columns) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"f{len(list(folder.iterdir()))}.parquet", row_group_size=50)


def test_a_pandas_frame_is_read_with_its_other_columns_as_metadata(store, folder):
    folder.mkdir()
    vectors = np.random.default_rng(0).random((4, 3)).astype(np.float32)
    frame = pd.DataFrame(
        {
            "id": [1, 2, 3, 2**53 + 1],
            "embedding": list(vectors),
            "document": ["a", None, "", "🦜"],
            "year": [2020, 2021, 2022, 2023],
            "title": ["x", None, "y", "z"],
        }
    )
    frame.to_parquet(folder / "frame.parquet")

    schema = store.describe("docs")
    assert (schema.vectors[0].dimensions, schema.vectors[0].metric) == (3, None)
    assert schema.id_kinds == {IdKind.INT}
    expected = [
        Record(
            id=row.id,
            vectors={"": vectors[at]},
            document=document,
            metadata={"year": row.year, "title": title},
        )
        for at, (row, document, title) in enumerate(
            zip(frame.itertuples(), ("a", None, "", "🦜"), ("x", None, "y", "z"), strict=True)
        )
    ]
    assert_same(read_all(store, "docs"), expected, store)
    assert_same(from_batches([store.fetch("docs", ids_of(expected[1:3]))]), expected[1:3], store)
    assert store.count("docs", filters.parse({"year": {"$gte": 2022}})) == 2
    assert store.search("docs", vectors[2], limit=1)[0][0] == 3


def test_plain_ids_of_each_kind_are_kept_apart(store, folder):
    ids = pa.array([uuid.UUID(int=number).bytes for number in (1, 2)], pa.binary(16))
    plain_folder(folder, id=ids, vector=[[1.0], [2.0]])
    assert [record.id for record in read_all(store, "docs")] == [uuid.UUID(int=1), uuid.UUID(int=2)]

    plain_folder(store.path / "typed", id=["1", "1"], id_type=["int", "str"], vector=[[1.0], [2.0]])
    assert [record.id for record in read_all(store, "typed")] == [1, "1"]
    assert store.describe("typed").id_kinds == {IdKind.INT, IdKind.STR}


def test_plain_files_of_large_row_groups_are_split_by_rows(store, folder):
    folder.mkdir()
    for number in range(2):
        ids = [f"{number}-{row}" for row in range(1000)]
        table = pa.table({"id": ids, "vector": [[float(row)] for row in range(1000)]})
        pq.write_table(table, folder / f"{number}.parquet")
    spans = spans_of(store, "docs", 150)
    assert max(span.records for span, _ in spans) <= 150
    for span, ids in spans:
        found = store.scan("docs", span, ids=ids, batch_records=64)
        assert sum(batch.num_rows for batch in found) == span.records
    found = [record.id for record in read_all(store, "docs", span_records=150)]
    assert len(set(found)) == len(found) == 2000


def test_missing_vectors_and_named_ones_are_read(store, folder):
    plain_folder(
        folder,
        id=["a", "b"],
        vector=pa.array([None, [1, 2]], pa.list_(pa.float32())),
        **{"vector:title": pa.array([[1, 2, 3], [4, 5, 6]], pa.large_list(pa.float16()))},
        metadata=['{"b": 1, "a": [1, null]}', None],
    )
    found = {record.id: record for record in read_all(store, "docs")}
    assert found["a"].vectors[""] is None
    assert found["b"].vectors["title"].tolist() == [4, 5, 6]
    assert found["a"].metadata == {"a": [1, None], "b": 1}
    assert found["b"].metadata is None


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"name": ["a"], "vector": [[1.0]]}, "a column `id`"),
        ({"id": ["a"], "title": ["x"]}, "a column of lists of floats"),
        ({"id": ["a", None], "vector": [[1.0], [1.0]]}, "1 records have no id"),
        ({"id": ["a", "b"], "vector": [[1.0, 2.0], [1.0]]}, "expected 2 numbers"),
        ({"id": ["a"], "vector": [[0.1]]}, "no float32"),
        ({"id": ["a"], "vector": [[1.0]], "metadata": ["[1]"]}, "JSON object"),
        ({"id": ["a"], "vector": [[1.0]], "metadata": ['{"x": 1}'], "x": [2]}, "both"),
        ({"id": ["a"], "id_type": ["float"], "vector": [[1.0]]}, "int, uuid or str"),
    ],
)
def test_plain_files_that_can_not_be_read_exactly_are_refused(store, folder, columns, expected):
    plain_folder(folder, **columns)
    with pytest.raises(StoreRefusedError, match=expected) as caught:
        read_all(store, "docs")
    assert "f0.parquet" in str(caught.value)


def test_plain_files_are_never_changed(store, folder):
    plain_folder(folder, id=["a"], vector=pa.array([[1.0]], pa.list_(pa.float32())))
    schema, before = store.describe("docs"), (folder / "f0.parquet").read_bytes()
    for change in (
        lambda: store.drop("docs"),
        lambda: store.delete("docs", batches.id_batch(["a"])),
        lambda: store.upsert("docs", store.fetch("docs", batches.id_batch(["a"]))),
        lambda: store.begin_load("docs"),
    ):
        with pytest.raises(UnsupportedOperationError, match="another tool"):
            change()
    with pytest.raises(UsageError, match="there already"):
        store.create(schema)
    assert (folder / "f0.parquet").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["f0.parquet"]


# ── names and addresses ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", "a\\b", "a\0b", ".loading"])
def test_a_name_can_not_leave_the_folder(store, name):
    for operation in (store.describe, store.drop, store.begin_load, lambda n: store.create(plain_schema(n))):
        with pytest.raises(ConfigurationError, match="name of a collection"):
            operation(name)
    assert list(store.path.iterdir()) == []


def test_a_folder_is_a_collection_of_its_parent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load(ParquetStore(path=Path("root")), SCHEMA, plain_records(2))
    for text in (
        "parquet:./root/docs",
        "parquet:root/docs/",
        "parquet:root#docs",
        f"parquet:{tmp_path}/root/docs",
    ):
        found, collection = open_address(text)
        assert (collection, found.count("docs")) == ("docs", 2)
    found, collection = open_address("parquet:root/")
    assert (found.path, collection) == (Path("root"), None)
    monkeypatch.chdir(tmp_path / "root" / "docs")
    found, collection = open_address("parquet:.")
    assert (collection, found.count(collection)) == ("docs", 2)


@pytest.mark.parametrize(
    "text", ["parquet:./root?namspace=a#docs", "parquet:./root?anonymous=perhaps#docs", "parquet:ftp://#docs"]
)
def test_an_address_that_asks_for_what_there_is_not_is_refused(text):
    with pytest.raises(ConfigurationError, match="parquet:"):
        open_address(text)
