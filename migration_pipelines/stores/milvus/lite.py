"""Milvus Lite: a folder that is opened in this process, by a server of its own on the loopback.

One process at a time may open a folder; in this process it is opened once, whoever asks (pymilvus's own
clients included), and what was opened for a store is closed when the last store has let go of it.
"""

from __future__ import annotations

import fcntl
import threading
from collections import Counter
from pathlib import Path

from migration_pipelines.errors import StoreRefusedError, TransientError

_LOCK_FILE = "LOCK"
_COLLECTIONS, _DATABASES, _DEFAULT_DATABASE = "collections", "databases", "default"
_SQLITE_MAGIC = b"SQLite format 3\0"

_USERS: Counter[str] = Counter()
_OURS: set[str] = set()  # folders that were opened for a store, not by somebody else of this process
_LOCK = threading.RLock()


def absolute(path: str) -> Path:
    """Return the file or folder that a user names."""
    return Path(path).expanduser().absolute()


def is_legacy_file(path: Path) -> bool:
    """Whether it is a database of Milvus Lite 2, a single file, which today's can't open."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC


def is_folder(path: Path) -> bool:
    """Whether it is a folder of Milvus Lite 3."""
    return (path / _COLLECTIONS).is_dir() or (path / _DATABASES).is_dir()


def collection_folder(path: Path, *, database: str, collection: str) -> Path:
    """Return where Milvus Lite keeps a collection."""
    root = path if database in ("", _DEFAULT_DATABASE) else path / _DATABASES / database
    return root / _COLLECTIONS / collection


def acquire(path: Path) -> str:
    """Open a folder, or find it open, and return the address of its server, `host:port`.

    Raises
    ------
    TransientError
        Another process has it open.
    StoreRefusedError
        It is something else, or can't be opened.
    """
    from milvus_lite.server_manager import server_manager_instance

    if path.exists() and not is_folder(path) and (path.is_file() or any(path.iterdir())):
        raise StoreRefusedError(f"milvus: {path} is neither empty nor a folder of Milvus Lite's")
    with _LOCK:
        was_open = str(path) in getattr(server_manager_instance, "_servers", {})
        uri = server_manager_instance.start_and_get_uri(str(path))
        if uri is None and _is_locked(path):
            raise TransientError(f"milvus: another process has {path} open; try again when it is done")
        if uri is None:
            raise StoreRefusedError(f"milvus: Milvus Lite can't open {path}; its log says why")
        if not was_open:
            _OURS.add(str(path))
        _USERS[str(path)] += 1
        return str(uri).removeprefix("http://")


def release(path: Path) -> None:
    """Let go of a folder; the last store closes it, which brings everything into its files."""
    from milvus_lite.server_manager import server_manager_instance

    name = str(path)
    with _LOCK:
        _USERS[name] -= 1
        if _USERS[name] > 0:
            return
        del _USERS[name]
        if name in _OURS:
            _OURS.discard(name)
            server_manager_instance.release_server(name)


def _is_locked(path: Path) -> bool:
    lock = path / _LOCK_FILE
    if not lock.exists():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
