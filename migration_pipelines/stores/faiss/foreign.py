"""Index files of other tools: finding them, and what stands beside them. They are read and never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import ConfigurationError, StoreRefusedError
from migration_pipelines.model import APPROXIMATE, CollectionSchema, DType, IdKind, Metric, VectorField
from migration_pipelines.stores.faiss import haystack, langchain, sidecar
from migration_pipelines.stores.faiss.index import METRICS, IndexFile, open_index
from migration_pipelines.stores.faiss.opened import Opened
from migration_pipelines.stores.faiss.table import MemoryTable

SUFFIXES = (".faiss", ".index")
NO_SIDECAR = "none"
# LangChain's own name for an index, which is never without its pickle.
_LANGCHAIN_INDEX = "index.faiss"
_LAYOUTS = {
    langchain.SUFFIX: "langchain",
    haystack.SUFFIX: "haystack",
    sidecar.JSON_LINES: "json-lines",
    sidecar.PARQUET: "parquet",
}


@dataclass(frozen=True)
class ForeignIndex:
    """An index file, and the file of its records.

    Parameters
    ----------
    asked
        The sidecar that the user names, `none` for none; None to look for it by the index's name.
    is_named
        The user names the index file itself, and not the folder that it is in.
    """

    path: Path
    asked: str | None = None
    is_named: bool = False

    def files(self) -> list[Path]:
        """Return all files that the collection consists of."""
        beside = self.sidecar()
        found = [self.path, *([beside] if beside else [])]
        if beside is not None and beside.suffix == haystack.SUFFIX:
            found.append(haystack.database(beside))
        return found

    def sidecar(self) -> Path | None:
        """Return the file of the records, None where there are none but FAISS's ids.

        Raises
        ------
        ConfigurationError
            The sidecar that the user names isn't there, or several are.
        StoreRefusedError
            LangChain's index lacks its pickle.
        """
        if self.asked == NO_SIDECAR:
            return None
        if self.asked is not None:
            path = self.path.parent / self.asked
            if not path.is_file() or path.suffix not in _LAYOUTS:
                raise ConfigurationError(
                    f"faiss: the sidecar {path} isn't there, or isn't one of {', '.join(_LAYOUTS)}"
                )
            return path
        beside = [self.path.with_suffix(suffix) for suffix in _LAYOUTS]
        found = [path for path in beside if path.is_file() and _is_sidecar(path)]
        if len(found) > 1:
            raise ConfigurationError(
                f"{self.path} has {' and '.join(path.name for path in found)} beside it: name the one that "
                "holds its records with ?sidecar=",
                found=[path.name for path in found],
            )
        if not found and self.path.name == _LANGCHAIN_INDEX and not self.is_named:
            raise StoreRefusedError(
                f"{self.path.with_suffix(langchain.SUFFIX)} is missing: without it the vectors have no "
                "documents and no ids; restore it, or say ?sidecar=none to move the vectors alone",
                file=str(self.path.with_suffix(langchain.SUFFIX)),
            )
        return found[0] if found else None

    def open(self, collection: str) -> Opened:
        """Return the collection, opened for reading."""
        index = open_index(self.path)
        beside = self.sidecar()
        if beside is None:
            batch = sidecar.bare(index.labels, index.count)
        else:
            rows = {
                langchain.SUFFIX: lambda: langchain.read(beside, index.count),
                haystack.SUFFIX: lambda: haystack.read(beside, index.count),
                sidecar.JSON_LINES: lambda: sidecar.read_json_lines(beside),
                sidecar.PARQUET: lambda: sidecar.read_parquet(beside),
            }[beside.suffix]()
            batch = sidecar.to_batch(rows, index.labels, index.count, beside)
        schema = _schema(collection, index, beside, batch)
        return Opened(schema=schema, records=MemoryTable(batch), index=index)


def _is_sidecar(path: Path) -> bool:
    return path.suffix != haystack.SUFFIX or haystack.settings(path) is not None


def _schema(
    collection: str, index: IndexFile, beside: Path | None, batch: pa.RecordBatch
) -> CollectionSchema:
    options: dict[str, Any] = {"layout": _LAYOUTS[beside.suffix] if beside else "bare"}
    if index.decoded:
        options[APPROXIMATE] = index.decoded
    if index.dtype is not DType.BIT and index.metric not in METRICS:
        options["faiss_metric"] = index.metric
    kinds = frozenset(IdKind(kind) for kind in batch.column(batches.ID_TYPE).unique().to_pylist())
    return CollectionSchema(
        name=collection,
        vectors=(
            VectorField(
                dimensions=index.dimensions,
                metric=_metric(index, beside),
                dtype=index.dtype,
                index=index.index,
            ),
        ),
        id_kinds=kinds or frozenset({IdKind.STR}),
        has_documents=beside is not None,
        options=options,
    )


def _metric(index: IndexFile, beside: Path | None) -> Metric | None:
    if index.dtype is DType.BIT:
        return Metric.HAMMING
    if beside is not None and beside.suffix == haystack.SUFFIX:
        return haystack.metric(beside)
    return METRICS.get(index.metric)


def find_indexes(folder: Path) -> Mapping[str, Path]:
    """Return the index files of a folder by the names of their collections: `docs` for `docs.faiss`.

    Of a file with another ending, the name is that of the file.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {path.stem if path.suffix == SUFFIXES[0] else path.name: path for path in paths}
