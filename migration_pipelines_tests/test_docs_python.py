"""Every example of docs/python.md is run as it stands there, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from migration_pipelines.store import open_address
from migration_pipelines_tests.records import Record, plain_schema, to_batch

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = {
    title: (code, printed)
    for title, code, printed in re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```\n\n```text\n(.*?)```",
        PAGE,
        re.MULTILINE | re.DOTALL,
    )
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose `chroma:./chroma_db` holds 30 passages."""
    monkeypatch.chdir(tmp_path)
    for name in ("VECTOR_MIGRATE_HOME", "ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)
    store, _ = open_address("chroma:./chroma_db")
    schema = plain_schema("passages", dimensions=16)
    rng = np.random.default_rng(0)
    records = [
        Record(
            id=f"passage-{number}",
            vectors={"": rng.standard_normal(16).astype(np.float32)},
            document=f"Passage {number}",
            metadata={"number": number},
        )
        for number in range(30)
    ]
    store.create(schema)
    store.upsert("passages", to_batch(records, schema))
    store.close()
    return tmp_path


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_prints_what_the_page_says(
    title: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = EXAMPLES[title]
    exec(compile(code, f"docs/python.md: {title}", "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_page_on_incremental_runs_prints_what_it_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "incremental.md").read_text(encoding="utf-8")
    ((code, printed),) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "docs/incremental.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_no_example_of_the_page_is_left_out() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") == PAGE.count("```text")
