"""What is read from a Chroma folder's files is what Chroma's client answers, whatever happened to it."""

from __future__ import annotations

import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pyarrow as pa
import pytest
from chromadb.config import Settings

from migration_pipelines import batch as batches
from migration_pipelines import errors
from migration_pipelines.metadata import load_metadata
from migration_pipelines.stores.chroma import ChromaStore, direct, rows
from migration_pipelines.stores.chroma.copied import CopiedChromaStore
from migration_pipelines_tests import field
from migration_pipelines_tests.harnesses.chroma import EmbeddedChroma
from migration_pipelines_tests.records import by_id, from_batches, plain_records, plain_schema
from migration_pipelines_tests.shell import Shell, shell

__all__ = ["shell"]

SCHEMA = plain_schema("docs")
DATABASE = "chroma.sqlite3"
DIMENSIONS = 5
SPACES = {"squares": "l2", "angles": "cosine", "products": "ip"}
TEXTS = ["", "a\0b", 'q"uo\\te\n\t\x7f\x01', "null", "漢🦜", "x" * 300, "$typed", '{"a":1}', ","]
NUMBERS = [0, -1, 2**53, 2**63 - 1, -(2**63), 0.1, 1.0]
# Chroma reads these from its queue a unit or a sign off.
HARD_NUMBERS = [-0.0, 5e-324, 1e300, 1 / 3, 0.47547327193434563]


def open_client(folder: Path) -> Any:
    return chromadb.PersistentClient(folder, Settings(anonymized_telemetry=False))


def copied(folder: Path, copy: Path) -> CopiedChromaStore:
    """A copy of a folder as `for_reading` makes it, read directly."""
    shutil.copytree(folder, copy)
    return CopiedChromaStore(path=str(copy), snapshot_of=str(folder))


def read_whole(store: ChromaStore, collection: str, *, batch_records: int = 7) -> list[pa.RecordBatch]:
    spans = store.split(collection, span_records=37)
    return [
        batch
        for span, ids in spans
        for batch in store.scan(collection, span, ids=ids, batch_records=batch_records)
    ]


def assert_reads_as_the_client(
    folder: Path, copy: Path, *, written: dict[str, dict[str, bytes]] | None = None
) -> int:
    """Compare everything that can be asked; returns the number of records.

    `written` has, by collection and id, the vectors as they were written: under cosine one that is still
    in the queue is read as such, and not as the client has rounded it.
    """
    store, client = copied(folder, copy), ChromaStore(path=str(folder))
    names = client.list_collections()
    assert store.list_collections() == names
    for name in names:
        assert store.describe(name) == client.describe(name)
        found, expected = (by_id(from_batches(read_whole(opened, name))) for opened in (store, client))
        assert store.count(name) == client.count(name) == len(found)
        assert found.keys() == expected.keys()
        for key, record in found.items():
            assert_same_record(record, expected[key], original=(written or {}).get(name, {}).get(key[1]))
    assert store._is_known
    assert store._client is None  # nothing of it was the client's doing
    client.close()
    return sum(map(store.count, names))


def assert_same_record(ours: Any, theirs: Any, *, original: bytes | None) -> None:
    key, vectors, *others = ours
    _, answer, *expected = theirs
    assert others == expected, key
    assert vectors[""] in (answer[""], original), key
    vector, answered = (np.frombuffer(raw, np.float32) for raw in (vectors[""], answer[""]))
    np.testing.assert_allclose(vector, answered, rtol=1e-6)


# ── whatever was written ─────────────────────────────────────────────────────────────────────────────


