"""Every file of docs/examples runs as it stands there, and prints what it says at its end."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migration_pipelines import (
    MigrationEstimate,
    MigrationProgress,
    MigrationResult,
    VectorStoreMigrator,
)

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
EXAMPLES = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path.stem != "passages"}
GUIDES = {
    *("basic", "progress", "estimate", "filter", "dry_run", "retry", "errors", "validation", "production"),
    *("selective", "environments", "comparison", "backup", "parallel", "incremental", "schema_mapping"),
    "metrics",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    for variable in ("VECTOR_MIGRATE_HOME", "ENVIRONMENT"):
        monkeypatch.delenv(variable, raising=False)
    runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
    _, _, said = EXAMPLES[name].read_text(encoding="utf-8").partition("\n# Prints:\n")
    assert said
    assert capsys.readouterr().out == re.sub(r"^# ?", "", said, flags=re.MULTILINE)


def test_every_block_of_a_guide_has_its_example() -> None:
    assert EXAMPLES.keys() >= GUIDES


def test_the_interface_is_called_as_the_guides_call_it() -> None:
    init, migrate = VectorStoreMigrator.__init__, VectorStoreMigrator.migrate
    assert {**_defaults(init)} == {
        "validate": True,
        "on_progress": None,
        "max_retries": 3,
        "retry_delay": 1.0,
        "retry_backoff": 2.0,
        "metrics_exporter": None,
    }
    assert list(inspect.signature(init).parameters)[:3] == ["self", "source", "target"]
    assert list(inspect.signature(migrate).parameters)[:3] == [
        "self",
        "source_collection",
        "target_collection",
    ]
    guides = {
        "target_collection": None,
        "batch_size": 1_000,
        "chunk_size": None,
        "filter": None,
        "dry_run": False,
        "incremental": False,
        "resume": False,
        "checkpoint_file": None,
        "on_conflict": "overwrite",
        "schema_mapping": None,
        "parallel": False,
        "max_workers": None,
        "worker_type": "thread",
        "source_namespace": None,
        "target_namespace": None,
        "allow_losses": (),
    }
    assert guides.items() <= _defaults(migrate).items()
    estimate = {"batch_size": 1_000, "filter": None, "target_collection": None}
    assert estimate.items() <= _defaults(VectorStoreMigrator.estimate).items()


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    found = inspect.signature(function).parameters.values()
    return {item.name: item.default for item in found if item.default is not item.empty}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            MigrationResult,
            "success vectors_migrated vectors_failed duration_seconds source_collection target_collection "
            "started_at completed_at errors metadata total_vectors success_rate",
        ),
        (
            MigrationProgress,
            "vectors_processed total_vectors current_batch total_batches elapsed_seconds errors percentage "
            "eta_seconds",
        ),
        (
            MigrationEstimate,
            "total_vectors estimated_duration_seconds estimated_batches source_dimension target_dimension "
            "compatible warnings vectors_per_second",
        ),
    ],
)
def test_results_have_the_names_of_the_guides(kind: Any, names: str) -> None:
    fields = {item.name for item in dataclasses.fields(kind)}
    assert {name for name in names.split() if name not in fields and not hasattr(kind, name)} == set()


def test_the_page_of_examples_lists_them_all() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(([a-z_]+)\.py\)", page)) == {*EXAMPLES, "passages"}
