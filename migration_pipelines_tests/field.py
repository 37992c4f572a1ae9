"""Real stores as they were found, and the sample of real embeddings, which lie beside the checkout."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from migration_pipelines_tests.records import Record

SHARED = Path(__file__).resolve().parents[2] / "shared"
FIELD = SHARED / "field"


def stores(kind: str) -> list[Mapping[str, Any]]:
    """The manifest's entries for one kind of store; none where the field isn't there."""
    manifest = FIELD / "MANIFEST.json"
    if not manifest.exists():
        return []
    return [store for store in json.loads(manifest.read_text())["stores"] if store["kind"] == kind]


def collections(kind: str) -> list[tuple[Path, Mapping[str, Any]]]:
    """Every collection of a kind of store: the store's path and the truth on the collection."""
    return [
        (_place(FIELD / store["local"]), collection)
        for store in stores(kind)
        for collection in store["collections"]
    ]


def _place(listed: Path) -> Path:
    """Where a found store lies: directly under its project's, whatever its path was in there."""
    return listed if listed.exists() else listed.parents[1] / listed.name


def writable_copy(store: Path, folder: Path) -> Path:
    """Copy a store that lies on a read-only path to where a careless reader could change it."""
    copy = folder / store.name
    if store.is_file():
        shutil.copyfile(store, copy)
        return copy
    shutil.copytree(store, copy, copy_function=shutil.copy)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


def bytes_of(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder, and every folder, by name; or of the one file."""
    if folder.is_file():
        return {folder.name: hashlib.sha256(folder.read_bytes()).hexdigest()}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def truth(records: Iterable[Record]) -> dict[str, Any]:
    """What the manifest tells of a collection, computed from its records."""
    ordered = sorted(records, key=lambda record: str(record.id))
    return {
        "rows": len(ordered),
        "ids_sha256": _sha256(str(record.id) for record in ordered),
        "documents_sha256": _sha256(f"{record.id}\t{record.document}" for record in ordered),
        "metadata_sha256": _sha256(f"{record.id}\t{_json(record.metadata)}" for record in ordered),
        "vectors_checksum": round(
            float(sum(np.abs(np.asarray(record.vectors[""], np.float64)).sum() for record in ordered)), 3
        ),
        "rows_without_metadata": sum(record.metadata is None for record in ordered),
    }


def _json(metadata: Mapping[str, Any] | None) -> str:
    return json.dumps(metadata, sort_keys=True, ensure_ascii=False)


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
