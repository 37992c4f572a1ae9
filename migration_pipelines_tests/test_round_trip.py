"""Chroma → pgvector → Parquet → Chroma: equal, or the loss is listed with its count beforehand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from migration_pipelines.batch import DOCUMENT, ID, METADATA, VECTOR, dense_matrix
from migration_pipelines.compare import compare_collections
from migration_pipelines.demo import SAMPLE
from migration_pipelines.envelope import decode
from migration_pipelines.errors import LossNotAcceptedError
from migration_pipelines.metadata import load_metadata
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import CollectionSchema, IdKind, Metric, VectorField
from migration_pipelines.plan import draft
from migration_pipelines.store import open_address
from migration_pipelines.validate import Report
from migration_pipelines_tests.harnesses import chroma, memory, parquet, pgvector
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record, by_id, from_batches, plain_schema, to_batch

STORES = {"chroma": chroma, "pgvector": pgvector, "parquet": parquet, "memory": memory}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Harness]]:
    """One engine of each kind."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield {
            name: stack.enter_context(module.HARNESSES[0].start(tmp_path_factory.mktemp(name)))
            for name, module in STORES.items()
        }


def move(source: str, target: str, home: Path, **settings: Any) -> Report:
    config = MigrationConfig(source=source, target=target, partition_size=1_000, **settings)
    return run_migration(Migration(config=config, ledger=ledger_for(config, home)))


def planned_losses(source: str, target: str, home: Path) -> dict[tuple[str, str], int]:
    config = MigrationConfig(source=source, target=target)
    with Migration(config=config, ledger=ledger_for(config, home)) as migration:
        return {(loss.field, loss.kind): loss.count for loss in draft(migration).losses}


def sample(records: int) -> list[Record]:
    table = pq.read_table(SAMPLE).slice(0, records).combine_chunks()
    vectors = dense_matrix(table.column(VECTOR).chunk(0))
    rows = zip(
        table[ID].to_pylist(), vectors, table[DOCUMENT].to_pylist(), table[METADATA].to_pylist(), strict=True
    )
    return [Record(id=i, vectors={"": v}, document=d, metadata=load_metadata(m)) for i, v, d, m in rows]


HOSTILE_IDS = [
    "plain", "", " ", "1", "01", "-1", "1.0", "true", "null", "naïve 漢字 🦜", "it's", 'say "hi"', "a\nb",
    "a\tb", "a\\b", "%s %(x)s {0} {{x}}", "'; DROP TABLE docs; --", "$1", "x" * 500, "é" * 250,
    "\u202eright", "a\u0301",
]  # fmt: skip


def hostile(*, ids: list[Any] = HOSTILE_IDS, metric: Metric = Metric.EUCLIDEAN) -> list[Record]:
    """Records that each could break something; all can be held by Chroma."""
    numbers = random.Random(7)
    vectors = np.random.default_rng(7).standard_normal((len(ids) + 400, 8)).astype(np.float32)
    vectors[0] = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1.0]
    vectors[1] = 0
    values: list[Any] = [
        "", "text", "zéro 🦜", "22627", "null", "NaN", "{}", "[1]", True, False, 0, -1, 2**53, 2**53 + 1,
        2**63 - 1, -(2**63), 0.0, 0.1, 1.5, 1e-300, 123456789.123,
        ["a", "b"], [1, 2], [0.5, 1.5], [True, False],
    ]  # fmt: skip
    documents = ["", None, "text", "多 🦜", "line\nbreak", "quote ' \" \\", "x" * 20_000]
    records = [
        Record(
            id=record_id,
            vectors={"": vectors[row]},
            document=documents[row % len(documents)],
            metadata=None if row % 11 == 3 else {"value": values[row % len(values)], "row": row, "ключ": "k"},
        )
        for row, record_id in enumerate(ids)
    ]
    return records + [
        Record(id=f"random {n}", vectors={"": vectors[len(ids) + n]}, metadata={"double": numbers.random()})
        for n in range(400)
    ]


def test_the_sample_makes_the_round_trip_bit_for_bit(stores: dict[str, Harness], tmp_path: Path) -> None:
    records = sample(1_200)
    schema = plain_schema("sample", dimensions=384, metric=Metric.DOT)
    stores["chroma"].write(schema, records)
    chain = ["chroma", "pgvector", "parquet", "chroma"]
    addresses = [stores[kind].store.address("sample" if at < 3 else "back") for at, kind in enumerate(chain)]
    for source, target in itertools.pairwise(addresses):
        assert move(source, target, tmp_path).status == "complete"
    assert by_id(stores["chroma"].read("back")) == by_id(records)
    assert by_id(stores["pgvector"].read("sample")) == by_id(records)
    assert by_id(stores["parquet"].read("sample")) == by_id(records)


