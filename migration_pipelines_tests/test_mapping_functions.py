"""Mapping by functions of whole batches, by models that embed anew, and by fitted projections."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pydantic import ValidationError

from migration_pipelines import VectorStoreMigrator, fit_pca
from migration_pipelines.batch import DOCUMENT, VECTOR, dense_matrix
from migration_pipelines.errors import (
    ConfigurationError,
    PlanChangedError,
    SchemaMappingError,
    TransientError,
)
from migration_pipelines.reduction import Projection
from migration_pipelines.schema_mapping import SchemaMapping
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.conformance import read_all
from migration_pipelines_tests.records import Record, from_batches, plain_records, plain_schema, to_batch

_names = (f"functions{number}" for number in itertools.count())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VECTOR_MIGRATE_HOME", str(tmp_path / "home"))
    yield
    EMBEDDED.clear()


def store_of(records: list[Record]) -> Any:
    store = MemoryStore(name=next(_names))
    store.create(plain_schema("docs"))
    store.upsert("docs", to_batch(records, plain_schema("docs")))
    return store


def content(store: Any) -> list[Record]:
    return sorted(read_all(store, "docs"), key=lambda record: str(record.id))


# ── functions of whole batches ───────────────────────────────────────────────────────────────────────


def shout(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A hook that changes documents."""
    at = batch.schema.get_field_index(DOCUMENT)
    return batch.set_column(at, DOCUMENT, pc.utf8_upper(batch.column(DOCUMENT)))


