"""A Weaviate server that is gone, busy, cut off or asked too much: nothing is lost, the error says why."""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from pydantic import SecretStr

from migration_pipelines import errors
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.store import open_address
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines.stores.weaviate import WeaviateStore
from migration_pipelines_tests.conformance import assert_same, ids_of, load, read_all
from migration_pipelines_tests.records import Record, by_id, plain_records, plain_schema, to_batch
from migration_pipelines_tests.shell import Shell, shell
from migration_pipelines_tests.standins.http import Fault, Reply
from migration_pipelines_tests.standins.proxy import Gate
from migration_pipelines_tests.standins.weaviate import WeaviateStandin
from migration_pipelines_tests.standins.weaviate_grpc import GrpcFault
from migration_pipelines_tests.test_weaviate import SCHEMA, some_records

__all__ = ["shell"]

QUICK = RetryPolicy(delay_seconds=0.001)
KEY = "s3cr3t-of-weaviate"


@pytest.fixture(scope="module")
def server() -> Iterator[WeaviateStandin]:
    standin = WeaviateStandin(auto_schema=False)
    with standin.serving():
        yield standin


@pytest.fixture
def standin(server: WeaviateStandin) -> Iterator[WeaviateStandin]:
    """A server with nothing in it, in which nothing goes wrong, that asks for no key."""
    yield server
    server.api_key, server.version = None, "1.32.4"
    for part in (server.classes, server.alias_of, server.requests, server.faults, server.grpc_faults):
        part.clear()


@pytest.fixture
def store(standin: WeaviateStandin) -> Iterator[WeaviateStore]:
    """A store with thirty records in `Docs`."""
    opened = WeaviateStore(host="127.0.0.1", port=standin.port, grpc_port=standin.grpc_port)
    load(opened, SCHEMA, some_records(30))
    yield opened
    opened.close()


def address_of(standin: WeaviateStandin, collection: str = "Docs") -> str:
    return f"weaviate://127.0.0.1:{standin.port}/{collection}?grpc_port={standin.grpc_port}"


CALLS: dict[str, Callable[[WeaviateStore], Any]] = {
    "describe": lambda store: store.describe("Docs"),
    "count": lambda store: store.count("Docs"),
    "split": lambda store: list(store.split("Docs", span_records=10)),
    "fetch": lambda store: store.fetch("Docs", ids_of(some_records(5))),
    "upsert": lambda store: store.upsert("Docs", to_batch(some_records(5), SCHEMA)),
    "delete": lambda store: store.delete("Docs", ids_of(some_records(5))),
    "search": lambda store: store.search("Docs", np.ones(8, np.float32), limit=3),
    "fingerprint": lambda store: store.fingerprint("Docs"),
    "aliases": lambda store: store.aliases("Docs"),
    "begin_load": lambda store: store.begin_load("Docs"),
}


# ── each failure says what to do next ────────────────────────────────────────────────────────────────


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_server_that_is_not_there_is_unavailable(call: Callable[[WeaviateStore], Any]) -> None:
    with pytest.raises(errors.StoreUnavailableError, match="is it running there"):
        call(WeaviateStore(host="127.0.0.1", port=closed_port()))


def test_a_grpc_port_that_nobody_listens_on_is_said_to_be(standin: WeaviateStandin) -> None:
    half = WeaviateStore(host="127.0.0.1", port=standin.port, grpc_port=closed_port())
    half._rest("POST", "/schema", body={"class": "Docs"})
    with pytest.raises(errors.StoreUnavailableError, match="both its ports"):
        half.count("Docs")
    half.close()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, errors.AuthenticationError),
        (403, errors.AuthenticationError),
        (422, errors.StoreRefusedError),
        (429, errors.TransientError),
        (500, errors.TransientError),
        (503, errors.TransientError),
    ],
)
def test_a_status_says_what_becomes_of_the_call(
    store: WeaviateStore, standin: WeaviateStandin, status: int, expected: type[errors.MigrationError]
) -> None:
    body = {"error": [{"message": "because"}]}
    standin.faults.append(Fault("/v1/schema/Docs", reply=Reply(status, body, {"Retry-After": "7"})))
    with pytest.raises(expected, match="because") as caught:
        store.describe("Docs")
    assert type(caught.value) is expected
    assert caught.value.facts["retry_after_seconds"] == 7


