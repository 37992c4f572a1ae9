"""SIGINT and SIGTERM: workers stop at their next batch; what takes longer than a moment is left as it is.

Leaving at once is safe because a migration survives even SIGKILL at any instant.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from migration_pipelines.cli.failures import INTERRUPTED

_SHOW_CURSOR = "\x1b[?25h"  # a progress bar that is cut off leaves it hidden


class Interrupted(KeyboardInterrupt):
    """One of our own: where KeyboardInterrupt itself passes through code that was made from a text, such as a
    driver's dataclasses, Python ends the process by SIGINT at exit, whoever caught it.
    """


@contextmanager
def stopping(say_goodbye: Callable[[], None], *, grace_seconds: float) -> Iterator[None]:
    """Turn both signals into KeyboardInterrupt; leave the process after a grace, or at the second signal.

    Parameters
    ----------
    say_goodbye
        Called before the process is left, when it didn't stop by itself.
    """
    timers: list[threading.Timer] = []

    def leave() -> None:
        say_goodbye()
        if sys.stderr.isatty():
            sys.stderr.write(_SHOW_CURSOR)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if timers:
            leave()
        timer = threading.Timer(grace_seconds, leave)
        timer.daemon = True
        timers.append(timer)
        timer.start()
        raise Interrupted

    before = _install(on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may; tests and notebooks call from others
    return {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
