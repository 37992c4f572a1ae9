"""What a migration takes of its machine: processor, memory, disk; sampled while it runs."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from pydantic import Field

from migration_pipelines.model import Value

INTERVAL_SECONDS = 1.0
_KEPT = 120  # samples; a longer run keeps every other one, then every fourth, …


class Sample(Value):
    """One look. `cpu_percent` is of one core, so that four busy ones are 400."""

    seconds: float  # since the monitor began
    cpu_percent: float = Field(ge=0)
    rss_bytes: int  # memory of this process that is in RAM
    disk_free_bytes: int  # on the disk of the home
    disk_used_bytes: int


class Resources(Value):
    """What a run took, as its report says: of this process, and on the disk of the home.

    `samples` are thinned out evenly where there are many; the other figures are of all that were taken.
    """

    interval_seconds: float
    taken: int
    cpu_percent_mean: float
    cpu_percent_max: float
    rss_bytes_max: int
    disk_free_bytes_min: int
    disk_used_bytes_max: int
    samples: tuple[Sample, ...]


class ResourceMonitor:
    """Samples in a thread of its own while the context is open.

    Parameters
    ----------
    interval_seconds
        Time between two samples.
    home
        A folder on the disk that is watched; it need not be there yet.

    Examples
    --------
    >>> with ResourceMonitor(interval_seconds=0.5) as monitor:
    ...     pass
    >>> found = monitor.summary()
    >>> found is not None and found.taken >= 1
    True
    """

    def __init__(self, *, interval_seconds: float = INTERVAL_SECONDS, home: Path | None = None) -> None:
        self._interval, self._home = interval_seconds, home or Path()
        self._samples: list[Sample] = []
        self._every = 1  # one in so many samples is kept
        self._taken, self._cpu_sum, self._cpu_max, self._rss_max = 0, 0.0, 0.0, 0
        self._free_min, self._used_max = sys.maxsize, 0
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="resources", daemon=True)

    def __enter__(self) -> Self:
        import psutil

        self._process = psutil.Process()
        self._process.cpu_percent()  # the first answer is 0.0, whatever the load
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def summary(self) -> Resources | None:
        """Return what has been found so far, the present moment included; None where nothing could be."""
        self._take()
        with self._lock:
            return (
                None
                if not self._taken
                else Resources(
                    interval_seconds=self._interval,
                    taken=self._taken,
                    cpu_percent_mean=round(self._cpu_sum / self._taken, 1),
                    cpu_percent_max=self._cpu_max,
                    rss_bytes_max=self._rss_max,
                    disk_free_bytes_min=self._free_min,
                    disk_used_bytes_max=self._used_max,
                    samples=tuple(self._samples),
                )
            )

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            self._take()

    def _take(self) -> None:
        # What can't be looked at at the moment, such as a disk that is away, mustn't hurt the migration.
        with self._lock, suppress(OSError):
            sample = self._look()
            self._cpu_sum += sample.cpu_percent
            self._cpu_max = max(self._cpu_max, sample.cpu_percent)
            self._rss_max = max(self._rss_max, sample.rss_bytes)
            self._free_min = min(self._free_min, sample.disk_free_bytes)
            self._used_max = max(self._used_max, sample.disk_used_bytes)
            if self._taken % self._every == 0:
                self._samples.append(sample)
            self._taken += 1
            if len(self._samples) > _KEPT:
                self._samples, self._every = self._samples[::2], self._every * 2

    def _look(self) -> Sample:
        import psutil

        disk = psutil.disk_usage(str(_there(self._home)))
        return Sample(
            seconds=round(time.monotonic() - self._started, 3),
            cpu_percent=self._process.cpu_percent(),
            rss_bytes=self._process.memory_info().rss,
            disk_free_bytes=disk.free,
            disk_used_bytes=disk.used,
        )


def _there(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
