"""How fast one store is read and written, beside a bare loop over its driver, on the same records in one run.

Each side is measured twice, in turns, and its better time counts: whatever else the machine does then hurts
both alike. Index builds after the load are left out on both sides.
"""

from __future__ import annotations

import importlib
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.benchmark import Rate
from migration_pipelines.benchmark.data import Page, pages
from migration_pipelines.metadata import dump_all, value_kinds
from migration_pipelines.model import CollectionSchema, IdKind, Metric, Value, VectorField
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.store import Store

_ROUNDS = 2
_SPAN_RECORDS = 20_000  # the engine's own sizes, as it has them by default
_BATCH_RECORDS = 2_000


class StoreBenchmark(Value):
    """What was found of one store."""

    store: str
    records: int
    dimensions: int
    driver_read: Rate
    read: Rate
    driver_write: Rate
    write: Rate

    @property
    def of_driver_read(self) -> float:
        """Our reading's share of what the driver can do."""
        return self.read.records_per_second / self.driver_read.records_per_second

    @property
    def of_driver_write(self) -> float:
        """Our writing's share of what the driver can do."""
        return self.write.records_per_second / self.driver_write.records_per_second

    def document(self) -> dict[str, Any]:
        """Return everything as plain JSON, rates and ratios included."""
        found: dict[str, Any] = self.model_dump(mode="json")
        for name in ("driver_read", "read", "driver_write", "write"):
            found[name]["records_per_second"] = getattr(self, name).records_per_second
        found["ratios"] = {"read": self.of_driver_read, "write": self.of_driver_write}
        return found


def run_store_benchmark(
    store: Store,
    *,
    records: int,
    dimensions: int,
    tell: Callable[[str], None] = lambda text: None,  # noqa: ARG005 - the default tells nobody
) -> StoreBenchmark:
    """Measure a store that may be written to; the collections that this makes are removed again.

    Raises
    ------
    MigrationError
        The store can't be read or written.
    """
    driver = importlib.import_module(f"migration_pipelines.benchmark.drivers.{store.kind}")
    publishes = getattr(driver, "PUBLISHES", False)
    found: dict[str, list[Rate]] = {}

    def measure(name: str, work: Callable[[], int]) -> None:
        tell(f"{store.kind}: {name}")
        started = time.perf_counter()
        done = work()
        found.setdefault(name, []).append(Rate(records=done, seconds=time.perf_counter() - started))

    sample = list(pages(records, dimensions))
    schema = _schema(store, sample[0], dimensions)
    for _ in range(_ROUNDS):
        with _collection(store, schema) as name:
            measure("driver_write", partial(driver.bare_write, store, name, sample))
        with _collection(store, schema) as name:
            prepared = list(_batches(sample, schema, name))
            measure("write", partial(_write, store, name, prepared, publishes=publishes))
            store.finish_load(name)
            measure("driver_read", partial(driver.bare_read, store, name))
            with _opened(store, name) as reader:
                measure("read", partial(_read, reader, name))
    best = {name: min(rates, key=lambda rate: rate.seconds) for name, rates in found.items()}
    return StoreBenchmark(store=store.kind, records=records, dimensions=dimensions, **best)


@contextmanager
def _collection(store: Store, schema: CollectionSchema) -> Iterator[str]:
    """Yield the name of an empty collection, ready for a load; it is removed afterwards."""
    name = f"benchmark{uuid.uuid4().hex[:8]}"
    store.create(schema.model_copy(update={"name": name}))
    try:
        store.begin_load(name)
        yield name
    finally:
        store.drop(name)


def _schema(store: Store, page: Page, dimensions: int) -> CollectionSchema:
    can = store.capabilities
    metric = Metric.EUCLIDEAN if Metric.EUCLIDEAN in can.metrics else sorted(can.metrics)[0]
    kind = next(kind for kind in (IdKind.STR, IdKind.INT, IdKind.UUID) if kind in can.id_kinds)
    field = VectorField(dimensions=dimensions, metric=metric)
    schema = CollectionSchema(name="benchmark", vectors=(field,), id_kinds=frozenset({kind}))
    kinds: dict[str, Counter[str]] = {}
    for metadata in page.metadatas:
        for key, value in metadata.items():
            kinds.setdefault(key, Counter()).update(kind.value for kind in value_kinds(value))
    return store.adapt(schema, kinds)


def _batches(sample: list[Page], schema: CollectionSchema, name: str) -> Iterator[pa.RecordBatch]:
    (kind,) = schema.id_kinds
    number = 0
    for page in sample:
        ids = list(page.ids)
        if kind is not IdKind.STR:
            numbers = range(number, number + len(ids))
            ids = [str(n if kind is IdKind.INT else uuid.UUID(int=n)) for n in numbers]
        number += len(ids)
        columns = {
            batches.ID: pa.array(ids),
            batches.ID_TYPE: batches.constant(kind.value, len(ids)),
            batches.VECTOR: batches.dense_vectors(page.vectors),
            batches.DOCUMENT: pa.array(page.documents),
            batches.METADATA: pa.array(dump_all(page.metadatas), pa.string()),
        }
        batch = pa.RecordBatch.from_pydict(columns)
        yield batches.conform(batch, schema, where=name)


def _write(store: Store, name: str, prepared: list[pa.RecordBatch], *, publishes: bool) -> int:
    """Load the batches; `publishes` says that what the driver does makes them readable as well."""
    can = store.capabilities
    sized = batches.rebatch(
        prepared,
        max_records=min(_BATCH_RECORDS, can.max_batch_records or _BATCH_RECORDS),
        max_bytes=can.max_batch_bytes or 16_000_000,
    )
    written = 0
    with store.load_part(name, "part") as write:
        for batch in sized:
            write(batch)
            written += batch.num_rows
    if publishes:
        store.finish_load(name)
    return written


@contextmanager
def _opened(store: Store, name: str) -> Iterator[Store]:
    """Yield the store to read from, open already, as the driver's own is: a copy, say, has been made.

    An embedded engine may still tidy up what was just loaded; then its copy is made once it is done.
    """
    with tempfile.TemporaryDirectory(prefix="vector-migrate-") as scratch:
        reader = RetryPolicy().call(lambda: store.for_reading(Path(scratch)))
        try:
            reader.count(name)
            yield reader
        finally:
            if reader is not store:
                reader.close()


def _read(reader: Store, name: str) -> int:
    return sum(
        batch.num_rows
        for span, ids in reader.split(name, span_records=_SPAN_RECORDS)
        for batch in reader.scan(name, span, ids=ids, batch_records=_BATCH_RECORDS)
    )
