"""A user's own mapping: each rule on a batch, the vocabulary of steps, and whole runs."""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from migration_pipelines.compare import compare_collections
from migration_pipelines.declarations import read_declarations, read_mapping
from migration_pipelines.errors import (
    ConfigurationError,
    PlanChangedError,
    SchemaMappingError,
    TargetNotEmptyError,
)
from migration_pipelines.mapping_steps import parse_step
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import DType, Metric, VectorField, VectorKind
from migration_pipelines.plan import draft, make_plan
from migration_pipelines.quality import run_quality
from migration_pipelines.schema_mapping import SchemaMapping
from migration_pipelines.store import Store, open_address
from migration_pipelines_tests.dagster_project import Project
from migration_pipelines_tests.records import Record, from_batches, plain_records, plain_schema, to_batch
from migration_pipelines_tests.shell import Shell, shell

__all__ = ["shell"]
_names = (f"mapping{number}" for number in itertools.count())


def loud(value: Any) -> Any:
    """A step of the user's own."""
    return f"{value}!"


def to_a_set(value: Any) -> Any:
    """A step whose result no metadata can hold."""
    return {value}


def mapping(**rules: Any) -> SchemaMapping:
    return SchemaMapping(**rules)


def apply(metadata: dict[str, Any] | None, document: str | None = "text", **rules: Any) -> Record:
    """One record after some rules."""
    (found,) = apply_all([metadata], document, **rules)
    return found


def apply_all(
    metadata: list[dict[str, Any] | None], document: str | None = None, **rules: Any
) -> list[Record]:
    schema = plain_schema("docs", dimensions=2)
    records = [
        Record(id=f"r{n}", vectors={"": np.ones(2, "f4")}, document=document, metadata=fields)
        for n, fields in enumerate(metadata)
    ]
    return from_batches([mapping(**rules).apply(to_batch(records, schema)).batch])


# ── fields ───────────────────────────────────────────────────────────────────────────────────────────


def test_fields_are_renamed_all_at_once() -> None:
    found = apply({"a": 1, "b": 2, "c": 3}, field_mapping={"a": "b", "b": "a"})
    assert found.metadata == {"b": 1, "a": 2, "c": 3}


def test_only_included_fields_travel() -> None:
    assert apply({"a": 1, "b": 2}, include_fields=["b", "x"]).metadata == {"b": 2}


def test_excluded_fields_stay_behind_and_the_last_one_leaves_an_empty_object() -> None:
    assert apply({"a": 1}, exclude_fields=["a"]).metadata == {}


def test_a_record_without_metadata_stays_without() -> None:
    assert apply(None, field_mapping={"a": "b"}, transforms={"b": "lower"}).metadata is None


def test_a_default_fills_what_is_absent_and_leaves_null_alone() -> None:
    found = apply_all([{"a": 1}, {"lang": None}, None], defaults={"lang": "en"})
    assert [record.metadata for record in found] == [{"a": 1, "lang": "en"}, {"lang": None}, {"lang": "en"}]


def test_two_fields_of_one_new_name_are_an_error_of_the_record() -> None:
    assert apply({"titel": "x"}, field_mapping={"titel": "title"}).metadata == {"title": "x"}
    with pytest.raises(SchemaMappingError, match=r"'r0': title: two of the record's fields"):
        apply({"titel": "x", "title": "y"}, field_mapping={"titel": "title"})


def test_rules_are_applied_in_the_documented_order() -> None:
    found = apply(
        {"n": "7", "drop": 1, "Title": " Moby Dick "},
        document="whale",
        exclude_fields=["drop"],
        field_mapping={"Title": "title", "n": "year"},
        document_to="body",
        defaults={"lang": "EN"},
        transforms={
            "year": {"cast": "int"},
            "title": ["strip", "upper"],
            "lang": "lower",
            "key": {"template": "{title}-{year}"},
        },
        id_from="key",
        document_from="{title}: {body}",
    )
    assert (found.id, found.document) == ("MOBY DICK-7", "MOBY DICK: whale")
    assert found.metadata == {
        "body": "whale", "key": "MOBY DICK-7", "lang": "en", "title": "MOBY DICK", "year": 7
    }  # fmt: skip


def test_values_that_json_has_no_form_for_pass_untouched() -> None:
    values = {
        "when": dt.datetime(2024, 1, 2, tzinfo=dt.UTC),
        "exact": Decimal("1.10"),
        "long": 2**70,
        "none": None,
    }
    assert apply({**values, "x": 1}, exclude_fields=["x"]).metadata == values


