"""Folders that other versions of Chroma wrote are read whole, and stay what they were."""

from __future__ import annotations

import importlib.util
import json
import logging
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migration_pipelines import errors
from migration_pipelines.model import Metric
from migration_pipelines.store import open_address
from migration_pipelines.stores.chroma import ChromaStore
from migration_pipelines_tests import field
from migration_pipelines_tests.records import Record, by_id, from_batches
from migration_pipelines_tests.shell import Shell, shell

__all__ = ["shell"]

FOLDERS = Path(__file__).parent / "data" / "chroma"
VERSIONS = sorted(path.name.removesuffix(".tar.xz") for path in FOLDERS.glob("*.tar.xz"))
METRICS = {"squares": Metric.EUCLIDEAN, "angles": Metric.COSINE, "products": Metric.DOT}
LEGACY = "0.3.29"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("write_folder", FOLDERS / "write_folder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def folder_of(version: str, tmp_path: Path) -> Path:
    """The folder that a version wrote, unpacked."""
    folder = tmp_path / "db"
    with tarfile.open(FOLDERS / f"{version}.tar.xz") as archive:
        archive.extractall(folder)
    return folder


def expected(name: str, version: str) -> list[Record]:
    found = SCRIPT.expected(sorted(SCRIPT.SPACES).index(name), merges=version != LEGACY)
    return [
        Record(text, {"": pa.array(vector, pa.float32()).to_numpy()}, document, metadata)
        for text, (vector, document, metadata) in found.items()
    ]


def read_all(store: Any, name: str) -> list[Record]:
    return [
        record
        for span, ids in store.split(name, span_records=15)
        for record in from_batches(store.scan(name, span, ids=ids, batch_records=4))
    ]


def test_the_versions_are_there() -> None:
    assert VERSIONS[0] == LEGACY
    assert {version.rpartition(".")[0] for version in VERSIONS} == {"0.3", "0.4", "0.5", "0.6", "1.0"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_of_another_version_is_read_whole(version: str, tmp_path: Path) -> None:
    folder = folder_of(version, tmp_path)
    before = field.bytes_of(folder)
    store = ChromaStore(path=str(folder)).for_reading(tmp_path / "scratch")
    assert store.list_collections() == ["angles", "empty", "products", "squares"]
    for name, metric in METRICS.items():
        found = read_all(store, name)
        assert store.count(name) == len(found)
        assert store.describe(name).vectors[0].metric is metric
        assert store.describe(name).vectors[0].dimensions == 4
        assert store.describe(name).properties == SCRIPT.PROPERTIES
        _assert_same(found, expected(name, version), exact=metric is not Metric.COSINE)
    assert read_all(store, "empty") == []
    assert store.describe("empty").vectors[0].dimensions is None
    with pytest.raises(errors.CollectionNotFoundError, match="angles"):
        store.count("gone")
    assert store.fingerprint("squares") == store.fingerprint("squares") != store.fingerprint("angles")
    assert store._client is None
    store.close()
    assert field.bytes_of(folder) == before


def _assert_same(found: list[Record], wanted: list[Record], *, exact: bool) -> None:
    if exact:
        assert by_id(found) == by_id(wanted)
        return
    others = {record.id: record for record in wanted}
    assert others.keys() == {record.id for record in found}
    for record in found:
        other = others[record.id]
        assert (record.document, record.metadata) == (other.document, other.metadata)
        assert record.vectors[""] == pytest.approx(other.vectors[""], rel=1e-6)


@pytest.mark.parametrize("version", [LEGACY, "0.4.0"])
def test_a_folder_that_no_client_of_today_opens_is_moved(version: str, shell: Shell, tmp_path: Path) -> None:
    folder = folder_of(version, tmp_path)
    target = tmp_path / "out"
    found = shell("run", "--source", f"chroma:{folder}#squares", "--target", f"parquet:{target}#squares")
    assert found.status == 0, found.everything
    store, name = open_address(f"parquet:{target}#squares")
    assert by_id(read_all(store, name or "")) == by_id(expected("squares", version))


# ── the layout of 0.3 ────────────────────────────────────────────────────────────────────────────────


def rewrite(folder: Path, change: Any) -> None:
    """Change the rows of the records' file."""
    path = folder / "chroma-embeddings.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def test_records_of_03_without_a_vector_are_named_and_the_others_arrive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(LEGACY, tmp_path)

    def damage(rows: list[dict[str, Any]]) -> None:
        by_number = {row["id"]: row for row in rows[:41]}
        by_number["id9"]["embedding"] = None
        by_number["id11"]["embedding"] = [1.0, 2.0]

    rewrite(folder, damage)
    store = ChromaStore(path=str(folder)).for_reading(tmp_path / "scratch")
    (name,) = (name for name in METRICS if store._collection_of(name).readable < store.count(name))
    spans = list(store.split(name, span_records=15))
    arrived: list[Record] = []
    named: list[str] = []
    for span, ids in spans:
        try:
            arrived += from_batches(store.scan(name, span, ids=ids, batch_records=4))
        except errors.StoreRefusedError as error:
            named += error.facts["records"]
    assert sorted(named) == ["id11", "id9"]
    assert "2 of" in caplog.text
    assert len(arrived) == store.count(name) - 2


def test_doubles_of_03_are_rounded_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(LEGACY, tmp_path)
    inexact = {"embedding": [0.1, 0.2, 0.3, 0.4], "metadata": '{"x": NaN, "y": 1}'}
    rewrite(folder, lambda rows: rows[0].update(inexact))
    store = ChromaStore(path=str(folder)).for_reading(tmp_path / "scratch")
    with caplog.at_level(logging.WARNING):
        names = [name for name in METRICS if store.count(name)]
    assert "1 records hold doubles" in caplog.text
    assert len(names) == 3


def test_a_folder_of_03_is_a_source_and_nothing_else(tmp_path: Path) -> None:
    folder = folder_of(LEGACY, tmp_path)
    before = field.bytes_of(folder)
    store = ChromaStore(path=str(folder))
    assert store.list_collections() == ["angles", "empty", "products", "squares"]
    with pytest.raises(errors.CollectionNotFoundError, match=r"0\.3"):
        store.begin_load("squares")
    assert field.bytes_of(folder) == before


# ── what 0.5 wrote and didn't go by ──────────────────────────────────────────────────────────────────


def test_the_configuration_that_05_wrote_but_did_not_use_is_not_believed(tmp_path: Path) -> None:
    folder = folder_of("0.5.23", tmp_path)
    with sqlite3.connect(folder / "chroma.sqlite3") as file:
        (text,) = file.execute("SELECT config_json_str FROM collections WHERE name = 'angles'").fetchone()
    file.close()
    assert json.loads(text)["hnsw_configuration"]["space"] == "l2"
    store = ChromaStore(path=str(folder)).for_reading(tmp_path / "scratch")
    assert store.describe("angles").vectors[0].metric is Metric.COSINE