def test_cosine_into_chroma_is_a_loss_that_must_be_accepted(
    stores: dict[str, Harness], tmp_path: Path
) -> None:
    schema = plain_schema("cosine", dimensions=384, metric=Metric.COSINE)
    stores["parquet"].write(schema, sample(200))
    addresses = [stores[kind].store.address("cosine") for kind in ("parquet", "chroma")]
    with pytest.raises(LossNotAcceptedError, match="vector-rounding, 200 records"):
        move(*addresses, tmp_path)
    assert "cosine" not in stores["chroma"].store.list_collections()
    report = move(*addresses, tmp_path, allow_losses=("vector-rounding",))
    assert report.status == "complete"
    both = compare_collections(
        open_address(addresses[0])[0], "cosine", open_address(addresses[1])[0], "cosine"
    )
    assert both.agrees
    assert both.equal + both.within_tolerance == 200


@pytest.mark.parametrize("second", ["pgvector", "parquet", "memory", "chroma"])
@pytest.mark.parametrize("first", ["chroma", "pgvector", "parquet", "memory"])
def test_a_hostile_collection_makes_any_round_trip(
    stores: dict[str, Harness], tmp_path: Path, first: str, second: str
) -> None:
    """There and back again is the same, whatever the second store had to keep in the envelope."""
    name = f"hostile_{first}_{second}"
    start, there = stores[first].store.address(name), stores[second].store.address(f"{name}_there")
    back = stores[first].store.address(f"{name}_back")
    # What Chroma holds of random doubles is what it gives back, not what it was given.
    ids = [record_id for record_id in HOSTILE_IDS if record_id or first != "chroma"]
    stores[first].write(plain_schema(name, dimensions=8), hostile(ids=ids))
    records = stores[first].read(name)
    losses = planned_losses(start, there, tmp_path)
    assert move(start, there, tmp_path).status == "complete"
    assert move(there, back, tmp_path).status == "complete"
    if first != "chroma" and second == "chroma":
        assert losses["double", "float"] > 0
    both = compare_collections(stores[first].store, name, stores[second].store, f"{name}_there")
    assert both.agrees, both.examples
    arrived, expected = by_id(without_envelope(stores[first].read(f"{name}_back"))), by_id(records)
    assert arrived.keys() == expected.keys()
    assert [key for key in expected if arrived[key] != expected[key]] == []


def without_envelope(records: list[Record]) -> list[Record]:
    """Records as a reader sees them who knows of the envelope."""
    return from_batches([decode(to_batch(records, plain_schema("any")))])


def test_one_and_text_one_stay_different(stores: dict[str, Harness], tmp_path: Path) -> None:
    schema = CollectionSchema(
        name="mixed",
        vectors=(VectorField(dimensions=8, metric=Metric.EUCLIDEAN),),
        id_kinds=frozenset(IdKind),
    )
    vectors = np.eye(8, dtype=np.float32)
    ids: list[Any] = [1, "1", 2**63 - 1, str(2**63 - 1), -5, "-5"]
    records = [Record(id=i, vectors={"": vectors[n]}, metadata={"n": n}) for n, i in enumerate(ids)]
    stores["memory"].write(schema, records)
    start = stores["memory"].store.address("mixed")
    for kind in ("pgvector", "chroma", "parquet"):
        there, back = stores[kind].store.address("mixed"), stores["memory"].store.address(f"mixed_{kind}")
        assert planned_losses(start, there, tmp_path).get(("id", "id"), 6 if kind == "parquet" else 0) == 6
        assert move(start, there, tmp_path).status == "complete"
        assert move(there, back, tmp_path).status == "complete"
        assert by_id(stores["memory"].read(f"mixed_{kind}")) == by_id(records)


def test_what_only_memory_can_hold_comes_back_from_everywhere(
    stores: dict[str, Harness], tmp_path: Path
) -> None:
    """Nulls, nesting, big integers, NaN, NUL characters, empty objects, no metadata."""
    values: list[Any] = [
        None, {}, {"a": {"b": [None, 1, "x"]}}, [], [1, "a"], 2**64 - 1, 2**70, float("nan"), float("inf"),
        -0.0, 1e22, 1e308, 5e-324, "a\0b", {"$typed": ["float", "nan"]}, {"_source_id": '{"int":"5"}'},
    ]  # fmt: skip
    keys = [
        "value",
        "",
        "$x",
        "#x",
        "chroma:document",
        "_source_id",
        "_source_extra",
        "document",
        "id",
        "a.b",
    ]
    metadata: list[Any] = [None, {}, *({"value": value} for value in values), *({key: "v"} for key in keys)]
    documents = [None, "", "a\0b", "plain"]
    records = [
        Record(id=f"r{n}", vectors={"": np.full(8, n, np.float32)}, document=documents[n % 4], metadata=item)
        for n, item in enumerate(metadata)
    ]
    stores["memory"].write(plain_schema("odd"), records)
    start = stores["memory"].store.address("odd")
    for kind in ("pgvector", "chroma", "parquet"):
        there, back = stores[kind].store.address("odd"), stores["memory"].store.address(f"odd_{kind}")
        losses = planned_losses(start, there, tmp_path)
        assert bool(losses) == (kind != "parquet")
        assert move(start, there, tmp_path).status == "complete"
        assert move(there, back, tmp_path).status == "complete"
        # The user's own fields that are called as the envelope is come back inside one.
        assert by_id(without_envelope(stores["memory"].read(f"odd_{kind}"))) == by_id(records)
