"""The data plane of one index: its namespaces, ids and records, a request at a time.

What is asked goes through the vendor's HTTP client, which knows host, key, versions and errors. Records are
encoded and decoded here: the vendor's models make a Python object of every number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from migration_pipelines.errors import TransientError
from migration_pipelines.model import CollectionSchema, VectorKind
from migration_pipelines.stores.pinecone.client import blaming_a_record
from migration_pipelines.stores.pinecone.records import Encoded, body_of, requests

DEFAULT_NAMESPACE = "__default__"  # how the service shows the one that requests call ""
# Limits that the service documents for one request.
MAX_RECORDS = 1_000
MAX_BYTES = 2_000_000
_IDS_A_PAGE = 100
_NAMESPACES_A_PAGE = 100
# No URL limit is documented; what the usual proxies let through at least. Ids are asked for in the URL.
_URL_BYTES = 8_000
# Of an answer, by an estimate: 12 digits a number and some text. None is documented for a fetch.
_ANSWER_BYTES = 4_000_000
_DIGITS, _TEXT_BYTES = 12, 2_000


@dataclass(frozen=True)
class Plane:
    """One index and the client that reaches it.

    Parameters
    ----------
    index
        pinecone's `Index`, with retries switched off.
    schema
        What the index is made of; `has_namespaces` as it was when it was opened.
    pace
        Called before each request with the bytes that it sends.
    where
        The collection's address, for messages.
    """

    index: Any
    schema: CollectionSchema
    pace: Callable[[int], None]
    where: str

    @property
    def _http(self) -> Any:
        return self.index._http  # noqa: SLF001

    # ── namespaces and ids ───────────────────────────────────────────────────────────────────────────

    def counts(self) -> dict[str, int]:
        """Return how many records each namespace holds, as the service last counted."""
        self.pace(0)
        found = self.index.describe_index_stats().namespaces
        return {normal(name): summary.vector_count for name, summary in found.items()}

    def namespaces(self) -> list[str]:
        """Return the names of all namespaces, sorted: both listings together, as either may lag."""
        names, token = set(self.counts()), None
        while True:
            self.pace(0)
            asked: dict[str, Any] = {"limit": _NAMESPACES_A_PAGE, "pagination_token": token}
            # A simulator may know nothing of this listing.
            page = self._or_nothing(self.index.list_namespaces_paginated, words="", **asked)
            if page is None:
                return sorted(names)
            names.update(normal(item.name) for item in page.namespaces)
            token = page.pagination.next if page.pagination else None
            if not token:
                return sorted(names)

    def ids(self, namespace: str) -> Iterator[str]:
        """Yield every id of a namespace, in the order of their characters."""
        token = None
        while True:
            self.pace(0)
            asked: dict[str, Any] = {"namespace": namespace, "limit": _IDS_A_PAGE, "pagination_token": token}
            page = self._or_nothing(self.index.list_paginated, **asked)
            if page is None:
                return
            yield from (item.id for item in page.vectors)
            token = page.pagination.next if page.pagination else None
            if not token:
                return

    def checked_ids(self, namespace: str) -> Iterator[str]:
        """Yield every id of a namespace.

        Raises
        ------
        TransientError
            They are fewer than the service counts.
        """
        expected, found = self.counts().get(namespace, 0), 0
        for text in self.ids(namespace):
            found += 1
            yield text
        if found < expected:
            raise TransientError(
                f"{self.where}: namespace {namespace!r}: {found} ids were listed where {expected} records "
                "are counted; the listing was cut, or records were deleted meanwhile: try again",
                expected=expected,
                found=found,
            )

    # ── records ──────────────────────────────────────────────────────────────────────────────────────

    def pages(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Yield ids in lists that one request can ask for."""
        numbers = sum(field.dimensions or 0 for field in self.schema.vectors)
        most = min(MAX_RECORDS, max(1, _ANSWER_BYTES // (_DIGITS * numbers + _TEXT_BYTES)))
        page: list[str] = []
        size = 0
        for text in texts:
            length = len("&ids=") + len(quote(text, safe=""))
            if page and (len(page) >= most or size + length > _URL_BYTES):
                yield page
                page, size = [], 0
            page.append(text)
            size += length
        if page:
            yield page

    def fetch(self, namespace: str, texts: Sequence[str]) -> bytes:
        """Return the answer that holds the records of one page of ids."""
        asked = [("ids", text) for text in texts]
        if namespace:
            asked.append(("namespace", namespace))
        # The service takes a plus sign in a URL for a plus: httpx would write a space so.
        url = f"/vectors/fetch?{urlencode(asked, quote_via=quote, safe='')}"
        self.pace(len(url))
        answer = self._or_nothing(self._http.get, url)
        return b'{"vectors":{}}' if answer is None else bytes(answer.content)

    def upsert(self, records: Sequence[Encoded]) -> dict[str, int | None]:
        """Write records and return, by namespace, the log position of the last write where one is told.

        Raises
        ------
        RecordRejectedError
            The service refuses one of them.
        TransientError
            It doesn't acknowledge all of them.
        """
        marks: dict[str, int | None] = {}
        for part in requests(records, max_records=MAX_RECORDS, max_bytes=MAX_BYTES):
            body = body_of(part)
            self.pace(len(body))
            with blaming_a_record(self.where):
                answer = self._http.post("/vectors/upsert", json=orjson.Fragment(body))
            told = orjson.loads(answer.content)
            acknowledged = told.get("upsertedCount") if isinstance(told, dict) else None
            if acknowledged != len(part):
                raise TransientError(
                    f"{self.where}: Pinecone acknowledged {acknowledged} of {len(part)} records: write again",
                    expected=len(part),
                    found=acknowledged,
                )
            marks[part[0].namespace] = _positions(answer).lsn_committed
        return marks

    def delete(self, namespace: str, texts: Sequence[str]) -> int | None:
        """Remove records and return the log position of the write where one is told."""
        mark = None
        for start in range(0, len(texts), MAX_RECORDS):
            body: dict[str, Any] = {"ids": list(texts[start : start + MAX_RECORDS])}
            if namespace:
                body["namespace"] = namespace
            self.pace(sum(map(len, body["ids"])))
            answer = self._or_nothing(self._http.post, "/vectors/delete", json=body)
            mark = mark if answer is None else _positions(answer).lsn_committed
        return mark

    def query(self, namespace: str, vector: Sequence[float], *, limit: int, sparse: bool) -> Any:
        """Return the answer to a search for the nearest records, without their values."""
        self.pace(0)
        asked = {"sparse_vector": vector} if sparse else {"vector": vector}
        return self.index.query(top_k=limit, namespace=namespace, **asked)

    def searched_position(self, namespace: str) -> int | None:
        """Return the log position up to which searches see a namespace; None where it isn't told."""
        field = self.schema.vectors[0]
        sparse = field.kind is VectorKind.SPARSE
        vector: Any = {"indices": [0], "values": [1.0]} if sparse else [1.0] * (field.dimensions or 1)
        answer = self.query(namespace, vector, limit=1, sparse=sparse)
        found: int | None = answer.response_info.lsn_reconciled
        return found

    def among(self, namespace: str, texts: Sequence[str]) -> frozenset[str]:
        """Return which of these ids can be fetched."""
        answers = (orjson.loads(self.fetch(namespace, page)) for page in self.pages(texts))
        return frozenset(text for answer in answers for text in answer["vectors"])

    def _or_nothing(
        self, ask: Callable[..., Any], *arguments: Any, words: str = "namespace", **options: Any
    ) -> Any:
        """Return an answer; None where the index is there and the namespace isn't, yet or any more.

        That is a 404 with `words` in its message; of an index that is gone it says something else.
        """
        from pinecone.errors.exceptions import NotFoundError

        try:
            return ask(*arguments, **options)
        except NotFoundError as error:
            if words in str(error).lower():
                return None
            raise

    def close(self) -> None:
        """Close the connections."""
        self.index.close()


def normal(namespace: str) -> str:
    """Return a namespace's name as records carry it: "" for the default one."""
    return "" if namespace == DEFAULT_NAMESPACE else namespace


def _positions(answer: Any) -> Any:
    from pinecone.models.response_info import ResponseInfo

    return ResponseInfo(raw_headers=dict(answer.headers))
