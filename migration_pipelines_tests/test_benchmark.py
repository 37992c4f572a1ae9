"""The benchmark on few records: everything is measured, everything is cleaned up."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from migration_pipelines import benchmark
from migration_pipelines.benchmark import Benchmark, Rate, Transfer, run_benchmark
from migration_pipelines.benchmark.data import pages
from migration_pipelines.benchmark.drivers import faiss as bare_faiss
from migration_pipelines.benchmark.drivers import parquet as bare_parquet
from migration_pipelines.benchmark.one_store import run_store_benchmark
from migration_pipelines.stores.chroma import ChromaStore
from migration_pipelines.stores.faiss import FaissStore
from migration_pipelines.stores.milvus import MilvusStore
from migration_pipelines.stores.parquet import ParquetStore
from migration_pipelines.stores.qdrant import QdrantStore
from migration_pipelines_tests.conformance import scanned, spans_of
from migration_pipelines_tests.harnesses.pgvector import PgVectorHarness, fresh_database
from migration_pipelines_tests.records import from_batches, plain_schema
from migration_pipelines_tests.shell import Shell, shell

__all__ = ["shell"]

FOUND = Benchmark(
    records=100_000,
    dimensions=384,
    reader=Rate(records=100_000, seconds=4.0),
    writer=Rate(records=100_000, seconds=1.0),
    guides=Rate(records=5_000, seconds=2.5),
    transfer=Transfer(
        records=100_000,
        seconds=5.0,
        plan_seconds=3.0,
        index_seconds=20.0,
        total_seconds=28.0,
        verified=100_000,
        opened=400_000_000,
        peak=480_000_000,
        anonymous_opened=300_000_000,
        anonymous_peak=360_000_000,
    ),
)


def tables(url: str) -> list[str]:
    with psycopg.connect(url) as connection:
        return [
            name
            for (name,) in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        ]


def test_everything_is_measured_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with fresh_database() as url:
        monkeypatch.setenv("PGVECTOR_URL", url)
        found = run_benchmark(records=1_500, dimensions=8, home=tmp_path, tell=said.append)
        assert tables(url) == []
    assert found.transfer.verified == found.reader.records == found.writer.records == 1_500
    assert all(rate.seconds > 0 for rate in (found.reader, found.writer, found.guides, found.transfer))
    assert found.transfer.peak >= found.transfer.opened > 0
    assert said[0].startswith("writing 1,500 records into Chroma")
    assert [path.name for path in (tmp_path / "benchmark").iterdir()] == ["chroma-1500x8"]


def test_a_prepared_folder_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmark" / "chroma-1000x4").mkdir(parents=True)
    monkeypatch.setenv("PGVECTOR_URL", "postgresql://nowhere")
    asked: list[str] = []

    def measure(name: str, *_: object) -> object:
        asked.append(name)
        return getattr(FOUND, name, None)

    monkeypatch.setattr(benchmark, "_in_a_process", measure)
    run_benchmark(records=1_000, dimensions=4, home=tmp_path)
    assert asked == ["reader", "transfer", "writer", "guides", "clean_up"]


def test_records_are_the_same_each_time_and_of_the_promised_size() -> None:
    first, again = (list(pages(6_000, 16)) for _ in range(2))
    assert [len(page.ids) for page in first] == [5_000, 1_000]
    assert first[1].documents == again[1].documents
    assert (first[0].vectors == again[0].vectors).all()
    lengths = [len(text) for text in first[0].documents]
    assert 250 < sum(lengths) / len(lengths) < 310
    assert all(len(fields) == 6 for fields in first[0].metadatas)
    assert len({record_id for page in first for record_id in page.ids}) == 6_000


def test_ratios_are_those_of_the_rates(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "run_benchmark", lambda **_: FOUND)
    document = shell("benchmark", "--json").document
    assert document["ratios"] == {"of_reader": 0.8, "of_writer": 0.2, "times_guides": 10.0}
    assert document["memory_above_opened"] == 80_000_000
    text = shell("benchmark").out
    for expected in (
        "0.80 (at least 0.85",
        "10.0 (at least 12",
        "80 MB above the opened stores' 400 MB",
        "20,000",
    ):
        assert expected in text


def test_a_store_is_measured_beside_its_driver_and_nothing_of_it_remains(pg: PgVectorHarness) -> None:
    before = pg.store.list_collections()
    found = run_store_benchmark(pg.store, records=1_000, dimensions=8)
    for rate in (found.driver_read, found.read, found.driver_write, found.write):
        assert rate.records == 1_000
        assert rate.seconds > 0
    assert found.document()["ratios"] == {"read": found.of_driver_read, "write": found.of_driver_write}
    assert pg.store.list_collections() == before


@pytest.mark.parametrize(("kind", "bare"), [(ParquetStore, bare_parquet), (FaissStore, bare_faiss)])
def test_a_bare_loop_over_files_leaves_a_collection_as_whole_as_ours(
    kind: Any, bare: Any, tmp_path: Path
) -> None:
    """Or the ratio would compare unlike things."""
    store, schema, sample = kind(path=tmp_path), plain_schema("docs", dimensions=8), list(pages(6_000, 8))
    store.create(schema)
    assert bare.bare_write(store, "docs", sample) == bare.bare_read(store, "docs") == 6_000
    found = from_batches(scanned(store, "docs", spans_of(store, "docs", 20_000)))
    assert [record.id for record in found] == [name for page in sample for name in page.ids]
    for record, number in ((found[0], 0), (found[5_999], 999)):
        page = sample[0] if number == 0 else sample[1]
        assert (record.vectors[""] == page.vectors[number]).all()
        assert (record.document, record.metadata) == (page.documents[number], page.metadatas[number])


@pytest.mark.parametrize("kind", [ParquetStore, FaissStore])
def test_stores_in_files_are_measured_until_they_are_published(kind: Any, tmp_path: Path) -> None:
    found = run_store_benchmark(kind(path=tmp_path), records=500, dimensions=8)
    assert {found.driver_read.records, found.read.records, found.write.records} == {500}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "name"), [(ChromaStore, "chroma"), (QdrantStore, "qdrant"), (MilvusStore, "milvus.db")]
)
def test_an_embedded_engine_is_measured_by_its_driver_and_by_us_in_turns(
    kind: Any, name: str, tmp_path: Path
) -> None:
    """Though it takes one opening of its files at a time, or one set of settings."""
    with closing(kind(path=str(tmp_path / name))) as store:
        found = run_store_benchmark(store, records=500, dimensions=8)
        assert {found.driver_read.records, found.read.records, found.driver_write.records} == {500}
        assert store.list_collections() == []
