"""One engine of each store for the whole session, and a PostgreSQL for the tests that are about it alone."""

from __future__ import annotations

import uuid

import hypothesis
import pytest

from migration_pipelines_tests.conformance import all_harnesses
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.harnesses.pgvector import PgVectorHarness

# How long an example takes says nothing of ours on a machine that others use too.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")

# Minutes each: begun first, so that the suite doesn't end with one process at work and the others done.
LONG_FILES = [
    "test_dagster_headless.py",
    "test_store_state_machine.py",
    "test_store_failures.py",
    "test_crash.py",
    "test_parquet_s3.py",
    "test_dagster_workers.py",
    "test_cli_interrupted.py",
    "test_guarantees.py",
    "test_benchmark.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files before the others; within a file the order stays."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", params=all_harnesses(), ids=lambda harness: harness.__name__)
def harness(request, tmp_path_factory):
    """A running engine of one store; each test makes collections of its own in it."""
    with request.param.start(tmp_path_factory.mktemp(request.param.__name__)) as running:
        yield running


@pytest.fixture
def store(request, harness: Harness):
    """The store under test; what it can't pass is expected to fail, for the reason that its harness gives."""
    name = request.node.originalname
    if name in harness.known_gaps():
        request.applymarker(pytest.mark.xfail(reason=harness.known_gaps()[name], strict=True))
    return harness.store


@pytest.fixture(scope="module")
def pg(tmp_path_factory):
    """An empty database with pgvector; the tests of one file share it."""
    with PgVectorHarness.start(tmp_path_factory.mktemp("pgvector")) as harness:
        yield harness


@pytest.fixture
def name():
    """A name that no table has had."""
    return f"t{uuid.uuid4().hex[:12]}"
