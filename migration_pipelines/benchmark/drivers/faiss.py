"""faiss and pyarrow: an index read and written as a whole, the records beside it in row groups."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from migration_pipelines.benchmark.data import Page
from migration_pipelines.benchmark.drivers import sync
from migration_pipelines.metadata import dump_all
from migration_pipelines.stores.faiss.build import FLAT_RECORDS

PUBLISHES = True
_PAGE = 8_192


def bare_read(store: Any, collection: str) -> int:
    """Read the index, then its vectors and the row groups of the records, page by page."""
    import faiss

    folder, read = store.path / collection, 0
    manifest = json.loads((folder / "_collection.json").read_text())
    index = faiss.read_index(str(folder / manifest["index"]["name"]))
    with pq.ParquetFile(folder / manifest["records"]["name"], page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group).num_rows
            index.reconstruct_n(read, rows)
            read += rows
    return read


def bare_write(store: Any, collection: str, pages: Iterable[Page]) -> int:
    """Add the vectors to an index, write it and the records, and the manifest that names both.

    The index is flat, or a graph where the store makes one; inverted lists aren't measured.
    """
    import faiss

    folder, written = store.path / collection, 0
    manifest = next(iter(folder.glob("**/_collection.json")))
    found = json.loads(manifest.read_text())
    dimensions, pages = found["schema"]["vectors"][0]["dimensions"], list(pages)
    many = sum(len(page.ids) for page in pages) > FLAT_RECORDS
    is_graph = store.index == "hnsw" or (store.index is None and many)
    index = faiss.IndexHNSWFlat(dimensions, 32) if is_graph else faiss.IndexFlatL2(dimensions)
    columns = pa.schema([(name, pa.string()) for name in _TEXTS])
    with pq.ParquetWriter(folder / "records.parquet", columns, **_OPTIONS) as writer:
        for page in pages:
            index.add(page.vectors)
            rows = len(page.ids)
            metadata = pa.array(dump_all(page.metadatas), pa.string())
            values = [page.ids, ["str"] * rows, page.documents, metadata]
            table = pa.Table.from_arrays([pa.array(column) for column in values], schema=columns)
            writer.write_table(table, row_group_size=_PAGE)
            written += rows
    faiss.write_index(index, str(folder / "index.faiss"))
    for name, file in (("index", "index.faiss"), ("records", "records.parquet")):
        found[name] = {"name": file, "bytes": (folder / file).stat().st_size}
    found.update(count=written, next_number=written)
    (folder / "_collection.json").write_text(json.dumps(found))
    sync(folder / "index.faiss", folder / "records.parquet", folder / "_collection.json", folder)
    shutil.rmtree(folder / ".loading", ignore_errors=True)
    return written


_TEXTS = ("id", "id_type", "document", "metadata")
_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": ["id_type"],
    "write_statistics": ["id"],
    "write_page_checksum": True,
}
