"""`--config FILE`: what may stand in it, what comes first, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from migration_pipelines_tests.shell import Outcome, Shell, fill, shell

__all__ = ["shell"]

SOURCE, TARGET = "parquet:source#docs", "parquet:target#docs"
SECRET = "hunter2-and-more"
UNREACHABLE = "127.0.0.1:1"


@pytest.fixture
def moving(shell: Shell) -> Shell:
    """A shell in a folder where the source is there."""
    fill(SOURCE)
    return shell


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The passwords by which PostgreSQL was asked for a connection, each of which it refuses and repeats."""
    import psycopg

    passwords: list[object] = []

    def connect(*_: object, **settings: object) -> object:
        passwords.append(settings.get("password"))
        raise psycopg.OperationalError(f"refused {settings.get('password')}")

    monkeypatch.setattr(psycopg, "connect", connect)
    return passwords


def refused(found: Outcome, *words: str) -> None:
    assert found.status == 2, found.everything
    for word in words:
        assert word in found.last_words
    assert SECRET not in found.everything


YAML = f"""
source: {SOURCE}
target: {TARGET}
filter: {{even: true}}
batch-size: 100
allow_loss: vector-rounding
mapping: {{exclude_fields: [tag]}}
"""
JSON = json.dumps(
    {
        "source": SOURCE,
        "target": TARGET,
        "filter": "even=true",
        "batch_size": 100,
        "allow-loss": ["vector-rounding"],
        "mapping": {"exclude_fields": ["tag"]},
    }
)
TOML = f"""
source = "{SOURCE}"
target = "{TARGET}"
batch_size = 100
allow_loss = ["vector-rounding"]
[filter]
even = true
[mapping]
exclude_fields = ["tag"]
"""


@pytest.mark.parametrize(("suffix", "text"), [("yaml", YAML), ("yml", YAML), ("json", JSON), ("toml", TOML)])
def test_one_file_gives_the_options_of_every_command(
    moving: Shell, tmp_path: Path, suffix: str, text: str
) -> None:
    config = ("--config", f"move.{suffix}", "--json")
    (tmp_path / f"move.{suffix}").write_text(text)
    assert moving("estimate", *config, "--no-write-sample").document["estimated_batches"] == 2
    planned = moving("plan", *config).document
    assert (planned["profile"]["records"], planned["status"]) == (150, "planned")
    assert "tag" not in planned["profile"]["fields"]
    done = moving("run", *config)
    assert (done.status, done.document["target"]["count"]) == (0, 150)
    assert moving("verify", *config).document["equal"] == 150


def test_export_and_import_take_their_arguments_from_it(moving: Shell, tmp_path: Path) -> None:
    (tmp_path / "out.yaml").write_text(f"source: {SOURCE}\nfolder: backup\nvalidate: true\n")
    found = moving("export", "--config", "out.yaml", "--json").document
    assert (found["target"]["address"], found["validation"]["status"]) == ("parquet:.#backup", "equal")
    (tmp_path / "in.toml").write_text('folder = "backup"\ntarget = "parquet:back#docs"\n')
    assert moving("import", "--config", "in.toml", "--quiet").status == 0
    assert moving("inspect", "parquet:back#docs", "--json").document["count"] == 300


def test_a_declared_migration_is_named_in_it(moving: Shell, tmp_path: Path) -> None:
    (tmp_path / "defs" / "one").mkdir(parents=True)
    (tmp_path / "defs" / "one" / "defs.yaml").write_text(
        "type: migration_pipelines.components.VectorMigration\n"
        f'attributes: {{name: one, source: "{SOURCE}", target: "{TARGET}"}}\n'
    )
    (tmp_path / "move.yaml").write_text("name: one\ndefs: defs\nfilter: even=true\n")
    assert moving("run", "--config", "move.yaml", "--json").document["target"]["count"] == 150


def test_the_command_line_comes_first(moving: Shell, tmp_path: Path) -> None:
    (tmp_path / "move.yaml").write_text(YAML + "output: yaml\n")
    options = ("--config", "move.yaml", "--filter", "n>=200", "--target", "parquet:other#docs", "--json")
    found = moving("run", *options).document
    assert (found["target"]["address"], found["target"]["count"]) == ("parquet:other#docs", 100)


