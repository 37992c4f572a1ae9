"""Addresses: read, written again, and never with a secret in them."""

from __future__ import annotations

import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration_pipelines.errors import ConfigurationError
from migration_pipelines.store import Address, open_address

PASSWORD = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("qdrant://localhost:6333/docs", {"host": "localhost", "port": 6333, "path": "docs"}),
        ("qdrant://[::1]:6333/docs", {"host": "::1", "port": 6333, "path": "docs"}),
        ("pgvector://ann@db:5432/shop/t", {"user": "ann", "host": "db", "port": 5432, "path": "shop/t"}),
        ("pgvector:///shop/t?host=/run", {"host": None, "path": "shop/t", "query": {"host": "/run"}}),
        ("pinecone://my-index", {"host": "my-index", "port": None, "path": ""}),
        ("pinecone://my-index?namespace=a%20b", {"host": "my-index", "query": {"namespace": "a b"}}),
        ("chroma:./chroma_db#docs", {"path": "./chroma_db", "collection": "docs"}),
        ("chroma:/data/a b#odd%23%3Fname", {"path": "/data/a b", "collection": "odd#?name"}),
        ("faiss:./index.faiss", {"path": "./index.faiss", "collection": None}),
        ("parquet:s3://bucket/prefix", {"path": "s3://bucket/prefix", "host": None}),
        ("parquet:s3://bucket/a:b@c", {"path": "s3://bucket/a:b@c"}),
        ("milvus:./my.db?namespace=n#c", {"path": "./my.db", "collection": "c", "query": {"namespace": "n"}}),
        ("milvus:./my.db#c?namespace=n", {"path": "./my.db", "collection": "c", "query": {"namespace": "n"}}),
    ],
)
def test_address_is_read_and_written_to_the_same_parts(text: str, parts: dict[str, object]) -> None:
    address = Address.parse(text)
    assert {name: getattr(address, name) for name in parts} == parts
    assert Address.parse(str(address)) == address


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zs"]), min_size=1, max_size=12)


@given(NAMES, NAMES, st.none() | st.integers(0, 65535), st.none() | NAMES)
def test_any_name_survives_an_address(user: str, name: str, port: int | None, namespace: str | None) -> None:
    query = {"namespace": namespace} if namespace else {}
    path = name.lstrip("/") or "x"
    server = Address(kind="pgvector", user=user, host="db.example.org", port=port, path=path, query=query)
    assert Address.parse(str(server)) == server
    embedded = Address(kind="chroma", path="./folder", collection=name, query=query)
    assert Address.parse(str(embedded)) == embedded


@pytest.mark.parametrize(
    "text",
    [
        f"pgvector://ann:{PASSWORD}@db:5432/shop/items",
        f"qdrant://:{PASSWORD}@host/docs",
        f"qdrant://host/docs?api_key={PASSWORD}",
        f"weaviate://host/docs?authToken={PASSWORD}",
        f"parquet:s3://AKIA:{PASSWORD}@bucket/prefix",
        f"parquet:s3://AKIA:a/{PASSWORD}@bucket/prefix",
    ],
)
def test_secret_is_never_shown(text: str) -> None:
    address = Address.parse(text)
    assert PASSWORD not in f"{address} {address!r} {[address]}"


def test_password_is_kept_apart_and_decoded() -> None:
    assert Address.parse("pgvector://ann:p%40ss%2F@db/shop/items").password == "p@ss/"


@pytest.mark.parametrize(
    "text",
    [
        f"PostgreSQL://ann:{PASSWORD}@db/shop/items",
        f"pg-vector://ann:{PASSWORD}@db/shop/items",
        f"pg-vector://ann:a@{PASSWORD}@db/shop/items",
        f"pgvector://ann:{PASSWORD}@db:port/shop/items",
        f"pgvector://ann:{PASSWORD}/x@db/shop/items",
        f"pgvector://ann:{PASSWORD}#x@db/shop/items",
        f"pgvector://ann:12/{PASSWORD}@db/shop/items",
        f"pgvector://ann:12#{PASSWORD}@db/shop/items",
        f"pgvector://ann:12?{PASSWORD}@db/shop/items",
        f"pgvector://ann:{PASSWORD}@[::1/shop/items",
        "docs",
        "",
        "./chroma_db#docs",
        "qdrant://host:99999/docs",
    ],
)
def test_malformed_address_is_a_configuration_error_that_shows_no_password(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Address.parse(text)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_unknown_store_is_refused_with_the_list_of_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"no store of kind 'oracle'.*memory"):
        open_address("oracle://host/docs")
