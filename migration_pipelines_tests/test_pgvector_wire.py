"""What PostgreSQL says: its errors, and the rows of its binary COPY."""

from __future__ import annotations

import pyarrow as pa
import pytest

from migration_pipelines.errors import (
    AuthenticationError,
    CollectionNotFoundError,
    RecordRejectedError,
    StoreRefusedError,
    TransientError,
)
from migration_pipelines.stores.pgvector import PgVectorStore, errors, wire
from migration_pipelines_tests.records import plain_records, plain_schema, to_batch


@pytest.mark.parametrize(
    ("sqlstate", "expected"),
    [
        ("08006", TransientError),
        ("40001", TransientError),
        ("40P01", TransientError),
        ("53100", TransientError),
        ("53300", TransientError),
        ("55P03", TransientError),
        ("57P01", TransientError),
        ("57P03", TransientError),
        ("28P01", AuthenticationError),
        ("28000", AuthenticationError),
        ("42501", StoreRefusedError),
        ("22P02", RecordRejectedError),
        ("22021", RecordRejectedError),
        ("23502", RecordRejectedError),
        ("54000", RecordRejectedError),
        ("42P01", CollectionNotFoundError),
        ("XX000", StoreRefusedError),
    ],
)
def test_an_sqlstate_says_what_the_caller_does_next(sqlstate, expected):
    assert errors.classify(sqlstate)[0] is expected


def test_a_missing_privilege_is_told(pg, name):
    pg.store.create(plain_schema(name))
    role = f"r{name}"
    pg.sql(f"CREATE ROLE {role} LOGIN; GRANT SELECT ON {name} TO {role}")
    weak = PgVectorStore(host=pg.store.host, port=pg.store.port, user=role, database=pg.store.database)
    try:
        assert weak.count(name) == 0
        with pytest.raises(StoreRefusedError, match="privilege"):
            weak.upsert(name, to_batch(plain_records(1), plain_schema(name)))
    finally:
        weak.close()
        pg.sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


def rows_of(*fields):
    packed = wire.pack([pa.array(field, pa.binary()) for field in fields])
    return bytes(packed)


def group_of(rows):
    return wire.RowGroup(memoryview(b"".join(rows)), [len(row) for row in rows])


def test_packed_rows_are_what_the_documentation_says():
    assert rows_of([b"ab", None], [b"", b"c"]) == (
        b"\0\2\0\0\0\2ab\0\0\0\0" + b"\0\2\xff\xff\xff\xff\0\0\0\1c"
    )


def test_rows_are_unpacked_as_they_were_packed():
    rows = [rows_of([a], [b]) for a, b in ((b"ab", b"xyz"), (None, b"x"), (b"", None))]
    left, right = wire.unpack(group_of(rows), [0, 1])
    assert left.to_pylist() == [b"ab", None, b""]
    assert right.to_pylist() == [b"yz", b"", None]


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [wire.HEADER],
        [wire.HEADER + b"\0\1\0\0\0\1a"],
        [wire.HEADER + b"\0\1\0\0\0\1a", b"\0\1\0\0\0\1b"],
        [b"\0\1\0\0\0\1a", wire.TRAILER],
    ],
)
def test_a_reply_that_is_cut_is_never_taken_for_all_there_is(chunks):
    with pytest.raises(wire.CopyFormatError):
        list(wire.row_groups(chunks, max_records=1))


@pytest.mark.parametrize("row", [b"\0\2\0\0\0\1a", b"\0\1\0\0\0\5a", b"\0\1\0\0\0\1ab", b"\0\1\0", b""])
def test_a_malformed_row_is_told(row):
    with pytest.raises(wire.CopyFormatError):
        wire.unpack(group_of([b"\0\1\0\0\0\1a", row]), [0])


@pytest.mark.parametrize("rows", [0, 1, 7, 20])
def test_groups_hold_every_row_once_and_keep_to_their_size(rows):
    stream = [bytes([n]) for n in range(rows)]
    first = wire.HEADER + stream[0] if stream else wire.HEADER
    groups = [
        (bytes(group.data), len(group.sizes))
        for group in wire.row_groups([first, *stream[1:], wire.TRAILER], max_records=5)
    ]
    assert b"".join(data for data, _ in groups) == b"".join(stream)
    assert all(0 < count <= 5 for _, count in groups)


def test_what_was_unpacked_stays_when_the_next_group_takes_its_place():
    rows = [rows_of([text]) for text in (b"ab", b"xyz", None, b"")]
    stream = [wire.HEADER + rows[0], *rows[1:], wire.TRAILER]
    groups = [wire.unpack(group, [0])[0] for group in wire.row_groups(stream, max_records=1)]
    assert [group.to_pylist() for group in groups] == [[b"ab"], [b"xyz"], [None], [b""]]
