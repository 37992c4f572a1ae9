"""`--config FILE`: the options of a command, in YAML, JSON or TOML.

    source: pgvector://app:${STAGING_PASSWORD}@db.example/vectors/passages
    target: parquet:${BACKUPS:-./backups}/passages
    filter: {lang: en}
    batch_size: 1000
    secrets: {QDRANT_API_KEY: "command:pass show qdrant"}

Names are those of the options, and what the command line says comes first. One file serves several commands:
an option that another of them has is left alone. A secret stands there as a reference only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from typer import Context, Option

from migration_pipelines.errors import ConfigurationError
from migration_pipelines.redaction import passwords, remember

_SECRETS = "secrets"
_NEVER = {"config", "help"}
_ADDRESSES = {"source", "target", "folder", "metrics_push"}
_AS_JSON = {"filter", "mapping"}  # may be written as what they are, in place of a text
_PLACE = re.compile(r"\$(\$)?\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_TOKEN = re.compile("\0(\\d+)\0")


def _take_config(context: Context, path: Path | None) -> Path | None:
    """Let the options that the command line leaves out take their values from the file."""
    if path is None or context.resilient_parsing:
        return path
    assert context.parent is not None
    commands = getattr(context.parent.command, "commands", {}).values()
    options = {
        item.name: item
        for command in (*(c for c in commands if any(p.name == "config" for p in c.params)), context.command)
        for item in command.params
        if item.name not in _NEVER
    }
    given = read_config(path)
    _take_secrets(given.pop(_SECRETS, {}), path)
    if unknown := sorted(given.keys() - options.keys()):
        known = ", ".join(sorted((*options, _SECRETS)))
        raise ConfigurationError(f"{path}: there is no option {', '.join(unknown)}; there are: {known}")
    context.default_map = {
        name: _fitting(name, _filled(value, name=name, where=path), options[name], path)
        for name, value in given.items()
        if value is not None
    }
    return path


Config = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        is_eager=True,
        callback=_take_config,
        help="Options from a YAML, JSON or TOML file, ${VARIABLES} filled in; the command line comes first.",
    ),
]


def read_config(path: Path) -> dict[str, Any]:
    """Return what a file holds, as it is written, its keys spelt as Python does.

    Raises
    ------
    ConfigurationError
        It can't be read. Nothing of what stands in it is repeated.
    """
    try:
        found = _parsed(path, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} can't be read: it isn't UTF-8") from None
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {error.strerror}") from None
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"{path} must hold options by their names")
    given: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name in given:
            raise ConfigurationError(f"{path}: {name} is given twice")
        given[name] = value
    return given


def _parsed(path: Path, text: str) -> Any:
    import json
    import tomllib

    import yaml

    kind = path.suffix.lower()
    try:
        if kind in (".yaml", ".yml"):
            return yaml.safe_load(text) or {}
        if kind == ".json":
            return json.loads(text)
        if kind == ".toml":
            return tomllib.loads(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigurationError(f"{path} can't be read as YAML{where}") from None
    except json.JSONDecodeError as error:
        raise ConfigurationError(
            f"{path} can't be read as JSON in line {error.lineno}: {error.msg}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} can't be read as TOML: {error}") from None
    raise ConfigurationError(f"{path} is named neither .yaml, .json nor .toml: its form can't be told")


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────


def _take_secrets(given: Any, path: Path) -> None:
    from migration_pipelines import credentials

    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{path}: secrets are given by their variables")
    for variable, reference in given.items():
        place = _PLACE.fullmatch(str(reference))
        if place is None:
            try:
                credentials.refer(str(variable), str(reference))
            except ConfigurationError as error:
                raise ConfigurationError(f"{path}: {error}") from None
        elif place[1] or place[3] is not None:
            raise _literal(path, f"the secret {variable}")
        else:
            remember(value := _value(place, path))
            os.environ[str(variable)] = value


def _literal(path: Path, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path}: {what} stands in the file itself: write ${{NAME}} there and set that variable, or name it "
        "under secrets as keyring:service/name or command:…"
    )


# ── ${NAME} ──────────────────────────────────────────────────────────────────────────────────────────


def _filled(value: Any, *, name: str, where: Path) -> Any:
    """Return a value with every `${NAME}` and `${NAME:-default}` in it filled in."""
    if isinstance(value, Mapping):
        return {key: _filled(item, name=name, where=where) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, name=name, where=where) for item in value]
    if not isinstance(value, str):
        return value
    places = list(_PLACE.finditer(value))
    numbers = iter(range(len(places)))
    masked = _PLACE.sub(lambda _: f"\0{next(numbers)}\0", value)
    if "${" in masked or "\0" in value:
        raise ConfigurationError(
            f"{where}: {name}: expected ${{NAME}} or ${{NAME:-default}}; $${{ is a plain ${{"
        )
    hidden = _password_place(masked, places, name=name, where=where)

    def fill(token: re.Match[str]) -> str:
        found = _value(places[int(token[1])], where)
        if int(token[1]) == hidden:
            remember(found)
            return quote(found, safe="")
        return found

    filled = _TOKEN.sub(fill, masked)
    for password in passwords(filled) if name in _ADDRESSES else ():
        remember(password)
    return filled


def _password_place(masked: str, places: list[re.Match[str]], *, name: str, where: Path) -> int | None:
    """Return which place is the password of an address; raise where it is written out."""
    login = re.search(r"//[^/@:]*:(.*)@", masked, re.DOTALL) if name in _ADDRESSES else None
    if login is None:
        return None
    token = _TOKEN.fullmatch(login[1])
    if token is None or places[int(token[1])][1] or places[int(token[1])][3] is not None:
        raise _literal(where, f"the password of {name}")
    return int(token[1])


def _value(place: re.Match[str], where: Path) -> str:
    from migration_pipelines.credentials import secret

    literal, name, default = place.groups()
    if literal:
        return place[0][1:]
    found = os.environ.get(name) or secret(name) or default
    if found is None and name not in os.environ:
        raise ConfigurationError(f"{where} needs the environment variable {name}, which isn't set")
    return found or ""


# ── values ───────────────────────────────────────────────────────────────────────────────────────────


def _fitting(name: str, value: Any, option: Any, where: Path) -> Any:
    """Return a value as the command line would give it."""
    import json

    several = getattr(option, "multiple", False)
    if several:
        value = value if isinstance(value, list) else [value]
        if not any(isinstance(item, Mapping | list) for item in value):
            return [str(item) for item in value]
    elif name in _AS_JSON and isinstance(value, Mapping):
        return json.dumps(value)
    elif not isinstance(value, Mapping | list):
        return value
    raise ConfigurationError(f"{where}: {name} must be {'a list of texts' if several else 'one value'}")
