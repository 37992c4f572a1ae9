"""What Dagster loads: without network, drivers or secrets; all that is declared, and quickly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import dagster as dg
import pytest

from migration_pipelines.components.checks import ENGINE_CHECKS
from migration_pipelines.declarations import STORE_MIGRATION, read_declarations, store_migration_specs
from migration_pipelines.errors import ConfigurationError
from migration_pipelines_tests.dagster_project import Project

STEPS = ["source", "inspected", "plan", "extracted", "transformed", "loaded", "verified", "validated"]
DRIVERS = ["chromadb", "psycopg", "great_expectations", "pinecone", "pymilvus", "qdrant_client"]
# Loads the definitions in a process that has no network and says what it imported and found.
LOAD = """
import json, socket, sys
def refuse(*_, **__):
    raise AssertionError("the definitions opened a connection")
socket.socket.connect = socket.create_connection = refuse
import dagster as dg
from migration_pipelines.definitions import defs
loaded = defs()
dg.Definitions.validate_loadable(loaded)
graph = loaded.resolve_asset_graph()
keys = sorted(key.to_user_string() for key in graph.get_all_asset_keys())
print(json.dumps({"assets": keys, "modules": sorted(sys.modules)}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def load(**variables: str) -> dict[str, list[str]]:
    environment = {name: value for name, value in os.environ.items() if "VECTOR_MIGRATE" not in name}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, **variables},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def loaded(project: Project) -> dg.Definitions:
    from migration_pipelines.definitions import defs

    with project.variables():
        found: dg.Definitions = defs()
    return found


def test_the_shipped_definitions_load_without_network_drivers_or_environment() -> None:
    found = load()
    assert found["assets"] == sorted(f"example/{step}" for step in STEPS)
    assert not set(found["modules"]) & set(DRIVERS)


def test_a_declared_secret_may_be_unset_while_the_definitions_load(project: Project) -> None:
    project.connect("warehouse", "pgvector", host="db.invalid", password="{{ env.NOT_SET_ANYWHERE }}")
    target = {"connection": "warehouse", "collection": "docs"}
    project.declare("docs", source="pgvector://u:{{ env.NEITHER_SET }}@db.invalid/d/t", target=target)
    found = load(VECTOR_MIGRATE_DEFS=str(project.defs))
    assert found["assets"] == sorted(f"docs/{step}" for step in STEPS)
    assert not set(found["modules"]) & set(DRIVERS)


def test_a_connection_shows_its_stores_fields_and_keeps_the_secret_a_variable(project: Project) -> None:
    project.connect("ware-house", "pgvector", host="db", port=5433, password="{{ env.SECRET }}")
    resource = loaded(project).resources["ware_house"]
    assert (resource.host, resource.port, resource.user) == ("db", 5433, None)
    assert isinstance(resource.password, dg.EnvVar)
    assert resource.password.env_var_name == "SECRET"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"password": "hunter2"}, "password is a secret"),
        ({"password": "x{{ env.PART }}"}, "a variable is a whole value"),
        ({"hots": "db"}, "no setting hots"),
    ],
)
def test_a_connection_that_cannot_work_is_refused_with_its_reason(
    project: Project, settings: dict[str, str], said: str
) -> None:
    project.connect("warehouse", "pgvector", **settings)
    with pytest.raises(ConfigurationError, match=said) as caught, project.session():
        pass
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"partition_size": 0}, "partition_size"),
        ({"partition_sise": 10}, "partition_sise"),
        ({"target": {"connection": "nowhere"}}, "no connection 'nowhere'"),
        ({"source": "nonsense"}, "not an address"),
    ],
)
def test_a_migration_that_cannot_work_is_refused_with_its_reason(
    project: Project, attributes: dict[str, object], said: str
) -> None:
    project.declare("docs", **{"source": "memory:a#docs", "target": "memory:b#docs", **attributes})
    with pytest.raises(ConfigurationError, match=said), project.session():
        pass


def test_the_group_is_a_chain_with_the_stores_kinds(project: Project) -> None:
    project.declare("docs", source="chroma:./db#docs", target="pgvector://localhost/db/docs")
    graph = loaded(project).resolve_asset_graph()
    for before, step in pairwise(STEPS):
        node = graph.get(dg.AssetKey(["docs", step]))
        assert node.parent_keys == {dg.AssetKey(["docs", before])}
        assert node.group_name == "docs"
    assert graph.get(dg.AssetKey(["docs", "source"])).kinds == {"chroma"}
    assert graph.get(dg.AssetKey(["docs", "loaded"])).kinds == {"postgres"}
    checks = {key.name for key in graph.asset_check_keys}
    assert checks == {*ENGINE_CHECKS.values(), "quality", "read_back_equals_staged"}


def test_a_schedule_exists_where_it_is_declared_and_nowhere_else(project: Project) -> None:
    project.declare("nightly", source="memory:a#docs", target="memory:b#docs", schedule="0 3 * * *")
    project.declare("once", source="memory:a#docs", target="memory:c#docs")
    schedules = {schedule.name: schedule for schedule in loaded(project).schedules or []}
    assert {name: schedule.cron_schedule for name, schedule in schedules.items()} == {
        "nightly__schedule": "0 3 * * *"
    }
    assert schedules["nightly__schedule"].default_status == dg.DefaultScheduleStatus.STOPPED


def test_fifty_migrations_load_in_a_few_seconds(project: Project) -> None:
    project.connect("warehouse", "pgvector", host="db", password="{{ env.SECRET }}")
    for number in range(50):
        target = {"connection": "warehouse", "collection": f"docs{number}"}
        project.declare(f"docs{number}", source="chroma:./db#docs", target=target)
    started = time.process_time()
    found = loaded(project)
    assert len(found.resolve_asset_graph().get_all_asset_keys()) == 50 * len(STEPS)
    assert time.process_time() - started < 5


def test_a_store_migration_declares_a_migration_for_each_collection(project: Project) -> None:
    project.connect("backups", "parquet", path=str(project.folder / "backups"))
    attributes = {
        "name": "whole",
        "source": "parquet:./source/",
        "target": {"connection": "backups"},
        "collections": ["docs", "user notes"],
        "workers": 1,
    }
    folder = project.defs / "whole"
    folder.mkdir()
    (folder / "defs.yaml").write_text(json.dumps({"type": STORE_MIGRATION, "attributes": attributes}))
    keys = {key.to_user_string() for key in loaded(project).resolve_asset_graph().get_all_asset_keys()}
    assert keys == {f"whole_{name}/{step}" for name in ("docs", "user_notes") for step in STEPS}
    declared = read_declarations(project.defs)
    migration = declared.migration("whole_user_notes", home=project.home)
    assert migration.source_collection == migration.target_collection == "user notes"
    assert migration.target.address("x") == f"parquet:{project.folder}/backups#x"


@pytest.mark.parametrize("collections", [["a b", "a_b"], ["a", ""], None])
def test_a_store_migration_needs_names_that_stay_apart(collections: list[str] | None) -> None:
    attributes = {
        "name": "all",
        "source": "parquet:./a/",
        "target": "parquet:./b/",
        "collections": collections,
    }
    with pytest.raises(ConfigurationError, match="all"):
        store_migration_specs(attributes, where="here")
