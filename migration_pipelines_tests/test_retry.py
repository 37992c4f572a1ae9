"""Retries: what is transient is tried again, as patiently as was asked for; nothing else is."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from migration_pipelines.errors import (
    AuthenticationError,
    MigrationError,
    RecordRejectedError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
    UsageError,
)
from migration_pipelines.retry import RetryPolicy


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    return slept


class Flaky:
    """Fails with the given errors, one a call, and then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_what_succeeds_is_called_once(waits: list[float]) -> None:
    work = Flaky()
    assert RetryPolicy().call(work) == "done"
    assert (work.calls, waits) == (1, [])


def test_transient_errors_are_tried_again_until_it_succeeds(waits: list[float]) -> None:
    work = Flaky(TransientError("busy"), StoreUnavailableError("restarting"))
    assert RetryPolicy().call(work) == "done"
    assert (work.calls, len(waits)) == (3, 2)


def test_the_last_error_comes_out_when_the_attempts_are_used_up(waits: list[float]) -> None:
    work = Flaky(*(TransientError(f"attempt {n}") for n in range(1, 10)))
    with pytest.raises(TransientError, match="attempt 4"):
        RetryPolicy(attempts=4).call(work)
    assert (work.calls, len(waits)) == (4, 3)


def test_one_attempt_means_no_retry(waits: list[float]) -> None:
    work = Flaky(TransientError("busy"))
    with pytest.raises(TransientError):
        RetryPolicy(attempts=1).call(work)
    assert (work.calls, waits) == (1, [])


@pytest.mark.parametrize(
    "error",
    [
        MigrationError("any"),
        UsageError("usage"),
        AuthenticationError("login"),
        StoreRefusedError("refused"),
        RecordRejectedError("record"),
        ConnectionError("a driver's own error that no store translated"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_other_error_is_tried_again(error: Exception, waits: list[float]) -> None:
    work = Flaky(error)
    with pytest.raises(type(error)):
        RetryPolicy().call(work)
    assert (work.calls, waits) == (1, [])


def test_waits_grow_exponentially_with_little_jitter(waits: list[float]) -> None:
    policy = RetryPolicy(attempts=6, delay_seconds=1.0, backoff=3.0, max_delay_seconds=1_000.0)
    policy.call(Flaky(*[TransientError("busy")] * 5))
    for wait, least in zip(waits, [1.0, 3.0, 9.0, 27.0, 81.0], strict=True):
        assert least <= wait <= least * 1.25


def test_no_wait_is_longer_than_the_greatest(waits: list[float]) -> None:
    policy = RetryPolicy(attempts=9, delay_seconds=4.0, max_delay_seconds=10.0)
    policy.call(Flaky(*[TransientError("busy")] * 8))
    assert max(waits) <= 10.0
    assert waits[-1] >= 8.0
    assert len(set(waits[-4:])) == 4


def test_jitter_keeps_workers_from_coming_back_together(waits: list[float]) -> None:
    for _ in range(20):
        RetryPolicy().call(Flaky(TransientError("busy")))
    assert len(set(waits)) > 10


def test_what_the_store_asks_for_is_waited_for(waits: list[float]) -> None:
    policy = RetryPolicy(delay_seconds=1.0, max_delay_seconds=10.0)
    policy.call(Flaky(TransientError("slow down", retry_after_seconds=42.0)))
    assert waits == [42.0]


def test_a_store_that_asks_for_less_does_not_hurry_us(waits: list[float]) -> None:
    RetryPolicy(delay_seconds=8.0).call(Flaky(TransientError("soon", retry_after_seconds=0.1)))
    assert waits[0] >= 8.0


@pytest.mark.parametrize("asked", ["7", None, "soon", -1.0, float("nan")])
def test_whatever_a_store_asks_for_the_work_goes_on(asked: object, waits: list[float]) -> None:
    RetryPolicy(delay_seconds=1.0).call(Flaky(TransientError("busy", retry_after_seconds=asked)))
    assert len(waits) == 1
    assert waits[0] >= (7.0 if asked == "7" else 1.0)


def test_each_call_counts_its_own_attempts(waits: list[float]) -> None:
    policy = RetryPolicy(attempts=2)
    work: Callable[[], str] = Flaky(TransientError("first"))
    assert policy.call(work) == "done"
    assert policy.call(Flaky(TransientError("second"))) == "done"
    assert len(waits) == 2


def test_a_retry_is_logged_with_its_reason(waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="migration_pipelines.retry"):
        RetryPolicy().call(Flaky(TransientError("the store is busy")))
    assert "attempt 1 failed" in caplog.text
    assert "the store is busy" in caplog.text
