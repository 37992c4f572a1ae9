"""Folders of Qdrant's local mode: read whole as they were found, as data, and never run."""

from __future__ import annotations

import base64
import datetime as dt
import pickle
import shutil
import sqlite3
import sys
import uuid
from contextlib import closing
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from migration_pipelines import errors
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.stores.qdrant import QdrantStore
from migration_pipelines_tests import field
from migration_pipelines_tests.harnesses.memory import HARNESSES as MEMORY
from migration_pipelines_tests.records import Record, to_batch
from migration_pipelines_tests.shell import Shell, finish, python, shell, start
from migration_pipelines_tests.test_qdrant import SCHEMA, read_all, some_records

__all__ = ["shell"]

FOUND = field.collections("qdrant")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three points that the client wrote, closed again."""
    path = tmp_path / "found"
    with closing(QdrantClient(path=str(path))) as client:
        client.create_collection("docs", models.VectorParams(size=8, distance=models.Distance.EUCLID))
        client.upsert(
            "docs", [models.PointStruct(id=n, vector=[float(n)] * 8, payload={"n": n}) for n in range(3)]
        )
    return path


def points_file(folder: Path) -> Path:
    return folder / "collection" / "docs" / "storage.sqlite"


def put(folder: Path, key: bytes, value: bytes) -> None:
    """Put a row into a collection as a stranger could."""
    with closing(sqlite3.connect(points_file(folder))) as file, file:
        file.execute("INSERT INTO points VALUES (?, ?)", (base64.b64encode(key).decode(), value))


# ── as found ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not FOUND, reason="the folder of found stores isn't beside this checkout")
@pytest.mark.parametrize(("store", "truth"), FOUND, ids=lambda value: getattr(value, "name", None))
def test_a_found_folder_moves_whole_and_is_byte_for_byte_what_it_was(
    store: Path, truth: dict[str, Any], tmp_path: Path
) -> None:
    copy = field.writable_copy(store, tmp_path)
    before = field.bytes_of(copy)
    with MEMORY[0].start(tmp_path) as target:
        config = MigrationConfig(
            source=f"qdrant:{copy}?document_field=text#{truth['name']}",
            target=target.store.address("found"),
            partition_size=20,
            batch_size=7,
        )
        report = run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path / "home")))
        found = field.truth(target.read("found"))
    assert report.status == "complete"
    assert found["vectors_checksum"] == pytest.approx(truth["vectors_checksum"], abs=1e-3)
    del found["vectors_checksum"]
    assert found == {name: truth[name] for name in found}
    assert field.bytes_of(copy) == before


@pytest.mark.skipif(not FOUND, reason="the folder of found stores isn't beside this checkout")
def test_a_found_folder_is_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    store, truth = FOUND[0]
    source = QdrantStore(path=str(store)).for_reading(tmp_path)
    assert source.count(truth["name"]) == truth["rows"]
    assert source.address().endswith(str(store))


# ── what older clients left ──────────────────────────────────────────────────────────────────────────


def test_the_last_of_several_rows_of_one_point_counts(folder: Path, tmp_path: Path) -> None:
    spelled = "6F0C1D1E5D0F5E5C9A417F3A3C1B2D10"
    for number, text in enumerate((str(uuid.UUID(spelled)), spelled)):
        point = models.PointStruct(id=text, vector=[0.5] * 8, payload={"written": number})
        put(folder, pickle.dumps(text, protocol=5), pickle.dumps(point))
    found = read_all(QdrantStore(path=str(folder)).for_reading(tmp_path / "home"))
    (record,) = [record for record in found if record.id == uuid.UUID(spelled)]
    assert record.metadata == {"written": 1}
    assert len(found) == 4


def test_dates_and_numpy_numbers_in_an_old_payload_read_as_the_client_gives_them(folder: Path) -> None:
    payload = {"day": dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC), "id": uuid.UUID(int=7), "n": np.int64(3)}
    point = models.PointStruct(id=9, vector=[0.5] * 8)
    point.payload = payload
    put(folder, pickle.dumps(9, protocol=4), pickle.dumps(point))
    found = {record.id: record for record in read_all(QdrantStore(path=str(folder)))}
    assert found[9].metadata == {"day": "2024-02-29T12:00:00+00:00", "id": str(uuid.UUID(int=7)), "n": 3}


def test_sparse_named_and_multi_vectors_are_read_as_the_client_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "rich"
    with closing(QdrantClient(path=str(path))) as client:
        client.create_collection(
            "docs",
            {
                "dense": models.VectorParams(size=2, distance=models.Distance.DOT),
                "multi": models.VectorParams(
                    size=2,
                    distance=models.Distance.DOT,
                    multivector_config=models.MultiVectorConfig(
                        comparator=models.MultiVectorComparator.MAX_SIM
                    ),
                ),
            },
            sparse_vectors_config={"sparse": models.SparseVectorParams()},
        )
        sparse = models.SparseVector(indices=[7, 3], values=[0.5, 1.0])
        vector = {"dense": [1.0, 2.0], "multi": [[1.0, 2.0], [3.0, 4.0]], "sparse": sparse}
        points = [
            models.PointStruct(id=1, vector=vector),
            models.PointStruct(id=2, vector={"dense": [3.0, 4.0]}),
        ]
        client.upsert("docs", points)
    first, second = read_all(QdrantStore(path=str(path)))
    assert first.vectors["sparse"] == {"indices": [3, 7], "values": [1.0, 0.5]}
    assert first.vectors["multi"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert second.vectors["multi"] is None
    assert second.vectors["sparse"] is None


# ── nothing in it is run ─────────────────────────────────────────────────────────────────────────────


class Attack:
    """What a stranger puts where a point should be."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("at", ["point", "payload", "id"])
