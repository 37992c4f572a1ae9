"""Requests that are under way while the answers before them are looked at."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Final, TypeVar

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")
_END: Final = object()


def answers(
    ask: Callable[[_Asked], _Answer], questions: Iterable[_Asked], *, ahead: int
) -> Iterator[_Answer]:
    """Yield the answer to each question, in their order, while up to `ahead` later ones are asked in threads.

    What `ask` raises comes where its answer would, and nothing is asked after it.
    """
    waiting: deque[Future[_Answer]] = deque()
    with ThreadPoolExecutor(ahead, thread_name_prefix="ahead") as pool:
        try:
            for question in questions:
                waiting.append(pool.submit(copy_context().run, ask, question))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for answer in waiting:
                answer.cancel()


def in_turns(sources: Sequence[Iterator[_Answer]]) -> Iterator[_Answer]:
    """Yield an item of each source in turn, while the next one of each is made in a thread.

    What a source raises comes where its item would, and ends them all.
    """
    waiting: deque[tuple[Iterator[_Answer], Future[_Answer | object]]] = deque()
    with ThreadPoolExecutor(len(sources), thread_name_prefix="in-turns") as pool:

        def ask(source: Iterator[_Answer]) -> None:
            context = copy_context()
            waiting.append((source, pool.submit(lambda: context.run(next, source, _END))))

        for source in sources:
            ask(source)
        while waiting:
            source, found = waiting.popleft()
            item = found.result()
            if item is not _END:
                ask(source)
                yield item  # type: ignore[misc]
