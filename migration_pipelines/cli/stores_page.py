"""The page docs/stores.md, made from what the stores declare: `vector-migrate stores --markdown`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum

from migration_pipelines.model import Capabilities, DType, IdKind, Metric, ValueKind, VectorKind

Found = Mapping[str, Capabilities]

_HEAD = """\
# Stores

What each store holds and does, as the connectors declare it and the conformance suite tries it on real
engines or protocol-faithful stand-ins. This page is made by `vector-migrate stores --markdown`.

Any store is a source and a target for any other. Where a target can't hold something exactly, the plan
lists it as a loss with its count before anything is written:

- A **metadata value** or field name that would change is kept in `_source_extra`, an **id** that the target
  can't hold in `_source_id`, a **namespace** in `_source_namespace`: nothing is lost, and reading the target
  with this tool gives the original back.
- A **vector** that would be rounded, dropped or searched by another metric stops the plan until the loss is
  accepted by name (`--allow-loss`).
- A **record** that no mapping can make fit (no vector, NaN) goes to the rejects file.
- The **search index** travels in common words (`hnsw` with `m` and `ef_construction`, `ivf` with `lists`);
  what only one store knows travels between two stores of that kind.
"""
_KIND_WORDS: Mapping[StrEnum, str] = {
    ValueKind.NUL_TEXT: "text with U+0000",
    ValueKind.INT53: "integers up to 2^53",
    ValueKind.INT64: "integers up to 2^63",
    ValueKind.UINT64: "integers up to 2^64",
    ValueKind.BIG_INT: "larger integers",
    ValueKind.SHORT_FLOAT: "numbers of 15 digits",
    ValueKind.FLOAT: "any other number",
    ValueKind.INTEGRAL_FLOAT: "numbers from 1e16, no fraction",
    ValueKind.NEGATIVE_ZERO: "-0.0",
    ValueKind.NON_FINITE: "NaN and infinities",
    ValueKind.NO_FIELDS: "metadata that is {}",
}


def stores_page(found: Found) -> str:
    """Return the page as Markdown."""
    sections = (
        _HEAD,
        _section("Ids", found, _ID_COLUMNS),
        _section("Vectors", found, _VECTOR_COLUMNS),
        _matrix("Metrics", found, Metric, lambda can: can.metrics),
        _matrix("Metadata that comes back exactly", found, ValueKind, lambda can: can.value_kinds)
        + "\nThe rest is kept in `_source_extra`, exactly.\n",
        _section("What else", found, _OTHER_COLUMNS),
        _changes(found),
    )
    return "\n".join(sections)


def _number(value: int | None) -> str:
    return "no limit" if value is None else f"{value:,}"


def _yes(value: bool) -> str:  # noqa: FBT001 - a cell of a table
    return "yes" if value else "no"


def _members(kinds: Iterable[StrEnum], order: type[StrEnum]) -> str:
    there = set(kinds)
    return ", ".join(member.value for member in order if member in there) or "none"


def _characters(text: str) -> str:
    return ", ".join(f"U+{ord(character):04X}" for character in text) or "none"


_Column = tuple[str, Callable[[Capabilities], str]]
_ID_COLUMNS: Sequence[_Column] = (
    ("kinds", lambda can: _members(can.id_kinds, IdKind)),
    ("several kinds in one collection", lambda can: _yes(can.mixed_ids)),
    ("longest, in bytes", lambda can: _number(can.max_id_bytes)),
    ("empty", lambda can: _yes(can.empty_ids)),
    ("characters refused", lambda can: _characters(can.id_text_refuses)),
)
_VECTOR_COLUMNS: Sequence[_Column] = (
    ("kinds", lambda can: _members(can.vector_kinds, VectorKind)),
    ("types", lambda can: _members(can.dtypes, DType)),
    ("most dimensions", lambda can: _number(can.max_dimensions)),
    ("several, by name", lambda can: _yes(can.named_vectors)),
    ("may be missing", lambda can: _yes(can.missing_vectors)),
    ("NaN and infinities", lambda can: _yes(can.non_finite_vectors)),
)
_OTHER_COLUMNS: Sequence[_Column] = (
    ("documents", lambda can: _yes(can.documents)),
    ("no metadata apart from {}", lambda can: _yes(can.no_metadata)),
    ("namespaces", lambda can: _yes(can.namespaces)),
    ("deletes", lambda can: _yes(can.deletes)),
    ("aliases", lambda can: _yes(can.aliases)),
    ("filters answered by the store", lambda can: " ".join(sorted(can.filter_operators)) or "none"),
    ("most records a request", lambda can: _number(can.max_batch_records)),
    ("most bytes a request", lambda can: _number(can.max_batch_bytes)),
)


def _section(title: str, found: Found, columns: Sequence[_Column]) -> str:
    heads = ("store", *(head for head, _ in columns))
    rows = [(name, *(cell(can) for _, cell in columns)) for name, can in found.items()]
    return f"## {title}\n\n{_table(heads, rows)}"


def _matrix(
    title: str, found: Found, members: type[StrEnum], held: Callable[[Capabilities], Iterable[StrEnum]]
) -> str:
    rows = [
        (
            _KIND_WORDS.get(member, member.value),
            *("✓" if member in held(can) else "" for can in found.values()),
        )
        for member in members
    ]
    return f"## {title}\n\n{_table(('', *found), rows)}"


def _changes(found: Found) -> str:
    lines = [
        f"- **{name}**, {what}: {text}"
        for name, can in found.items()
        for what, text in can.round_trip.items()
    ]
    return "\n".join(["## What comes back changed, and how", "", *lines, ""])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