def test_a_crafted_pickle_is_refused_by_name_and_runs_nothing(folder: Path, tmp_path: Path, at: str) -> None:
    mark = tmp_path / "it-ran"
    evil = pickle.dumps(Attack(mark))
    point = models.PointStruct(id=9, vector=[0.5] * 8)
    point.payload = {"x": Attack(mark)}
    key = evil if at == "id" else pickle.dumps(9, protocol=4)
    put(folder, key, pickle.dumps(point) if at == "payload" else evil)

    source = QdrantStore(path=str(folder)).for_reading(tmp_path / "home")
    with pytest.raises(errors.StoreRefusedError, match=r"would import and run pathlib\.Path\.touch|getattr"):
        read_all(source)
    # As a target too: the client would run it on opening the folder.
    target = QdrantStore(path=str(folder))
    with pytest.raises(errors.StoreRefusedError, match="docs"):
        target.upsert("docs", to_batch(some_records(1), SCHEMA))
    assert not mark.exists()
    pickle.loads(evil)  # it would have
    assert mark.exists()


def test_a_point_of_another_class_is_refused(folder: Path) -> None:
    put(folder, pickle.dumps(9, protocol=4), pickle.dumps(models.SparseVector(indices=[1], values=[1.0])))
    with pytest.raises(errors.StoreRefusedError, match=r"SparseVector.*PointStruct"):
        read_all(QdrantStore(path=str(folder)))


def test_a_name_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    meta = folder / "meta.json"
    meta.write_text(meta.read_text().replace('"docs"', '"../../../etc"'))
    with pytest.raises(errors.StoreRefusedError, match="leads out of the folder"):
        QdrantStore(path=str(folder)).count("../../../etc")


# ── damage, locks ────────────────────────────────────────────────────────────────────────────────────


def test_what_is_no_folder_of_qdrants_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(errors.StoreUnavailableError, match=r"meta\.json"):
            QdrantStore(path=str(path)).for_reading(tmp_path.parent / "home")
        assert QdrantStore(path=str(path)).list_collections() == []
    assert not (tmp_path / "nowhere").exists()


def test_damaged_files_are_refused_for_good(folder: Path) -> None:
    store = QdrantStore(path=str(folder))
    points_file(folder).write_bytes(b"SQLite format 3\0 and nothing of the kind")
    with pytest.raises(errors.StoreRefusedError, match="damaged"):
        store.count("docs")
    points_file(folder).unlink()
    with pytest.raises(errors.StoreRefusedError, match=r"no storage\.sqlite"):
        store.count("docs")
    (folder / "meta.json").write_text("{")
    with pytest.raises(errors.StoreRefusedError, match=r"meta\.json"):
        store.list_collections()


