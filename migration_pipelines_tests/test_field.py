"""Chroma folders as they were found move whole, and are byte for byte what they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines_tests import field
from migration_pipelines_tests.harnesses import memory, parquet, pgvector
from migration_pipelines_tests.harnesses.base import Harness

FOUND = field.collections("chroma")
TARGETS = [memory.HARNESSES[0], parquet.HARNESSES[0], pgvector.HARNESSES[0]]


def name_of(value: Path | dict) -> str:
    """How a store's path or a collection's truth is called in a test's name."""
    return value.name if isinstance(value, Path) else value["name"]


@pytest.fixture(scope="module", params=TARGETS, ids=lambda harness: harness.__module__.rpartition(".")[2])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    with request.param.start(tmp_path_factory.mktemp("target")) as harness:
        yield harness


@pytest.mark.skipif(not FOUND, reason="the folder of found stores isn't beside this checkout")
@pytest.mark.parametrize(("store", "truth"), FOUND, ids=name_of)
def test_a_found_chroma_collection_moves_whole(
    store: Path, truth: dict, target: Harness, tmp_path: Path
) -> None:
    folder = field.writable_copy(store, tmp_path)
    before = field.bytes_of(folder)
    config = MigrationConfig(
        source=f"chroma:{folder}#{truth['name']}",
        target=target.store.address(f"{truth['name']}_{truth['rows']}"),
        partition_size=20,
        batch_size=7,
    )
    report = run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path / "home")))
    assert report.status == "complete"
    assert report.records["verified"] == truth["rows"]
    found = field.truth(target.read(f"{truth['name']}_{truth['rows']}"))
    assert found["vectors_checksum"] == pytest.approx(truth["vectors_checksum"], abs=1e-3)
    del found["vectors_checksum"]
    assert found == {name: truth[name] for name in found}
    assert field.bytes_of(folder) == before
    assert not list(folder.rglob("*-journal")) + list(folder.rglob("*-wal"))


@pytest.mark.skipif(not FOUND, reason="the folder of found stores isn't beside this checkout")
def test_a_store_on_a_read_only_path_is_read(target: Harness, tmp_path: Path) -> None:
    store, truth = FOUND[0]
    config = MigrationConfig(
        source=f"chroma:{store}#{truth['name']}", target=target.store.address("read_only"), workers=1
    )
    report = run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path)))
    assert report.status == "complete"
