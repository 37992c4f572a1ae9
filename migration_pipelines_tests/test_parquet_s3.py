"""What is special to Parquet folders in an object store: no half a collection, whatever fails."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from migration_pipelines.compare import compare_collections
from migration_pipelines.errors import (
    AuthenticationError,
    CollectionNotFoundError,
    ConfigurationError,
    IncompleteError,
    MissingDriverError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
)
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.store import open_address
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines.stores.parquet import ParquetStore
from migration_pipelines_tests.conformance import assert_same, ids_of, load, read_all
from migration_pipelines_tests.harnesses.parquet_s3 import LOGIN, ParquetOnS3, s3_server
from migration_pipelines_tests.records import Record, by_id, plain_records, plain_schema, to_batch
from migration_pipelines_tests.shell import shell
from migration_pipelines_tests.standins.http import Fault, Reply, Request
from migration_pipelines_tests.standins.proxy import Proxy

__all__ = ["shell"]
SCHEMA = plain_schema("docs")
PLACES = itertools.count(1)
QUICK = RetryPolicy(attempts=3, delay_seconds=0.01)


class S3Proxy(Proxy):
    """Stands before the server, and counts."""

    def sent(self, method: str, query: str = "") -> int:
        """How many requests of a kind came."""
        return sum(r.method == method and query in r.raw_query for r in self.requests)


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[ParquetOnS3]:
    with ParquetOnS3.start(tmp_path_factory.mktemp("s3")) as harness:
        yield harness


@pytest.fixture
def store(s3) -> ParquetStore:
    """A place of its own for each test."""
    return ParquetStore(url=f"s3://{s3.bucket}/place {next(PLACES)}")


@pytest.fixture
def proxy(monkeypatch) -> Iterator[S3Proxy]:
    standin = S3Proxy(s3_server())
    with standin.serving():
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{standin.port}")
        yield standin


def keys(s3: ParquetOnS3, store: ParquetStore) -> list[str]:
    """Every key of a store."""
    prefix = store.url.partition(s3.bucket)[2].lstrip("/") + "/"
    found = s3.client.list_objects_v2(Bucket=s3.bucket, Prefix=prefix)
    return [item["Key"].removeprefix(prefix) for item in found.get("Contents", ())]


def uploads(s3: ParquetOnS3, store: ParquetStore) -> list[str]:
    """The keys of uploads that were begun and neither completed nor aborted."""
    prefix = store.url.partition(s3.bucket)[2].lstrip("/") + "/"
    found = s3.client.list_multipart_uploads(Bucket=s3.bucket, Prefix=prefix)
    return [item["Key"] for item in found.get("Uploads", ())]


def large(n: int = 700) -> list[Record]:
    """Records of more bytes than one piece of an upload, which don't compress."""
    rng = np.random.default_rng(0)
    return [
        Record(id=f"n{number}", vectors={"": np.ones(8, np.float32)}, document=rng.bytes(10_000).hex())
        for number in range(n)
    ]


def settings(source: MemoryStore, target: ParquetStore, **more: Any) -> MigrationConfig:
    return MigrationConfig(
        source=source.address("docs"), target=target.address("docs"), partition_size=20, retry=QUICK, **more
    )


@pytest.fixture
def source(tmp_path) -> MemoryStore:
    found = MemoryStore(name=f"s3-{tmp_path}".replace("/", "-"))
    load(found, SCHEMA, plain_records(60))
    return found


def moved(config: MigrationConfig, home: Path) -> Any:
    return run_migration(Migration(config=config, ledger=ledger_for(config, home)))


# ── loading and publishing ───────────────────────────────────────────────────────────────────────────


def test_a_collection_goes_there_and_back(source, store, tmp_path):
    assert moved(settings(source, store), tmp_path).status == "complete"
    assert compare_collections(source, "docs", store, "docs").agrees
    back = MemoryStore(name=f"{source.name}-back")
    config = MigrationConfig(source=store.address("docs"), target=back.address("docs"), retry=QUICK)
    assert moved(config, tmp_path).status == "complete"
    assert by_id(read_all(back, "docs")) == by_id(plain_records(60))


def test_a_load_is_no_source_until_its_manifest_is_there(s3, store):
    records = plain_records(40)
    store.create(SCHEMA)
    with store.load_part("docs", "0") as write:
        write(to_batch(records, SCHEMA))
        assert store.count("docs") == 0
    assert store.count("docs") == 40
    assert store.describe("docs").options == {"finished": False}
    for read in (lambda: list(store.split("docs", span_records=9)), lambda: store.fingerprint("docs")):
        with pytest.raises(IncompleteError, match="never finished"):
            read()
    store.finish_load("docs")
    assert store.describe("docs") == SCHEMA
    names = [key.partition("~")[0] for key in keys(s3, store)]
    assert names == ["docs/_collection.json", "docs/part-0"]


