"""Records from beside an index of another tool: rows that name a vector by FAISS's id of it, and tables."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from migration_pipelines import batch as batches
from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.metadata import dump_all, load_json, load_metadata

JSON_LINES, PARQUET = ".jsonl", ".parquet"
DOCUMENT_KEYS = ("document", "text", "page_content", "content")
METADATA_KEYS = ("metadata", "meta")
LABEL = "label"


class Row(NamedTuple):
    """One record of a sidecar. `label` is FAISS's id of its vector, None where that is the row's number."""

    label: int | None
    id: Any
    document: str | None
    metadata: Mapping[str, Any] | None


def to_batch(
    rows: Iterable[Row], labels: npt.NDArray[np.int64] | None, count: int, path: Path
) -> pa.RecordBatch:
    """Return the records in the order of the index's vectors.

    Parameters
    ----------
    labels
        int64[count], FAISS's ids in the order of the vectors; None where they are 0, 1, 2, …
    path
        The sidecar, for messages.

    Raises
    ------
    StoreRefusedError
        Records and vectors don't match one to one.
    """
    found = list(rows)
    order = _order(found, labels, count, path)
    if order is not None:
        found = [found[row] for row in order]
    for row in found:
        if type(row.id) not in (int, str, uuid.UUID):
            raise StoreRefusedError(f"{path}: the id {row.id!r} is neither text nor a whole number")
    ids, kinds = batches.id_columns([row.id for row in found])
    try:
        metadata = dump_all([row.metadata for row in found])
    except (TypeError, ValueError) as error:
        raise StoreRefusedError(f"{path}: some metadata holds what no JSON can: {error}") from error
    return pa.RecordBatch.from_arrays(
        [
            ids,
            kinds,
            pa.array([row.document for row in found], pa.string()),
            pa.array(metadata, pa.binary()).cast(pa.string()),
        ],
        names=[batches.ID, batches.ID_TYPE, batches.DOCUMENT, batches.METADATA],
    )


def bare(labels: npt.NDArray[np.int64] | None, count: int) -> pa.RecordBatch:
    """Return the records of an index that has nothing beside it: FAISS's ids alone."""
    numbers = pa.array(np.arange(count) if labels is None else labels, pa.int64())
    nothing = pa.nulls(count, pa.string())
    return pa.RecordBatch.from_arrays(
        [numbers.cast(pa.string()), batches.constant("int", count), nothing, nothing],
        names=[batches.ID, batches.ID_TYPE, batches.DOCUMENT, batches.METADATA],
    )


def _order(
    rows: list[Row], labels: npt.NDArray[np.int64] | None, count: int, path: Path
) -> npt.NDArray[np.int64] | None:
    """Return int64[count], the row of each vector; None where it is the same number."""
    if len(rows) != count:
        raise StoreRefusedError(
            f"{path} holds {len(rows):,} records, its index {count:,} vectors: they weren't written "
            "together; restore the one that is older, or say ?sidecar=none to move the vectors alone",
            expected=count,
            found=len(rows),
        )
    if all(row.label is None for row in rows):
        return None  # one after the other, as the vectors are
    named = np.array([-1 if row.label is None else row.label for row in rows], np.int64)
    wanted = np.arange(count) if labels is None else labels
    by_name = np.argsort(named, kind="stable")
    at = np.searchsorted(named, wanted, sorter=by_name).clip(max=max(0, count - 1))
    order: npt.NDArray[np.int64] = by_name[at]
    strays = int((named[order] != wanted).sum()) if count else 0
    if strays or len(np.unique(named)) != count:
        raise StoreRefusedError(
            f"{path}: {strays:,} of {count:,} vectors have no record under FAISS's id of them, "
            f"{count - len(np.unique(named)):,} records share one",
            expected=count,
            found=count - strays,
        )
    return order


def read_json_lines(path: Path) -> Iterator[Row]:
    """Yield the record of each line: `id`, a text, `metadata`; any other key is metadata too."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                try:
                    fields = load_json(line.decode())
                except (ValueError, orjson.JSONDecodeError) as error:
                    raise StoreRefusedError(f"{path}, line {number + 1}: no JSON ({error})") from error
                yield _row(fields, number, f"{path}, line {number + 1}")


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the record of each row of a Parquet file: the columns are what the keys of JSON lines are."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(4096):
                for fields in batch.to_pylist():
                    yield _row(fields, number, f"{path}, row {number + 1}")
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise StoreRefusedError(f"{path} can't be read: {error}; restore it", file=str(path)) from error


def _row(fields: Any, number: int, where: str) -> Row:
    if not isinstance(fields, dict):
        raise StoreRefusedError(f"{where}: expected an object, found {type(fields).__name__}")
    left = {key: value for key, value in fields.items() if key != batches.ID_TYPE}
    label = left.pop(LABEL, None)
    name = left.pop(batches.ID, number if label is None else label)
    if fields.get(batches.ID_TYPE) is not None:
        name = batches.typed_id(str(name), str(fields[batches.ID_TYPE]))
    document = left.pop(next((key for key in DOCUMENT_KEYS if key in left), ""), None)
    metadata_key = next((key for key in METADATA_KEYS if key in left), None)
    metadata = left.pop(metadata_key) if metadata_key else None
    if isinstance(metadata, str) and metadata.startswith("{"):
        metadata = load_metadata(metadata)
    if not isinstance(metadata, (dict, type(None))) or not isinstance(document, (str, type(None))):
        raise StoreRefusedError(f"{where}: expected a text and an object of metadata beside the id")
    both = sorted((metadata or {}).keys() & left.keys())
    if both or not isinstance(label, (int, type(None))):
        raise StoreRefusedError(f"{where}: {both or label!r} is there twice, or is no id of FAISS's")
    return Row(label, name, document, {**(metadata or {}), **left} if left else metadata)
