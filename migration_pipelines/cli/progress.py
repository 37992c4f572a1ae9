"""Progress for people: a bar on a terminal, a line every few seconds elsewhere; always on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from migration_pipelines.cli.failures import say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from migration_pipelines.migration import Event, Migration

_SECONDS_BETWEEN_LINES = 5.0
_RATES = {"batch-extracted": "read", "batch-loaded": "written", "batch-verified": "verified"}

Show = Callable[["Meter", str], None]


class Meter:
    """Counts what the engine tells of; safe to call from several threads.

    `planned`, `done`, `total` are records; `phase` is what is being done, in words.
    """

    def __init__(self, show: Show, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock, self._lock = show, clock, threading.Lock()
        self._counts: Counter[str] = Counter()
        self._started: dict[str, float] = {}
        self._verified: Counter[str] = Counter()  # by partition: one that is tried again starts over
        self._before = 0
        self.planned = 0
        self.total: int | None = None
        self.migration: Migration | None = None
        self.phase = "planning"

    def __call__(self, event: Event) -> None:
        """Take note of an event and show where things stand."""
        with self._lock:
            if event.name == "batch-planned":
                self.planned += event.records
            elif event.name == "retried" and event.phase == "plan":
                self.planned = 0  # it is begun again
            elif event.name in _RATES:
                self._moving(event)
            elif event.name == "verified":
                self._verified[event.partition] = event.records
                if self.total is not None and self.done >= self.total:
                    self.phase = "publishing"
            elif event.name == "published":
                self.phase = "validating"
            self._show(self, event.name)

    @property
    def done(self) -> int:
        """Records that are verified, those of earlier runs included."""
        return self._before + self._verified.total()

    def rates(self) -> str:
        """Return how fast each side goes, such as `read 9,800/s, written 9,700/s`."""
        now = self._clock()
        return ", ".join(
            f"{word} {self._counts[name] / max(now - self._started[name], 1e-3):,.0f}/s"
            for name, word in _RATES.items()
            if name in self._started
        )

    def _moving(self, event: Event) -> None:
        if self.total is None:
            self._begin()
        self._started.setdefault(event.name, self._clock())
        self._counts[event.name] += event.records
        if event.name == "batch-loaded":
            self._verified[event.partition] = 0
        if event.name == "batch-verified":
            self._verified[event.partition] += event.records

    def _begin(self) -> None:
        self.phase = "moving"
        if self.migration is not None:
            plan = self.migration.plan
            self.total = plan.profile.records
            receipts = self.migration.ledger.receipts(plan).values()
            self._before = sum(receipt.verified for receipt in receipts)


@contextmanager
def listening(*, quiet: bool) -> Iterator[Meter]:
    """Yield the listener that shows progress as suits where standard error goes."""
    if quiet:
        yield Meter(lambda _meter, _name: None)
    elif sys.stderr.isatty():
        with _bar() as show:
            yield Meter(show)
    else:
        yield Meter(_lines())


def _lines() -> Show:
    last, phase = time.monotonic(), ""

    def show(meter: Meter, _name: str) -> None:
        nonlocal last, phase
        if meter.phase != phase or time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last, phase = time.monotonic(), meter.phase
            say(_line(meter))

    return show


def _line(meter: Meter) -> str:
    if meter.total is None:
        return f"{meter.phase}: {meter.planned:,} records"
    rates = meter.rates()
    return f"{meter.phase}: {meter.done:,} of {meter.total:,} records verified" + (
        f"; {rates}" if rates else ""
    )


@contextmanager
def _bar() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("planning", total=None, detail="")

        def show(meter: Meter, _name: str) -> None:
            _update(progress, task, meter)

        yield show


def _update(progress: Progress, task: TaskID, meter: Meter) -> None:
    if meter.total is None:
        progress.update(task, description=meter.phase, detail=f"{meter.planned:,} records")
        return
    progress.update(
        task,
        description=meter.phase,
        total=meter.total,
        completed=min(meter.done, meter.total),
        detail=f"{meter.done:,} of {meter.total:,} verified · {meter.rates()}",
    )


@contextmanager
def counting(what: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told of records read, for what has no partitions; shown likewise."""
    from migration_pipelines.migration import Event

    with listening(quiet=quiet) as meter:
        meter.phase = what
        yield lambda records: meter(Event(name="batch-planned", records=records))
