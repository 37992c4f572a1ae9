"""Opening the vendor's client, its JSON, and what its failures mean to the caller."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from migration_pipelines.errors import (
    AuthenticationError,
    CollectionExistsError,
    CollectionNotFoundError,
    ConfigurationError,
    MigrationError,
    MissingDriverError,
    RecordRejectedError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
    UnsupportedOperationError,
)
from migration_pipelines.metadata import has_long_digits

# The first pattern found in "<class names of the error and its causes> <status> <the server's error types>"
# says what an error becomes, and what to do. By name, so that asking needs no driver.
_ERRORS: tuple[tuple[str, type[MigrationError], str], ...] = (
    (r"\bImportError\b", MissingDriverError, "pip install 'migration-pipelines[elasticsearch]'"),
    (
        r"\bUnsupportedProductError\b",
        ConfigurationError,
        "another product answers there, such as OpenSearch, or a proxy takes X-Elastic-Product away",
    ),
    (r"\bTlsError\b|\bSSLError\b", ConfigurationError, "check ?https= and ?ca_certs="),
    (
        r"\b(NewConnectionError|NameResolutionError|ConnectTimeoutError)\b",
        StoreUnavailableError,
        "is it running there?",
    ),
    (
        r"\b40[13] .*\b(security|authentication)_",
        AuthenticationError,
        "check user, password, key and privileges",
    ),
    (r" 401 ", AuthenticationError, "check ELASTICSEARCH_PASSWORD or ELASTICSEARCH_API_KEY"),
    (
        r"\bsearch_context_missing_exception\b",
        TransientError,
        "the view that was read has expired: try again",
    ),
    (r"\bindex_not_found_exception\b", CollectionNotFoundError, "check the name"),
    (r"\bresource_already_exists_exception\b", CollectionExistsError, "choose `merge` or `replace`"),
    (r"\binvalid_(index|alias)_name_exception\b", ConfigurationError, "choose another name"),
    (r" 413 ", RecordRejectedError, "more than http.max_content_length"),
    (r" (408|429|5\d\d) ", TransientError, "try again"),
    (r" 410 ", UnsupportedOperationError, "a serverless project doesn't offer it"),
    (r" 403 ", StoreRefusedError, "the index is blocked, or the login lacks a privilege"),
    (r" 4\d\d ", StoreRefusedError, "Elasticsearch refuses it for good"),
    (
        r"\b(ConnectionTimeout|ConnectionError|SerializationError)\b",
        TransientError,
        "its answer was cut or late",
    ),
    (r"\b(LookupError|TypeError|AttributeError)\b", TransientError, "its answer isn't whole: try again"),
    (r"", StoreRefusedError, "Elasticsearch refuses it for good"),
)


def open_client(
    url: str, *, login: tuple[str, str] | None, api_key: str | None, ca_certs: str | None, timeout: float
) -> Any:
    """Return a client that never retries and whose answers are parsed without rounding.

    Parameters
    ----------
    timeout
        Seconds that a request may take.
    """
    from elasticsearch import Elasticsearch
    from elasticsearch.serializer import JsonSerializer

    class ExactSerializer(JsonSerializer):
        def json_loads(self, data: bytes) -> Any:
            return exact_json(data)

        def json_dumps(self, data: Any) -> bytes:
            return orjson.dumps(data)

    options: dict[str, Any] = {"ca_certs": ca_certs} if ca_certs else {}
    return Elasticsearch(
        [url],
        basic_auth=None if api_key else login,
        api_key=api_key,
        request_timeout=timeout,
        max_retries=0,
        retry_on_status=(),
        retry_on_timeout=False,
        serializers={JsonSerializer.mimetype: ExactSerializer()},
        **options,
    )


def exact_json(data: bytes) -> Any:
    """Return the JSON value of `data`, integers of any size exact.

    orjson turns integers above 64 bits into doubles without a word: an answer with long digits anywhere goes
    to a slower parser.
    """
    if has_long_digits(data):
        return json.loads(data)
    return orjson.loads(data)


def status_of(error: Exception) -> int | None:
    """Return the HTTP status that a driver's error stands for."""
    meta = getattr(error, "meta", None)
    return None if meta is None else int(meta.status)


def classify(error: Exception) -> tuple[type[MigrationError], str]:
    """Return the error of `errors.py` that stands for a driver's, and what to do about it."""
    text = f"{_family(error)} {status_of(error) or ''} {' '.join(_error_types(error))} "
    return next((kind, advice) for words, kind, advice in _ERRORS if re.search(words, text))


def classify_item(status: int, error: dict[str, Any]) -> tuple[type[MigrationError], str]:
    """Return the same for one item of a bulk or multi-get answer.

    A status of 400 there is the record's own fault.
    """
    text = f" {status} {error.get('type')} "
    if status == 400:
        return RecordRejectedError, "mend the record or the mapping"
    return next((kind, advice) for words, kind, advice in _ERRORS if re.search(words, text))


def retry_after(error: Exception) -> float | None:
    """Return how many seconds the server asks to wait; None where it doesn't, or names a date."""
    meta = getattr(error, "meta", None)
    text = "" if meta is None else str(meta.headers.get("retry-after") or "")
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def reason(error: Exception) -> str:
    """Return what the server or the network said, in one line."""
    body = getattr(error, "body", None)
    found = body.get("error") if isinstance(body, dict) else None
    if isinstance(found, dict):
        return reason_of(found)
    if isinstance(found, str):
        return found
    cause = error.__cause__
    text = str(getattr(error, "message", "") or error) or type(error).__name__
    return text if cause is None or str(cause) in text else f"{text}: {cause}"


def reason_of(error: dict[str, Any]) -> str:
    """Return type, reason and innermost cause of an error object of the server's."""
    text = f"{error.get('type')}: {error.get('reason')}"
    cause = error.get("caused_by")
    while isinstance(cause, dict):
        text, cause = f"{text}: {cause.get('reason')}", cause.get("caused_by")
    return text


def _family(error: BaseException) -> str:
    names = []
    found: BaseException | None = error
    while found is not None:
        names += [cls.__name__ for cls in type(found).__mro__]
        inner = getattr(found, "reason", None)
        found = found.__cause__ or (inner if isinstance(inner, BaseException) else None)
    return " ".join(names)


def _error_types(error: Exception) -> list[str]:
    body = getattr(error, "body", None)
    found = body.get("error") if isinstance(body, dict) else None
    if not isinstance(found, dict):
        return []
    causes = [found, *(item for item in found.get("root_cause") or () if isinstance(item, dict))]
    return [str(item.get("type")) for item in causes]
