"""The command line where things go wrong: exit status, message, what stays, and no secret in any of it."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from migration_pipelines import migrator
from migration_pipelines.model import CollectionSchema, VectorField
from migration_pipelines.store import open_address
from migration_pipelines_tests.records import Record, plain_records, plain_schema, to_batch
from migration_pipelines_tests.shell import Outcome, Shell, fill, finish, shell, start

__all__ = ["shell"]

SOURCE, TARGET = "parquet:source#docs", "parquet:target#docs"
MOVE = ("--source", SOURCE, "--target", TARGET)
SECRET = "hunter2-and-more"


@pytest.fixture
def moving(shell: Shell) -> Shell:
    """A shell in a folder where the source is there."""
    fill(SOURCE)
    return shell


def assert_refused(found: Outcome, status: int, *words: str) -> None:
    """Exit status, and one line on standard error that says all of these."""
    assert found.status == status
    last = found.last_words
    assert last.startswith("vector-migrate: error: ")
    for word in words:
        assert word in last
    assert "Traceback" not in found.everything


# ── 2: the request must change ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("address", ["parquet:source#nope", "chroma:chroma#nope", "memory:empty#nope"])
def test_a_missing_collection_is_2_and_names_those_that_are_there(moving: Shell, address: str) -> None:
    fill("chroma:chroma#docs")
    for arguments in (("inspect", address), ("run", "--source", address, "--target", "parquet:other#x")):
        assert_refused(moving(*arguments), 2, "nope", "there are:")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run",), "--source and --target"),
        (("run", "--source", SOURCE), "--source and --target"),
        (("run", "name", *MOVE), "--source and --target"),
        (("run", "--bogus"), "No such option: --bogus"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("run", "nothing", "--defs", "."), "no migration 'nothing' is declared"),
        (("run", "nothing", "--defs", "not-there"), "isn't there"),
        (("run", "not-there.yaml", "--defs", "."), "not-there.yaml"),
        (("run", *MOVE, "--filter", "{"), "expected an object of JSON"),
        (("run", *MOVE, "--filter", "n>="), "expected field=value"),
        (("run", *MOVE, "--filter", '{"a": {"$near": 1}}'), "$near"),
        (("run", *MOVE, "--metric", "taxicab"), "metric"),
        (("run", *MOVE, "--batch-size", "0"), "--batch-size"),
        (("run", *MOVE, "--on-existing", "append"), "on_existing"),
        (("run", *MOVE, "--report", "."), "is a folder"),
        (("run", *MOVE, "--dagster"), "declared"),
        (("inspect", "nonsense"), "is not an address"),
        (("inspect", "frob:x#y"), "no store of kind 'frob'"),
        (("stores", "frob"), "no store of kind 'frob'"),
    ],
)
def test_what_can_not_be_asked_is_2_and_says_why(
    moving: Shell, arguments: tuple[str, ...], words: str
) -> None:
    assert_refused(moving(*arguments), 2, words)


def test_errors_are_one_json_document_with_their_facts(moving: Shell) -> None:
    found = moving("inspect", "parquet:source#nope", "--json")
    error = found.document["error"]
    assert (error["type"], error["exit_status"]) == ("CollectionNotFoundError", 2)
    assert error["message"] in found.err
    assert moving("run", "--bogus", "--json").document["error"]["type"] == "UsageError"


def test_vectors_that_do_not_fit_are_2(moving: Shell) -> None:
    fill("chroma:chroma#docs", dimensions=4)
    found = moving("run", "--source", SOURCE, "--target", "chroma:chroma#docs", "--on-existing", "merge")
    assert_refused(found, 2, "8", "4")


def test_a_target_that_holds_records_is_2_and_left_as_it_is(moving: Shell) -> None:
    fill(TARGET, plain_records(7))
    assert_refused(moving("run", *MOVE), 2, "holds 7 records", "--on-existing merge or replace")
    assert moving("inspect", TARGET, "--json").document["count"] == 7


def test_a_changed_plan_is_2_until_a_fresh_one_is_asked_for(moving: Shell) -> None:
    moving("plan", *MOVE)
    changed = ("run", *MOVE, "--filter", '{"even": true}')
    assert_refused(moving(*changed), 2, "filter was None", "--fresh")
    assert moving(*changed, "--fresh").status == 0


def two_vectors(address: str) -> None:
    """A collection with a second vector, which Chroma has no place for."""
    store, name = open_address(address)
    schema = CollectionSchema(
        name=name,
        vectors=(VectorField(dimensions=8), VectorField(name="title", dimensions=2)),
        id_kinds=plain_schema(name).id_kinds,
    )
    second = np.ones(2, np.float32)
    records = [Record(r.id, {**r.vectors, "title": second}, r.document, r.metadata) for r in plain_records(5)]
    store.create(schema)
    store.upsert(name, to_batch(records, schema))
    store.finish_load(name)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_loss_is_2_with_its_count_until_it_is_accepted_by_name(shell: Shell, command: str) -> None:
    two_vectors(SOURCE)
    move = (command, "--source", SOURCE, "--target", "chroma:chroma#docs")
    found = shell(*move)
    assert_refused(found, 2, "--allow-loss ")
    assert "Losses" in found.out
    document = shell(*move, "--json").document
    (loss,) = [item for item in document["losses"] if not item["accepted"]]
    assert (document["status"], document["error"]["exit_status"], loss["count"]) == ("refused", 2, 5)
    accepted = shell(*move, "--allow-loss", loss["kind"], "--json")
    assert (accepted.status, [item["accepted"] for item in accepted.document["losses"]]) == (0, [True])


# ── 1: incomplete ────────────────────────────────────────────────────────────────────────────────────


def with_nan(address: str) -> None:
    """300 records, of which one has a vector with NaN in it."""
    records = plain_records(300)
    bad = Record("bad", {"": np.array([np.nan] * 8, np.float32)}, "x", {"n": 1})
    fill(address, [*records[:150], bad, *records[151:]])


def test_a_record_that_the_target_refuses_is_set_aside_and_all_others_arrive(shell: Shell) -> None:
    with_nan(SOURCE)
    move = ("run", "--source", SOURCE, "--target", "chroma:chroma#docs", "--allow-loss", "all")
    found = shell(*move, "--json")
    assert found.status == 1
    report = found.document
    assert report["status"] == "incomplete"
    assert (report["records"]["rejected"], report["target"]["count"]) == (1, 299)
    (reject,) = report["rejects"]
    assert reject["id"] == "bad"
    assert "NaN" in reject["reason"]
    assert shell("inspect", f"parquet:{report['rejects_folder']}", "--json").document["count"] == 1
    assert f"bad: {reject['reason']}" in shell(*move).out
    assert shell(*move, "--max-rejects", 1).status == 0


def test_a_full_disk_is_1_and_the_run_goes_on_when_there_is_room(
    moving: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, full = os.fsync, threading.Event()

    def no_room(handle: int) -> None:
        if full.is_set() and "staged" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", no_room)
    full.set()
    assert_refused(moving("run", *MOVE), 1, "no room left", "make room and run again")
    full.clear()
    assert moving("run", *MOVE, "--json").document["status"] == "complete"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_is_1_and_the_run_goes_on(moving: Shell, small_disk: Path) -> None:
    stuffing = small_disk / "stuffing"
    stuffing.write_bytes(bytes(1_000_000))
    move = ("run", *MOVE, "--home", small_disk / "home")
    assert_refused(moving(*move), 1, "no room left", "make room and run again")
    stuffing.unlink()
    assert moving(*move, "--json").document["status"] == "complete"


def test_a_source_that_changed_is_1(moving: Shell) -> None:
    moving("plan", *MOVE)
    store, name = open_address(SOURCE)
    store.upsert(name, to_batch(plain_records(1, start=900), plain_schema(name)))
    found = moving("run", *MOVE, "--json")
    assert found.status == 1
    assert {check["name"] for check in found.document["checks"] if not check["passed"]} == {
        "source unchanged"
    }


def test_what_nobody_expects_is_1_with_its_type_and_without_a_traceback(
    moving: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object, **__: object) -> None:
        raise RuntimeError(f"boom at //user:{SECRET}@host and {SECRET}")

    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.setattr(migrator, "run_migration", burst)
    assert_refused(moving("run", *MOVE), 1, "RuntimeError: boom at //user:***@host and ***")
    shown = moving("--debug", "run", *MOVE)
    assert "Traceback" in shown.err
    assert SECRET not in shown.everything


def test_a_report_file_tells_of_this_run_even_where_it_failed(moving: Shell, tmp_path: Path) -> None:
    moving("run", *MOVE, "--report", "report.json")
    fill("parquet:other#docs")
    found = moving("run", "--source", SOURCE, "--target", "parquet:other#docs", "--report", "report.json")
    assert found.status == 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["status"], report["error"]["type"]) == ("failed", "TargetNotEmptyError")


# ── 4: unreachable, or the login refused; secrets ────────────────────────────────────────────────────


@pytest.mark.parametrize("address", ["pgvector://u@127.0.0.1:1/db/docs", "chroma://127.0.0.1:1/docs"])
def test_a_server_that_is_not_there_is_4(moving: Shell, address: str) -> None:
    shown = address.partition("docs")[0]
    assert_refused(moving("inspect", address), 4, shown)
    assert_refused(moving("run", "--source", SOURCE, "--target", address, "--retry", 0), 4, shown)


@pytest.fixture
def doorman() -> Iterator[int]:
    """The port of something that speaks PostgreSQL as far as refusing every password."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    _refuse(connection)

        threading.Thread(target=refuse, daemon=True).start()
        yield server.getsockname()[1]


