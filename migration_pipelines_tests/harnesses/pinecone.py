"""Pinecone, reached around the connector: written by the vendor's client, read by plain HTTP.

The vendor's client reads a -0 as 0 and asks for ids with a space by a plus sign: it can't be the judge.

It is the stand-in, unless `PINECONE_TEST_REAL=1` and `PINECONE_API_KEY` say to use the service itself: then
the indexes that the tests make are removed afterwards.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

import numpy as np
from pinecone import Pinecone
from pydantic import SecretStr

from migration_pipelines.model import CollectionSchema, Metric
from migration_pipelines.stores.pinecone import PineconeStore
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record
from migration_pipelines_tests.standins.pinecone import KEY, PineconeStandin

_METRICS = {Metric.EUCLIDEAN: "euclidean", Metric.COSINE: "cosine", Metric.DOT: "dotproduct", None: "cosine"}
_PAGE, _IDS_A_REQUEST = 100, 20
_VISIBLE_WITHIN_SECONDS = 120.0
_USED_LIMIT = "more than the 40 KB of metadata a record that the service takes"


class PineconeHarness(Harness):
    """The service or its stand-in."""

    store: PineconeStore
    holds_zero_vectors: ClassVar[bool] = False

    def __init__(self, store: PineconeStore, client: Pinecone, standin: PineconeStandin | None) -> None:
        self.store = store
        self.client = client
        self.standin = standin

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[PineconeHarness]:
        """Start a stand-in, or find the service."""
        if os.environ.get("PINECONE_TEST_REAL") == "1":
            yield from _real(cls, os.environ["PINECONE_API_KEY"])
            return
        standin = PineconeStandin()
        with standin.serving():
            store = PineconeStore(api_key=SecretStr(KEY), host=standin.host, freshness_seconds=5)
            client = Pinecone(api_key=KEY, host=standin.host)
            yield cls(store, client, standin)
            store.close()
            client.close()

    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Create the index natively and put the records into it."""
        vector = schema.vectors[0]
        self.client.indexes.create(
            name=schema.name, dimension=vector.dimensions, metric=_METRICS[vector.metric]
        )
        index = self.client.index(name=schema.name)
        for start in range(0, len(records), _PAGE):
            part = [_native(record) for record in records[start : start + _PAGE]]
            index.upsert(vectors=part)
        _wait_for(index, len(records))
        index.close()

    def read(self, collection: str) -> list[Record]:
        """Read every record natively."""
        host = self.client.indexes.describe(collection).host
        assert host is not None
        index = self.client.index(host=host)
        found: list[Record] = []
        for name in index.describe_index_stats().namespaces:
            for page in index.list(namespace=name):
                asked = [("namespace", name), *(("ids", str(item.id)) for item in page.vectors)]
                for start in range(0, len(asked) - 1, _IDS_A_REQUEST):
                    ids = asked[1 + start : 1 + start + _IDS_A_REQUEST]
                    vectors = self._get(f"{host}/vectors/fetch", [asked[0], *ids])["vectors"]
                    found += [_record(vectors[text], name) for _, text in ids]
        index.close()
        return found

    def _get(self, url: str, query: Sequence[tuple[str, str]]) -> Any:
        assert self.store.api_key is not None
        headers = {"Api-Key": self.store.api_key.get_secret_value(), "X-Pinecone-Api-Version": "2026-07"}
        asked = Request(f"{url}?{urlencode(query, quote_via=quote, safe='')}", headers=headers)
        with urlopen(asked, timeout=30) as answer:
            return json.load(answer, parse_int=lambda digits: -0.0 if digits == "-0" else int(digits))

    def known_gaps(self) -> Mapping[str, str]:
        """The one thing that the service can't hold."""
        return {"test_awkward_documents_come_back_exactly": _USED_LIMIT}


def _native(record: Record) -> dict[str, Any]:
    metadata = dict(record.metadata or {})
    floats = [key for key, value in metadata.items() if type(value) is float and value.is_integer()]
    if floats:
        metadata["_floats"] = floats
    if record.document is not None:
        metadata["document"] = record.document
    return {"id": record.id, "values": record.vectors[""].tolist(), "metadata": metadata}


def _record(vector: dict[str, Any], namespace: str) -> Record:
    metadata = vector.get("metadata", {})
    document = metadata.pop("document", None)
    floats = metadata.pop("_floats", [])
    for key, value in metadata.items():
        if type(value) in (int, float) and float(value).is_integer():
            metadata[key] = float(value) if key in floats else int(value)
    vectors = {"": np.asarray(vector["values"], np.float32)}
    return Record(
        id=vector["id"],
        vectors=vectors,
        document=document,
        metadata=metadata or None,
        namespace=None if namespace in ("", "__default__") else namespace,
    )


def _wait_for(index: Any, count: int) -> None:
    until = time.monotonic() + _VISIBLE_WITHIN_SECONDS
    while index.describe_index_stats().total_vector_count != count:
        if time.monotonic() > until:
            raise RuntimeError(f"not all of {count} records became visible")
        time.sleep(1)


def _real(harness: type[PineconeHarness], key: str) -> Iterator[PineconeHarness]:
    client = Pinecone(api_key=key)
    before = {index.name for index in client.indexes.list()}
    store = PineconeStore(api_key=SecretStr(key))
    try:
        yield harness(store, client, None)
    finally:
        for index in client.indexes.list():
            if index.name not in before and re.fullmatch(r"c\d{5}", index.name):
                client.indexes.delete(index.name)
        store.close()
        client.close()


HARNESSES: list[type[Harness]] = [PineconeHarness]