def test_a_folder_that_another_process_has_open_is_read_and_not_written_to(
    folder: Path, tmp_path: Path
) -> None:
    code = (
        "from qdrant_client import QdrantClient; import sys;"
        f"client = QdrantClient(path={str(folder)!r}); print('open', flush=True); sys.stdin.readline()"
    )
    with Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        store = QdrantStore(path=str(folder))
        assert len(read_all(store.for_reading(tmp_path / "home"))) == 3
        with pytest.raises(errors.TransientError, match="close the other client"):
            store.upsert("docs", to_batch(some_records(1), SCHEMA))
        other.communicate("\n")
    store.upsert("docs", to_batch(some_records(1, start=50), SCHEMA))
    assert store.count("docs") == 4
    store.close()


def test_what_a_killed_writer_left_in_the_middle_is_not_read(folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, sqlite3\n"
        f"file = sqlite3.connect({str(points_file(folder))!r}, isolation_level=None)\n"
        "file.execute('PRAGMA cache_size = 1')\n"
        "file.execute('BEGIN')\n"
        "file.execute('UPDATE points SET point = zeroblob(length(point))')\n"
        "file.execute('INSERT INTO points VALUES (?, zeroblob(500000))', ('x',))\n"
        "os._exit(9)"
    )
    assert python(code, folder=tmp_path).status == 9
    assert list(points_file(folder).parent.glob("*-journal"))
    before = field.bytes_of(folder)
    found = read_all(QdrantStore(path=str(folder)).for_reading(tmp_path / "home"))
    assert [record.metadata for record in found] == [{"n": n} for n in range(3)]
    assert field.bytes_of(folder) == before


def test_two_stores_on_one_folder_share_its_client(folder: Path) -> None:
    first, second = QdrantStore(path=str(folder)), QdrantStore(path=str(folder))
    first.upsert("docs", to_batch(some_records(1, start=50), SCHEMA))
    second.upsert("docs", to_batch(some_records(1, start=51), SCHEMA))
    first.close()
    second.upsert("docs", to_batch(some_records(1, start=52), SCHEMA))
    assert first.count("docs") == 6
    second.close()
    with closing(QdrantClient(path=str(folder))) as client:
        assert client.count("docs").count == 6


def test_an_update_in_place_changes_the_fingerprint_of_a_folder(folder: Path) -> None:
    store = QdrantStore(path=str(folder))
    before = store.fingerprint("docs")
    record = Record(id=1, vectors={"": np.ones(8, np.float32)}, metadata={"n": 1})
    store.upsert("docs", to_batch([record], SCHEMA))
    assert store.fingerprint("docs") != before
    store.close()


# ── through the command line ─────────────────────────────────────────────────────────────────────────


def test_a_folder_moves_to_a_folder_by_the_command_line(folder: Path, shell: Shell, tmp_path: Path) -> None:
    before = field.bytes_of(folder)
    done = finish(
        start("run", "--source", f"qdrant:{folder}#docs", "--target", "qdrant:new#docs", folder=tmp_path)
    )
    assert done.status == 0, done.everything
    assert field.bytes_of(folder) == before
    with closing(QdrantClient(path=str(tmp_path / "new"))) as client:
        points, _ = client.scroll("docs", with_vectors=True)
    assert [(point.id, point.vector, point.payload) for point in points] == [
        (n, [float(n)] * 8, {"n": n}) for n in range(3)
    ]


def test_a_crafted_pickle_ends_the_command_with_1_and_runs_nothing(
    folder: Path, shell: Shell, tmp_path: Path
) -> None:
    put(folder, pickle.dumps(9, protocol=4), pickle.dumps(Attack(tmp_path / "it-ran")))
    done = shell("run", "--source", f"qdrant:{folder}#docs", "--target", "parquet:out#docs")
    assert done.status == 1
    assert "would import and run" in done.err
    assert not (tmp_path / "it-ran").exists()
    shutil.rmtree(folder)


def test_reading_a_folder_needs_no_client(folder: Path) -> None:
    done = python(
        "import sys; sys.modules['qdrant_client'] = None\n"
        "from migration_pipelines.store import open_address\n"
        f"store, name = open_address('qdrant:{folder}#docs')\n"
        "print(store.count(name))",
        folder=folder.parent,
    )
    assert done.out.strip() == "3", done.err