def _refuse(connection: socket.socket) -> None:
    while True:
        (length,) = struct.unpack(">i", connection.recv(4))
        (code,) = struct.unpack(">i", connection.recv(length - 4)[:4])
        if code == 196608:
            break
        connection.sendall(b"N")  # neither TLS nor GSS here
    connection.sendall(b"R" + struct.pack(">ii", 8, 3))  # a password, please
    connection.recv(1000)
    fields = b'SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user "u"\0\0'
    connection.sendall(b"E" + struct.pack(">i", 4 + len(fields)) + fields)


@pytest.mark.parametrize("place", ["address", "environment"])
def test_a_refused_login_is_4_and_the_password_is_nowhere(
    moving: Shell, doorman: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    login = f"u:{SECRET}" if place == "address" else "u"
    if place == "environment":
        monkeypatch.setenv("PGVECTOR_PASSWORD", SECRET)
    address = f"pgvector://{login}@127.0.0.1:{doorman}/db/docs"
    for arguments in (
        ("inspect", address, "--json"),
        ("--debug", "run", "--source", SOURCE, "--target", address, "--report", "report.json"),
        ("validate", "--source", SOURCE, "--target", address),
    ):
        found = moving(*arguments)
        assert found.status == 4
        assert SECRET not in found.everything
        assert ("warning: the pgvector address holds a password" in found.err) == (place == "address")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "report.json" in written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


# ── output ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_reader_that_has_seen_enough_hears_no_complaint(tmp_path: Path) -> None:
    process = start("stores", "--json", folder=tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert "Traceback" not in finish(process).err
