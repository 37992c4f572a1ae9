"""Chroma's addresses, its token, and what each of its failures means."""

from __future__ import annotations

import errno
import http.server
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest
from chromadb import errors as chroma_errors
from pydantic import SecretStr

from migration_pipelines import errors
from migration_pipelines.store import open_address
from migration_pipelines.stores.chroma import ChromaStore


@pytest.mark.parametrize(
    "text",
    [
        "chroma:./folder#docs",
        "chroma:/srv/db?tenant=acme&database=prod#docs",
        "chroma://localhost:8000/docs",
        "chroma://example.org:443/docs?ssl=true",
        "chroma://[::1]:9000/docs?tenant=acme",
    ],
)
def test_addresses_come_back_as_they_were_given(text: str) -> None:
    store, collection = open_address(text)
    assert collection == "docs"
    assert store.address("docs") == text


@pytest.mark.parametrize("text", ["chroma:#docs", "chroma:./db?colour=red#docs", "chroma://h/docs?ssl=maybe"])
def test_addresses_that_say_too_little_or_too_much_are_refused(text: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        open_address(text)


def test_a_store_is_a_folder_or_a_server() -> None:
    for options in ({}, {"path": "db", "host": "localhost"}):
        with pytest.raises(errors.ConfigurationError, match="either a folder"):
            ChromaStore(**options)


def test_a_token_that_no_header_can_carry_is_refused_without_being_shown() -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        ChromaStore(host="localhost", token=SecretStr("hush\nhush"))
    assert "hush" not in str(caught.value)


def test_the_token_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers)
            body = f"no entry for {self.headers['x-chroma-token']}".encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("CHROMA_TOKEN", "s3cr3t-token")
    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store, _ = open_address(f"chroma://127.0.0.1:{server.server_port}/docs")
        with pytest.raises(errors.AuthenticationError) as caught:
            store.count("docs")
        server.shutdown()
    assert {seen[0]["Authorization"], seen[0]["x-chroma-token"]} == {"Bearer s3cr3t-token", "s3cr3t-token"}
    for shown in (str(caught.value), store.address("docs"), repr(store)):
        assert "s3cr3t" not in shown


def test_nothing_at_an_address_is_said_so() -> None:
    with pytest.raises(errors.StoreUnavailableError, match="is it running there"):
        ChromaStore(host="127.0.0.1", port=1).list_collections()


def test_a_full_disk_is_told_though_chroma_does_not_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vague = chroma_errors.InternalError("Failed to apply logs to the metadata segment")
    store = ChromaStore(path=str(tmp_path))
    assert type(store.translate(vague)) is errors.TransientError
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert type(store.translate(vague)) is errors.DiskFullError


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (httpx.ConnectError("refused"), errors.StoreUnavailableError),
        (ValueError("Could not connect to a Chroma server."), errors.StoreUnavailableError),
        (httpx.ReadTimeout("slow"), errors.TransientError),
        (httpx.RemoteProtocolError("peer closed connection"), errors.TransientError),
        (orjson.JSONDecodeError("unexpected end of data", "", 0), errors.TransientError),
        (chroma_errors.RateLimitError("slow down"), errors.TransientError),
        (chroma_errors.InternalError("oops"), errors.TransientError),
        (chroma_errors.InternalError("(code: 5) database is locked"), errors.TransientError),
        (chroma_errors.InternalError("(code: 13) database or disk is full"), errors.DiskFullError),
        (OSError(errno.ENOSPC, "No space left on device"), errors.DiskFullError),
        (chroma_errors.AuthorizationError("no"), errors.AuthenticationError),
        (chroma_errors.ChromaAuthError("no"), errors.AuthenticationError),
        (chroma_errors.InvalidDimensionException("2, not 3"), errors.DimensionMismatchError),
        (chroma_errors.UniqueConstraintError("x"), errors.CollectionExistsError),
        (chroma_errors.QuotaError("too many"), errors.RecordRejectedError),
        (chroma_errors.InternalError("attempt to write a readonly database"), errors.StoreRefusedError),
        (chroma_errors.InvalidArgumentError("no"), errors.StoreRefusedError),
        (ModuleNotFoundError("No module named 'chromadb'"), errors.MissingDriverError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_every_failure_says_what_to_do_next(raised: Exception, expected: type[Exception]) -> None:
    found = ChromaStore(host="localhost").translate(raised)
    assert type(found) is expected
    assert "chroma://localhost:8000/" in str(found)
