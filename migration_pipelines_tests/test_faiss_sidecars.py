"""Records beside an index of another tool, of LangChain, Haystack and others, are read and never changed."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
import sys
import types
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from migration_pipelines.errors import (
    CollectionNotFoundError,
    ConfigurationError,
    MigrationError,
    StoreRefusedError,
    UnsupportedOperationError,
)
from migration_pipelines.migration import Migration, MigrationConfig, ledger_for
from migration_pipelines.migrator import run_migration
from migration_pipelines.model import Metric
from migration_pipelines.store import open_address
from migration_pipelines_tests import field
from migration_pipelines_tests.conformance import assert_same, ids_of, read_all
from migration_pipelines_tests.harnesses import memory, parquet
from migration_pipelines_tests.records import Record, from_batches, plain_records, to_batch
from migration_pipelines_tests.shell import Shell, shell

__all__ = ["shell"]

RECORDS = plain_records(40)


def write_index(path: Path, records: list[Record] = RECORDS, *, ids: Any = None) -> None:
    """A flat index of the records' vectors, numbered by `ids` where given."""
    vectors = np.array([record.vectors[""] for record in records], np.float32)
    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    if ids is not None:
        index = faiss.IndexIDMap2(index)
        index.add_with_ids(vectors, np.asarray(ids, np.int64))
        index.own_fields = False
    else:
        index.add(vectors)
    faiss.write_index(index, str(path))


def refusal(address: str) -> str:
    store, name = open_address(address)
    with pytest.raises(MigrationError) as caught:
        store.describe(name or "index")
    return f"{type(caught.value).__name__}: {caught.value}"


# ── LangChain ────────────────────────────────────────────────────────────────────────────────────────


def pydantic_2(module: types.ModuleType) -> type:
    class Document(BaseModel):
        id: str | None = None
        page_content: str
        metadata: dict = {}
        type: str = "Document"

    Document.__module__, Document.__qualname__ = module.__name__, "Document"
    return Document


class _V1:
    """The state that pydantic 1 pickles, whose classes have no other."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getstate__(self) -> Any:
        return {
            "__dict__": self.__dict__,
            "__fields_set__": {"page_content", "metadata"},
            "__private_attribute_values__": {"_lc_kwargs": dict(self.__dict__)},
        }

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("a pickle was run")


def pydantic_1(module: types.ModuleType) -> type:
    return type("Document", (_V1,), {"__module__": module.__name__})


def plain(module: types.ModuleType) -> type:
    def init(self: Any, **fields: Any) -> None:
        self.__dict__.update(fields, lookup_index=0, lookup_str="")

    return type("Document", (), {"__module__": module.__name__, "__init__": init})


GENERATIONS = {
    "2022": ("langchain.docstore.in_memory", "langchain.docstore.document", plain, 3),
    "early-2023": ("langchain.docstore.in_memory", "langchain.schema", pydantic_1, 4),
    "late-2023": ("langchain.docstore.in_memory", "langchain.schema.document", pydantic_1, 4),
    "early-2024": ("langchain_community.docstore.in_memory", "langchain_core.documents.base", pydantic_1, 4),
    "since": ("langchain_community.docstore.in_memory", "langchain_core.documents.base", pydantic_2, 4),
    "oldest-protocol": (
        "langchain_community.docstore.in_memory",
        "langchain_core.documents.base",
        pydantic_2,
        0,
    ),
    "newest-protocol": (
        "langchain_community.docstore.in_memory",
        "langchain_core.documents.base",
        pydantic_2,
        5,
    ),
}


def langchain_pickle(
    monkeypatch: pytest.MonkeyPatch,
    generation: str = "since",
    *,
    records: list[Record] = RECORDS,
    change: Callable[[dict, dict], Any] = lambda documents, ids: None,
    swap: bool = False,
) -> bytes:
    """What `save_local` of some generation of LangChain pickles."""
    store_module, document_module, make, protocol = GENERATIONS[generation]
    with monkeypatch.context() as patch:
        modules = {
            name: types.ModuleType(name)
            for full in (store_module, document_module)
            for name in accumulate(full.split("."), "{}.{}".format)
        }
        for name, module in modules.items():
            module.__path__ = []
            patch.setitem(sys.modules, name, module)
        document = make(modules[document_module])
        modules[document_module].Document = document
        docstore = type("InMemoryDocstore", (), {"__module__": store_module})
        modules[store_module].InMemoryDocstore = docstore
        documents = {
            str(r.id): document(page_content=r.document, metadata=dict(r.metadata or {})) for r in records
        }
        ids = dict(enumerate(documents))
        change(documents, ids)
        held = docstore()
        held._dict = documents
        return pickle.dumps((ids, held) if swap else (held, ids), protocol)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of LangChain's without its pickle."""
    made = tmp_path / "db_faiss"
    made.mkdir()
    write_index(made / "index.faiss")
    return made


