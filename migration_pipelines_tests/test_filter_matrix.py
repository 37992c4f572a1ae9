"""Every filter means the same in every store: what a rule written here in plain Python says of each record.

Each store holds two collections. `kept` has been moved there, so that what the store can't hold is in the
envelope; `found` was written around the connector, with what the store itself can hold. Each is read as the
engine reads it: asked for what the filter says, then looked at record by record.
"""

from __future__ import annotations

import datetime as dt
import decimal
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from migration_pipelines import VectorStoreMigrator, filters
from migration_pipelines.batch import typed_ids
from migration_pipelines.envelope import decode, is_held
from migration_pipelines.model import ValueKind
from migration_pipelines.store import Store
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.conformance import new_name, new_schema, records_for
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record, plain_schema, to_batch
from migration_pipelines_tests.shell import shell

__all__ = ["shell"]  # a fixture

RECORDS = 100
NOON = dt.datetime(2025, 1, 31, 12, tzinfo=dt.UTC)
ABSENT = object()

# ── the records ──────────────────────────────────────────────────────────────────────────────────────

# Each record gets one value of each field, drawn by lot, so that all of them meet.
FIELDS: Mapping[str, Sequence[Any]] = {
    # of one kind throughout, which stores index
    "lang": ["en", "de", "", "日本", "EN", "naïve ключ 🦜", "it's \"so\""],
    "year": [1999, 2000, 2024, 2025, 2026, 0, -1, 2**31, 7, 2023, 2030],
    "half": [0.5, 2.0, -1.5, 0.1, 0.30000000000000004],
    "draft": [True, False, ABSENT],
    "tags": [["a"], ["a", "b"], ["b", "a"], "a", ABSENT],
    # of one kind, too large or too fine for many
    "big": [2**53, 2**53 + 1, 2**53 - 1, -(2**53) - 1, 2**63 - 1, 2**64 - 1, 10**25],
    "fine": [1e300, 5e-324, 1 / 3, -0.0, 0.0, 1e22, 3.0],
    # of many kinds
    "status": ["active", "archived", None, ABSENT, 1, True, "", "1", ["active"], {"is": "active"}, "Active"],
    "mixed": [
        *(2024, 2024.0, 2024.5, "2024", True, False, 1, 0, None, ABSENT, [], [2024], [1, "a", None]),
        *({}, {"n": 2024}, {"n": 2024.0}, float("nan"), float("inf"), decimal.Decimal("2024"), b"\0\xff"),
        *(2**53 + 1, 2.0**53, "z", "ä"),
    ],
    "at": [
        *(NOON, NOON.replace(hour=11), NOON.replace(tzinfo=None), dt.date(2025, 1, 31), dt.date(2025, 2, 1)),
        *("2025-01-31", ABSENT),
    ],
    # awkward names
    "a.b": [1, 2, ABSENT],
    "a": [{"b": 1}, {"b": 2}, "b", ABSENT, {}],
    'say "so"': ["x", "y"],
    "it's": ["x", "y", ABSENT],
    "$price": [3, 4.5, None],
    "": ["empty", ABSENT, "name"],
    "ключ 鍵": ["v", "w"],
    "_source_id": ["mine", ABSENT, "yours"],
}  # fmt: skip
# What not every vendor's own client can write, even where the connector can.
NOT_NATIVE = {
    *(ValueKind.NON_FINITE, ValueKind.DATETIME, ValueKind.DECIMAL, ValueKind.BYTES, ValueKind.BIG_INT),
}
PLAIN = ("lang", "year", "half", "draft")  # of one kind of value, under a plain name


def rows() -> list[dict[str, Any] | None]:
    """The metadata of each record."""
    lot = random.Random(11)
    drawn = [{key: lot.choice(values) for key, values in FIELDS.items()} for _ in range(RECORDS - 8)]
    there = [{key: value for key, value in row.items() if value is not ABSENT} for row in drawn]
    return [*[None, {}] * 4, *there]


ROWS = rows()

# ── the filters ──────────────────────────────────────────────────────────────────────────────────────

