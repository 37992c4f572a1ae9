"""What may be a secret, and texts without it: for every line that leaves the process."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

SHORTEST_SECRET = 4  # shorter ones would black out ordinary words
_NAME = re.compile(r"pass|secret|token|api_?key", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=//)([^/@:\s]*):[^\s]*@")


_known: set[str] = set()


def remember_secrets(settings: Any) -> None:
    """Remember the secrets among the fields of a store, for as long as the process lives.

    Their variables may be called anything, so that the environment alone doesn't tell them.
    """
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if hasattr(value, "get_secret_value"):
            _known.add(value.get_secret_value())


def remember(secret: str) -> None:
    """Remember a secret, wherever it came from, for as long as the process lives."""
    _known.add(secret)


def redacted(text: str, arguments: Sequence[str] = ()) -> str:
    """Return a text without passwords: of addresses, of the environment, of the stores that were opened.

    Parameters
    ----------
    arguments
        Of the command line: the passwords of addresses among them are secrets too.
    """
    found = {value for name, value in os.environ.items() if _NAME.search(name)} | _known
    for argument in arguments:
        found |= passwords(argument)
    for secret in sorted(found, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return _LOGIN.sub(r"\1:***@", text)


def passwords(address: str) -> set[str]:
    """Return the password of an address, as it is written and as it is meant; empty where it has none."""
    from urllib.parse import unquote

    written = re.search(r"//[^/@:]*:(.*)@", address, re.DOTALL)
    return {written[1], unquote(written[1])} - {""} if written else set()
