"""A Qdrant server whose points go by gRPC: the same is read and written as by HTTP, and nothing is lost."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import qdrant_edge as edge
from pydantic import SecretStr
from qdrant_client import grpc as wire

from migration_pipelines import errors, filters
from migration_pipelines.model import DType, IdKind, Metric, Span, VectorField, VectorKind
from migration_pipelines.store import open_address
from migration_pipelines.stores.qdrant import QdrantStore
from migration_pipelines_tests.records import Record, by_id, from_batches, to_batch
from migration_pipelines_tests.shell import Shell, shell
from migration_pipelines_tests.standins.proxy import Gate
from migration_pipelines_tests.standins.qdrant_grpc import GrpcFault, QdrantGrpcStandin
from migration_pipelines_tests.test_qdrant import SCHEMA, read_all, some_records
from migration_pipelines_tests.test_qdrant_server import moved

__all__ = ["shell"]

KEY = "s3cr3t-of-qdrant"
BY_GRPC = ("Upsert", "Scroll", "Get", "Delete", "Count")
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def server() -> Iterator[QdrantGrpcStandin]:
    standin = QdrantGrpcStandin()
    with standin.serving():
        yield standin


@pytest.fixture
def standin(server: QdrantGrpcStandin) -> Iterator[QdrantGrpcStandin]:
    """A server with nothing in it, that asks for no key."""
    yield server
    server.key, server.grpc_faults, server.is_old = None, [], False
    for part in (server.collections, server.requests, server.grpc_requests):
        part.clear()


@pytest.fixture
def store(standin: QdrantGrpcStandin) -> Iterator[QdrantStore]:
    opened = QdrantStore(host="127.0.0.1", port=standin.port, grpc_port=standin.grpc_port)
    opened.create(SCHEMA)
    opened.upsert("docs", to_batch(some_records(30), SCHEMA))
    forget(standin)
    yield opened
    opened.close()


def forget(standin: QdrantGrpcStandin) -> None:
    standin.requests.clear()
    standin.grpc_requests.clear()


def by_http(standin: QdrantGrpcStandin) -> QdrantStore:
    """The same server, its points by HTTP."""
    return QdrantStore(host="127.0.0.1", port=standin.port)


def paths(standin: QdrantGrpcStandin) -> set[str]:
    """Which of the points' routes were gone to by HTTP."""
    return {request.path for request in standin.requests if "/points" in request.path}


def with_metadata(metadata: dict[str, Any], record_id: int = 99) -> Record:
    return Record(id=record_id, vectors={"": np.ones(8, np.float32)}, document=None, metadata=metadata)


CALLS: dict[str, Callable[[QdrantStore], Any]] = {
    "Upsert": lambda store: store.upsert("docs", to_batch(some_records(5), SCHEMA)),
    "Scroll": lambda store: list(store.scan("docs", Span(records=30), batch_records=10)),
    "Get": lambda store: store.fetch("docs", to_batch(some_records(5), SCHEMA)),
    "Delete": lambda store: store.delete("docs", to_batch(some_records(5), SCHEMA)),
    "Count": lambda store: store.count("docs"),
}


# ── what goes by which way ───────────────────────────────────────────────────────────────────────────


def test_points_go_by_grpc_and_settings_by_http(store: QdrantStore, standin: QdrantGrpcStandin) -> None:
    for call in CALLS.values():
        call(store)
    assert {method for method, _ in standin.grpc_requests} == set(BY_GRPC)
    assert paths(standin) == set()
    assert all(request.wait for method, request in standin.grpc_requests if method in ("Upsert", "Delete"))