class History:
    """Random writes to a few collections of one folder."""

    def __init__(
        self, client: Any, seed: int, *, numbers: list[float], thresholds: tuple[int, ...] = (2, 5, 20, 1000)
    ) -> None:
        self.metadata_numbers = numbers
        self.dice, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.written: dict[str, dict[str, bytes]] = {}
        self.collections = []
        for name, space in SPACES.items():
            threshold = self.dice.choice(thresholds)
            settings = {"hnsw": {"space": space, "sync_threshold": threshold}}
            self.collections.append(
                client.create_collection(name, configuration=settings, embedding_function=None)
            )
            self.written[name] = {}
            self._write_records(self.collections[-1], "add", ["first"])

    def write(self) -> None:
        """Do one write of several records."""
        dice, collection = self.dice, self.dice.choice(self.collections)
        ids = list(dict.fromkeys(self._id() for _ in range(dice.randrange(1, 12))))
        what = dice.choice(["add", "upsert", "update", "update metadata", "delete"])
        if what == "delete":
            collection.delete(ids=ids)
        elif what == "update metadata":
            collection.update(ids=ids, metadatas=[self._metadata() for _ in ids])
        else:
            self._write_records(collection, what, ids)

    def _write_records(self, collection: Any, what: str, ids: list[str]) -> None:
        vectors = self.numbers.standard_normal((len(ids), DIMENSIONS)).astype(np.float32)
        there = set(collection.get(ids=ids, include=[])["ids"])
        for text, vector in zip(ids, vectors, strict=True):
            if what == "upsert" or (what == "update") == (text in there):
                self.written[collection.name][text] = vector.tobytes()
        fields: dict[str, Any] = {"metadatas": [self._metadata() for _ in ids]}
        if self.dice.random() < 0.7:
            fields["documents"] = [self.dice.choice(TEXTS) for _ in ids]
        if self.dice.random() < 0.3:
            fields["uris"] = [self.dice.choice(["", "s3://b"]) for _ in ids]
        getattr(collection, what)(ids=ids, embeddings=vectors, **fields)

    def _id(self) -> str:
        return self.dice.choice(["", "ü🦜", "a\0", "\n", '"']) + f"id{self.dice.randrange(200)}"

    def _metadata(self) -> dict[str, Any] | None:
        keys = [self.dice.choice(["a", "b", "käse.$x", 'q"', "A", "\x7f"]) for _ in range(4)]
        return {key: self._value() for key in keys} if self.dice.random() < 0.85 else None

    def _value(self) -> Any:
        dice = self.dice
        kinds = [
            lambda: dice.choice(TEXTS),
            lambda: dice.choice(self.metadata_numbers),
            lambda: dice.randrange(10**6) / 1000,
            lambda: dice.random() < 0.5,
        ]
        if dice.random() < 0.7:
            return dice.choice(kinds)()
        items = dice.choice([lambda: dice.choice(TEXTS), lambda: dice.getrandbits(62), *kinds[2:]])
        return [items() for _ in range(dice.randrange(1, 4))]


@pytest.mark.parametrize("seed", range(8))
def test_any_history_is_read_as_the_client_reads_it(tmp_path: Path, seed: int) -> None:
    client = open_client(tmp_path / "db")
    history = History(client, seed, numbers=NUMBERS + HARD_NUMBERS)
    for _ in range(random.Random(seed).randrange(10, 50)):
        history.write()
    client.close()
    assert assert_reads_as_the_client(tmp_path / "db", tmp_path / "copy", written=history.written)
    for name in SPACES:  # and in the same order
        stores = ChromaStore(path=str(tmp_path / "copy")), copied(tmp_path / "db", tmp_path / name)
        asked, answered = ([part["id"].to_pylist() for part in read_whole(store, name)] for store in stores)
        assert asked == answered


def test_writes_that_a_crash_kept_from_the_tables_are_read_from_the_queue(tmp_path: Path) -> None:
    client = open_client(tmp_path / "db")
    history = History(client, 99, numbers=NUMBERS, thresholds=(1000,))
    for _ in range(10):
        history.write()
    client.close()
    shutil.copytree(tmp_path / "db", tmp_path / "crashed")
    client = open_client(tmp_path / "db")
    history.collections = [client.get_collection(name, embedding_function=None) for name in SPACES]
    for _ in range(25):
        history.write()
    client.close()
    # Chroma queues a write and applies it in two transactions: here is what a crash between them leaves.
    with sqlite3.connect(tmp_path / "crashed" / DATABASE) as file:
        file.execute("ATTACH ? AS later", (str(tmp_path / "db" / DATABASE),))
        known = file.execute("SELECT max(seq_id) FROM main.embeddings_queue").fetchone()
        added = file.execute(
            "INSERT INTO main.embeddings_queue SELECT * FROM later.embeddings_queue WHERE seq_id > ?", known
        )
        assert added.rowcount > 100
    file.close()
    before = copied(tmp_path / "db", tmp_path / "db-copy")
    after = copied(tmp_path / "crashed", tmp_path / "crashed-copy")
    for name in SPACES:
        assert by_id(from_batches(read_whole(after, name))) == by_id(from_batches(read_whole(before, name)))
    assert assert_reads_as_the_client(
        tmp_path / "crashed", tmp_path / "again", written=history.written
    ) == sum(before.count(name) for name in before.list_collections())


