"""In which form a command's document goes to standard output: a table for people, or JSON or YAML."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from typer import Option


class Format(StrEnum):
    """A form of a document."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"

    @property
    def is_for_machines(self) -> bool:
        """Whether it is one document on standard output, and nothing else there."""
        return self is not Format.TABLE


_chosen: Format | None = None  # by the command at work; an error is told in the same form


@dataclass(frozen=True, kw_only=True)
class Shown:
    """In which form a command shows what it found."""

    json: Annotated[bool, Option("--json", help="Short for --output json.")] = False
    output: Annotated[
        Format | None,
        Option(
            metavar="FORM",
            help="On standard output: table, for people (default), json or yaml, one document.",
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Let errors be told in the same form."""
        choose(self.form)

    @property
    def form(self) -> Format:
        """What was asked for."""
        return Format.JSON if self.json else self.output or Format.TABLE

    def show(self, document: Any) -> bool:
        """Write a document for machines where one was asked for; returns whether it was."""
        return show_document(document, self.form)


def choose(form: Format | None) -> None:
    """Keep the form that the command at work was asked for; None for a new command."""
    global _chosen
    _chosen = form


def form_of(arguments: Sequence[str]) -> Format:
    """Return the form that was asked for, by a command line that perhaps can't be parsed."""
    if _chosen is not None:
        return _chosen
    if "--json" in arguments:
        return Format.JSON
    for argument, following in zip(arguments, (*arguments[1:], ""), strict=True):
        name, _, value = argument.partition("=")
        if name == "--output" and (value or following) in tuple(Format):
            return Format(value or following)
    return Format.TABLE


def show_document(document: Any, form: Format) -> bool:
    """Write a document to standard output as JSON or YAML; returns False, and writes nothing, for a table."""
    if not form.is_for_machines:
        return False
    text = as_json_text(document) if form is Format.JSON else _as_yaml_text(document)
    sys.stdout.write(text)
    sys.stdout.flush()
    return True


def as_json_text(document: Any) -> str:
    """Return a document as JSON, for machines and for people who look over their shoulders."""
    import orjson

    return orjson.dumps(document, default=str, option=orjson.OPT_INDENT_2).decode() + "\n"


def _as_yaml_text(document: Any) -> str:
    import orjson
    import yaml

    plain = orjson.loads(orjson.dumps(document, default=str))  # the very values that JSON shows
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
