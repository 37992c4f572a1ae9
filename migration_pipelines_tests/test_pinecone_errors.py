"""What each of Pinecone's failures becomes, and that there is one attempt and no secret in any of them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from migration_pipelines import errors
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.store import open_address
from migration_pipelines.stores.pinecone import PineconeStore
from migration_pipelines.stores.pinecone.client import check_host, open_control
from migration_pipelines_tests.conformance import ids_of, read_all, spans_of
from migration_pipelines_tests.records import by_id, plain_records, plain_schema, to_batch
from migration_pipelines_tests.shell import Shell, fill, shell
from migration_pipelines_tests.standins.http import Fault, Reply
from migration_pipelines_tests.standins.pinecone import KEY, KEY_WITHOUT_RIGHTS, PineconeStandin

__all__ = ["shell"]

SCHEMA = plain_schema("docs")
RECORDS = plain_records(20)


@pytest.fixture
def standin() -> Iterator[PineconeStandin]:
    """A service of its own."""
    standin = PineconeStandin()
    with standin.serving():
        yield standin


@pytest.fixture
def store(standin: PineconeStandin) -> Iterator[PineconeStore]:
    """A store with 20 records in `docs`."""
    store = PineconeStore(api_key=SecretStr(KEY), host=standin.host, freshness_seconds=0.2)
    store.create(SCHEMA)
    store.upsert("docs", to_batch(RECORDS, SCHEMA))
    yield store
    store.close()


OPERATIONS: dict[str, tuple[str, Callable[[PineconeStore], Any]]] = {
    "indexes": ("/indexes", lambda store: store.list_collections()),
    "describe": ("/indexes/docs", lambda store: store.describe("docs")),
    "stats": ("/describe_index_stats", lambda store: store.describe("docs")),
    "list": ("/vectors/list", lambda store: store.count("docs")),
    "fetch": ("/vectors/fetch", lambda store: store.fetch("docs", ids_of(RECORDS))),
    "upsert": ("/vectors/upsert", lambda store: store.upsert("docs", to_batch(RECORDS, SCHEMA))),
    "delete": ("/vectors/delete", lambda store: store.delete("docs", ids_of(RECORDS))),
    "query": ("/query", lambda store: store.search("docs", np.ones(8), limit=1)),
}
Ask = Callable[[PineconeStore], Any]
operations = pytest.mark.parametrize(("path", "ask"), OPERATIONS.values(), ids=OPERATIONS)


@operations
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_once_and_its_wish_to_wait_is_passed_on(
    standin: PineconeStandin,
    store: PineconeStore,
    path: str,
    ask: Ask,
    status: int,
) -> None:
    before = len(standin.calls(path))
    standin.faults.append(Fault(path, 99, Reply(status, {"message": "slow down"}, {"Retry-After": "7"})))
    with pytest.raises(errors.TransientError, match="slow down") as caught:
        ask(store)
    assert not isinstance(caught.value, errors.StoreUnavailableError)
    assert caught.value.facts["retry_after_seconds"] == 7
    assert len(standin.calls(path)) == before + 1


@operations
def test_a_cut_answer_is_transient_and_the_next_attempt_succeeds(
    standin: PineconeStandin, store: PineconeStore, path: str, ask: Ask
) -> None:
    standin.faults.append(Fault(path, cut=True))
    with pytest.raises(errors.TransientError) as caught:
        ask(store)
    assert not isinstance(caught.value, errors.StoreUnavailableError)
    ask(store)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b'{"upsertedCount": "20"}', b"<html>"])
def test_an_upsert_without_an_acknowledgement_is_unknown(
    standin: PineconeStandin, store: PineconeStore, body: bytes
) -> None:
    standin.faults.append(Fault("/vectors/upsert", reply=Reply(200, body)))
    with pytest.raises(errors.TransientError):
        store.upsert("docs", to_batch(RECORDS, SCHEMA))


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b'{"vectors":[]}', b"<html>"])
def test_an_answer_without_records_is_not_taken_for_none_being_there(
    standin: PineconeStandin, store: PineconeStore, body: bytes
) -> None:
    standin.faults.append(Fault("/vectors/fetch", reply=Reply(200, body)))
    with pytest.raises(errors.TransientError):
        store.fetch("docs", ids_of(RECORDS))


@pytest.mark.parametrize("told", [0, 19, None])
def test_an_upsert_that_tells_of_fewer_records_has_failed(
    standin: PineconeStandin, store: PineconeStore, told: int | None
) -> None:
    standin.acknowledges = lambda count: told
    with pytest.raises(errors.TransientError, match=f"acknowledged {told} of 20"):
        store.upsert("docs", to_batch(RECORDS, SCHEMA))


def test_a_listing_that_ends_too_soon_is_not_taken_for_the_whole(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    short = Reply(200, {"vectors": [{"id": "doc#00000"}], "namespace": ""})
    standin.faults.append(Fault("/vectors/list", reply=short))
    with pytest.raises(errors.TransientError, match="1 ids were listed where 20"):
        spans_of(store, "docs", 100)


@pytest.mark.parametrize("key", ["pcsk-wrong-key", KEY_WITHOUT_RIGHTS])
def test_a_refused_key_is_told_without_it(standin: PineconeStandin, store: PineconeStore, key: str) -> None:
    other = PineconeStore(api_key=SecretStr(key), host=standin.host)
    for ask in (lambda: other.list_collections(), lambda: other.describe("docs")):
        with pytest.raises(errors.AuthenticationError, match="PINECONE_API_KEY") as caught:
            ask()
        assert key not in str(caught.value)
    assert key not in repr(other) + other.address("docs")
    assert standin.requests[-1].headers["api-key"] == key


def test_without_a_key_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PINECONE_API_KEY", raising=False)
    monkeypatch.delenv("PINECONE_CONTROLLER_HOST", raising=False)
    store, name = open_address("pinecone://docs")
    with pytest.raises(errors.AuthenticationError, match="set PINECONE_API_KEY"):
        store.describe(name or "")


def test_a_quota_is_not_a_matter_of_the_key(standin: PineconeStandin, store: PineconeStore) -> None:
    body = {"error": {"code": "FORBIDDEN", "message": "You have reached the max serverless index quota"}}
    standin.faults.append(Fault("/indexes", reply=Reply(403, body)))
    with pytest.raises(errors.StoreRefusedError, match="quota"):
        store.create(plain_schema("other"))


def test_a_service_that_is_gone_is_unreachable(store: PineconeStore) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{probe.getsockname()[1]}"
    other = store.model_copy(update={"host": gone})
    fresh = PineconeStore(api_key=other.api_key, host=gone)
    with pytest.raises(errors.StoreUnavailableError, match="nothing answers"):
        fresh.list_collections()


def test_an_index_that_others_drop_or_make_anew_is_found_again(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    standin.make("docs", standin.indexes["docs"].fields)
    with pytest.raises(errors.TransientError, match="made anew"):
        store.fetch("docs", ids_of(RECORDS))
    assert store.fetch("docs", ids_of(RECORDS)).num_rows == 0
    del standin.indexes["docs"]
    with pytest.raises(errors.CollectionNotFoundError, match="there are: none"):
        store.fetch("docs", ids_of(RECORDS))


@pytest.mark.parametrize(
    "host", ["http://example.org", "http://10.0.0.1:80", "ftp://example.org", "https://"]
)
def test_the_key_travels_in_clear_text_only_on_this_machine(host: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        PineconeStore(host=host)


@pytest.mark.parametrize("host", ["http://127.0.0.1:5080", "http://localhost:5080", "https://example.org"])
def test_hosts_that_keep_the_key_are_taken(host: str) -> None:
    assert check_host(host) == host


def test_a_control_plane_from_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINECONE_CONTROLLER_HOST", "http://example.org")
    with pytest.raises(errors.ConfigurationError, match="clear text"):
        open_address("pinecone://docs")
    client = open_control(api_key=KEY, host=None, timeout_seconds=1)
    assert "example.org" not in repr(client)


def test_an_index_host_that_would_show_the_key_is_not_asked(
    standin: PineconeStandin, store: PineconeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = standin._shown
    monkeypatch.setattr(standin, "_shown", lambda index: {**shown(index), "host": "http://example.org"})
    with pytest.raises(errors.ConfigurationError, match="clear text"):
        store.describe("docs")


# ── through the engine and the command line ──────────────────────────────────────────────────────────


def test_a_move_survives_every_kind_of_passing_failure(
    standin: PineconeStandin, store: PineconeStore, tmp_path: Path
) -> None:
    source, _ = open_address("memory:pinecone-faults")
    schema = plain_schema("moved")
    source.create(schema)
    source.upsert("moved", to_batch(plain_records(700), schema))
    standin.faults += [
        Fault("/vectors/upsert", reply=Reply(429, {"message": "busy"}, {"Retry-After": "0"})),
        Fault("/vectors/upsert", reply=Reply(503, {"message": "down"})),
        Fault("/vectors/upsert", cut=True),
        Fault("/vectors/upsert", after=True, reply=Reply(502, b"lost")),
        Fault("/vectors/fetch", cut=True),
        Fault("/vectors/fetch", reply=Reply(200, {})),
    ]
    config = MigrationConfig(
        source="memory:pinecone-faults#moved",
        target=store.address("moved"),
        partition_size=300,
        batch_size=100,
        retry=RetryPolicy(delay_seconds=0.001),
    )
    report = run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path), target_store=store))
    assert report.status == "complete"
    assert not [fault for fault in standin.faults if fault.times]
    assert by_id(read_all(store, "moved")) == by_id(plain_records(700))


def test_the_command_line_moves_and_tells_of_a_refused_key_and_a_missing_index(
    standin: PineconeStandin, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    monkeypatch.setenv("PINECONE_CONTROLLER_HOST", standin.host)
    fill("parquet:source#docs")
    move = ("run", "--source", "parquet:source#docs", "--target", "pinecone://docs")
    assert shell(*move).status == 0
    assert shell("inspect", "pinecone://docs", "--json").document["count"] == 300

    found = shell("inspect", "pinecone://nope")
    assert found.status == 2
    assert "there are: docs" in found.err
    monkeypatch.setenv("PINECONE_API_KEY", "pcsk-wrong-key")
    found = shell(*move, "--fresh")
    assert found.status == 4
    assert "PINECONE_API_KEY" in found.err
    assert "pcsk-wrong-key" not in found.everything


def test_the_command_line_tells_of_a_dead_service(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    monkeypatch.setenv("PINECONE_CONTROLLER_HOST", "http://127.0.0.1:1")
    found = shell("inspect", "pinecone://docs")
    assert found.status == 4
    assert "Traceback" not in found.everything