def test_a_folder_whose_writer_was_killed_is_read_as_the_client_mends_it(tmp_path: Path) -> None:
    code = """if True:
        import sys, chromadb, numpy as np
        client = chromadb.PersistentClient(sys.argv[1])
        settings = {"hnsw": {"space": "l2", "sync_threshold": 100}}
        docs = client.create_collection("docs", configuration=settings, embedding_function=None)
        dice = np.random.default_rng(0)
        for start in range(0, 10**6, 70):
            ids = [str(n % 900) for n in range(start, start + 70)]
            vectors = dice.standard_normal((70, 8))
            docs.upsert(ids, vectors, documents=ids, metadatas=[{"n": start, "x": 0.1}] * 70)
            docs.delete(ids[:3])
            print("written", flush=True)
    """
    environment = {**os.environ, "ANONYMIZED_TELEMETRY": "False"}
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "db"], stdout=subprocess.PIPE, env=environment
    ) as writer:
        assert writer.stdout is not None
        for _ in range(6):
            assert writer.stdout.readline() == b"written\n"
        time.sleep(0.02)  # into the midst of the next one
        writer.kill()
    assert assert_reads_as_the_client(tmp_path / "db", tmp_path / "copy") > 100


def test_what_sqlite_had_half_written_is_rolled_back_in_the_copy(tmp_path: Path) -> None:
    with EmbeddedChroma.start(tmp_path) as harness:
        harness.write(SCHEMA, plain_records(200))
    file = sqlite3.connect(tmp_path / "chroma" / DATABASE, isolation_level=None)
    file.execute("PRAGMA cache_size = 1")  # so that it spills into the file before it commits
    file.execute("BEGIN")
    file.execute("UPDATE embedding_metadata SET string_value = 'half', int_value = NULL, float_value = NULL")
    assert (tmp_path / "chroma" / f"{DATABASE}-journal").stat().st_size
    store = copied(tmp_path / "chroma", tmp_path / "copy")
    shutil.copytree(tmp_path / "chroma", tmp_path / "killed")
    file.close()
    whole, killed = (ChromaStore(path=str(tmp_path / name)) for name in ("chroma", "killed"))
    assert killed.list_collections() == ["docs"]
    assert killed.fingerprint("docs").rpartition(":")[2] == whole.fingerprint("docs").rpartition(":")[2]
    assert (tmp_path / "killed" / f"{DATABASE}-journal").stat().st_size
    assert by_id(from_batches(read_whole(store, "docs"))) == by_id(plain_records(200))


# ── values ───────────────────────────────────────────────────────────────────────────────────────────


def test_doubles_in_the_tables_come_out_exactly(tmp_path: Path) -> None:
    bits = np.random.default_rng(7).integers(0, 2**64, 300, np.uint64).view(np.float64)
    doubles = [*bits[np.isfinite(bits)].tolist(), 5e-324, 2.2250738585072014e-308, 1e16, 0.1 + 0.2]
    doubles += [float("inf"), float("-inf")]
    with EmbeddedChroma.start(tmp_path) as harness:
        harness.write(SCHEMA, plain_records(len(doubles)))
    with sqlite3.connect(tmp_path / "chroma" / DATABASE) as file:
        file.executemany(
            "UPDATE embedding_metadata SET float_value = ? WHERE key = 'half' AND id = ?",
            [(value, row) for row, value in enumerate(doubles, 1)],
        )
    file.close()
    found = from_batches(read_whole(copied(tmp_path / "chroma", tmp_path / "copy"), "docs"))
    assert [record.metadata["half"] for record in found if record.metadata] == doubles
    assert assert_reads_as_the_client(tmp_path / "chroma", tmp_path / "again") == len(doubles)


