"""G1: killed by SIGKILL at any instant, any number of times, and run again: all is there once, equal."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migration_pipelines.migration import MigrationConfig, ledger_for
from migration_pipelines.model import Metric
from migration_pipelines_tests import crashing
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.harnesses.parquet import Parquet
from migration_pipelines_tests.harnesses.pgvector import PgVectorHarness
from migration_pipelines_tests.records import Record, by_id, plain_records, plain_schema

PARTITIONS = 12
PARTITION_SIZE = 150
WORKERS = 2
SEEDS = 25  # for each of two targets
NAMED_POINTS = [
    ("batch-planned", 3),
    ("planned", 1),
    ("batch-extracted", 5),
    ("extracted", 2),
    ("transformed", 2),
    ("prepared", 1),
    ("batch-loaded", 5),
    ("loaded", 1),
    ("batch-verified", 3),
    ("verified", 1),
    ("verified", PARTITIONS),
    ("published", 1),
    ("validated", 1),
]


@dataclass
class Scene:
    """A source with records, a target's engine, and where the ledger lies."""

    source: Harness
    target: Harness
    folder: Path
    records: list[Record]
    runs: int = 0

    def settings(self, collection: str) -> dict[str, object]:
        return {
            "source": self.source.store.address("docs"),
            "target": self.target.store.address(collection),
            "partition_size": PARTITION_SIZE,
            "batch_size": 40,
            "workers": WORKERS,
        }

    def verified(self, collection: str) -> set[str]:
        config = MigrationConfig(**self.settings(collection))
        ledger = ledger_for(config, self.folder / "home")
        plan = ledger.plan()
        return set(ledger.receipts(plan)) if plan else set()

    def run(self, collection: str, **how: object) -> int | None:
        return crashing.run(self.settings(collection), self.folder / "home", self.log, **how)  # type: ignore[arg-type]

    @property
    def log(self) -> Path:
        return self.folder / "events.log"


@pytest.fixture(scope="module", params=[Parquet, PgVectorHarness], ids=["parquet", "pgvector"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("crash")
    for name in ("source", "target"):
        (folder / name).mkdir()
    records = plain_records(PARTITIONS * PARTITION_SIZE, dimensions=16)
    records[7] = Record(id="nul", vectors=records[7].vectors, document="a\0b", metadata={"x": 1e22})
    with Parquet.start(folder / "source") as source, request.param.start(folder / "target") as target:
        source.write(plain_schema("docs", dimensions=16, metric=Metric.COSINE), records)
        yield Scene(source, target, folder, records)


def check_whole(scene: Scene, collection: str) -> None:
    """The target holds each record once and equal, read natively, and a second look says complete."""
    found = scene.target.read(collection)
    assert len(found) == len(scene.records)
    expected, arrived = by_id(scene.records), by_id(found)
    assert arrived.keys() == expected.keys()
    changed = [key for key in expected if arrived[key] != expected[key]]
    held_in_envelope = [] if isinstance(scene.target, Parquet) else [("str", "nul", "")]
    assert changed == held_in_envelope


def finish(scene: Scene, collection: str) -> None:
    """Run again until done, and see that no partition with a receipt was touched again."""
    done = scene.verified(collection)
    assert scene.run(collection) == 0
    again = {partition for name, partition in crashing.events(scene.log) if name == "batch-loaded"}
    assert not again & done
    check_whole(scene, collection)


@pytest.mark.parametrize(("event", "times"), NAMED_POINTS, ids=lambda value: str(value))
def test_killed_at_a_named_point(scene: Scene, event: str, times: int) -> None:
    collection = f"at_{event.replace('-', '_')}_{times}"
    # Parquet holds these records as they are: nothing is transformed, and nobody dies of it.
    lives = event == "transformed" and isinstance(scene.target, Parquet)
    status = scene.run(collection, die_at=(event, times))
    assert status == (0 if lives else -9)
    touched = {p for name, p in crashing.events(scene.log) if name in ("batch-loaded", "extracted")}
    assert len(touched - scene.verified(collection)) <= WORKERS
    finish(scene, collection)


@pytest.fixture(scope="module")
def duration(scene: Scene) -> float:
    """How long a run takes that nobody kills."""
    started = time.monotonic()
    assert scene.run("undisturbed") == 0
    return time.monotonic() - started


@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_at_random_moments(scene: Scene, duration: float, seed: int) -> None:
    """Killed up to three times, each time anywhere in what is left of the run."""
    moments = random.Random(seed)
    collection = f"random_{seed}"
    for _ in range(moments.randint(1, 3)):
        status = scene.run(collection, die_after_seconds=moments.uniform(0.02, duration))
        assert status in (-9, 0)
        touched = {p for name, p in crashing.events(scene.log) if name == "batch-loaded"}
        assert len(touched - scene.verified(collection)) <= WORKERS
    finish(scene, collection)
