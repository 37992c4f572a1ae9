"""What the conformance suite and the state machine share: harnesses, collections, samples of every kind."""

from __future__ import annotations

import datetime as dt
import decimal
import importlib
import itertools
import math
import pkgutil
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from migration_pipelines import batch as batches
from migration_pipelines.metadata import value_kinds
from migration_pipelines.model import CollectionSchema, IdKind, Metric, Span, ValueKind, VectorField
from migration_pipelines.store import Store, open_address
from migration_pipelines_tests import harnesses
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record, from_batches, plain_records, to_batch

METRICS = (Metric.EUCLIDEAN, Metric.COSINE, Metric.DOT)

_NUMBERS = itertools.count(1)
_RNG = np.random.default_rng(20)

SAMPLES: Mapping[ValueKind, Sequence[Any]] = {
    ValueKind.TEXT: ["x", "naïve 漢字 🦜", "line\nbreak\ttab", "'\"\\%s{}$1", "1", "null", "x" * 10_000],
    ValueKind.EMPTY_TEXT: [""],
    ValueKind.NUL_TEXT: ["\0", "a\0b"],
    ValueKind.BOOL: [True, False],
    ValueKind.INT53: [0, 1, -1, 2**31, 2**53, -(2**53)],
    ValueKind.INT64: [2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)],
    ValueKind.UINT64: [2**63, 2**64 - 1],
    ValueKind.BIG_INT: [2**64, -(2**63) - 1, 10**40],
    ValueKind.SHORT_FLOAT: [0.0, 1.0, 0.1, -2.5e10, 123456789.012345, 1e-20, 1e15, 19.99],
    ValueKind.FLOAT: [0.1 + 0.2, 1 / 3, 5e-324, 2.2250738585072014e-308, *_RNG.random(400).tolist()],
    ValueKind.INTEGRAL_FLOAT: [1e16, -1e22, 2.0**70, 1e300, 1.7976931348623157e308],
    ValueKind.NEGATIVE_ZERO: [-0.0],
    ValueKind.NON_FINITE: [math.nan, math.inf, -math.inf],
    ValueKind.NULL: [None],
    ValueKind.OBJECT: [{"a": 1, "b": {"c": "x"}}, {"": "empty key"}, {"list": [1, 2]}],
    ValueKind.LIST_OF_TEXT: [["a"], ["b", "a", "b"], ["漢", "1"]],
    ValueKind.LIST_OF_NUMBERS: [[1], [3, 1, 2], [0.5, 1.0]],
    ValueKind.LIST_OF_BOOLS: [[True], [False, True]],
    ValueKind.MIXED_LIST: [[1, "a"], [1, 2.0], [[1], [2]], ["a", None], [{"a": 1}]],
    ValueKind.EMPTY_LIST: [[]],
    ValueKind.DATETIME: [
        dt.datetime(2024, 2, 29, 23, 59, 59, 999999, dt.UTC),
        dt.datetime(1969, 12, 31, 12),  # noqa: DTZ001 - without a time zone is a kind of its own
        dt.date(1, 1, 1),
        dt.time(1, 2, 3, 4),
    ],
    ValueKind.DECIMAL: [decimal.Decimal("19.990"), decimal.Decimal("1e-30")],
    ValueKind.BYTES: [b"", b"\x00\xff"],
}

TEXT_IDS = [
    *(
        "a",
        "A",
        " a ",
        "1",
        "01",
        "-1",
        "1.0",
        "true",
        "null",
        "None",
        "naïve",
        "nai\u0308ve",
        "漢字",
        "🦜",
        "a b",
    ),
    *(
        "line\nbreak",
        "tab\t",
        "'",
        '"',
        "\\",
        "%",
        "_",
        "%2F",
        "a/b",
        "../a",
        "#?&=",
        "$1",
        "{}",
        "a,b",
        "a;b",
    ),
    *(
        "00000000-0000-4000-8000-000000000000",
        "00000000-0000-4000-8000-00000000000A",
        "\0",
        "a\0b",
        "é" * 250,
    ),
    "x" * 500,
]


def all_harnesses() -> list[type[Harness]]:
    """Every harness class of every file in `harnesses/`."""
    names = [module.name for module in pkgutil.iter_modules(harnesses.__path__) if module.name != "base"]
    modules = [importlib.import_module(f"{harnesses.__name__}.{name}") for name in names]
    return [harness for module in modules for harness in module.HARNESSES]


def require(condition: bool, reason: str) -> None:
    """Leave a test out for a store that doesn't declare what it is about."""
    if not condition:
        pytest.skip(f"not declared: {reason}")


# ── collections ──────────────────────────────────────────────────────────────────────────────────────


def new_name(store: Store) -> str:
    """A name that no collection has had, as the store spells it: Weaviate begins one with a capital."""
    name = f"c{next(_NUMBERS):05d}"
    return open_address(store.address(name))[1] or name