def test_a_key_that_is_our_own_sign_stays_the_users(tmp_path: Path) -> None:
    with EmbeddedChroma.start(tmp_path) as harness:
        harness.write(SCHEMA, plain_records(3))
    with sqlite3.connect(tmp_path / "chroma" / DATABASE) as file:
        file.execute("UPDATE embedding_metadata SET key = '$typed' WHERE key = 'tag'")
    file.close()
    (batch,) = read_whole(copied(tmp_path / "chroma", tmp_path / "copy"), "docs")
    assert [load_metadata(text)["$typed"] for text in batch["metadata"].to_pylist()] == ["t0", "t1", "t2"]


def test_texts_that_are_too_long_for_one_answer_come_in_several(tmp_path: Path) -> None:
    with EmbeddedChroma.start(tmp_path) as harness:
        harness.write(SCHEMA, plain_records(40))
    with sqlite3.connect(tmp_path / "chroma" / DATABASE) as file:
        file.text_factory = bytes
        whole = rows.read_texts(file, list(range(1, 41)), has_bools=True, has_arrays=False)
        file.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 600)
        parts = rows.read_texts(file, list(range(1, 41)), has_bools=True, has_arrays=False)
    file.close()
    assert parts.documents == whole.documents == [record.document for record in plain_records(40)]
    assert parts.metadata == whole.metadata
    assert parts.rows.tolist() == list(range(1, 41))


def test_a_sqlite_that_rounds_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows.writes_exact_digits()
    rows.writes_exact_digits.cache_clear()
    monkeypatch.setattr(rows, "_FLOAT", "printf('%!.15e', float_value)")
    assert not rows.writes_exact_digits()
    rows.writes_exact_digits.cache_clear()


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of 250 records, of which the first 200 stand in the files of the index."""
    client = open_client(tmp_path / "db")
    settings = {"hnsw": {"space": "l2", "sync_threshold": 100}}
    collection = client.create_collection("docs", configuration=settings, embedding_function=None)
    records = plain_records(250)
    for start in range(0, 250, 50):
        part = records[start : start + 50]
        collection.add(
            ids=[record.id for record in part],
            embeddings=np.stack([record.vectors[""] for record in part]),
            documents=[record.document for record in part],
            metadatas=[dict(record.metadata or {}) for record in part],
        )
    client.close()
    return tmp_path / "db"


def index_folder(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def test_records_come_in_the_order_asked_for_and_those_that_are_gone_are_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_PAGE", 7)
    store = copied(source, tmp_path / "copy")
    records = plain_records(250)
    wanted = [*reversed(records), *records[:3]]
    ids = batches.id_batch([*[record.id for record in wanted], "nobody", 5])
    found = from_batches([store.fetch("docs", ids)])
    assert [record.exact() for record in found] == [record.exact() for record in reversed(records)]


def test_threads_read_side_by_side(source: Path, tmp_path: Path) -> None:
    store = copied(source, tmp_path / "copy")
    assert store.scans_at_once() is None
    found: list[Any] = []

    def read() -> None:
        found.append(by_id(from_batches(read_whole(store, "docs", batch_records=10))))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [by_id(plain_records(250))] * 4


def test_a_search_leaves_what_is_read_alone(source: Path, tmp_path: Path) -> None:
    store = copied(source, tmp_path / "copy")
    spans = list(store.split("docs", span_records=100))
    before = field.bytes_of(tmp_path / "copy")
    wanted = plain_records(250)[7].vectors[""]
    assert store.search("docs", wanted, limit=1)[0][0] == "doc#00007"
    assert field.bytes_of(tmp_path / "copy") == before
    parts = [part for span, ids in spans for part in store.scan("docs", span, ids=ids, batch_records=50)]
    assert sum(part.num_rows for part in parts) == 250
    store.close()


def test_a_source_is_read_without_chromas_client(source: Path, tmp_path: Path) -> None:
    code = """if True:
        import sys, pathlib
        from migration_pipelines.stores.chroma import ChromaStore
        store = ChromaStore(path=sys.argv[1]).for_reading(pathlib.Path(sys.argv[2]))
        spans = list(store.split("docs", span_records=100))
        found = [b for s, i in spans for b in store.scan("docs", s, ids=i, batch_records=50)]
        print(sum(b.num_rows for b in found), store.describe("docs").vectors[0].dimensions)
        print("chromadb" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "scratch"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["250", "8", "False"]


def test_a_version_that_is_not_known_is_left_to_the_client(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with sqlite3.connect(source / DATABASE) as file:
        file.execute("INSERT INTO migrations VALUES ('metadb', 99, '00099-new.sqlite.sql', '', '')")
    file.close()
    store = copied(source, tmp_path / "copy")
    with caplog.at_level(logging.WARNING):
        assert store._database() is None
    assert "metadb 99" in caplog.text
    assert store.scans_at_once() == 1


# ── what is damaged ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (shutil.rmtree, 200),
        (lambda index: (index / "index_metadata.pickle").unlink(), 200),
        (lambda index: (index / "header.bin").unlink(), 200),
        (lambda index: (index / "header.bin").write_bytes(bytes(100)), 200),
        (lambda index: (index / "data_level0.bin").unlink(), 200),
        (lambda index: os.truncate(index / "data_level0.bin", 180 * (4 * 33 + 4 * 8 + 8) - 1), 21),
    ],
    ids=["no folder", "no ids", "no header", "another header", "no vectors", "cut"],
)
def test_vectors_that_are_lost_are_counted_and_named_and_the_others_arrive(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, lost: int
) -> None:
    with sqlite3.connect(source / DATABASE) as file:
        # What the files hold is usually gone from the queue.
        file.execute("DELETE FROM embeddings_queue WHERE seq_id <= 200")
    file.close()
    damage(index_folder(source))
    store = copied(source, tmp_path / "copy")
    assert store.count("docs") == 250
    spans = list(store.split("docs", span_records=40))
    assert f"{lost} of 250 records" in caplog.text
    arrived, named = [], set()
    for span, ids in spans:
        try:
            arrived += from_batches(store.scan("docs", span, ids=ids, batch_records=50))
        except errors.StoreRefusedError as error:
            named |= set(error.facts["records"])
    expected = by_id(plain_records(250))
    assert len(named) == lost
    assert by_id(arrived) == {key: value for key, value in expected.items() if key[1] not in named}
    texts = sum(
        part.num_rows
        for span, ids in spans
        for part in store.scan("docs", span, ids=ids, batch_records=50, vectors=False)
    )
    assert texts == 250