def test_an_error_is_told_in_the_form_that_the_file_asks_for(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "move.json").write_text(json.dumps({"source": "parquet:a#b", "target": TARGET, "json": True}))
    found = shell("run", "--config", "move.json")
    assert (found.status, found.document["error"]["type"]) == (2, "CollectionNotFoundError")


# ── ${NAME} ──────────────────────────────────────────────────────────────────────────────────────────


def test_variables_are_filled_in(moving: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "move.yaml").write_text(
        "source: parquet:${FOLDER}#docs\ntarget: parquet:${OTHER:-else}#docs\n"
        "filter: {tag: {$in: ['${TAG:-}', '$${x}']}}\n"
    )
    monkeypatch.setenv("FOLDER", "source")
    monkeypatch.delenv("OTHER", raising=False)
    planned = moving("plan", "--config", "move.yaml", "--dry-run", "--json").document
    assert (planned["source"], planned["target"]) == (SOURCE, "parquet:else#docs")
    assert json.loads(planned["where"]) == {"tag": {"$in": ["", "${x}"]}}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "source: parquet:${NOT_SET_ANYWHERE}#docs", "NOT_SET_ANYWHERE"),
        ("a.yaml", "source: parquet:${1bad}#docs", "expected ${NAME}"),
        ("a.yaml", "sauce: x\nsource: y", "no option sauce"),
        ("a.yaml", f"password: {SECRET}", "no option password"),
        ("a.yaml", "config: other.yaml", "no option config"),
        ("a.yaml", "batch_size: 1\nbatch-size: 2", "batch_size is given twice"),
        ("a.yaml", "batch_size: many", "--batch-size"),
        ("a.yaml", "batch_size: [1, 2]", "batch_size must be one value"),
        ("a.yaml", "allow_loss: [{a: b}]", "allow_loss must be a list"),
        ("a.yaml", "- source", "options by their names"),
        ("a.yaml", f"source: [{SECRET}\n", "as YAML in line 2"),
        ("a.yaml", "a: !!python/object/apply:os.getcwd []", "as YAML in line 1"),
        ("a.json", f'{{"source": "{SECRET}"', "as JSON in line 1"),
        ("a.toml", f'source = "{SECRET}', "as TOML"),
        ("a.ini", "[x]", "neither .yaml"),
        ("nope.yaml", None, "No such file"),
    ],
)
def test_what_can_not_be_used_is_2_and_says_why(
    shell: Shell, tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(shell("run", "--config", name), words)


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "line",
    [
        f"source: pgvector://app:{SECRET}@{UNREACHABLE}/db/docs",
        f"source: pgvector://app:${{DB_PASSWORD:-{SECRET}}}@{UNREACHABLE}/db/docs",
        f"source: pgvector://${{DB_USER:-app}}:x{SECRET}${{DB_PASSWORD}}@{UNREACHABLE}/db/docs",
        f"secrets: {{PGVECTOR_PASSWORD: {SECRET}}}",
        f"secrets: {{PGVECTOR_PASSWORD: '${{DB_PASSWORD:-{SECRET}}}'}}",
        f"secrets: {SECRET}",
    ],
)
def test_a_secret_in_the_file_itself_is_refused_and_not_repeated(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "other-secret")
    (tmp_path / "move.yaml").write_text(f"{line}\ntarget: {TARGET}\n")
    for options in ((), ("--json",)):
        found = shell("--debug", "run", "--config", "move.yaml", *options)
        refused(found)
        assert "secret" in found.last_words or "password" in found.last_words


