"""What may import what, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from migration_pipelines import errors
from migration_pipelines.store import Store, store_class, store_kinds

ROOT = Path(errors.__file__).parents[1]
HEAVY = {
    *("boto3", "botocore", "chromadb", "dagster", "elasticsearch", "faiss", "great_expectations"),
    *("milvus_lite", "pandas", "pgvector", "pinecone", "psycopg", "pymilvus", "qdrant_client", "s3fs"),
    "weaviate",
}


def test_imports_point_down_only() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_connectors_never_import_each_other_not_even_through_a_helper() -> None:
    graph = grimp.build_graph("migration_pipelines", cache_dir=None)
    connectors = {f"migration_pipelines.stores.{kind}" for kind in store_kinds()}
    assert connectors <= graph.modules
    for connector in connectors:
        needed = graph.find_upstream_modules(connector, as_package=True)
        others = tuple(f"{other}." for other in connectors - {connector})
        assert not [module for module in needed if f"{module}.".startswith(others)]


def loaded_by(statement: str) -> list[str]:
    """The heavy packages that a new interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_heavy_package_would_be_noticed() -> None:
    assert loaded_by("import pandas") == ["pandas"]


@pytest.mark.parametrize("kind", store_kinds())
def test_store_module_loads_no_driver(kind: str) -> None:
    assert loaded_by(f"import migration_pipelines.stores.{kind}") == []


@pytest.mark.parametrize("kind", store_kinds())
def test_store_module_offers_one_store_of_its_own_name(kind: str) -> None:
    found = store_class(kind)
    assert issubclass(found, Store)
    assert found.kind == kind


def test_core_loads_nothing_heavy() -> None:
    assert (
        loaded_by("import migration_pipelines.store, migration_pipelines.filters, migration_pipelines") == []
    )