# ── documents and ids ────────────────────────────────────────────────────────────────────────────────


def test_a_field_becomes_the_document_and_leaves_the_metadata() -> None:
    found = apply({"body": "new", "a": 1}, document=None, document_from="body")
    assert (found.document, found.metadata) == ("new", {"a": 1})


def test_document_and_field_change_places() -> None:
    found = apply({"body": "new"}, document="old", document_to="was", document_from="body")
    assert (found.document, found.metadata) == ("new", {"was": "old"})


def test_a_document_does_not_overwrite_a_field() -> None:
    with pytest.raises(SchemaMappingError, match="there already"):
        apply({"body": "mine"}, document_to="body")


def test_a_document_must_be_a_text() -> None:
    with pytest.raises(SchemaMappingError, match="isn't a text"):
        apply({"body": 5}, document_from="body")


@pytest.mark.parametrize("value", ["7", 7, -(2**63)])
def test_the_id_is_made_from_a_field_with_its_kind(value: Any) -> None:
    found = apply({"key": value}, id_from="key")
    assert found.id == value
    assert type(found.id) is type(value)
    assert found.metadata == {"key": value}


@pytest.mark.parametrize("value", [None, True, 1.5, [1], 2**64])
def test_what_can_be_no_id_is_refused(value: Any) -> None:
    assert apply_all([{"key": value}, {"key": "good"}], id_from="key", on_error="reject")[0].id == "good"


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("step", "value", "expected"),
    [
        ({"cast": "int"}, "-12", -12),
        ({"cast": "int"}, 3.0, 3),
        ({"cast": "int"}, Decimal(5), 5),
        ({"cast": "float"}, "1e3", 1000.0),
        ({"cast": "float"}, 2, 2.0),
        ({"cast": "text"}, 0.1, "0.1"),
        ({"cast": "text"}, True, "true"),
        ({"cast": "text"}, dt.date(2024, 5, 6), "2024-05-06"),
        ({"cast": "bool"}, "No", False),
        ({"cast": "bool"}, 1, True),
        ({"join": ", "}, ["a", 1], "a, 1"),
        ({"split": ";"}, "a;b", ["a", "b"]),
        ("lower", "ÄB", "äb"),
        ("upper", "äb", "ÄB"),
        ("strip", " a\n", "a"),
        ({"date": "%d.%m.%Y"}, "06.05.2024", "2024-05-06"),
        ({"date": "%Y%m%d %H:%M"}, "20240506 07:08", "2024-05-06T07:08:00"),
        ({"date": "%d.%m.%Y"}, dt.datetime(2024, 5, 6, 7, tzinfo=dt.UTC), "2024-05-06T07:00:00+00:00"),
        ({"round": 2}, 1.005, 1.0),
        ({"round": 0}, 7, 7),
        ({"template": "<{x}>"}, 7, "<7>"),
        (loud, "a", "a!"),
    ],
)
def test_a_step_takes_a_value(step: Any, value: Any, expected: Any) -> None:
    found = parse_step(step)(value, {"x": value})
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("step", "value"),
    [
        ({"cast": "int"}, "1_000"),
        ({"cast": "int"}, " 5"),
        ({"cast": "int"}, 1.5),
        ({"cast": "int"}, float("nan")),
        ({"cast": "float"}, 2**53 + 1),
        ({"cast": "float"}, 10**400),
        ({"cast": "float"}, "1e999"),
        ({"cast": "float"}, "nan"),
        ({"cast": "text"}, [1]),
        ({"cast": "text"}, float("inf")),
        ({"cast": "bool"}, "maybe"),
        ({"cast": "bool"}, 2),
        ({"join": ","}, "abc"),
        ({"join": ","}, [[1]]),
        ({"split": ","}, 5),
        ("lower", 5),
        ({"date": "%Y"}, "May"),
        ({"date": "%Y"}, 2024),
        ({"round": 1}, "2.5"),
        ({"template": "{gone}"}, 1),
        (to_a_set, 1),
    ],
)
def test_a_step_never_guesses(step: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"expected|needs|failed"):
        parse_step(step)(value, {})


@pytest.mark.parametrize(
    "step",
    ["shout", {"cast": "uuid"}, {"split": ""}, {"lower": 1}, {"round": -1}, {"round": True}, 5,
     {"call": "os.system"}, {"template": "none"}, {"template": "{a} }"}, {"cast": "int", "round": 2},
     lambda value: value],
)  # fmt: skip
def test_a_step_that_is_none_is_refused(step: Any) -> None:
    with pytest.raises(ValidationError):
        mapping(transforms={"a": [step]})


