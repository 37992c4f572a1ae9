"""The measurements. Each runs in a process of its own; reader and writer are the drivers and nothing else."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from migration_pipelines.benchmark import COLLECTION, Rate, Setup, Transfer
from migration_pipelines.benchmark.data import Page, pages
from migration_pipelines.postgres import URL

_READER_PAGE = 250  # the fastest that was found: smaller and larger ones are slower
_GUIDES_PAGE = 1_000
COPY_RECORDS = 2_000
_SAMPLE_SECONDS = 0.02
_COLUMNS = "id text PRIMARY KEY, vector vector({}), document text, metadata jsonb"


def prepare(setup: Setup) -> None:
    """Write the records into a Chroma folder."""
    settings = {"hnsw": {"space": "l2"}}
    collection = _client(setup).create_collection(COLLECTION, configuration=settings, embedding_function=None)
    for page in pages(setup.records, setup.dimensions):
        collection.add(
            ids=page.ids, embeddings=page.vectors, documents=page.documents, metadatas=page.metadatas
        )


def reader(setup: Setup) -> Rate:
    """One thread reads every record by Chroma's client in the fastest way there is, and does nothing else."""
    collection = _collection(setup)
    ids = collection.get(include=[])["ids"]
    _read(collection, ids[:10])  # loads the index
    started = time.perf_counter()
    for at in range(0, len(ids), _READER_PAGE):
        _read(collection, ids[at : at + _READER_PAGE])
    return Rate(records=len(ids), seconds=time.perf_counter() - started)


def _read(collection: Any, ids: list[str]) -> None:
    page = collection.get(ids=ids, include=["documents", "metadatas", "embeddings"])
    np.asarray(page["embeddings"]).astype(np.float32)


def writer(setup: Setup) -> Rate:
    """One connection writes rows that were packed before by COPY BINARY, and does nothing else."""
    with _table(setup, "writer") as (connection, table):
        streams = [
            packed(page, at) for page in pages(setup.records, setup.dimensions) for at in _starts(page)
        ]
        started = time.perf_counter()
        for stream in streams:
            with connection.cursor().copy(f"COPY {table} FROM STDIN (FORMAT BINARY)") as copy:
                copy.write(stream)
            connection.commit()
        return Rate(records=setup.records, seconds=time.perf_counter() - started)


def _starts(page: Page) -> range:
    return range(0, len(page.ids), COPY_RECORDS)


def packed(page: Page, start: int) -> bytes:
    """Return the COPY BINARY stream of some records (PostgreSQL's manual, COPY, "Binary Format")."""
    rows = range(start, min(start + COPY_RECORDS, len(page.ids)))
    head = page.vectors.shape[1].to_bytes(2, "big") + bytes(2)
    values = (
        (
            page.ids[row].encode(),
            head + page.vectors[row].astype(">f4").tobytes(),
            page.documents[row].encode(),
            b"\x01" + orjson.dumps(page.metadatas[row]),
        )
        for row in rows
    )
    fields = (b"".join(len(v).to_bytes(4, "big") + v for v in row) for row in values)
    return b"PGCOPY\n\xff\r\n\0" + bytes(8) + b"".join(b"\0\4" + row for row in fields) + b"\xff\xff"


