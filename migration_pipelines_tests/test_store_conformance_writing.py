"""Every store writes whole records, all of a batch or none, once.

What was written is also read natively, around the connector, by `harness.read`: the connector's own reading
can't hide what is wrong in its writing.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from migration_pipelines.errors import DimensionMismatchError, RecordRejectedError
from migration_pipelines_tests.conformance import (
    adapted,
    assert_same,
    ids_of,
    load,
    new_schema,
    read_all,
    records_for,
    require,
)
from migration_pipelines_tests.records import Record, from_batches, to_batch

LARGEST_BATCH = 6000  # of a store that states no limit


def test_what_the_connector_wrote_is_read_natively(harness, store):
    schema = load(store, new_schema(store), records := records_for(store, 120))
    assert_same(harness.read(schema.name), records, store)


def test_an_upsert_replaces_the_whole_record(harness, store):
    old, others = records_for(store, 1)[0], records_for(store, 20)[1:]
    schema = load(store, new_schema(store), [old, *others])
    new = Record(id=old.id, vectors={"": np.arange(8, dtype=np.float32)}, metadata={"other": 1})
    store.upsert(schema.name, to_batch([new, *records_for(store, 1, start=700)], schema))

    expected = [new, *others, *records_for(store, 1, start=700)]
    assert_same(harness.read(schema.name), expected, store)
    assert_same(read_all(store, schema.name), expected, store)
    assert store.count(schema.name) == 21


def test_an_upsert_said_twice_is_said_once(harness, store):
    schema = load(store, new_schema(store), [])
    records = records_for(store, 30)
    for _ in range(2):
        store.upsert(schema.name, to_batch(records, schema))

    assert store.count(schema.name) == 30
    assert_same(harness.read(schema.name), records, store)


def test_an_upsert_takes_the_largest_batch(harness, store):
    n = min(store.capabilities.max_batch_records or LARGEST_BATCH, LARGEST_BATCH)
    schema = new_schema(store, dimensions=2)
    records = [replace(r, document=None, metadata=None) for r in records_for(store, n, dimensions=2)]
    if not store.capabilities.no_metadata:
        records = [replace(record, metadata={}) for record in records]
    load(store, schema, [])
    store.upsert(schema.name, to_batch(records, schema))

    assert store.count(schema.name) == n
    assert store.fetch(schema.name, ids_of(records)).num_rows == n


@pytest.mark.parametrize("at", [0, 7, 19])
def test_a_poison_record_is_rejected_and_nothing_of_its_batch_is_written(harness, store, at):
    require(not store.capabilities.non_finite_vectors, "a vector that is refused")
    schema = load(store, new_schema(store), before := records_for(store, 5))
    batch = records_for(store, 20, seed=1)
    batch[at] = replace(batch[at], vectors={"": np.array([0, 1, np.nan, 3, 4, 5, 6, 7], np.float32)})

    with pytest.raises(RecordRejectedError):
        store.upsert(schema.name, to_batch(batch, schema))
    assert_same(harness.read(schema.name), before, store)


def test_vectors_of_another_dimension_are_refused_and_nothing_is_written(harness, store):
    schema = load(store, new_schema(store, dimensions=8), before := records_for(store, 3))
    other = new_schema(store, dimensions=9)

    with pytest.raises(DimensionMismatchError, match=r"9.*8|8.*9"):
        store.upsert(schema.name, to_batch(records_for(store, 2, dimensions=9, start=10), other))
    assert_same(harness.read(schema.name), before, store)


def test_a_part_written_twice_is_there_once(harness, store):
    schema = adapted(store, new_schema(store), records := records_for(store, 80))
    store.create(schema)
    for _ in range(2):
        store.begin_load(schema.name)
        for part, start in (("a", 0), ("b", 40)):
            with store.load_part(schema.name, part) as write:
                write(to_batch(records[start : start + 25], schema))
                write(to_batch(records[start + 25 : start + 40], schema))
            found = store.read_part(schema.name, part, ids_of(records[start : start + 40]))
            assert_same(from_batches([found]), records[start : start + 40], store)
    assert store.count(schema.name) == 80
    for _ in range(2):
        store.finish_load(schema.name)

    assert store.count(schema.name) == 80
    assert_same(harness.read(schema.name), records, store)


def test_a_part_that_is_written_after_the_load_replaces_records(harness, store):
    schema = load(store, new_schema(store), records := records_for(store, 40))
    newer = records_for(store, 30, start=20, seed=3)
    with store.load_part(schema.name, "later") as write:
        write(to_batch(newer, schema))

    if store.merges_at_the_end:
        assert_same(harness.read(schema.name), records, store)
        store.finish_load(schema.name)
    assert_same(harness.read(schema.name), [*records[:20], *newer], store)
    assert_same(read_all(store, schema.name), [*records[:20], *newer], store)


def test_deleted_records_are_gone_and_ids_that_are_not_there_are_no_error(harness, store):
    require(store.capabilities.deletes, "deletes")
    schema = load(store, new_schema(store), records := records_for(store, 30))
    for _ in range(2):
        store.delete(schema.name, ids_of(records[5:15] + records_for(store, 2, start=900)))

    assert store.count(schema.name) == 20
    assert_same(harness.read(schema.name), records[:5] + records[15:], store)
