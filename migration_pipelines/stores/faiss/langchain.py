"""LangChain's sidecar of a FAISS index: a pickle, read without running any of it (`pickled.py`).

`FAISS.save_local` writes `index.faiss` and beside it `index.pkl` with two things: a docstore, which is an
object around a dictionary of documents by id, and a dictionary from positions in the index to these ids.
Since 2022 the classes have moved between packages, and from pydantic 1 to 2; what is in them is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.pickled import Built, read_pickle
from migration_pipelines.stores.faiss.sidecar import Row

SUFFIX = ".pkl"

_PACKAGES = ("langchain", "langchain_community", "langchain_classic", "langchain_core")
_DOCSTORES = frozenset(
    f"{package}.{module}.InMemoryDocstore"
    for package, module in product(_PACKAGES, ("docstore.in_memory", "docstore"))
)
_DOCUMENTS = frozenset(
    f"{package}.{module}.Document"
    for package, module in product(
        _PACKAGES,
        ("docstore.document", "docstore.base", "schema", "schema.document", "documents.base", "documents"),
    )
)


def read(path: Path, count: int) -> Iterator[Row]:
    """Yield the record of each position of an index of `count` vectors.

    Raises
    ------
    StoreRefusedError
        The pickle names anything but LangChain's classes, or doesn't fit the index.
    """
    documents, ids = _parts(
        read_pickle(path.read_bytes(), source=str(path), allowed=_DOCSTORES | _DOCUMENTS), path
    )
    if set(ids) != set(range(count)):
        raise StoreRefusedError(
            f"{path} names the documents of {len(ids):,} vectors, its index holds {count:,}: they weren't "
            "written together; restore the one that is older",
            expected=count,
            found=len(ids),
        )
    missing = [str(name) for name in ids.values() if name not in documents]
    unused = len(documents) - len(set(ids.values()) & documents.keys())
    if missing or unused:
        raise StoreRefusedError(
            f"{path}: {len(missing):,} of {count:,} vectors have no document ({', '.join(missing[:3])}), and "
            f"{unused:,} documents no vector: nothing of a collection is skipped; mend it in LangChain",
            expected=count,
            found=len(documents),
        )
    for position in range(count):
        text, metadata = _content(documents[ids[position]], path, ids[position])
        yield Row(label=position, id=ids[position], document=text, metadata=metadata)


def _parts(found: Any, path: Path) -> tuple[Mapping[Any, Any], Mapping[int, str]]:
    """Return documents by id, and ids by position, in whatever order the pickle has the two."""
    items = found if isinstance(found, tuple) else ()
    stores = [_documents(item) for item in items]
    docstore = next((store for store in stores if store is not None), None)
    maps = [
        item
        for item, store in zip(items, stores, strict=True)
        if store is None and isinstance(item, dict) and all(type(key) is int for key in item)
    ]
    if docstore is None and len(maps) == 2 and not any(maps):
        docstore = maps.pop()  # both are empty
    if docstore is None or len(maps) != 1:
        raise StoreRefusedError(
            f"{path} isn't what LangChain's `FAISS.save_local` writes: expected a docstore and a dictionary "
            f"from positions to ids, found {_shown(found)}",
            found=_shown(found),
        )
    return docstore, maps[0]


def _documents(item: Any) -> Mapping[Any, Any] | None:
    if isinstance(item, Built) and str(item) in _DOCSTORES:
        fields = _fields(item)
        found = fields.get("_dict")
        return found if isinstance(found, dict) else None
    is_plain = isinstance(item, dict) and any(isinstance(value, Built) for value in item.values())
    return item if is_plain else None


def _content(document: Any, path: Path, name: str) -> tuple[str, Mapping[str, Any] | None]:
    fields = _fields(document) if isinstance(document, Built) and str(document) in _DOCUMENTS else {}
    text, metadata = fields.get("page_content"), fields.get("metadata", {})
    if not isinstance(text, str) or not isinstance(metadata, (dict, type(None))):
        raise StoreRefusedError(
            f"{path}: the document {name!r} is {_shown(document)} without a `page_content` that is text and "
            "a `metadata` that is a dictionary",
            found=_shown(document),
        )
    return text, metadata


def _fields(built: Built) -> Mapping[str, Any]:
    """Return an object's attributes: of pydantic's classes under `__dict__`, else its state itself."""
    state = built.state if isinstance(built.state, dict) else {}
    inner = state.get("__dict__", state)
    return {**built.kwargs, **inner} if isinstance(inner, dict) else {}


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(map(_shown, value[:5])) or 'nothing'}"
    return str(value) if isinstance(value, Built) else f"a {type(value).__name__}"
