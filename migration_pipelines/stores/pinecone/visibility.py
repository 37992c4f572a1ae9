"""Waiting until what was written can be read: the service acknowledges a write before reads see it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from migration_pipelines.errors import TransientError
from migration_pipelines.stores.pinecone.plane import Plane

Positions = Mapping[str, int | None]
"""The log position of the last write to each namespace, None where the service told none."""

_SHORTEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.02, 1.0


def waits(seconds: float) -> Iterator[None]:
    """Yield at once, then after waits that grow, until the time is over."""
    until, pause = time.monotonic() + seconds, _SHORTEST_WAIT_SECONDS
    while True:
        yield
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_WAIT_SECONDS)


def later(first: Positions, second: Positions) -> dict[str, int | None]:
    """Return the later of the positions of each namespace; None where either is unknown."""
    both = dict(first)
    for namespace, position in second.items():
        known = both.get(namespace, position)
        both[namespace] = None if known is None or position is None else max(known, position)
    return both


def wait_for_positions(plane: Plane, positions: Positions, *, seconds: float) -> frozenset[str]:
    """Wait until searches see these log positions; return the namespaces of which that can't be told.

    Raises
    ------
    TransientError
        They don't within this time.
    """
    told = {namespace: position for namespace, position in positions.items() if position is not None}
    unknown = positions.keys() - told.keys()
    for namespace, position in told.items():
        for _ in waits(seconds):
            reached = plane.searched_position(namespace)
            if reached is None:
                unknown.add(namespace)
            if reached is None or reached >= position:
                break
        else:
            raise TransientError(
                f"{plane.where}: namespace {namespace!r}: what was written is acknowledged, but not visible "
                f"within {seconds:g} seconds; run it again, or raise freshness_seconds"
            )
    return frozenset(unknown)


def wait_for_ids(plane: Plane, namespace: str, texts: Sequence[str], *, seconds: float) -> list[str]:
    """Wait until all of these records can be fetched; return those that can't within this time."""
    missing = list(texts)
    for _ in waits(seconds):
        there = plane.among(namespace, missing)
        missing = [text for text in missing if text not in there]
        if not missing:
            break
    return missing


def wait_until_gone(plane: Plane, namespace: str, texts: Sequence[str], *, seconds: float) -> None:
    """Wait until none of these records can be fetched.

    Raises
    ------
    TransientError
        Some still can after this time.
    """
    for _ in waits(seconds):
        if not plane.among(namespace, texts):
            return
    raise TransientError(f"{plane.where}: what was deleted can still be read; try again")