def new_schema(
    store: Store, *, dimensions: int = 8, metric: Metric | None = None, **fields: Any
) -> CollectionSchema:
    """A schema that the store can hold: one dense vector, the simplest id kind it has."""
    can = store.capabilities
    chosen = metric or (Metric.EUCLIDEAN if Metric.EUCLIDEAN in can.metrics else sorted(can.metrics)[0])
    kind = IdKind.STR if IdKind.STR in can.id_kinds else sorted(can.id_kinds)[0]
    values = {
        "name": new_name(store),
        "vectors": (VectorField(dimensions=dimensions, metric=chosen),),
        "id_kinds": frozenset({kind}),
        "has_documents": can.documents,
    }
    return CollectionSchema(**{**values, **fields})


def adapted(store: Store, schema: CollectionSchema, records: Iterable[Record]) -> CollectionSchema:
    """The schema as the store would create it for these records."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for key, value in (record.metadata or {}).items():
            kinds[key].update(kind.value for kind in value_kinds(value))
    return store.adapt(schema, kinds)


def records_for(store: Store, n: int, **options: Any) -> list[Record]:
    """Ordinary records with ids that the store can hold."""
    records = plain_records(n, **options)
    if IdKind.STR in store.capabilities.id_kinds:
        return records
    made = int if IdKind.INT in store.capabilities.id_kinds else _uuid
    start = options.get("start", 0)
    return [replace(record, id=made(number)) for number, record in enumerate(records, start)]


def _uuid(number: int) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, str(number))


def load(
    store: Store,
    schema: CollectionSchema,
    records: Sequence[Record],
    *,
    part: str = "0",
    adapt_to: Sequence[Record] | None = None,
) -> CollectionSchema:
    """Bring records into a new collection the way the engine does, one made for `adapt_to` if given."""
    schema = adapted(store, schema, adapt_to or records)
    store.create(schema)
    store.begin_load(schema.name)
    with store.load_part(schema.name, part) as write:
        for batch in batches.split(to_batch(records, schema), max_records=500, max_bytes=None):
            write(batch)
    store.finish_load(schema.name)
    return schema


def ids_of(records: Iterable[Record]) -> pa.RecordBatch:
    """The batch of what names the records: their ids, and their namespaces where they have any."""
    records = list(records)
    ids = batches.id_batch([record.id for record in records])
    spaces = [record.namespace for record in records]
    return ids if not any(spaces) else ids.append_column(batches.NAMESPACE, pa.array(spaces, pa.string()))


# ── reading everything ───────────────────────────────────────────────────────────────────────────────


def spans_of(store: Store, collection: str, span_records: int) -> list[tuple[Span, pa.RecordBatch | None]]:
    """The spans of a collection, as they come out of the ledger: through JSON."""
    found = store.split(collection, span_records=span_records)
    return [(Span.model_validate_json(span.model_dump_json()), ids) for span, ids in found]


def scanned(
    store: Store,
    collection: str,
    spans: Iterable[tuple[Span, pa.RecordBatch | None]],
    *,
    batch_records: int = 100,
    vectors: bool = True,
) -> Iterator[pa.RecordBatch]:
    """Every batch of these spans."""
    for span, ids in spans:
        yield from store.scan(collection, span, ids=ids, batch_records=batch_records, vectors=vectors)


def read_all(store: Store, collection: str, *, span_records: int = 100) -> list[Record]:
    """Every record, read as a source is read."""
    return from_batches(scanned(store, collection, spans_of(store, collection, span_records)))


def reopened(store: Store) -> Store:
    """The same store in another object, with connections of its own."""
    return type(store)(**{name: getattr(store, name) for name in type(store).model_fields})


# ── comparing ────────────────────────────────────────────────────────────────────────────────────────


def assert_same(found: Iterable[Record], expected: Iterable[Record], store: Store) -> None:
    """Two sets of records are equal, bit for bit, and none is there twice."""
    left = [_comparable(record, store) for record in found]
    doubles = [key for key, count in Counter(item[0] for item in left).items() if count > 1]
    assert not doubles, f"there twice: {doubles[:5]}"
    there = {item[0]: item for item in left}
    wanted = {item[0]: item for item in (_comparable(record, store) for record in expected)}
    missing, unexpected = wanted.keys() - there.keys(), there.keys() - wanted.keys()
    assert not missing, f"missing: {sorted(missing)[:5]}"
    assert not unexpected, f"not expected: {sorted(unexpected)[:5]}"
    for key, item in wanted.items():
        assert there[key] == item, f"found {there[key]!r:.2000}\nexpected {item!r:.2000}"


def _comparable(record: Record, store: Store) -> tuple[Any, ...]:
    key, vectors, document, metadata, namespace = record.exact()
    if metadata is None and not store.capabilities.no_metadata:
        metadata = "{}"
    return key, vectors, document, metadata, namespace


def holdable_ids(store: Store) -> list[str]:
    """Awkward text ids that the store says it can hold."""
    can = store.capabilities
    refused = re.compile(f"[{re.escape(can.id_text_refuses)}]") if can.id_text_refuses else None
    return [
        text
        for text in TEXT_IDS
        if not (refused and refused.search(text))
        and store.accepts_id(text)
        and (can.max_id_bytes is None or len(text.encode()) <= can.max_id_bytes)
    ]
