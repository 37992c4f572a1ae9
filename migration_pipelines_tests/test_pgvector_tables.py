"""Tables that PostgreSQL already has: their columns, what they hold, their names."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid

import numpy as np
import pytest

from migration_pipelines.errors import (
    CollectionNotFoundError,
    ConfigurationError,
    RecordRejectedError,
    StoreRefusedError,
)
from migration_pipelines.metadata import canonical, canonical_texts
from migration_pipelines.model import Metric, VectorField
from migration_pipelines.store import open_address
from migration_pipelines_tests.pgvector_tables import EVERYTHING, fresh, read
from migration_pipelines_tests.records import (
    Record,
    by_id,
    from_batches,
    plain_records,
    plain_schema,
    to_batch,
)

# ── found tables ─────────────────────────────────────────────────────────────────────────────────────


def test_a_found_table_with_named_columns_is_read_and_written(pg, name):
    pg.sql(
        f"CREATE TABLE {name} (doc_id int PRIMARY KEY, embedding vector(2), title_vec vector(2), "
        "body text, info jsonb, internal text DEFAULT 'mine')"
    )
    pg.sql(f"""INSERT INTO {name} VALUES (7, '[1,2]', '[3,4]', 'seven', '{{"b": 1, "a": [1.50]}}')""")
    store = fresh(pg, id="doc_id", vector="embedding", document="body", metadata="info")

    (found,) = read(store, name)
    assert (
        found.exact()
        == Record(
            id=7,
            vectors={"": np.float32([1, 2]), "title_vec": np.float32([3, 4])},
            document="seven",
            metadata={"a": [1.5], "b": 1},
        ).exact()
    )

    schema = store.describe(name)
    new = Record(id=-8, vectors={"": np.float32([5, 6])}, document=None, metadata={"x": None})
    store.upsert(name, to_batch([new], schema))
    chosen = "doc_id, embedding::text, title_vec, body, info::text, internal"
    rows = pg.sql(f"SELECT {chosen} FROM {name} WHERE doc_id < 0")
    assert rows == [(-8, "[5,6]", None, None, '{"x": null}', "mine")]


def test_every_other_column_is_a_typed_field_and_goes_back_into_its_column(pg, name):
    columns = (
        "n int, small smallint, big bigint, f real, d double precision, ok boolean, word varchar(20), "
        "day date, at timestamptz, local timestamp, clock time, price numeric, raw bytea, tags text[], "
        "grid int[], who uuid, extra jsonb"
    )
    pg.sql(f"CREATE TABLE {name} (id text PRIMARY KEY, vector vector(2), content text, {columns})")
    who = uuid.uuid4()
    values = {
        "n": 1,
        "small": -2,
        "big": 2**63 - 1,
        "f": 0.5,
        "d": 0.1 + 0.2,
        "ok": False,
        "word": "x",
        "day": dt.date(2024, 2, 29),
        "at": dt.datetime(2024, 1, 1, 12, 0, 0, 1, dt.UTC),
        "local": dt.datetime(2024, 1, 1, 12),  # noqa: DTZ001 - a column without a time zone
        "clock": dt.time(1, 2, 3),
        "price": decimal.Decimal("19.990"),
        "raw": b"\x00\xff",
        "tags": ["a", "b,c", None],
        "grid": [1, 2],
        "who": str(who),
        "extra": {"a": None},
    }
    record = Record(id="a", vectors={"": np.float32([1, 2])}, document="text", metadata=values)
    partly = Record(id="b", vectors={"": np.float32([1, 2])}, document=None, metadata={"n": 5})
    store = pg.store
    schema = store.describe(name)
    assert schema.options["metadata_type"] is None

    store.upsert(name, to_batch([record, partly], schema))

    assert by_id(read(store, name)) == by_id([record, partly])
    (row,) = pg.sql(f"SELECT n, at, price::text, tags, who FROM {name} WHERE id = 'a'")
    assert row == (1, values["at"], "19.990", values["tags"], who)
    assert pg.sql(f"SELECT n, word, at, tags FROM {name} WHERE id = 'b'") == [(5, None, None, None)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1.0),
        ("n", True),
        ("n", "1"),
        ("n", 2**31),
        ("n", None),
        ("f", 0.1),
        ("d", 1),
        ("money", decimal.Decimal("1.5")),
        ("at", dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=2)))),
        ("mood", "happy"),
        ("other", 1),
        ("word", "too long"),
    ],
)
def test_a_value_that_its_column_would_change_is_refused(pg, field, value):
    pg.sql("DROP TABLE IF EXISTS strict; DROP TYPE IF EXISTS mood; CREATE TYPE mood AS ENUM ('happy')")
    pg.sql(
        "CREATE TABLE strict (id text PRIMARY KEY, vector vector(2), n int, f real, d double precision, "
        "money numeric(10,2), at timestamptz, mood mood, word varchar(3))"
    )
    store = fresh(pg)
    record = Record(id="a", vectors={"": np.float32([1, 2])}, metadata={field: value})

    with pytest.raises(RecordRejectedError, match=field if field != "word" else None):
        store.upsert("strict", to_batch([record], store.describe("strict")))

    assert store.count("strict") == 0
    store.close()


def test_the_tables_of_langchain_are_read(pg):
    collection = uuid.uuid4()
    pg.sql(
        "CREATE TABLE langchain_pg_embedding (id varchar PRIMARY KEY, collection_id uuid, embedding vector, "
        "document varchar, cmetadata jsonb)"
    )
    pg.sql("CREATE INDEX ON langchain_pg_embedding USING gin (cmetadata jsonb_path_ops)")
    pg.sql(
        "INSERT INTO langchain_pg_embedding VALUES ('doc-1', %s, '[1,0,0]', 'hello', %s)",
        collection,
        '{"source": "a.txt"}',
    )
    schema = pg.store.describe("langchain_pg_embedding")

    assert [(field.name, field.dimensions) for field in schema.vectors] == [("", 3)]
    (found,) = read(pg.store, "langchain_pg_embedding")
    assert found.metadata == {"source": "a.txt", "collection_id": str(collection)}
    assert (found.id, found.document, found.vectors[""].tolist()) == ("doc-1", "hello", [1, 0, 0])


def test_vectors_of_several_lengths_in_one_column_are_told_and_not_cut(pg, name):
    pg.sql(f"CREATE TABLE {name} (id text PRIMARY KEY, embedding vector)")
    pg.sql(f"INSERT INTO {name} VALUES ('a', '[1,2,3]'), ('b', '[1,2]')")
    with pytest.raises(StoreRefusedError, match="2"):
        read(pg.store, name)


@pytest.mark.parametrize(
    ("columns", "option"),
    [
        ("a text, embedding vector(2)", r"\?id="),
        ("id text, embedding vector(2)", r"\?id="),
        ("a int, b int, embedding vector(2), PRIMARY KEY (a, b)", r"\?id="),
        ("id float PRIMARY KEY, embedding vector(2)", r"\?id="),
        ("id text PRIMARY KEY, note text", r"\?vector="),
        ("id text PRIMARY KEY, vector vector(2), embedding vector(2)", r"\?vector="),
        ("id text PRIMARY KEY, vector vector(2), content text, body text", r"\?document="),
        ("id text PRIMARY KEY, vector vector(2), meta json, metadata jsonb", r"\?metadata="),
    ],
)
def test_a_role_that_is_missing_or_ambiguous_names_the_columns_and_the_option(pg, name, columns, option):
    pg.sql(f"CREATE TABLE {name} ({columns})")
    with pytest.raises(ConfigurationError, match=option) as caught:
        pg.store.describe(name)
    assert columns.split()[0].strip("(") in str(caught.value)


def test_metadata_that_is_no_object_is_told_and_json_null_is_none(pg, name):
    pg.sql(f"CREATE TABLE {name} (id int PRIMARY KEY, vector vector(2), metadata jsonb)")
    pg.sql(f"INSERT INTO {name} VALUES (1, '[1,2]', 'null'), (2, '[1,2]', NULL), (3, '[1,2]', '{{}}')")
    assert [record.metadata for record in sorted(read(pg.store, name), key=lambda r: r.id)] == [
        None,
        None,
        {},
    ]
    pg.sql(f"INSERT INTO {name} VALUES (4, '[1,2]', '[1]')")
    with pytest.raises(StoreRefusedError, match="no object"):
        read(pg.store, name)


def test_json_that_somebody_else_wrote_is_read_as_canonical_text(pg, name):
    schema = plain_schema(name).model_copy(update={"options": {"metadata_type": "json"}})
    pg.store.create(schema)
    pg.sql(f"""INSERT INTO {name} (id, metadata) VALUES ('a', '{{"b" : 1, "a": 12345678901234567890123}}')""")
    (batch,) = pg.store.scan(name, EVERYTHING, batch_records=10)
    assert batch.column("metadata").to_pylist() == ['{"a":12345678901234567890123,"b":1}']


@pytest.mark.parametrize(
    "awkward",
    [
        '{"b":["x","\\u0000","y"]}',
        '{"b":1234567890123456789012}',
        '{"$typed":5}',
        '{"b":[{},{"z":null}]}',
        "{}",
    ],
)
def test_many_texts_are_made_canonical_like_each_alone(awkward):
    texts = [b'{"b": 1.50, "a": "\\u00e9"}', None, awkward.encode(), b"{}", None]
    expected = [None if text is None else canonical(text.decode()).encode() for text in texts]
    assert canonical_texts(texts) == expected
    assert canonical_texts([None]) == [None]


def test_a_view_is_read_if_its_ids_are_distinct(pg, name):
    pg.sql(f"CREATE TABLE {name} (id int PRIMARY KEY, embedding vector(2), topic int)")
    pg.sql(f"INSERT INTO {name} SELECT i, '[1,2]', i / 2 FROM generate_series(1, 10) i")
    pg.sql(f"CREATE VIEW {name}_v AS SELECT * FROM {name} WHERE id > 5")
    good, bad = fresh(pg, id="id"), fresh(pg, id="topic")

    spans = [span for span, _ in good.split(f"{name}_v", span_records=2)]
    assert [span.records for span in spans] == [2, 2, 1]
    assert good.fingerprint(f"{name}_v") == good.fingerprint(f"{name}_v")
    with pytest.raises(ConfigurationError, match="isn't unique"):
        list(bad.split(f"{name}_v", span_records=2))


@pytest.mark.parametrize("rows", [0, 1, 2, 9, 10])
@pytest.mark.parametrize("every", [1, 2, 3, 10])
def test_spans_hold_as_many_rows_as_they_say(pg, name, rows, every):
    pg.sql(f"CREATE TABLE {name} (id int PRIMARY KEY, embedding vector(2))")
    pg.sql(f"INSERT INTO {name} SELECT i, '[1,2]' FROM generate_series(1, {rows}) i")
    store = fresh(pg)

    spans = [span for span, _ in store.split(name, span_records=every)]
    sizes = [sum(part.num_rows for part in store.scan(name, span, batch_records=5)) for span in spans]
    assert [span.records for span in spans] == sizes
    assert (sum(sizes), max(sizes), len(sizes)) == (rows, min(rows, every), max(1, -(-rows // every)))


def test_what_the_server_says_in_the_middle_of_the_rows_is_told(pg, name):
    """It had sent thousands of them, and ends without the trailer of a whole reply."""
    pg.sql(f"CREATE TABLE {name} (id int PRIMARY KEY, embedding vector(2))")
    pg.sql(f"INSERT INTO {name} SELECT i, '[1,2]' FROM generate_series(1, 5000) i")
    pg.sql(f"CREATE VIEW {name}_v AS SELECT id, embedding, 1 / (4000 - id) AS share FROM {name} ORDER BY id")
    store = fresh(pg, id="id")

    for _ in range(2):  # the connection is in order afterwards
        with pytest.raises(RecordRejectedError, match="division by zero"):
            read(store, f"{name}_v")
    assert len(read(store, name)) == 5_000


# ── names ────────────────────────────────────────────────────────────────────────────────────────────


ODD_NAMES = [
    'we"ird Table',
    "t; DROP TABLE victim; --",
    "100%s %(x)s",
    "Ünïcödé 漢字",
    "a.b.c",
    "docs.v1",
    "select",
    "x" * 63,
]


@pytest.mark.parametrize("odd", ODD_NAMES)
def test_odd_names_are_only_names(pg, odd):
    vectors = (VectorField(dimensions=8, metric=Metric.COSINE), VectorField(name='t"i; %s', dimensions=8))
    schema = plain_schema(odd).model_copy(update={"vectors": vectors})
    records = [
        Record(
            id=r.id,
            vectors={"": r.vectors[""], 't"i; %s': r.vectors[""]},
            document=r.document,
            metadata=r.metadata,
        )
        for r in plain_records(20)
    ]
    store = fresh(pg)
    before = set(store.list_collections())
    store.create(schema)
    store.upsert(odd, to_batch(records, schema))
    store.upsert(odd, to_batch(records[:5], schema))
    store.finish_load(odd)
    spans = [span for span, _ in store.split(odd, span_records=7)]

    found = [r for span in spans for r in from_batches(store.scan(odd, span, batch_records=4))]
    assert by_id(found) == by_id(records)
    assert store.describe(odd).vectors == tuple(sorted(vectors, key=lambda field: field.name))
    assert store.search(odd, records[3].vectors[""], limit=1)[0][0] == records[3].id
    address, collection = open_address(store.address(odd))
    assert address.count(collection) == 20
    (listed,) = set(store.list_collections()) - before
    assert store.count(listed) == 20
    store.drop(odd)
    address.close()
    store.close()


@pytest.mark.parametrize("bad", ["x" * 64, "a\0b"])
def test_a_name_that_the_server_would_cut_or_refuse_is_refused_before(pg, bad):
    with pytest.raises(ConfigurationError):
        pg.store.create(plain_schema(bad))


def test_tables_of_another_schema_are_named_with_it(pg, name):
    pg.sql(f'CREATE SCHEMA "{name}"')
    store = pg.store
    store.create(plain_schema(f"{name}.docs"))
    assert f"{name}.docs" in store.list_collections()
    assert pg.sql(f"SELECT count(*) FROM {name}.docs") == [(0,)]
    with pytest.raises(CollectionNotFoundError, match=f"{name}.docs"):
        store.count("docs_that_are_not_there")
