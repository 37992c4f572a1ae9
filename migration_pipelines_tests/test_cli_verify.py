"""`estimate`, `verify`, `export`, `import`, and the forms of output that all commands share."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from migration_pipelines import batch as batches
from migration_pipelines.cli import archives
from migration_pipelines.store import open_address
from migration_pipelines_tests.conformance import load
from migration_pipelines_tests.harnesses.parquet_s3 import ParquetOnS3
from migration_pipelines_tests.records import Record, plain_records, plain_schema
from migration_pipelines_tests.shell import Shell, fill, shell

__all__ = ["shell"]

SOURCE, TARGET = "parquet:source#docs", "parquet:target#docs"
MOVE = ("--source", SOURCE, "--target", TARGET)
DECLARED = """
type: migration_pipelines.components.VectorMigration
attributes:
  name: passages
  source: "parquet:source#docs"
  target: "parquet:target#docs"
  filter: {even: true}
"""


@pytest.fixture
def moving(shell: Shell, tmp_path: Path) -> Shell:
    """A shell in a folder where the source is there, and a move of half of it is declared."""
    fill(SOURCE)
    (tmp_path / "one.yaml").write_text(DECLARED)
    return shell


def lose(address: str, id_: str) -> None:
    store, collection = open_address(address)
    assert collection
    store.delete(collection, batches.id_batch([id_]))


# ── estimate ─────────────────────────────────────────────────────────────────────────────────────────


def test_estimate_tells_what_a_move_would_take_and_leaves_nothing(moving: Shell, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = moving("estimate", *MOVE, "--batch-size", 100, "--price-per-gb", 90_000, "--json")
    assert found.status == 0
    told = found.document
    assert (told["status"], told["source"], told["target"]) == ("compatible", SOURCE, TARGET)
    assert (told["total_vectors"], told["estimated_batches"], told["warnings"]) == (300, 3, [])
    assert told["egress_cost"] == pytest.approx(told["bytes_to_move"] / 1e9 * 90_000)
    assert min(told[name] for name in ("staging_bytes", "target_bytes", "vectors_per_second")) > 0
    after = sorted(tmp_path.rglob("*"))
    assert [
        path for path in after if path not in before and path.is_file() and "target" not in path.parts
    ] == []
    assert moving("inspect", "parquet:target/", "--json").document["collections"] == []


def test_estimate_without_a_sample_never_writes_into_the_target(moving: Shell, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = moving("estimate", *MOVE, "--no-write-sample")
    assert found.status == 0
    assert "300 in scope" in found.out
    assert sorted(tmp_path.rglob("*")) == before


def test_estimate_takes_a_declared_migration_and_its_filter(moving: Shell) -> None:
    assert moving("estimate", "one.yaml", "--no-write-sample", "--json").document["total_vectors"] == 150


def test_estimate_is_2_where_vectors_do_not_fit_what_is_there(moving: Shell) -> None:
    fill(TARGET, dimensions=4)
    assert moving("estimate", *MOVE, "--on-existing", "replace").status == 0
    found = moving("estimate", *MOVE, "--json")
    assert (found.status, found.document["status"], found.document["compatible"]) == (
        2,
        "incompatible",
        False,
    )
    assert "can't be made" in found.last_words


def test_estimate_is_2_until_a_loss_is_accepted(shell: Shell) -> None:
    fill(SOURCE, metric="cosine")
    move = ("estimate", "--source", SOURCE, "--target", "chroma:chroma#docs", "--no-write-sample")
    found = shell(*move)
    assert found.status == 2
    assert "vector-rounding" in found.last_words
    assert shell(*move, "--allow-loss", "vector-rounding").status == 0


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────


def test_verify_and_validate_are_one_comparison(moving: Shell) -> None:
    moving("run", *MOVE)
    verified, validated = moving("verify", *MOVE, "--json"), moving("validate", *MOVE, "--json")
    assert verified == validated
    assert (verified.status, verified.document["status"], verified.document["equal"]) == (0, "equal", 300)
    lose(TARGET, "doc#00007")
    found = moving("verify", *MOVE)
    assert found.status == 3
    assert "doc#00007" in found.out
    assert "1 records missing, 0 too many, 0 different" in found.last_words


def test_verify_compares_what_a_declared_migration_moves(moving: Shell) -> None:
    moving("run", "one.yaml")
    assert moving("verify", "one.yaml", "--json").document["equal"] == 150
    assert moving("verify", *MOVE, "--json").document["missing"] == 150


def test_verify_counts_each_namespace(shell: Shell) -> None:
    records = [
        Record(r.id, r.vectors, r.document, r.metadata, namespace="en" if n % 3 else "")
        for n, r in enumerate(plain_records(30))
    ]
    schema = plain_schema("docs").model_copy(update={"has_namespaces": True})
    for side in ("source", "target"):
        store, _ = open_address(f"parquet:{side}/")
        load(store, schema, records[: 30 if side == "source" else 29])
    found = shell("verify", *MOVE, "--json")
    assert found.status == 3
    assert found.document["source"]["namespaces"] == {"": 10, "en": 20}
    assert found.document["target"]["namespaces"] == {"": 10, "en": 19}
    assert "namespace en           20 in the source, 19 in the target" in shell("verify", *MOVE).out


# ── export, import ───────────────────────────────────────────────────────────────────────────────────


def test_a_collection_goes_into_a_folder_and_out_of_it(shell: Shell, tmp_path: Path) -> None:
    fill("chroma:chroma#docs")
    out = shell("export", "chroma:chroma#docs", "backup", "--validate", "--json")
    assert out.status == 0, out.everything
    assert (out.document["status"], out.document["validation"]["status"]) == ("complete", "equal")
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "backup").glob("*.parquet")) == 300
    back = shell("import", "backup", "chroma:other#docs", "--validate", "--workers", 1)
    assert back.status == 0, back.everything
    assert "equal  parquet:.#backup ↔ chroma:other#docs" in back.out
    assert shell("verify", "--source", "chroma:chroma#docs", "--target", "chroma:other#docs").status == 0


def test_a_folder_with_a_slash_holds_collections_by_their_names(moving: Shell, tmp_path: Path) -> None:
    assert moving("export", SOURCE, "backups/", "--filter", "even=true").status == 0
    assert (tmp_path / "backups" / "docs" / "_collection.json").exists()
    assert moving("import", "backups/docs/", "parquet:back#docs", "--json").document["target"]["count"] == 150
    assert "there are: docs" in moving("import", "backups/", "parquet:other#docs").last_words


def test_an_archive_lies_in_an_object_store_as_well(
    moving: Shell, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with ParquetOnS3.start(tmp_path_factory.mktemp("s3")) as engine:
        folder = f"{engine.store.url}/archive"
        assert moving("export", SOURCE, folder, "--validate", "--quiet").status == 0
        back = moving("import", folder, "parquet:back#docs", "--json").document
    assert (back["source"]["address"], back["target"]["count"]) == (
        f"parquet:{engine.store.url}#archive",
        300,
    )


def test_an_export_goes_on_and_writes_over_nothing(moving: Shell) -> None:
    assert [moving("export", SOURCE, "backup").status for _ in range(2)] == [0, 0]
    fill("parquet:source#other", plain_records(7))
    refused = moving("export", "parquet:source#other", "backup")
    assert refused.status == 2
    assert "holds 300 records" in refused.last_words
    assert moving("export", "parquet:source#other", "backup", "--on-existing", "replace").status == 0
    assert moving("inspect", "parquet:backup", "--json").document["count"] == 7


def test_validate_after_an_import_is_3_where_the_collections_differ(
    moving: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that goes missing between the run's own proof and the comparison."""
    compared = archives.compared

    def late(*arguments: object) -> object:
        lose("parquet:back#docs", "doc#00007")
        return compared(*arguments)

    monkeypatch.setattr(archives, "compared", late)
    found = moving("import", "source/docs", "parquet:back#docs", "--validate", "--json")
    assert found.status == 3
    assert (found.document["status"], found.document["validation"]["missing"]) == ("complete", 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export",), "say which SOURCE"),
        (("export", SOURCE), "say which FOLDER"),
        (("import", "source/docs"), "say which TARGET"),
        (("export", SOURCE, "qdrant:./data#docs"), "use run"),
        (("import", "qdrant://host/docs", TARGET), "use run"),
        (("import", "not-there", TARGET), "not-there"),
        (("import", "s3://key:hunter2@bucket/x", TARGET), "holds no login"),
    ],
)
def test_what_is_no_folder_is_2(moving: Shell, arguments: tuple[str, ...], words: str) -> None:
    found = moving(*arguments)
    assert found.status == 2
    assert words in found.last_words
    assert "hunter2" not in found.everything


# ── forms of output ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", SOURCE),
        ("inspect", "parquet:source/"),
        ("inspect", "parquet:source#nope"),
        ("stores", "parquet"),
        ("plan", *MOVE, "--dry-run"),
        ("run", *MOVE, "--dry-run"),
        ("run", "--bogus"),
        ("verify", "--source", SOURCE, "--target", SOURCE),
        ("validate", "--source", SOURCE, "--target", SOURCE),
        ("export", SOURCE, "qdrant:x"),
    ],
    ids=" ".join,
)
def test_yaml_says_what_json_says(moving: Shell, command: tuple[str, ...]) -> None:
    short, long = moving(*command, "--json"), moving(*command, "--output", "json")
    as_yaml = moving(*command, "--output=yaml")
    assert short.status == long.status == as_yaml.status
    found = yaml.safe_load(as_yaml.out)
    for document in (json.loads(short.out), json.loads(long.out)):
        assert shape(document) == shape(found)


def shape(value: object) -> object:
    """A document without its numbers, some of which are times."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return "number" if isinstance(value, int | float) else "text"


def test_a_form_that_is_not_known_is_2(moving: Shell) -> None:
    assert moving("inspect", SOURCE, "--output", "xml").status == 2
