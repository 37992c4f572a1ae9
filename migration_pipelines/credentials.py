"""Where a store's secret comes from: the environment, a command that prints it, or the system's keyring.

A secret is named by its variable, such as `PGVECTOR_PASSWORD`. The first of these that is there counts:

- the variable itself;
- `PGVECTOR_PASSWORD_COMMAND="pass show db"`: the first line that the command prints;
- `PGVECTOR_PASSWORD_KEYRING="service/name"`: an entry of the system's keyring;
- with `VECTOR_MIGRATE_SECRETS=keyring` the keyring's entry `vector-migrate`/`PGVECTOR_PASSWORD`.

Whatever is found this way is blacked out in every line that leaves the process.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from functools import lru_cache
from pathlib import Path

from migration_pipelines.errors import ConfigurationError, MissingDriverError
from migration_pipelines.redaction import remember

COMMAND, KEYRING = "_COMMAND", "_KEYRING"
EVERYWHERE = "VECTOR_MIGRATE_SECRETS"
SERVICE = "vector-migrate"  # of the keyring's entries that are found by their variable alone
_COMMAND_SECONDS = 30.0
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REFERENCE = re.compile(r"(keyring|command):(.+)", re.DOTALL)


def secret(*variables: str) -> str:
    """Return the first of these secrets that is there; "" where none is.

    Raises
    ------
    ConfigurationError
        A command or a keyring is named and gives none. Nothing that a command printed is repeated.
    MissingDriverError
        The library `keyring` isn't installed.
    """
    for variable in variables:
        if found := _find(variable):
            remember(found.strip())  # some stores send it without the spaces around it
            return found
    return ""


def refer(variable: str, reference: str) -> None:
    """Say where this process finds a secret: `keyring:service/name` or `command:pass show db`.

    Raises
    ------
    ConfigurationError
        It is neither. It may be the secret itself, so it isn't repeated.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None or not _VARIABLE.fullmatch(variable):
        raise ConfigurationError(
            f"the secret {variable} is not given by reference: expected keyring:service/name or "
            "command:…; a secret itself doesn't belong into a file"
        )
    for name in (variable, variable + COMMAND, variable + KEYRING):
        os.environ.pop(name, None)
    kind, where = match.groups()
    os.environ[variable + (KEYRING if kind == "keyring" else COMMAND)] = where


def read_env_file(path: Path, *, commands: bool) -> None:
    """Put the variables of a `.env` file into the environment; those that are set already stay as they are.

    Parameters
    ----------
    commands
        Whether it may name commands to run. A file that merely lay in the folder may not.

    Raises
    ------
    ConfigurationError
        It can't be read.
    """
    from dotenv import dotenv_values

    try:
        with path.open(encoding="utf-8") as stream:
            found = dotenv_values(stream=stream)
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} can't be read: it isn't UTF-8") from None
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {error.strerror}") from None
    for name, value in found.items():
        if name.endswith(COMMAND) and not commands:
            raise ConfigurationError(
                f"{path} names a command to run, {name}: if that is your own, say --env-file {path}"
            )
        if value is not None:
            os.environ.setdefault(name, value)


def _find(variable: str) -> str:
    if found := os.environ.get(variable):
        return found
    if command := os.environ.get(variable + COMMAND):
        return _printed(variable, command)
    if entry := os.environ.get(variable + KEYRING):
        service, slash, name = entry.rpartition("/")
        if not slash:
            raise ConfigurationError(f"{variable}{KEYRING} is not of the form service/name")
        found = _from_keyring(service, name)
        if found is None:
            raise ConfigurationError(
                f"the keyring has no entry {name!r} of the service {service!r}, where {variable} should be: "
                f"keyring set {shlex.join([service, name])}"
            )
        return found
    asked = os.environ.get(EVERYWHERE, "")
    if asked not in ("", "keyring"):
        raise ConfigurationError(f"{EVERYWHERE} is keyring or isn't set, not {asked!r}")
    return (_from_keyring(SERVICE, variable) or "") if asked else ""


@lru_cache(maxsize=64)  # stores are opened several times in a run: nobody is asked for a PIN each time
def _printed(variable: str, command: str) -> str:
    """Return the first line that a command prints."""
    where = f"the command of {variable}{COMMAND}"
    try:
        words = shlex.split(command)
        done = subprocess.run(  # noqa: S603 - no shell: its words are the user's own
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(f"{where} printed nothing within {_COMMAND_SECONDS:g} s") from None
    except (OSError, ValueError, IndexError) as error:
        why = error.strerror if isinstance(error, OSError) else "its quotes don't match"
        raise ConfigurationError(f"{where} can't be run: {why}") from None
    if done.returncode:
        raise ConfigurationError(
            f"{where} failed with exit status {done.returncode}: run it by hand to see why"
        )
    try:
        lines = done.stdout.decode().splitlines()
    except UnicodeDecodeError:
        raise ConfigurationError(f"{where} printed something that isn't UTF-8") from None
    if not lines or not lines[0]:
        raise ConfigurationError(f"{where} printed nothing")
    return lines[0]


def _from_keyring(service: str, name: str) -> str | None:
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        raise MissingDriverError(
            "secrets from the keyring need the library keyring: pip install 'migration-pipelines[keyring]'"
        ) from None
    try:
        return keyring.get_password(service, name)
    except KeyringError as error:
        raise ConfigurationError(
            f"the keyring can't be read for the service {service!r} ({type(error).__name__}): "
            "unlock it, or set the variable"
        ) from None
