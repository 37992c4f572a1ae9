"""pyarrow: one file with the store's compression, whose row groups are written and read one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from migration_pipelines.benchmark.data import Page
from migration_pipelines.benchmark.drivers import sync
from migration_pipelines.metadata import dump_all

PUBLISHES = True


def bare_read(store: Any, collection: str) -> int:
    """Read every row group of every file, its vectors as float32."""
    read = 0
    for path in sorted((store.path / collection).glob("[!.]*.parquet")):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group).combine_chunks()
                np.asarray(table.column("vector").chunk(0).flatten())
                read += table.num_rows
    return read


def bare_write(store: Any, collection: str, pages: Iterable[Page]) -> int:
    """Write a file of a row group a page, and put a manifest that names it in the place of the empty one."""
    folder, written, writer = store.path / collection, 0, None
    path = folder / "bare.parquet"
    for page in pages:
        flat = pa.array(page.vectors.reshape(-1))
        columns = {
            "id": pa.array(page.ids),
            "id_type": pa.array(["str"] * len(page.ids)),
            "vector": pa.FixedSizeListArray.from_arrays(flat, page.vectors.shape[1]),
            "document": pa.array(page.documents),
            "metadata": pa.array(dump_all(page.metadatas), pa.string()),
        }
        table = pa.table(columns)
        writer = writer or _writer(path, table.schema)
        writer.write_table(table, row_group_size=table.num_rows)
        written += table.num_rows
    if writer is not None:
        writer.close()
        _publish(folder, path.name, written, path.stat().st_size)
    return written


def _writer(path: Any, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=["id_type"],
        use_byte_stream_split=["vector.list.element"],
        write_statistics=["id"],
        write_page_checksum=True,
    )


def _publish(folder: Any, name: str, records: int, size: int) -> None:
    manifest = next(iter(folder.glob("**/_collection.json")))
    file = {"name": name, "records": records, "bytes": size, "digest": f"{0:032x}"}
    found = {**json.loads(manifest.read_text()), "records": records, "files": [file]}
    (folder / "_collection.json").write_text(json.dumps(found))
    sync(folder / name, folder / "_collection.json", folder)