def test_a_part_that_fails_leaves_no_object_and_no_upload(s3, store):
    store.create(SCHEMA)

    def fail():
        with store.load_part("docs", "0") as write:
            write(to_batch(large(), SCHEMA))
            write(to_batch(large(), SCHEMA))
            assert len(uploads(s3, store)) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert uploads(s3, store) == []
    assert keys(s3, store) == ["docs/.loading/_collection.json"]
    assert store.count("docs") == 0


def test_large_parts_are_sent_in_pieces_and_read_by_ranges(s3, store, proxy):
    records = large(1500)
    load(store, SCHEMA, records)
    assert proxy.sent("POST", "uploads") == 1
    assert proxy.sent("PUT", "partNumber") >= 2
    assert max(len(request.body) for request in proxy.requests) < 9 * 2**20
    assert_same(read_all(store, "docs", span_records=500), records, store)
    found = store.fetch("docs", ids_of(records[700:702]))
    assert found.num_rows == 2


def test_what_killed_runs_left_is_removed_by_the_next_publishing(s3, store):
    records = plain_records(20)
    store.create(SCHEMA)
    with store.load_part("docs", "0") as write:
        write(to_batch(records, SCHEMA))
    (whole,) = [key for key in keys(s3, store) if key.endswith(".parquet")]
    place = f"{store.url.partition(s3.bucket)[2].lstrip('/')}/"
    data = s3.client.get_object(Bucket=s3.bucket, Key=place + whole)["Body"].read()
    # Of another load: a late worker's. Of this one: an older version of the part. And an upload that hangs.
    for stray in ("docs/part-0~00000000.9.0123456789ab.parquet", whole.replace(".1.", ".0.")):
        s3.client.put_object(Bucket=s3.bucket, Key=place + stray, Body=data)
    s3.client.create_multipart_upload(
        Bucket=s3.bucket, Key=f"{place}docs/part-1~00000000.1.0123456789ab.parquet"
    )
    assert store.count("docs") == 20

    store.finish_load("docs")
    assert sorted(keys(s3, store)) == ["docs/_collection.json", whole]
    assert uploads(s3, store) == []
    assert_same(read_all(store, "docs"), records, store)


def test_a_worker_of_an_earlier_load_is_harmless(s3, store):
    store.create(SCHEMA)

    def write_late():
        with store.load_part("docs", "0") as late:
            late(to_batch(plain_records(10, seed=8), SCHEMA))
            store.drop("docs")
            store.create(SCHEMA)
            with store.load_part("docs", "1") as write:
                write(to_batch(plain_records(5), SCHEMA))

    write_late()
    assert store.count("docs") == 5
    store.finish_load("docs")
    assert_same(read_all(store, "docs"), plain_records(5), store)


def test_a_writer_who_read_an_older_manifest_is_told_and_changes_nothing(store, monkeypatch):
    load(store, SCHEMA, plain_records(10))
    other = ParquetStore(url=store.url)
    batch = to_batch(plain_records(3, start=50), SCHEMA)
    from migration_pipelines.stores.parquet import remote_collection

    original = remote_collection.RemoteCollection.put

    def put(self, contents, new):
        monkeypatch.setattr(remote_collection.RemoteCollection, "put", original)
        other.upsert("docs", to_batch(plain_records(2, start=90), SCHEMA))  # as from another machine
        original(self, contents, new)

    monkeypatch.setattr(remote_collection.RemoteCollection, "put", put)
    with pytest.raises(TransientError, match="another writer"):
        store.upsert("docs", batch)
    assert_same(read_all(store, "docs"), [*plain_records(10), *plain_records(2, start=90)], store)
    store.upsert("docs", batch)
    assert store.count("docs") == 15


# ── what fails ───────────────────────────────────────────────────────────────────────────────────────

SLOW_DOWN = Reply(
    503,
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    {"Retry-After": "7", "Content-Type": "application/xml"},
)
DENIED = Reply(
    403,
    b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
    {"Content-Type": "application/xml"},
)


def test_a_bucket_that_is_not_there_is_told(s3):
    store = ParquetStore(url="s3://no-such-bucket/x")
    for operation in (
        lambda: store.create(SCHEMA),
        store.list_collections,
        lambda: store.describe("docs"),
        lambda: store.upsert("docs", to_batch(plain_records(1), SCHEMA)),
    ):
        with pytest.raises(ConfigurationError, match="no such bucket"):
            operation()