@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_langchain_is_read(
    generation: str, swap: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "index.pkl").write_bytes(langchain_pickle(monkeypatch, generation, swap=swap))
    before = field.bytes_of(folder)
    store, name = open_address(f"faiss:{folder}")
    assert (name, store.list_collections()) == ("index", ["index"])
    schema = store.describe("index")
    assert (schema.options["layout"], schema.vectors[0].metric) == ("langchain", Metric.DOT)
    assert_same(read_all(store, "index", span_records=7), RECORDS, store)
    assert_same(from_batches([store.fetch("index", ids_of(RECORDS[3:9]))]), RECORDS[3:9], store)
    assert store.search("index", RECORDS[5].vectors[""] * 9, limit=1)[0][0] == RECORDS[5].id
    assert field.bytes_of(folder) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda documents, ids: ids.popitem(), ["39 vectors", "holds 40"]),
        (lambda documents, ids: documents.popitem(), ["1 of 40 vectors have no document"]),
        (lambda documents, ids: documents.update(more=documents["doc#00000"]), ["1 documents no vector"]),
        (lambda documents, ids: documents.update({"doc#00000": {}}), ["doc#00000", "page_content"]),
    ],
    ids=["position", "document", "orphan", "no-document"],
)
def test_a_pickle_that_does_not_fit_its_index_is_counted_and_named(
    change: Any, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "index.pkl").write_bytes(langchain_pickle(monkeypatch, change=change))
    found = refusal(f"faiss:{folder}#index")
    for word in ["StoreRefusedError", "index.pkl", *words]:
        assert word in found


def test_metadata_that_no_json_can_hold_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(documents: dict, ids: dict) -> None:
        documents["doc#00007"].metadata["tags"] = {1, 2}

    (folder / "index.pkl").write_bytes(langchain_pickle(monkeypatch, change=change))
    assert "metadata" in refusal(f"faiss:{folder}#index")


def test_an_index_without_its_pickle_is_refused_until_the_vectors_alone_are_asked_for(folder: Path) -> None:
    found = refusal(f"faiss:{folder}#index")
    assert "StoreRefusedError" in found
    assert "index.pkl is missing" in found
    for address in (f"faiss:{folder}?sidecar=none#index", f"faiss:{folder}/index.faiss"):
        store, name = open_address(address)
        assert store.describe(name).options["layout"] == "bare"
        assert not store.describe(name).has_documents
        assert [record.id for record in read_all(store, name)] == list(range(40))


def test_a_cut_pickle_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "index.pkl").write_bytes(langchain_pickle(monkeypatch)[:-200])
    assert "cut" in refusal(f"faiss:{folder}#index")


class Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_a_crafted_pickle_is_refused_by_name_and_runs_nothing(
    folder: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(documents: dict, ids: dict) -> None:
        documents["doc#00007"].metadata["x"] = Payload()

    (folder / "index.pkl").write_bytes(langchain_pickle(monkeypatch, change=change))
    for arguments in (
        ("inspect", f"faiss:{folder}#index"),
        ("run", "--source", f"faiss:{folder}#index", "--target", "parquet:target#docs"),
    ):
        found = shell(*arguments)
        assert found.status == 1
        last = found.last_words
        assert last.startswith("vector-migrate: error: ")
        assert "posix.system" in last
        assert "index.pkl" in last
        assert "Traceback" not in found.everything
    assert not list(tmp_path.rglob("ran"))


FOUND = field.collections("faiss")


def found_folder(listed: Path) -> Path:
    """Where a found folder lies: directly under its project's, whatever its path was in there."""
    return listed if listed.exists() else listed.parents[1] / listed.name


@pytest.mark.skipif(not FOUND, reason="the folder of found stores isn't beside this checkout")
@pytest.mark.parametrize("target", [memory.HARNESSES[0], parquet.HARNESSES[0]])
@pytest.mark.parametrize(("listed", "truth"), FOUND, ids=lambda value: str(getattr(value, "name", "")))
def test_a_found_langchain_folder_moves_whole(listed: Path, truth: dict, target: Any, tmp_path: Path) -> None:
    folder = found_folder(listed)
    before = field.bytes_of(folder)
    with target.start(tmp_path / "target") as harness:
        config = MigrationConfig(
            source=f"faiss:{folder}#index", target=harness.store.address("docs"), partition_size=100
        )
        report = run_migration(Migration(config=config, ledger=ledger_for(config, tmp_path / "home")))
        assert report.status == "complete"
        assert report.records["verified"] == truth["rows"]
        found = field.truth(harness.read("docs"))
    assert found.pop("vectors_checksum") == pytest.approx(truth["vectors_checksum"], abs=1e-3)
    assert found == {name: truth[name] for name in found}
    assert field.bytes_of(folder) == before


# ── JSON lines, Parquet ──────────────────────────────────────────────────────────────────────────────


def lines(records: list[Record], **names: str) -> str:
    """The records as JSON lines, `names` saying what a key is called in place of its own name."""
    return "".join(
        json.dumps(
            {
                names.get("id", "id"): r.id,
                names.get("document", "document"): r.document,
                names.get("metadata", "metadata"): r.metadata,
            }
        )
        + "\n"
        for r in records
    )


@pytest.mark.parametrize(
    "names",
    [{}, {"document": "text"}, {"document": "page_content"}, {"document": "content", "metadata": "meta"}],
)
def test_json_lines_are_the_records_in_the_order_of_the_vectors(names: dict, tmp_path: Path) -> None:
    write_index(tmp_path / "docs.faiss")
    (tmp_path / "docs.jsonl").write_text(lines(RECORDS, **names))
    for address in (f"faiss:{tmp_path}#docs", f"faiss:{tmp_path}/docs.faiss", f"faiss:{tmp_path}"):
        store, name = open_address(address)
        assert store.describe(name).options["layout"] == "json-lines"
        assert_same(read_all(store, name), RECORDS, store)


def test_labels_say_which_vector_a_line_is_about(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).permutation(40) * 3 - 7
    write_index(tmp_path / "docs.faiss", ids=labels)
    rows = [
        {"label": int(label), "id": r.id, "text": r.document, **(r.metadata or {})}
        for label, r in zip(labels, RECORDS, strict=True)
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    store, name = open_address(f"faiss:{tmp_path}#docs")
    assert_same(read_all(store, name), RECORDS, store)


def test_a_parquet_file_is_read_with_and_without_our_own_columns(tmp_path: Path) -> None:
    write_index(tmp_path / "docs.faiss")
    ours = pa.table(
        {
            "id": [r.id for r in RECORDS],
            "id_type": ["str"] * 40,
            "document": [r.document for r in RECORDS],
            "metadata": [json.dumps(r.metadata) for r in RECORDS],
        }
    )
    theirs = pa.table(
        {
            "id": [r.id for r in RECORDS],
            "text": [r.document for r in RECORDS],
            **{key: [(r.metadata or {})[key] for r in RECORDS] for key in RECORDS[0].metadata or {}},
        }
    )
    for table in (ours, theirs):
        pq.write_table(table, tmp_path / "docs.parquet")
        store, name = open_address(f"faiss:{tmp_path}#docs")
        assert_same(read_all(store, name), RECORDS, store)


def test_a_record_without_an_id_has_faiss_own(tmp_path: Path) -> None:
    write_index(tmp_path / "docs.faiss", RECORDS[:2])
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    store, name = open_address(f"faiss:{tmp_path}#docs")
    assert [(r.id, r.document, r.metadata) for r in read_all(store, name)] == [(0, "a", None), (1, "b", None)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lines(RECORDS[:39]), ["39 records", "40 vectors"]),
        (lines(RECORDS) + "{", ["line 41", "no JSON"]),
        (lines(RECORDS[:39]) + "[1]", ["line 40", "expected an object"]),
        (lines(RECORDS[:39]) + '{"id": 1.5}', ["1.5"]),
        (lines(RECORDS[:39]) + '{"id": "x", "text": 7}', ["line 40", "a text"]),
        (lines(RECORDS[:39]) + '{"id": "x", "metadata": {"a": 1}, "a": 2}', ["line 40", "twice"]),
        ("".join(json.dumps({"id": n, "label": n % 39}) + "\n" for n in range(40)), ["1 of 40", "share"]),
    ],
)
def test_json_lines_that_do_not_fit_are_refused_with_the_place(
    text: str, words: list[str], tmp_path: Path
) -> None:
    write_index(tmp_path / "docs.faiss")
    (tmp_path / "docs.jsonl").write_text(text)
    found = refusal(f"faiss:{tmp_path}#docs")
    for word in ["StoreRefusedError", "docs.jsonl", *words]:
        assert word in found