# Each with the mapping that it stands for, where it is a short text; all select some records and leave some.
FILTERS: Sequence[tuple[Any, Mapping[str, Any]]] = [
    *(
        (where, where)
        for where in (
            {"lang": "en"},
            {"lang": {"$eq": ""}},
            {"lang": {"$in": ["日本", "naïve ключ 🦜", 'it\'s "so"', 7]}},
            {"lang": {"$ne": "en"}},
            {"lang": {"$gt": "e", "$lte": "en"}},
            {"year": 2024.0},
            {"year": {"$gte": 2000, "$lt": 2025}},
            {"year": {"$gt": 2024.5}},
            {"half": {"$lte": decimal.Decimal("0.3")}},
            {"half": {"$in": [0.1 + 0.2, 2]}},
            {"draft": True},
            {"draft": {"$exists": False}},
            {"tags": ["a", "b"]},
            {"tags": "a"},
            {"big": 2**53 + 1},
            {"big": {"$gt": 2.0**53}},
            {"fine": {"$lte": 0}},
            {"fine": {"$gt": 0, "$lt": 0.5}},
            {"status": "active", "year": {"$gte": 2024}},
            {"status": None},
            {"status": {"$nin": ["active", None, True]}},
            {"mixed": 2024},
            {"mixed": {"$lt": 2024.25}},
            {"mixed": {"$gte": "2024"}},
            {"mixed": {"$in": [1, None, [], {"n": 2024}, b"\0\xff"]}},
            {"mixed": {"$ne": float("nan")}, "draft": False},
            {"at": {"$gte": NOON.astimezone(dt.timezone(dt.timedelta(hours=5)))}},
            {"at": {"$in": [dt.date(2025, 1, 31), "2025-01-31"]}},
            {"a.b": 1},
            {"a": {"b": 1}},
            {'say "so"': "x", "it's": {"$exists": True}},
            {"$$price": {"$gt": 3.5}},
            {"": "empty"},
            {"_source_id": "mine"},
            {"$or": [{"lang": "de"}, {"$and": [{"year": 2025}, {"$not": {"draft": True}}]}]},
            {"$not": {"$or": [{"year": {"$lt": 2025}}, {"mixed": {"$exists": False}}]}},
        )
    ),
    ("status=active,year>=2025", {"status": "active", "year": {"$gte": 2025}}),
    ("lang!=en, half <= 0.5", {"lang": {"$ne": "en"}, "half": {"$lte": 0.5}}),
    ('"say \\"so\\""=x,status="1"', {'say "so"': "x", "status": "1"}),
    ("$$price=null,draft=false", {"$$price": None, "draft": False}),
    ("ключ 鍵=v,big>9007199254740992", {"ключ 鍵": "v", "big": {"$gt": 2**53}}),
]


# ── what they mean ───────────────────────────────────────────────────────────────────────────────────


def holds(where: Mapping[str, Any], fields: Mapping[str, Any] | None) -> bool:
    """The grammar as it is documented, said once more."""
    return all(_condition(key, item, fields or {}) for key, item in where.items())


def _condition(key: str, item: Any, fields: Mapping[str, Any]) -> bool:
    if key == "$and":
        return all(holds(part, fields) for part in item)
    if key == "$or":
        return any(holds(part, fields) for part in item)
    if key == "$not":
        return not holds(item, fields)
    found = fields.get(key.replace("$$", "$", 1) if key.startswith("$$") else key, ABSENT)
    is_operators = isinstance(item, dict) and any(name.startswith("$") for name in item)
    asked = item if is_operators else {"$eq": item}
    return all(MEANINGS[name](found, value) for name, value in asked.items())


def _sort(value: Any) -> str:
    """The sort of a value: only values of one sort are equal or in order."""
    if isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool):
        return "number"
    if isinstance(value, dt.datetime):
        return "local" if value.tzinfo is None else "instant"
    return type(value).__name__


def _equal(found: Any, value: Any) -> bool:
    if _sort(found) != _sort(value):
        return False
    if isinstance(value, dict):
        return found.keys() == value.keys() and all(_equal(found[key], value[key]) for key in value)
    if isinstance(value, list):
        return len(found) == len(value) and all(map(_equal, found, value))
    return bool(found == value)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    sorts = {"number", "str", "instant", "local", "date", "time"}
    return lambda found, value: _sort(found) == _sort(value) in sorts and compare(found, value)


MEANINGS: Mapping[str, Callable[[Any, Any], bool]] = {
    "$eq": _equal,
    "$ne": lambda found, value: not _equal(found, value),
    "$in": lambda found, values: any(_equal(found, value) for value in values),
    "$nin": lambda found, values: not any(_equal(found, value) for value in values),
    "$exists": lambda found, value: (found is not ABSENT) is value,
    "$lt": _ordered(operator.lt),
    "$lte": _ordered(operator.le),
    "$gt": _ordered(operator.gt),
    "$gte": _ordered(operator.ge),
}


def expected(where: Mapping[str, Any], rows: Mapping[Any, Mapping[str, Any] | None]) -> set[Any]:
    return {record_id for record_id, fields in rows.items() if holds(where, fields)}


