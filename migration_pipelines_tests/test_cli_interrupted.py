"""SIGINT and SIGTERM: the command stops soon, says how to go on, and the same command goes on."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migration_pipelines.cli.failures import INTERRUPTED
from migration_pipelines_tests.records import plain_records
from migration_pipelines_tests.shell import REPOSITORY, fill, finish, start

# Chroma takes about a thousand records a second: time enough to be interrupted in.
RECORDS = 4_000
TARGET = "chroma:target#docs"
# Far above what a batch of the default size takes, so that a busy machine fails no test.
SOON_SECONDS = 6.0


def move(*more: object) -> tuple[object, ...]:
    return ("run", "--source", "chroma:source#docs", "--target", TARGET, "--workers", 1, "--json", *more)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Chroma source; each test moves into a target of its own."""
    folder = tmp_path_factory.mktemp("interrupted")
    fill(f"chroma:{folder}/source#docs", plain_records(RECORDS))
    return folder


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file of the ledger is there."""
    until = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_run_is_130_and_the_same_command_goes_on(
    filled: Path, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "source").symlink_to(filled / "source")
    command = move("--partition-size", 1_000, "--batch-size", 500)
    process = start(*command, folder=tmp_path)
    wait_for("home/migrations/*/receipts/*.json", tmp_path, process)
    before = time.monotonic()
    process.send_signal(number)
    found = finish(process)
    assert time.monotonic() - before < SOON_SECONDS
    assert found.status == 130
    assert "Traceback" not in found.err
    assert "of 4 partitions are verified; run the same command again to go on" in found.err
    assert found.document["error"]["message"].endswith(shlex.join(["vector-migrate", *map(str, command)]))
    assert found.document["error"]["type"] == "Interrupted"
    receipts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("home/migrations/*/receipts/*.json")}
    assert 1 <= len(receipts) < 4

    report = finish(start(*command, folder=tmp_path)).document
    assert (report["status"], report["records"]["verified"]) == ("complete", RECORDS)
    assert {path: path.stat().st_mtime_ns for path in receipts} == receipts


def test_a_batch_that_takes_long_is_left_as_it_is(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "source").symlink_to(filled / "source")
    command = move("--batch-size", 5_000)
    process = start(*command, folder=tmp_path)
    wait_for("home/migrations/*/prepared.json", tmp_path, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    found = finish(process)
    assert (found.status, json.loads(found.out)["error"]["exit_status"]) == (130, 130)
    assert "0 of 1 partitions are verified" in found.err
    assert finish(start(*command, folder=tmp_path)).document["target"]["count"] == RECORDS


def test_a_fresh_run_is_gone_on_with_and_not_begun_again(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "source").symlink_to(filled / "source")
    command = move("--partition-size", 1_000, "--batch-size", 500)
    process = start(*command, "--fresh", folder=tmp_path)
    wait_for("home/migrations/*/receipts/*.json", tmp_path, process)
    process.send_signal(signal.SIGINT)
    message = finish(process).document["error"]["message"]
    program, *told = shlex.split(message.rpartition("to go on: ")[2])
    assert (program, told) == ("vector-migrate", [*map(str, command)])


def test_interrupted_while_planning_nothing_was_written(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "source").symlink_to(filled / "source")
    process = start(*move(), folder=tmp_path)
    wait_for("home/migrations/*/lease", tmp_path, process)
    process.send_signal(signal.SIGINT)
    found = finish(process)
    assert found.status == 130
    assert not (tmp_path / "target").exists()
    assert finish(start(*move("--quiet"), folder=tmp_path)).status == 0


def test_interrupted_in_code_that_was_made_from_a_text_the_status_is_130(tmp_path: Path) -> None:
    """As while a driver is imported: of the plain exception Python itself would make -2 with `python -m`."""
    (tmp_path / "interrupted.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from migration_pipelines.cli.signals import stopping
try:
    with stopping(lambda: None, grace_seconds=60):
        exec("os.kill(os.getpid(), signal.SIGINT)")
except KeyboardInterrupt:
    sys.exit({INTERRUPTED})
""")
    done = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, check=False)
    assert done.returncode == INTERRUPTED
