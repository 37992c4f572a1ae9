"""Stores as they were found move whole, and are byte for byte what they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from migration_pipelines.envelope import decode
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines_tests import field
from migration_pipelines_tests.conformance import read_all
from migration_pipelines_tests.harnesses import memory, parquet, pgvector, qdrant
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record, from_batches, to_batch

# How each kind of found store is named. Qdrant's found points hold their text under a key of their own.
ADDRESSES = {
    "chroma": "chroma:{store}#{name}",
    "faiss": "faiss:{store}#index",
    "milvus": "milvus:{store}#{name}",
    "qdrant": "qdrant:{store}?document_field=text#{name}",
}
FOUND = [(kind, *found) for kind in ADDRESSES for found in field.collections(kind)]
TARGETS = [module.HARNESSES[0] for module in (memory, parquet, pgvector, qdrant)]
# The sum of all components' magnitudes in the manifest is rounded to so much.
CHECKSUM_DIGITS = 1e-3


def name_of(value: Any) -> str:
    """How a store's kind, its path or a collection's truth is called in a test's name."""
    if isinstance(value, Path):
        return value.parent.name.partition("+")[2] or value.parent.name
    return value["name"] if isinstance(value, Mapping) else str(value)


@pytest.fixture(scope="module", params=TARGETS, ids=lambda harness: harness.__module__.rpartition(".")[2])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    with request.param.start(tmp_path_factory.mktemp("target")) as harness:
        yield harness


@pytest.mark.skipif(not FOUND, reason="the folder of found stores isn't beside this checkout")
@pytest.mark.parametrize(("kind", "store", "truth"), FOUND, ids=name_of)
def test_a_found_collection_moves_whole(
    kind: str, store: Path, truth: Mapping[str, Any], target: Harness, tmp_path: Path
) -> None:
    copy = field.writable_copy(store, tmp_path)
    before = field.bytes_of(copy)
    name = f"{kind}{truth['rows']}"
    config = MigrationConfig(
        source=ADDRESSES[kind].format(store=copy, name=truth["name"]),
        target=target.store.address(name),
        partition_size=20,
        batch_size=7,
        allow_losses=("vector-rounding",),  # where Qdrant keeps directions only; stated, and checked below
    )
    report = run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path / "home")))
    assert report.status == "complete", report.errors
    assert report.records["verified"] == truth["rows"]
    found = field.truth(originals(target, name))
    assert found.pop("vectors_checksum") == pytest.approx(truth["vectors_checksum"], abs=CHECKSUM_DIGITS)
    assert found == {name: truth[name] for name in found}
    assert field.bytes_of(copy) == before


def originals(target: Harness, collection: str) -> list[Record]:
    """What the target holds, as a reader sees it who knows of the envelope."""
    # Under cosine Qdrant holds directions; their lengths lie beside them, and its connector joins the two.
    is_direct = target.store.kind != "qdrant"
    records = target.read(collection) if is_direct else read_all(target.store, collection)
    return from_batches([decode(to_batch(records, target.store.describe(collection)))])


@pytest.mark.skipif(not FOUND, reason="the folder of found stores isn't beside this checkout")
@pytest.mark.parametrize(("kind", "store", "truth"), FOUND, ids=name_of)
def test_a_store_on_a_read_only_path_is_read(
    kind: str, store: Path, truth: Mapping[str, Any], tmp_path: Path
) -> None:
    source = ADDRESSES[kind].format(store=store, name=truth["name"])
    config = MigrationConfig(source=source, target=f"memory:{tmp_path}#found", workers=1)
    report = run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path)))
    assert report.status == "complete", report.errors
