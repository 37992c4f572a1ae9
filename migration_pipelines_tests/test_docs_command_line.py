"""Every command of docs/command-line.md is run as it stands there, and prints what the page says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from migration_pipelines.cli.config_file import read_config
from migration_pipelines.cli.migrations import PASSWORD_VARIABLES
from migration_pipelines.store import open_address
from migration_pipelines_tests.records import Record, plain_schema, to_batch
from migration_pipelines_tests.shell import Shell, shell

__all__ = ["shell"]

PAGE = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text(encoding="utf-8")
SECTIONS = {
    title: text
    for title, text in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    if "```console" in text
}
FILES = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
# What no two runs share.
VARIES = re.compile(r"[\d.,]+ (s|min [\d.]+ s), [\d.,]+ records a second")


@pytest.fixture(autouse=True)
def _passages(shell: Shell) -> None:
    """The folder that all sections start from."""
    store, _ = open_address("chroma:./chroma_db")
    schema = plain_schema("passages", dimensions=16)
    rng = np.random.default_rng(0)
    records = [
        Record(
            f"passage-{n}", {"": rng.standard_normal(16).astype(np.float32)}, f"Passage {n}", {"number": n}
        )
        for n in range(30)
    ]
    store.create(schema)
    store.upsert("passages", to_batch(records, schema))
    store.close()
    for name, text in FILES.items():
        Path(name).write_text(text)


def steps(section: str) -> Iterator[tuple[str, str]]:
    """Each command of a section, and what the page says that it prints."""
    for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = step.replace("\\\n", "").partition("\n")
            yield command, printed


def plain(printed: str) -> list[str]:
    return [VARIES.sub("…", line.rstrip()) for line in printed.splitlines()]


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_prints_what_the_page_says(title: str, shell: Shell) -> None:
    status = 0
    for command, printed in steps(SECTIONS[title]):
        if command == "echo $?":
            assert printed == f"{status}\n"
            continue
        program, *arguments = shlex.split(command)
        assert program == "vector-migrate"
        done = shell(*arguments)
        status = done.status
        errors = [line for line in done.err.splitlines(keepends=True) if ": error: " in line]
        assert plain(done.out + "".join(errors)) == plain(printed), command


def test_the_page_names_every_variable_of_a_secret() -> None:
    assert {variable for variable in PASSWORD_VARIABLES.values() if f"`{variable}`" not in PAGE} == set()


def test_the_files_of_the_page_can_be_read() -> None:
    assert {name: len(read_config(Path(name))) for name in FILES} == {"move.yaml": 5, "two.yaml": 3}