def test_a_template_follows_no_attributes() -> None:
    with pytest.raises(ValueError, match="isn't there"):
        parse_step({"template": "{a.__class__}"})("x", {"a": "x"})


def test_absent_and_null_fields_are_not_transformed() -> None:
    found = apply_all([{}, {"a": None}], transforms={"a": {"cast": "int"}})
    assert [record.metadata for record in found] == [{}, {"a": None}]


def test_equal_values_of_another_type_are_kept() -> None:
    assert apply({"a": [1, 0]}, transforms={"a": as_truths}).metadata == {"a": [True, False]}


def as_truths(value: Any) -> Any:
    return list(map(bool, value))


# ── on_error ─────────────────────────────────────────────────────────────────────────────────────────

BAD = [{"n": "1"}, {"n": "many"}, {"n": "3"}]
INT = {"n": {"cast": "int"}}


def test_a_rule_that_fails_says_which_record_and_why() -> None:
    with pytest.raises(SchemaMappingError, match=r"'r1': n: a whole number was expected, found 'many'"):
        apply_all(BAD, transforms=INT)


@pytest.mark.parametrize("policy", ["reject", {"n": "reject"}])
def test_a_rejected_record_is_left_out_with_its_reason(policy: Any) -> None:
    rules = mapping(transforms=INT, on_error=policy)
    schema = plain_schema("docs", dimensions=2)
    records = [Record(id=f"r{n}", vectors={"": np.ones(2, "f4")}, metadata=m) for n, m in enumerate(BAD)]
    found = rules.apply(to_batch(records, schema))
    assert found.rows.tolist() == [0, 2]
    assert found.refused == {1: "n: a whole number was expected, found 'many'"}
    assert found.changes == {("n", "cast 'int'"): 2}  # those of the rejected record don't count
    assert [record.metadata for record in from_batches([found.batch])] == [{"n": 1}, {"n": 3}]


def test_a_default_stands_in_for_what_can_not_be_mapped() -> None:
    found = apply_all(BAD, transforms=INT, defaults={"n": -1}, on_error={"n": "default"})
    assert [record.metadata for record in found] == [{"n": 1}, {"n": -1}, {"n": 3}]


def test_a_field_that_on_error_does_not_name_fails() -> None:
    with pytest.raises(SchemaMappingError):
        apply_all(BAD, transforms=INT, on_error={"other": "reject"})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"field_mapping": {"a": "x", "b": "x"}}, "same name"),
        ({"field_mapping": {"a": "x"}, "exclude_fields": ["a"]}, "doesn't travel"),
        ({"field_mapping": {"a": "x"}, "include_fields": ["b"]}, "doesn't travel"),
        ({"include_fields": ["a"], "exclude_fields": ["a"]}, "both"),
        ({"on_error": {"a": "default"}}, "default"),
        ({"transforms": INT, "on_error": "default"}, "default"),
        ({"id_from": "a", "defaults": {"id": 1}, "on_error": {"id": "default"}}, "no default"),
        ({"id_from": "{a"}, "template"),
        ({"defaults": {"a": object()}}, "defaults"),
        ({"vectors": {"title": {"drop": True}}}, "pattern"),
        ({"vectors": {"vector": {"drop": True, "truncate": 3}}}, "dropped"),
        ({"vectors": {"vector": {"dtype": "int8"}}}, "float"),
        ({"vectors": {"vector:a": {"rename": "vector:c"}, "vector:b": {"rename": "vector:c"}}}, "same name"),
        ({"fields": {}}, "Extra"),
        ({"transforms": ["a", "lower"]}, "dictionary"),
        ({"transforms": [1]}, "dictionary"),
    ],
)  # fmt: skip
def test_rules_that_contradict_themselves_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        mapping(**rules)


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────────


def vector_batch(*rows: list[float] | None) -> Any:
    schema = plain_schema("docs", dimensions=4)
    vectors = [None if row is None else np.array(row, "f4") for row in rows]
    return to_batch([Record(id=f"r{n}", vectors={"": v}) for n, v in enumerate(vectors)], schema), schema


