"""A migration between two stores in memory that somebody listens to, its target failing as a test says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from migration_pipelines.migration import Listener, Migration, MigrationConfig, ledger_for
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.store import open_address
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.records import plain_records, plain_schema, to_batch

RECORDS = 1_000
Fault = Callable[[pa.RecordBatch], None]
_names = (f"observed{number}" for number in itertools.count())


class Source(MemoryStore):
    """A store that leaves filtering to the engine."""

    def split(self, collection: str, **how: Any) -> Any:
        return super().split(collection, **{**how, "where": None})

    def scan(self, collection: str, span: Any, **how: Any) -> Iterator[pa.RecordBatch]:
        return super().scan(collection, span, **{**how, "where": None})


class Target(MemoryStore):
    """A store whose writes go through the fault of a test."""

    def upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        FAULTS.get(self.address(), lambda batch: None)(batch)
        super().upsert(collection, batch)


FAULTS: dict[str, Fault] = {}


def migration(folder: Path, listener: Listener, *, fault: Fault | None = None, **settings: Any) -> Migration:
    """A migration of 1,000 records in ten partitions, with batches of 30."""
    source, target = (open_address(f"memory:{next(_names)}")[0] for _ in range(2))
    source.create(plain_schema("docs"))
    source.upsert("docs", to_batch(plain_records(RECORDS), plain_schema("docs")))
    if fault is not None:
        FAULTS[target.address()] = fault
    chosen: Mapping[str, Any] = {
        "partition_size": 100,
        "batch_size": 30,
        "retry": RetryPolicy(delay_seconds=0.001),
        **settings,
    }
    config = MigrationConfig(source=source.address("docs"), target=target.address("copy"), **chosen)
    return Migration(
        config=config,
        ledger=ledger_for(config, folder),
        listener=listener,
        source_store=Source.model_validate(source.model_dump()),
        target_store=Target.model_validate(target.model_dump()),
    )


def refusing(*ids: str) -> Fault:
    """Refuse records by their ids."""
    from migration_pipelines.errors import RecordRejectedError

    def refuse(batch: pa.RecordBatch) -> None:
        if set(ids) & set(batch.column("id").to_pylist()):
            raise RecordRejectedError("the record is too odd")

    return refuse


def failing_first(times: int, error: Exception) -> Fault:
    """Fail the first so many writes."""
    count = itertools.count()

    def fail(_batch: pa.RecordBatch) -> None:
        if next(count) < times:
            raise error

    return fail
