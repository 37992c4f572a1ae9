"""What is special to Chroma: its sources are never opened, and it never changes a record silently."""

from __future__ import annotations

import errno
import hashlib
import http.server
import math
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chromadb
import httpx
import numpy as np
import orjson
import pytest
from chromadb import errors as chroma_errors
from chromadb.config import Settings
from pydantic import SecretStr

from migration_pipelines import batch as batches
from migration_pipelines import errors, filters, snapshot
from migration_pipelines.metadata import value_kind
from migration_pipelines.model import Metric, Span, ValueKind, VectorField
from migration_pipelines.store import open_address
from migration_pipelines.stores import _chroma_records
from migration_pipelines.stores.chroma import ChromaStore
from migration_pipelines_tests.harnesses.chroma import ChromaServer, EmbeddedChroma
from migration_pipelines_tests.records import (
    Record,
    by_id,
    from_batches,
    plain_records,
    plain_schema,
    to_batch,
)

SCHEMA = plain_schema("docs")
UNIT = np.eye(8, dtype=np.float32)[0]


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[EmbeddedChroma]:
    with EmbeddedChroma.start(tmp_path) as harness:
        yield harness


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaServer]:
    with ChromaServer.start(tmp_path_factory.mktemp("server")) as harness:
        yield harness


@pytest.fixture(params=["embedded", "server"])
def harness(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A folder or a server, with no collection in it."""
    started = request.getfixturevalue(request.param)
    yield started
    for collection in started.client.list_collections():
        started.client.delete_collection(collection.name)


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


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────


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


def test_a_copy_speaks_of_its_original(source: Path, tmp_path: Path) -> None:
    original = ChromaStore(path=str(source))
    fingerprint = original.fingerprint("docs")
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


def test_ids_of_a_copy_come_from_its_file_a_few_at_a_time_in_order(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_chroma_records, "_IDS_PAGE", 7)
    store = ChromaStore(path=str(source)).for_reading(tmp_path / "scratch")
    spans = list(store.split("docs", span_records=25))
    assert [span.records for span, _ in spans] == [25, 25, 10]
    ids = [text for _, part in spans if part for text in part.column("id").to_pylist()]
    assert ids == [record.id for record in plain_records(60)]
    store.close()


def test_ids_that_are_fewer_than_the_count_are_no_answer() -> None:
    cut = SimpleNamespace(name="docs", count=lambda: 3, get=lambda **_: {"ids": ["a", "b"]})
    with pytest.raises(errors.TransientError, match="2 ids arrived where 3"):
        _chroma_records.all_ids(cut)


def test_a_file_that_lists_other_than_what_chroma_counts_is_refused(embedded: EmbeddedChroma) -> None:
    embedded.write(SCHEMA, plain_records(5))
    handle = embedded.client.get_collection("docs", embedding_function=None)
    lying = SimpleNamespace(name="docs", id=handle.id, count=lambda: 6, get=handle.get)
    file = Path(embedded.store.path or "") / "chroma.sqlite3"
    with pytest.raises(errors.StoreRefusedError, match="lists 5 ids where 6"):
        list(_chroma_records.stored_ids(lying, file))


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


def test_records_come_in_the_order_asked_for_not_in_chromas(harness: Any) -> None:
    records = plain_records(40)
    harness.write(SCHEMA, records)
    wanted = batches.id_batch([record.id for record in reversed(records)])
    found = from_batches(harness.store.scan("docs", Span(records=40), ids=wanted, batch_records=7))
    assert [record.exact() for record in found] == [record.exact() for record in reversed(records)]


def test_several_pages_make_one_batch(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chroma_records, "PAGE", 3)
    harness.write(SCHEMA, plain_records(10))
    ((span, ids),) = harness.store.split("docs", span_records=100)
    parts = list(harness.store.scan("docs", span, ids=ids, batch_records=8))
    assert [part.num_rows for part in parts] == [8, 2]
    assert by_id(from_batches(parts)) == by_id(plain_records(10))


def test_a_scan_without_its_ids_fails_rather_than_reading_nothing(embedded: EmbeddedChroma) -> None:
    embedded.write(SCHEMA, plain_records(2))
    with pytest.raises(errors.LedgerError, match="list of ids"):
        list(embedded.store.scan("docs", Span(records=2), batch_records=10))


def test_an_empty_collection_has_no_dimensions_and_no_records(harness: Any) -> None:
    harness.store.create(SCHEMA)
    assert harness.store.describe("docs").vectors[0].dimensions is None
    assert harness.store.fetch("docs", batches.id_batch(["a"])).num_rows == 0
    assert list(harness.store.split("docs", span_records=10)) == []


@pytest.mark.parametrize("metadata", [{"chroma:uri": "s3://b/1"}, {"chroma:uri": "", "a": 1}, {"a": 1}, None])
def test_a_uri_travels_as_a_metadata_field(harness: Any, metadata: dict[str, Any] | None) -> None:
    record = Record(id="a", vectors={"": UNIT}, metadata=metadata)
    harness.write(SCHEMA, [record])
    assert [found.exact() for found in read_all(harness.store)] == [record.exact()]
    harness.store.create(plain_schema("again"))
    harness.store.upsert("again", to_batch([record], SCHEMA))
    assert [found.exact() for found in harness.read("again")] == [record.exact()]


def test_a_collection_with_a_model_opens_without_it(embedded: EmbeddedChroma) -> None:
    embedded.client.create_collection("docs")  # with Chroma's default model
    embedded.store.upsert("docs", to_batch(plain_records(2), SCHEMA))
    assert embedded.store.describe("docs").options["embedding_function"] == "default"
    assert by_id(read_all(embedded.store)) == by_id(plain_records(2))


def test_a_server_that_changes_tells_so(harness: Any) -> None:
    harness.write(SCHEMA, plain_records(5))
    before = harness.store.fingerprint("docs")
    harness.store.upsert("docs", to_batch(plain_records(1, start=5), SCHEMA))
    harness.store.delete("docs", batches.id_batch(["doc#00000"]))  # the count is what it was
    assert harness.store.fingerprint("docs") != before


# ── collections ──────────────────────────────────────────────────────────────────────────────────────


def test_index_metric_and_properties_travel(harness: Any) -> None:
    index = {"type": "hnsw", "m": 24, "ef_construction": 120, "ef_search": 50}
    vector = VectorField(dimensions=8, metric=Metric.DOT, index=index)
    properties = {"owner": "käthe", "version": 2, "share": 0.5, "live": True}
    options = {"hnsw": {"resize_factor": 1.5, "sync_threshold": 500}}
    schema = SCHEMA.model_copy(
        update={"vectors": (vector,), "properties": properties, "options": options, "has_documents": True}
    )
    harness.store.create(schema)
    harness.store.upsert("docs", to_batch(plain_records(1), SCHEMA))
    assert harness.store.describe("docs") == schema


def test_the_older_way_to_set_an_index_is_understood(embedded: EmbeddedChroma) -> None:
    embedded.client.create_collection(
        "docs", metadata={"hnsw:space": "cosine", "hnsw:M": 20, "topic": "law"}, embedding_function=None
    )
    schema = embedded.store.describe("docs")
    assert (schema.vectors[0].metric, schema.vectors[0].index["m"]) == (Metric.COSINE, 20)
    assert schema.properties == {"topic": "law"}


def test_properties_that_chroma_cannot_hold_are_adapted_or_refused(embedded: EmbeddedChroma) -> None:
    schema = SCHEMA.model_copy(update={"properties": {"tags": ["a", "b"], "n": 1}})
    with pytest.raises(errors.ConfigurationError, match="tags"):
        embedded.store.create(schema)
    embedded.store.create(embedded.store.adapt(schema, {}))
    assert embedded.store.describe("docs").properties == {"tags": '["a", "b"]', "n": 1}


def test_more_collections_than_a_page_are_all_listed(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migration_pipelines.stores.chroma._NAMES_PAGE", 2)
    names = [f"c{number:03}" for number in range(5)]
    for name in names:
        harness.store.create(plain_schema(name))
    assert harness.store.list_collections() == names


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────


def test_an_upsert_leaves_nothing_of_the_old_record(harness: Any) -> None:
    old = Record(id="a", vectors={"": UNIT}, document="old", metadata={"k": 1, "chroma:uri": "u"})
    new = Record(id="a", vectors={"": UNIT * 2}, metadata={"other": 2})
    harness.write(SCHEMA, [old, *plain_records(3)])
    harness.store.upsert("docs", to_batch([new], SCHEMA))
    assert by_id(harness.read("docs")) == by_id([new, *plain_records(3)])


def test_what_chroma_holds_comes_back_exactly(harness: Any) -> None:
    dice = random.Random(3)
    floats = [float(f"{dice.randint(-(10**15) + 1, 10**15 - 1)}e{dice.randint(-22, 0)}") for _ in range(400)]
    floats = [value for value in floats if value_kind(value) is ValueKind.SHORT_FLOAT]
    values: list[Any] = [*floats, "", "a\0b", True, 2**53, 2**63 - 1, -(2**63), 1.0, 0.1, ["", "a\0"]]
    values += [[1, 2**63 - 1], [0.5, 0.1, 1.0], [True, False]]
    records = [
        Record(id=f"{row}\0\n🦜", vectors={"": UNIT}, document="\0ü", metadata={"käse.$#": value})
        for row, value in enumerate(values)
    ]
    harness.store.create(SCHEMA)
    harness.store.upsert("docs", to_batch(records, SCHEMA))
    assert by_id(harness.read("docs")) == by_id(records)
    assert by_id(read_all(harness.store, span_records=1000)) == by_id(records)


UNHOLDABLE_METADATA: list[dict[str, Any]] = [
    {},
    {"k": None},
    {"k": math.nan},
    {"k": -0.0},
    {"k": [-0.0]},
    {"k": 0.47547327193434563},
    {"k": 1e22},
    {"k": 2**63},
    {"k": {"a": 1}},
    {"k": [1, "a"]},
    {"k": []},
    {"": 1},
    {"$k": 1},
    {"#k": 1},
    {"chroma:document": "d"},
    {"chroma:else": "dropped without a word"},
    {"chroma:uri": 1},
]


@pytest.mark.parametrize("metadata", UNHOLDABLE_METADATA, ids=repr)
def test_metadata_that_chroma_would_change_is_refused_and_the_old_record_stays(
    embedded: EmbeddedChroma, metadata: dict[str, Any]
) -> None:
    old = Record(id="a", vectors={"": UNIT}, document="old", metadata={"k": 1})
    embedded.write(SCHEMA, [old])
    good = Record(id="b", vectors={"": UNIT})
    new = Record(id="a", vectors={"": UNIT}, metadata=metadata)
    with pytest.raises(errors.RecordRejectedError, match="'a'"):
        embedded.store.upsert("docs", to_batch([good, new], SCHEMA))
    assert by_id(embedded.read("docs")) == by_id([old])


@pytest.mark.parametrize(
    "record",
    [
        Record(id=1, vectors={"": UNIT}),
        Record(id="", vectors={"": UNIT}),
        Record(id="a", vectors={}),
        Record(id="a", vectors={"": np.full(8, np.nan, np.float32)}),
        Record(id="a", vectors={"": np.full(8, -np.inf, np.float32)}),
    ],
    ids=["int id", "empty id", "no vector", "NaN", "infinity"],
)
def test_records_that_chroma_cannot_hold_are_refused(embedded: EmbeddedChroma, record: Record) -> None:
    embedded.write(SCHEMA, plain_records(1))
    with pytest.raises(errors.RecordRejectedError):
        embedded.store.upsert("docs", to_batch([record], SCHEMA))
    assert by_id(embedded.read("docs")) == by_id(plain_records(1))


@pytest.mark.parametrize("length", [1e20, 1e-24])
def test_cosine_refuses_lengths_that_it_would_lose(embedded: EmbeddedChroma, length: float) -> None:
    schema = plain_schema("docs", metric=Metric.COSINE)
    embedded.store.create(schema)
    record = Record(id="a", vectors={"": UNIT * np.float32(length)})
    with pytest.raises(errors.RecordRejectedError, match="cosine"):
        embedded.store.upsert("docs", to_batch([record], schema))
    embedded.store.create(plain_schema("euclid"))
    embedded.store.upsert("euclid", to_batch([record], schema))
    assert by_id(embedded.read("euclid")) == by_id([record])


def test_cosine_keeps_the_lengths_that_it_takes_within_its_tolerance(harness: Any) -> None:
    schema = plain_schema("docs", metric=Metric.COSINE)
    dice = np.random.default_rng(0)
    matrix = dice.standard_normal((300, 8))
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix *= np.resize([1.01e-18, 1e-9, 1.0, 5.0, 1e9, 0.99e18], 300)[:, np.newaxis]
    matrix[7] = 0
    records = [Record(id=str(row), vectors={"": vector}) for row, vector in enumerate(matrix.astype("f4"))]
    harness.store.create(schema)
    harness.store.upsert("docs", to_batch(records, schema))
    tolerance = harness.store.vector_tolerance(schema)
    for wanted, found in zip(records, read_all(harness.store), strict=True):
        np.testing.assert_allclose(found.vectors[""], wanted.vectors[""], rtol=tolerance, atol=0)


def test_vectors_of_another_width_are_refused_before_the_old_ones_go(harness: Any) -> None:
    harness.write(SCHEMA, plain_records(3))
    wide = plain_schema("docs", dimensions=9)
    for start in (0, 3):  # records that are there, and new ones
        with pytest.raises(errors.DimensionMismatchError, match="9"):
            harness.store.upsert("docs", to_batch(plain_records(1, dimensions=9, start=start), wide))
    assert by_id(harness.read("docs")) == by_id(plain_records(3))


def test_a_column_that_chroma_has_no_place_for_is_refused(embedded: EmbeddedChroma) -> None:
    embedded.store.create(SCHEMA)
    schema = SCHEMA.model_copy(update={"has_namespaces": True})
    with pytest.raises(errors.UsageError, match="namespace"):
        embedded.store.upsert("docs", to_batch(plain_records(1), schema))


def test_a_write_that_does_not_show_is_no_success() -> None:
    deaf = SimpleNamespace(get=lambda **_: {"ids": []}, add=lambda **_: None)
    with pytest.raises(errors.TransientError, match="doesn't show all of 2"):
        _chroma_records.replace_records(deaf, {"ids": ["a", "b"]}, where="chroma:x#docs")


def test_batches_larger_than_the_store_takes_are_cut(
    embedded: EmbeddedChroma, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(embedded.client), "get_max_batch_size", lambda _: 4)
    embedded.store.create(SCHEMA)
    embedded.store.upsert("docs", to_batch(plain_records(10), SCHEMA))
    assert by_id(embedded.read("docs")) == by_id(plain_records(10))


def test_a_closed_store_lets_go_of_its_folder_and_opens_again(tmp_path: Path) -> None:
    store = ChromaStore(path=str(tmp_path / "db"))
    for _ in range(2):
        store.create(SCHEMA)
        store.upsert("docs", to_batch(plain_records(3), SCHEMA))
        assert store.count("docs") == 3
        store.close()
        shutil.rmtree(tmp_path / "db")
    assert store.list_collections() == []


# ── addresses, secrets, errors ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "chroma:./folder#docs",
        "chroma:/srv/db?tenant=acme&database=prod#docs",
        "chroma://localhost:8000/docs",
        "chroma://example.org:443/docs?ssl=true",
        "chroma://[::1]:9000/docs?tenant=acme",
    ],
)
def test_addresses_come_back_as_they_were_given(text: str) -> None:
    store, collection = open_address(text)
    assert collection == "docs"
    assert store.address("docs") == text


@pytest.mark.parametrize("text", ["chroma:#docs", "chroma:./db?colour=red#docs", "chroma://h/docs?ssl=maybe"])
def test_addresses_that_say_too_little_or_too_much_are_refused(text: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        open_address(text)


def test_a_store_is_a_folder_or_a_server() -> None:
    for options in ({}, {"path": "db", "host": "localhost"}):
        with pytest.raises(errors.ConfigurationError, match="either a folder"):
            ChromaStore(**options)


def test_a_token_that_no_header_can_carry_is_refused_without_being_shown() -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        ChromaStore(host="localhost", token=SecretStr("hush\nhush"))
    assert "hush" not in str(caught.value)


def test_the_token_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers)
            body = f"no entry for {self.headers['x-chroma-token']}".encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("CHROMA_TOKEN", "s3cr3t-token")
    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store, _ = open_address(f"chroma://127.0.0.1:{server.server_port}/docs")
        with pytest.raises(errors.AuthenticationError) as caught:
            store.count("docs")
        server.shutdown()
    assert {seen[0]["Authorization"], seen[0]["x-chroma-token"]} == {"Bearer s3cr3t-token", "s3cr3t-token"}
    for shown in (str(caught.value), store.address("docs"), repr(store)):
        assert "s3cr3t" not in shown


def test_nothing_at_an_address_is_said_so() -> None:
    with pytest.raises(errors.StoreUnavailableError, match="connect"):
        ChromaStore(host="127.0.0.1", port=1).list_collections()


def test_tenants_and_databases_that_are_not_there_are_a_matter_of_configuration(harness: Any) -> None:
    harness.write(SCHEMA, plain_records(1))
    for division in ({"tenant": "nobody"}, {"database": "nothing"}):
        store = ChromaStore(**{**harness.store.model_dump(), **division})
        with pytest.raises(errors.ConfigurationError, match="not found"):
            store.count("docs")


def test_a_collection_that_is_not_there_is_answered_with_those_that_are(harness: Any) -> None:
    harness.store.create(plain_schema("tenants"))
    for ask in (harness.store.describe, harness.store.count, harness.store.drop):
        with pytest.raises(errors.CollectionNotFoundError, match="there are: tenants"):
            ask("Tenant")
    with pytest.raises(errors.CollectionExistsError):
        harness.store.create(plain_schema("tenants"))


def test_a_full_disk_is_told_though_chroma_does_not_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vague = chroma_errors.InternalError("Failed to apply logs to the metadata segment")
    store = ChromaStore(path=str(tmp_path))
    assert type(store.translate(vague)) is errors.TransientError
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert type(store.translate(vague)) is errors.DiskFullError


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (httpx.ConnectError("refused"), errors.StoreUnavailableError),
        (ValueError("Could not connect to a Chroma server."), errors.StoreUnavailableError),
        (httpx.ReadTimeout("slow"), errors.TransientError),
        (httpx.RemoteProtocolError("peer closed connection"), errors.TransientError),
        (orjson.JSONDecodeError("unexpected end of data", "", 0), errors.TransientError),
        (chroma_errors.RateLimitError("slow down"), errors.TransientError),
        (chroma_errors.InternalError("oops"), errors.TransientError),
        (chroma_errors.InternalError("(code: 5) database is locked"), errors.TransientError),
        (chroma_errors.InternalError("(code: 13) database or disk is full"), errors.DiskFullError),
        (OSError(errno.ENOSPC, "No space left on device"), errors.DiskFullError),
        (chroma_errors.AuthorizationError("no"), errors.AuthenticationError),
        (chroma_errors.ChromaAuthError("no"), errors.AuthenticationError),
        (chroma_errors.InvalidDimensionException("2, not 3"), errors.DimensionMismatchError),
        (chroma_errors.UniqueConstraintError("x"), errors.CollectionExistsError),
        (chroma_errors.QuotaError("too many"), errors.RecordRejectedError),
        (chroma_errors.InternalError("attempt to write a readonly database"), errors.StoreRefusedError),
        (chroma_errors.InvalidArgumentError("no"), errors.StoreRefusedError),
        (ModuleNotFoundError("No module named 'chromadb'"), errors.MissingDriverError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_every_failure_says_what_to_do_next(raised: Exception, expected: type[Exception]) -> None:
    found = ChromaStore(host="localhost").translate(raised)
    assert type(found) is expected
    assert "chroma://localhost:8000/" in str(found)


def test_a_folder_that_another_client_holds_open_is_read_beside_it(source: Path, tmp_path: Path) -> None:
    client: Any = chromadb.PersistentClient(source, Settings(anonymized_telemetry=False))
    assert client.get_collection("docs", embedding_function=None).count() == 60
    store = ChromaStore(path=str(source)).for_reading(tmp_path / "scratch")
    assert by_id(read_all(store)) == by_id(plain_records(60))
    store.close()
    client.close()
