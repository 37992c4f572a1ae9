"""Logs for machines: one JSON document a line, each with the migration's id, none with a secret.

The id is that of the plan (`Plan.migration_id`), which Dagster's runs carry as the tag
`vector-migrate/migration-id` and spans as the attribute `migration.id`. While there is no plan yet a line has
the id's beginning, so that a search for that finds them all.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson

from migration_pipelines.migration import Event
from migration_pipelines.redaction import redacted

_PACKAGE = "migration_pipelines"
_LEVELS = {"retried": "warning", "rejected": "warning", "failed": "error"}
# Their figures are those of the phase that ends: a line for each batch would say little and cost a lot.
_UNTOLD = frozenset({"batch-planned", "batch-extracted", "batch-loaded", "batch-verified"})


class JsonLog:
    """Writes events, and what the package logs, as lines of JSON; safe to use from several threads.

    Parameters
    ----------
    stream
        Where to; standard error, whatever that is at the moment, where left out.
    arguments
        Of the command line: a password in one is blacked out wherever it shows.
    """

    def __init__(self, stream: TextIO | None = None, *, arguments: Sequence[str] = ()) -> None:
        self._stream, self._arguments, self._lock = stream, tuple(arguments), threading.Lock()

    def listen(self, event: Event) -> None:
        """Write an event that isn't a batch's."""
        if event.name not in _UNTOLD:
            self.write(_LEVELS.get(event.name, "info"), event.name, **_facts(event))

    def write(self, level: str, name: str, *, message: str = "", **facts: Any) -> None:
        """Write a line; what is empty is left out.

        The message loses its secrets: it may quote a store or a driver. The other facts are figures and words
        of our own.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        told = {key: value for key, value in facts.items() if value not in ("", None, 0)}
        if message:
            told["message"] = redacted(message, self._arguments)
        line = orjson.dumps({"time": now, "level": level, "event": name, **told}, default=str).decode()
        stream = self._stream or sys.stderr
        with self._lock:
            stream.write(line + "\n")
            stream.flush()

    def write_message(self, message: str) -> None:
        """Write a line that a person was meant to read."""
        self.write("error" if message.startswith("error:") else "info", "said", message=message)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Write what the package's own loggers say as lines of JSON too, instead of as they would."""
        logger, handler = logging.getLogger(_PACKAGE), _Handler(self)
        before, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = before


class _Handler(logging.Handler):
    def __init__(self, log: JsonLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.write(record.levelname.lower(), "logged", logger=record.name, message=record.getMessage())


def _facts(event: Event) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "migration_id": event.migration,
        "phase": event.phase,
        "partition": event.partition,
        "records": event.records,
        "bytes": event.bytes,
        "seconds": round(event.seconds, 6),
        "attempt": event.attempt,
        "message": event.message,
    }
    if event.error is not None:
        facts |= {"error": type(event.error).__name__, "message": str(event.error) or event.message}
    return facts
