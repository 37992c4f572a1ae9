"""Every failure as one clear line, or one JSON document, and an exit status; never a secret."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from migration_pipelines.errors import MigrationError

INTERRUPTED = 130
_SECRET = re.compile(r"pass|secret|token|api_?key", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=//)([^/@:\s]*):[^\s]*@")
_SHORTEST_SECRET = 4  # shorter ones would black out ordinary words


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
        """Return what `--json` shows."""
        said = {"type": self.type, "message": self.message, "exit_status": self.exit_status}
        return {**self.facts, **said}


def _of_click(error: Any) -> str:
    context = getattr(error, "ctx", None)
    where = f" (see {context.command_path} --help)" if context is not None else ""
    return f"{error.format_message()}{where}"


def report_failure(failure: Failure, *, as_json: bool) -> None:
    """Say on standard error what went wrong, and with `--json` on standard output as well."""
    say(f"error: {failure.message}")
    if as_json:
        show_json({"error": failure.document()})


def say(message: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(f"vector-migrate: {message}\n")
    sys.stderr.flush()


def show_json(document: Any) -> None:
    """Write the JSON document of this command to standard output."""
    sys.stdout.write(as_json_text(document))
    sys.stdout.flush()


def as_json_text(document: Any) -> str:
    """Return a document as JSON, for machines and for people who look over their shoulders."""
    import orjson

    return orjson.dumps(document, default=str, option=orjson.OPT_INDENT_2).decode() + "\n"


def redacted(text: str, arguments: Sequence[str] = ()) -> str:
    """Return a text without the passwords of the addresses and of the environment."""
    secrets = {
        value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET
    }
    for argument in arguments:
        secrets |= {secret for secret in passwords(argument) if len(secret) >= _SHORTEST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _LOGIN.sub(r"\1:***@", text)


def passwords(address: str) -> set[str]:
    """Return the password of an address, as it is written and as it is meant; empty where it has none."""
    from urllib.parse import unquote

    written = re.search(r"//[^/@:]*:(.*)@", address, re.DOTALL)
    return {written[1], unquote(written[1])} - {""} if written else set()
