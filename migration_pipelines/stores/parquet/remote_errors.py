"""What a file system of fsspec raises, as the project's errors.

By the names of the classes and the codes of S3, so that no driver is imported; s3fs hides the reply of the
server behind an OSError, as its cause.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from typing import Any

from migration_pipelines.errors import (
    AuthenticationError,
    ConfigurationError,
    MigrationError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
)

_LOGIN = {
    *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
    *("TokenRefreshRequired", "AccountProblem", "AllAccessDisabled", "NotSignedUp", "InvalidSecurity"),
}
_LATER = {
    *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"),
    *("RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted", "IncompleteBody"),
    *("BadDigest", "XAmzContentSHA256Mismatch", "NoSuchUpload"),
}
_RACES = {"PreconditionFailed", "ConditionalRequestConflict", "412"}
_NO_LOGIN = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"),
    *("NoAuthTokenError", "ProfileNotFound", "PermissionError", "DefaultCredentialsError", "RefreshError"),
}
_UNREACHABLE = {
    *("EndpointConnectionError", "ConnectTimeoutError", "ConnectionRefusedError", "ClientConnectorError"),
    *("ProxyConnectionError", "gaierror"),
}
_CUT = {
    *("HTTPClientError", "ConnectionError", "ReadTimeoutError", "ConnectionClosedError", "IncompleteRead"),
    *("ClientPayloadError", "ResponseParserError", "ResponseStreamingError", "TimeoutError"),
    *("FSTimeoutError", "ServerDisconnectedError", "ClientOSError", "IncompleteReadError"),
}
_BUSY = {errno.EBUSY, errno.EAGAIN, getattr(errno, "EREMOTEIO", errno.EAGAIN)}


def is_missing_object(error: Exception) -> bool:
    """Whether an error says that an object isn't there, its bucket being there."""
    code = _reply(error)[0]
    return isinstance(error, FileNotFoundError) and code != "NoSuchBucket"


def translated(error: Exception, where: str) -> MigrationError:
    """Return the error for what went wrong with the object or folder at a URL, no secret in its message."""
    code, status, headers = _reply(error)
    names = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    told = f"{code or type(error).__name__}{f' (status {status})' if status else ''}"
    if code == "NoSuchBucket":
        return ConfigurationError(f"{where}: there is no such bucket; create it, or mend the address")
    if code in _RACES:
        return TransientError(f"{where}: another writer changed the collection meanwhile ({told})")
    if code in _LOGIN or status in (401, 403) or (not code and names & _NO_LOGIN):
        return AuthenticationError(
            f"{where}: the login is refused ({told}); see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_SESSION_TOKEN or AWS_PROFILE, or say ?anonymous=true for a public bucket"
        )
    if code in _LATER or status == 429 or (status or 0) >= 500:
        wait = headers.get("retry-after")
        facts = {} if wait is None else {"retry_after_seconds": wait}
        return TransientError(f"{where}: the store asks to come again later ({told})", **facts)
    if code or status:
        return StoreRefusedError(f"{where}: the store refuses ({told})")
    if names & _UNREACHABLE:
        return StoreUnavailableError(
            f"{where}: nothing answers ({told}); see AWS_ENDPOINT_URL and the network"
        )
    if names & _CUT or (isinstance(error, OSError) and error.errno in _BUSY):
        return TransientError(f"{where}: the connection broke ({told})")
    return StoreRefusedError(
        f"{where}: {told}: {error}" if isinstance(error, OSError) else f"{where}: {told}"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _reply(error: Exception) -> tuple[str, int | None, Mapping[str, Any]]:
    """Return code, status and headers of the server's reply, where there is one."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, Mapping) and "Error" in response:
            about = response.get("ResponseMetadata") or {}
            code = str(response["Error"].get("Code") or "")
            return code, about.get("HTTPStatusCode"), about.get("HTTPHeaders") or {}
    return "", None, {}