def test_two_sidecars_are_told_apart_by_the_user(tmp_path: Path) -> None:
    write_index(tmp_path / "docs.faiss", RECORDS[:1])
    (tmp_path / "docs.jsonl").write_text('{"text": "from lines"}\n')
    pq.write_table(pa.table({"text": ["from parquet"]}), tmp_path / "docs.parquet")
    assert "?sidecar=" in refusal(f"faiss:{tmp_path}#docs")
    for file, expected in (("docs.jsonl", "from lines"), ("docs.parquet", "from parquet")):
        store, name = open_address(f"faiss:{tmp_path}?sidecar={file}#docs")
        assert [record.document for record in read_all(store, name)] == [expected]
    store, name = open_address(f"faiss:{tmp_path}?sidecar=other.jsonl#docs")
    with pytest.raises(ConfigurationError, match=r"other\.jsonl"):
        store.describe(name)


# ── Haystack ─────────────────────────────────────────────────────────────────────────────────────────


def haystack(
    folder: Path, *, is_json: bool, similarity: str = "cosine", records: list[Record] = RECORDS
) -> None:
    """What `FAISSDocumentStore.save` writes, of the time before or after texts were kept as JSON."""
    write_index(folder / "docs.faiss")
    config = {"sql_url": "sqlite:////somewhere/else/docs.db", "similarity": "cosine", "index": "books"}
    (folder / "docs.json").write_text(json.dumps(config))
    dump = json.dumps if is_json else str
    database = sqlite3.connect(folder / "docs.db")
    database.execute(
        f"CREATE TABLE document (id TEXT, content {'JSON' if is_json else 'TEXT'}, content_type TEXT, "
        '"index" TEXT, vector_id TEXT)'
    )
    database.execute(
        "CREATE TABLE meta_document (name TEXT, value TEXT, document_id TEXT, document_index TEXT)"
    )
    for position, r in enumerate(records):
        row = (r.id, dump(r.document), "text", "books", str(position))
        database.execute("INSERT INTO document VALUES (?, ?, ?, ?, ?)", row)
        for key, value in (r.metadata or {}).items():
            database.execute(
                "INSERT INTO meta_document VALUES (?, ?, ?, ?)", (key, dump(value), r.id, "books")
            )
    database.execute("INSERT INTO document VALUES ('other', 'x', 'text', 'another index', '0')")
    database.commit()
    database.close()


