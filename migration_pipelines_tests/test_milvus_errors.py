"""What each of Milvus's failures means, and that nothing is lost by any of them.

Behind the failures stands Milvus Lite's engine: what is said to have arrived did.
"""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from pydantic import SecretStr
from pymilvus.grpc_gen import milvus_pb2

from migration_pipelines import errors
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.store import open_address
from migration_pipelines.stores.milvus import MilvusStore
from migration_pipelines_tests.conformance import assert_same, ids_of, load, new_name, new_schema, read_all
from migration_pipelines_tests.milvus_server import Milvus, abort, refuse, serving
from migration_pipelines_tests.records import from_batches, plain_records, plain_schema, to_batch
from migration_pipelines_tests.shell import Shell, fill, shell

__all__ = ["shell"]


@pytest.fixture
def milvus(tmp_path: Path) -> Iterator[Milvus]:
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def store(milvus: Milvus) -> Iterator[MilvusStore]:
    found = milvus.store()
    yield found
    found.close()


def unused_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ── what a failure means ─────────────────────────────────────────────────────────────────────────────


def test_a_server_that_is_gone_is_unavailable() -> None:
    store = MilvusStore(host="127.0.0.1", port=unused_port())
    started = time.monotonic()
    with pytest.raises(errors.StoreUnavailableError, match="is it running"):
        store.count("docs")
    assert time.monotonic() - started < 10  # pymilvus's client would go on trying


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (abort(grpc.StatusCode.UNAVAILABLE), errors.StoreUnavailableError),
        (abort(grpc.StatusCode.UNAUTHENTICATED), errors.AuthenticationError),
        (abort(grpc.StatusCode.PERMISSION_DENIED), errors.AuthenticationError),
        (abort(grpc.StatusCode.RESOURCE_EXHAUSTED), errors.TransientError),
        (abort(grpc.StatusCode.INTERNAL, "stream was reset"), errors.TransientError),
        (abort(grpc.StatusCode.UNIMPLEMENTED), errors.StoreRefusedError),
        (refuse(8), errors.TransientError),
        (refuse(0, error_code="RateLimit"), errors.TransientError),
        (refuse(2, retriable=True), errors.TransientError),
        (refuse(503, "shard delegator not found", retriable=True), errors.TransientError),
        (refuse(101), errors.TransientError),
        (refuse(100), errors.CollectionNotFoundError),
        (refuse(800, "database not found"), errors.ConfigurationError),
        (refuse(1401), errors.AuthenticationError),
        (refuse(1100), errors.StoreRefusedError),
        (refuse(65535), errors.StoreRefusedError),
    ],
)
def test_each_failure_is_the_error_that_says_what_to_do(
    milvus: Milvus, store: MilvusStore, fault: Any, expected: type
) -> None:
    schema = load(store, new_schema(store), plain_records(3))
    milvus.calls.clear()
    milvus.faults["Query"] = [fault]
    with pytest.raises(expected) as caught:
        store.count(schema.name)
    assert type(caught.value) is expected
    assert milvus.calls.count("Query") == 1  # the driver tries nothing again by itself


@pytest.mark.parametrize(
    ("trailers", "seconds"), [({"retry_after": "7"}, 7.0), ({"grpc_retry_pushback_ms": "250"}, 0.25)]
)
def test_the_server_says_how_long_to_wait(
    milvus: Milvus, store: MilvusStore, trailers: dict[str, str], seconds: float
) -> None:
    milvus.faults["ShowCollections"] = [abort(grpc.StatusCode.RESOURCE_EXHAUSTED, **trailers)]
    with pytest.raises(errors.TransientError) as caught:
        store.list_collections()
    assert caught.value.facts["retry_after_seconds"] == seconds


def test_a_call_that_takes_too_long_is_given_up(milvus: Milvus) -> None:
    store = milvus.store(timeout_seconds=0.3)
    milvus.faults["ShowCollections"] = [lambda request, context: time.sleep(1.5)]
    with pytest.raises(errors.TransientError):
        store.list_collections()
    store.close()


