"""A Chroma folder that is a source is read through a copy: nothing ever opens the original."""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chromadb
import pytest
from chromadb.config import Settings

from migration_pipelines import errors, filters, snapshot
from migration_pipelines.stores.chroma import ChromaStore
from migration_pipelines.stores.chroma import records as chroma_records
from migration_pipelines_tests.harnesses.chroma import EmbeddedChroma
from migration_pipelines_tests.records import (
    Record,
    by_id,
    from_batches,
    plain_records,
    plain_schema,
    to_batch,
)

SCHEMA = plain_schema("docs")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder that holds 60 records in `docs` and others in `others`, closed."""
    with EmbeddedChroma.start(tmp_path) as harness:
        harness.write(plain_schema("others"), plain_records(30, seed=1))
        harness.write(SCHEMA, plain_records(60))
    return tmp_path / "chroma"


def state_of(folder: Path) -> dict[str, Any]:
    """Everything that a write, a journal or an open could change about a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat, content = path.stat(), path.read_bytes() if path.is_file() else b""
        digest = hashlib.sha256(content).hexdigest()
        found[str(path.relative_to(folder))] = stat.st_size, stat.st_mtime_ns, stat.st_mode, digest
    return found


def read_all(store: Any, collection: str = "docs", *, span_records: int = 25) -> list[Record]:
    spans = store.split(collection, span_records=span_records)
    return [
        record
        for span, ids in spans
        for record in from_batches(store.scan(collection, span, ids=ids, batch_records=10))
    ]


def test_a_source_is_read_whole_and_stays_byte_for_byte_what_it_was(source: Path, tmp_path: Path) -> None:
    before = state_of(source)
    original = ChromaStore(path=str(source))
    store = original.for_reading(tmp_path / "scratch")

    assert store.list_collections() == ["docs", "others"]
    assert store.count("docs", filters.parse({"even": True})) == 30
    assert by_id(read_all(store)) == by_id(plain_records(60))
    assert store.search("docs", plain_records(60)[7].vectors[""], limit=1)[0][0] == "doc#00007"
    store.close()

    assert state_of(source) == before


def test_asking_a_source_what_is_in_it_does_not_open_it(source: Path) -> None:
    before = state_of(source)
    store = ChromaStore(path=str(source))
    assert store.list_collections() == ["docs", "others"]
    assert ChromaStore(path=str(source), database="nothing").list_collections() == []
    assert state_of(source) == before

    store.create(plain_schema("more"))  # and what it says once it is open is the same
    assert store.list_collections() == ["docs", "more", "others"]
    store.close()
    assert store.list_collections() == ["docs", "more", "others"]


def test_a_copy_speaks_of_its_original(source: Path, tmp_path: Path) -> None:
    original = ChromaStore(path=str(source))
    fingerprint = original.fingerprint("docs")
    original.close()
    store = original.for_reading(tmp_path / "scratch")
    store.count("docs")  # opens the copy, which changes it
    store.close()

    assert store.address("docs") == original.address("docs") == f"chroma:{source}#docs"
    assert store.fingerprint("docs") == fingerprint
    assert store.for_reading(tmp_path / "scratch") is store