def test_a_vector_is_truncated_normalised_and_narrowed() -> None:
    batch, schema = vector_batch([3, 4, 9, 9], [0, 0, 1, 1], None)
    rules = mapping(vectors={"vector": {"truncate": 2, "normalise": True, "dtype": "float16"}})
    (field,) = rules.map_schema(schema).vectors
    assert (field.dimensions, field.dtype) == (2, DType.FLOAT16)
    found = [record.vectors[""] for record in from_batches([rules.apply(batch).batch])]
    assert found[0].dtype == np.float16
    np.testing.assert_array_equal(found[0], np.array([0.6, 0.8], "f2"))
    np.testing.assert_array_equal(found[1], np.zeros(2, "f2"))  # a zero vector has no direction
    assert found[2] is None


def test_normalised_vectors_have_unit_length() -> None:
    batch, _ = vector_batch([1e30, 1e30, 0, 0], [1e-30, 0, 0, 0])
    found = from_batches([mapping(vectors={"vector": {"normalise": True}}).apply(batch).batch])
    norms = [np.linalg.norm(record.vectors[""].astype("f8")) for record in found]
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_a_number_too_large_for_float16_is_an_error_of_the_record() -> None:
    batch, _ = vector_batch([1, 2, 3, 4], [1e6, 0, 0, 0], [np.inf, 0, 0, 0])
    with pytest.raises(SchemaMappingError, match="too large"):
        mapping(vectors={"vector": {"dtype": "float16"}}).apply(batch)
    rules = mapping(vectors={"vector": {"dtype": "float16"}}, on_error={"vector": "reject"})
    assert rules.apply(batch).rows.tolist() == [0, 2]  # what was infinite before stays


def test_vectors_are_renamed_and_dropped() -> None:
    fields = tuple(VectorField(name=name, dimensions=2, metric=Metric.DOT) for name in ("", "title", "image"))
    schema = plain_schema("docs").model_copy(update={"vectors": fields})
    record = Record(id="a", vectors={"": [1, 1], "title": [2, 2], "image": [3, 3]})
    rules = mapping(
        vectors={
            "vector": {"rename": "vector:title"},
            "vector:title": {"rename": "vector"},
            "vector:image": {"drop": True},
        }
    )
    assert [field.name for field in rules.map_schema(schema).vectors] == ["title", ""]
    (found,) = from_batches([rules.apply(to_batch([record], schema)).batch])
    assert {name: list(vector) for name, vector in found.vectors.items()} == {"title": [1, 1], "": [2, 2]}


@pytest.mark.parametrize(
    ("rule", "field", "message"),
    [
        ({"truncate": 9}, VectorField(dimensions=8), "it has 8"),
        ({"normalise": True}, VectorField(dimensions=8, dtype=DType.INT8), "int8"),
        ({"truncate": 8}, VectorField(dimensions=64, dtype=DType.BIT), "bit"),
        ({"normalise": True}, VectorField(dimensions=None, kind=VectorKind.SPARSE), "sparse"),
        ({"drop": True}, VectorField(name="title", dimensions=8), "names vector"),
    ],
)
def test_a_rule_for_another_vector_is_refused(rule: Any, field: VectorField, message: str) -> None:
    schema = plain_schema("docs").model_copy(update={"vectors": (field,)})
    with pytest.raises(ConfigurationError, match=message):
        mapping(vectors={"vector": rule}).map_schema(schema)


# ── inverse ──────────────────────────────────────────────────────────────────────────────────────────


@given(data=st.data())
def test_renames_and_their_inverse_give_every_record_back(data: st.DataObject) -> None:
    old = st.text("abc", min_size=1, max_size=3)
    values = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3), st.booleans())
    metadata = data.draw(st.lists(st.one_of(st.none(), st.dictionaries(old, values)), max_size=5))
    names = sorted(data.draw(st.sets(old, max_size=4)))
    # A permutation, or names that no record has.
    new = data.draw(st.permutations(names)) if data.draw(st.booleans()) else [name.upper() for name in names]
    renames = dict(zip(names, new, strict=True))
    there = mapping(field_mapping=renames)
    schema = plain_schema("docs", dimensions=2)
    records = [
        Record(id=f"r{n}", vectors={"": np.ones(2, "f4")}, document=f"d{n}", metadata=fields)
        for n, fields in enumerate(metadata)
    ]
    batch = to_batch(records, schema)
    back = there.inverse().apply(there.apply(batch).batch).batch
    assert back.equals(batch)


