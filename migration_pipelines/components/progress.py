"""Progress: the engine's events as Dagster shows them while a run is at work.

Every few seconds one observation with the figures so far: an event per batch would cost more than the batch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import dagster as dg

from migration_pipelines.components.declared import SESSION_TAG
from migration_pipelines.logs import JsonLog
from migration_pipelines.migration import Event, Listener, ignore

INTERVAL_SECONDS = 5.0
_listener: Listener = ignore


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let somebody in this process, such as a progress bar, listen to every run that happens here.

    Dagster starts the runs, and has no way to hand a listener on to them.
    """
    global _listener
    previous, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = previous


def _logging_if_asked() -> Listener:
    """Return what logs the runs of a process that nobody else listens to, such as a daemon's worker."""
    if os.environ.get("VECTOR_MIGRATE_LOG", "").lower() != "json":
        return ignore
    return JsonLog(sys.stderr).listen


class Progress:
    """Listens to a migration in any of its threads, and reports on an asset while the context is open.

    Parameters
    ----------
    asset
        The asset that the observations are of.
    counted
        The name of the events that count as progress.
    total
        Records that are to be worked on; 0 where nobody knows.
    """

    def __init__(
        self, context: dg.AssetExecutionContext, asset: dg.AssetKey, *, counted: str, total: int = 0
    ) -> None:
        self._context, self._asset, self._counted, self._total = context, asset, counted, total
        self._records: Counter[str] = Counter()
        self._hand_on = _logging_if_asked() if _listener is ignore else _listener
        self._lock, self._done = threading.Lock(), threading.Event()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._report_until_done, name="progress", daemon=True)

    def __call__(self, event: Event) -> None:
        """Count an event, and hand it on."""
        with self._lock:
            self._records[event.name] += event.records
        self._hand_on(event)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _report_until_done(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            self._report()
            if SESSION_TAG in self._context.run.tags and self._is_being_canceled():
                os.kill(os.getpid(), signal.SIGINT)
                return

    def _is_being_canceled(self) -> bool:
        """Whether the UI asks to terminate a run whose process it doesn't know."""
        run = self._context.instance.get_run_by_id(self._context.run_id)
        return run is not None and run.status in (
            dg.DagsterRunStatus.CANCELING,
            dg.DagsterRunStatus.CANCELED,
        )

    def _report(self) -> None:
        with self._lock:
            records = self._records[self._counted]
        rate = records / (time.monotonic() - self._started)
        figures: dict[str, int | float] = {"records so far": records, "records per second": round(rate, 1)}
        if self._total:
            figures["percent"] = round(100 * records / self._total, 1)
        self._context.log_event(dg.AssetObservation(self._asset, metadata=figures))
