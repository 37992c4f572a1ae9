"""Every store against a plain dict, under whatever order of operations Hypothesis thinks of."""

from __future__ import annotations

import uuid
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from migration_pipelines.model import IdKind, ValueKind
from migration_pipelines.store import Store
from migration_pipelines_tests.conformance import (
    assert_same,
    holdable_ids,
    ids_of,
    load,
    new_schema,
    read_all,
    reopened,
    scanned,
    spans_of,
)
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.records import Record, from_batches, to_batch

DIMENSIONS = 3
_TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
_VALUES = {
    ValueKind.TEXT: _TEXTS,
    ValueKind.EMPTY_TEXT: st.just(""),
    ValueKind.BOOL: st.booleans(),
    ValueKind.INT53: st.integers(-(2**53), 2**53),
    ValueKind.SHORT_FLOAT: st.sampled_from([0.5, -1.25, 19.99, 1e-7]),
    ValueKind.LIST_OF_TEXT: st.lists(_TEXTS, min_size=1, max_size=3),
}
_FLOATS = st.floats(-(2.0**50), 2.0**50, width=32)


def record_ids(store: Store) -> list[Any]:
    """A few ids, so that operations meet the same record again."""
    can = store.capabilities
    if can.id_kinds == {IdKind.UUID}:
        return [uuid.UUID(int=number) for number in (0, 1, 2, 2**127, 2**128 - 1)]
    texts = holdable_ids(store)[::4] if IdKind.STR in can.id_kinds else []
    return [*texts, 1, 2, 2**53 + 1] if IdKind.INT in can.id_kinds and (can.mixed_ids or not texts) else texts


def any_fields(harness: Harness) -> st.SearchStrategy[dict[str, Any]]:
    """Metadata of one to four fields that the store holds exactly."""
    store = harness.store
    keys = list(filter(store.accepts_key, ["a", "b", "naïve", "with space", "UPPER"]))
    values = [values for kind, values in _VALUES.items() if kind in store.capabilities.value_kinds]
    if harness.one_type_a_field:
        return st.fixed_dictionaries({}, optional=dict(zip(keys, values, strict=False))).filter(bool)
    return st.dictionaries(st.sampled_from(keys), st.one_of(values), min_size=1, max_size=4)


def any_record(harness: Harness) -> st.SearchStrategy[Record]:
    """Records that the store says it holds exactly."""
    store, can = harness.store, harness.store.capabilities
    fields = any_fields(harness)
    empty = [st.just({})] if ValueKind.NO_FIELDS in can.value_kinds else []
    none = [st.none()] if can.no_metadata else []
    vector = st.lists(_FLOATS, min_size=DIMENSIONS, max_size=DIMENSIONS)
    vector = vector if harness.holds_zero_vectors else vector.filter(any)
    return st.builds(
        lambda record_id, numbers, document, metadata: Record(
            id=record_id, vectors={"": np.array(numbers, np.float32)}, document=document, metadata=metadata
        ),
        st.sampled_from(record_ids(store)),
        vector,
        st.none() | _TEXTS,
        st.one_of(fields, *empty, *none),
    )


def machine_of(harness: Harness) -> type[RuleBasedStateMachine]:
    """The state machine of one store."""
    store, can = harness.store, harness.store.capabilities
    some_records = st.lists(any_record(harness), max_size=8, unique_by=Record.key)
    some_ids = st.lists(st.sampled_from(record_ids(store)), max_size=5, unique_by=lambda i: (type(i), i))

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.store = store
            self.name = ""
            self.expected: dict[Any, Record] = {}
            self.spans: list[Any] | None = None
            self.in_spans: set[Any] = set()
            self.parts = 0

        @initialize(records=some_records)
        def create(self, records: list[Record]) -> None:
            kinds = frozenset(IdKind) if can.mixed_ids else new_schema(store).id_kinds
            schema = new_schema(store, dimensions=DIMENSIONS, id_kinds=kinds & can.id_kinds)
            self.schema = load(store, schema, records)
            self.name = self.schema.name
            self._hold(records)

        def _hold(self, records: list[Record]) -> None:
            self.expected |= {record.key(): record for record in records}

        @rule(records=some_records)
        def upsert(self, records: list[Record]) -> None:
            self.store.upsert(self.name, to_batch(records, self.schema))
            self._hold(records)

        @rule(records=some_records, twice=st.booleans())
        def load_part(self, records: list[Record], *, twice: bool) -> None:
            self.parts += 1
            for _ in range(1 + twice):
                with self.store.load_part(self.name, str(self.parts)) as write:
                    write(to_batch(records, self.schema))
            if self.store.merges_at_the_end:
                self.store.finish_load(self.name)
            self._hold(records)
            self.spans = None  # a part may take records away from where the spans have them

        @precondition(lambda self: can.deletes)
        @rule(ids=some_ids)
        def delete(self, ids: list[Any]) -> None:
            gone = [Record(id=record_id) for record_id in ids]
            self.store.delete(self.name, ids_of(gone))
            for record in gone:
                self.expected.pop(record.key(), None)
                self.in_spans.discard(record.key())

        @rule(ids=some_ids)
        def fetch(self, ids: list[Any]) -> None:
            wanted = [Record(id=record_id) for record_id in ids]
            found = from_batches([self.store.fetch(self.name, ids_of(wanted))])
            assert_same(found, [self.expected[r.key()] for r in wanted if r.key() in self.expected], store)

        @rule(span_records=st.integers(1, 12))
        def split(self, span_records: int) -> None:
            self.spans = spans_of(self.store, self.name, span_records)
            self.in_spans = set(self.expected)

        @precondition(lambda self: self.spans is not None and can.stable_scan)
        @rule(batch_records=st.integers(1, 5))
        def scan_spans_of_before(self, batch_records: int) -> None:
            found = from_batches(scanned(self.store, self.name, self.spans, batch_records=batch_records))
            # What came since the split may be there or not; what was there and stayed must, as it is now.
            assert_same(
                [record for record in found if record.key() in self.in_spans],
                [self.expected[key] for key in self.in_spans],
                store,
            )
            assert all(record.key() in self.expected for record in found)

        @rule()
        def open_again(self) -> None:
            if self.store is not store:
                self.store.close()
            self.store = reopened(store)

        @rule()
        def finish_again(self) -> None:
            self.store.finish_load(self.name)

        @invariant()
        def counts(self) -> None:
            assert self.store.count(self.name) == len(self.expected)

        def teardown(self) -> None:
            if not self.name:
                return
            assert_same(read_all(self.store, self.name, span_records=5), self.expected.values(), store)
            assert_same(harness.read(self.name), self.expected.values(), store)
            self.store.drop(self.name)
            if self.store is not store:
                self.store.close()

    return Machine


def test_a_store_behaves_like_a_dict(harness, store):
    run_state_machine_as_test(
        machine_of(harness),
        settings=settings(
            max_examples=15,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # against a server, to shrink a failure takes longer than a test may
        ),
    )
