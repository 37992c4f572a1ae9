"""What is Pinecone's own: limits of a request, late visibility, namespaces, sparse vectors, ids, numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from pydantic import SecretStr

from migration_pipelines import batch as batches
from migration_pipelines import errors
from migration_pipelines.compare import compare_collections
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import CollectionSchema, IdKind, Metric, VectorField, VectorKind
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.store import Store, open_address
from migration_pipelines.stores.pinecone import PineconeStore
from migration_pipelines.stores.pinecone.plane import MAX_BYTES
from migration_pipelines.validate import Report
from migration_pipelines_tests.conformance import assert_same, ids_of, read_all
from migration_pipelines_tests.records import (
    Record,
    from_batches,
    plain_records,
    plain_schema,
    to_batch,
)
from migration_pipelines_tests.standins.http import Fault, Reply
from migration_pipelines_tests.standins.pinecone import (
    KEY,
    MAX_BODY_BYTES,
    MAX_URL_BYTES,
    PineconeStandin,
    each_stored,
)

_NAMES = (f"pinecone{number}" for number in itertools.count())
SCHEMA = plain_schema("docs")
DENSE = {"_values": {"type": "dense_vector", "dimension": 8, "metric": "euclidean"}}


@pytest.fixture
def standin() -> Iterator[PineconeStandin]:
    """A service of its own."""
    standin = PineconeStandin()
    with standin.serving():
        yield standin


@pytest.fixture
def store(standin: PineconeStandin) -> Iterator[PineconeStore]:
    """A store with an empty index `docs`."""
    store = PineconeStore(api_key=SecretStr(KEY), host=standin.host, freshness_seconds=2)
    store.create(SCHEMA)
    yield store
    store.close()


def bound(store: PineconeStore, **fields: Any) -> PineconeStore:
    """The same project by another address."""
    return PineconeStore(**{**{name: getattr(store, name) for name in type(store).model_fields}, **fields})


def memory(schema: CollectionSchema, records: list[Record]) -> tuple[Store, str]:
    """A collection in memory, and its address."""
    store, name = open_address(f"memory:{next(_NAMES)}#{schema.name}")
    store.create(schema)
    store.upsert(schema.name, to_batch(records, schema))
    return store, store.address(name)


def move(source: str, target: str, home: Path, **options: Any) -> Report:
    """Run a migration; `source_store` or `target_store` is put in its place."""
    stores = {name: options.pop(name) for name in ("source_store", "target_store") if name in options}
    config = MigrationConfig(source=source, target=target, retry=RetryPolicy(delay_seconds=0.001), **options)
    return run_migration(Migration(config=config, ledger=ledger_for(config, home), **stores))


def moved_back(store: PineconeStore, home: Path) -> Store:
    """Move `target` into `back` in memory."""
    back, _ = open_address(f"memory:{next(_NAMES)}#back")
    stores = {"source_store": store, "target_store": back}
    assert move(store.address("target"), back.address("back"), home / "back", **stores).status == "complete"
    return back


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "pinecone://docs",
        "pinecone://docs?namespace=tenant-7",
        "pinecone://docs?namespace=",
        "pinecone://docs?cloud=gcp&region=us-central1",
        "pinecone://docs?document_field=text&sparse=true",
    ],
)
def test_addresses_come_back_as_they_were_given(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PINECONE_CONTROLLER_HOST", raising=False)
    monkeypatch.setenv("PINECONE_API_KEY", "pcsk-secret")
    store, collection = open_address(text)
    assert collection == "docs"
    assert store.address("docs") == text
    assert "pcsk-secret" not in repr(store)


@pytest.mark.parametrize(
    "text",
    [
        "pinecone://docs?colour=red",
        "pinecone://key@docs",
        "pinecone://docs:443",
        "pinecone://docs?sparse=maybe",
    ],
)
def test_addresses_that_can_not_be_meant_are_refused(text: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        open_address(text)


# ── indexes ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_index_is_waited_for(standin: PineconeStandin, store: PineconeStore) -> None:
    standin.describes_until_ready = 4
    store.create(plain_schema("slow"))
    assert standin.indexes["slow"].describes_until_ready == 0
    assert standin.indexes["slow"].deployment["region"] == "us-east-1"


def test_an_index_is_made_in_the_region_that_the_address_names(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    bound(store, cloud="gcp", region="us-central1").create(plain_schema("there"))
    assert standin.indexes["there"].deployment["region"] == "us-central1"
    assert store.describe("there").options == {"cloud": "gcp", "region": "us-central1"}


def test_properties_are_kept_as_tags(standin: PineconeStandin, store: PineconeStore) -> None:
    properties = {"owner": "search team", "version": 3, "naïve": "x", "long": "x" * 121}
    schema = store.adapt(plain_schema("tagged").model_copy(update={"properties": properties}), {})
    store.create(schema)
    assert standin.indexes["tagged"].tags == {"owner": "search team", "version": "3"}
    assert store.describe("tagged").properties == {"owner": "search team", "version": "3"}


@pytest.mark.parametrize(
    ("fields", "deployment", "words"),
    [
        ({"body": {"type": "string", "full_text_search": {}}}, None, "document index"),
        (
            DENSE,
            {
                "deployment_type": "pod",
                "environment": "us-east1-gcp",
                "pod_type": "p1.x1",
                "replicas": 1,
                "shards": 1,
                "pods": 1,
            },
            "pod-based",
        ),
    ],
    ids=["document", "pod"],
)
def test_indexes_of_other_types_are_refused(
    standin: PineconeStandin, store: PineconeStore, fields: Any, deployment: Any, words: str
) -> None:
    standin.make("other", fields, deployment=deployment)
    with pytest.raises(errors.UnsupportedOperationError, match=words):
        store.describe("other")


@pytest.mark.parametrize(
    "vectors",
    [
        (VectorField(dimensions=None),),
        (VectorField(dimensions=8, metric=Metric.MANHATTAN),),
        (VectorField(dimensions=8), VectorField(name="b", dimensions=8)),
        (),
    ],
    ids=["no-dimensions", "manhattan", "two-dense", "none"],
)
def test_what_no_index_can_be_is_refused_before_it_is_made(
    standin: PineconeStandin, store: PineconeStore, vectors: tuple[VectorField, ...]
) -> None:
    with pytest.raises(errors.ConfigurationError):
        store.create(CollectionSchema(name="odd", vectors=vectors, id_kinds=frozenset({IdKind.STR})))
    assert "odd" not in standin.indexes


# ── limits of a request ──────────────────────────────────────────────────────────────────────────────


def test_requests_are_as_large_as_the_service_takes_and_no_larger(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    schema = plain_schema("wide", dimensions=1536)
    store.create(schema)
    records = plain_records(400, dimensions=1536)
    store.upsert("wide", to_batch(records, schema))

    sizes = [len(request.body) for request in standin.calls("/vectors/upsert")]
    assert max(sizes) <= MAX_BYTES <= MAX_BODY_BYTES
    assert min(sizes[:-1]) > 0.98 * MAX_BYTES
    assert_same(read_all(store, "wide"), records, store)


def test_ids_of_the_greatest_length_are_asked_for_in_urls_that_proxies_pass(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    records = [
        replace(record, id=f"{number:03d}" + " +&%" * 127) for number, record in enumerate(plain_records(60))
    ]
    store.upsert("docs", to_batch(records, SCHEMA))
    assert_same(read_all(store, "docs"), records, store)
    asked = [len(request.raw_query) for request in standin.calls("/vectors/fetch")]
    assert max(asked) <= MAX_URL_BYTES / 2
    assert sum(asked) > MAX_URL_BYTES  # one request would have been refused


def test_a_record_over_40_kb_is_set_aside_and_all_others_arrive(
    standin: PineconeStandin, store: PineconeStore, tmp_path: Path
) -> None:
    records = plain_records(120)
    records[37] = replace(records[37], document="x" * 41_000)
    records[90] = replace(records[90], vectors={"": np.zeros(8, np.float32)})
    _, source = memory(plain_schema("source"), records)
    report = move(source, store.address("target"), tmp_path, target_store=store, max_rejects=2)

    assert (report.records["rejected"], report.records["loaded"]) == (2, 118)
    expected = [record for number, record in enumerate(records) if number not in (37, 90)]
    assert_same(read_all(store, "target"), expected, store)
    reasons = {reject["id"]: reject["reason"] for reject in report.rejects}
    assert reasons.keys() == {"doc#00037", "doc#00090"}
    assert "exceeds the limit of 40960 bytes" in reasons["doc#00037"]
    assert "all zeros" in reasons["doc#00090"]


def test_what_the_client_would_change_quietly_is_never_sent(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    """The vendor's client sends NaN as null, and the service makes a double of every integer."""
    good = plain_records(1)[0]
    bad = [
        replace(good, vectors={"": np.full(8, np.nan, np.float32)}),
        replace(good, metadata={"n": 2**53 + 1}),
        replace(good, metadata={"n": float("nan")}),
        replace(good, metadata={"n": None}),
        replace(good, metadata={"n": [1, 2]}),
        replace(good, metadata={"n": {"a": 1}}),
        replace(good, metadata={"document": "x"}),
        replace(good, metadata={"_floats": ["x"]}),
        replace(good, id="naïve"),
        replace(good, id="x" * 513),
    ]
    for record in bad:
        with pytest.raises(errors.RecordRejectedError):
            store.upsert("docs", to_batch([good, record], SCHEMA))
    assert standin.calls("/vectors/upsert") == []