def guides(setup: Setup) -> Rate:
    """Do what guides do: pages by offset, an INSERT for each record, a commit for each page.

    Only some pages of the whole, evenly spread: a page takes the longer the farther its offset.
    """
    collection = _collection(setup)
    n_pages = max(1, min(setup.guides_records, setup.records) // _GUIDES_PAGE)
    written = 0
    with _table(setup, "guides") as (connection, table):
        statement = f"INSERT INTO {table} VALUES (%s, %s, %s, %s)"  # noqa: S608 - a name of our own
        started = time.perf_counter()
        for number in range(n_pages):
            page = collection.get(
                limit=_GUIDES_PAGE,
                offset=number * setup.records // n_pages,
                include=["documents", "metadatas", "embeddings"],
            )
            rows = zip(page["ids"], page["embeddings"], page["documents"], page["metadatas"], strict=True)
            with connection.cursor() as cursor:
                for record_id, vector, document, metadata in rows:
                    text = orjson.dumps(metadata).decode()
                    cursor.execute(statement, (record_id, str(vector.tolist()), document, text))
            connection.commit()
            written += len(page["ids"])
        return Rate(records=written, seconds=time.perf_counter() - started)


def transfer(setup: Setup) -> Transfer:
    """Move and prove everything through the engine, with the settings that it has by default."""
    from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
    from migration_pipelines.migrator import run_migration
    from migration_pipelines.plan import make_plan
    from migration_pipelines.stores.pgvector import PgVectorStore

    target = PgVectorStore.from_url(os.environ[URL])
    config = MigrationConfig(
        source=f"chroma:{setup.folder}#{COLLECTION}",
        target=target.address(f"{setup.prefix}_transfer"),
        name=setup.prefix,
    )
    moments: dict[str, float] = {}
    migration = Migration(
        config=config,
        ledger=ledger_for(config, Path(setup.home)),
        listener=lambda event: moments.update({event.name: time.perf_counter()}),
        target_store=target,
    )
    _open_both(migration)
    with _memory() as memory:
        began = time.perf_counter()
        with migration.ledger.lease():
            make_plan(migration)
        planned = time.perf_counter()
        report = run_migration(migration)
        ended = time.perf_counter()
    if report.status != "complete":
        raise SystemExit(f"the transfer is {report.status}: {report.errors or report.checks}")
    return Transfer(
        records=report.records["read"],
        seconds=moments["verified"] - planned,
        plan_seconds=planned - began,
        index_seconds=moments["published"] - moments["verified"],
        total_seconds=ended - began,
        verified=report.records["verified"],
        **memory,
    )


def _open_both(migration: Any) -> None:
    """Open both stores as far as reading a page of the source and asking the target opens them."""
    from migration_pipelines.inspect import take_sample

    take_sample(migration.source, migration.source_collection)
    migration.target.list_collections()


@contextmanager
def _memory() -> Iterator[dict[str, int]]:
    """Yield a dict that holds, afterwards, the memory at the beginning and the most there was."""
    opened, opened_anonymous = _resident()
    found = {"opened": opened, "anonymous_opened": opened_anonymous, "peak": 0, "anonymous_peak": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            resident, anonymous = _resident()
            found["peak"] = max(found["peak"], resident)
            found["anonymous_peak"] = max(found["anonymous_peak"], anonymous)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _resident() -> tuple[int, int]:
    """Return resident and anonymous memory of this process in bytes; zeros where the system has no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return 0, 0
    found = {name: text for name, _, text in (line.partition(":") for line in lines)}
    return tuple(int(found[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def clean_up(setup: Setup) -> None:
    """Drop the tables that this run wrote."""
    with _connect() as connection:
        for name in ("writer", "guides", "transfer"):
            connection.execute(f"DROP TABLE IF EXISTS {setup.prefix}_{name}")


def _client(setup: Setup) -> Any:
    import chromadb
    from chromadb.config import Settings

    return chromadb.PersistentClient(setup.folder, Settings(anonymized_telemetry=False))


def _collection(setup: Setup) -> Any:
    return _client(setup).get_collection(COLLECTION, embedding_function=None)


def _connect() -> Any:
    import psycopg

    return psycopg.connect(os.environ[URL])


@contextmanager
def _table(setup: Setup, name: str) -> Iterator[tuple[Any, str]]:
    with _connect() as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        connection.execute(f"CREATE TABLE {setup.prefix}_{name} ({_COLUMNS.format(setup.dimensions)})")
        connection.commit()
        yield connection, f"{setup.prefix}_{name}"


MEASURES: Mapping[str, Callable[[Setup], Rate | None]] = {
    "prepare": prepare,
    "reader": reader,
    "writer": writer,
    "guides": guides,
    "transfer": transfer,
    "clean_up": clean_up,
}
