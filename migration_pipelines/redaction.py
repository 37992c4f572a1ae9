"""What may be a secret, and texts without it: for every line that leaves the process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

SHORTEST_SECRET = 4  # shorter ones would black out ordinary words
_NAME = re.compile(r"pass|secret|token|api_?key", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=//)([^/@:\s]*):[^\s]*@")


def redacted(text: str, arguments: Sequence[str] = (), *, secrets: Iterable[str] = ()) -> str:
    """Return a text without the passwords of the addresses in it, those of the environment, and others.

    Parameters
    ----------
    arguments
        Of the command line: the passwords of addresses among them are secrets too.
    secrets
        More of them, as they are.
    """
    found = {value for name, value in os.environ.items() if _NAME.search(name)} | set(secrets)
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