CODES = {
    grpc.StatusCode.UNAVAILABLE: errors.TransientError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.TransientError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.TransientError,
    grpc.StatusCode.INTERNAL: errors.TransientError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AuthenticationError,
    grpc.StatusCode.UNKNOWN: errors.StoreRefusedError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.StoreRefusedError,
}


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_a_code_says_what_becomes_of_the_call(
    store: WeaviateStore, standin: WeaviateStandin, code: grpc.StatusCode
) -> None:
    standin.grpc_faults.append(GrpcFault("Aggregate", code, "because", retry_after="3"))
    with pytest.raises(CODES[code], match="because") as caught:
        store.count("Docs")
    assert type(caught.value) is CODES[code]
    assert caught.value.facts["retry_after_seconds"] == 3


def test_a_server_that_is_slow_to_take_a_connection_is_waited_for(
    store: WeaviateStore, standin: WeaviateStandin
) -> None:
    """The least time between two attempts to connect is how long gRPC waits for one, too."""

    def slowly() -> socket.socket:
        time.sleep(0.4)
        return socket.create_connection(("127.0.0.1", standin.grpc_port))

    with (gate := Gate(slowly)).serving():
        far = WeaviateStore(host="127.0.0.1", port=standin.port, grpc_port=gate.port)
        assert far.count("Docs") == 30
        far.close()


def test_a_server_that_comes_back_is_found_again_soon(store: WeaviateStore, standin: WeaviateStandin) -> None:
    """Left alone, gRPC looks for it again after one second, then two, three, …: up to two minutes later."""
    gate = Gate(lambda: socket.create_connection(("127.0.0.1", standin.grpc_port)))
    with gate.serving():
        through = WeaviateStore(host="127.0.0.1", port=standin.port, grpc_port=gate.port)
        assert through.count("Docs") == 30
        gate.close()
        closed = time.monotonic()
        while time.monotonic() < closed + 1.3:
            with pytest.raises(errors.TransientError):
                through.count("Docs")
            time.sleep(0.05)
        gate.open()
        while True:
            with contextlib.suppress(errors.TransientError):
                assert through.count("Docs") == 30
                break
            assert time.monotonic() < closed + 2.1
            time.sleep(0.05)
        through.close()


def test_nothing_is_retried_by_the_connection_itself(store: WeaviateStore, standin: WeaviateStandin) -> None:
    """The vendor's own client waits up to 31 seconds for a server that says that it is unavailable."""
    standin.grpc_requests.clear()
    standin.grpc_faults.append(GrpcFault("Aggregate", times=9))
    with pytest.raises(errors.TransientError):
        store.count("Docs")
    assert [method for method, _ in standin.grpc_requests].count("Aggregate") == 1


def test_a_cut_reply_is_worth_another_try(store: WeaviateStore, standin: WeaviateStandin) -> None:
    standin.faults.append(Fault("/v1/schema", cut=True))
    with pytest.raises(errors.TransientError):
        store.list_collections()
    assert store.list_collections() == ["Docs"]


def test_a_server_that_does_not_answer_in_time_is_left(standin: WeaviateStandin) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        slow = WeaviateStore(host="127.0.0.1", port=deaf.getsockname()[1], timeout_seconds=0.2)
        with pytest.raises(errors.TransientError):
            slow.list_collections()


def test_a_server_that_is_too_old_is_told(standin: WeaviateStandin) -> None:
    standin.version = "1.24.1"
    with pytest.raises(errors.StoreRefusedError, match=r"1\.24\.1.*1\.27"):
        WeaviateStore(host="127.0.0.1", port=standin.port).list_collections()


def test_aliases_need_a_server_that_has_them(standin: WeaviateStandin) -> None:
    standin.version = "1.31.0"
    old = WeaviateStore(host="127.0.0.1", port=standin.port, grpc_port=standin.grpc_port)
    load(old, SCHEMA, [])
    with pytest.raises(errors.UnsupportedOperationError, match=r"1\.32"):
        old.set_alias("Alias", "Docs")
    old.close()