def test_a_copy_serves_until_the_original_changes_and_then_makes_room(source: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    original = ChromaStore(path=str(source))
    first = original.for_reading(scratch)
    fingerprint = first.fingerprint("docs")
    assert original.for_reading(scratch).path == first.path

    original.upsert("docs", to_batch(plain_records(1, start=60), SCHEMA))
    original.close()
    second = original.for_reading(scratch)

    assert second.fingerprint("docs") != fingerprint
    assert second.count("docs") == 61
    second.close()
    assert [path.name for path in scratch.iterdir() if path.is_dir()] == [Path(second.path or "").name]


def test_only_one_of_several_readers_copies(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Path] = []
    copy_file = snapshot._copy_file

    def copy_and_tell(path: Path, target: Path) -> None:
        copied.append(path)
        copy_file(path, target)

    monkeypatch.setattr(snapshot, "_copy_file", copy_and_tell)
    store = ChromaStore(path=str(source))
    threads = [threading.Thread(target=store.for_reading, args=(tmp_path / "scratch",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copied) == len(set(copied)) > 0


def test_an_original_that_changes_while_it_is_copied_is_not_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_file = snapshot._copy_file

    def copy_and_write(path: Path, target: Path) -> None:
        copy_file(path, target)
        (source / "late").write_bytes(b"written meanwhile")

    monkeypatch.setattr(snapshot, "_copy_file", copy_and_write)
    with pytest.raises(errors.TransientError, match="was written to while it was copied"):
        ChromaStore(path=str(source)).for_reading(tmp_path / "scratch")
    assert [path.suffix for path in (tmp_path / "scratch").iterdir()] == [".lock"]


def test_a_full_disk_leaves_no_part_of_a_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_half(path: Path, target: Path) -> None:
        Path(target).write_bytes(Path(path).read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", copy_half)
    with pytest.raises(errors.DiskFullError, match="make room"):
        ChromaStore(path=str(source)).for_reading(tmp_path / "scratch")
    assert [path.suffix for path in (tmp_path / "scratch").iterdir()] == [".lock"]


def test_what_a_killed_copy_left_is_neither_used_nor_kept(source: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    whole = Path(ChromaStore(path=str(source)).for_reading(scratch).path or "")
    partial = whole.rename(whole.with_name(f"{whole.name}.partial"))
    (partial / "chroma.sqlite3").write_bytes(b"half")

    store = ChromaStore(path=str(source)).for_reading(scratch)

    assert store.count("docs") == 60
    store.close()
    assert not partial.exists()


def test_a_copy_never_goes_into_its_original(source: Path) -> None:
    before = state_of(source)
    with pytest.raises(errors.ConfigurationError, match="lies inside"):
        ChromaStore(path=str(source)).for_reading(source / "home")
    assert state_of(source) == before


def test_asking_for_a_folder_that_is_not_there_makes_none(tmp_path: Path) -> None:
    store = ChromaStore(path=str(tmp_path / "nowhere"))
    assert store.list_collections() == []
    with pytest.raises(errors.CollectionNotFoundError, match="is not there"):
        store.describe("docs")
    with pytest.raises(errors.StoreUnavailableError, match="is not there"):
        store.for_reading(tmp_path / "scratch")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_named_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "meta.json").touch()
    with pytest.raises(errors.StoreUnavailableError, match=r"holds no chroma\.sqlite3, but \['meta\.json'\]"):
        ChromaStore(path=str(tmp_path)).for_reading(tmp_path.parent / f"{tmp_path.name}-scratch")


def test_ids_that_are_fewer_than_the_count_are_no_answer() -> None:
    cut = SimpleNamespace(name="docs", count=lambda: 3, get=lambda **_: {"ids": ["a", "b"]})
    with pytest.raises(errors.TransientError, match="2 ids arrived where 3"):
        chroma_records.all_ids(cut)


def test_a_folder_that_another_client_holds_open_is_read_beside_it(source: Path, tmp_path: Path) -> None:
    client: Any = chromadb.PersistentClient(source, Settings(anonymized_telemetry=False))
    assert client.get_collection("docs", embedding_function=None).count() == 60
    store = ChromaStore(path=str(source)).for_reading(tmp_path / "scratch")
    assert by_id(read_all(store)) == by_id(plain_records(60))
    store.close()
    client.close()


def test_a_copy_with_one_uri_gives_it_back(tmp_path: Path) -> None:
    marked = [
        *plain_records(300),
        Record("z", {"": plain_records(1)[0].vectors[""]}, metadata={"chroma:uri": "s3://b"}),
    ]
    with EmbeddedChroma.start(tmp_path) as harness:
        harness.write(SCHEMA, marked)
    copy = ChromaStore(path=str(tmp_path / "chroma")).for_reading(tmp_path / "scratch")
    assert by_id(read_all(copy)) == by_id(marked)