def test_a_document_comes_back_from_its_field() -> None:
    rules = mapping(field_mapping={"t": "text"}, document_to="was", document_from="text")
    schema = plain_schema("docs", dimensions=2)
    records = [
        Record(id="a", vectors={"": np.ones(2, "f4")}, document="old", metadata={"t": "new", "n": 1}),
        Record(id="b", vectors={"": np.ones(2, "f4")}, document=None, metadata={"n": 2}),
    ]
    batch = to_batch(records, schema)
    moved = rules.apply(batch).batch
    assert [record.document for record in from_batches([moved])] == ["new", None]
    assert rules.inverse().apply(moved).batch.equals(batch)


def test_a_renamed_vector_comes_back() -> None:
    batch, schema = vector_batch([1, 2, 3, 4])
    rules = mapping(vectors={"vector": {"rename": "vector:body"}})
    assert rules.inverse().map_schema(rules.map_schema(schema)) == schema
    assert rules.inverse().apply(rules.apply(batch).batch).batch.equals(batch)


@pytest.mark.parametrize(
    "rules",
    [
        {"exclude_fields": ["a"]},
        {"include_fields": ["a"]},
        {"defaults": {"a": 1}},
        {"transforms": {"a": "lower"}},
        {"id_from": "a"},
        {"document_from": "{a}{b}"},
        {"vectors": {"vector": {"truncate": 2}}},
    ],
)
def test_what_loses_something_has_no_inverse(rules: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"no inverse: {next(iter(rules)).rstrip('s')}"):
        mapping(**rules).inverse()


# ── digest ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_digest_knows_rules_their_order_and_functions_by_name() -> None:
    steps = {"a": "lower", "b": {"template": "{a}"}}
    one, other = mapping(transforms=steps), mapping(transforms=dict(reversed(steps.items())))
    assert one.digest() == mapping(transforms={"a": ["lower"], "b": [{"template": "{a}"}]}).digest()
    assert len({one.digest(), other.digest(), mapping().digest()}) == 3
    assert mapping(transforms={"a": loud}).document() == {
        "transforms": [["a", [{"call": f"{__name__}.loud"}]]]
    }


