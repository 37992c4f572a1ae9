"""What a failure of Qdrant, its client or the way there means to the caller."""

from __future__ import annotations

import re

from migration_pipelines.errors import (
    AuthenticationError,
    CollectionExistsError,
    CollectionNotFoundError,
    DimensionMismatchError,
    DiskFullError,
    MigrationError,
    MissingDriverError,
    RecordRejectedError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
)


class AnswerError(Exception):
    """An answer of a server that is no success.

    Parameters
    ----------
    status
        Its HTTP status.
    message
        The server's own words.
    retry_after
        Seconds, where the server says when to come again.
    writes_points
        Whether it was asked to write records: then what it refuses is theirs.
    """

    def __init__(
        self, status: int, message: str, *, retry_after: float | None = None, writes_points: bool = False
    ) -> None:
        kind = "write" if writes_points else "call"
        super().__init__(f"HTTP {status} to a {kind}: {message}")
        self.retry_after = retry_after


class RpcStatusError(Exception):
    """A call by gRPC that didn't succeed.

    Parameters
    ----------
    status
        The name of its status.
    details
        The words of the server, or of gRPC where it wasn't reached.
    retry_after, writes_points
        As of `AnswerError`.
    """

    def __init__(
        self, status: str, details: str, *, retry_after: float | None = None, writes_points: bool = False
    ) -> None:
        kind = "write" if writes_points else "call"
        super().__init__(f"gRPC {status} to a {kind}: {details}")
        self.retry_after = retry_after
        self.is_unreadable = "deserializing response" in details


class CutAnswerError(Exception):
    """An answer that lacks what it should hold: whether the call was carried out is unknown."""


_TOO_LARGE = "too much for the server's limit on a request"
# The first pattern found in "<class names of the error's family>: <message>" says what an error becomes, and
# what to do. By name, so that asking needs no driver.
_ERRORS: tuple[tuple[str, type[MigrationError], str], ...] = (
    (r"\bImportError\b", MissingDriverError, "install the package qdrant-client"),
    (
        r"(HTTP 5|gRPC ).*(No space left|disk space)",
        TransientError,
        "the server's disk is full: make room there",
    ),
    (r"No space left|disk is full", DiskFullError, "make room and run again"),
    (
        r"HTTP (401|403) |gRPC (UNAUTHENTICATED|PERMISSION_DENIED) ",
        AuthenticationError,
        "check QDRANT_API_KEY",
    ),
    (r"gRPC \w+ to a write: .*(larger than max|size limit)", RecordRejectedError, _TOO_LARGE),
    (
        r"HTTP 429 |gRPC RESOURCE_EXHAUSTED ",
        TransientError,
        "the server asks for fewer calls: try again later",
    ),
    (
        r"(?i)vector dimension|expected dim|dimensions? mismatch",
        DimensionMismatchError,
        "choose another target",
    ),
    (r"Collection .*(doesn't exist|not found)", CollectionNotFoundError, "check the name"),
    (r"(?i)collection .* already exists|HTTP 409 ", CollectionExistsError, "choose `merge` or `replace`"),
    (r"\bConnect(Error|Timeout)\b", StoreUnavailableError, "is it running there?"),
    (
        r"gRPC UNAVAILABLE .*(failed to connect|Connection refused|DNS)",
        StoreUnavailableError,
        "is it running there, and is that its port for gRPC?",
    ),
    (r"HTTP 413 ", RecordRejectedError, _TOO_LARGE),
    (r"(HTTP (400|422)|gRPC INVALID_ARGUMENT) to a write", RecordRejectedError, "Qdrant refuses a record"),
    (r"HTTP (408|425|5\d\d) ", TransientError, "try again"),
    (
        r"gRPC (UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|UNKNOWN|ABORTED|CANCELLED) ",
        TransientError,
        "try again",
    ),
    (
        r"\b(TransportError|CutAnswerError|JSONDecodeError|KeyError)\b",
        TransientError,
        "the connection broke: try again",
    ),
    (r"already accessed by another instance", TransientError, "close the other client of this folder"),
    (r"database is locked", TransientError, "another process has the folder open"),
    (r"readonly database|PermissionError", StoreRefusedError, "its files can't be written"),
    (r"\b(DatabaseError|MetaFileError)\b", StoreRefusedError, "the folder is damaged, or none of Qdrant's"),
    (r"", StoreRefusedError, "Qdrant refuses it for good"),
)


def classify(error: Exception) -> tuple[type[MigrationError], str]:
    """Return the error of `errors.py` that stands for a failure, and what to do about it."""
    family = " ".join(cls.__name__ for cls in type(error).__mro__)
    text = f"{family}: {error}"
    return next((kind, advice) for words, kind, advice in _ERRORS if re.search(words, text))
