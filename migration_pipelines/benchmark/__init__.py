"""How fast a transfer is beside the limits of the two drivers, and beside the loop of common guides.

All of it is measured in one run, on the same records, each in a process of its own so that memory and
caches of one don't help or hurt another. The ratios carry over to other machines; the rates don't.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from migration_pipelines.errors import MigrationError
from migration_pipelines.model import Value
from migration_pipelines.postgres import URL, postgres

COLLECTION = "passages"


class Setup(Value):
    """What is measured: how many records of how many dimensions, and where they lie.

    `guides_records` bounds the slow loop.
    """

    records: int
    dimensions: int
    folder: str
    home: str
    prefix: str
    guides_records: int = 5_000


class Rate(Value):
    """What one measurement found."""

    records: int
    seconds: float

    @property
    def records_per_second(self) -> float:
        """How fast it was."""
        return self.records / self.seconds


class Transfer(Rate):
    """What the transfer by this tool did; `seconds` are those of extract, transform, load and verify.

    Memory is resident memory in bytes: `opened` with both stores open and a page of each read, `peak` the
    most while planning and moving. Of it `anonymous_*` leaves out pages of files, which the system takes
    back when it needs the room.
    """

    plan_seconds: float
    index_seconds: float
    total_seconds: float
    verified: int
    opened: int
    peak: int
    anonymous_opened: int
    anonymous_peak: int


class Benchmark(Value):
    """What a run of the benchmark found."""

    records: int
    dimensions: int
    reader: Rate
    writer: Rate
    guides: Rate
    transfer: Transfer

    @property
    def of_reader(self) -> float:
        """The transfer's share of what one reader can do at most."""
        return self.transfer.records_per_second / self.reader.records_per_second

    @property
    def times_guides(self) -> float:
        """How many times as fast as the guides' loop the transfer is."""
        return self.transfer.records_per_second / self.guides.records_per_second

    def document(self) -> dict[str, Any]:
        """Return everything as plain JSON, rates and ratios included."""
        found: dict[str, Any] = self.model_dump(mode="json")
        for name in ("reader", "writer", "guides", "transfer"):
            found[name]["records_per_second"] = getattr(self, name).records_per_second
        transfer = self.transfer
        found["ratios"] = {
            "of_reader": self.of_reader,
            "of_writer": transfer.records_per_second / self.writer.records_per_second,
            "times_guides": self.times_guides,
        }
        found["memory_above_opened"] = transfer.peak - transfer.opened
        found["anonymous_memory_above_opened"] = transfer.anonymous_peak - transfer.anonymous_opened
        return found


def run_benchmark(
    *,
    records: int,
    dimensions: int,
    home: Path,
    keep: bool = False,
    tell: Callable[[str], None] = lambda text: None,  # noqa: ARG005 - the default tells nobody
) -> Benchmark:
    """Measure reader, writer, guides' loop and transfer, Chroma to PostgreSQL.

    Parameters
    ----------
    home
        The prepared Chroma folder is kept under it for the next run; Chroma writes about a thousand
        records a second.
    keep
        Leave the tables that were written.
    tell
        Called with what is being done.

    Raises
    ------
    MissingDriverError
        There is no PostgreSQL to write to.
    MigrationError
        A measurement failed.
    """
    place = home / "benchmark"
    setup = Setup(
        records=records,
        dimensions=dimensions,
        folder=str(place / f"chroma-{records}x{dimensions}"),
        home=str(place / "home"),
        prefix=f"benchmark_{uuid.uuid4().hex[:8]}",
    )
    _prepare(setup, tell)
    with postgres(place / "postgres") as url:
        try:
            found = {}
            for name in ("reader", "transfer", "writer", "guides"):
                tell(f"measuring the {name}")
                found[name] = _in_a_process(name, setup, {URL: url})
            return Benchmark(records=records, dimensions=dimensions, **found)
        finally:
            shutil.rmtree(setup.home, ignore_errors=True)
            if not keep:
                _in_a_process("clean_up", setup, {URL: url})


def _prepare(setup: Setup, tell: Callable[[str], None]) -> None:
    folder = Path(setup.folder)
    if folder.exists():
        return
    tell(
        f"writing {setup.records:,} records into Chroma, once: about {setup.records / 1000 / 60:.0f} minutes"
    )
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    _in_a_process("prepare", setup.model_copy(update={"folder": str(unfinished)}), {})
    unfinished.rename(folder)


def _in_a_process(name: str, setup: Setup, environment: Mapping[str, str]) -> Any:
    """Return the JSON that a measurement, run in a process of its own, ends with."""
    done = subprocess.run(  # noqa: S603 - this project's own module
        [sys.executable, "-m", "migration_pipelines.benchmark", name, setup.model_dump_json()],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise MigrationError(f"the benchmark's {name} failed with exit status {done.returncode}; see above")
    return json.loads(done.stdout or b"null")