@pytest.mark.parametrize("reference", ["variable", "command", "address", "whole"])
def test_a_secret_by_reference_reaches_the_store_and_nothing_else(
    moving: Shell, seen: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    """Seen by the store: it gets as far as asking for a connection, with this very password."""
    secret = f"{SECRET}/@:"
    monkeypatch.setenv("OF_STAGING", secret)
    monkeypatch.setenv("WHOLE", f"pgvector://app:{SECRET}%2F%40%3A@{UNREACHABLE}/db/docs")
    command = json.dumps(f"command:{sys.executable} -c 'print(\"{secret}\")'")
    lines = {
        "variable": "secrets: {PGVECTOR_PASSWORD: '${OF_STAGING}'}",
        "command": f"secrets: {{PGVECTOR_PASSWORD: {command}}}",
    }
    target = f"pgvector://app@{UNREACHABLE}/db/docs"
    if reference == "address":
        target = target.replace("app@", "app:${OF_STAGING}@")
    if reference == "whole":
        target = "${WHOLE}"
    (tmp_path / "move.yaml").write_text(
        f"source: {SOURCE}\ntarget: '{target}'\nretry: 0\n{lines.get(reference, '')}\n"
    )
    monkeypatch.setenv("PGVECTOR_PASSWORD", "of the environment, which the file goes before")
    found = moving("--debug", "run", "--config", "move.yaml", "--report", "report.json", "--log-json")
    assert found.status in (1, 4), found.everything
    assert set(seen) == {secret}
    assert SECRET not in found.everything
    assert "history" not in found.err  # it isn't on the command line
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "move.yaml"]
    assert tmp_path / "report.json" in written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("place", [".env", "prod.env"])
def test_an_env_file_gives_a_secret_that_is_nowhere_else(
    moving: Shell, seen: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / ".env").write_text("PGVECTOR_PASSWORD=not-this-one\n")
    (tmp_path / place).write_text(f"PGVECTOR_PASSWORD={SECRET}\n")
    named = () if place == ".env" else ("--env-file", place)
    move = ("--source", SOURCE, "--target", f"pgvector://u@{UNREACHABLE}/db/docs")
    found = moving(*named, "--debug", "run", *move, "--retry", 0, "--report", "report.json")
    assert found.status in (1, 4), found.everything
    assert set(seen) == {SECRET}
    assert SECRET not in found.everything
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".env"]
    assert not [path for path in written if path.name != ".env" and SECRET.encode() in path.read_bytes()]
    monkeypatch.setenv("PGVECTOR_PASSWORD", "the real one")
    moving(*named, "run", *move, "--retry", 0)
    assert seen[-1] == "the real one"


def test_an_env_file_that_is_not_there_or_runs_something_is_2(shell: Shell, tmp_path: Path) -> None:
    refused(shell("--env-file", "nope.env", "stores"), "nope.env")
    (tmp_path / ".env").write_text("QDRANT_API_KEY_COMMAND=touch made\n")
    refused(shell("stores"), "--env-file .env")
    assert not (tmp_path / "made").exists()


# ── completion ───────────────────────────────────────────────────────────────────────────────────────


def completed(shell: Shell, monkeypatch: pytest.MonkeyPatch, line: str) -> list[str]:
    monkeypatch.setenv("_VECTOR_MIGRATE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - (line[-1] != " ")))
    return shell().out.split()


def test_a_shell_completes_commands_options_and_declared_names(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from migration_pipelines.declarations import read_declarations

    (tmp_path / "defs" / "books").mkdir(parents=True)
    (tmp_path / "defs" / "books" / "defs.yaml").write_text(
        "type: migration_pipelines.components.VectorMigration\n"
        "attributes: {source: 'parquet:a#b', target: 'parquet:c#d'}\n---\n"
        "type: migration_pipelines.components.StoreMigration\n"
        "attributes: {name: all, source: 'chroma:a', target: 'parquet:c/', collections: [x-1, y]}\n---\n"
        "type: migration_pipelines.components.StoreConnection\n"
        "attributes: {name: lake, store: parquet, settings: {path: x}}\n"
    )
    monkeypatch.setenv("VECTOR_MIGRATE_DEFS", "defs")
    names = completed(shell, monkeypatch, "vector-migrate run ")
    assert sorted(names) == sorted(read_declarations(Path("defs")).migrations)
    assert completed(shell, monkeypatch, "vector-migrate run all_y") == ["all_y"]
    assert completed(shell, monkeypatch, "vector-migrate ver") == ["verify"]
    assert "--config" in completed(shell, monkeypatch, "vector-migrate run --con")


def test_the_script_of_completion_is_shown(shell: Shell) -> None:
    found = shell("--show-completion", "bash")
    assert found.status == 0
    assert "_VECTOR_MIGRATE_COMPLETE=complete_bash" in found.out