def test_vectors_arrive_bit_for_bit(store: QdrantStore, standin: QdrantGrpcStandin) -> None:
    odd = np.array([1e-45, 3.4028235e38, -0.0, 1 / 3, 1e-38, 0.1, 16777217, -1e-40], np.float32)
    store.upsert("docs", to_batch([Record(id=1, vectors={"": odd}, metadata={})], SCHEMA))
    ((_, request),) = standin.grpc_requests
    assert np.array(request.points[0].vectors.vector.dense.data, np.float32).tobytes() == odd.tobytes()
    (record,) = from_batches([store.fetch("docs", to_batch([Record(id=1)], SCHEMA))])
    assert record.vectors[""].tobytes() == odd.tobytes()


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
def test_every_kind_of_vector_is_read_from_new_servers_and_old(
    standin: QdrantGrpcStandin, store: QdrantStore, is_old: bool
) -> None:
    schema = SCHEMA.model_copy(
        update={
            "name": "kinds",
            "vectors": (
                VectorField(name="d", dimensions=3, metric=Metric.DOT),
                VectorField(name="h", dimensions=3, metric=Metric.DOT, dtype=DType.FLOAT16),
                VectorField(name="u", dimensions=3, metric=Metric.COSINE, dtype=DType.UINT8),
                VectorField(name="m", dimensions=3, metric=Metric.DOT, kind=VectorKind.MULTI),
                VectorField(name="s", kind=VectorKind.SPARSE, dimensions=None, metric=Metric.DOT),
            ),
        }
    )
    vectors = {
        "d": [np.array([1, 0.1, -2], np.float32)],
        "h": [np.array([1, 0.1, -2], np.float16)],
        "u": [np.array([1, 0, 255], np.uint8)],
        "m": [np.array([[1, 0.1, -2], [3, 4, 5]], np.float32)],
        "s": [{"indices": [3, 7], "values": [0.5, -1.0]}],
    }
    table = to_batch(
        [
            Record(id=1, vectors={name: found[0] for name, found in vectors.items()}, metadata={}),
            Record(id=2, vectors=dict.fromkeys(vectors), metadata={}),
            Record(id=3, vectors={**dict.fromkeys(vectors), "s": {"indices": [], "values": []}}, metadata={}),
        ],
        schema,
    )
    standin.is_old = is_old
    store.create(schema)
    store.upsert("kinds", table)
    assert store.fetch("kinds", table).equals(by_http(standin).fetch("kinds", table))
    (one, two, three) = sorted(from_batches([store.fetch("kinds", table)]), key=lambda record: record.id)
    assert one.vectors["h"].tobytes() == vectors["h"][0].tobytes()
    assert one.vectors["m"].tobytes() == vectors["m"][0].tobytes()
    assert set(two.vectors.values()) == {None}
    assert three.vectors["s"] == {"indices": [], "values": []}


@pytest.mark.parametrize("big", [2**63, 2**63 + 1, 2**64 - 1])
@pytest.mark.parametrize("wrapped", [lambda n: n, lambda n: [1, {"n": n}]], ids=["field", "inside"])
def test_an_integer_that_grpc_would_change_goes_and_comes_by_http(
    store: QdrantStore, standin: QdrantGrpcStandin, big: int, wrapped: Callable[[int], Any]
) -> None:
    store.upsert("docs", to_batch([with_metadata({"n": wrapped(big)})], SCHEMA))
    assert standin.grpc_requests == []
    forget(standin)
    found = read_all(store)
    assert repr(found[-1].metadata) == repr({"n": wrapped(big)})
    (asked,) = [request.json() for request in standin.requests if request.path.endswith("/docs/points")]
    assert asked["ids"] == [99]  # none but the one in doubt
    assert by_id(found) == by_id(read_all(by_http(standin)))


@pytest.mark.parametrize("double", [2.0**63, 9.5e18, 2.0**64, 1e300, -(2.0**63), -1e19])
def test_a_large_double_of_a_foreign_point_stays_a_double(
    store: QdrantStore, standin: QdrantGrpcStandin, double: float
) -> None:
    point = wire.PointStruct(
        id=wire.PointId(num=99),
        payload={"x": wire.Value(double_value=double)},
        vectors=wire.Vectors(vector=wire.Vector(dense=wire.DenseVector(data=[1.0] * 8))),
    )
    with grpc.insecure_channel(f"127.0.0.1:{standin.grpc_port}") as channel:
        stub: Any = wire.PointsStub
        stub(channel).Upsert(wire.UpsertPoints(collection_name="docs", wait=True, points=[point]))
    (record,) = from_batches([store.fetch("docs", to_batch([Record(id=99)], SCHEMA))])
    assert repr(record.metadata) == repr({"x": double})


