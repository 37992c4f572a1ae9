"""Memory, reached around the connector in its own tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from migration_pipelines import batch as batches
from migration_pipelines.model import CollectionSchema
from migration_pipelines.stores import memory
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record, from_batches, to_batch


class Memory(Harness):
    """A named set of collections in this process."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self._database = memory._DATABASES.setdefault(store.name, memory._Database())

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[Memory]:
        """Take a set of collections that nobody else has."""
        store = MemoryStore(name=f"harness-{folder.name}")
        yield cls(store)
        memory._DATABASES.pop(store.name, None)

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Put the rows into the table."""
        rows = [to_batch([record], schema) for record in records]
        named = {batches.id_keys(row)[0].as_py(): row for row in rows}
        self._database.collections[schema.name] = memory._Collection(schema, named)

    def read(self, collection: str) -> list[Record]:
        """Take the rows out of the table."""
        return from_batches(self._database.collections[collection].rows.values())


HARNESSES: list[type[Harness]] = [Memory]