@pytest.mark.parametrize("is_json", [True, False], ids=["json", "text"])
def test_haystacks_documents_are_read_from_its_database(is_json: bool, tmp_path: Path) -> None:
    haystack(tmp_path, is_json=is_json)
    before = field.bytes_of(tmp_path)
    store, name = open_address(f"faiss:{tmp_path}#docs")
    schema = store.describe(name)
    assert (schema.options["layout"], schema.vectors[0].metric) == ("haystack", Metric.COSINE)
    found = read_all(store, name)
    assert [(r.id, r.document) for r in found] == [(r.id, r.document) for r in RECORDS]
    expected = [
        r.metadata if is_json else {k: str(v) for k, v in (r.metadata or {}).items()} for r in RECORDS
    ]
    assert [r.metadata for r in found] == expected
    assert field.bytes_of(tmp_path) == before


def test_haystacks_database_has_to_be_there_and_to_fit(tmp_path: Path) -> None:
    haystack(tmp_path, is_json=True, records=RECORDS[:38])
    found = refusal(f"faiss:{tmp_path}#docs")
    assert "40 vectors" in found
    assert "38 documents" in found
    (tmp_path / "docs.db-wal").write_bytes(b"x")
    assert "docs.db-wal" in refusal(f"faiss:{tmp_path}#docs")
    (tmp_path / "docs.db").unlink()
    assert "docs.db" in refusal(f"faiss:{tmp_path}#docs")
    (tmp_path / "docs.db").write_bytes(b"no database at all")
    (tmp_path / "docs.db-wal").unlink()
    assert "StoreRefusedError" in refusal(f"faiss:{tmp_path}#docs")


# ── what all of them share ───────────────────────────────────────────────────────────────────────────


def test_files_of_other_tools_are_never_changed(tmp_path: Path) -> None:
    write_index(tmp_path / "docs.faiss")
    before = field.bytes_of(tmp_path)
    store, _ = open_address(f"faiss:{tmp_path}#docs")
    schema = store.describe("docs")
    batch = to_batch([Record(id=1, vectors=RECORDS[0].vectors)], schema)
    for change in (
        lambda: store.upsert("docs", batch),
        lambda: store.delete("docs", ids_of([Record(id=1)])),
        lambda: store.drop("docs"),
        lambda: store.finish_load("docs"),
        lambda: store.load_part("docs", "a").__enter__(),
    ):
        with pytest.raises(UnsupportedOperationError, match="another tool"):
            change()
    with pytest.raises(MigrationError, match="there already"):
        store.create(schema)
    with pytest.raises(UnsupportedOperationError, match="only read"):
        open_address(f"faiss:{tmp_path}/docs.faiss")[0].create(schema)
    assert field.bytes_of(tmp_path) == before


def test_an_index_that_is_not_there_is_told(tmp_path: Path) -> None:
    for address in (f"faiss:{tmp_path}/none.faiss", f"faiss:{tmp_path}#none", f"faiss:{tmp_path}/none#x"):
        store, name = open_address(address)
        with pytest.raises(CollectionNotFoundError):
            store.count(name)


def test_codes_are_a_loss_to_be_accepted(shell: Shell) -> None:
    index = faiss.index_factory(8, "SQ8")
    vectors = np.array([record.vectors[""] for record in RECORDS], np.float32)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, "docs.faiss")
    Path("docs.jsonl").write_text(lines(RECORDS))
    move = ("run", "--source", "faiss:docs.faiss", "--target", "parquet:target#docs")
    found = shell(*move)
    assert found.status == 2
    assert "approximate-vector" in found.err
    assert "IndexScalarQuantizer" in found.err
    assert shell(*move, "--allow-loss", "approximate-vector").status == 0


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    write_index(tmp_path / "docs.faiss")
    (tmp_path / "docs.jsonl").write_text(lines(RECORDS))
    store, name = open_address(f"faiss:{tmp_path}#docs")
    first = store.fingerprint(name)
    assert store.fingerprint(name) == first
    (tmp_path / "docs.jsonl").write_text(lines([*RECORDS[1:], RECORDS[0]]))
    assert store.fingerprint(name) != first
    assert read_all(store, name)[0].id == RECORDS[1].id


def test_a_refused_file_says_so_each_time(folder: Path) -> None:
    (folder / "index.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    store, _ = open_address(f"faiss:{folder}#index")
    for _ in range(2):
        with pytest.raises(StoreRefusedError, match=r"os\.system"):
            store.count("index")
