"""The mapping: ids stay distinct, schemas fit or are refused by name, and every change is declared."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migration_pipelines import batch as batches
from migration_pipelines.errors import ConfigurationError, DimensionMismatchError
from migration_pipelines.mapping import (
    IdStrategy,
    awkward_ids,
    check_existing,
    check_namespaces,
    choose_id_strategy,
    counterpart,
    find_losses,
    hashed_id,
    keeps_namespaces,
    map_schema,
    target_ids,
)
from migration_pipelines.model import (
    Capabilities,
    CollectionSchema,
    DType,
    IdKind,
    Loss,
    Metric,
    Profile,
    ValueKind,
    VectorField,
    VectorKind,
)
from migration_pipelines.stores.memory import MemoryStore

INT, UUID, STR = IdKind.INT, IdKind.UUID, IdKind.STR
ANYTHING = MemoryStore.capabilities


def _can(**changes: Any) -> Capabilities:
    """What memory can, which is everything, but for some changes."""
    return ANYTHING.model_copy(update=changes)


def _store(
    *, refused_keys: frozenset[str] = frozenset(), tolerance: float = 0.0, **changes: Any
) -> MemoryStore:
    """A store that can do less."""

    class Lesser(MemoryStore):
        capabilities: ClassVar[Capabilities] = _can(**changes)

        def accepts_key(self, key: str) -> bool:
            return key not in refused_keys

        def vector_tolerance(self, schema: CollectionSchema) -> float:
            return tolerance

    return Lesser(name="lesser")


def _schema(*vectors: VectorField, kinds: Sequence[IdKind] = (STR,), **facts: Any) -> CollectionSchema:
    return CollectionSchema(name="docs", vectors=vectors, id_kinds=frozenset(kinds), **facts)


def _vector(name: str = "", **facts: Any) -> VectorField:
    return VectorField(**{"name": name, "dimensions": 8, "metric": Metric.COSINE, **facts})


def _profile(**counts: Any) -> Profile:
    plain: dict[str, Any] = {
        "records": 100,
        "bytes": 1_000,
        "id_kinds": {"str": 100},
        "awkward_ids": 0,
        "duplicate_ids": 0,
        "documents": 0,
        "refused_documents": 0,
        "with_metadata": 100,
        "empty_metadata": 0,
        "fields": {},
        "namespaces": {},
        "missing_vectors": 0,
        "non_finite_vectors": 0,
        "norms": None,
        "sample_read_records_per_second": 1.0,
    }
    return Profile(**{**plain, **counts})


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("found", "held", "mixed", "expected"),
    [
        ({STR}, {STR}, False, IdStrategy.NATIVE),
        ({INT}, {INT, UUID}, False, IdStrategy.NATIVE),
        ({INT}, {STR}, False, IdStrategy.TEXT),
        ({UUID}, {STR}, False, IdStrategy.TEXT),
        ({STR}, {INT, UUID}, False, IdStrategy.UUID5),
        ({STR}, {INT}, False, IdStrategy.UUID5),
        ({INT, STR}, {INT, STR, UUID}, True, IdStrategy.NATIVE),
        ({INT, STR}, {INT, STR, UUID}, False, IdStrategy.UUID5),
        ({INT, STR}, {STR}, False, IdStrategy.UUID5),
        ({INT, STR}, {STR}, True, IdStrategy.UUID5),
        ({INT, UUID}, {INT, UUID}, True, IdStrategy.NATIVE),
        (set(), {INT}, False, IdStrategy.NATIVE),
    ],
)
def test_ids_are_written_as_they_are_where_the_target_holds_them(
    found: set[IdKind], held: set[IdKind], mixed: bool, expected: IdStrategy
) -> None:
    can = _can(id_kinds=frozenset(held), mixed_ids=mixed)
    assert choose_id_strategy(frozenset(found), can) is expected


TYPED_IDS = st.integers(-(2**63), 2**64) | st.uuids() | st.text(max_size=4) | st.integers(0, 9).map(str)


@settings(deadline=None)
@given(
    ids=st.lists(TYPED_IDS, min_size=1, max_size=30),
    held=st.sets(st.sampled_from([INT, UUID, STR]), min_size=1).filter(lambda held: held != {INT}),
    mixed=st.booleans(),
    limit=st.sampled_from([None, 3]),
)
def test_different_ids_stay_different_and_are_of_a_kind_that_the_target_holds(
    ids: list[batches.RecordId], held: set[IdKind], mixed: bool, limit: int | None
) -> None:
    """`1` and `"1"` above all, under every strategy that can be chosen for them."""
    distinct = list({(type(item), item): item for item in ids}.values())
    batch = batches.id_batch(distinct)
    can = _can(id_kinds=frozenset(held), mixed_ids=mixed, max_id_bytes=limit if STR in held else None)
    strategy = choose_id_strategy(frozenset(IdKind(kind) for kind in batch["id_type"].to_pylist()), can)
    texts, kinds, changed = target_ids(batch, strategy, can)
    mapped = list(zip(kinds.to_pylist(), texts.to_pylist(), strict=True))
    assert len(set(mapped)) == len(distinct)
    assert {kind for kind, _ in mapped} <= {kind.value for kind in held}
    if not mixed:
        assert len({kind for kind, _ in mapped}) == 1
    before = zip(batch["id_type"].to_pylist(), batch["id"].to_pylist(), strict=True)
    for original, written, moved in zip(before, mapped, changed.tolist(), strict=True):
        assert moved or original == written  # what changed unmarked would never be changed back


def test_the_uuid_of_an_id_is_fixed_for_good() -> None:
    """A collection that was mapped by any earlier version is merged into by these very ids."""
    assert str(hashed_id("1", "int")) == "466b040f-5282-52e6-acc5-6382bfe995c2"
    assert str(hashed_id("1", "str")) == "b5db808a-d74b-55f6-b17c-39976e829ac5"


def test_ids_become_their_text_where_the_target_holds_text_alone() -> None:
    batch = batches.id_batch([1, -2])
    texts, kinds, changed = target_ids(batch, IdStrategy.TEXT, _can(id_kinds=frozenset({STR})))
    assert (texts.to_pylist(), kinds.to_pylist()) == (["1", "-2"], ["str", "str"])
    assert changed.all()


def test_awkward_ids_are_those_too_long_in_bytes_or_with_refused_characters() -> None:
    batch = batches.id_batch(["a" * 8, "a" * 9, "é" * 4, "é" * 5, "a\0", "a b", ""])
    flags = awkward_ids(batch, _can(max_id_bytes=8, id_text_refuses="\0 "))
    assert flags.tolist() == [False, True, False, True, True, True, False]
    assert not awkward_ids(batch, ANYTHING).any()


def test_ids_that_the_target_itself_refuses_are_awkward_and_keep_their_original() -> None:
    batch = batches.id_batch(["fits", "naïve"])
    assert awkward_ids(batch, ANYTHING, str.isascii).tolist() == [False, True]
    texts, _, changed = target_ids(batch, IdStrategy.NATIVE, ANYTHING, str.isascii)
    assert changed.tolist() == [False, True]
    assert texts.to_pylist() == ["fits", str(hashed_id("naïve", "str"))]


def test_only_awkward_ids_change_in_a_collection_whose_ids_fit() -> None:
    batch = batches.id_batch(["short", "far too long"])
    texts, kinds, changed = target_ids(batch, IdStrategy.NATIVE, _can(max_id_bytes=8))
    assert changed.tolist() == [False, True]
    assert kinds.to_pylist() == ["str", "str"]
    assert texts.to_pylist() == ["short", str(hashed_id("far too long", "str"))]


# ── schema ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_schema_that_fits_is_taken_over() -> None:
    source = _schema(
        _vector("title"), _vector("body", metric=Metric.DOT), has_namespaces=True, properties={"owner": "us"}
    )
    mapped = map_schema(source, _store(), name="new", strategy=IdStrategy.NATIVE)
    assert mapped == source.model_copy(update={"name": "new"})


def test_options_of_the_source_are_not_the_targets() -> None:
    source = _schema(_vector(), options={"hnsw:space": "l2"})
    assert map_schema(source, _store(), name="x", strategy=IdStrategy.NATIVE).options == {}


@pytest.mark.parametrize(
    ("strategy", "held", "expected"),
    [
        (IdStrategy.NATIVE, {INT, STR}, {INT}),
        (IdStrategy.TEXT, {STR}, {STR}),
        (IdStrategy.UUID5, {INT, UUID}, {UUID}),
        (IdStrategy.UUID5, {STR}, {STR}),
    ],
)
def test_the_target_holds_the_kind_of_id_that_the_strategy_writes(
    strategy: IdStrategy, held: set[IdKind], expected: set[IdKind]
) -> None:
    target = _store(id_kinds=frozenset(held))
    mapped = map_schema(_schema(_vector(), kinds=[INT]), target, name="x", strategy=strategy)
    assert mapped.id_kinds == expected


def test_a_metric_that_the_target_has_not_must_be_replaced_by_name() -> None:
    target = _store(metrics=frozenset({Metric.EUCLIDEAN}))
    source = _schema(_vector(metric=Metric.HAMMING))
    with pytest.raises(ConfigurationError, match="has no metric hamming; it has euclidean") as caught:
        map_schema(source, target, name="x", strategy=IdStrategy.NATIVE)
    assert caught.value.facts["expected"] == ["euclidean"]
    mapped = map_schema(source, target, name="x", strategy=IdStrategy.NATIVE, metric=Metric.EUCLIDEAN)
    assert mapped.vectors[0].metric is Metric.EUCLIDEAN


def test_an_unknown_metric_stays_unknown() -> None:
    mapped = map_schema(_schema(_vector(metric=None)), _store(), name="x", strategy=IdStrategy.NATIVE)
    assert mapped.vectors[0].metric is None


def test_too_many_dimensions_are_refused_with_both_numbers() -> None:
    target = _store(max_dimensions=7)
    with pytest.raises(DimensionMismatchError, match="8 dimensions, memory takes at most 7"):
        map_schema(_schema(_vector()), target, name="x", strategy=IdStrategy.NATIVE)
    fits = map_schema(_schema(_vector()), _store(max_dimensions=8), name="x", strategy=IdStrategy.NATIVE)
    assert fits.vectors[0].dimensions == 8


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.INT8, DType.UINT8])
def test_a_narrow_dtype_is_widened_where_the_target_has_float32_alone(dtype: DType) -> None:
    target = _store(dtypes=frozenset({DType.FLOAT32}))
    source = _schema(_vector(dtype=dtype))
    mapped = map_schema(source, target, name="x", strategy=IdStrategy.NATIVE)
    assert mapped.vectors[0].dtype is DType.FLOAT32
    (loss,) = find_losses(source, mapped, _profile(), target, IdStrategy.NATIVE)
    assert (loss.kind, loss.accepted, loss.kept) == ("vector-widened", True, "the value itself")


def test_every_value_of_a_widened_dtype_survives() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    assert (finite.astype(np.float32).astype(np.float16).view("u2") == finite.view("u2")).all()


def test_a_store_without_named_vectors_gets_the_first_one() -> None:
    source = _schema(_vector("title"), _vector("body"))
    target = _store(named_vectors=False)
    mapped = map_schema(source, target, name="x", strategy=IdStrategy.NATIVE)
    assert [field.name for field in mapped.vectors] == [""]


def test_an_existing_collection_must_have_the_vectors_in_their_dimensions() -> None:
    mapped = _schema(_vector("title"))
    check_existing(mapped, _schema(_vector("title"), _vector("body", dimensions=3)), where="memory:x#y")
    check_existing(mapped, _schema(_vector("title", dimensions=None)), where="memory:x#y")
    with pytest.raises(
        DimensionMismatchError, match="memory:x#y takes vectors of 9 dimensions, the source has 8"
    ):
        check_existing(mapped, _schema(_vector("title", dimensions=9)), where="memory:x#y")
    with pytest.raises(DimensionMismatchError, match="no vector called title; it has body, head"):
        check_existing(mapped, _schema(_vector("body"), _vector("head")), where="memory:x#y")


def test_an_existing_collection_with_one_vector_takes_the_only_one_whatever_its_name() -> None:
    check_existing(_schema(_vector("title")), _schema(_vector()), where="memory:x#y")
    sparse = _vector(kind=VectorKind.SPARSE, dimensions=None)
    with pytest.raises(DimensionMismatchError, match="no vector called title"):
        check_existing(_schema(_vector("title")), _schema(sparse), where="memory:x#y")


def test_a_store_without_named_vectors_prefers_the_default_one() -> None:
    source = _schema(_vector("title"), _vector(dimensions=3))
    mapped = map_schema(source, _store(named_vectors=False), name="x", strategy=IdStrategy.NATIVE)
    assert [field.dimensions for field in mapped.vectors] == [3]
    kept = {field.name: field for field in mapped.vectors}
    assert [counterpart(field, source, kept) for field in source.vectors] == [None, mapped.vectors[0]]


def test_the_only_vector_answers_to_any_name_but_not_to_another_kind() -> None:
    only = _schema(_vector("embedding"))
    assert counterpart(only.vectors[0], only, {"": _vector()}) == _vector()
    two = _schema(_vector("a"), _vector("b"))
    assert [counterpart(field, two, {"": _vector()}) for field in two.vectors] == [_vector(), None]
    assert [counterpart(field, two, {"b": _vector("b")}) for field in two.vectors] == [None, _vector("b")]
    sparse = _vector(kind=VectorKind.SPARSE, dimensions=None)
    assert counterpart(only.vectors[0], only, {"": sparse}) is None


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────


def _losses(source: CollectionSchema, target: MemoryStore, profile: Profile) -> dict[tuple[str, str], Loss]:
    strategy = choose_id_strategy(source.id_kinds, target.capabilities)
    mapped = map_schema(source, target, name="x", strategy=strategy)
    return {(x.field, x.kind): x for x in find_losses(source, mapped, profile, target, strategy)}


def test_a_target_that_holds_everything_loses_nothing() -> None:
    source = _schema(_vector(), _vector("s", kind=VectorKind.SPARSE, dimensions=None), has_namespaces=True)
    profile = _profile(
        documents=100,
        empty_metadata=3,
        namespaces={"a": 4},
        fields={"n": {kind.value: 1 for kind in ValueKind}},
    )
    assert _losses(source, _store(), profile) == {}


def test_what_is_kept_in_the_envelope_is_counted_and_stops_nothing() -> None:
    target = _store(
        id_kinds=frozenset({STR}),
        value_kinds=frozenset({ValueKind.TEXT}),
        refused_keys=frozenset({"a.b"}),
    )
    profile = _profile(
        refused_documents=2,
        empty_metadata=3,
        fields={"n": {"text": 90, "int64": 7}, "a.b": {"text": 5}},
    )
    found = _losses(_schema(_vector(), kinds=[INT]), target, profile)
    assert {key: loss.count for key, loss in found.items()} == {
        ("id", "id"): 100,
        ("document", "nul-text"): 2,
        ("metadata", "no-fields"): 3,
        ("n", "int64"): 7,
        ("a.b", "text"): 5,
    }
    assert all(loss.accepted and loss.kept for loss in found.values())
    assert "refuses the field's name" in found["a.b", "text"].detail


def test_what_is_gone_for_good_must_be_accepted_by_name() -> None:
    target = _store(
        documents=False, namespaces=False, named_vectors=False, vector_kinds=frozenset({VectorKind.DENSE})
    )
    source = _schema(
        _vector("a"),
        _vector("b"),
        _vector("s", kind=VectorKind.SPARSE, dimensions=None),
    )
    found = _losses(source, target, _profile(documents=60))
    assert found["document", "document-dropped"].count == 60
    assert found["vector:b", "vector-dropped"].count == 100
    assert found["vector:s", "vector-dropped"].count == 100
    assert not any(loss.accepted or loss.kept for loss in found.values())


def test_namespaces_are_kept_in_a_field_where_the_target_has_none() -> None:
    found = _losses(
        _schema(_vector(), has_namespaces=True),
        _store(namespaces=False),
        _profile(namespaces={"x": 40, "": 60}),
    )
    (loss,) = found.values()
    assert (loss.field, loss.kind, loss.count, loss.kept) == (
        "namespace",
        "namespace",
        100,
        "_source_namespace",
    )
    assert loss.accepted


def test_a_store_bound_to_one_namespace_keeps_no_others() -> None:
    class Bound(MemoryStore):
        namespace: str | None = None

    source = _schema(_vector(), has_namespaces=True)
    assert keeps_namespaces(source, Bound(), None)
    assert not keeps_namespaces(source, Bound(namespace="a"), None)
    assert not keeps_namespaces(source, _store(namespaces=False), None)
    assert not keeps_namespaces(source, Bound(), _schema(_vector()))
    assert not keeps_namespaces(_schema(_vector()), Bound(), None)


def test_names_of_namespaces_that_the_target_refuses_are_told_before_anything_is_written() -> None:
    class Letters(MemoryStore):
        def accepts_namespace(self, name: str) -> bool:
            return name.isalpha()

    check_namespaces(["a", "b"], Letters(), where="there")
    with pytest.raises(ConfigurationError, match=r"refuses 2 of 3 names of namespaces: '', 'a b'") as caught:
        check_namespaces(["a b", "a", ""], Letters(), where="there")
    assert caught.value.facts["found"] == ["", "a b"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "a", "1", "1 a", "a:str"]), st.sampled_from(["", "a", "str:a", "1 a"])
        ),
        unique=True,
    )
)
def test_one_id_in_several_namespaces_gets_several(names: list[tuple[str, str]]) -> None:
    batch = batches.id_batch([text for _, text in names])
    batch = batch.append_column("namespace", pa.array([space for space, _ in names], pa.string()))
    for held in ({STR}, {STR, UUID}, {UUID}):
        can = _can(id_kinds=frozenset(held), mixed_ids=False)
        strategy = choose_id_strategy(frozenset({STR}), can, needs_namespace=True)
        texts, kinds, changed = target_ids(batch, strategy, can)
        assert len(set(texts.to_pylist())) == len(names)
        assert set(kinds.to_pylist()) <= {kind.value for kind in held}
        assert changed.all()
        again = target_ids(batch, strategy, can)
        assert again[0].equals(texts)


def test_the_vector_that_a_store_without_names_keeps_is_not_called_dropped() -> None:
    source = _schema(_vector("a"), _vector("b"))
    found = _losses(source, _store(named_vectors=False), _profile())
    assert set(found) == {("vector:b", "vector-dropped")}


def test_rounded_vectors_are_a_loss_of_every_record() -> None:
    found = _losses(_schema(_vector()), _store(tolerance=1e-3), _profile())
    assert (found["vector", "vector-rounding"].count, found["vector", "vector-rounding"].accepted) == (
        100,
        False,
    )


def test_a_change_of_metric_is_a_loss() -> None:
    source, target = _schema(_vector()), _store()
    mapped = map_schema(source, target, name="x", strategy=IdStrategy.NATIVE, metric=Metric.DOT)
    (loss,) = find_losses(source, mapped, _profile(), target, IdStrategy.NATIVE)
    assert (loss.field, loss.kind, loss.accepted) == ("vector", "metric", False)


def test_records_that_the_target_refuses_are_counted_and_go_to_the_rejects() -> None:
    found = _losses(_schema(_vector()), _store(), _profile(missing_vectors=2, non_finite_vectors=3))
    assert {key: (loss.count, loss.kept) for key, loss in found.items()} == {
        ("vector", "missing-vector"): (2, "rejects"),
        ("vector", "non-finite-vector"): (3, "rejects"),
    }


def test_awkward_ids_alone_are_counted_where_the_others_fit() -> None:
    found = _losses(_schema(_vector()), _store(max_id_bytes=8), _profile(awkward_ids=4))
    assert (found["id", "id"].count, found["id", "id"].kept) == (4, "_source_id")


def test_the_namespace_of_hashed_ids_is_a_uuid_of_version_five() -> None:
    found = hashed_id("x", "str")
    assert isinstance(found, uuid.UUID)
    assert found.version == 5
    assert pa.array([str(found)]).to_pylist() == [str(found)]
