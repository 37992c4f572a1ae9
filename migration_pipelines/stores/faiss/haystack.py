"""Haystack 1's sidecar of a FAISS index: a JSON file of settings, and a SQLite database of documents.

`FAISSDocumentStore.save("docs.faiss")` writes the index and `docs.json`, the arguments that the store was
made with; `sql_url` in it names the database. A document's `vector_id` is its position in the index, its
metadata a row for each field in a table of its own.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.model import Metric
from migration_pipelines.stores.faiss.sidecar import Row

SUFFIX = ".json"

_SETTINGS = frozenset({"sql_url", "faiss_index_factory_str", "vector_dim", "embedding_dim", "similarity"})
# The defaults of Haystack, which some versions leave out of the file.
_URL, _INDEX, _SIMILARITY = "sqlite:///faiss_document_store.db", "document", "dot_product"
_METRICS = {"dot_product": Metric.DOT, "cosine": Metric.COSINE, "l2": Metric.EUCLIDEAN}
# What lies beside a database as long as it isn't whole by itself.
_JOURNALS = ("-wal", "-journal")


def settings(path: Path) -> Mapping[str, Any] | None:
    """Return the settings in a file, None where it is no file of Haystack's."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and not _SETTINGS.isdisjoint(found) else None


def metric(path: Path) -> Metric | None:
    """Return what the vectors are searched by: cosine, too, which no index can tell."""
    return _METRICS.get(str((settings(path) or {}).get("similarity") or _SIMILARITY))


def database(path: Path) -> Path:
    """Return the database that the settings name, beside them where its own folder isn't there any more.

    Raises
    ------
    StoreRefusedError
    """
    url = str((settings(path) or {}).get("sql_url") or _URL)
    scheme, _, name = url.partition(":///")
    if scheme != "sqlite" or not name:
        raise StoreRefusedError(
            f"{path}: the documents are in another database than a SQLite file; export them beside the index "
            "as JSON lines",
            found=scheme,
        )
    candidates = [path.parent / name, path.parent / Path(name).name]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise StoreRefusedError(
            f"{path} names the database {name!r}, which isn't there: put it beside the index, or say "
            "?sidecar=none to move the vectors without their documents",
            found=name,
        )
    for suffix in _JOURNALS:
        journal = found.with_name(found.name + suffix)
        if journal.exists() and journal.stat().st_size:
            raise StoreRefusedError(
                f"{journal} is there, so {found.name} isn't whole by itself: close what has it open",
                found=str(journal),
            )
    return found


def read(path: Path, count: int) -> Iterator[Row]:
    """Yield the records of an index of `count` vectors.

    Raises
    ------
    StoreRefusedError
        The database can't be read, or doesn't fit the index.
    """
    name = str((settings(path) or {}).get("index") or _INDEX)
    file = database(path)
    try:
        # Immutable: SQLite then neither locks nor writes, on a read-only path too.
        with closing(
            sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        ) as connection:
            yield from _rows(connection, name, path, count)
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise StoreRefusedError(
            f"{file} can't be read as a database of Haystack's: {error}", file=str(file)
        ) from error


def _rows(connection: sqlite3.Connection, name: str, path: Path, count: int) -> Iterator[Row]:
    documents = connection.execute(
        'SELECT id, content, content_type, vector_id FROM document WHERE "index" = ?', [name]
    ).fetchall()
    placed = {int(row[3]): row for row in documents if row[3] is not None}
    if len(documents) != count or set(placed) != set(range(count)):
        raise StoreRefusedError(
            f"{path}: its index holds {count:,} vectors, the database {len(documents):,} documents in "
            f"{name!r}, {len(placed):,} of them with a vector: run `update_embeddings` and save again",
            expected=count,
            found=len(placed),
        )
    is_json = _type_of(connection, "document", "content") == "JSON"
    metadata = _metadata(connection, name)
    for position in range(count):
        key, content, kind, _ = placed[position]
        text = json.loads(content) if is_json and content is not None else content
        if not isinstance(text, (str, type(None))):
            raise StoreRefusedError(f"{path}: the document {key!r} is a {kind}, and only texts can be moved")
        yield Row(label=position, id=key, document=text, metadata=metadata.get(key, {}))


def _metadata(connection: sqlite3.Connection, name: str) -> dict[str, dict[str, Any]]:
    """Return the metadata by document. Older versions write values as they are, newer ones as JSON."""
    columns = {row[1] for row in connection.execute("PRAGMA table_info(meta_document)")}
    where, values = ("WHERE document_index = ?", [name]) if "document_index" in columns else ("", [])
    select = "SELECT document_id, name, value FROM meta_document"
    fields = connection.execute(f"{select} {where}", values).fetchall()
    is_json = all(value is None or _is_json(value) for _, _, value in fields)
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, field, value in fields:
        found[key][field] = json.loads(value) if is_json and value is not None else value
    return found


def _is_json(text: Any) -> bool:
    try:
        json.loads(text)
    except (ValueError, TypeError):
        return False
    return True


def _type_of(connection: sqlite3.Connection, table: str, column: str) -> str:
    rows = connection.execute(f"PRAGMA table_info({table})")
    return next((str(row[2]).upper() for row in rows if row[1] == column), "")
