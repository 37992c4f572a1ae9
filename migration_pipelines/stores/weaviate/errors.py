"""What Weaviate's failures mean to the caller."""

from __future__ import annotations

import re
from typing import Any

from migration_pipelines.errors import (
    AuthenticationError,
    CollectionExistsError,
    CollectionNotFoundError,
    DimensionMismatchError,
    MigrationError,
    MissingDriverError,
    RecordRejectedError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
)

# A server gives most of its own errors over gRPC the code UNKNOWN, so that only their text tells them apart.
_FOR_A_WHILE = (
    r"(?i)deadline|timed? ?out|read-?only|\bleader\b|\breplicas?\b|consistency level|shutting down|memory|"
    r"\bEOF\b|connection re(set|fused)|broken pipe|too many requests|unavailable|stream removed|RST_STREAM|"
    r"no space"
)
TOO_LARGE = r"larger than max"
TOO_MANY = r"query maximum results exceeded"
_NO_COLLECTION = (
    r"(could not find|failed to get) class|class .{0,300}not (present|found|exist)|not found in schema"
)
_OWN_FAULT = r"^(invalid \S+( array)? property|no such prop|unknown property)"
_OTHER_DIMENSIONS = r"(?i)vector lengths don't match|vectors? with length|dimension"

# The first pattern found in "<class names of the error's family> <gRPC code or HTTP status>: <message>" says
# what an error becomes, and what to do. By name, so that asking needs no driver.
_ERRORS: tuple[tuple[str, type[MigrationError], str], ...] = (
    (r"\bImportError\b", MissingDriverError, "pip install 'migration-pipelines[weaviate]'"),
    (r"\bTooOldError\b", StoreRefusedError, "upgrade the server"),
    (
        r"\b(UNAUTHENTICATED|PERMISSION_DENIED)\b| 40[13]:|extract auth",
        AuthenticationError,
        "check WEAVIATE_API_KEY",
    ),
    (
        r"\bConnect(Error|Timeout)\b|failed to connect to all addresses|DNS resolution failed",
        StoreUnavailableError,
        "is it running there, with both its ports open?",
    ),
    (
        TOO_LARGE,
        RecordRejectedError,
        "it is larger than the server lets a message be (GRPC_MAX_MESSAGE_SIZE)",
    ),
    (r"\bRESOURCE_EXHAUSTED\b| 429:", TransientError, "try again"),
    (_NO_COLLECTION, CollectionNotFoundError, "check the name"),
    (r"tenant not found", CollectionNotFoundError, "check the tenant's name"),
    (r"tenant not active", StoreRefusedError, "activate the tenant first"),
    (r"already exists", CollectionExistsError, "choose another name or drop it"),
    (_OTHER_DIMENSIONS, DimensionMismatchError, "choose another target collection"),
    (r" 404:", CollectionNotFoundError, "check the name"),
    (
        r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|INTERNAL)\b|\b(TransportError|TimeoutError)\b",
        TransientError,
        "try again",
    ),
    (r" (408|425|5\d\d):", TransientError, "try again"),
    (r"\b(JSONDecodeError|DecodeError)\b", TransientError, "its answer was cut: try again"),
    (_FOR_A_WHILE, TransientError, "try again"),
    (r"", StoreRefusedError, "Weaviate refuses it for good"),
)


def classify(error: Exception) -> tuple[type[MigrationError], str, str, dict[str, Any]]:
    """Return the error of `errors.py` that stands for a driver's, what was found, what to do, and facts."""
    family = " ".join(cls.__name__ for cls in type(error).__mro__)
    code, message, wait = _parts(error)
    text = f"{family} {code}: {message}"
    kind, advice = next((kind, advice) for words, kind, advice in _ERRORS if re.search(words, text))
    facts = {} if wait is None else {"retry_after_seconds": wait}
    return kind, f"{code}: {message}" if code else message, advice, facts


def _parts(error: Exception) -> tuple[str, str, float | None]:
    """Return an error's gRPC code or HTTP status, its message, and how long the server wants to be left."""
    details = getattr(error, "details", None)
    if callable(details):  # grpc.RpcError
        trailing = dict(error.trailing_metadata() or ())  # type: ignore[attr-defined]
        wait = str(trailing.get("retry-after", ""))
        seconds = float(wait) if wait.replace(".", "", 1).isdigit() else None
        return error.code().name, str(details())[:500], seconds  # type: ignore[attr-defined]
    status = getattr(error, "status", "")
    return str(status), (str(error) or type(error).__name__)[:500], getattr(error, "retry_after", None)


def of_a_record(message: str) -> tuple[type[MigrationError], str]:
    """Return what an error of one object in a batch's reply becomes: by default the record's own fault."""
    for words, kind, advice in (
        # First: what follows names the user's fields and values, which may read like anything below.
        (_OWN_FAULT, RecordRejectedError, "mend the record"),
        (_NO_COLLECTION, CollectionNotFoundError, "check the name"),
        (r"tenant not (found|active)", StoreRefusedError, "add or activate the tenant"),
        (_OTHER_DIMENSIONS, DimensionMismatchError, "choose another target collection"),
        (r"(?i)forbidden|unauthorized", AuthenticationError, "check WEAVIATE_API_KEY"),
        (_FOR_A_WHILE, TransientError, "try again"),
    ):
        if re.search(words, message):
            return kind, advice
    return RecordRejectedError, "mend the record"