def test_a_refused_login_is_told_without_the_secret(store, proxy):
    proxy.faults.append(Fault(times=99, reply=DENIED))
    for operation in (
        lambda: store.create(SCHEMA),
        store.list_collections,
        lambda: store.count("docs"),
        lambda: store.delete("docs", ids_of(plain_records(1))),
    ):
        with pytest.raises(AuthenticationError, match="AWS_ACCESS_KEY_ID") as caught:
            operation()
        assert not any(secret in str(caught.value) for secret in LOGIN.values() if "secret" in secret)


def test_no_login_at_all_is_told(s3, store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(AuthenticationError, match="login"):
        store.count("docs")
    anonymous = ParquetStore(url=store.url, anonymous=True)
    with pytest.raises((CollectionNotFoundError, AuthenticationError)):
        anonymous.count("docs")


def test_a_server_that_is_gone_is_told(s3, store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailableError, match="AWS_ENDPOINT_URL"):
        store.count("docs")


def test_a_request_is_sent_once_and_the_wish_to_wait_is_passed_on(store, proxy):
    proxy.faults.append(Fault(times=99, reply=SLOW_DOWN))
    with pytest.raises(TransientError, match="SlowDown") as caught:
        store.describe("docs")
    assert caught.value.facts["retry_after_seconds"] == "7"
    assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    "fault", [Fault(".parquet", reply=SLOW_DOWN), Fault(".parquet", cut=True)], ids=["503", "cut"]
)
def test_what_breaks_while_records_are_read_is_no_damage(store, proxy, fault):
    load(store, SCHEMA, records := plain_records(50))
    reader = ParquetStore(url=store.url)
    assert reader.count("docs") == 50
    for method in (lambda: read_all(reader, "docs"), lambda: reader.fetch("docs", ids_of(records))):
        proxy.faults.append(Fault(fault.path, reply=fault.reply, cut=fault.cut))
        with pytest.raises(TransientError):
            method()
        assert not proxy.faults[-1].times
    assert_same(read_all(reader, "docs"), records, reader)


@pytest.mark.parametrize("broken", ["docs/part-", "docs/_collection.json", "docs/.loading"])
@pytest.mark.parametrize("times", [1, 8])
def test_a_move_through_a_store_that_fails_loses_nothing(source, store, proxy, tmp_path, broken, times):
    config = settings(source, store)
    proxy.faults.append(Fault(broken, times=times, reply=Reply(503, SLOW_DOWN.body)))
    report = None
    for _ in range(9):
        try:
            report = moved(config, tmp_path)
        except TransientError:
            continue
        if report.status == "complete":
            break
        with pytest.raises((IncompleteError, CollectionNotFoundError, TransientError)):
            list(store.split("docs", span_records=5))
    assert report is not None
    assert report.status == "complete"
    assert not proxy.faults[0].times
    assert by_id(read_all(store, "docs")) == by_id(plain_records(60))


def test_a_piece_that_fails_in_the_middle_of_an_upload_is_no_object(s3, store, proxy):
    store.create(SCHEMA)

    proxy_answer, seen = proxy.answer, []

    def answer(request: Request) -> Reply:
        if "partNumber" in request.raw_query:
            seen.append(request)
            if len(seen) > 1:
                return SLOW_DOWN
        return proxy_answer(request)

    proxy.answer = answer

    def write_all():
        with store.load_part("docs", "0") as write:
            for _ in range(4):
                write(to_batch(large(), SCHEMA))

    with pytest.raises(TransientError):
        write_all()
    assert uploads(s3, store) == []
    assert keys(s3, store) == ["docs/.loading/_collection.json"]

    seen.clear()
    proxy.answer = proxy_answer
    load_again = plain_records(5)
    with store.load_part("docs", "0") as write:
        write(to_batch(load_again, SCHEMA))
    store.finish_load("docs")
    assert_same(read_all(store, "docs"), load_again, store)


def test_a_part_cut_off_by_its_server_is_written_again_by_the_engine(source, store, proxy, tmp_path):
    proxy.faults.append(Fault("docs/part-", times=2, reply=Reply(503, SLOW_DOWN.body)))
    report = moved(settings(source, store), tmp_path)
    assert report.status == "complete"
    assert by_id(read_all(store, "docs")) == by_id(plain_records(60))


def _load_until_killed(url: str, environment: dict[str, str], begun: Any) -> None:
    os.environ |= environment
    store = ParquetStore(url=url)
    with store.load_part("docs", "0") as write:
        write(to_batch(large(), SCHEMA))
        write(to_batch(large(), SCHEMA))
        begun.set()
        threading.Event().wait()


def test_a_process_killed_in_the_middle_of_an_upload_leaves_nothing_that_is_seen(s3, store):
    store.create(SCHEMA)
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    environment = {**LOGIN, "AWS_ENDPOINT_URL": s3_server()}
    process = context.Process(target=_load_until_killed, args=(store.url, environment, begun))
    process.start()
    assert begun.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(uploads(s3, store)) == 1
    assert store.count("docs") == 0
    assert keys(s3, store) == ["docs/.loading/_collection.json"]

    with store.load_part("docs", "0") as write:
        write(to_batch(plain_records(10), SCHEMA))
    store.finish_load("docs")
    assert uploads(s3, store) == []
    assert_same(read_all(store, "docs"), plain_records(10), store)


