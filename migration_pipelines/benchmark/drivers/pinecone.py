"""pinecone's client: ids by listing, then `fetch` of 500 at a time; upserts as large as the service takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from migration_pipelines.benchmark.data import Page

_IDS = 500  # of the data's 16 characters: more would make URLs that proxies refuse
_REQUEST_BYTES = 2_000_000
_NUMBER_BYTES, _REST_BYTES = 22, 1_000  # of a record as JSON, whose numbers the client writes as doubles


def bare_read(store: Any, collection: str) -> int:
    """Read every record in pages by id."""
    read = 0
    with _index(store, collection) as index:
        ids = [item.id for page in index.list() for item in page.vectors]
        for at in range(0, len(ids), _IDS):
            read += len(index.fetch(ids=ids[at : at + _IDS]).vectors)
    return read


def bare_write(store: Any, collection: str, pages: Iterable[Page]) -> int:
    """Upsert the records in requests that stay below 2 MB."""
    written = 0
    with _index(store, collection) as index:
        for page in pages:
            step = _REQUEST_BYTES // (page.vectors.shape[1] * _NUMBER_BYTES + _REST_BYTES)
            for at in range(0, len(page.ids), step):
                part = slice(at, at + step)
                columns = (
                    page.ids[part],
                    page.vectors[part].tolist(),
                    page.documents[part],
                    page.metadatas[part],
                )
                vectors = [
                    {"id": key, "values": values, "metadata": {**fields, "document": text}}
                    for key, values, text, fields in zip(*columns, strict=True)
                ]
                written += index.upsert(vectors=vectors).upserted_count
    return written


@contextmanager
def _index(store: Any, collection: str) -> Iterator[Any]:
    from pinecone import Pinecone

    client = Pinecone(api_key=store.api_key.get_secret_value(), host=store.host)
    with client.index(name=collection) as index:
        yield index
    client.close()
