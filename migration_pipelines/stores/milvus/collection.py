"""One collection as the store sees it: its namespaces, its records by key, and writing them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.distances import nearest
from migration_pipelines.errors import DimensionMismatchError, RecordRejectedError, StoreRefusedError
from migration_pipelines.model import CollectionSchema, IdKind, Metric
from migration_pipelines.stores.milvus.expressions import Key, chunks
from migration_pipelines.stores.milvus.legacy import LegacyFile
from migration_pipelines.stores.milvus.reading import batch_of
from migration_pipelines.stores.milvus.schema import (
    METRIC_NAMES,
    Described,
    Kind,
    Layout,
    divides_by_itself,
    namespaces_of,
    partition_of,
    schema_of,
)
from migration_pipelines.stores.milvus.server import PAGE, Server
from migration_pipelines.stores.milvus.writing import data_of


class Collection:
    """A collection that is there.

    Parameters
    ----------
    engine
        What it is asked of.
    namespace
        The one namespace that is meant; all of them if None.
    where
        Its address, for messages.
    """

    def __init__(
        self,
        engine: Server | LegacyFile,
        found: Described,
        layout: Layout,
        *,
        namespace: str | None,
        where: str,
    ) -> None:
        self.engine, self.found, self.layout = engine, found, layout
        self._namespace, self._where = namespace, where

    @cached_property
    def schema(self) -> CollectionSchema:
        """What the collection is made of."""
        return schema_of(self.found, self.layout, in_one_namespace=self._namespace is not None)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def namespaces(self) -> list[str]:
        """Return the namespaces to read; "" alone where there are none."""
        if self._namespace is not None:
            return [self._namespace]
        spaces = namespaces_of(self.found)
        return [""] if spaces is None else spaces

    def count(self, space: str | None = None) -> int:
        """Return how many records a namespace holds, or all that are meant."""
        space = self._namespace if space is None else space
        partition = None if space is None else self._partition(space)
        if partition is not None and partition not in self.found.partitions:
            return 0
        return self.engine.count(self.found, self.layout, partition)

    def keys(self, space: str) -> Iterator[list[Key]]:
        """Yield the keys of a namespace, page by page."""
        partition = self._partition(space)
        if partition is None or partition in self.found.partitions:
            yield from self.engine.keys(self.found, self.layout, partition)

    def spans(self, size: int) -> Iterator[tuple[str, list[Key]]]:
        """Yield all keys in lists of `size`, with their namespace.

        Raises
        ------
        StoreRefusedError
            Keys are there more than once, of which Milvus answers one.
        """
        for space in self.namespaces():
            before, listed = self.count(space), 0
            for keys in _resized(self.keys(space), size):
                listed += len(keys)
                yield space, keys
            # Where it changes meanwhile the two differ as well, and that is told by the fingerprint.
            if listed != before and before == self.count(space):
                raise StoreRefusedError(
                    f"{self._where}: {before} records are counted under {listed} keys: some were inserted "
                    "twice, and Milvus answers any one of them; delete those and write them again",
                    expected=before,
                    found=listed,
                )

    def pages(
        self, keys: Sequence[Key], space: str, *, size: int = PAGE, vectors: bool = True
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of these keys that are there, in pages."""
        partition = self._partition(space)
        for part in chunks(keys, min(size, PAGE)):
            columns = self.engine.records(self.found, self.layout, part, partition, vectors=vectors)
            page = batch_of(
                columns,
                self.layout,
                self.schema,
                with_vectors=vectors,
                namespace=space,
                where=self._where,
            )
            if page.num_rows:
                yield page

    def by_ids(
        self, ids: pa.RecordBatch, *, size: int = PAGE, vectors: bool = True
    ) -> Iterator[pa.RecordBatch]:
        """Yield the records of these ids that are there, in pages."""
        for space, keys in self._grouped(ids):
            yield from self.pages(keys, space, size=size, vectors=vectors)

    def id_batch(self, keys: Sequence[Key], space: str) -> pa.RecordBatch:
        """Return the batch that names these records."""
        columns = {
            batches.ID: pa.array(list(map(str, keys)), pa.string()),
            batches.ID_TYPE: batches.constant(self._id_kind.value, len(keys)),
        }
        if self.schema.has_namespaces:
            columns[batches.NAMESPACE] = batches.constant(space, len(keys))
        return pa.RecordBatch.from_pydict(columns)

    # ── search ───────────────────────────────────────────────────────────────────────────────────────

    def is_searched_by(self, name: str) -> bool:
        """Whether there is such a vector of float32, which queries are."""
        return any(
            column.field.name == name and column.kind == Kind.FLOAT_VECTOR for column in self.layout.vectors
        )

    def search(self, vector: Any, *, name: str, limit: int) -> list[tuple[batches.RecordId, float]]:
        """Return the nearest `(id, distance)`, nearest first; of a file by looking at every record.

        Raises
        ------
        DimensionMismatchError
        """
        if isinstance(self.engine, LegacyFile):
            parts = (part for keys in self.keys("") for part in self.pages(keys, ""))
            return nearest(parts, vector, self.schema, name=name, limit=limit, where=self._where)
        column = next(column for column in self.layout.vectors if column.field.name == name)
        query = np.asarray(vector, "<f4").reshape(-1)
        if column.field.dimensions != len(query):
            raise DimensionMismatchError(
                f"{self._where}: the query has {len(query)} dimensions, vector {column.name!r} has "
                f"{column.field.dimensions}",
                expected=column.field.dimensions,
                found=len(query),
            )
        metric = METRIC_NAMES[column.field.metric or Metric.EUCLIDEAN]
        partition = None if self._namespace is None else partition_of(self._namespace)
        reply = self.engine.search(
            self.found, column.name, query.tobytes(), metric=metric, limit=limit, partition=partition
        )
        keys = reply.ids.str_id.data if self.layout.key_is_text else reply.ids.int_id.data
        return [(key, _distance(score, metric)) for key, score in zip(keys, reply.scores, strict=True)]

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def write(self, batch: pa.RecordBatch, server: Server) -> None:
        """Write records, each in place of what is under its id; nothing where one of them is refused.

        Raises
        ------
        RecordRejectedError
            Milvus would refuse a record or change it, or its id stands in another partition.
        StoreRefusedError
            Milvus makes the collection's keys.
        """
        if self.layout.makes_keys:
            raise StoreRefusedError(f"{self._where}: Milvus makes its keys itself; choose another collection")
        has_namespaces = batches.NAMESPACE in batch.schema.names and self._namespace is None
        schema = self.schema.model_copy(update={"has_namespaces": has_namespaces})
        batch = batches.conform(batch, schema, where=self._where)
        parts = _by_namespace(batch)
        if self._namespace is not None:
            parts = [(self._namespace, batch)]
        ready = [
            (space, part.num_rows, data_of(part, self.layout, where=self._where)) for space, part in parts
        ]
        for space, part in parts:
            self._check_partition(server, space, part)
        for space, n_records, data in ready:
            server.replace(self.found, self._made(server, space), data, n_records)

    def delete(self, ids: pa.RecordBatch, server: Server) -> None:
        """Remove the records of these ids."""
        for space, keys in self._grouped(ids):
            server.delete(self.found, self.layout, keys, self._partition(space))

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def _id_kind(self) -> IdKind:
        return IdKind.STR if self.layout.key_is_text else IdKind.INT

    def _partition(self, space: str) -> str | None:
        """Return the partition to ask; None for all of them."""
        if self._namespace is None and namespaces_of(self.found) is None:
            return None
        return partition_of(space)

    def _grouped(self, ids: pa.RecordBatch) -> Iterator[tuple[str, list[Key]]]:
        """Yield the distinct keys that Milvus can hold, by the namespace that they are asked for in."""
        ids = ids.filter(pc.equal(ids.column(batches.ID_TYPE), self._id_kind.value))
        for asked, part in _by_namespace(ids):
            space = asked if self._namespace is None else self._namespace
            keys = self._keys_of(part)
            if keys and self._partition(space) in {None, *self.found.partitions}:
                yield space, keys

    def _keys_of(self, ids: pa.RecordBatch) -> list[Key]:
        texts: Mapping[str, None] = dict.fromkeys(ids.column(batches.ID).to_pylist())
        if self.layout.key_is_text:
            return list(texts)
        return [number for number in map(int, texts) if -(2**63) <= number < 2**63]

    def _check_partition(self, server: Server, space: str, part: pa.RecordBatch) -> None:
        """Raise where an id stands in another partition than it is to be written to.

        Milvus Lite would move it without a word, and a server would hold it twice.
        """
        if divides_by_itself(self.found) or (namespaces_of(self.found) is None and not space):
            return
        partition, keys = partition_of(space), self._keys_of(part)
        server.load(self.found)
        elsewhere = server.held(self.found, self.layout, keys, None)
        if elsewhere and partition in self.found.partitions:
            elsewhere -= server.held(self.found, self.layout, list(elsewhere), partition)
        if elsewhere:
            record = next(key for key in keys if key in elsewhere)
            raise RecordRejectedError(
                f"{self._where}: record {record!r} stands in another partition than {partition!r}: Milvus "
                "takes an id once a collection; make the ids distinct over the namespaces, or move each "
                "namespace to a collection of its own",
                record=record,
            )

    def _made(self, server: Server, space: str) -> str:
        """Return the partition to write to, which is made where it isn't there."""
        if divides_by_itself(self.found):
            return ""  # a collection with a partition key takes no name
        partition = partition_of(space)
        if partition not in self.found.partitions:
            server.create_partition(self.found.name, partition)
        return partition


def _distance(score: float, metric: str) -> float:
    """Return what is smaller the nearer: Milvus scores by cosine and dot product the other way round."""
    if metric == "COSINE":
        return 1 - score
    return -score if metric == "IP" else score


def _resized(pages: Iterator[list[Key]], size: int) -> Iterator[list[Key]]:
    waiting: list[Key] = []
    for page in pages:
        waiting += page
        whole = len(waiting) - len(waiting) % size
        yield from (waiting[start : start + size] for start in range(0, whole, size))
        waiting = waiting[whole:]
    if waiting:
        yield waiting


def _by_namespace(batch: pa.RecordBatch) -> list[tuple[str, pa.RecordBatch]]:
    """Return the records by namespace; all of them under "" where they have none."""
    if batches.NAMESPACE not in batch.schema.names:
        return [("", batch)] if batch.num_rows else []
    spaces = pc.fill_null(batch.column(batches.NAMESPACE), "").to_pylist()
    order = sorted(range(len(spaces)), key=spaces.__getitem__)
    groups = groupby(order, key=spaces.__getitem__)
    return [(space, batch.take(pa.array(list(rows), pa.int64()))) for space, rows in groups]