def test_a_point_that_is_deleted_while_it_is_in_doubt_is_left_out(
    store: QdrantStore, standin: QdrantGrpcStandin, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.upsert("docs", to_batch([with_metadata({"n": 2**63})], SCHEMA))
    answer = QdrantGrpcStandin.answer

    def deleting(self: QdrantGrpcStandin, request: Any) -> Any:
        if request.path.endswith("/docs/points"):
            shard = self.collections["docs"].shards[None]
            shard.update(edge.UpdateOperation.delete_points([99]))
        return answer(self, request)

    monkeypatch.setattr(QdrantGrpcStandin, "answer", deleting)
    assert {record.id for record in read_all(store)} == set(range(30))


def nested(depth: int) -> Any:
    value: Any = "the bottom"
    for _ in range(depth):
        value = {"in": value}
    return value


@pytest.mark.parametrize("depth", [1, 23, 24, 31, 32, 33, 60])
def test_metadata_deeper_than_a_message_may_be_comes_back(
    store: QdrantStore, standin: QdrantGrpcStandin, depth: int
) -> None:
    record = with_metadata({"deep": nested(depth)})
    store.upsert("docs", to_batch([record], SCHEMA))
    assert by_id(read_all(store)) == by_id([*some_records(30), record])
    (found,) = from_batches([store.fetch("docs", to_batch([record], SCHEMA))])
    assert found.metadata == record.metadata


def test_a_filtered_scan_is_that_of_http(store: QdrantStore, standin: QdrantGrpcStandin) -> None:
    where = filters.parse({"n": {"$gte": 20}})
    assert {record.id for record in read_all(store, where=where)} == set(range(20, 30))


def test_uuids_and_the_largest_id_are_read_in_the_order_of_http(
    store: QdrantStore, standin: QdrantGrpcStandin
) -> None:
    schema = SCHEMA.model_copy(update={"id_kinds": frozenset({IdKind.INT, IdKind.UUID})})
    ids = [2**64 - 1, 2**63, uuid.UUID(int=5), uuid.UUID(int=2**127)]
    records = [Record(id=i, vectors={"": np.ones(8, np.float32)}, metadata={}) for i in ids]
    store.upsert("docs", to_batch(records, schema))
    assert [r.id for r in read_all(store)] == [r.id for r in read_all(by_http(standin))]
    assert set(ids) < {record.id for record in read_all(store)}


def test_a_large_batch_goes_out_in_several_requests_and_one_beyond_the_limit_not_at_all(
    store: QdrantStore, standin: QdrantGrpcStandin
) -> None:
    records = [Record(id=n, document="é" * 1_500_000, metadata={}) for n in range(100, 105)]
    for record in records:
        record.vectors[""] = np.ones(8, np.float32)
    store.upsert("docs", to_batch(records, SCHEMA))
    sizes = [request.ByteSize() for _, request in standin.grpc_requests]
    assert len(sizes) > 1
    assert max(sizes) < 9 * 2**20
    forget(standin)
    large = with_metadata({"text": "x" * 33 * 2**20})
    with pytest.raises(errors.RecordRejectedError, match="33,554,432"):
        store.upsert("docs", to_batch([*records, large], SCHEMA))
    assert standin.grpc_requests == []


def test_points_of_chosen_shards_keep_them(store: QdrantStore, standin: QdrantGrpcStandin) -> None:
    options = {"qdrant": {"sharding_method": "custom", "shard_keys": [7, "eu"]}}
    store.create(SCHEMA.model_copy(update={"name": "sharded", "options": options}))
    records = [with_metadata({"_source_shard_key": key}, n) for n, key in enumerate([7, "eu", 7])]
    store.upsert("sharded", to_batch(records, SCHEMA))
    assert by_id(read_all(store, "sharded")) == by_id(records)
    assert by_id(read_all(by_http(standin), "sharded")) == by_id(records)


# ── each failure says what to do next ────────────────────────────────────────────────────────────────


def test_a_grpc_port_that_nobody_listens_at_is_unavailable(
    standin: QdrantGrpcStandin, store: QdrantStore
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gone = QdrantStore(host="127.0.0.1", port=standin.port, grpc_port=probe.getsockname()[1])
        for call in CALLS.values():
            with pytest.raises(errors.StoreUnavailableError, match="its port for gRPC"):
                call(gone)


def test_a_server_that_is_slow_to_take_a_connection_is_waited_for(
    store: QdrantStore, standin: QdrantGrpcStandin
) -> None:
    """The least time between two attempts to connect is how long gRPC waits for one, too."""

    def slowly() -> socket.socket:
        time.sleep(0.4)
        return socket.create_connection(("127.0.0.1", standin.grpc_port))

    with (gate := Gate(slowly)).serving():
        far = QdrantStore(host="127.0.0.1", port=standin.port, grpc_port=gate.port)
        assert far.count("docs") == 30
        far.close()


def test_a_server_that_comes_back_is_found_again_within_three_seconds(
    store: QdrantStore, standin: QdrantGrpcStandin
) -> None:
    gate = Gate(lambda: socket.create_connection(("127.0.0.1", standin.grpc_port)))
    with gate.serving():
        through = QdrantStore(host="127.0.0.1", port=standin.port, grpc_port=gate.port)
        assert through.count("docs") == 30
        gate.close()
        for _ in range(5):
            with pytest.raises(errors.TransientError):
                through.count("docs")
        gate.open()
        for attempt in range(30):
            try:
                assert through.count("docs") == 30
                break
            except errors.TransientError:
                assert attempt < 29
                time.sleep(0.1)


@pytest.mark.parametrize("method", BY_GRPC)
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (GrpcFault(code=Code.UNAUTHENTICATED, details="Must provide an API key"), errors.AuthenticationError),
        (GrpcFault(code=Code.PERMISSION_DENIED, details="read-only"), errors.AuthenticationError),
        (
            GrpcFault(code=Code.RESOURCE_EXHAUSTED, details="Rate limiting exceeded", retry_after="7"),
            errors.TransientError,
        ),
        (GrpcFault(code=Code.UNAVAILABLE, details="overloaded"), errors.TransientError),
        (GrpcFault(code=Code.DEADLINE_EXCEEDED, details="timed out"), errors.TransientError),
        (GrpcFault(code=Code.INTERNAL, details="Service internal error"), errors.TransientError),
        (GrpcFault(code=Code.INTERNAL, details="No space left on device: WAL"), errors.TransientError),
        (
            GrpcFault(code=Code.NOT_FOUND, details="Not found: Collection `docs` doesn't exist!"),
            errors.CollectionNotFoundError,
        ),
        (GrpcFault(code=Code.UNIMPLEMENTED, details="no such method"), errors.StoreRefusedError),
    ],
    ids=lambda value: value.code.name if isinstance(value, GrpcFault) else "",
)
def test_every_call_says_what_became_of_it(
    store: QdrantStore, standin: QdrantGrpcStandin, method: str, fault: GrpcFault, expected: type[Exception]
) -> None:
    standin.grpc_faults = [GrpcFault(**{**vars(fault), "times": 1, "method": method})]
    with pytest.raises(expected, match="qdrant://") as caught:
        CALLS[method](store)
    assert type(caught.value) is expected
    if fault.retry_after is not None:
        assert caught.value.facts["retry_after_seconds"] == 7.0
    # Never tried again by the store or by gRPC: that is the engine's.
    assert len([name for name, _ in standin.grpc_requests if name == method]) == 1


