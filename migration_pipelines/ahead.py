"""Requests that are under way while the answers before them are looked at."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")


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
