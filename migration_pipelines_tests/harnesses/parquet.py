"""Parquet folders, reached around the connector with pyarrow alone, as any other tool would."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from migration_pipelines.model import CollectionSchema
from migration_pipelines.stores.parquet import ParquetStore
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record, from_batches, to_batch


class Parquet(Harness):
    """A folder of collections."""

    def __init__(self, store: ParquetStore) -> None:
        self.store: ParquetStore = store

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[Parquet]:
        """Keep the collections in `folder`."""
        yield cls(ParquetStore(path=folder))

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Write two files, of small row groups, and the manifest that names them."""
        folder = self.store.path / schema.name
        folder.mkdir()
        middle = len(records) // 2
        files = []
        for name, part in (("a.parquet", records[:middle]), ("b.parquet", records[middle:])):
            pq.write_table(pa.Table.from_batches([to_batch(part, schema)]), folder / name, row_group_size=16)
            size = (folder / name).stat().st_size
            files.append({"name": name, "records": len(part), "bytes": size, "digest": f"{0:032x}"})
        manifest = {
            "format": 1,
            "schema": schema.model_dump(mode="json"),
            "metrics": {"vector": schema.vectors[0].metric},
            "records": len(records),
            "digest": f"{0:032x}",
            "files": files,
        }
        (folder / "_collection.json").write_text(json.dumps(manifest))

    def read(self, collection: str) -> list[Record]:
        """Read every Parquet file that lies in the folder, as who knows nothing of a manifest does."""
        files = sorted((self.store.path / collection).glob("[!.]*.parquet"))
        return from_batches(batch for file in files for batch in pq.ParquetFile(file).iter_batches())


HARNESSES: list[type[Harness]] = [Parquet]
