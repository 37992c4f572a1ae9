"""Every store lists, describes, creates and drops collections, and is found by its address."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import SecretStr

from migration_pipelines import batch as batches
from migration_pipelines.errors import (
    CollectionExistsError,
    CollectionNotFoundError,
    UnsupportedOperationError,
)
from migration_pipelines.store import open_address, store_class
from migration_pipelines_tests.conformance import (
    METRICS,
    assert_same,
    ids_of,
    load,
    new_name,
    new_schema,
    read_all,
    records_for,
    require,
    scanned,
    spans_of,
)
from migration_pipelines_tests.records import to_batch

# ── collections ──────────────────────────────────────────────────────────────────────────────────────


def test_a_collection_written_natively_is_listed_and_described(harness, store):
    schema = new_schema(store, dimensions=5)
    records = records_for(store, 3, dimensions=5)
    harness.write(schema, records)

    assert schema.name in store.list_collections()
    assert store.list_collections() == sorted(store.list_collections())
    found = store.describe(schema.name)
    assert found.name == schema.name
    assert [(v.name, v.kind, v.dtype, v.dimensions, v.metric) for v in found.vectors] == [
        (v.name, v.kind, v.dtype, v.dimensions, v.metric) for v in schema.vectors
    ]
    assert {batches.id_kind(record.id) for record in records} <= found.id_kinds


@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_a_created_collection_is_described_as_it_was_asked_for(store, metric):
    require(metric in store.capabilities.metrics, metric)
    schema = load(store, new_schema(store, metric=metric), [])
    assert store.count(schema.name) == 0
    assert read_all(store, schema.name) == []
    assert [v.metric for v in store.describe(schema.name).vectors] == [metric]

    # Some stores learn the dimensions from the first record.
    store.upsert(schema.name, to_batch(records_for(store, 1), schema))
    found = store.describe(schema.name)
    assert [(v.dimensions, v.metric) for v in found.vectors] == [(8, metric)]
    assert found.has_documents == schema.has_documents


def test_creating_a_collection_twice_is_refused_and_changes_nothing(store):
    schema = load(store, new_schema(store), records := records_for(store, 3))
    with pytest.raises(CollectionExistsError, match=schema.name):
        store.create(schema)
    assert_same(read_all(store, schema.name), records, store)


def test_a_dropped_collection_is_gone_and_can_be_created_again(store):
    schema = load(store, new_schema(store), records_for(store, 3))
    store.drop(schema.name)

    assert schema.name not in store.list_collections()
    with pytest.raises(CollectionNotFoundError):
        store.count(schema.name)
    load(store, schema, [])
    assert store.count(schema.name) == 0


_ON_A_COLLECTION = {
    "describe": lambda store, name: store.describe(name),
    "count": lambda store, name: store.count(name),
    "split": lambda store, name: list(store.split(name, span_records=10)),
    "scan": lambda store, name: list(_scan_after_drop(store, name)),
    "fetch": lambda store, name: store.fetch(name, ids_of(records_for(store, 1))),
    "read_part": lambda store, name: store.read_part(name, "0", ids_of(records_for(store, 1))),
    "fingerprint": lambda store, name: store.fingerprint(name),
    "drop": lambda store, name: store.drop(name),
    "upsert": lambda store, name: store.upsert(name, to_batch(records_for(store, 1), new_schema(store))),
    "load_part": lambda store, name: _load_one(store, name),
    "begin_load": lambda store, name: store.begin_load(name),
    "finish_load": lambda store, name: store.finish_load(name),
    "search": lambda store, name: store.search(name, np.ones(8, np.float32), limit=1),
}


@pytest.mark.parametrize("operation", _ON_A_COLLECTION.values(), ids=_ON_A_COLLECTION)
def test_a_missing_collection_is_told_by_name(store, operation):
    name = new_name(store)
    with pytest.raises(CollectionNotFoundError, match=name):
        operation(store, name)


def _scan_after_drop(store, name):
    """Scan a span of a collection that is dropped before."""
    schema = load(store, new_schema(store, name=name), records_for(store, 3))
    spans = spans_of(store, schema.name, 10)
    store.drop(schema.name)
    yield from scanned(store, name, spans)


def _load_one(store, name):
    with store.load_part(name, "0") as write:
        write(to_batch(records_for(store, 1), new_schema(store)))


def test_deleting_from_a_missing_collection_is_told_by_name(store):
    require(store.capabilities.deletes, "deletes")
    name = new_name(store)
    with pytest.raises(CollectionNotFoundError, match=name):
        store.delete(name, ids_of(records_for(store, 1)))


# ── aliases, identity ────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_declared_is_refused(store):
    schema = load(store, new_schema(store), records := records_for(store, 2))
    undeclared = []
    if not store.capabilities.deletes:
        undeclared.append(lambda: store.delete(schema.name, ids_of(records)))
    if not store.capabilities.aliases:
        undeclared += [lambda: store.aliases(schema.name), lambda: store.set_alias("alias", schema.name)]
    for operation in undeclared:
        with pytest.raises(UnsupportedOperationError, match=store.kind):
            operation()
    assert_same(read_all(store, schema.name), records, store)


def test_an_alias_points_at_one_collection_and_moves(store):
    require(store.capabilities.aliases, "aliases")
    first, second = (load(store, new_schema(store), []).name for _ in range(2))
    alias = new_name(store)
    store.set_alias(alias, first)
    assert store.aliases(first) == [alias]
    store.set_alias(alias, second)
    assert (store.aliases(first), store.aliases(second)) == ([], [alias])


def test_the_address_opens_the_same_store(store):
    secrets = [
        value.get_secret_value()
        for name in type(store).model_fields
        if isinstance(value := getattr(store, name), SecretStr)
    ]
    for collection in (None, "docs", "naïve 漢字", "a%2Fb"):
        address = store.address(collection)
        opened, found = open_address(address)
        assert type(opened) is type(store)
        assert (found is None) == (collection is None)
        assert opened.address(found) == opened.address(collection) == address
        assert not any(secret in address for secret in secrets if secret)


def test_the_store_is_found_by_its_kind(store):
    assert store_class(store.kind) is type(store)


def test_a_closed_store_works_again(store):
    schema = load(store, new_schema(store), records := records_for(store, 10))
    store.close()
    store.close()
    assert_same(read_all(store, schema.name), records, store)
    store.close()
    store.upsert(schema.name, to_batch(records, schema))
    assert store.count(schema.name) == 10
