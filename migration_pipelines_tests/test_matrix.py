"""Any store to any other: a hostile collection arrives whole, or what differs was listed as a loss before."""

from __future__ import annotations

import importlib
import pkgutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from migration_pipelines.envelope import decode
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import CollectionSchema, IdKind, Metric, VectorField
from migration_pipelines.store import Store
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests import harnesses
from migration_pipelines_tests.conformance import read_all
from migration_pipelines_tests.records import Record, from_batches, to_batch

KINDS = [module.name for module in pkgutil.iter_modules(harnesses.__path__) if module.name != "base"]

TEXT_IDS = [
    "plain", " ", "01", "-1", "true", "null", "naïve 漢字 🦜", "it's", 'say "hi"', "a\nb", "a\\b", "%s {0}",
    "$1", "'; DROP TABLE docs; --", "x" * 500, "é" * 250, "a\u0301", "á", "{}",
    "00000000-0000-4000-8000-00000000000A",
]  # fmt: skip
VALUES: list[Any] = [
    "", "text", "zéro 🦜", "22627", "null", "2024-01-01", "2024-01-01T00:00:00Z", "a\0b", True, False, 0, -1,
    2**53, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1, 2**70, 0.0, -0.0, 0.1, 0.1 + 0.2, 1e-300, 5e-324,
    1e22, 1e308, float("nan"), float("inf"), None, {}, {"a": {"b": [None, 1, "x"]}}, [], ["a", "b"],
    [1, 2], [0.5, 1.5], [True, False], [1, "a"], [[1], [2]], {"$typed": ["float", "nan"]},
    {"_source_id": '{"int":"5"}'},
]  # fmt: skip
KEYS = ["", " ", "$x", "#x", "id", "_id", "vector", "document", "metadata", "a.b", "a b", "ключ", "Title",
        "title", "_source_id", "_source_extra", "_additional", "$meta", "text", "x" * 300]  # fmt: skip
DOCUMENTS = ["", None, "text", "多 🦜", "line\nbreak", "quote ' \" \\", "a\0b", "x" * 20_000]


def hostile() -> list[Record]:
    """Records that each could break something; every one has a vector that any store takes."""
    integers: list[Any] = [1, 0, 2**53 + 1, 2**63 - 1]
    uuids: list[Any] = [uuid.UUID(int=1), uuid.UUID(int=2**128 - 1)]
    ids = [*integers, "1", "0", *uuids, str(uuids[0]), *TEXT_IDS]
    metadata: list[Any] = [None, {}, *({"value": value, "row": n} for n, value in enumerate(VALUES))]
    metadata += [{key: "v"} for key in KEYS]
    metadata += [{key: n for n, key in enumerate(KEYS)}]
    ids += [f"random {n}" for n in range(len(metadata) + 20 - len(ids))]
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((len(ids), 8)).astype(np.float32)
    vectors[0] = [0.1, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1e10, -1e10, 1.0]
    doubles = rng.random(len(ids)).tolist()
    return [
        Record(
            id=record_id,
            vectors={"": vectors[row]},
            document=DOCUMENTS[row % len(DOCUMENTS)],
            metadata=metadata[row] if row < len(metadata) else {"double": doubles[row]},
        )
        for row, record_id in enumerate(ids)
    ]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Store]]:
    """One engine of each kind, and in each the hostile collection, brought there from memory."""
    with ExitStack() as stack:
        found: dict[str, Store] = {}
        for kind in KINDS:
            module = importlib.import_module(f"migration_pipelines_tests.harnesses.{kind}")
            harness = module.HARNESSES[0].start(tmp_path_factory.mktemp(kind))
            found[kind] = stack.enter_context(harness).store
        home = tmp_path_factory.mktemp("home")
        schema = CollectionSchema(
            name="hostile",
            vectors=(VectorField(dimensions=8, metric=Metric.EUCLIDEAN),),
            id_kinds=frozenset(IdKind),
        )
        origin = MemoryStore(name="matrix-origin")
        origin.create(schema)
        origin.upsert("hostile", to_batch(hostile(), schema))
        for kind, store in found.items():
            move(origin, store, "hostile", f"from_{kind}" if kind == "memory" else "hostile", home)
        yield found


def move(source: Store, target: Store, name: str, there: str, home: Path) -> None:
    """Move a collection; it must arrive whole, and no loss may be one that isn't kept."""
    config = MigrationConfig(source=source.address(name), target=target.address(there), partition_size=50)
    migration = Migration(
        config=config, ledger=ledger_for(config, home), source_store=source, target_store=target
    )
    report = run_migration(migration)
    assert report.status == "complete", report.errors or report.checks
    assert report.records["verified"] == len(hostile())


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_a_hostile_collection_goes_from_any_store_to_any_other(
    engines: dict[str, Store], tmp_path: Path, first: str, second: str
) -> None:
    """What reaches memory in the end is what was there in the beginning, ids and all, bit for bit."""
    start = "from_memory" if first == "memory" else "hostile"
    there, back = f"{first}to{second}".replace("_", ""), MemoryStore(name=f"matrix-{first}-{second}")
    move(engines[first], engines[second], start, there, tmp_path)
    move(engines[second], back, there, "end", tmp_path)
    arrived, expected = named(without_envelope(back, "end")), named(hostile())
    assert arrived.keys() == expected.keys()
    assert [key for key in expected if arrived[key] != expected[key]] == []


def without_envelope(store: Store, collection: str) -> list[Record]:
    """Records as a reader sees them who knows of the envelope, as every phase of the engine does."""
    schema = store.describe(collection)
    return from_batches([decode(to_batch(read_all(store, collection), schema))])


def named(records: list[Record]) -> dict[Any, Any]:
    """Records in their exact form; the one vector under any name counts as the default one."""
    plain = [replace(record, vectors={"": next(iter(record.vectors.values()))}) for record in records]
    return {record.key(): record.exact() for record in plain}
