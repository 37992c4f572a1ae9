"""The envelope: whatever a target can't hold is kept, and read back as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from migration_pipelines.envelope import (
    SOURCE_EXTRA,
    SOURCE_ID,
    SOURCE_NAMESPACE,
    decode,
    encode_metadata,
    is_held,
)
from migration_pipelines.metadata import dump_metadata, load_metadata, value_kind, value_kinds
from migration_pipelines.model import ValueKind
from migration_pipelines_tests.test_metadata import VALUES

ALL_KINDS = frozenset(kind.value for kind in ValueKind)
# The least that a target with metadata holds: the envelope itself is text.
LEAST = frozenset({ValueKind.TEXT.value, ValueKind.SHORT_FLOAT.value})
# What a user may have put under the reserved names, above all what looks like an envelope.
LOOKALIKES = st.sampled_from(
    [
        "",
        "{",
        "{}",
        "null",
        '{"int":"5"}',
        '{"str":"a"}',
        '{"int":5}',
        '{"fields":{}}',
        '{"fields":{"a":1}}',
        '{"fields":5}',
        '{"fields":{"_source_id":"{\\"int\\":\\"7\\"}"}}',
        '{"document":"another"}',
        '{"metadata":null}',
        '{"metadata":null,"more":1}',
    ]
)
KEYS = st.sampled_from(["a", "b", "", "é", "$typed", "a.b", "_source_x", SOURCE_ID, SOURCE_EXTRA])
METADATA = st.none() | st.dictionaries(KEYS, VALUES | LOOKALIKES, max_size=5)
EXACT = st.sets(st.sampled_from(sorted(ALL_KINDS))).map(lambda kinds: LEAST | kinds)
ACCEPTS: dict[str, Callable[[str], bool]] = {
    "any": lambda key: True,
    "none of the user's": lambda key: key.startswith("_source_"),
    "identifiers": str.isidentifier,
}
IDS = st.sampled_from([("5", "int"), ("5", "str"), ("", "str"), ('"}', "str"), ("x" * 600, "str")])
DOCUMENTS = st.none() | st.text(max_size=5)


def _batch(record_id: tuple[str, str], document: str | None, metadata: str | None) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "id": pa.array([record_id[0]], pa.string()),
            "id_type": pa.array([record_id[1]], pa.string()),
            "document": pa.array([document], pa.string()),
            "metadata": pa.array([metadata], pa.string()),
        }
    )


def _text(metadata: dict[str, Any] | None) -> str | None:
    return None if metadata is None else dump_metadata(metadata)


def _stored(metadata: dict[str, Any] | None, *, holds_none: bool, exact: set[str]) -> str | None:
    """What a target gives back that can't tell no metadata from an empty object, as its flags say."""
    if metadata is None and not holds_none:
        return "{}"
    if metadata == {} and ValueKind.NO_FIELDS.value not in exact:
        return None
    return _text(metadata)


@settings(deadline=None)
@given(
    metadata=METADATA,
    exact=EXACT,
    accepts=st.sampled_from(sorted(ACCEPTS)),
    holds_none=st.booleans(),
    record_id=IDS,
    maps_id=st.booleans(),
    document=DOCUMENTS,
    cuts_document=st.booleans(),
)
@example(
    metadata={SOURCE_EXTRA: '{"metadata":null}'},
    exact=ALL_KINDS,
    accepts="any",
    holds_none=True,
    record_id=("a", "str"),
    maps_id=False,
    document=None,
    cuts_document=False,
)
def test_what_was_encoded_reads_as_it_was(
    metadata: dict[str, Any] | None,
    exact: frozenset[str],
    accepts: str,
    holds_none: bool,
    record_id: tuple[str, str],
    maps_id: bool,
    document: str | None,
    cuts_document: bool,
) -> None:
    cut = cuts_document and document is not None
    encoded = encode_metadata(
        metadata,
        exact=exact,
        accepts_key=ACCEPTS[accepts],
        holds_none=holds_none,
        source_id=record_id if maps_id else None,
        document=document if cut else None,
    )
    stored = _batch(
        ("mapped", "str") if maps_id else record_id,
        "cut" if cut else document,
        _stored(encoded, holds_none=holds_none, exact=set(exact)),
    )
    assert decode(stored).to_pylist() == _batch(record_id, document, _text(metadata)).to_pylist()


@settings(deadline=None)
@given(metadata=METADATA, exact=EXACT, accepts=st.sampled_from(sorted(ACCEPTS)))
def test_whatever_is_written_is_held_exactly_and_held_fields_stay_visible(
    metadata: dict[str, Any] | None, exact: frozenset[str], accepts: str
) -> None:
    accepts_key = ACCEPTS[accepts]
    encoded = encode_metadata(metadata, exact=exact, accepts_key=accepts_key, holds_none=True)
    for key, value in (encoded or {}).items():
        assert {kind.value for kind in value_kinds(value)} <= exact
        assert accepts_key(key) or key in {SOURCE_ID, SOURCE_EXTRA}
    for key, value in (metadata or {}).items():
        if is_held(key, value, exact=exact, accepts_key=accepts_key):
            assert encoded is not None
            assert dump_metadata({key: encoded[key]}) == dump_metadata({key: value})


