"""What is special to memory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from migration_pipelines import batch as batches
from migration_pipelines.errors import CollectionExistsError, CollectionNotFoundError
from migration_pipelines.store import open_address
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.conformance import load, read_all
from migration_pipelines_tests.records import plain_records, plain_schema, to_batch


@pytest.fixture
def store(request):
    found = MemoryStore(name=request.node.name)
    yield found
    for name in found.list_collections():
        found.drop(name)


def test_two_stores_of_one_name_see_the_same_collections(store):
    load(store, plain_schema("docs"), plain_records(3))
    other, collection = open_address(store.address("docs"))
    assert other.count(collection) == 3
    assert MemoryStore(name="another").list_collections() == []


def test_a_record_is_not_changed_through_the_array_it_came_from(store):
    schema = plain_schema("docs", dimensions=2)
    store.create(schema)
    matrix = np.ones((1, 2), np.float32)
    columns = to_batch(plain_records(1, dimensions=2), schema).columns
    columns[2] = batches.dense_vectors(matrix)
    store.upsert("docs", pa.RecordBatch.from_arrays(columns, schema=batches.arrow_schema(schema)))
    matrix[:] = 7
    assert read_all(store, "docs")[0].vectors[""].tolist() == [1, 1]


def test_a_collection_created_again_has_another_fingerprint(store):
    seen = set()
    for _ in range(2):
        load(store, plain_schema("docs"), plain_records(3))
        seen.add(store.fingerprint("docs"))
        store.drop("docs")
    assert len(seen) == 2


def test_an_alias_stands_for_its_collection_until_that_is_dropped(store):
    load(store, plain_schema("docs"), plain_records(3))
    store.set_alias("live", "docs")
    assert store.count("live") == 3
    with pytest.raises(CollectionExistsError):
        store.create(plain_schema("live"))
    with pytest.raises(CollectionExistsError):
        store.set_alias("docs", "docs")
    store.drop("docs")
    with pytest.raises(CollectionNotFoundError):
        store.count("live")