def test_the_login_is_sent_and_never_shown(milvus: Milvus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILVUS_PASSWORD", "s3cr3t-word")
    store, _ = open_address(f"milvus://ada@127.0.0.1:{milvus.port}/docs?db=prod")
    milvus.always["DescribeCollection"] = abort(grpc.StatusCode.UNAUTHENTICATED, "no entry for s3cr3t-word")
    with pytest.raises(errors.AuthenticationError) as caught:
        store.count("docs")
    assert base64.b64decode(milvus.metadata[-1]["authorization"]) == b"ada:s3cr3t-word"
    assert milvus.metadata[-1]["dbname"] == "prod"
    assert "s3cr3t" not in str(caught.value)
    assert "s3cr3t" not in store.address("docs") + repr(store)
    store.close()


def test_a_token_goes_before_a_login(milvus: Milvus) -> None:
    store = milvus.store(token=SecretStr("key"), user="ada", password=SecretStr("word"))
    store.list_collections()
    assert base64.b64decode(milvus.metadata[-1]["authorization"]) == b"key"
    store.close()


def test_an_answer_without_a_field_that_was_asked_for_is_not_taken(
    milvus: Milvus, store: MilvusStore
) -> None:
    schema = load(store, new_schema(store), records := plain_records(3))
    data = store._engine().records(
        *(store._collection(schema.name).found, store._collection(schema.name).layout),
        [record.id for record in records],
        None,
        vectors=True,
    )
    milvus.faults["Query"] = [lambda *_: milvus_pb2.QueryResults(fields_data=data[:2])]
    with pytest.raises(errors.TransientError, match="lacks"):
        store.fetch(schema.name, ids_of(records))


# ── a server that isn't Lite is written to by upsert ─────────────────────────────────────────────────


def test_a_server_is_written_to_by_upsert_and_lite_by_insert(milvus: Milvus, store: MilvusStore) -> None:
    schema = load(store, new_schema(store), plain_records(3))
    assert "Upsert" not in milvus.calls
    milvus.always["GetVersion"] = lambda *_: milvus_pb2.GetVersionResponse(version="v2.6.1")
    milvus.calls.clear()
    again = milvus.store()
    again.upsert(schema.name, to_batch(records := plain_records(3, seed=2), schema))
    assert "Insert" not in milvus.calls
    assert_same(read_all(again, schema.name), records, again)
    again.close()


@pytest.mark.parametrize("acknowledged", [0, 2])
def test_fewer_records_acknowledged_than_sent_is_no_success(
    milvus: Milvus, store: MilvusStore, acknowledged: int
) -> None:
    schema = load(store, new_schema(store), [])
    milvus.faults["Insert"] = [lambda *_: milvus_pb2.MutationResult(insert_cnt=acknowledged)]
    with pytest.raises(errors.TransientError, match="acknowledged"):
        store.upsert(schema.name, to_batch(plain_records(3), schema))


def test_records_that_are_marked_as_failed_are_no_success(milvus: Milvus, store: MilvusStore) -> None:
    schema = load(store, new_schema(store), [])
    milvus.faults["Insert"] = [lambda *_: milvus_pb2.MutationResult(insert_cnt=3, err_index=[1])]
    with pytest.raises(errors.TransientError, match="1 of them refused"):
        store.upsert(schema.name, to_batch(plain_records(3), schema))


# ── through the engine ───────────────────────────────────────────────────────────────────────────────


def moved(source: str, target: str, home: Path, **options: Any) -> Any:
    """What a migration reports."""
    settings = {"partition_size": 40, "batch_size": 20, "workers": 2, **options}
    config = MigrationConfig(source=source, target=target, **settings)
    return run_migration(Migration(config=config, ledger=ledger_for(config, home)))


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A collection of a hundred records in memory."""
    address = f"memory:{tmp_path.name}#docs"
    store, name = open_address(address)
    assert name is not None
    store.create(schema := plain_schema(name))
    store.upsert(name, to_batch(plain_records(100), schema))
    return address


def test_a_migration_outlives_what_passes(
    milvus: Milvus, store: MilvusStore, source: str, tmp_path: Path
) -> None:
    passing = [
        abort(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after="0"),
        refuse(8),
        abort(grpc.StatusCode.UNAVAILABLE),
        lambda *_: milvus_pb2.MutationResult(insert_cnt=1),
    ]
    milvus.faults["Insert"] = list(passing)
    milvus.faults["Query"] = [refuse(503, retriable=True), abort(grpc.StatusCode.INTERNAL)]
    name = new_name(store)
    report = moved(source, store.address(name), tmp_path)
    assert report.status == "complete"
    assert not any(milvus.faults.values())
    assert_same(read_all(store, name), plain_records(100), store)

    passing = [abort(grpc.StatusCode.UNAVAILABLE), refuse(8), abort(grpc.StatusCode.INTERNAL)]

    reads: list[Any] = []

    def while_extracting(request: Any, context: grpc.ServicerContext) -> Any:
        if "vector" in request.output_fields:
            reads.append(request)
        # The first one is the plan's sample: a plan is made afresh, not retried.
        return passing.pop()(request, context) if passing and len(reads) > 1 else None

    milvus.always["Query"] = while_extracting
    back = f"memory:{tmp_path.name}-back#docs"
    assert moved(store.address(name), back, tmp_path / "back").status == "complete"
    assert not passing
    assert_same(read_all(open_address(back)[0], "docs"), plain_records(100), open_address(back)[0])


def test_a_record_that_milvus_refuses_is_set_aside_and_the_others_arrive(
    milvus: Milvus, store: MilvusStore, source: str, tmp_path: Path
) -> None:
    def poisoned(request: Any, context: grpc.ServicerContext) -> Any:
        ids = next(data for data in request.fields_data if data.field_name == "id")
        if "doc#00042" in ids.scalars.string_data.data:
            return {"code": 1100, "reason": "the length of json field exceeds max length"}
        return None

    milvus.always["Insert"] = poisoned
    name = new_name(store)
    report = moved(source, store.address(name), tmp_path, max_rejects=1)
    assert report.records["rejected"] == 1
    expected = [record for record in plain_records(100) if record.id != "doc#00042"]
    assert_same(read_all(store, name), expected, store)


def test_a_batch_that_is_too_large_for_the_server_is_divided(source: str, tmp_path: Path) -> None:
    with serving(tmp_path / "small", max_request_bytes=2_500) as server:
        store = server.store()
        name = new_name(store)
        assert moved(source, store.address(name), tmp_path).status == "complete"
        assert_same(read_all(store, name), plain_records(100), store)
        store.close()


def test_a_vector_that_milvus_cannot_hold_is_set_aside(
    store: MilvusStore, source: str, tmp_path: Path
) -> None:
    origin, _ = open_address(source)
    bad = replace(plain_records(1)[0], vectors={"": np.full(8, np.nan, np.float32)})
    origin.upsert("docs", to_batch([bad], plain_schema("docs")))
    name = new_name(store)
    report = moved(source, store.address(name), tmp_path, max_rejects=1)
    assert report.records["rejected"] == 1
    found = from_batches([store.fetch(name, ids_of(plain_records(100)))])
    assert_same(found, plain_records(100)[1:], store)


# ── exit status ──────────────────────────────────────────────────────────────────────────────────────


def test_exit_status_of_the_command_line(shell: Shell, milvus: Milvus) -> None:
    fill("parquet:source#docs")
    gone = f"milvus://127.0.0.1:{unused_port()}/docs"
    here = f"milvus://127.0.0.1:{milvus.port}/docs"
    assert shell("inspect", gone).status == 4
    assert shell("run", "--source", "parquet:source#docs", "--target", gone, "--retry", "0").status == 4
    missing = shell("inspect", here)
    assert missing.status == 2
    assert "there are: none" in missing.err
    assert shell("run", "--source", "parquet:source#docs", "--target", here).status == 0
    assert shell("validate", "--source", "parquet:source#docs", "--target", here).status == 0
    milvus.always["DescribeCollection"] = abort(grpc.StatusCode.UNAUTHENTICATED)
    assert shell("inspect", here).status == 4
