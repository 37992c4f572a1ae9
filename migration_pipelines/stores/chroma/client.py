"""Opening chromadb's clients, and what their failures mean to the caller."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from migration_pipelines.errors import (
    AuthenticationError,
    CollectionExistsError,
    CollectionNotFoundError,
    ConfigurationError,
    DimensionMismatchError,
    DiskFullError,
    MigrationError,
    MissingDriverError,
    RecordRejectedError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
)
from migration_pipelines.stores.chroma.file import DATABASE_FILE
from migration_pipelines.stores.chroma.legacy_files import is_legacy

# The first pattern found in "<class names of the error's family> <HTTP status>: <message>" says what an error
# becomes, and what to do. By name, so that asking needs no driver.
_ERRORS: tuple[tuple[str, type[MigrationError], str], ...] = (
    (r"\bImportError\b", MissingDriverError, "install the package chromadb"),
    (r"disk is full|No space left", DiskFullError, "make room and run again"),
    (r": (Tenant|Database) \[|to (tenant|database) ", ConfigurationError, "check `tenant` and `database`"),
    (r"\bNotFoundError\b", CollectionNotFoundError, "check the name"),
    (r"\b(AuthorizationError|ChromaAuthError)\b| 40[13]:", AuthenticationError, "check CHROMA_TOKEN"),
    (r"\bUniqueConstraintError\b|\] already exists", CollectionExistsError, "choose `merge` or `replace`"),
    (r"\bInvalidDimension|embedding with dimension", DimensionMismatchError, "choose another target"),
    (r"\bConnect(Error|Timeout)\b|connect to a Chroma server", StoreUnavailableError, "is it running there?"),
    (r"\b(BatchSizeExceeded|Quota)Error\b| 413:", RecordRejectedError, "too much for the server"),
    (r"not a database|disk image is malformed", StoreRefusedError, "restore it from where it is whole"),
    (r"readonly database", StoreRefusedError, "its files can't be written"),
    (r" (408|425|429|5\d\d):|\b(Transport|RateLimit|Internal)Error\b", TransientError, "try again"),
    (
        r"different settings",
        ConfigurationError,
        "this process has the folder open: close that client, or open it with anonymized_telemetry=False",
    ),
    (r"\b(JSONDecode|Key|Index)Error\b", TransientError, "its answer was cut: try again"),
    (r"database is locked", TransientError, "another process has the folder open"),
    (r"", StoreRefusedError, "Chroma refuses it for good"),
)


_opening = threading.Lock()


def classify(error: Exception) -> tuple[type[MigrationError], str]:
    """Return the error of `errors.py` that stands for a driver's, and what to do about it."""
    family = " ".join(cls.__name__ for cls in type(error).__mro__)
    text = f"{family} {_http_status(error) or ''}: {error}"
    return next((kind, advice) for words, kind, advice in _ERRORS if re.search(words, text))


def _http_status(error: BaseException | None) -> int | None:
    """Return the status of the answer that an error came from, which chromadb often leaves out."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__ or error.__context__
    return None


def absolute(path: str) -> Path:
    """Return the folder that a user names."""
    return Path(path).expanduser().absolute()


def what_is_at(folder: Path) -> str:
    """Say what is found in place of a folder of Chroma's."""
    if not folder.is_dir():
        return (
            f"{folder} is {'not a folder' if folder.exists() else 'not there'}; expected a folder of Chroma's"
        )
    if is_legacy(folder):
        return f"{folder} is of Chroma 0.3; such a folder can be a source, and nothing else is done with it"
    names = sorted(path.name for path in folder.iterdir())
    return f"{folder} holds no {DATABASE_FILE}, but {names[:5] or 'nothing'}; expected a folder of Chroma's"


def open_folder(folder: Path, *, tenant: str, database: str) -> Any:
    """Return a client on a folder, which is made where it isn't there, and written to in any case."""
    import chromadb
    from chromadb.config import Settings

    settings = Settings(anonymized_telemetry=False)
    with _opening:  # clients of one folder share an engine, which Chroma makes without regard to threads
        try:
            return chromadb.PersistentClient(folder, settings, tenant=tenant, database=database)
        except Exception:
            _forget_broken(str(folder))
            raise


def _forget_broken(folder: str) -> None:
    """Have Chroma start its engine anew next time: it keeps one that couldn't start, and gives it again."""
    from chromadb.api.shared_system_client import SharedSystemClient as Shared

    with Shared._refcount_lock:  # noqa: SLF001 - no public way
        if not Shared._identifier_to_refcount.get(folder):  # noqa: SLF001
            Shared._identifier_to_system.pop(folder, None)  # noqa: SLF001


def open_server(
    host: str,
    port: int,
    *,
    ssl: bool,
    token: str | None,
    tenant: str,
    database: str,
    timeout_seconds: float,
) -> Any:
    """Return a client of a server, which gives up an answer that doesn't come in time."""
    import chromadb
    import httpx
    from chromadb.config import Settings

    host = f"[{host}]" if ":" in host else host
    # Chroma's client waits without a limit, and asks its first questions while it is made: whether anybody
    # answers is found out before, and the limit is put into it afterwards.
    headers = {"Authorization": f"Bearer {token}", "x-chroma-token": token} if token else None
    url = f"{'https' if ssl else 'http'}://{host}:{port}/api/v2/heartbeat"
    httpx.get(url, headers=headers, timeout=timeout_seconds)
    client: Any = chromadb.HttpClient(
        host=host,
        port=port,
        ssl=ssl,
        headers=headers,
        settings=Settings(anonymized_telemetry=False),
        tenant=tenant,
        database=database,
    )
    client._server._session.timeout = httpx.Timeout(timeout_seconds)  # noqa: SLF001 - no public way
    return client