# ── late visibility ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("headers", [True, False], ids=["log-positions", "no-log-positions"])
def test_a_write_is_waited_for_until_reads_see_it(
    standin: PineconeStandin, store: PineconeStore, headers: bool
) -> None:
    standin.lag, standin.lsn_headers = 4, headers
    records = plain_records(30)
    store.upsert("docs", to_batch(records, SCHEMA))
    assert_same(from_batches([store.fetch("docs", ids_of(records))]), records, store)
    store.delete("docs", ids_of(records[:10]))
    assert_same(from_batches([store.fetch("docs", ids_of(records))]), records[10:], store)


def test_a_replaced_record_is_waited_for_by_its_log_position(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    store.upsert("docs", to_batch(plain_records(10), SCHEMA))
    standin.lag = 5
    newer = plain_records(10, seed=1)
    store.upsert("docs", to_batch(newer, SCHEMA))
    assert_same(from_batches([store.fetch("docs", ids_of(newer))]), newer, store)


@pytest.mark.parametrize("headers", [True, False], ids=["log-positions", "no-log-positions"])
def test_a_write_that_never_shows_is_an_error(
    standin: PineconeStandin, store: PineconeStore, headers: bool
) -> None:
    hasty = bound(store, freshness_seconds=0.1)
    standin.lag, standin.lsn_headers = 10_000, headers
    with pytest.raises(errors.TransientError, match=r"0\.1 seconds"):
        hasty.upsert("docs", to_batch(plain_records(3), SCHEMA))


@pytest.mark.parametrize("headers", [True, False], ids=["log-positions", "no-log-positions"])
def test_a_removal_that_never_shows_is_an_error(
    standin: PineconeStandin, store: PineconeStore, headers: bool
) -> None:
    store.upsert("docs", to_batch(plain_records(3), SCHEMA))
    standin.lag = 10_000
    standin.lsn_headers = headers
    with pytest.raises(errors.TransientError, match="not visible" if headers else "can still be read"):
        bound(store, freshness_seconds=0.1).delete("docs", ids_of(plain_records(3)))


@pytest.mark.parametrize("headers", [True, False], ids=["log-positions", "no-log-positions"])
def test_a_partition_is_verified_although_reads_lag(
    standin: PineconeStandin, store: PineconeStore, tmp_path: Path, headers: bool
) -> None:
    standin.lag, standin.lsn_headers = 3, headers
    records = plain_records(300)
    _, source = memory(plain_schema("source"), records)
    report = move(
        source, store.address("target"), tmp_path, target_store=store, partition_size=100, batch_size=50
    )
    assert report.status == "complete"
    assert_same(read_all(store, "target"), records, store)


def test_records_that_never_came_are_missing_and_not_waited_for_without_end(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    records = plain_records(10)
    store.upsert("docs", to_batch(records, SCHEMA))
    standin.indexes["docs"].namespaces[""].records.pop(str(records[4].id))
    found = bound(store, freshness_seconds=0.1).read_part("docs", "0", ids_of(records))
    assert_same(from_batches([found]), records[:4] + records[5:], store)


# ── namespaces ───────────────────────────────────────────────────────────────────────────────────────


def spread(names: list[str], each: int = 3) -> list[Record]:
    """The same ids in every namespace, their contents different."""
    return [
        replace(record, namespace=name)
        for seed, name in enumerate(names)
        for record in plain_records(each, seed=seed)
    ]


def test_all_namespaces_are_read_however_many(standin: PineconeStandin, store: PineconeStore) -> None:
    schema = plain_schema("many").model_copy(update={"has_namespaces": True})
    store.create(schema)
    assert store.describe("many").has_namespaces
    records = spread(["", *(f"tenant-{number}" for number in range(150))])
    store.upsert("many", to_batch(records, schema))

    assert store.count("many") == len(records)
    assert_same(
        read_all(store, "many", span_records=100),
        [replace(record, namespace=record.namespace or "") for record in records],
        store,
    )
    assert len(standin.calls("/namespaces")) > 1
    assert store.fetch("many", ids_of(records)).num_rows == len(records)


def test_an_index_that_others_made_has_namespaces_where_it_uses_them(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    standin.make("used", DENSE)
    assert not store.describe("used").has_namespaces
    one = bound(store, namespace="a")
    one.upsert("used", to_batch(plain_records(2), SCHEMA))
    assert store.describe("used").has_namespaces
    assert not one.describe("used").has_namespaces
    assert not bound(store, namespace="").describe("used").has_namespaces


def test_a_store_that_is_bound_to_a_namespace_sees_and_writes_that_one_alone(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    first, second = plain_records(5), plain_records(5, seed=1)
    a, default = bound(store, namespace="a"), bound(store, namespace="__default__")
    assert default.namespace == ""
    a.upsert("docs", to_batch(first, SCHEMA))
    default.upsert("docs", to_batch(second, SCHEMA))

    assert_same(read_all(a, "docs"), first, store)
    assert_same(read_all(default, "docs"), second, store)
    assert a.count("docs") == default.count("docs") == 5
    assert store.count("docs") == 10
    assert a.fingerprint("docs") != default.fingerprint("docs")
    a.delete("docs", ids_of(first))
    assert (a.count("docs"), default.count("docs")) == (0, 5)
    bound(store, namespace="never-used").delete("docs", ids_of(first))
    with pytest.raises(errors.UsageError):
        a.upsert("docs", to_batch(spread(["b"]), SCHEMA.model_copy(update={"has_namespaces": True})))


def test_namespaces_survive_a_move_there_and_back(
    standin: PineconeStandin, store: PineconeStore, tmp_path: Path
) -> None:
    schema = plain_schema("source").model_copy(update={"has_namespaces": True})
    source, address = memory(schema, spread(["", "a", "b"], each=40))
    assert move(address, store.address("target"), tmp_path / "there", target_store=store).status == "complete"
    back, _ = open_address(f"memory:{next(_NAMES)}#back")
    report = move(
        store.address("target"),
        back.address("back"),
        tmp_path / "back",
        source_store=store,
        target_store=back,
    )
    assert report.status == "complete"
    assert compare_collections(source, "source", back, "back").equal


def test_a_simulator_without_a_list_of_namespaces_is_read_all_the_same(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    bound(store, namespace="a").upsert("docs", to_batch(plain_records(3), SCHEMA))
    standin.faults.append(Fault("/namespaces", 99, Reply(404, {"code": 5, "message": "Not Found"})))
    assert store.count("docs") == 3


def test_names_that_a_namespace_can_not_have() -> None:
    store = PineconeStore()
    assert all(map(store.accepts_namespace, ["", "a", "tenant 7", "x" * 512]))
    assert not any(map(store.accepts_namespace, ["__default__", "naïve", "x" * 513, "a\0b"]))


# ── sparse vectors ───────────────────────────────────────────────────────────────────────────────────


def hybrid(count: int, sparse: str) -> list[Record]:
    rng = np.random.default_rng(5)
    return [
        replace(
            record,
            vectors={
                **record.vectors,
                sparse: {"indices": [number, number + 70_000], "values": rng.random(2).astype(np.float32)},
            },
        )
        for number, record in enumerate(plain_records(count))
    ]


def hybrid_schema(name: str, sparse: str = "keywords") -> CollectionSchema:
    field = VectorField(name=sparse, kind=VectorKind.SPARSE, dimensions=None, metric=Metric.DOT)
    schema = plain_schema(name, metric=Metric.DOT)
    return schema.model_copy(update={"vectors": (*schema.vectors, field)})


def test_a_sparse_vector_beside_the_dense_one_survives_a_move_there_and_back(
    standin: PineconeStandin, store: PineconeStore, tmp_path: Path
) -> None:
    source, address = memory(hybrid_schema("source"), hybrid(50, "keywords"))
    assert move(address, store.address("target"), tmp_path / "there", target_store=store).status == "complete"
    assert [field.name for field in store.describe("target").vectors] == ["", "keywords"]
    (_, stored), *_ = each_stored(standin.indexes["target"])
    assert len(stored["sparseValues"]["indices"]) == 2

    back, _ = open_address(f"memory:{next(_NAMES)}#back")
    move(
        store.address("target"),
        back.address("back"),
        tmp_path / "back",
        source_store=store,
        target_store=back,
    )
    assert compare_collections(source, "source", back, "back").equal


def test_sparse_vectors_that_an_index_does_not_declare_are_not_left_behind(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    old = standin.make("old", {"_values": {**DENSE["_values"], "metric": "dotproduct"}}, accepts_sparse=True)
    both = bound(store, sparse=True)
    schema = both.describe("old")
    assert [field.name for field in schema.vectors] == ["", "sparse"]
    records = hybrid(4, "sparse")
    records[2] = replace(records[2], vectors={"": records[2].vectors[""], "sparse": None})
    both.upsert("old", to_batch(records, schema))
    assert len(list(each_stored(old))) == 4

    with pytest.raises(errors.StoreRefusedError, match="sparse=true"):
        read_all(store, "old")
    found = pa.concat_batches([both.fetch("old", ids_of(records))])
    assert sorted(batches.record_digests(found)) == sorted(batches.record_digests(to_batch(records, schema)))


def test_an_index_of_sparse_vectors_alone(standin: PineconeStandin, store: PineconeStore) -> None:
    field = VectorField(kind=VectorKind.SPARSE, dimensions=None, metric=Metric.DOT)
    schema = SCHEMA.model_copy(update={"name": "words", "vectors": (field,)})
    store.create(schema)
    assert store.describe("words").vectors == (field,)
    records = [replace(record, vectors={"": record.vectors["s"]}) for record in hybrid(5, "s")]
    standin.lag = 2
    store.upsert("words", to_batch(records, schema))
    found = store.fetch("words", ids_of(records))
    assert sorted(batches.record_digests(found)) == sorted(batches.record_digests(to_batch(records, schema)))
    empty = replace(records[0], vectors={"": {"indices": [], "values": []}})
    with pytest.raises(errors.RecordRejectedError, match="empty"):
        store.upsert("words", to_batch([empty], schema))


# ── ids and values ───────────────────────────────────────────────────────────────────────────────────


def test_what_pinecone_can_not_hold_survives_a_move_there_and_back(
    standin: PineconeStandin, store: PineconeStore, tmp_path: Path
) -> None:
    ids = ["naïve", "漢字", "🦜", "a\0b", "x" * 513, "plain", "a b+c%20", "line\nbreak"]
    values: list[Any] = [2**53 + 1, None, [1, 2.5], {"a": [None]}, 0.1 + 0.2, -0.0, 1.0, "text"]
    records = [
        replace(record, id=text, metadata={"value": value, "_floats": "mine", "document": 7})
        for record, text, value in zip(plain_records(8), ids, values, strict=True)
    ]
    records[0] = replace(records[0], document="a\0b")
    records[1] = replace(records[1], metadata={})
    records[2] = replace(records[2], metadata=None)
    source, address = memory(plain_schema("source"), records)
    assert move(address, store.address("target"), tmp_path / "there", target_store=store).status == "complete"
    stored = {record["id"] for _, record in each_stored(standin.indexes["target"])}
    assert {"plain", "a b+c%20", "line\nbreak"} <= stored
    assert all(map(str.isascii, stored))

    back, _ = open_address(f"memory:{next(_NAMES)}#back")
    move(
        store.address("target"),
        back.address("back"),
        tmp_path / "back",
        source_store=store,
        target_store=back,
    )
    assert compare_collections(source, "source", back, "back").equal


def test_what_others_wrote_is_read_with_integers_and_under_their_document_field(
    standin: PineconeStandin, store: PineconeStore
) -> None:
    metadata = {
        "text": "a passage",
        "page": 3,
        "score": 0.5,
        "zero": -0.0,
        "tags": ["b", "a"],
        "_floats": "theirs",
    }
    vector = {"id": "1", "values": [1.0] * 8, "metadata": metadata}
    standin.put("docs", vector)
    theirs = bound(store, document_field="text")
    (found,) = read_all(theirs, "docs")
    assert found.document == "a passage"
    rest = {key: value for key, value in metadata.items() if key != "text"}
    assert orjson.dumps(found.metadata, option=orjson.OPT_SORT_KEYS) == orjson.dumps(
        rest, option=orjson.OPT_SORT_KEYS
    )
    (plain,) = read_all(store, "docs")
    assert (plain.document, plain.metadata) == (None, metadata)


def test_a_namespace_that_the_service_does_not_know_holds_nothing(
    store: PineconeStore, standin: PineconeStandin
) -> None:
    unknown = Reply(404, {"code": 5, "message": "Namespace not found"})
    standin.faults.append(Fault("/vectors/fetch", reply=unknown))
    assert store.fetch("docs", ids_of(plain_records(2))).num_rows == 0