# ── logins ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", [None, KEY])
def test_a_refused_login_is_told_and_its_key_is_not(standin: WeaviateStandin, key: str | None) -> None:
    standin.api_key = "another"
    store = WeaviateStore(host="127.0.0.1", port=standin.port, api_key=SecretStr(key) if key else None)
    with pytest.raises(errors.AuthenticationError, match="WEAVIATE_API_KEY") as caught:
        store.list_collections()
    assert KEY not in str(caught.value)


def test_the_key_goes_with_both_ways_and_is_shown_nowhere(
    standin: WeaviateStandin, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.api_key = KEY
    monkeypatch.setenv("WEAVIATE_API_KEY", KEY)
    store, collection = open_address(address_of(standin))
    assert isinstance(store, WeaviateStore)
    load(store, SCHEMA, some_records(2))
    assert store.count(collection or "") == 2
    assert KEY not in repr(store) + store.address("Docs")
    standin.grpc_faults.append(GrpcFault("Aggregate", details=f"no entry for {KEY}"))
    with pytest.raises(errors.TransientError) as caught:
        store.count("Docs")
    assert KEY not in str(caught.value)
    store.close()


# ── batches of which a part fails ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("invalid text property 'n' on class 'Docs': not a string", errors.RecordRejectedError),
        ("something that nobody has heard of", errors.RecordRejectedError),
        ("invalid int property 'memory_timeout' on class 'Docs'", errors.RecordRejectedError),
        ("no such prop with name 'dimension' found in class 'Docs'", errors.RecordRejectedError),
        ("vector lengths don't match: 3 vs 8", errors.DimensionMismatchError),
        ("put object: context deadline exceeded", errors.TransientError),
        ("store is read-only", errors.TransientError),
        ('cannot achieve consistency level "QUORUM"', errors.TransientError),
        ("class 'Docs' not present in schema", errors.CollectionNotFoundError),
        ('tenant not found: "x"', errors.StoreRefusedError),
    ],
)
def test_what_a_reply_says_of_one_record_is_looked_at(
    store: WeaviateStore,
    standin: WeaviateStandin,
    message: str,
    expected: type[errors.MigrationError],
) -> None:
    standin.grpc_faults.append(GrpcFault("BatchObjects", record_error=message))
    with pytest.raises(expected) as caught:
        store.upsert("Docs", to_batch(some_records(5, start=100), SCHEMA))
    assert type(caught.value) is expected
    assert caught.value.facts["record"] == str(uuid.UUID(int=100))


def test_a_batch_whose_reply_was_lost_can_be_written_again(
    store: WeaviateStore, standin: WeaviateStandin
) -> None:
    records = some_records(40)
    standin.grpc_faults.append(GrpcFault("BatchObjects", after=True))
    with pytest.raises(errors.TransientError):
        store.upsert("Docs", to_batch(records, SCHEMA))
    store.upsert("Docs", to_batch(records, SCHEMA))
    assert_same(read_all(store, "Docs"), records, store)


def test_a_large_batch_goes_in_requests_that_the_server_takes(
    store: WeaviateStore, standin: WeaviateStandin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standin, "max_message_bytes", 50_000)
    small = WeaviateStore(host=store.host, port=store.port, grpc_port=store.grpc_port)
    records = some_records(100, document="x" * 2_000)
    standin.grpc_requests.clear()
    small.upsert("Docs", to_batch(records, SCHEMA))
    sizes = [request.ByteSize() for method, request in standin.grpc_requests if method == "BatchObjects"]
    assert len(sizes) > 3
    assert max(sizes) <= 50_000
    assert_same(read_all(small, "Docs"), records, small)
    small.close()