def test_a_mapping_gets_to_another_process_as_json() -> None:
    values = {"day": dt.date(2024, 1, 2), "long": 2**70, "typed": {"$typed": ["date", "2024-01-02"]}}
    rules = mapping(**{**RULES, "defaults": values, "on_error": {"n": "reject"}})
    config = MigrationConfig(source="memory:a#b", target="memory:c", schema_mapping=rules)
    again = MigrationConfig.model_validate(orjson.loads(orjson.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert again.digest() == config.digest()
    assert again.schema_mapping is not None
    assert again.schema_mapping.defaults == values


def test_a_function_can_not_be_told_to_another_process() -> None:
    rules = mapping(transforms={"a": ["lower", loud]})
    assert rules.uses_functions
    assert not mapping(**RULES).uses_functions
    with pytest.raises(ValidationError, match="from Python only"):
        SchemaMapping.model_validate(rules.model_dump(mode="json"))


def test_no_rules_change_nothing() -> None:
    assert mapping(on_error="reject").changes_nothing
    assert not mapping(defaults={"a": 1}).changes_nothing


# ── whole runs ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def source() -> Store:
    """A store that holds 300 records in `docs`."""
    store, _ = open_address(f"memory:{next(_names)}")
    store.create(plain_schema("docs"))
    store.upsert("docs", to_batch(plain_records(300), plain_schema("docs")))
    return store


Prepared = Callable[..., Migration]


@pytest.fixture
def prepared(source: Store, tmp_path: Path) -> Prepared:
    """Make a migration into a Parquet folder with some rules; other keyword arguments are settings."""

    def make(settings: dict[str, Any] | None = None, **rules: Any) -> Migration:
        config = MigrationConfig(
            source=source.address("docs"),
            target=f"parquet:{tmp_path / 'lake'}#copy",
            schema_mapping=mapping(**rules) if rules else None,
            **{"partition_size": 100, "batch_size": 30, **(settings or {})},
        )
        return Migration(config=config, ledger=ledger_for(config, tmp_path), source_store=source)

    return make


def arrived(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What lies in the Parquet folder, read with pyarrow alone."""
    rows: list[dict[str, Any]] = []
    for path in sorted((tmp_path / "lake" / "copy").rglob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return {row["id"]: row for row in rows}


RULES: dict[str, Any] = {
    "exclude_fields": ["half"],
    "field_mapping": {"tag": "label"},
    "defaults": {"lang": "de"},
    "transforms": {"label": "upper", "n": {"cast": "text"}},
    "id_from": "page-{n}",
    "vectors": {"vector": {"truncate": 4, "normalise": True}},
}


def test_a_mapped_collection_arrives_as_it_was_asked_for(prepared, source, tmp_path):
    report = run_migration(prepared(**RULES))
    assert report.status == "complete"
    assert report.records["verified"] == 300
    rows = arrived(tmp_path)
    assert rows.keys() == {f"page-{n}" for n in range(300)}
    for record in plain_records(300):
        row = rows[f"page-{record.metadata['n']}"]
        assert json.loads(row["metadata"]) == {
            "n": str(record.metadata["n"]),
            "even": record.metadata["even"],
            "label": record.metadata["tag"].upper(),
            "lang": "de",
        }
        assert row["document"] == record.document
        short = record.vectors[""][:4].astype("f8")
        np.testing.assert_array_equal(
            np.array(row["vector"], "f4"), (short / np.linalg.norm(short)).astype("f4")
        )


def test_the_plan_lists_what_the_mapping_changes_and_needs_no_consent(prepared):
    made = make_plan(prepared(**RULES))
    listed = {(loss.field, loss.detail, loss.count) for loss in made.losses if loss.kind == "mapped"}
    assert ("half", "left out", 300) in listed
    assert ("label", "upper", 300) in listed
    assert ("id", "made from page-{n}", 300) in listed
    assert ("vector", "the first 4 of 8 dimensions", 300) in listed
    assert all(loss.accepted for loss in made.losses)
    assert made.schema_mapping == mapping(**RULES).digest()
    assert set(made.profile.fields) == {"n", "even", "label", "lang"}
    assert made.profile.norms == pytest.approx((1, 1))
    assert made.source_schema.vectors[0].dimensions == 8
    assert made.target_schema.vectors[0].dimensions == 4


def test_the_receipts_digests_are_those_of_the_source(prepared, source):
    report = run_migration(prepared(**RULES))
    target, _ = open_address(report.target["address"])
    plain = compare_collections(source, "docs", target, "copy")
    assert not plain.agrees
    assert report.digest == plain.source.digest
    assert compare_collections(source, "docs", target, "copy", mapping=mapping(**RULES)).agrees


def test_what_the_target_can_not_hold_is_kept_as_it_was_mapped(source, tmp_path):
    """Chroma takes text ids and no nested values: the mapped id and list come back from the envelope."""
    rules = mapping(id_from="n", transforms={"tag": [{"split": "t"}], "half": {"cast": "text"}})
    target = f"chroma:{tmp_path / 'chroma'}#copy"
    config = MigrationConfig(source=source.address("docs"), target=target, schema_mapping=rules)
    with Migration(config=config, ledger=ledger_for(config, tmp_path), source_store=source) as migration:
        assert run_migration(migration).status == "complete"
    found = compare_collections(source, "docs", open_address(target)[0], "copy", mapping=rules)
    assert found.agrees
    assert found.equal == 300


def test_the_quality_of_what_arrived_is_that_of_the_mapped_records(prepared):
    migration = prepared(**RULES)
    run_migration(migration)
    found = run_quality(migration)
    assert found.success, [row for row in found.rows if not row.success]
    assert {row.column for row in found.rows} >= {"metadata.label", "metadata.lang", "dimensions"}


def test_the_filter_looks_at_the_source_before_the_mapping(prepared, tmp_path):
    rules = {"field_mapping": {"n": "number"}, "transforms": {"number": {"cast": "text"}}}
    report = run_migration(prepared({"filter": {"n": {"$lt": 10}}}, **rules))
    assert report.status == "complete"
    assert len(arrived(tmp_path)) == 10


def test_a_filtered_out_record_never_meets_the_mapping(prepared, source):
    source.upsert("docs", to_batch([Record(id="bad", vectors={"": np.ones(8)}, metadata={"n": "x"})],
                                   plain_schema("docs")))  # fmt: skip
    rules = {"transforms": {"n": {"round": 0}}}
    with pytest.raises(SchemaMappingError, match="'bad'"):
        make_plan(prepared(**rules))
    assert run_migration(prepared({"filter": {"even": {"$exists": True}}}, **rules)).status == "complete"


def test_a_failing_rule_stops_the_plan_before_anything_is_written(prepared, tmp_path):
    with pytest.raises(SchemaMappingError, match="doc#00000"):
        run_migration(prepared(transforms={"tag": {"cast": "int"}}))
    assert not (tmp_path / "lake").exists()


def test_ids_that_would_collide_are_refused_before_anything_is_written(prepared, tmp_path):
    with pytest.raises(ConfigurationError, match=r"293 of 300 records share their id, made from 'tag'"):
        run_migration(prepared(id_from="tag"))
    assert not (tmp_path / "lake").exists()


def test_rejected_records_lie_in_the_rejects_as_the_source_has_them(prepared, tmp_path):
    rules = {"exclude_fields": ["half"], "transforms": {"n": only_small}, "on_error": {"n": "reject"}}
    migration = prepared(**rules)
    assert run_migration(migration).status == "incomplete"
    report = run_migration(prepared({"max_rejects": 50}, **rules))
    assert report.status == "complete"
    assert (report.records["rejected"], report.records["verified"]) == (50, 250)
    (loss,) = [loss for loss in report.losses if loss.kind == "mapping-rejected"]
    assert (loss.count, loss.kept) == (50, "rejects")
    assert report.rejects[0]["id"] == "doc#00250"
    assert report.rejects[0]["reason"] == "n: only_small failed: ValueError: too many"
    rejected = pq.read_table(report.rejects_folder).to_pylist()
    assert {json.loads(row["metadata"])["half"] for row in rejected} == {n / 2 for n in range(250, 300)}


def test_every_record_may_be_rejected(prepared):
    report = run_migration(
        prepared({"max_rejects": 300}, transforms={"tag": {"cast": "int"}}, on_error="reject")
    )
    assert (report.status, report.records["rejected"], report.target["count"]) == ("complete", 300, 0)


def test_the_plan_sees_numbers_too_large_for_float16(prepared, source):
    large = Record(id="doc#00007", vectors={"": np.full(8, 1e6)}, metadata={"n": 7})
    source.upsert("docs", to_batch([large], plain_schema("docs")))
    narrow = {"vector": {"dtype": "float16"}}
    with pytest.raises(SchemaMappingError, match="'doc#00007': vector: a number is too large"):
        make_plan(prepared(vectors=narrow))
    made = make_plan(prepared({"max_rejects": 1}, vectors=narrow, on_error={"vector": "reject"}))
    found = {(loss.kind, loss.count, loss.detail) for loss in made.losses if loss.field == "vector"}
    assert ("mapped", 299, "float32 written as float16, rounded") in found
    assert ("mapping-rejected", 1) in {(loss.kind, loss.count) for loss in made.losses}


def test_namespaces_stay_and_ids_need_be_distinct_within_one_alone(tmp_path):
    store, _ = open_address(f"memory:{next(_names)}")
    schema = plain_schema("docs").model_copy(update={"has_namespaces": True})
    store.create(schema)
    records = [
        Record(id=f"{space}{n}", vectors={"": np.ones(8)}, metadata={"n": n}, namespace=space)
        for space in ("a", "b")
        for n in range(5)
    ]
    store.upsert("docs", to_batch(records, schema))
    config = MigrationConfig(
        source=store.address("docs"), target=store.address("copy"), schema_mapping=mapping(id_from="n")
    )
    migration = Migration(
        config=config, ledger=ledger_for(config, tmp_path), source_store=store, target_store=store
    )
    assert run_migration(migration).status == "complete"
    (span,) = store.split("copy", span_records=100)
    found = from_batches(store.scan("copy", span[0], ids=span[1], batch_records=100))
    assert {record.key() for record in found} == {("int", str(n), space) for n in range(5) for space in "ab"}


def only_small(value: Any) -> Any:
    if value >= 250:
        raise ValueError("too many")
    return value


def test_a_changed_mapping_is_a_changed_plan(prepared):
    make_plan(prepared(exclude_fields=["half"]))
    make_plan(prepared(exclude_fields=["half"]))  # the same again is no change
    with pytest.raises(PlanChangedError, match="schema_mapping was"):
        make_plan(prepared(exclude_fields=["tag"]))
    with pytest.raises(PlanChangedError, match="schema_mapping was"):
        make_plan(prepared())
    assert run_migration(prepared(), fresh=True).status == "complete"


def test_no_mapping_leaves_the_digest_of_older_plans():
    config = MigrationConfig(source="memory:a#b", target="memory:c")
    settings = config.frozen_part()
    del settings["schema_mapping"]
    plain = orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)
    assert config.digest() == hashlib.sha256(plain).hexdigest()


def test_a_mapping_without_rules_is_none(prepared):
    made = draft(prepared(on_error="reject"))
    assert made.mapped_schema is None
    assert made.schema_mapping is None


def test_add_looks_for_the_mapped_ids_in_the_target(prepared, tmp_path):
    run_migration(prepared(id_from="page-{n}"))
    again = {"on_existing": "add", "name": "again"}
    assert draft(prepared(again)).joins
    with pytest.raises(TargetNotEmptyError, match="holds 300 of the ids in scope"):
        make_plan(prepared(again, id_from="page-{n}"))


def test_a_joined_collection_is_checked_by_its_mapped_ids(prepared):
    run_migration(prepared())
    migration = prepared({"on_existing": "merge", "name": "again"}, id_from="page-{n}")
    assert run_migration(migration).status == "complete"
    found = run_quality(migration)
    assert found.success, [row for row in found.rows if not row.success]
    assert found.records == 300


# ── YAML and the command line ────────────────────────────────────────────────────────────────────────

YAML = """
exclude_fields: [half]
transforms:
  tag: [upper, {split: T}]
  n: {cast: text}
id_from: "page-{n}"
vectors:
  vector: {truncate: 4, normalise: true}
on_error: {n: reject}
"""


def test_yaml_and_python_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mapping.yaml"
    path.write_text(YAML)
    assert read_mapping(path) == SchemaMapping(**yaml.safe_load(YAML))
    path.write_text(json.dumps(yaml.safe_load(YAML)))
    assert read_mapping(path).digest() == SchemaMapping(**yaml.safe_load(YAML)).digest()


@pytest.mark.parametrize("text", ["transforms: {a: shout}", "- a", "a: [", "transforms: {a: {call: os.x}}"])
def test_a_file_that_is_no_mapping_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mapping.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"mapping\.yaml"):
        read_mapping(path)


def declared(tmp_path: Path, source: Store) -> Path:
    folder = tmp_path / "defs" / "pages"
    folder.mkdir(parents=True)
    attributes = {
        "source": source.address("docs"),
        "target": f"parquet:{tmp_path / 'lake'}#copy",
        "mapping": yaml.safe_load(YAML),
    }
    document = {"type": "migration_pipelines.components.VectorMigration", "attributes": attributes}
    (folder / "defs.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "defs"


def test_a_declared_mapping_is_that_of_its_migration(source, tmp_path):
    found = read_declarations(declared(tmp_path, source)).migration("pages", home=tmp_path)
    assert found.mapping == SchemaMapping(**yaml.safe_load(YAML))


def test_a_declared_migration_runs_and_validates_through_its_mapping(source, tmp_path, shell: Shell):
    defs = declared(tmp_path, source)
    done = shell("run", "pages", "--defs", defs, "--json", "--quiet")
    assert done.status == 0, done.everything
    assert arrived(tmp_path).keys() == {f"page-{n}" for n in range(300)}
    checked = shell("validate", "pages", "--defs", defs, "--json", "--quiet")
    assert (checked.status, checked.document["status"]) == (0, "complete")


def test_a_mapping_on_the_command_line(source, tmp_path, shell: Shell):
    path = tmp_path / "mapping.yaml"
    path.write_text(YAML)
    sides = ("--source", source.address("docs"), "--target", f"parquet:{tmp_path / 'lake'}#copy")
    planned = shell("plan", *sides, "--mapping", path, "--json", "--quiet")
    assert planned.status == 0, planned.everything
    assert "half" in {loss["field"] for loss in planned.document["losses"]}
    assert shell("run", *sides, "--json", "--quiet").status == 2  # without it the plan is another
    done = shell("run", *sides, "--mapping", path, "--json", "--quiet")
    assert (done.status, done.document["records"]["verified"]) == (0, 300)
    assert shell("validate", *sides, "--json", "--quiet").status == 3
    assert shell("validate", *sides, "--mapping", path, "--json", "--quiet").status == 0
    path.write_text("transforms: {n: shout}")
    refused = shell("plan", *sides, "--mapping", path)
    assert refused.status == 2
    assert "'shout' is no step" in refused.err


def test_dagster_runs_a_declared_mapping_with_its_templates(source, tmp_path):
    project = Project(tmp_path)
    declared(tmp_path, source)
    assert project.run("pages").status == "complete"
    assert arrived(tmp_path).keys() == {f"page-{n}" for n in range(300)}


def test_dagster_refuses_a_mapping_that_can_not_be_used(tmp_path):
    project = Project(tmp_path)
    bad = {"transforms": {"a": "shout"}}
    project.declare("docs", source="memory:a#docs", target="memory:b#docs", mapping=bad)
    with pytest.raises(ConfigurationError, match="'shout' is no step"), project.session():
        pass