@pytest.mark.parametrize(
    ("method", "expected"),
    [("Upsert", errors.RecordRejectedError), ("Scroll", errors.StoreRefusedError)],
)
def test_what_is_refused_of_a_write_is_the_records_fault(
    store: QdrantStore, standin: QdrantGrpcStandin, method: str, expected: type[Exception]
) -> None:
    standin.grpc_faults = [GrpcFault(method, Code.INVALID_ARGUMENT, "Wrong input: cannot convert")]
    with pytest.raises(expected) as caught:
        CALLS[method](store)
    assert type(caught.value) is expected


def test_a_message_that_is_too_large_for_a_gateway_is_divided(
    store: QdrantStore, standin: QdrantGrpcStandin
) -> None:
    words = "Received message larger than max (5000000 vs. 4194304)"
    standin.grpc_faults = [GrpcFault("Upsert", Code.RESOURCE_EXHAUSTED, words)]
    with pytest.raises(errors.RecordRejectedError):
        CALLS["Upsert"](store)


@pytest.mark.parametrize("status", [wire.UpdateStatus.Acknowledged, wire.UpdateStatus.WaitTimeout, 0])
@pytest.mark.parametrize("method", ["Upsert", "Delete"])
def test_a_write_that_isnt_completed_is_no_success(
    store: QdrantStore, standin: QdrantGrpcStandin, method: str, status: Any
) -> None:
    standin.grpc_faults = [GrpcFault(method, status=status)]
    with pytest.raises(errors.TransientError, match="completed"):
        CALLS[method](store)