def test_a_deletion_that_fails_in_part_is_told(store: WeaviateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    access = store._access("Docs")
    call = type(access).call

    def failing(self: Any, method: str, request: Any) -> Any:
        reply = call(self, method, request)
        if method == "BatchDelete":
            reply.failed = 1
        return reply

    monkeypatch.setattr(type(access), "call", failing)
    with pytest.raises(errors.TransientError, match="1 of 5"):
        store.delete("Docs", ids_of(some_records(5)))


# ── through the engine ───────────────────────────────────────────────────────────────────────────────


def moved(source: str, target: str, home: Path, **settings: Any) -> Any:
    config = MigrationConfig(source=source, target=target, partition_size=100, retry=QUICK, **settings)
    return run_migration(Migration(config=config, ledger=ledger_for(config, home)))


def hostile(n: int) -> list[Record]:
    values: list[Any] = [
        None,
        2**60,
        "a\0b",
        {"a": [1, None]},
        [],
        [1, "x"],
        0.1 + 0.2,
        float("nan"),
        b"\xff",
    ]
    records = plain_records(n)
    return [
        replace(r, metadata={**(r.metadata or {}), "Odd": values[at % 9], "any": values[(at * 2) % 9]})
        for at, r in enumerate(records)
    ]


@pytest.fixture
def memory() -> MemoryStore:
    """A store that holds 300 records in `docs`, with whatever metadata can hold."""
    store, _ = open_address(f"memory:{uuid.uuid4().hex}#docs")
    assert isinstance(store, MemoryStore)
    store.create(plain_schema("docs"))
    store.upsert("docs", to_batch(hostile(300), plain_schema("docs")))
    return store


def test_a_collection_goes_there_and_back_through_every_fault(
    memory: MemoryStore, standin: WeaviateStandin, tmp_path: Path
) -> None:
    target = address_of(standin)
    standin.faults += [Fault("/schema", times=2), Fault("/schema", cut=True, times=1)]
    for method in ("BatchObjects", "Search"):
        standin.grpc_faults += [
            GrpcFault(method, times=2),
            GrpcFault(method, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after="0"),
            GrpcFault(method, after=True),
        ]
    standin.grpc_faults.append(GrpcFault("BatchObjects", record_error="context deadline exceeded"))
    there, back = memory.address("docs"), memory.address("back")
    for _ in range(9):  # more goes wrong than one run tries to get over: a person would run it again
        with contextlib.suppress(errors.TransientError):
            if moved(there, target, tmp_path / "there").status == "complete":
                break
    else:
        pytest.fail("it never completed")
    assert not [fault for fault in [*standin.faults, *standin.grpc_faults] if fault.times]
    assert moved(target, back, tmp_path / "back").status == "complete"
    assert by_id(read_all(memory, "back")) == by_id(hostile(300))


def test_a_record_that_the_server_refuses_is_set_aside_and_all_others_arrive(
    memory: MemoryStore, standin: WeaviateStandin, tmp_path: Path
) -> None:
    put = standin.put

    def refusing(name: str, tenant: str, item: Any) -> None:
        if "Passage 77 " in item.properties.get("document", ""):
            from migration_pipelines_tests.standins.weaviate_values import InvalidValueError

            raise InvalidValueError("invalid text property 'document': too odd")
        put(name, tenant, item)

    standin.put = refusing  # type: ignore[method-assign]
    try:
        report = moved(memory.address("docs"), address_of(standin), tmp_path)
    finally:
        del standin.put
    assert report.status == "incomplete"
    assert ["too odd" in reject["reason"] for reject in report.rejects] == [True]
    store, _ = open_address(address_of(standin))
    assert store.count("Docs") == 299


# ── the command line ─────────────────────────────────────────────────────────────────────────────────


def test_the_command_line_moves_there_and_says_0(
    shell: Shell, memory: MemoryStore, standin: WeaviateStandin
) -> None:
    found = shell("run", "--source", memory.address("docs"), "--target", address_of(standin), "--json")
    assert found.status == 0, found.err
    assert found.document["status"] == "complete"
    assert found.document["target"]["count"] == 300


def test_the_command_line_says_4_to_a_server_that_is_gone_or_refuses_the_login(
    shell: Shell, memory: MemoryStore, standin: WeaviateStandin, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = f"weaviate://127.0.0.1:{closed_port()}/Docs"
    assert shell("inspect", gone).status == 4
    standin.api_key = "another"
    monkeypatch.setenv("WEAVIATE_API_KEY", KEY)
    found = shell("run", "--source", memory.address("docs"), "--target", address_of(standin), "--retry", 0)
    assert found.status == 4
    assert KEY not in found.everything


def test_the_command_line_says_2_to_a_collection_that_is_not_there(
    shell: Shell, standin: WeaviateStandin
) -> None:
    found = shell("inspect", address_of(standin, "Nope"))
    assert found.status == 2
    assert "there are: none" in found.err