def forget(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A hook that loses a record."""
    return batch.slice(1)


def narrow(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A hook that loses a column."""
    return batch.drop_columns([DOCUMENT])


def fail(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A hook that fails."""
    raise KeyError("nothing")


def test_hooks_run_before_and_after_all_rules() -> None:
    batch = to_batch(plain_records(3), plain_schema("docs"))
    before = SchemaMapping(before=shout, document_to="text").apply(batch).batch
    after = SchemaMapping(after=[shout], document_to="text").apply(batch).batch
    texts = [
        [(record.metadata or {})["text"] for record in from_batches([found])] for found in (before, after)
    ]
    assert texts[0] == [record.document.upper() for record in plain_records(3) if record.document]
    assert texts[1] == [record.document for record in plain_records(3)]


@pytest.mark.parametrize("hook", [forget, narrow, fail])
def test_a_hook_that_changes_more_than_values_is_refused_by_name(hook: Any) -> None:
    batch = to_batch(plain_records(3), plain_schema("docs"))
    for where in ("before", "after"):
        with pytest.raises(SchemaMappingError, match=hook.__name__):
            SchemaMapping(**{where: hook}).apply(batch)


def test_a_plan_knows_hooks_by_their_names() -> None:
    assert "shout" in str(SchemaMapping(before=shout).document())
    assert SchemaMapping(before=shout).digest() != SchemaMapping(after=shout).digest()
    assert SchemaMapping(before=shout).uses_functions
    assert not SchemaMapping(before=shout).changes_nothing
    with pytest.raises(ConfigurationError, match="before"):
        SchemaMapping(before=shout).inverse()


@pytest.mark.parametrize("given", ["lower", {"call": "os.system"}, lambda batch: batch])
def test_hooks_are_functions_that_can_be_named(given: Any) -> None:
    with pytest.raises(ValidationError):
        SchemaMapping(before=given)


def test_hooked_records_are_proven_to_have_arrived() -> None:
    source, target = store_of(plain_records(20)), MemoryStore(name=next(_names))
    migrator = VectorStoreMigrator(source, target)
    result = migrator.migrate("docs", schema_mapping={"after": shout}, batch_size=7)
    assert result.success, result.errors
    assert [record.document for record in content(target)] == [
        record.document.upper() for record in plain_records(20) if record.document
    ]


# ── embedded anew ────────────────────────────────────────────────────────────────────────────────────

EMBEDDED: list[int] = []


def by_length(texts: list[str]) -> Any:
    """A model."""
    EMBEDDED.append(len(texts))
    return np.array([[len(text), text.count(" "), 1] for text in texts], np.float32)


def too_wide(texts: list[str]) -> Any:
    """A model of other dimensions."""
    return np.zeros((len(texts), 7), np.float32)


FAILURES: list[Exception] = []


def away(texts: list[str]) -> Any:
    """A model behind a service that fails as often as `FAILURES` says."""
    if FAILURES:
        raise FAILURES.pop()
    return by_length(texts)


RULE = {"vectors": {"vector": {"embed": by_length, "dimensions": 3}}}
AWAY = {"vectors": {"vector": {"embed": away, "dimensions": 3}}}


def test_vectors_are_made_anew_from_the_documents_each_once() -> None:
    records = plain_records(50)
    source, target = store_of(records), MemoryStore(name=next(_names))
    result = VectorStoreMigrator(source, target).migrate("docs", schema_mapping=RULE, batch_size=20)
    assert result.success, result.errors
    assert sum(EMBEDDED) == 50  # neither by the plan nor by the proof
    found = content(target)
    for record in found:
        assert record.document is not None
        assert record.vectors[""].tolist() == [len(record.document), record.document.count(" "), 1]
    losses = [loss["detail"] for loss in result.metadata["losses"] if loss["kind"] == "mapped"]
    assert any("by_length, 3 dimensions" in detail for detail in losses)


def test_a_record_without_a_document_goes_by_on_error() -> None:
    records = [*plain_records(3), replace(plain_records(1, start=3)[0], document=None)]
    source, target = store_of(records), MemoryStore(name=next(_names))
    with pytest.raises(SchemaMappingError, match="no document to embed"):
        VectorStoreMigrator(source, target).migrate("docs", schema_mapping=RULE)
    assert target.list_collections() == []
    rejected = VectorStoreMigrator(source, target).migrate(
        "docs", schema_mapping={**RULE, "on_error": {"vector": "reject"}}
    )
    assert (rejected.vectors_migrated, rejected.vectors_failed) == (3, 1)
    assert "no document to embed" in rejected.errors[0]


@pytest.mark.parametrize("error", [TransientError("busy"), TimeoutError("slow"), ConnectionResetError("cut")])
def test_a_model_that_is_away_for_a_moment_is_asked_again(error: Exception) -> None:
    source, target = store_of(plain_records(50)), MemoryStore(name=next(_names))
    FAILURES[:] = [error, error]
    migrator = VectorStoreMigrator(source, target, retry_delay=0.001)
    result = migrator.migrate("docs", schema_mapping=AWAY, batch_size=20)
    assert (result.success, result.vectors_migrated, FAILURES) == (True, 50, [])


@pytest.mark.parametrize(
    ("error", "told", "calls"),
    [(TimeoutError("slow"), TransientError, 3), (FileNotFoundError("no model"), ConfigurationError, 1)],
)
def test_a_model_that_stays_away_is_asked_as_often_as_was_said_and_one_that_is_not_there_once(
    error: Exception, told: type[Exception], calls: int
) -> None:
    source, target = store_of(plain_records(3)), MemoryStore(name=next(_names))
    FAILURES[:] = [error] * 5
    migrator = VectorStoreMigrator(source, target, retry_delay=0.001, max_retries=2)
    with pytest.raises(told, match=str(error)):
        migrator.migrate("docs", schema_mapping=AWAY)
    assert len(FAILURES) == 5 - calls
    FAILURES.clear()


def test_a_model_that_gives_something_else_is_told() -> None:
    source, target = store_of(plain_records(3)), MemoryStore(name=next(_names))
    rule = {"vectors": {"vector": {"embed": too_wide, "dimensions": 3}}}
    with pytest.raises(ConfigurationError, match=r"too_wide gave \(3, 7\), \(3, 3\) was expected"):
        VectorStoreMigrator(source, target).migrate("docs", schema_mapping=rule)


@pytest.mark.parametrize(
    "rule", [{"embed": by_length}, {"dimensions": 3}, {"embed": "os.system", "dimensions": 3}]
)
def test_a_rule_that_embeds_is_whole(rule: Any) -> None:
    with pytest.raises(ValidationError):
        SchemaMapping(vectors={"vector": rule})


# ── projected ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def flat() -> Any:
    """A store whose vectors lie in a plane of 3 dimensions, of 8, off the origin."""
    rng = np.random.default_rng(5)
    axes = np.linalg.qr(rng.standard_normal((8, 3)))[0]
    points = (rng.standard_normal((400, 3)) * [5, 2, 1]) @ axes.T + 10
    return store_of(
        [
            replace(record, vectors={"": point.astype(np.float32)})
            for record, point in zip(plain_records(400), points, strict=True)
        ]
    )


def test_a_projection_keeps_the_distances_that_its_components_hold(flat: Any, tmp_path: Path) -> None:
    projection = fit_pca(flat, "docs", dimensions=3)
    assert projection.explained == pytest.approx(1)
    projection.save(tmp_path / "pca.npz")
    target = MemoryStore(name=next(_names))
    rule = {"vectors": {"vector": {"pca": str(tmp_path / "pca.npz")}}}
    result = VectorStoreMigrator(flat, target).migrate("docs", schema_mapping=rule)
    assert result.success, result.errors
    before = np.stack([record.vectors[""] for record in content(flat)]).astype(np.float64)
    after = np.stack([record.vectors[""] for record in content(target)]).astype(np.float64)
    assert after.shape == (400, 3)
    for row in (1, 17, 399):
        assert np.linalg.norm(before[0] - before[row]) == pytest.approx(
            np.linalg.norm(after[0] - after[row]), rel=1e-4
        )
    (loss,) = [loss for loss in result.metadata["losses"] if loss["kind"] == "mapped"]
    assert loss["detail"] == "projected to 3 of 8 dimensions, which hold 100.0% of the variance"


def test_fewer_components_hold_less(flat: Any) -> None:
    one, two = (fit_pca(flat, "docs", dimensions=number) for number in (1, 2))
    assert 0.7 < one.explained < two.explained < 1
    assert np.array_equal(one.components[0], two.components[0])


def test_the_same_seed_fits_the_same_projection(flat: Any) -> None:
    first, again, other = (fit_pca(flat, "docs", dimensions=2, sample=100, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.components, again.components)
    assert not np.array_equal(first.mean, other.mean)


def test_another_file_under_the_same_name_is_another_plan(flat: Any, tmp_path: Path) -> None:
    file = tmp_path / "pca.npz"
    fit_pca(flat, "docs", dimensions=3).save(file)
    rules = {"vectors": {"vector": {"pca": str(file)}}}
    mapping = SchemaMapping(**rules)
    target = MemoryStore(name=next(_names))
    assert VectorStoreMigrator(flat, target).migrate("docs", schema_mapping=rules, resume=True).success
    fit_pca(flat, "docs", dimensions=2).save(file)
    with pytest.raises(PlanChangedError):
        VectorStoreMigrator(flat, target).migrate("docs", schema_mapping=rules, resume=True)
    with pytest.raises(ConfigurationError, match="has changed"):
        mapping.apply(to_batch(plain_records(2), plain_schema("docs")))


def test_files_that_are_no_projection_are_refused_and_run_nothing(flat: Any, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    crafted = tmp_path / "crafted.npz"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    np.savez(crafted, mean=np.array([Evil()], object), components=np.zeros((1, 1)), explained=1.0)
    text = tmp_path / "text.npz"
    text.write_text("mean")
    for file in (crafted, text):
        with pytest.raises(ConfigurationError, match="no projection"):
            Projection.load(file)
    assert not ran.exists()
    with pytest.raises(ConfigurationError, match="can't be read"):
        SchemaMapping(vectors={"vector": {"pca": str(tmp_path / "none.npz")}})


def test_a_projection_of_other_dimensions_does_not_fit(flat: Any, tmp_path: Path) -> None:
    Projection(np.zeros(5, np.float32), np.eye(5, dtype=np.float32)[:2], 0.5).save(tmp_path / "pca.npz")
    mapping = SchemaMapping(vectors={"vector": {"pca": str(tmp_path / "pca.npz")}})
    with pytest.raises(ConfigurationError, match="5 dimensions; vector has 8"):
        mapping.map_schema(plain_schema("docs"))


def test_a_projection_needs_enough_vectors(flat: Any) -> None:
    with pytest.raises(ConfigurationError, match="can't be projected to 9"):
        fit_pca(flat, "docs", dimensions=9)


def test_rows_are_projected_alike_in_any_batch(flat: Any, tmp_path: Path) -> None:
    fit_pca(flat, "docs", dimensions=3).save(tmp_path / "pca.npz")
    mapping = SchemaMapping(vectors={"vector": {"pca": str(tmp_path / "pca.npz")}})
    (span, ids), *_ = flat.split("docs", span_records=400)
    (batch,) = flat.scan("docs", span, ids=ids, batch_records=400)
    whole = dense_matrix(mapping.apply(batch).batch.column(VECTOR))
    for row in (0, 123, 399):
        alone = dense_matrix(mapping.apply(batch.slice(row, 1)).batch.column(VECTOR))
        assert alone.tobytes() == whole[row].tobytes()
