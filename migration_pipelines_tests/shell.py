"""`vector-migrate` as a shell calls it: in this process where that is enough, else in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from migration_pipelines import batch as batches
from migration_pipelines.cli import main
from migration_pipelines.store import open_address
from migration_pipelines_tests.records import Record, plain_records, plain_schema, to_batch

REPOSITORY = Path(__file__).parents[1]
TIME_LIMIT_SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit status and its two streams."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document that standard output must be."""
        return json.loads(self.out)

    @property
    def last_words(self) -> str:
        """The last line of standard error that the command itself wrote: interpreters warn there too."""
        return [line for line in self.err.splitlines() if line.startswith("vector-migrate")][-1]

    @property
    def everything(self) -> str:
        return self.out + self.err


Shell = Callable[..., Outcome]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Run `vector-migrate` with some arguments, in this process and in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VECTOR_MIGRATE_HOME", str(tmp_path / "home"))
    for name in ("VECTOR_MIGRATE_DEFS", "PGVECTOR_PASSWORD", "PGPASSWORD"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        # What a command puts into the environment ends with its process; here with the call.
        with pytest.raises(SystemExit) as left, mock.patch.dict(os.environ):
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(left.value.code or 0), captured.out, captured.err)

    return call


def start(
    *arguments: object, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `vector-migrate` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "migration_pipelines.cli", *map(str, arguments)],
        cwd=folder,
        env=_environment(folder, environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Wait for a command and return what it left."""
    out, err = process.communicate(timeout=TIME_LIMIT_SECONDS)
    return Outcome(process.returncode, out, err)


def python(code: str, *, folder: Path) -> Outcome:
    """Run some Python in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=_environment(folder, None),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return finish(process)


def _environment(folder: Path, more: Mapping[str, str] | None) -> dict[str, str]:
    here = {"PYTHONPATH": str(REPOSITORY), "VECTOR_MIGRATE_HOME": str(folder / "home")}
    return {**os.environ, **here, **(more or {})}


def fill(address: str, records: list[Record] | None = None, *, dimensions: int = 8, **schema: Any) -> None:
    """Make the collection of an address and put records into it: 300 plain ones where none are given.

    They go in by hundreds, so that every store can divide them.
    """
    store, collection = open_address(address)
    assert collection is not None
    made = plain_schema(collection, dimensions=dimensions, **schema)
    store.create(made)
    batch = to_batch(plain_records(300, dimensions=dimensions) if records is None else records, made)
    for part in batches.split(batch, max_records=100, max_bytes=None):
        store.upsert(collection, part)
    store.finish_load(collection)
    store.close()
