"""Batches: cut and joined without loss, and digests that no change escapes."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migration_pipelines import batch as batches
from migration_pipelines.errors import DimensionMismatchError
from migration_pipelines.model import CollectionSchema, DType, IdKind, VectorField, VectorKind
from migration_pipelines_tests.records import (
    Record,
    by_id,
    from_batches,
    plain_records,
    plain_schema,
    to_batch,
)

SCHEMA = plain_schema("c")
EVERYTHING = CollectionSchema(
    name="everything",
    vectors=(
        VectorField(dimensions=4),
        VectorField(name="half", dtype=DType.FLOAT16, dimensions=4),
        VectorField(name="bytes", dtype=DType.INT8, dimensions=4),
        VectorField(name="bits", dtype=DType.BIT, dimensions=12),
        VectorField(name="sparse", kind=VectorKind.SPARSE, dimensions=None),
        VectorField(name="multi", kind=VectorKind.MULTI, dimensions=2),
    ),
    id_kinds=frozenset(IdKind),
    has_namespaces=True,
)
FULL = Record(
    id="a",
    vectors={
        "": np.array([1, 2, 3, 4], np.float32),
        "half": np.array([1, 2, 3, 4], np.float16),
        "bytes": np.array([1, 2, 3, 4], np.int8),
        "bits": np.array([170, 160], np.uint8),
        "sparse": {"indices": [1, 7], "values": [0.5, -1.0]},
        "multi": [[1.0, 2.0], [3.0, 4.0]],
    },
    document="d",
    metadata={"k": 1},
    namespace="n",
)


def one_digest(record: Record, schema: CollectionSchema = EVERYTHING) -> int:
    (found,) = batches.record_digests(to_batch([record], schema))
    return found


# ── splitting ────────────────────────────────────────────────────────────────────────────────────────

LENGTHS = st.lists(st.integers(0, 400), min_size=0, max_size=40)


def of_lengths(lengths: list[int]) -> pa.RecordBatch:
    records = plain_records(len(lengths))
    return to_batch(
        [replace(record, document="x" * n) for record, n in zip(records, lengths, strict=True)], SCHEMA
    )


@settings(deadline=None)  # the first example loads pandas
@given(LENGTHS, st.none() | st.integers(1, 50), st.none() | st.integers(1, 5000))
def test_split_keeps_to_both_limits_and_to_the_order(
    lengths: list[int], max_records: int | None, max_bytes: int | None
) -> None:
    batch = of_lengths(lengths)
    parts = list(batches.split(batch, max_records=max_records, max_bytes=max_bytes))
    assert pa.Table.from_batches(parts, batch.schema) == pa.Table.from_batches([batch])
    for part in parts:
        assert part.num_rows >= 1
        assert max_records is None or part.num_rows <= max_records
        assert max_bytes is None or part.num_rows == 1 or part.nbytes <= max_bytes


def test_split_of_a_slice_counts_the_bytes_of_the_slice_alone() -> None:
    part = to_batch(plain_records(1000), SCHEMA).slice(500, 100)
    assert len(list(batches.split(part, max_records=None, max_bytes=part.nbytes))) == 1


@settings(deadline=None)
@given(st.lists(LENGTHS, max_size=5), st.integers(1, 50), st.integers(1, 5000))
def test_rebatch_keeps_to_both_limits_and_to_the_order(
    groups: list[list[int]], max_records: int, max_bytes: int
) -> None:
    given_batches = [of_lengths(lengths) for lengths in groups]
    parts = list(batches.rebatch(given_batches, max_records=max_records, max_bytes=max_bytes))
    schema = batches.arrow_schema(SCHEMA)
    assert pa.Table.from_batches(parts, schema) == pa.Table.from_batches(given_batches, schema)
    for part in parts:
        assert 1 <= part.num_rows <= max_records
        assert part.num_rows == 1 or part.nbytes <= max_bytes


def test_rebatch_fills_batches() -> None:
    small = batches.split(to_batch(plain_records(1000), SCHEMA), max_records=7, max_bytes=None)
    sizes = [part.num_rows for part in batches.rebatch(small, max_records=100, max_bytes=10**9)]
    assert len(sizes) <= 11
    assert min(sizes[:-1]) > 93


# ── digests ──────────────────────────────────────────────────────────────────────────────────────────


def test_digest_of_a_set_is_the_same_in_any_order_and_any_cut() -> None:
    whole = to_batch(plain_records(200), SCHEMA)
    shuffled = whole.take(pa.array(np.random.default_rng(1).permutation(200)))
    cut = list(batches.split(shuffled, max_records=7, max_bytes=None))
    assert batches.digest([whole]) == batches.digest(cut)
    assert batches.digest([whole]) == batches.add_digests(batches.digest([part]) for part in cut)


def test_digest_counts_a_record_that_is_there_twice() -> None:
    whole = to_batch(plain_records(3), SCHEMA)
    assert len({batches.digest([whole] * times) for times in range(4)}) == 4


def test_digest_of_a_slice_is_that_of_its_records() -> None:
    records = [replace(FULL, id=n, document=None if n % 3 else "d") for n in range(20)]
    records[12] = replace(records[12], vectors={})
    whole = to_batch(records, EVERYTHING)
    fresh = to_batch(records[11:17], EVERYTHING)
    assert batches.record_digests(whole.slice(11, 6)) == batches.record_digests(fresh)
    assert batches.record_digests(whole)[11:17] == batches.record_digests(fresh)


def changed_vector(name: str, value: Any) -> Record:
    return replace(FULL, vectors={**FULL.vectors, name: value})


DIFFERENT = {
    "id": replace(FULL, id="b"),
    "kind of id, number": replace(FULL, id=1),
    "kind of id, text": replace(FULL, id="1"),
    "kind of id, uuid": replace(FULL, id=uuid.UUID(int=1)),
    "kind of id, uuid text": replace(FULL, id=str(uuid.UUID(int=1))),
    "no document": replace(FULL, document=None),
    "empty document": replace(FULL, document=""),
    "no metadata": replace(FULL, metadata=None),
    "no fields": replace(FULL, metadata={}),
    "null field": replace(FULL, metadata={"k": None}),
    "float field": replace(FULL, metadata={"k": 1.0}),
    "no namespace": replace(FULL, namespace=None),
    "text moved to the id": replace(FULL, id="ad", document=""),
    "text moved to the namespace": replace(FULL, document="", namespace="dn"),
    "no vector": changed_vector("", None),
    "zero vector": changed_vector("", np.zeros(4, np.float32)),
    "negative zero": changed_vector("", -np.zeros(4, np.float32)),
    "not a number": changed_vector("", np.full(4, np.nan, np.float32)),
    "last bit": changed_vector(
        "", np.array([1, 2, 3, np.nextafter(np.float32(4), np.float32(5))], np.float32)
    ),
    "no half": changed_vector("half", None),
    "half": changed_vector("half", np.array([1, 2, 3, 4.004], np.float16)),
    "bytes": changed_vector("bytes", np.array([1, 2, 3, -4], np.int8)),
    "bits": changed_vector("bits", np.array([170, 161], np.uint8)),
    "no sparse": changed_vector("sparse", None),
    "empty sparse": changed_vector("sparse", {"indices": [], "values": []}),
    "sparse index": changed_vector("sparse", {"indices": [1, 8], "values": [0.5, -1.0]}),
    "sparse values swapped": changed_vector("sparse", {"indices": [1, 7], "values": [-1.0, 0.5]}),
    "no multi": changed_vector("multi", None),
    "empty multi": changed_vector("multi", []),
    "multi in another order": changed_vector("multi", [[3.0, 4.0], [1.0, 2.0]]),
    "multi repeated": changed_vector("multi", [[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]),
}


def test_no_two_different_records_have_one_digest() -> None:
    digests = {"as it was": one_digest(FULL)} | {
        what: one_digest(record) for what, record in DIFFERENT.items()
    }
    seen: dict[int, str] = {}
    for what, found in digests.items():
        assert found not in seen, f"{what!r} looks like {seen[found]!r}"
        seen[found] = what


def test_the_default_namespace_is_that_of_a_collection_without_any() -> None:
    default = one_digest(replace(FULL, namespace=""))
    assert default == one_digest(replace(FULL, namespace=None))
    without = EVERYTHING.model_copy(update={"has_namespaces": False})
    assert default == batches.digest([to_batch([FULL], without)])


@given(st.integers(0, 31), st.integers(0, 3))
def test_every_bit_of_a_vector_counts(bit: int, at: int) -> None:
    bits = np.array([1.0, -2.0, 0.0, 3e38], np.float32).view(np.uint32)
    before = changed_vector("", bits.view(np.float32).copy())
    bits[at] ^= np.uint32(1 << bit)
    assert one_digest(before) != one_digest(changed_vector("", bits.view(np.float32)))


def test_two_vectors_that_change_places_change_the_digest() -> None:
    schema = CollectionSchema(
        name="two",
        vectors=(VectorField(name="a", dimensions=2), VectorField(name="b", dimensions=2)),
        id_kinds=frozenset({IdKind.STR}),
    )
    x, y = np.array([1, 2], np.float32), np.array([3, 4], np.float32)
    first, second = Record("r", {"a": x, "b": y}), Record("r", {"a": y, "b": x})
    assert one_digest(first, schema) != one_digest(second, schema)
    missing = Record("r", {"a": x}), Record("r", {"b": x})
    assert one_digest(missing[0], schema) != one_digest(missing[1], schema)


def test_order_of_a_sparse_vectors_entries_means_nothing() -> None:
    turned = changed_vector("sparse", {"indices": [7, 1], "values": [-1.0, 0.5]})
    assert one_digest(turned) == one_digest(FULL)


def test_bytes_behind_a_null_mean_nothing() -> None:
    hidden = batches.dense_vectors(
        np.arange(8, dtype=np.float32).reshape(2, 4), missing=np.array([False, True])
    )
    zeroed = batches.dense_vectors(
        np.array([[0, 1, 2, 3], [0, 0, 0, 0]], np.float32), missing=np.array([False, True])
    )
    schema = plain_schema("c", dimensions=4)
    plain = to_batch([Record("a"), Record("b")], schema)
    at = plain.schema.get_field_index(batches.VECTOR)
    first, second = (plain.set_column(at, batches.VECTOR, column) for column in (hidden, zeroed))
    assert batches.record_digests(first) == batches.record_digests(second)


# ── order, ids, vectors ──────────────────────────────────────────────────────────────────────────────


def test_take_by_id_gives_the_wanted_order_and_says_what_is_missing() -> None:
    records = plain_records(10)
    batch = to_batch(records, SCHEMA)
    wanted = batches.id_batch(["doc#00007", "gone", "doc#00002", "gone too"])
    found, missing = batches.take_by_id(batch.slice(1), wanted)
    assert batches.typed_ids(found) == ["doc#00007", "doc#00002"]
    assert missing.tolist() == [False, True, False, True]
    assert by_id(from_batches([found])) == by_id([records[7], records[2]])


def test_take_by_id_tells_kinds_of_id_apart() -> None:
    schema = SCHEMA.model_copy(update={"id_kinds": frozenset(IdKind)})
    ids: list[batches.RecordId] = [1, "1", uuid.UUID(int=1), str(uuid.UUID(int=1)), -1, "int:1"]
    batch = to_batch([Record(value) for value in ids], schema)
    for value in ids:
        found, missing = batches.take_by_id(batch, batches.id_batch([value]))
        assert batches.typed_ids(found) == [value]
        assert not missing.any()


def test_take_by_id_of_nothing() -> None:
    batch = to_batch(plain_records(2), SCHEMA)
    found, missing = batches.take_by_id(batch, batches.id_batch([]))
    assert (found.num_rows, missing.size) == (0, 0)
    found, missing = batches.take_by_id(batch.slice(0, 0), batches.id_batch(["doc#00000"]))
    assert (found.num_rows, missing.tolist()) == (0, [True])


def test_matrix_of_a_slice_is_the_slice_of_the_matrix() -> None:
    matrix = np.arange(40, dtype=np.float32).reshape(10, 4)
    column = batches.dense_vectors(matrix)
    assert np.array_equal(batches.dense_matrix(column.slice(3, 5)), matrix[3:8])
    assert np.shares_memory(batches.dense_matrix(column), matrix)
    assert batches.dense_matrix(column.slice(10)).shape == (0, 4)


def test_null_inside_a_vector_is_refused_and_under_a_missing_one_is_not() -> None:
    kind = pa.list_(pa.float32(), 2)
    missing = pa.array([[1, 2], None, [3, 4]], kind)
    assert batches.dense_matrix(missing)[[0, 2]].tolist() == [[1, 2], [3, 4]]
    assert batches.dense_matrix(missing.slice(2)).tolist() == [[3, 4]]
    with pytest.raises(DimensionMismatchError, match="null among its numbers"):
        batches.dense_matrix(pa.array([[1, 2], [3, None]], kind))


def test_rows_with_a_vector_that_is_not_finite_are_found_and_missing_ones_are_not_among_them() -> None:
    bad = np.array([1, np.nan, 3, 4], np.float32)
    records = [replace(FULL, id=0), replace(changed_vector("", bad), id=1), replace(FULL, id=2, vectors={})]
    records.append(replace(changed_vector("sparse", {"indices": [1], "values": [np.inf]}), id=3))
    records.append(replace(changed_vector("multi", [[1.0, 2.0], [np.nan, 0.0]]), id=4))
    batch = to_batch(records, EVERYTHING)
    found = {
        name: np.flatnonzero(batches.non_finite_rows(batch.column(name))).tolist()
        for name in ("vector", "vector:half", "vector:bytes", "vector:sparse", "vector:multi")
    }
    assert found == {
        "vector": [1],
        "vector:half": [],
        "vector:bytes": [],
        "vector:sparse": [3],
        "vector:multi": [4],
    }


def test_vectors_of_other_dimensions_are_refused_by_name() -> None:
    batch = to_batch(plain_records(1, dimensions=8), SCHEMA)
    batches.check_dimensions(batch, SCHEMA, where="memory:x#c")
    with pytest.raises(DimensionMismatchError, match=r"memory:x#c.*\(default\).*\[8\].*\[16\]"):
        batches.check_dimensions(batch, plain_schema("c", dimensions=16), where="memory:x#c")


@given(st.lists(st.integers() | st.uuids() | st.text(st.characters(codec="utf-8")), max_size=5))
def test_ids_come_back_with_their_types(ids: list[batches.RecordId]) -> None:
    found = batches.typed_ids(batches.id_batch(ids))
    assert found == ids
    assert list(map(type, found)) == list(map(type, ids))
