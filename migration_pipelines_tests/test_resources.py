"""What a run took of its machine: sampled, thinned out, never in the way."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from migration_pipelines.components.plots import resources_plot
from migration_pipelines.resources import ResourceMonitor
from migration_pipelines_tests.observed import migration


def test_memory_that_was_taken_for_a_while_shows(tmp_path: Path) -> None:
    with ResourceMonitor(interval_seconds=0.01, home=tmp_path / "not" / "there" / "yet") as monitor:
        before = monitor.summary()
        ballast = bytearray(b"x" * 60_000_000)
        time.sleep(0.1)
        del ballast
        found = monitor.summary()
    assert before is not None
    assert found is not None
    assert found.rss_bytes_max >= before.rss_bytes_max + 50_000_000
    assert found.taken >= 5
    assert found.samples[-1].seconds > found.samples[0].seconds
    disk = psutil.disk_usage(str(tmp_path))
    assert found.disk_free_bytes_min == pytest.approx(disk.free, rel=0.2)


def test_a_long_run_keeps_few_samples_but_every_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        taken = 0

        def cpu_percent(self) -> float:
            self.taken += 1
            return 400.0 if self.taken == 334 else 10.0

        def memory_info(self) -> SimpleNamespace:
            return SimpleNamespace(rss=5)

    monkeypatch.setattr(psutil, "Process", Process)
    with ResourceMonitor(interval_seconds=3_600) as monitor:
        for _ in range(1_000):
            found = monitor.summary()
    assert found is not None
    assert found.taken == 1_000
    assert found.cpu_percent_max == 400.0
    assert found.rss_bytes_max == 5
    assert 50 <= len(found.samples) <= 120
    gaps = [b.seconds - a.seconds for a, b in zip(found.samples, found.samples[1:], strict=False)]
    assert min(gaps) >= 0
    assert "at most 0 MB and 400 %" in str(resources_plot(found).value)


def test_a_disk_that_can_not_be_looked_at_harms_no_migration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from migration_pipelines.migrator import run_migration

    def away(_path: str) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(psutil, "disk_usage", away)
    with migration(tmp_path, lambda event: None) as moving:
        report = run_migration(moving)
    assert report.status == "complete"
    assert report.resources is None
