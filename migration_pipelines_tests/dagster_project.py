"""A project of its own in a folder: declarations and a home, for tests that run Dagster in earnest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from migration_pipelines import declarations
from migration_pipelines.components.headless import run_declared
from migration_pipelines.components.home import dagster_home, environment
from migration_pipelines.components.internals import Session, open_session
from migration_pipelines.ledger import Ledger
from migration_pipelines.store import Store, open_address
from migration_pipelines.validate import Report
from migration_pipelines_tests.records import Record, from_batches, plain_schema, to_batch


@dataclass(frozen=True)
class Project:
    """A folder with declarations, a home, and Parquet collections."""

    folder: Path

    @property
    def defs(self) -> Path:
        return self.folder / "defs"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def declare(self, name: str, **attributes: Any) -> None:
        """Declare a migration."""
        self._write(name, declarations.MIGRATION, {"name": name, **attributes})

    def connect(self, name: str, store: str, **settings: Any) -> None:
        """Declare a connection."""
        attributes = {"name": name, "store": store, "settings": settings}
        self._write(f"connection_{name}", declarations.CONNECTION, attributes)

    def _write(self, folder: str, kind: str, attributes: dict[str, Any]) -> None:
        path = self.defs / folder / "defs.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"type": kind, "attributes": attributes}))

    def run(self, name: str, **options: Any) -> Report:
        """Run a migration headless in this process."""
        return run_declared(name, defs=self.defs, home=self.home, **options)

    def start(self, name: str, *, seconds_per_batch: float) -> subprocess.Popen[str]:
        """Start a headless run in a process of its own; it says on its output what happens."""
        script = (
            "import sys, time\n"
            "from pathlib import Path\n"
            "from migration_pipelines.components.headless import run_declared\n"
            "def listen(event):\n"
            "    print(event.name, event.partition, flush=True)\n"
            f"    time.sleep({seconds_per_batch})\n"
            f"report = run_declared({name!r}, defs=Path({str(self.defs)!r}), home=Path({str(self.home)!r}),\n"
            "                      listener=listen)\n"
            "sys.exit(report.exit_status)\n"
        )
        command = [sys.executable, "-W", "ignore", "-c", script]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @contextmanager
    def variables(self) -> Iterator[None]:
        """Set the variables by which Dagster's processes find the project."""
        before = dict(os.environ)
        os.environ.update(environment(self.home, self.defs))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Open the project's Dagster home in this process."""
        with self.variables(), open_session(dagster_home(self.home)) as session:
            yield session

    @contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        """Open the project's Dagster home as its webserver does."""
        with self.variables(), dg.DagsterInstance.get() as instance:
            yield instance

    def ledger(self, name: str) -> Ledger:
        """The engine's ledger of a migration."""
        return Ledger(self.home / "migrations" / name)

    def parquet(self, name: str) -> str:
        """The address of a Parquet collection in the project's folder."""
        return f"parquet:{self.folder / name}#docs"


def fill(address: str, records: Sequence[Record], *, part_records: int | None = None) -> None:
    """Create a collection with some records; a Parquet one in parts, which become its partitions."""
    store, collection = open_collection(address)
    schema = plain_schema(collection, dimensions=len(records[0].vectors[""]))
    store.create(schema)
    store.begin_load(collection)
    size = part_records or len(records)
    for start in range(0, len(records), size):
        with store.load_part(collection, f"part{start}") as write:
            write(to_batch(records[start : start + size], schema))
    store.finish_load(collection)


def read(address: str) -> list[Record]:
    """Read every record of a collection."""
    store, collection = open_collection(address)
    spans = store.split(collection, span_records=100_000)
    return from_batches(
        batch for span, ids in spans for batch in store.scan(collection, span, ids=ids, batch_records=1000)
    )


def open_collection(address: str) -> tuple[Store, str]:
    """Open an address that names a collection."""
    store, collection = open_address(address)
    assert collection is not None
    return store, collection


def statuses(instance: dg.DagsterInstance, name: str, step: str = "verified") -> dict[str, str]:
    """The status of each partition of an asset, as the UI shows it; "" is missing."""
    partitions = dg.DynamicPartitionsDefinition(name=f"{name}_partitions")
    keys = instance.get_dynamic_partitions(f"{name}_partitions")
    found = instance.get_status_by_partition(dg.AssetKey([name, step]), keys, partitions) or {}
    return {key: status.value if status else "" for key, status in found.items()}


def run_statuses(instance: dg.DagsterInstance) -> list[str]:
    """The status of every run, the last one first."""
    return [run.status.value for run in instance.get_runs()]


def backfill_statuses(instance: dg.DagsterInstance) -> list[str]:
    """The status of every backfill, the last one first."""
    return [backfill.status.value for backfill in instance.get_backfills()]
