"""Every command of docs/moves.md is run as it stands there, but for the addresses of the servers."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from migration_pipelines.errors import CollectionNotFoundError
from migration_pipelines.model import Metric
from migration_pipelines.store import Address, Store, open_address, store_class
from migration_pipelines_tests.conformance import load, new_schema, records_for
from migration_pipelines_tests.harnesses.base import Harness
from migration_pipelines_tests.shell import Shell, shell
from migration_pipelines_tests.standins.pinecone import KEY

__all__ = ["shell"]

PAGE = (Path(__file__).parents[1] / "docs" / "moves.md").read_text(encoding="utf-8")
MOVES = re.findall(r"^## (.+?)\n.*?```(bash|python)\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = {title: code for title, language, code in MOVES if language == "bash"}
SERVERS = ("pgvector", "pinecone", "weaviate", "elasticsearch", "parquet_s3")
RECORDS = 30


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Harness]]:
    """An engine, or its stand-in, in place of each server that the page names."""
    with ExitStack() as stack:
        found = {}
        for name in SERVERS:
            module = importlib.import_module(f"migration_pipelines_tests.harnesses.{name}")
            found[name] = stack.enter_context(module.HARNESSES[0].start(tmp_path_factory.mktemp(name)))
        yield found


def here(text: str, engines: Mapping[str, Harness]) -> tuple[Store, str | None]:
    """The store of an address of the page, on an engine of ours where it names a server."""
    address = Address.parse(text)
    engine = engines.get("parquet_s3" if "s3://" in address.path else address.kind)
    named, collection = store_class(address.kind).from_address(address)
    if engine is None:
        return named, collection
    bound = {"namespace": named.namespace} if getattr(named, "namespace", None) else {}
    return engine.store.model_copy(update=bound), collection


def fill(store: Store, collection: str, metric: Metric) -> None:
    """Put some records into a source."""
    with suppress(CollectionNotFoundError):
        store.drop(collection)
    schema = new_schema(store, dimensions=16, metric=metric)
    load(store, schema.model_copy(update={"name": collection}), records_for(store, RECORDS, dimensions=16))
    store.close()


@pytest.mark.parametrize("title", COMMANDS)
def test_a_move_of_the_page_arrives_whole(
    title: str, engines: Mapping[str, Harness], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    program, *arguments = shlex.split(COMMANDS[title].replace("\\\n", ""))
    assert program == "vector-migrate"
    sides = {}
    for option in ("--source", "--target"):
        at = arguments.index(option) + 1
        sides[option] = store, collection = here(arguments[at], engines)
        arguments[at] = store.address(collection)
    source, target = sides["--source"], sides["--target"]
    metric = Metric.COSINE if "vector-rounding" in arguments else Metric.EUCLIDEAN
    fill(source[0], source[1] or "passages", metric)
    with suppress(CollectionNotFoundError):
        target[0].drop(target[1] or "passages")
    target[0].close()
    done = shell(*arguments, "--json", "--quiet")
    assert done.status == 0, done.everything
    document = done.document["collections"]["passages"] if "--all-collections" in arguments else done.document
    assert document["status"] == "complete"
    assert document["records"]["verified"] == RECORDS


def test_a_collection_in_memory_moves_from_python(
    shell: Shell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one example that is no command, run in this process, where its collection is."""
    (code,) = (code for _, language, code in MOVES if language == "python")
    store, _ = open_address("memory:app#passages")
    fill(store, "passages", Metric.EUCLIDEAN)
    exec(compile(code, "docs/moves.md", "exec"), {})
    assert capsys.readouterr().out == f"complete {RECORDS}\n"
