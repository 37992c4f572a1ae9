"""Limits on what a store is sent: spaced out, shared by its workers, and no part of what a plan decides."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from migration_pipelines import throttle
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.migration import MigrationConfig
from migration_pipelines.store import open_address
from migration_pipelines.throttle import Throttle
from migration_pipelines_tests.conformance import load, new_schema, read_all, records_for
from migration_pipelines_tests.harnesses.pinecone import PineconeHarness


class Clock:
    """A clock that only sleeping moves on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(throttle, "time", made)
    return made


def test_no_second_carries_more_than_it_may(clock: Clock) -> None:
    limit = Throttle(10)
    for _ in range(31):
        limit.wait()
    assert clock.now == pytest.approx(103.0)


def test_a_large_request_is_paid_for_by_those_after_it(clock: Clock) -> None:
    limit = Throttle(1_000)
    limit.wait(5_000)
    assert clock.now == 100.0
    limit.wait(1)
    assert clock.now == pytest.approx(105.0)


def test_an_idle_time_earns_no_burst(clock: Clock) -> None:
    limit = Throttle(10)
    limit.wait()
    clock.now += 60
    began = clock.now
    for _ in range(11):
        limit.wait()
    assert clock.now - began == pytest.approx(1.0)


def test_two_stores_of_one_address_share_a_limit(clock: Clock) -> None:
    stores = [open_address("qdrant://shared.invalid:6333/docs?requests_per_second=2")[0] for _ in range(2)]
    for _ in range(5):
        for store in stores:
            store.pace()
    assert clock.now == pytest.approx(104.5)


def test_limits_are_no_part_of_what_a_plan_decides() -> None:
    plain, slow = "qdrant://h.invalid:6333/docs", "qdrant://h.invalid:6333/docs?requests_per_second=5"
    digests = {MigrationConfig(source=source, target="memory:x#y").digest() for source in (plain, slow)}
    assert len(digests) == 1


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "many"])
def test_a_limit_that_is_none_is_refused(limit: str) -> None:
    with pytest.raises(ConfigurationError, match="greater than 0"):
        open_address(f"qdrant://h.invalid/docs?bytes_per_second={limit}")


def test_every_request_of_a_move_is_paced(clock: Clock, tmp_path: Path) -> None:
    """As many seconds pass as the server sees requests, when one a second is allowed."""
    with PineconeHarness.start(tmp_path) as harness:
        store = harness.store.model_copy(update={"requests_per_second": 1.0})
        schema = new_schema(store)
        load(store, schema, records_for(store, 250))
        assert len(read_all(store, schema.name)) == 250
        assert harness.standin is not None
        assert clock.now - 100 >= len(harness.standin.requests) - 1
