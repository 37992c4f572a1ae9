"""Others at work in the same PostgreSQL: writers, ended connections, scans left early."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from migration_pipelines import batch as batches
from migration_pipelines.errors import MigrationError, TransientError
from migration_pipelines.filters import parse
from migration_pipelines.stores.pgvector import pool, wire
from migration_pipelines_tests.pgvector_tables import EVERYTHING, fresh
from migration_pipelines_tests.records import (
    Record,
    by_id,
    from_batches,
    plain_records,
    plain_schema,
    to_batch,
)


def test_spans_cover_everything_while_records_come_go_and_change(pg, name):
    schema = plain_schema(name)
    steady = plain_records(2000)
    pg.store.create(schema)
    pg.store.upsert(name, to_batch(steady, schema))
    spans = [span for span, _ in pg.store.split(name, span_records=300)]
    stop = threading.Event()

    def disturb():
        other, turn = fresh(pg), 0
        while not stop.is_set():
            # The same vectors under the same ids: new row versions elsewhere in the heap.
            other.upsert(name, to_batch(steady[turn % 1900 : turn % 1900 + 100], schema))
            passing = [Record(id=f"{prefix}{turn}") for prefix in ("", "doc#00950!", "zzz")]
            other.upsert(name, to_batch(passing, schema))
            other.delete(name, batches.id_batch([record.id for record in passing[:2]]))
            turn += 100
        other.close()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(disturb)
        rounds = [
            [r for span in spans for r in from_batches(pg.store.scan(name, span, batch_records=50))]
            for _ in range(5)
        ]
        stop.set()
        running.result()

    for found in rounds:
        seen = [record.id for record in found if record.id.startswith("doc#") and "!" not in record.id]
        assert sorted(seen) == [record.id for record in steady]
    after = [r.id for span in spans for r in from_batches(pg.store.scan(name, span, batch_records=500))]
    assert len(after) == len(set(after)) == pg.store.count(name)


def test_a_load_whose_connection_is_ended_is_retried_with_nothing_twice(pg, name, monkeypatch):
    schema = plain_schema(name)
    records = plain_records(3000)
    store = fresh(pg)
    store.create(schema)
    store.upsert(name, to_batch(records[:500], schema))
    original = wire.pack
    ended = []

    def end_the_connection(fields):
        if not ended:
            ended.extend(
                pg.sql(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                    "WHERE application_name = 'migration_pipelines' AND datname = current_database() "
                    "AND query LIKE 'COPY%%' AND pid <> pg_backend_pid() AND state = 'active'"
                )
            )
        return original(fields)

    monkeypatch.setattr(wire, "pack", end_the_connection)
    with pytest.raises(TransientError):
        store.upsert(name, to_batch(records, schema))
    assert ended == [(True,)]
    assert store.count(name) == 500

    store.upsert(name, to_batch(records, schema))
    assert by_id(pg.read(name)) == by_id(records)
    store.close()


def test_writers_of_the_same_ids_leave_each_record_once(pg, name):
    schema = plain_schema(name)
    records = plain_records(300)
    pg.store.create(schema)

    def write(seed):
        store = fresh(pg)
        mine = plain_records(300, seed=seed)
        for _ in range(20):
            try:
                store.upsert(name, to_batch(mine, schema))
            except TransientError:
                continue
        store.close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    found = by_id(pg.read(name))
    assert found.keys() == by_id(records).keys()
    assert any(found == by_id(plain_records(300, seed=seed)) for seed in range(3)), "a mixture of two batches"


def test_a_scan_that_is_left_early_gives_its_connection_up(pg, name):
    schema = plain_schema(name)
    store = fresh(pg)
    store.create(schema)
    store.upsert(name, to_batch(plain_records(5000), schema))
    for _ in range(3):
        part = store.scan(name, EVERYTHING, batch_records=10)
        assert next(part).num_rows == 10
        part.close()
    assert store.count(name) == 5000
    store.close()
    busy = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE %s"
    assert pg.sql(busy, f"%{name}%")[0][0] <= 1


def test_the_fingerprint_tells_of_an_update_in_place(pg, name):
    schema = plain_schema(name)
    pg.store.create(schema)
    pg.store.upsert(name, to_batch(plain_records(10), schema))
    seen = [pg.store.fingerprint(name), pg.store.fingerprint(name)]
    pg.sql(f"UPDATE {name} SET document = document WHERE id = 'doc#00003'")
    seen.append(pg.store.fingerprint(name))
    pg.sql(f"DELETE FROM {name} WHERE id = 'doc#00004'")
    seen.append(pg.store.fingerprint(name))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


def test_reading_runs_in_transactions_that_could_not_write(pg, name, monkeypatch):
    schema = plain_schema(name)
    pg.store.create(schema)
    pg.store.upsert(name, to_batch(plain_records(10), schema))
    transaction, modes = pool.Pool.transaction, []

    def noted(self, *, read_only=False, snapshot=False):
        modes.append(read_only)
        return transaction(self, read_only=read_only, snapshot=snapshot)

    monkeypatch.setattr(pool.Pool, "transaction", noted)
    spans = [span for span, _ in pg.store.split(name, span_records=5)]
    list(pg.store.scan(name, spans[0], batch_records=5))
    pg.store.fetch(name, batches.id_batch(["doc#00001"]))
    pg.store.describe(name)
    pg.store.count(name, parse({"n": 1}))
    pg.store.fingerprint(name)
    pg.store.search(name, np.ones(8, np.float32), limit=1)
    assert len(modes) >= 7
    assert all(modes)
    with pytest.raises(MigrationError), pg.store._reading(name) as (connection, _):
        connection.execute(f"DELETE FROM {name}")
    assert pg.store.count(name) == 10
