"""One index's requests: every answer is looked at, and only a whole one counts.

An answer may be an answer and yet not the whole: shards that failed, items with an error each, a page that
is shorter than what was asked for. All of them are errors here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from migration_pipelines.ahead import in_turns
from migration_pipelines.errors import MigrationError, RecordRejectedError, StoreRefusedError, TransientError
from migration_pipelines.stores.elasticsearch.client import classify_item, reason_of, status_of

PAGE = 10_000  # index.max_result_window, as it is by default
_KEEP_ALIVE = "30m"  # between two pages of ids a whole partition may be read
_SLICES = 2  # listed beside each other: half the time on a server with two processors, three bring no more
# Servers of version 8 refuse what a client of version 9 asks by itself; both speak version 8's API.
MEDIA = "application/vnd.elasticsearch+{}; compatible-with=8"
_JSON = {"accept": MEDIA.format("json")}
# The whole of these is written and read at once; the server's own limit is 100 MB (http.max_content_length).
BULK_BYTES = 4_000_000
_TOO_LARGE = 413
Row = tuple[str, dict[str, Any]]


class Index:
    """An index, or an alias of one, behind a client of the vendor's.

    Parameters
    ----------
    client
        The vendor's.
    name
        Of the index.
    where
        Its address, for messages.
    pace
        Called with the bytes of each request before it is sent.
    """

    def __init__(self, client: Any, name: str, *, where: str, pace: Callable[[int], None]) -> None:
        self._client, self._path, self._where, self._pace = client, f"/{quote(name, safe='')}", where, pace

    def ask(self, method: str, path: str = "", body: Any = None, **query: Any) -> Any:
        """Return the answer to a request on the index."""
        return request(self._client, method, self._path + path, body, pace=self._pace, **query)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def count(self, query: Mapping[str, Any] | None = None) -> int:
        """Return how many records match, of those that a search sees."""
        found = self.ask("POST", "/_count", {"query": query} if query else None)
        self.check_whole(found)
        return int(found["count"])

    def ids(self, query: Mapping[str, Any] | None) -> Iterator[list[str]]:
        """Yield the ids of all records of one moment, in pages.

        Raises
        ------
        TransientError
            They are not as many as were counted.
        """
        total = 0
        with self._moment(query) as ask:
            expected = int(ask(size=0, track_total_hits=True)["total"]["value"])
            for hits in in_turns([_slice(ask, number) for number in range(_SLICES)]):
                total += len(hits)
                yield [hit["_id"] for hit in hits]
        if total != expected:
            raise TransientError(
                f"{self._where}: {total} ids arrived where {expected} were counted: try again",
                expected=expected,
                found=total,
            )

    @contextmanager
    def _moment(self, query: Mapping[str, Any] | None) -> Iterator[Callable[..., Any]]:
        """Give a function that searches, without `_source`, what the index holds now."""
        opened = self.ask("POST", "/_pit", keep_alive=_KEEP_ALIVE)
        if "_shards" in opened:  # from 8.16 on
            self.check_whole(opened)
        view = opened["id"]

        def ask(**options: Any) -> Any:
            nonlocal view
            options |= {"_source": False, "pit": {"id": view, "keep_alive": _KEEP_ALIVE}}
            options |= {"query": query} if query else {}
            found = request(self._client, "POST", "/_search", options, pace=self._pace)
            self.check_whole(found)
            view = found.get("pit_id", view)
            return found["hits"]

        try:
            yield ask
        finally:
            self._forget(view)

    def _forget(self, view: str) -> None:
        """Close the view of one moment; one that can't be closed ends by itself."""
        try:
            request(self._client, "DELETE", "/_pit", {"id": view}, pace=self._pace)
        except Exception:  # noqa: BLE001 - whatever the driver raises: what was read stands
            return

    def search(self, ids: Sequence[str], **query: Any) -> list[Row]:
        """Return the same as `get` where nothing is written meanwhile; faster, for a search reads in one go.

        What the search doesn't see, it may only not see yet.
        """
        body = {
            "query": {"bool": {"filter": [{"ids": {"values": ids}}]}},
            "size": len(ids),
            "sort": ["_doc"],
            "track_total_hits": False,
        }
        found = self.ask("POST", "/_search", body, **query)
        self.check_whole(found)
        rows = {hit["_id"]: hit.get("_source") for hit in found["hits"]["hits"]}
        if len(rows) < len(found["hits"]["hits"]):
            raise self._shared_id()
        unseen = [record_id for record_id in ids if rows.get(record_id) is None]
        rows |= dict(self.get(unseen, **query)) if unseen else {}
        return [(record_id, rows[record_id]) for record_id in ids if record_id in rows]

    def get(self, ids: Sequence[str], **query: Any) -> list[Row]:
        """Return id and `_source` of the records that are there, as they are now.

        A record with a routing of its own isn't found by its id alone: what is missing is searched for one.
        """
        docs = self._get([{"_id": record_id} for record_id in ids], **query)
        missing = [doc["_id"] for doc in docs if not doc["found"]]
        routed = self._routed(missing) if missing else []
        docs += self._get(routed, **query) if routed else []
        rows = [(doc["_id"], doc.get("_source")) for doc in docs if doc["found"]]
        without = [record_id for record_id, source in rows if source is None]
        if without:
            raise StoreRefusedError(f"{self._where}: record {without[0]!r} came without its _source")
        return rows  # type: ignore[return-value]

    def _get(self, asked: list[dict[str, str]], **query: Any) -> list[dict[str, Any]]:
        docs: list[dict[str, Any]] = self.ask("POST", "/_mget", {"docs": asked}, **query)["docs"]
        if [doc["_id"] for doc in docs] != [item["_id"] for item in asked]:
            raise TransientError(
                f"{self._where}: {len(docs)} records arrived where {len(asked)} were asked for: try again"
            )
        failed = [(doc["_id"], int(doc.get("status", 500)), doc["error"]) for doc in docs if "error" in doc]
        if failed:
            raise self._refusal(failed)
        return docs

    def _routed(self, ids: list[str]) -> list[dict[str, str]]:
        """Return id and routing of those records that a search finds with a routing.

        One that it finds without is gone: a search may see what was deleted since the last refresh.
        """
        body = {"query": {"ids": {"values": ids}}, "size": len(ids), "_source": False}
        found = self.ask("POST", "/_search", body)
        self.check_whole(found)
        if found["hits"]["total"]["value"] > len(found["hits"]["hits"]):
            raise self._shared_id()
        hits = (hit for hit in found["hits"]["hits"] if "_routing" in hit)
        return [{"_id": hit["_id"], "routing": hit["_routing"]} for hit in hits]

    def _shared_id(self) -> StoreRefusedError:
        return StoreRefusedError(
            f"{self._where}: several records share an id, each with its own routing; make them distinct"
        )

    def check_whole(self, found: Mapping[str, Any]) -> None:
        """Raise where an answer comes from some of the shards only."""
        shards = found.get("_shards") or {}
        if shards.get("failed") or found.get("timed_out") or "_shards" not in found:
            reasons = [reason_of(item["reason"]) for item in shards.get("failures") or () if "reason" in item]
            raise TransientError(
                f"{self._where}: an answer from {shards.get('successful')} of {shards.get('total')} shards "
                f"({'; '.join(reasons[:1]) or 'timed out'}): try again"
            )

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def bulk(self, lines: Sequence[bytes]) -> None:
        """Send the lines of some actions, in requests within the limit, and look at every item's answer.

        Raises
        ------
        TransientError
            Some weren't carried out, and may be later.
        RecordRejectedError
            One of them, for what it holds.
        """
        start = size = 0
        for number, line in enumerate(lines):
            if size and size + len(line) > BULK_BYTES:
                self._bulk(lines[start:number])
                start, size = number, 0
            size += len(line)
        if size:
            self._bulk(lines[start:])

    def _bulk(self, lines: Sequence[bytes]) -> None:
        body = b"".join(lines)
        try:
            # A default pipeline of the index would change what is written.
            found = self._send(body)
        except Exception as error:
            if status_of(error) != _TOO_LARGE or len(lines) == 1:
                raise
            half = len(lines) // 2
            self._bulk(lines[:half])
            self._bulk(lines[half:])
            return
        items = [next(iter(item.items())) for item in found["items"]]
        if len(items) != len(lines):
            raise TransientError(
                f"{self._where}: {len(items)} of {len(lines)} records were acknowledged: try again",
                expected=len(lines),
                found=len(items),
            )
        failed = [(item["_id"], int(item["status"]), item["error"]) for _, item in items if "error" in item]
        odd = [
            item
            for kind, item in items
            if item["status"] >= 300 and (kind, item["status"]) != ("delete", 404)
        ]
        if failed:
            raise self._refusal(failed)
        if odd:
            raise StoreRefusedError(f"{self._where}: record {odd[0]['_id']!r}: status {odd[0]['status']}")

    def _send(self, body: bytes) -> Any:
        self._pace(len(body))
        headers = {**_JSON, "content-type": MEDIA.format("x-ndjson")}
        path = f"{self._path}/_bulk?pipeline=_none"
        return self._client.perform_request("POST", path, headers=headers, body=body).body

    def _refusal(self, failed: Sequence[tuple[str, int, dict[str, Any]]]) -> MigrationError:
        """Return the error for items that failed: first what may succeed later, last a record's own fault."""
        found = [(*classify_item(status, error), record_id, error) for record_id, status, error in failed]
        order = (TransientError, StoreRefusedError)
        found.sort(key=lambda item: next((n for n, kind in enumerate(order) if issubclass(item[0], kind)), 2))
        kind, advice, record_id, error = found[0]
        found_ids = [item[2] for item in found if item[0] is RecordRejectedError]
        return kind(
            f"{self._where}: {len(failed)} failed, such as {record_id!r}: {reason_of(error)[:400]}; {advice}",
            found=found_ids[:100],
        )


def _slice(ask: Callable[..., Any], number: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the hits of one of the slices of a moment, page by page."""
    options = {"size": PAGE, "slice": {"id": number, "max": _SLICES}, "sort": [{"_shard_doc": "asc"}]}
    while hits := ask(**options, track_total_hits=False)["hits"]:
        options["search_after"] = hits[-1]["sort"]
        yield hits


def request(
    client: Any, method: str, path: str, body: Any = None, *, pace: Callable[[int], None], **query: Any
) -> Any:
    """Return the server's answer as plain values."""
    data = None if body is None else orjson.dumps(body)
    pace(len(data or b""))
    if query:
        texts = {key: str(v).lower() if isinstance(v, bool) else v for key, v in query.items()}
        path += f"?{urlencode(texts, safe='*,')}"
    headers = {**_JSON, "content-type": MEDIA.format("json")} if data is not None else _JSON
    return client.perform_request(method, path, headers=headers, body=data).body
