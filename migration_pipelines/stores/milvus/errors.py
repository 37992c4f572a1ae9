"""What Milvus's failures mean to the caller."""

from __future__ import annotations

from typing import Any

from migration_pipelines.errors import (
    AuthenticationError,
    CollectionNotFoundError,
    ConfigurationError,
    MigrationError,
    MissingDriverError,
    RecordRejectedError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
)

_Meaning = tuple[type[MigrationError], str]

_TRY_AGAIN = "try again"
_LOGIN = "check MILVUS_TOKEN, or the user and MILVUS_PASSWORD"
# https://grpc.io/docs/guides/status-codes: what isn't here is final.
_RPC: dict[str, _Meaning] = {
    "UNAVAILABLE": (StoreUnavailableError, "is it running there?"),
    "UNAUTHENTICATED": (AuthenticationError, _LOGIN),
    "PERMISSION_DENIED": (AuthenticationError, _LOGIN),
    **dict.fromkeys(
        (
            "DEADLINE_EXCEEDED",
            "RESOURCE_EXHAUSTED",
            "ABORTED",
            "CANCELLED",
            "INTERNAL",
            "UNKNOWN",
            "DATA_LOSS",
        ),
        (TransientError, _TRY_AGAIN),
    ),
}
# Milvus's pkg/util/merr. Milvus Lite says 1 for whatever it didn't expect and 6 for a bad argument.
_CODES: dict[int, _Meaning] = {
    **dict.fromkeys((2, 3, 4, 7, 10), (TransientError, _TRY_AGAIN)),
    8: (TransientError, "its rate limit is reached: set requests_per_second or bytes_per_second"),
    9: (TransientError, "it denies writes by a quota, of disk or memory: make room"),
    100: (CollectionNotFoundError, "check the name"),
    101: (TransientError, "the collection is not loaded: try again"),
    800: (ConfigurationError, "check `db`"),
    **dict.fromkeys((1400, 1401), (AuthenticationError, _LOGIN)),
}
# The request's own fault: where a batch is written, that of some record in it.
INPUT_CODES = frozenset({6, 1100, 1101, 1102, 1103, 1104, 1804, 1700})
_LEGACY_COLLECTION_NOT_EXISTS, _LEGACY_RATE_LIMIT = 4, 49


class MilvusRefusal(Exception):  # noqa: N818 - not one of the project's errors: `translate` makes those
    """An answer whose status isn't success.

    Parameters
    ----------
    status
        Milvus's `Status` message.
    """

    def __init__(self, status: Any) -> None:
        super().__init__(f"{status.reason or 'no reason given'} (code {status.code or status.error_code})")
        self.code = int(status.code)
        self.legacy_code = int(status.error_code)
        self.retriable = bool(status.retriable)


def meaning(error: Exception) -> tuple[type[MigrationError], str, dict[str, Any]]:
    """Return the error of `errors.py` that stands for a driver's, what to do about it, and its facts."""
    if isinstance(error, ImportError):
        return MissingDriverError, "install it: pip install 'pymilvus[milvus-lite]'", {}
    if isinstance(error, MilvusRefusal):
        return (*_of_refusal(error), {})
    code = getattr(error, "code", None)
    if callable(code) and hasattr(code(), "name"):
        return _of_call(error, str(code().name))
    if isinstance(error, OSError):
        return StoreRefusedError, "its files can't be used", {}
    return StoreRefusedError, "Milvus refuses it for good", {}


def what_was_said(error: Exception) -> str:
    """Return the message of a driver's error, without the many lines that gRPC adds."""
    details = getattr(error, "details", None)
    said = details() if callable(details) else str(error)
    return str(said or type(error).__name__)[:500]


def _of_refusal(error: MilvusRefusal) -> _Meaning:
    if error.legacy_code == _LEGACY_RATE_LIMIT:
        return _CODES[8]
    if error.code == 0 and error.legacy_code == _LEGACY_COLLECTION_NOT_EXISTS:
        return _CODES[100]
    if error.code in _CODES:
        return _CODES[error.code]
    if error.retriable:
        return TransientError, _TRY_AGAIN
    return StoreRefusedError, "Milvus refuses it for good"


def _of_call(error: Exception, status: str) -> tuple[type[MigrationError], str, dict[str, Any]]:
    if "larger than max" in what_was_said(error):
        return RecordRejectedError, "too much for one request", {}
    kind, advice = _RPC.get(status, (StoreRefusedError, "Milvus refuses it for good"))
    facts = {}
    wish = _wish_to_wait(error)
    if wish is not None and issubclass(kind, TransientError):
        facts["retry_after_seconds"] = wish
    return kind, advice, facts


def _wish_to_wait(error: Exception) -> float | None:
    """Return the seconds that the server, or a gateway before it, asks to wait."""
    trailers = getattr(error, "trailing_metadata", lambda: None)() or ()
    said = {str(key).lower(): value for key, value in trailers}
    for name, unit in (("retry-after", 1.0), ("grpc-retry-pushback-ms", 0.001)):
        try:
            return max(0.0, float(said[name]) * unit)
        except (KeyError, ValueError):
            continue
    return None