def test_an_object_that_is_gone_is_told_and_never_skipped(s3, store):
    load(store, SCHEMA, records := plain_records(30))
    (name,) = [key for key in keys(s3, store) if key.endswith(".parquet")]
    s3.client.delete_object(Bucket=s3.bucket, Key=f"{store.url.partition(s3.bucket)[2].lstrip('/')}/{name}")
    for read in (lambda: read_all(store, "docs"), lambda: store.fetch("docs", ids_of(records))):
        with pytest.raises(StoreRefusedError, match="is gone; restore it"):
            read()


def test_requests_are_paced(s3, store):
    load(store, SCHEMA, plain_records(5))
    slow = ParquetStore(url=store.url, requests_per_second=20)
    started = time.monotonic()
    for _ in range(5):
        slow.describe("docs")
    assert time.monotonic() - started >= 4 / 20


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "url", "collection"),
    [
        ("parquet:s3://bucket/prefix#docs", "s3://bucket/prefix", "docs"),
        ("parquet:s3://bucket/prefix/docs", "s3://bucket/prefix", "docs"),
        ("parquet:s3://bucket/prefix/", "s3://bucket/prefix", None),
        ("parquet:s3://bucket/", "s3://bucket", None),
        ("parquet:s3://bucket", "s3://bucket", None),
        ("parquet:s3://bucket#docs", "s3://bucket", "docs"),
        ("parquet:gs://bucket/a/b/c", "gs://bucket/a/b", "c"),
        ("parquet:memory://a/b", "memory://a", "b"),
        ("parquet:s3://bucket/x?anonymous=true#docs", "s3://bucket/x", "docs"),
        ("parquet:s3://bucket/x?namespace=a#docs", "s3://bucket/x", "docs"),
    ],
)
def test_an_address_is_read_without_a_request(text, url, collection):
    found, name = open_address(text)
    assert (found.url, found.path, name) == (url, None, collection)
    again, same = open_address(found.address(name))
    assert (again.model_dump(), same) == (found.model_dump(), name)


@pytest.mark.parametrize("place", ["AKIA:sEcReT@bucket/x", "AKIA:a/sEcReT@bucket/x", "sEcReT@bucket/x"])
def test_an_address_with_a_login_is_refused_and_not_repeated(place):
    for make in (
        lambda: open_address(f"parquet:s3://{place}#docs"),
        lambda: ParquetStore(url=f"s3://{place}"),
    ):
        with pytest.raises(ConfigurationError, match="holds no login") as caught:
            make()
        assert "sEcReT" not in str(caught.value)


def test_a_missing_driver_and_an_unknown_scheme_are_told(monkeypatch):
    import fsspec

    def missing(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(MissingDriverError, match=r"migration-pipelines\[s3\]"):
        ParquetStore(url="s3://bucket/x").list_collections()
    monkeypatch.undo()
    with pytest.raises(ConfigurationError, match="knows no nonsense://"):
        ParquetStore(url="nonsense://bucket/x").list_collections()


def test_any_file_system_of_fsspec_will_do(source, tmp_path):
    store = ParquetStore(url=f"memory://{tmp_path.name}")
    assert moved(settings(source, store), tmp_path).status == "complete"
    assert by_id(read_all(store, "docs")) == by_id(plain_records(60))
    store.upsert("docs", to_batch(plain_records(5, seed=3), SCHEMA))
    assert store.count("docs") == 60
    assert store.list_collections() == ["docs"]
    store.drop("docs")
    assert store.list_collections() == []


# ── by the command line ──────────────────────────────────────────────────────────────────────────────


def test_the_command_line_moves_there_and_tells_what_fails_by_its_status(
    s3, store, tmp_path, shell, monkeypatch
):
    load(ParquetStore(path=tmp_path), SCHEMA, plain_records(30))
    move = (
        "run",
        "--source",
        f"parquet:{tmp_path}#docs",
        "--target",
        store.address("docs"),
        "--json",
        "--quiet",
    )
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        assert shell(*move).status == 4
    missing = shell("inspect", "parquet:s3://no-such-bucket/x#docs")
    assert missing.status == 2
    assert "no such bucket" in missing.err
    assert shell(*move).document["status"] == "complete"
    assert shell("inspect", store.address("docs"), "--json").document["count"] == 30
    compared = shell("validate", "--source", f"parquet:{tmp_path}#docs", "--target", store.address("docs"))
    assert compared.status == 0
