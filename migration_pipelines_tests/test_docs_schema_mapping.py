"""Every example of docs/schema-mapping.md is run as it stands there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from migration_pipelines.declarations import read_declarations, read_mapping
from migration_pipelines.mapping_steps import parse_step
from migration_pipelines.store import open_address
from migration_pipelines_tests.conformance import load
from migration_pipelines_tests.records import Record, from_batches, plain_schema
from migration_pipelines_tests.shell import Shell, shell

__all__ = ["shell"]

PAGE = (Path(__file__).parents[1] / "docs" / "schema-mapping.md").read_text(encoding="utf-8")
FILES = re.findall(r"```yaml\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for code in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in code.splitlines()]
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
STEPS = re.findall(r"^\| `(\w+): (\"[^\"]*\"|\w+)`", PAGE, re.MULTILINE)
BOOKS = 20


@pytest.fixture(autouse=True)
def _books(shell: Shell) -> None:
    """A collection of books under ./old, which all examples start from."""
    store, _ = open_address("parquet:./old#books")
    schema = plain_schema("books")
    rng = np.random.default_rng(0)
    books = [
        Record(
            id=f"b{n}",
            vectors={"": rng.standard_normal(8).astype("f4")},
            document=f"Book {n}",
            metadata={
                "titel": f" Title {n} ",
                "year": str(1900 + n),
                "key": n,
                "tags": "a;b",
                "published": f"{n + 1:02}.05.1900",
                "draft": False,
                "ratings": [n, n + 1],
            },
        )
        for n in range(BOOKS)
    ]
    load(store, schema, books)
    store.close()


def write(number: int) -> Path:
    name, text = FILES[number]
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return Path(name)


def held(address: str) -> dict[str, Record]:
    store, collection = open_address(address)
    assert collection
    found = [
        record
        for span, ids in store.split(collection, span_records=1_000)
        for record in from_batches(store.scan(collection, span, ids=ids, batch_records=1_000))
    ]
    return {str(record.id): record for record in found}


def test_the_commands_of_the_page_move_the_mapped_records(shell: Shell) -> None:
    write(0)
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "vector-migrate"
        done = shell(*arguments)
        assert done.status == 0, done.everything
    book = held("parquet:./new#books")["en-7"]
    assert book.metadata == {
        "key": 7, "label": "Title 7 (1907)", "lang": "en", "published": "1900-05-08", "ratings": [7, 8],
        "tags": ["a", "b"], "title": "Title 7", "year": 1907
    }  # fmt: skip
    assert book.vectors[""].shape == (4,)


def test_the_declared_migration_of_the_page_runs(shell: Shell) -> None:
    (number,) = (at for at, (name, _) in enumerate(FILES) if name.endswith("defs.yaml"))
    folder = write(number).parents[1]
    assert read_declarations(folder).migrations.keys() == {"books"}
    done = shell("run", "books", "--defs", folder)
    assert done.status == 0, done.everything
    assert shell("validate", "books", "--defs", folder).status == 0
    expected = {"key": 3, "text": "Book 3", "title": " Title 3 ", "year": "1903"}
    assert held("parquet:./new#books")["b3"].metadata == expected


def test_the_vectors_of_the_page_are_mapped_as_it_says() -> None:
    mapping = read_mapping(write(2))
    (field,) = mapping.map_schema(plain_schema("books")).vectors
    assert (field.name, field.dimensions, field.dtype) == ("short", 4, "float16")


def test_the_steps_of_the_page_are_the_vocabulary() -> None:
    assert len(STEPS) == 9
    for name, argument in STEPS:
        plain = argument.strip('"')
        parse_step({name: int(plain) if plain.isdecimal() else plain})


def test_the_programs_of_the_page_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, code in enumerate(PROGRAMS):
        program = ModuleType(f"program{number}")  # its functions can be named, as those of a file
        monkeypatch.setitem(sys.modules, program.__name__, program)
        exec(compile(code, "docs/schema-mapping.md", "exec"), program.__dict__)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"complete {BOOKS}"
    assert second == "{'field_mapping': {'title': 'titel'}, 'document_from': 'text'}"
    assert held("parquet:./embedded#books")["b3"].vectors[""].tolist() == [9.0, 3.0, 1.0]
    assert held("parquet:./rated#books")["b3"].metadata == {"title": " Title 3 ", "rating": 3.5}
