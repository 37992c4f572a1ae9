"""Every store reads what was written natively, around the connector: in spans, by ids, by search."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from migration_pipelines import batch as batches
from migration_pipelines.errors import DimensionMismatchError
from migration_pipelines.model import Metric, Span
from migration_pipelines_tests.conformance import (
    METRICS,
    assert_same,
    ids_of,
    load,
    new_schema,
    read_all,
    records_for,
    reopened,
    require,
    scanned,
    spans_of,
)
from migration_pipelines_tests.records import from_batches, to_batch

# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_written_natively_is_read_exactly(harness, store):
    schema = new_schema(store)
    records = records_for(store, 120)
    harness.write(schema, records)

    assert store.count(schema.name) == 120
    assert_same(read_all(store, schema.name), records, store)


@pytest.mark.parametrize("span_records", [1, 7, 50, 237, 10_000])
def test_spans_cover_each_record_exactly_once(harness, store, span_records):
    schema = new_schema(store)
    records = records_for(store, 40 if span_records == 1 else 237)
    harness.write(schema, records)
    spans = spans_of(store, schema.name, span_records)

    assert sum(span.records for span, _ in spans) == len(records)
    for span, ids in spans:
        assert ids is None or ids.num_rows == span.records
    assert_same(from_batches(scanned(store, schema.name, spans)), records, store)


def test_an_empty_collection_has_no_records_in_any_span(harness, store):
    schema = new_schema(store)
    harness.write(schema, [])

    assert store.count(schema.name) == 0
    assert from_batches(scanned(store, schema.name, spans_of(store, schema.name, 10))) == []


def test_spans_hold_for_a_store_opened_again(harness, store):
    schema = new_schema(store)
    records = records_for(store, 60)
    harness.write(schema, records)
    spans = spans_of(store, schema.name, 25)

    again = reopened(store)
    assert_same(from_batches(scanned(again, schema.name, spans)), records, store)
    again.close()


@pytest.mark.parametrize("vectors", [True, False])
def test_batches_keep_to_their_size_and_layout(harness, store, vectors):
    schema = new_schema(store)
    harness.write(schema, records_for(store, 64))
    expected = batches.arrow_schema(store.describe(schema.name), vectors=vectors)

    spans = spans_of(store, schema.name, 40)
    for batch in scanned(store, schema.name, spans, batch_records=9, vectors=vectors):
        assert 0 < batch.num_rows <= 9
        assert batch.schema.names == expected.names
        assert batch.schema.types == expected.types


def test_records_deleted_after_the_split_are_left_out(store):
    require(store.capabilities.deletes, "deletes")
    schema = load(store, new_schema(store), records := records_for(store, 50))
    spans = spans_of(store, schema.name, 20)
    store.delete(schema.name, ids_of(records[10:30]))

    assert_same(from_batches(scanned(store, schema.name, spans)), records[:10] + records[30:], store)


def test_fetch_returns_what_is_there_and_leaves_out_the_rest(harness, store):
    schema = new_schema(store)
    records = records_for(store, 300)
    harness.write(schema, records)
    wanted = records[250:] + records_for(store, 5, start=1000) + records[:20]

    found = store.fetch(schema.name, ids_of(wanted))
    assert_same(from_batches([found]), records[250:] + records[:20], store)
    assert batches.vector_columns(store.fetch(schema.name, ids_of(wanted), vectors=False).schema) == []
    assert store.fetch(schema.name, ids_of(wanted[50:55])).num_rows == 0
    assert store.fetch(schema.name, ids_of([])).num_rows == 0


def test_concurrent_scans_are_equal(harness, store):
    schema = new_schema(store)
    records = records_for(store, 200)
    harness.write(schema, records)
    spans = spans_of(store, schema.name, 30)

    def scan(_):
        return from_batches(scanned(store, schema.name, spans, batch_records=13))

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(scan, range(4)):
            assert_same(found, records, store)


def test_the_fingerprint_is_stable_under_reading_and_tells_of_records_that_come_and_go(store):
    schema = load(store, new_schema(store), records := records_for(store, 20))
    first = store.fingerprint(schema.name)
    read_all(store, schema.name)
    store.fetch(schema.name, ids_of(records))
    assert store.fingerprint(schema.name) == first

    store.upsert(schema.name, to_batch(records_for(store, 1, start=500), schema))
    second = store.fingerprint(schema.name)
    assert second != first
    if store.capabilities.deletes:
        store.delete(schema.name, ids_of(records[:1]))
        assert store.fingerprint(schema.name) not in (first, second)


def test_reading_as_a_source_changes_no_byte(harness, store, tmp_path):
    require(getattr(store, "path", None) is not None, "files")
    schema = new_schema(store)
    records = records_for(store, 40)
    harness.write(schema, records)
    before = _digests(Path(store.path))

    source = store.for_reading(tmp_path)
    source.list_collections()
    source.describe(schema.name)
    source.count(schema.name)
    source.fingerprint(schema.name)
    assert_same(read_all(source, schema.name), records, store)
    source.fetch(schema.name, ids_of(records[:3]))
    source.close()
    assert _digests(Path(store.path)) == before


def _digests(path: Path) -> dict[str, str]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_span_says_what_it_holds_without_naming_a_secret_or_an_object(harness, store):
    schema = new_schema(store)
    harness.write(schema, records_for(store, 30))
    for span, _ in store.split(schema.name, span_records=10):
        assert Span.model_validate_json(span.model_dump_json()) == span


# ── search ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_search_finds_the_nearest_first(harness, store, metric):
    require(metric in store.capabilities.metrics, metric)
    schema = new_schema(store, metric=metric)
    records = records_for(store, 200)
    harness.write(schema, records)
    matrix = np.stack([record.vectors[""] for record in records]).astype(float)
    agreed = 0
    for query in matrix[:5] + 0.01:
        found = store.search(schema.name, query.astype(np.float32), limit=5)
        distances = {
            Metric.EUCLIDEAN: np.linalg.norm(matrix - query, axis=1),
            Metric.COSINE: -(matrix @ query) / np.linalg.norm(matrix, axis=1),
            Metric.DOT: -(matrix @ query),
        }[metric]
        nearest = [records[row].id for row in distances.argsort()[:5]]
        agreed += len({record_id for record_id, _ in found} & set(nearest))
        assert len(found) == 5
        assert [distance for _, distance in found] == sorted(distance for _, distance in found)
        # A graph index finds the nearest by dot product less surely: it is no distance.
        assert found[0][0] == nearest[0] or metric is Metric.DOT
    assert agreed >= 20


def test_a_search_with_another_dimension_is_refused(harness, store):
    schema = new_schema(store)
    harness.write(schema, records_for(store, 5))
    with pytest.raises(DimensionMismatchError):
        store.search(schema.name, np.ones(9, np.float32), limit=1)