def test_a_run_that_lacks_vectors_moves_the_others_and_is_not_called_complete(
    source: Path, tmp_path: Path, shell: Shell
) -> None:
    with sqlite3.connect(source / DATABASE) as file:
        file.execute("DELETE FROM embeddings_queue WHERE seq_id <= 200")
    file.close()
    os.truncate(index_folder(source) / "data_level0.bin", 180 * (4 * 33 + 4 * 8 + 8))
    target = f"parquet:{tmp_path / 'out'}#docs"
    found = shell("run", "--source", f"chroma:{source}#docs", "--target", target)
    assert found.status == 1
    assert "20 of 250 records" in found.everything
    assert "doc#00" in found.everything


def test_what_chroma_left_of_removed_collections_is_nobodys(source: Path, tmp_path: Path) -> None:
    with sqlite3.connect(source / DATABASE) as file:
        file.execute("INSERT INTO embeddings (segment_id, embedding_id, seq_id) VALUES ('gone', 'ghost', 7)")
        file.execute(
            "INSERT INTO embeddings_queue (operation, topic, id, vector, encoding) "
            "VALUES (0, 'persistent://default/default/gone', 'ghost', zeroblob(32), 'FLOAT32')"
        )
    file.close()
    (source / "00000000-0000-4000-8000-000000000000").mkdir()
    store = copied(source, tmp_path / "copy")
    assert store.count("docs") == 250
    assert by_id(from_batches(read_whole(store, "docs"))) == by_id(plain_records(250))


def test_a_pickle_that_would_run_something_is_refused_and_not_run(source: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    command = f"touch {proof}".encode()
    crafted = b"cposix\nsystem\n(V" + command + b"\ntR."
    (index_folder(source) / "index_metadata.pickle").write_bytes(crafted)
    store = copied(source, tmp_path / "copy")
    with pytest.raises(errors.StoreRefusedError, match=r"index_metadata\.pickle.*posix\.system"):
        store.count("docs")
    assert not proof.exists()


def test_a_file_that_is_no_database_says_so(source: Path, tmp_path: Path) -> None:
    (source / DATABASE).write_bytes(b"SQLite format 3\0" + bytes(5000))
    with pytest.raises(errors.StoreRefusedError, match="restore"):
        copied(source, tmp_path / "copy").count("docs")
