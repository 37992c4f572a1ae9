"""What each of Elasticsearch's failures becomes, that there is one attempt, and no secret in any of them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from migration_pipelines import errors
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.store import open_address
from migration_pipelines.stores.elasticsearch import ElasticsearchStore
from migration_pipelines_tests.conformance import ids_of, read_all, spans_of
from migration_pipelines_tests.records import by_id, plain_records, plain_schema, to_batch
from migration_pipelines_tests.shell import Shell, fill, shell
from migration_pipelines_tests.standins.elasticsearch import ElasticsearchStandin
from migration_pipelines_tests.standins.http import Fault, Reply

__all__ = ["shell"]

SCHEMA = plain_schema("docs")
RECORDS = plain_records(20)
PASSWORD = "hunter2-and-more"
LOGIN = "Basic " + base64.b64encode(f"elastic:{PASSWORD}".encode()).decode()


@pytest.fixture
def standin() -> Iterator[ElasticsearchStandin]:
    """A cluster of its own."""
    standin = ElasticsearchStandin()
    with standin.serving():
        yield standin


@pytest.fixture
def store(standin: ElasticsearchStandin) -> Iterator[ElasticsearchStore]:
    """A store with 20 records in `docs`."""
    store = ElasticsearchStore(host="127.0.0.1", port=standin.port)
    store.create(SCHEMA)
    store.upsert("docs", to_batch(RECORDS, SCHEMA))
    store.finish_load("docs")
    yield store
    store.close()


OPERATIONS: dict[str, tuple[str, Callable[[ElasticsearchStore], Any]]] = {
    "list": ("/_resolve/", lambda store: store.list_collections()),
    "count": ("/_count", lambda store: store.count("docs")),
    "refresh": ("/_refresh", lambda store: store.finish_load("docs")),
    "view": ("/_pit", lambda store: spans_of(store, "docs", 10)),
    "ids": ("/_search", lambda store: spans_of(store, "docs", 10)),
    "fetch": ("/_mget", lambda store: store.fetch("docs", ids_of(RECORDS))),
    "upsert": ("/_bulk", lambda store: store.upsert("docs", to_batch(RECORDS, SCHEMA))),
    "delete": ("/_bulk", lambda store: store.delete("docs", ids_of(RECORDS))),
    "fingerprint": ("/_stats", lambda store: store.fingerprint("docs")),
    "search": ("/_search", lambda store: store.search("docs", np.ones(8), limit=1)),
    "aliases": ("/_alias", lambda store: store.aliases("docs")),
}
Ask = Callable[[ElasticsearchStore], Any]
operations = pytest.mark.parametrize(("path", "ask"), OPERATIONS.values(), ids=OPERATIONS)


@operations
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_cluster_is_asked_once_and_its_wish_to_wait_is_passed_on(
    standin: ElasticsearchStandin, store: ElasticsearchStore, path: str, ask: Ask, status: int
) -> None:
    before = sum(path in request.path for request in standin.requests)
    standin.faults.append(Fault(path, 99, Reply(status, {"error": "slow down"}, {"Retry-After": "7"})))
    with pytest.raises(errors.TransientError, match="slow down") as caught:
        ask(store)
    assert type(caught.value) is errors.TransientError
    assert caught.value.facts["retry_after_seconds"] == 7
    assert sum(path in request.path for request in standin.requests) == before + 1


@operations
def test_a_cut_answer_is_transient_and_the_next_attempt_succeeds(
    standin: ElasticsearchStandin, store: ElasticsearchStore, path: str, ask: Ask
) -> None:
    standin.faults.append(Fault(path, cut=True))
    with pytest.raises(errors.TransientError) as caught:
        ask(store)
    assert type(caught.value) is errors.TransientError
    ask(store)


@operations
@pytest.mark.parametrize("body", [b"", b"{}", b"null", b'{"took":1}', b"<html>"])
def test_an_answer_that_says_nothing_is_not_taken_for_nothing_to_say(
    standin: ElasticsearchStandin, store: ElasticsearchStore, path: str, ask: Ask, body: bytes
) -> None:
    if path == "/_alias" and body == b"{}":
        return  # an index without aliases
    headers = {"X-Elastic-Product": "Elasticsearch"}
    standin.faults.append(Fault(path, reply=Reply(200, body, headers)))
    with pytest.raises(errors.TransientError):
        ask(store)


@pytest.mark.parametrize("ask", [OPERATIONS[name][1] for name in ("count", "ids", "search")])
def test_an_answer_without_a_shard_is_not_the_whole(
    standin: ElasticsearchStandin, store: ElasticsearchStore, ask: Ask
) -> None:
    standin.failing_shards = 2
    with pytest.raises(errors.TransientError, match="shard"):
        ask(store)


def test_a_slice_that_is_short_is_told(
    standin: ElasticsearchStandin, store: ElasticsearchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = standin._hits

    def short(body: Any, *rest: Any) -> Iterator[Any]:
        return islice(found(body, *rest), 3 if body.get("slice", {}).get("id") == 1 else None)

    monkeypatch.setattr(standin, "_hits", short)
    with pytest.raises(errors.TransientError, match="ids arrived where 20 were counted"):
        spans_of(store, "docs", 10)


def test_nothing_at_the_address_is_said_so(standin: ElasticsearchStandin) -> None:
    for name, (_, ask) in OPERATIONS.items():
        with pytest.raises(errors.StoreUnavailableError) as caught:
            ask(ElasticsearchStore(host="127.0.0.1", port=1))
        assert caught.value.exit_status == 4, name


def test_a_refused_login_is_told_and_the_password_never(
    standin: ElasticsearchStandin, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.login = LOGIN
    address = f"elasticsearch://elastic@127.0.0.1:{standin.port}/docs"
    monkeypatch.setenv("ELASTICSEARCH_PASSWORD", PASSWORD)
    store, _ = open_address(address)
    assert store.list_collections() == []
    monkeypatch.setenv("ELASTICSEARCH_PASSWORD", "wrong-" + PASSWORD)
    store, _ = open_address(address)
    with pytest.raises(errors.AuthenticationError, match="password") as caught:
        store.list_collections()
    for shown in (str(caught.value), store.address("docs"), repr(store), str(caught.value.facts)):
        assert PASSWORD not in shown


def test_a_key_is_sent_as_one(standin: ElasticsearchStandin) -> None:
    standin.login = "ApiKey c2VjcmV0"
    store = ElasticsearchStore(host="127.0.0.1", port=standin.port, api_key=SecretStr("c2VjcmV0"))
    assert store.list_collections() == []


def test_a_login_without_the_right_is_told(standin: ElasticsearchStandin, store: ElasticsearchStore) -> None:
    standin.forbidden = {"/_bulk"}
    with pytest.raises(errors.AuthenticationError, match="privileges"):
        store.upsert("docs", to_batch(RECORDS, SCHEMA))


def test_another_product_is_told(standin: ElasticsearchStandin) -> None:
    standin.product = False
    store = ElasticsearchStore(host="127.0.0.1", port=standin.port)
    for ask in (store.list_collections, lambda: store.describe("missing")):
        with pytest.raises(
            errors.ConfigurationError, match="another product answers there, such as OpenSearch"
        ):
            ask()
    store.close()


@pytest.mark.parametrize(
    "text",
    [
        "elasticsearch://localhost:9200/docs",
        "elasticsearch://elastic@db.example.org:9243/docs?https=true&ca_certs=/etc/ca.pem",
        "elasticsearch://[::1]:9200/docs?vector_field=embedding&document_field=text",
    ],
)
def test_addresses_come_back_as_they_were_given(text: str) -> None:
    store, collection = open_address(text)
    assert (store.address("docs"), collection) == (text, "docs")


@pytest.mark.parametrize(
    "text", ["elasticsearch:docs", "elasticsearch://h/x?colour=red", "elasticsearch://h/x?https=1"]
)
def test_addresses_that_say_too_little_or_too_much_are_refused(text: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        open_address(text)


@pytest.mark.parametrize("name", ["*", "_all", "docs,other", "-docs", "a/b", "<now>", ".."])
def test_a_name_that_stands_for_several_indices_reaches_none(
    standin: ElasticsearchStandin, store: ElasticsearchStore, name: str
) -> None:
    with pytest.raises(errors.CollectionNotFoundError):
        store.drop(name)
    with pytest.raises(errors.ConfigurationError):
        store.create(plain_schema(name))
    assert store.count("docs") == 20


# ── bulk ─────────────────────────────────────────────────────────────────────────────────────────────


def test_items_that_were_refused_for_want_of_room_are_not_taken_for_written(
    standin: ElasticsearchStandin, store: ElasticsearchStore
) -> None:
    records = plain_records(30, seed=1)
    standin.busy_items = 3
    with pytest.raises(errors.TransientError, match="3 failed"):
        store.upsert("docs", to_batch(records, SCHEMA))
    store.upsert("docs", to_batch(records, SCHEMA))
    assert by_id(read_all(store, "docs")) == by_id(records)


def test_a_record_that_the_server_refuses_is_named(store: ElasticsearchStore) -> None:
    bad = replace(RECORDS[3], id="bad", vectors={"": np.full(8, 2e19, np.float32)})
    with pytest.raises(errors.RecordRejectedError, match=r"'bad'.*magnitude"):
        store.upsert("docs", to_batch([*RECORDS, bad], SCHEMA))
    assert by_id(read_all(store, "docs")) == by_id(RECORDS)


def test_a_field_takes_an_object_where_others_have_numbers(store: ElasticsearchStore) -> None:
    store.create(store.adapt(plain_schema("typed"), {"n": {"int53": 5}}))
    values = [{"an": "object"}, [1, {"in": "a list"}], 3]
    records = [replace(record, metadata={"n": n}) for record, n in zip(RECORDS[:3], values, strict=True)]
    store.upsert("typed", to_batch(records, plain_schema("typed")))
    assert by_id(read_all(store, "typed")) == by_id(records)


def test_a_body_above_the_servers_limit_is_sent_in_parts(
    standin: ElasticsearchStandin, store: ElasticsearchStore
) -> None:
    records = plain_records(300, seed=2)
    standin.max_content_bytes = 8_000
    store.upsert("docs", to_batch(records, SCHEMA))
    standin.max_content_bytes = 2**27
    assert by_id(read_all(store, "docs")) == by_id(records)


def test_a_record_above_the_servers_limit_is_rejected(
    standin: ElasticsearchStandin, store: ElasticsearchStore
) -> None:
    standin.max_content_bytes = 1_000
    large = RECORDS[0].__class__(id="large", vectors=RECORDS[0].vectors, document="x" * 2_000)
    with pytest.raises(errors.RecordRejectedError, match="max_content_length"):
        store.upsert("docs", to_batch([*RECORDS, large], SCHEMA))


def test_a_bulk_request_makes_no_index_that_is_not_there(
    standin: ElasticsearchStandin, store: ElasticsearchStore
) -> None:
    with pytest.raises(errors.CollectionNotFoundError, match="docs"):
        store.upsert("absent", to_batch(RECORDS, SCHEMA))
    assert store.list_collections() == ["docs"]


# ── through the engine ───────────────────────────────────────────────────────────────────────────────


def _into(standin: ElasticsearchStandin, folder: Path, **options: Any) -> Any:
    fill("memory:es-origin#docs")
    config = MigrationConfig(
        source="memory:es-origin#docs",
        target=f"elasticsearch://127.0.0.1:{standin.port}/moved",
        partition_size=100,
        **options,
    )
    return run_migration(Migration(config=config, ledger=ledger_for(config, folder)))


@pytest.fixture
def origin() -> Iterator[None]:
    """Nothing is left of the collection in memory."""
    yield
    store, _ = open_address("memory:es-origin#docs")
    store.drop("docs")


@pytest.mark.usefixtures("origin")
def test_a_move_survives_a_cluster_in_trouble(standin: ElasticsearchStandin, tmp_path: Path) -> None:
    standin.busy_items = 5
    standin.faults += [
        Fault("/moved/_bulk", cut=True),
        Fault("/moved/_bulk", after=True, reply=Reply(503)),
        Fault("/moved/_mget", cut=True),
        Fault("/moved/_mget", reply=Reply(429, {"error": "busy"}, {"Retry-After": "0"})),
    ]
    report = _into(standin, tmp_path)
    assert (report.status, report.records["verified"]) == ("complete", 300)
    assert len(standin.indices["moved"].live) == 300


def test_a_poison_record_is_set_aside_and_all_others_arrive(
    shell: Shell, standin: ElasticsearchStandin, tmp_path: Path
) -> None:
    records = plain_records(40)
    records[7] = records[7].__class__(id="zero", vectors={"": np.zeros(8, np.float32)}, metadata={"n": 1})
    fill("parquet:source#docs", records, metric="cosine")
    target = f"elasticsearch://127.0.0.1:{standin.port}/moved"
    move = ("run", "--source", "parquet:source#docs", "--target", target)
    found = shell(*move)
    assert found.status == 1
    assert "zero" in found.everything or list(tmp_path.rglob("*reject*"))
    assert len(standin.indices["moved"].live) == 39
    assert "zero" not in standin.indices["moved"].live


def test_the_command_line_moves_there_and_back_and_says_when_nobody_answers(
    shell: Shell, standin: ElasticsearchStandin
) -> None:
    records = plain_records(60)
    fill("parquet:source#docs", records)
    target = f"elasticsearch://127.0.0.1:{standin.port}/moved"
    assert shell("run", "--source", "parquet:source#docs", "--target", target).status == 0
    assert shell("run", "--source", target, "--target", "parquet:back#docs").status == 0
    store, _ = open_address("parquet:back#docs")
    assert by_id(read_all(store, "docs")) == by_id(records)
    gone = shell("run", "--source", "parquet:source#docs", "--target", "elasticsearch://127.0.0.1:1/x")
    assert gone.status == 4
    assert shell("inspect", f"elasticsearch://127.0.0.1:{standin.port}/absent").status == 2
