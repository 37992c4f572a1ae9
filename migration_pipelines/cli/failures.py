"""Every failure as one clear line, or one JSON document, and an exit status; never a secret."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migration_pipelines.errors import MigrationError
from migration_pipelines.redaction import redacted

INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What there is to say of an error."""

    type: str
    message: str
    exit_status: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: Exception, arguments: Sequence[str] = ()) -> Failure:
        """Return the failure that an error means, its secrets blacked out."""
        if isinstance(error, MigrationError):
            kind, message, status = type(error).__name__, str(error), error.exit_status
        elif hasattr(error, "format_message") and hasattr(error, "exit_code"):
            # Click's own errors, told by their shape: Typer brings a Click of its own.
            kind, message, status = "UsageError", _of_click(error), int(error.exit_code)
        elif type(error).__name__ == "Abort":
            kind, message, status = "Interrupted", "interrupted", INTERRUPTED
        else:
            kind, message, status = type(error).__name__, f"{type(error).__name__}: {error}", 1
        facts = error.facts if isinstance(error, MigrationError) else {}
        return cls(
            type=kind,
            message=redacted(message, arguments),
            exit_status=status,
            facts={name: value for name, value in facts.items() if name != "plan"},
        )

    def document(self) -> dict[str, Any]:
        """Return what a document says of it."""
        said = {"type": self.type, "message": self.message, "exit_status": self.exit_status}
        return {**self.facts, **said}


def _of_click(error: Any) -> str:
    context = getattr(error, "ctx", None)
    where = f" (see {context.command_path} --help)" if context is not None else ""
    return f"{error.format_message()}{where}"


def report_failure(failure: Failure) -> None:
    """Say on standard error what went wrong."""
    say(f"error: {failure.message}")


def say(message: str) -> None:
    """Write one line to standard error."""
    _say(message)


def _say_plainly(message: str) -> None:
    sys.stderr.write(f"vector-migrate: {message}\n")
    sys.stderr.flush()


_say: Callable[[str], None] = _say_plainly


def wants_json(arguments: Sequence[str] = ()) -> bool:
    """Whether what goes to standard error is to be lines of JSON."""
    return "--log-json" in arguments or os.environ.get("VECTOR_MIGRATE_LOG", "").lower() == "json"


@contextmanager
def saying(how: Callable[[str], None]) -> Iterator[None]:
    """Say things in another way, such as into a log."""
    global _say
    before, _say = _say, how
    try:
        yield
    finally:
        _say = before


# ── the command line itself ──────────────────────────────────────────────────────────────────────────

_arguments: tuple[str, ...] = ()


def called_with(arguments: Sequence[str]) -> None:
    """Keep what the command at work was called with."""
    global _arguments
    _arguments = tuple(arguments)


def on_command_line(text: str) -> bool:
    """Whether a text was given as an argument, or in one."""
    return any(text in argument for argument in _arguments)


def program() -> str:
    """Return how this program was called."""
    called = Path(sys.argv[0])
    return os.path.relpath(called) if called.name == "vector-migrate" else "vector-migrate"


def resuming() -> str:
    """Return the command that goes on with an interrupted one, without what would start afresh."""
    words = [program(), *(word for word in _arguments if word != "--fresh")]
    return redacted(shlex.join(words), _arguments)
