"""Every server's failures through the command line: the documented exit status, and nothing is lost.

A run in the middle of which a server fails ends as docs/failures.md says; once the server is mended, the same
command completes, and `validate` finds source and target equal.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import numpy as np
import psycopg
import pytest

from migration_pipelines_tests.failing_servers import (
    FAILURES,
    SERVERS,
    FailingPgVector,
    FailingS3,
    FailingServer,
)
from migration_pipelines_tests.records import Record, plain_records
from migration_pipelines_tests.shell import Outcome, Shell, fill, shell

__all__ = ["shell"]

NAMES = itertools.count(1)
PASSWORDS = ("PGVECTOR_PASSWORD", "PGPASSWORD")
STATUSES = {"gone": 4, "login": 4, "429": 1, "503": 1, "cut": 1}
# Over gRPC, that a server is unavailable and that nothing answers at all are one code.
STATUSES_OF = {("milvus", "503"): 4}


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FailingServer]:
    with SERVERS[request.param].start(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def name(server: FailingServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A collection's name that is not in use; whatever happens, the server is mended for the next test."""
    yield f"{server.collection}{next(NAMES)}"
    server.mend()


def kind_of(server: FailingServer) -> str:
    return next(kind for kind, cls in SERVERS.items() if type(server) is cls)


def moving(source: str, target: str, command: str = "run") -> tuple[str, ...]:
    sizes = ("--partition-size", "30", "--batch-size", "15", "--retry", "0")
    return (command, "--source", source, "--target", target, *(sizes if command != "validate" else ()))


def assert_failed(server: FailingServer, failure: str, found: Outcome) -> None:
    expected = STATUSES_OF.get((kind_of(server), failure), STATUSES[failure])
    assert found.status == expected, found.everything
    assert "Traceback" not in found.everything


def assert_completes(shell: Shell, source: str, target: str) -> None:
    done = shell(*moving(source, target), "--json", "--quiet")
    assert done.status == 0, done.everything
    assert (done.document["status"], done.document["records"]["verified"]) == ("complete", 60)
    assert shell(*moving(source, target, "validate")).status == 0


@pytest.mark.parametrize("failure", FAILURES)
def test_a_target_that_fails_ends_the_run_as_documented_and_loses_nothing(
    shell: Shell, server: FailingServer, name: str, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGVECTOR_PASSWORD", "wrong")
    source, target = "parquet:source#docs", server.address(name)
    fill(source, plain_records(60))
    assert shell(*moving(source, target, "plan")).status == 0
    server.break_(failure)
    assert_failed(server, failure, shell(*moving(source, target)))
    server.mend()
    assert_completes(shell, source, target)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_source_that_fails_ends_the_run_as_documented_and_loses_nothing(
    shell: Shell, server: FailingServer, name: str, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGVECTOR_PASSWORD", "wrong")
    source, target = server.address(name), "parquet:target#docs"
    fill("parquet:origin#docs", plain_records(60))
    assert shell(*moving("parquet:origin#docs", source)).status == 0
    assert shell(*moving(source, target, "plan")).status == 0
    server.break_(failure)
    assert_failed(server, failure, shell(*moving(source, target)))
    server.mend()
    assert_completes(shell, source, target)


def test_a_poison_record_is_set_aside_and_all_others_arrive(
    shell: Shell, server: FailingServer, name: str
) -> None:
    source, target = "parquet:source#docs", server.address(name)
    records = plain_records(60)
    records[7] = Record("poison", {"": np.full(8, np.nan, np.float32)}, "x", {"n": 7})
    fill(source, records)
    if isinstance(server, FailingS3):  # Parquet holds whatever an Arrow array holds: no record is poison
        assert_completes(shell, source, target)
        return
    # The plan counts what the target can't hold; the loss is accepted, and its record set aside.
    move = (*moving(source, target), "--allow-loss", "all", "--json", "--quiet")
    found = shell(*move)
    assert found.status == 1, found.everything
    assert [reject["id"] for reject in found.document["rejects"]] == ["poison"]
    assert (found.document["records"]["verified"], found.document["target"]["count"]) == (59, 59)
    assert shell("inspect", f"parquet:{found.document['rejects_folder']}", "--json").document["count"] == 1
    assert shell(*move, "--max-rejects", 1).status == 0


@pytest.mark.parametrize("server", ["pgvector"], indirect=True)
def test_sessions_that_postgres_ends_are_taken_up_again(
    shell: Shell, server: FailingServer, name: str
) -> None:
    assert isinstance(server, FailingPgVector)
    source, target = "parquet:source#docs", server.address(name)
    fill(source, plain_records(600))
    url = f"postgresql://{server.user}@127.0.0.1:{server.gate.port}/{server.database}"
    ended, done = [0], threading.Event()

    def end_sessions() -> None:
        with psycopg.connect(url, autocommit=True) as admin:
            while not done.wait(0.05) and ended[0] < 5:
                found = admin.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid() "
                    "AND query ILIKE '%%copy%%' OR state = 'idle in transaction'"
                ).fetchone()
                ended[0] += found[0] if found else 0

    ending = threading.Thread(target=end_sessions)
    ending.start()
    try:
        found = shell("run", "--source", source, "--target", target, "--partition-size", 20, "--json")
    finally:
        done.set()
        ending.join()
    assert ended[0]
    assert found.status in (0, 1), found.everything
    done_again = shell("run", "--source", source, "--target", target, "--partition-size", 20, "--json")
    assert done_again.document["records"]["verified"] == 600
    assert shell(*moving(source, target, "validate")).status == 0
