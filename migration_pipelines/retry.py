"""The only retry loop. It obeys the error classes: what is transient is tried again, nothing else."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import tenacity

from migration_pipelines.errors import TransientError
from migration_pipelines.model import Value

Result = TypeVar("Result")
# Hears of each attempt that failed and is followed by another: its number from 1, the seconds till then, why.
RetryListener = Callable[[int, float, BaseException], None]
_log = logging.getLogger(__name__)
_JITTER = 0.25


class RetryPolicy(Value):
    """How often and how patiently a transient error is tried again.

    Attempt n waits `delay_seconds * backoff**(n - 1)` with up to a quarter of jitter, at most
    `max_delay_seconds`, and never less than what the store itself asked for.
    """

    attempts: int = 5
    delay_seconds: float = 1.0
    backoff: float = 2.0
    max_delay_seconds: float = 60.0

    def call(self, function: Callable[[], Result], *, listener: RetryListener | None = None) -> Result:
        """Return `function()`, tried again while it raises `TransientError`; the listener hears of it.

        Raises
        ------
        TransientError
            The last one, when the attempts are used up.
        """

        def before_sleep(state: tenacity.RetryCallState) -> None:
            failed = _failed_attempt(state)
            _log.warning("attempt %d failed, next in %.1f s: %s", *failed)
            if listener is not None:
                listener(*failed)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=self._wait,
            before_sleep=before_sleep,
            reraise=True,
        )
        return retrying(function)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        # Jitter on top of the limit as well, or workers that wait the longest would come back together.
        exponential = tenacity.wait_exponential(
            multiplier=self.delay_seconds, exp_base=self.backoff, max=self.max_delay_seconds / (1 + _JITTER)
        )(state)
        wait = exponential + tenacity.wait_random(0, exponential * _JITTER)(state)
        return max(_asked(state.outcome.exception() if state.outcome else None), wait)


def _asked(error: BaseException | None) -> float:
    """Return the seconds that the store asked for; what isn't a number of seconds counts as nothing."""
    try:
        seconds = float(error.facts["retry_after_seconds"]) if isinstance(error, TransientError) else 0.0
    except (KeyError, TypeError, ValueError):
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


def _failed_attempt(state: tenacity.RetryCallState) -> tuple[int, float, BaseException]:
    error = state.outcome.exception() if state.outcome else None
    assert error is not None
    return state.attempt_number, state.next_action.sleep if state.next_action else 0.0, error