@settings(deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_that_would_be_rounded_stays_visible_as_a_short_one_near_to_it(value: float) -> None:
    encoded = encode_metadata({"n": value}, exact=LEAST, accepts_key=ACCEPTS["any"], holds_none=True)
    assert encoded is not None
    near = encoded.get("n")
    if near is None:  # too large or too small to be short
        assert not 1e-5 < abs(value) < 1e15
    else:
        assert value_kind(near) is ValueKind.SHORT_FLOAT
        assert near == pytest.approx(value, rel=1e-14)


def test_what_needs_no_envelope_gets_none() -> None:
    for metadata in (None, {}, {"a": 1, "b": [None, {"c": 2**70}]}):
        options: dict[str, Any] = {"accepts_key": ACCEPTS["any"], "holds_none": True}
        assert encode_metadata(metadata, exact=ALL_KINDS, **options) == metadata


def test_fields_that_are_held_are_not_kept_twice() -> None:
    encoded = encode_metadata(
        {"kept": "x", "big": 2**70}, exact=LEAST, accepts_key=ACCEPTS["any"], holds_none=True
    )
    assert encoded == {"kept": "x", SOURCE_EXTRA: '{"fields":{"big":1180591620717411303424}}'}


def test_the_id_is_kept_with_its_kind() -> None:
    encoded = encode_metadata(
        None, exact=ALL_KINDS, accepts_key=ACCEPTS["any"], holds_none=True, source_id=("5", "int")
    )
    assert encoded is not None
    assert encoded[SOURCE_ID] == '{"int":"5"}'
    found = decode(_batch(("f00", "str"), None, dump_metadata(encoded))).to_pylist()[0]
    assert (found["id"], found["id_type"], found["metadata"]) == ("5", "int", None)


def test_batches_without_an_envelope_pass_untouched() -> None:
    batch = _batch(("a", "str"), "text", '{"note":"of the _source_id"}')
    assert decode(batch) is batch


@pytest.mark.parametrize(
    "fields",
    [
        {SOURCE_ID: 5},
        {SOURCE_ID: "a plain note"},
        {SOURCE_ID: '{"float":"5"}'},
        {SOURCE_ID: '{"int":"5","str":"5"}'},
        {SOURCE_EXTRA: '{"mine":1}'},
        {SOURCE_EXTRA: "{broken"},
        {SOURCE_EXTRA: ["a"]},
        {SOURCE_EXTRA: '{"fields":5}'},
        {SOURCE_EXTRA: '{"document":5}'},
        {SOURCE_EXTRA: '{"metadata":5}'},
        {SOURCE_EXTRA: '{"namespace":5}'},
        {SOURCE_NAMESPACE: "a"},
        {SOURCE_EXTRA: "{}"},
    ],
    ids=str,
)
def test_a_field_of_the_users_under_a_reserved_name_is_left_alone(fields: dict[str, Any]) -> None:
    """Such collections were not written by this tool, and must be readable as they are."""
    batch = _batch(("a", "str"), "text", dump_metadata(fields))
    assert decode(batch).to_pylist() == batch.to_pylist()


@pytest.mark.parametrize("namespace", ["a", "", "naïve 漢字", "a\0b", '{"str":"a"}'])
@pytest.mark.parametrize("metadata", [None, {}, {"k": 1.5}, {SOURCE_NAMESPACE: "mine"}], ids=str)
@pytest.mark.parametrize("exact", [LEAST, ALL_KINDS], ids=["least", "all"])
def test_a_namespace_comes_back_and_can_be_filtered_by(
    namespace: str, metadata: dict[str, Any] | None, exact: frozenset[str]
) -> None:
    encoded = encode_metadata(
        metadata, exact=exact, accepts_key=ACCEPTS["any"], holds_none=True, namespace=namespace
    )
    assert encoded is not None
    held = all(kind.value in exact for kind in value_kinds(namespace))
    assert encoded.get(SOURCE_NAMESPACE) == (namespace if held else None)
    found = decode(_batch(("5", "int"), None, _text(encoded))).to_pylist()[0]
    assert (found["namespace"], found["metadata"]) == (namespace, _text(metadata))


def test_records_beside_one_with_a_namespace_are_in_the_default_one() -> None:
    options: dict[str, Any] = {"exact": ALL_KINDS, "accepts_key": ACCEPTS["any"], "holds_none": True}
    encoded = encode_metadata({"n": 1}, namespace="a", **options)
    rows = [_batch(("1", "str"), None, _text(encoded)), _batch(("2", "str"), None, '{"n":1}')]
    assert decode(pa.concat_batches(rows)).column("namespace").to_pylist() == ["a", ""]


def test_rows_with_and_without_an_envelope_stand_side_by_side() -> None:
    encoded = encode_metadata(
        {"big": 2**70}, exact=LEAST, accepts_key=ACCEPTS["any"], holds_none=True, document="a\0b"
    )
    batch = pa.concat_batches(
        [
            _batch(("1", "str"), "ab", _text(encoded)),
            _batch(("2", "str"), None, None),
            _batch(("3", "str"), "c", '{"x":1}'),
        ]
    )
    rows = decode(batch).to_pylist()
    assert rows[0]["document"] == "a\0b"
    assert load_metadata(rows[0]["metadata"]) == {"big": 2**70}
    assert rows[1:] == batch.to_pylist()[1:]
