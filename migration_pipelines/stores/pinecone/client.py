"""Opening pinecone's clients without their own retries, and what their failures mean to the caller."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from migration_pipelines.errors import (
    AuthenticationError,
    CollectionExistsError,
    CollectionNotFoundError,
    ConfigurationError,
    DimensionMismatchError,
    MigrationError,
    MissingDriverError,
    RecordRejectedError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
)

# The first pattern found in "<class names of the error's family> <HTTP status> <class of its cause>: <text>"
# says what an error becomes, and what to do. By name, so that asking needs no driver.
_ERRORS: tuple[tuple[str, type[MigrationError], str], ...] = (
    (r"\bImportError\b", MissingDriverError, "install the package pinecone, version 10 or newer"),
    (r"\bPinecone(Value|Type)Error\b", ConfigurationError, "change it and run again"),
    (r"\bUnauthorizedError\b", AuthenticationError, "check PINECONE_API_KEY"),
    # 403 is also how quotas and deletion protection refuse.
    (r"\bForbiddenError\b.*(quota|limit|protect)", StoreRefusedError, "change it in Pinecone's console"),
    (r"\bForbiddenError\b", AuthenticationError, "check PINECONE_API_KEY and what it may do"),
    (r"\bPaymentRequiredError\b", StoreRefusedError, "its account needs attention"),
    (r"\bNotFoundError\b", CollectionNotFoundError, "check the name"),
    (r"\bConflictError\b", CollectionExistsError, "choose `merge` or `replace`"),
    (r"\bApiError\b.* 40[0-9] .*dimension", DimensionMismatchError, "choose another target collection"),
    (r"\bConnect(Error|Timeout)\b", StoreUnavailableError, "nothing answers there: check host and network"),
    (r"\bRateLimitError\b", TransientError, "it asks for fewer requests: try again"),
    (r"\bServiceError\b| (408|425) ", TransientError, "try again"),
    (r"\bPinecone(Connection|Timeout)Error\b", TransientError, "its answer was cut: try again"),
    (r"\b(ResponseParsing|JSONDecode|Key|Attribute)Error\b", TransientError, "its answer was cut: try again"),
    (r"\bIndex(InitFailed|Terminated)Error\b", StoreRefusedError, "look at it in Pinecone's console"),
    (r"", StoreRefusedError, "Pinecone refuses it for good"),
)
# What the data plane answers where a record is at fault, be it alone or as one too many.
_RECORDS_FAULT = frozenset({400, 413, 422})


def classify(error: Exception) -> tuple[type[MigrationError], str]:
    """Return the error of `errors.py` that stands for a driver's, and what to do about it."""
    family = " ".join(cls.__name__ for cls in type(error).__mro__)
    cause = type(error.__cause__).__name__
    text = f"{family} {getattr(error, 'status_code', '')} {cause}: {error}"
    return next((kind, advice) for words, kind, advice in _ERRORS if re.search(words, text))


@contextmanager
def blaming_a_record(where: str) -> Iterator[None]:
    """Turn the service's refusal of what records hold into `RecordRejectedError`."""
    from pinecone.errors.exceptions import ApiError

    try:
        yield
    except ApiError as error:
        kind, _ = classify(error)
        if kind is DimensionMismatchError or error.status_code not in _RECORDS_FAULT:
            raise
        raise RecordRejectedError(f"{where}: Pinecone refuses a record: {str(error)[:500]}") from None


def retry_after_seconds(error: Exception) -> float | None:
    """Return how long the service asks to wait, on whatever status it says so."""
    value = (getattr(error, "headers", None) or {}).get("retry-after")
    try:
        return None if value is None else max(0.0, float(value))
    except ValueError:
        return None


# ── hosts ────────────────────────────────────────────────────────────────────────────────────────────


def is_loopback(host: str) -> bool:
    """Whether a URL leads to this very machine."""
    name = urlsplit(host if "://" in host else f"https://{host}").hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_host(host: str) -> str:
    """Return the host.

    Raises
    ------
    ConfigurationError
        It would carry the API key over a network in clear text, or isn't a URL.
    """
    parts = urlsplit(host if "://" in host else f"https://{host}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ConfigurationError("Pinecone's host is a URL such as https://api.pinecone.io")
    if parts.scheme == "http" and not is_loopback(host):
        raise ConfigurationError(
            f"{host}: Pinecone's key would travel in clear text; http is for the loopback address alone"
        )
    return host


def data_host(model: Any, control_host: str | None) -> str:
    """Return where an index is served: by the scheme of the control plane where both are on this machine."""
    host = str(model.host)
    if control_host is not None and control_host.startswith("http://") and is_loopback(host):
        host = f"http://{host.partition('://')[2]}"
    return check_host(host)


# ── clients ──────────────────────────────────────────────────────────────────────────────────────────


def open_control(*, api_key: str, host: str | None, timeout_seconds: float) -> Any:
    """Return a client of the control plane: indexes, without the records in them."""
    from pinecone import Pinecone, RetryConfig
    from pinecone._internal.constants import DEFAULT_BASE_URL

    # Without a host the client would take one from the environment, which nobody checked.
    return Pinecone(
        api_key=api_key,
        host=host or DEFAULT_BASE_URL,
        timeout=timeout_seconds,
        retry_config=RetryConfig(max_retries=0),
    )


def open_index(control: Any, host: str) -> Any:
    """Return a client of one index's data plane."""
    from pinecone import RetryConfig
    from pinecone._internal.constants import DATA_PLANE_API_VERSION
    from pinecone._internal.http_client import HTTPClient

    index = control.index(host=host)
    # `control.index` forgets the retries that its control plane was given (10.2.0) and has no parameter for
    # them. A second loop under the engine's would multiply attempts and hide what the service asks for.
    config = replace(index._config, retry_config=RetryConfig(max_retries=0))  # noqa: SLF001
    index._http.close()  # noqa: SLF001
    index._http = HTTPClient(config, DATA_PLANE_API_VERSION)  # noqa: SLF001
    return index
