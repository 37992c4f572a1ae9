"""Walks over the points of a collection in Qdrant's order of ids, from one id to another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from migration_pipelines.model import Span
from migration_pipelines.stores.qdrant.failures import AnswerError, RpcStatusError

_IDS_PAGE = 10_000
# What a collection in strict mode says to a larger page than its `max_query_limit`.
_TOO_MANY = re.compile(r'Limit exceeded \d+ > (\d+) for "limit"')

Id = int | str


class Scrolling(Protocol):
    """What has points that can be scrolled through: a server, a folder, this process's memory."""

    def scroll(self, collection: str, body: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], Id | None]:
        """Return the points from `offset` on, and the id that the next page begins with; None at the end."""


def order(point_id: Id) -> tuple[bool, Id]:
    """Return what sorts ids as Qdrant does: integers, then UUIDs."""
    return isinstance(point_id, str), point_id


def id_pages(reader: Scrolling, collection: str) -> Iterator[list[Id]]:
    """Yield every id, without payloads and vectors."""
    body = {"limit": _IDS_PAGE, "with_payload": False, "with_vector": False}
    for points in _pages(reader, collection, body, None):
        yield [point["id"] for point in points]


def point_pages(
    reader: Scrolling, collection: str, bounds: Mapping[str, Any], body: Mapping[str, Any]
) -> Iterator[list[Mapping[str, Any]]]:
    """Yield the points from `first` to `last` of a span's bounds, both within; all of them without bounds."""
    last = bounds.get("last")
    for points in _pages(reader, collection, body, bounds.get("first")):
        within = points if last is None else [p for p in points if order(p["id"]) <= order(last)]
        if within:
            yield within
        if last is not None and points and order(points[-1]["id"]) >= order(last):
            return


def _pages(
    reader: Scrolling, collection: str, body: Mapping[str, Any], offset: Id | None
) -> Iterator[list[Mapping[str, Any]]]:
    while True:
        start = {} if offset is None else {"offset": offset}
        try:
            points, offset = reader.scroll(collection, {**body, **start})
        except (AnswerError, RpcStatusError) as error:
            most = _TOO_MANY.search(str(error))
            if most is None or not 0 < int(most[1]) < body["limit"]:
                raise
            body = {**body, "limit": int(most[1])}
            continue
        yield points
        if offset is None:
            return


def spans(reader: Scrolling, collection: str, span_records: int) -> Iterator[Span]:
    """Yield spans that cover each point exactly once; what is written or deleted later doesn't move them."""
    ids: list[Id] = []
    for page in id_pages(reader, collection):
        ids += page
        while len(ids) > span_records:
            yield _span(ids[:span_records])
            ids = ids[span_records:]
    if ids:
        yield _span(ids)


def _span(ids: list[Id]) -> Span:
    return Span(bounds={"first": ids[0], "last": ids[-1]}, records=len(ids))
