"""A Qdrant server that is gone, busy, cut off or asked too much: nothing is lost, and the error says why."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import UnexpectedResponse

from migration_pipelines import errors
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import Span
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines.stores.qdrant import QdrantStore
from migration_pipelines.stores.qdrant import server as qdrant_server
from migration_pipelines_tests.records import Record, by_id, to_batch
from migration_pipelines_tests.shell import Shell, shell
from migration_pipelines_tests.standins.http import Fault, Reply
from migration_pipelines_tests.standins.qdrant import QdrantStandin
from migration_pipelines_tests.test_qdrant import SCHEMA, read_all, some_records

__all__ = ["shell"]

QUICK = RetryPolicy(delay_seconds=0.001)
KEY = "s3cr3t-of-qdrant"


@pytest.fixture(scope="module")
def server() -> Iterator[QdrantStandin]:
    standin = QdrantStandin()
    with standin.serving():
        yield standin


@pytest.fixture
def standin(server: QdrantStandin) -> Iterator[QdrantStandin]:
    """A server with nothing in it, that asks for no key."""
    yield server
    server.key, server.faults = None, []
    for part in (server.collections, server.aliases, server.requests):
        part.clear()


@pytest.fixture
def store(standin: QdrantStandin) -> Iterator[QdrantStore]:
    opened = QdrantStore(host="127.0.0.1", port=standin.port)
    opened.create(SCHEMA)
    opened.upsert("docs", to_batch(some_records(30), SCHEMA))
    standin.requests.clear()
    yield opened
    opened.close()


def error(status: int, message: str, **headers: str) -> Reply:
    return Reply(status, {"status": {"error": message}, "time": 0.0}, headers)


CALLS: dict[str, Callable[[QdrantStore], Any]] = {
    "describe": lambda store: store.describe("docs"),
    "count": lambda store: store.count("docs"),
    "split": lambda store: list(store.split("docs", span_records=10)),
    "scan": lambda store: list(store.scan("docs", Span(records=30), batch_records=10)),
    "upsert": lambda store: store.upsert("docs", to_batch(some_records(5), SCHEMA)),
    "delete": lambda store: store.delete("docs", to_batch(some_records(5), SCHEMA)),
    "search": lambda store: store.search("docs", np.ones(8), limit=3),
    "aliases": lambda store: store.aliases("docs"),
    "begin_load": lambda store: store.begin_load("docs"),
}


# ── each failure says what to do next ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_server_that_is_gone_is_unavailable(call: Callable[[QdrantStore], Any]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store = QdrantStore(host="127.0.0.1", port=probe.getsockname()[1])
        with pytest.raises(errors.StoreUnavailableError, match="qdrant://"):
            call(store)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (error(401, "Must provide an API key"), errors.AuthenticationError),
        (error(403, "Forbidden: read-only key"), errors.AuthenticationError),
        (error(429, "Rate limiting exceeded", **{"Retry-After": "7"}), errors.TransientError),
        (error(500, "Service internal error: timed out"), errors.TransientError),
        (error(503, "unavailable"), errors.TransientError),
        (error(500, "No space left on device: WAL"), errors.TransientError),
        (Reply(502, b"<html>bad gateway</html>"), errors.TransientError),
        (error(404, "Not found: Collection `docs` doesn't exist!"), errors.CollectionNotFoundError),
    ],
    ids=["401", "403", "429", "500", "503", "full", "502", "404"],
)
def test_every_call_says_what_became_of_it(
    store: QdrantStore,
    standin: QdrantStandin,
    reply: Reply,
    expected: type[Exception],
    call: Callable[[QdrantStore], Any],
) -> None:
    standin.faults = [Fault("/collections/docs", times=1, reply=reply)]
    with pytest.raises(expected) as caught:
        call(store)
    assert type(caught.value) is expected
    if reply.status == 429:
        assert caught.value.facts["retry_after_seconds"] == 7.0
    # Never tried again by the store or its client: that is the engine's.
    assert sum(request.path.startswith("/collections/docs") for request in standin.requests) == 1


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_cut_answer_is_transient(
    store: QdrantStore, standin: QdrantStandin, call: Callable[[QdrantStore], Any]
) -> None:
    standin.faults = [Fault("/collections/docs", cut=True)]
    with pytest.raises(errors.TransientError):
        call(store)


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"{}", b'{"result": null}', b'{"result": {}}', b'{"result": {"status": "acknowledged"}}'],
    ids=str,
)
def test_an_answer_without_proof_is_no_success(
    store: QdrantStore, standin: QdrantStandin, body: bytes
) -> None:
    standin.faults = [Fault("/points", reply=Reply(200, body))]
    with pytest.raises(errors.TransientError):
        store.upsert("docs", to_batch(some_records(2, start=100), SCHEMA))
    standin.faults = [Fault("/scroll", reply=Reply(200, body))]
    with pytest.raises(errors.TransientError):
        read_all(store)
    assert store.count("docs") == 30


def test_a_server_that_never_answers_is_not_waited_for_without_end(standin: QdrantStandin) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = QdrantStore(host="127.0.0.1", port=silent.getsockname()[1], timeout=0.2)
        with pytest.raises(errors.TransientError):
            store.count("docs")


def test_the_key_is_sent_and_never_shown(standin: QdrantStandin) -> None:
    standin.key = KEY
    store = QdrantStore(host="127.0.0.1", port=standin.port, api_key=SecretStr(KEY))
    assert store.list_collections() == []
    standin.faults = [Fault(reply=error(403, f"the key {KEY} may not do that"))]
    with pytest.raises(errors.AuthenticationError) as caught:
        store.list_collections()
    with pytest.raises(errors.AuthenticationError):
        QdrantStore(host="127.0.0.1", port=standin.port).list_collections()
    for shown in (str(caught.value), repr(caught.value.facts), store.address("docs"), repr(store)):
        assert KEY not in shown


@pytest.mark.parametrize("key", ["a\nb", "naïve"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        QdrantStore(host="localhost", api_key=SecretStr(key))
    assert key not in str(caught.value)


# ── writes ───────────────────────────────────────────────────────────────────────────────────────────


def test_every_write_waits_until_it_is_there(store: QdrantStore, standin: QdrantStandin) -> None:
    store.upsert("docs", to_batch(some_records(5), SCHEMA))
    store.delete("docs", to_batch(some_records(2), SCHEMA))
    options = {"qdrant": {"payload_schema": {"n": "integer"}}}
    store.create(SCHEMA.model_copy(update={"name": "other", "options": options}))
    changes = ("/points", "/points/delete", "/index")
    writes = [r for r in standin.requests if r.method in ("PUT", "POST") and r.path.endswith(changes)]
    assert len(writes) == 3
    assert all(request.query.get("wait") == ["true"] for request in writes)


def test_a_large_batch_goes_out_in_requests_below_the_servers_limit(
    store: QdrantStore, standin: QdrantStandin
) -> None:
    records = [
        Record(id=n, vectors={"": np.ones(8, np.float32)}, document="é" * 1_500_000, metadata={})
        for n in range(100, 115)
    ]
    store.upsert("docs", to_batch(records, SCHEMA))
    sizes = [len(request.body) for request in standin.requests if request.method == "PUT"]
    assert len(sizes) > 1
    assert max(sizes) <= 32 * 2**20
    assert store.count("docs") == 45


def test_a_record_beyond_the_limit_is_refused_and_nothing_is_sent(
    store: QdrantStore, standin: QdrantStandin
) -> None:
    large = Record(id=99, vectors={"": np.ones(8, np.float32)}, document="x" * 33 * 2**20, metadata={})
    with pytest.raises(errors.RecordRejectedError, match="33,554,432"):
        store.upsert("docs", to_batch([*some_records(2, start=50), large], SCHEMA))
    assert not [request for request in standin.requests if request.method == "PUT"]


def test_a_server_with_a_smaller_limit_has_its_batches_divided(
    store: QdrantStore, standin: QdrantStandin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("migration_pipelines_tests.standins.qdrant.LARGEST_REQUEST", 20_000)
    store.drop("docs")
    report = moved(some_records(300), store, tmp_path, name="small")
    assert report.status == "complete"
    assert store.count("docs") == 300


# ── through the engine ───────────────────────────────────────────────────────────────────────────────


def moved(records: list[Record], store: QdrantStore, home: Path, *, name: str, **options: Any) -> Any:
    """Move records from memory into `docs`."""
    origin = MemoryStore(name=f"server-{name}")
    origin.create(SCHEMA)
    origin.upsert("docs", to_batch(records, SCHEMA))
    config = MigrationConfig(
        source=origin.address("docs"),
        target=store.address("docs"),
        partition_size=100,
        batch_size=50,
        workers=2,
        retry=QUICK,
        **options,
    )
    return run_migration(Migration(config=config, ledger=ledger_for(config, home)))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/points", times=3, reply=error(503, "overloaded")),
        Fault("/points", times=2, reply=error(429, "Rate limiting exceeded", **{"Retry-After": "0"})),
        Fault("/points", times=2, cut=True),
        Fault("/points", times=2, after=True),
        Fault("/points", times=1, reply=Reply(200, b'{"result":{"operation_id":1,"status":"acknowledged"}}')),
    ],
    ids=["503", "429", "cut", "lost-reply", "acknowledged"],
)
def test_a_migration_outlasts_a_server_in_trouble(
    store: QdrantStore, standin: QdrantStandin, tmp_path: Path, fault: Fault
) -> None:
    store.drop("docs")
    standin.faults = [fault]
    records = some_records(300)
    report = moved(records, store, tmp_path, name=f"trouble-{id(fault)}")
    assert (report.status, report.records["verified"]) == ("complete", 300)
    assert fault.times == 0
    assert by_id(read_all(store)) == by_id(records)


def test_a_poison_record_is_set_aside_and_the_others_arrive(store: QdrantStore, tmp_path: Path) -> None:
    store.drop("docs")
    records = some_records(300)
    records[77] = Record(id=77, vectors={"": np.full(8, np.nan, np.float32)}, metadata={"n": 77})
    report = moved(records, store, tmp_path, name="poison", max_rejects=1)
    assert (report.status, report.records["verified"], report.records["rejected"]) == ("complete", 299, 1)
    assert {record.id for record in read_all(store)} == set(range(300)) - {77}


def test_a_record_that_only_the_server_refuses_is_found(
    store: QdrantStore, standin: QdrantStandin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.drop("docs")
    answer = QdrantStandin.answer

    def picky(self: QdrantStandin, request: Any) -> Reply:
        if request.method == "PUT" and b'"n":33}' in request.body.replace(b" ", b""):
            return error(422, "Validation error in JSON body")
        return answer(self, request)

    monkeypatch.setattr(QdrantStandin, "answer", picky)
    records = [Record(id=n, vectors={"": np.ones(8, np.float32)}, metadata={"n": n}) for n in range(120)]
    report = moved(records, store, tmp_path, name="picky", max_rejects=1)
    assert (report.status, report.records["rejected"]) == ("complete", 1)
    assert {record.id for record in read_all(store)} == set(range(120)) - {33}


def test_requests_are_paced(store: QdrantStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(QdrantStore, "pace", lambda self, sent=0: asked.append(sent))
    store.close()
    store.upsert("docs", to_batch(some_records(5), SCHEMA))
    assert len(asked) == 2  # the collection's settings, the points
    assert asked[1] > 5 * 8


# ── through the command line ─────────────────────────────────────────────────────────────────────────


def test_a_server_that_is_gone_ends_the_command_with_4(shell: Shell, tmp_path: Path) -> None:
    done = shell("inspect", "qdrant://127.0.0.1:1/docs")
    assert done.status == 4
    assert "qdrant://127.0.0.1:1/docs" in done.err


def test_a_refused_login_ends_the_command_with_4_and_shows_no_key(
    standin: QdrantStandin, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.key = "another"
    monkeypatch.setenv("QDRANT_API_KEY", KEY)
    done = shell("inspect", f"qdrant://127.0.0.1:{standin.port}/docs")
    assert done.status == 4
    assert "QDRANT_API_KEY" in done.err
    assert KEY not in done.everything
    assert standin.requests[0].headers["api-key"] == KEY


def test_a_missing_collection_ends_the_command_with_2_and_names_those_there(
    store: QdrantStore, shell: Shell
) -> None:
    done = shell("inspect", store.address("nope"))
    assert done.status == 2
    assert "there are: docs" in done.err


def test_a_server_moves_to_files_by_the_command_line(
    store: QdrantStore, shell: Shell, tmp_path: Path
) -> None:
    done = shell("run", "--source", store.address("docs"), "--target", "parquet:out#docs", "--json")
    assert done.status == 0, done.everything
    assert done.document["records"]["verified"] == 30


# ── the stand-in itself, by the vendor's client ──────────────────────────────────────────────────────


def test_the_vendors_client_finds_the_standin_as_it_finds_a_server(
    standin: QdrantStandin, store: QdrantStore
) -> None:
    client = QdrantClient(port=standin.port, host="127.0.0.1", https=False, check_compatibility=False)
    points, following = client.scroll("docs", limit=10, with_vectors=True)
    assert ([point.id for point in points], following) == (list(range(10)), 10)
    np.testing.assert_array_equal(np.array(points[3].vector, np.float32), some_records(30)[3].vectors[""])
    assert client.get_collection("docs").points_count == 30
    with pytest.raises(UnexpectedResponse, match="404"):
        client.count("nope")
    standin.faults = [Fault(reply=error(429, "Rate limiting exceeded", **{"Retry-After": "3"}))]
    with pytest.raises(ResourceExhaustedResponse) as caught:
        client.count("docs")
    assert caught.value.retry_after_s == 3
    client.close()
    assert qdrant_server.LARGEST_REQUEST == 32 * 2**20