def test_a_server_that_never_answers_is_not_waited_for_without_end(
    store: QdrantStore, standin: QdrantGrpcStandin
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        slow = QdrantStore(host="127.0.0.1", port=standin.port, grpc_port=port, timeout=0.3)
        with pytest.raises(errors.TransientError):
            slow.count("docs")


def test_the_key_is_sent_and_never_shown(standin: QdrantGrpcStandin, store: QdrantStore) -> None:
    standin.key = KEY
    ports = {"port": standin.port, "grpc_port": standin.grpc_port}
    known = QdrantStore(host="127.0.0.1", api_key=SecretStr(KEY), **ports)
    assert known.count("docs") == 30
    standin.grpc_faults = [GrpcFault("", Code.PERMISSION_DENIED, f"the key {KEY} may not do that")]
    with pytest.raises(errors.AuthenticationError) as caught:
        known.count("docs")
    assert KEY not in str(caught.value) + repr(caught.value.facts) + repr(known)
    with pytest.raises(errors.AuthenticationError):
        QdrantStore(host="127.0.0.1", **ports).count("docs")


def test_with_https_grpc_asks_for_tls_too(standin: QdrantGrpcStandin) -> None:
    found, _ = open_address(
        f"qdrant://127.0.0.1:{standin.port}/docs?https=true&grpc_port={standin.grpc_port}"
    )
    with pytest.raises(errors.TransientError):  # the stand-in speaks none
        found.count("docs")
    assert standin.grpc_requests == []


def test_calls_are_paced(store: QdrantStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(QdrantStore, "pace", lambda self, sent=0: asked.append(sent))
    store.close()
    store.upsert("docs", to_batch(some_records(5), SCHEMA))
    assert len(asked) == 2  # the collection's settings, the points
    assert asked[1] > 5 * 8 * 4


# ── through the engine ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fault",
    [
        GrpcFault("Upsert", Code.UNAVAILABLE, times=3),
        GrpcFault("Upsert", Code.RESOURCE_EXHAUSTED, retry_after="0", times=2),
        GrpcFault("Upsert", Code.DEADLINE_EXCEEDED, after=True, times=2),
        GrpcFault("Upsert", status=wire.UpdateStatus.Acknowledged),
        GrpcFault("Get", Code.INTERNAL, times=1),
    ],
    ids=["unavailable", "exhausted", "lost-reply", "acknowledged", "get"],
)
def test_a_migration_outlasts_a_server_in_trouble(
    store: QdrantStore, standin: QdrantGrpcStandin, tmp_path: Path, fault: GrpcFault
) -> None:
    store.drop("docs")
    fault = GrpcFault(**vars(fault))
    standin.grpc_faults = [fault]
    records = some_records(300)
    report = moved(records, store, tmp_path, name=f"grpc-{id(fault)}")
    assert (report.status, report.records["verified"]) == ("complete", 300)
    assert by_id(read_all(store)) == by_id(records)
    assert fault.times == 0


def test_a_connection_that_is_cut_loses_nothing(
    store: QdrantStore, standin: QdrantGrpcStandin, tmp_path: Path
) -> None:
    gate = Gate(lambda: socket.create_connection(("127.0.0.1", standin.grpc_port)))
    with gate.serving():
        through = QdrantStore(host="127.0.0.1", port=standin.port, grpc_port=gate.port)
        gate.cut_after = 300
        with pytest.raises(errors.TransientError):
            list(through.scan("docs", Span(records=30), batch_records=30))
        gate.cut_after = None
        through.close()
        store.drop("docs")
        records = some_records(300)
        assert moved(records, through, tmp_path, name="grpc-cut").status == "complete"
    assert by_id(read_all(store)) == by_id(records)


def test_a_poison_record_is_set_aside_and_the_others_arrive(
    store: QdrantStore, standin: QdrantGrpcStandin, tmp_path: Path
) -> None:
    store.drop("docs")
    records = some_records(300)
    records[77] = Record(id=77, vectors={"": np.full(8, np.nan, np.float32)}, metadata={"n": 77})
    report = moved(records, store, tmp_path, name="grpc-poison", max_rejects=1)
    assert (report.status, report.records["rejected"]) == ("complete", 1)
    assert {record.id for record in read_all(store)} == set(range(300)) - {77}


# ── through the command line ─────────────────────────────────────────────────────────────────────────


def test_a_server_moves_to_files_by_the_command_line(
    store: QdrantStore, standin: QdrantGrpcStandin, shell: Shell
) -> None:
    address = store.address("docs")
    assert f"grpc_port={standin.grpc_port}" in address
    done = shell("run", "--source", address, "--target", "parquet:out#docs", "--json")
    assert done.status == 0, done.everything
    assert done.document["records"]["verified"] == 30
    assert "Scroll" in {method for method, _ in standin.grpc_requests}


def test_a_grpc_port_that_is_gone_ends_the_command_with_4(
    store: QdrantStore, standin: QdrantGrpcStandin, shell: Shell
) -> None:
    done = shell("inspect", f"qdrant://127.0.0.1:{standin.port}/docs?grpc_port=1")
    assert done.status == 4
    assert "gRPC" in done.err