# ── the collections ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Collection:
    """A collection of a store, and the metadata of each record that was written into it."""

    store: Store
    name: str
    rows: Mapping[Any, Mapping[str, Any] | None]


@pytest.fixture(scope="module")
def origin() -> Iterator[MemoryStore]:
    """The collection in memory from which the others are moved."""
    store = MemoryStore(name="filter-matrix")
    schema = plain_schema("origin")
    store.create(schema)
    store.upsert("origin", to_batch(_records([f"record {n}" for n in range(RECORDS)], ROWS), schema))
    yield store
    store.drop("origin")


def _records(ids: Sequence[Any], rows: Sequence[Mapping[str, Any] | None]) -> list[Record]:
    vectors = np.random.default_rng(3).standard_normal((len(ids), 8)).astype(np.float32)
    return [
        Record(id=record_id, vectors={"": vector}, document=f"Passage {n}", metadata=fields)
        for n, (record_id, vector, fields) in enumerate(zip(ids, vectors, rows, strict=True))
    ]


@pytest.fixture(scope="module")
def kept(
    harness: Harness, origin: MemoryStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Collection]:
    """The records as a migration brings them, whatever the store can hold."""
    name, folder = new_name(harness.store), tmp_path_factory.mktemp("kept")
    result = VectorStoreMigrator(origin, harness.store).migrate(
        "origin", name, checkpoint_file=folder / "kept.json"
    )
    assert result.success, result.errors
    yield Collection(harness.store, name, {f"record {n}": row for n, row in enumerate(ROWS)})
    harness.store.drop(name)


@pytest.fixture(scope="module")
def found(harness: Harness) -> Iterator[Collection]:
    """The records as somebody else wrote them: of each what the store itself can hold."""
    store = harness.store
    schema = new_schema(store)
    exact = store.exact_kinds(schema) - NOT_NATIVE

    def native(fields: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        return fields and {
            key: value
            for key, value in fields.items()
            if is_held(key, value, exact=exact, accepts_key=store.accepts_key)
            and (harness.mixes_kinds or key in PLAIN)
        }

    ids = [record.id for record in records_for(store, RECORDS)]
    rows = [native(fields) for fields in ROWS]
    harness.write(schema, _records(ids, rows))
    yield Collection(store, schema.name, dict(zip(ids, rows, strict=True)))
    store.drop(schema.name)


def answered(collection: Collection, where: filters.Filter) -> list[Any]:
    """The ids in scope, read as the engine reads them."""
    store, name = collection.store, collection.name
    ids: list[Any] = []
    for span, listed in store.split(name, span_records=64, where=where):
        for stored in store.scan(name, span, ids=listed, batch_records=50, where=where, vectors=False):
            batch = decode(stored)
            ids += typed_ids(batch.filter(filters.mask(where, batch)))
    return ids


# ── the matrix ───────────────────────────────────────────────────────────────────────────────────────


def check(collection: Collection, asked: Any, meant: Mapping[str, Any]) -> None:
    where = filters.parse(asked)
    assert where is not None
    wanted = expected(meant, collection.rows)
    ids = answered(collection, where)
    assert len(ids) == len(set(ids))
    assert set(ids) == wanted


def each(filters: Sequence[tuple[Any, Mapping[str, Any]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("asked", "meant"), filters, ids=[str(asked) for asked, _ in filters])


each_filter, some_filters = each(FILTERS), each(FILTERS[::4])


@each_filter
def test_a_filter_selects_what_it_says_of_what_was_moved(
    kept: Collection, asked: Any, meant: Mapping[str, Any]
) -> None:
    check(kept, asked, meant)


@some_filters
def test_a_filter_selects_what_it_says_of_what_others_wrote(
    found: Collection, asked: Any, meant: Mapping[str, Any]
) -> None:
    check(found, asked, meant)


@some_filters
def test_what_a_filter_selects_is_counted(kept: Collection, asked: Any, meant: Mapping[str, Any]) -> None:
    where = filters.parse(asked)
    assert kept.store.count(kept.name, where) == len(expected(meant, kept.rows))


@each_filter
def test_each_filter_of_the_matrix_selects_some_records_and_leaves_some(
    asked: Any, meant: Mapping[str, Any]
) -> None:
    wanted = expected(meant, dict(enumerate(ROWS)))
    assert 0 < len(wanted) < RECORDS
    assert filters.parse(asked) == filters.parse(meant)


def test_the_matrix_has_every_operator() -> None:
    wheres = [filters.parse(asked) for asked, _ in FILTERS]
    assert frozenset().union(*(filters.operators(where) for where in wheres if where)) == filters.OPERATORS
