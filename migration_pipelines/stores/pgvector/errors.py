"""What a failed call of PostgreSQL means to the caller, told by its SQLSTATE.

Only a server's own words reach a message: the driver's text of a failed connection can repeat what it was
given (https://www.postgresql.org/docs/current/errcodes-appendix.html).
"""

from __future__ import annotations

from typing import Any

from migration_pipelines.errors import (
    AuthenticationError,
    CollectionExistsError,
    CollectionNotFoundError,
    DimensionMismatchError,
    MigrationError,
    RecordRejectedError,
    StoreRefusedError,
    StoreUnavailableError,
    TransientError,
)
from migration_pipelines.stores.pgvector.wire import CopyFormatError

_REFUSED = (StoreRefusedError, "the server refuses the call")
# Longest prefix first.
_CLASSES: tuple[tuple[str, type[MigrationError], str], ...] = (
    ("42P01", CollectionNotFoundError, "no such table"),
    ("42P07", CollectionExistsError, "a table, view or index of that name is there already"),
    ("42501", StoreRefusedError, "the login lacks a privilege; grant it or use another login"),
    ("53100", TransientError, "the server's disk is full; make room there"),
    ("53200", TransientError, "the server is out of memory"),
    ("53300", TransientError, "the server has no connection left; use fewer workers"),
    ("55P03", TransientError, "a lock is held by somebody else"),
    ("57P01", TransientError, "the server ended the connection"),
    ("57P02", TransientError, "the server crashed and restarts"),
    ("57P03", TransientError, "the server is starting or stopping"),
    ("57P05", TransientError, "the server ended an idle session"),
    ("57014", TransientError, "the server cancelled the statement, by a timeout or by hand"),
    ("40001", TransientError, "another transaction was in the way"),
    ("40P01", TransientError, "a deadlock with another transaction"),
    ("25P03", TransientError, "the server ended an idle transaction"),
    ("3D000", StoreRefusedError, "no such database"),
    ("0A000", StoreRefusedError, "the server lacks a feature"),
    ("08", TransientError, "the connection is lost"),
    ("53", TransientError, "the server lacks a resource"),
    ("28", AuthenticationError, "the server refuses the login; set PGVECTOR_PASSWORD or mend the user"),
    ("22", RecordRejectedError, "the server refuses a value"),
    ("23", RecordRejectedError, "a constraint of the table refuses a record"),
    ("54", RecordRejectedError, "a record exceeds a limit of the server"),
)
# A refused login has no SQLSTATE at the driver: these are the server's words, unless it translates them.
_LOGIN_WORDS = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "is not permitted to log in",
    "role ",
)
# Nor has a connection that a server which is there turns away for the moment.
_BUSY_WORDS = (
    "too many clients",
    "too many connections",
    "remaining connection slots",
    "starting up",
    "shutting down",
    "in recovery mode",
)


def translate(error: Exception, *, where: str, secret: str | None) -> MigrationError:
    """Return the project's error for a driver's.

    Parameters
    ----------
    where
        Address of the collection, for the message.
    secret
        The password, taken out of whatever is quoted.
    """
    import psycopg

    if isinstance(error, CopyFormatError):
        return StoreRefusedError(f"{where}: {error}")
    if not isinstance(error, psycopg.Error):
        text = redacted(f"{type(error).__name__}: {error}", secret)
        refused = isinstance(error, (ValueError, OverflowError))
        return (RecordRejectedError if refused else StoreRefusedError)(f"{where}: {text}")
    said = redacted(error.diag.message_primary or "", secret)
    if error.sqlstate is None:
        return _without_state(error, where=where, secret=secret)
    if "different vector dimensions" in said or ("expected" in said and "dimensions" in said):
        return DimensionMismatchError(f"{where}: {said}; choose another target or map the vector")
    found, meaning = classify(error.sqlstate)
    return found(f"{where}: {meaning}: {said} (SQLSTATE {error.sqlstate})", sqlstate=error.sqlstate)


def classify(sqlstate: str) -> tuple[type[MigrationError], str]:
    """Return the class of an SQLSTATE, and its meaning in words."""
    for prefix, found, meaning in _CLASSES:
        if sqlstate.startswith(prefix):
            return found, meaning
    return _REFUSED


def redacted(text: str, secret: str | None) -> str:
    """Return a text without a secret, and as one line."""
    text = " ".join(text.split())
    return text.replace(secret, "***") if secret else text


def _without_state(error: Any, *, where: str, secret: str | None) -> MigrationError:
    """A failure on the client's side of the wire: connecting, a lost connection, a value it can't encode."""
    import psycopg

    if isinstance(error, psycopg.DataError):
        return RecordRejectedError(f"{where}: {redacted(str(error), secret)}")
    if not isinstance(error, psycopg.OperationalError):
        return StoreRefusedError(f"{where}: {redacted(str(error), secret)}")
    text = str(error)
    handle = error.pgconn
    if getattr(handle, "needs_password", False) or any(word in text for word in _LOGIN_WORDS):
        return AuthenticationError(
            f"{where}: the server refuses the login; set PGVECTOR_PASSWORD or mend the user"
        )
    if "database" in text and "does not exist" in text:
        return StoreRefusedError(f"{where}: no such database")
    busy = next((words for words in _BUSY_WORDS if words in text), None)
    if busy is not None:
        return TransientError(f"{where}: the server takes no connection for the moment: {busy}")
    if handle is not None:
        return StoreUnavailableError(
            f"{where}: nothing answers: {_reason(text)}; check that PostgreSQL listens there"
        )
    return TransientError(f"{where}: the connection is lost")


def _reason(text: str) -> str:
    """Return the operating system's reason of a failed connection, in known words only."""
    known = (
        "Connection refused",
        "No such file or directory",
        "timeout expired",
        "could not translate host name",
        "Name or service not known",
        "No route to host",
        "Network is unreachable",
        "SSL",
    )
    return next((word for word in known if word in text), "the connection failed")
