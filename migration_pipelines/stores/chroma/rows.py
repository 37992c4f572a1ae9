"""Documents and metadata of a Chroma folder, read from its SQLite tables.

Each statement makes one text of many rows. Python's driver takes and gives back the interpreter's lock for
every row that it fetches: a few large rows leave it to the threads that need it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from migration_pipelines.metadata import canonical_texts, dump_metadata, load_json, load_metadata

DOCUMENT_KEY = "chroma:document"
URI_KEY = "chroma:uri"

_ROWS = "SELECT json_group_array(json_array(id, embedding_id)) FROM embeddings WHERE segment_id = ? AND {}"
# Nineteen digits: from them any decimal parser finds the same double again. SQLite itself writes fifteen.
_FLOAT = "printf('%!.18e', float_value)"
_VALUE = """CASE
    WHEN string_value IS NOT NULL THEN json_quote(string_value)
    WHEN int_value IS NOT NULL THEN int_value
    WHEN float_value = 9e999 THEN '{"$typed":["float","inf"]}'
    WHEN float_value = -9e999 THEN '{"$typed":["float","-inf"]}'
    WHEN float_value IS NOT NULL THEN :float
    WHEN bool_value IS NOT NULL THEN iif(bool_value, 'true', 'false') END"""
# What Chroma keeps under names of its own isn't the user's, but for the URI.
_IS_OWN = f"substr(key, 1, 7) = 'chroma:' AND (key <> '{URI_KEY}' OR string_value IS NULL)"
_TEXTS = (
    """
    SELECT group_concat(id), json_group_array(document), group_concat(fields, char(10)) FROM (
        SELECT id, max(iif(key = :document, string_value, NULL)) AS document, coalesce(
            '{' || group_concat(iif(:is_own, NULL, json_quote(key) || ':' || :value)) || '}', ''
        ) AS fields
        FROM embedding_metadata WHERE id IN (SELECT value FROM json_each(?)) GROUP BY id
    )""".replace(":is_own", _IS_OWN)
    .replace(":value", _VALUE)
    .replace(":float", _FLOAT)
    .replace(":document", f"'{DOCUMENT_KEY}'")
)
_ARRAYS = """
    SELECT json_group_array(
        json_array(id, key, string_value, int_value, iif(float_value IS NULL, NULL, :float), bool_value)
    ) FROM (
        SELECT * FROM embedding_metadata_array WHERE id IN (SELECT value FROM json_each(?))
        ORDER BY id, key, rowid
    )""".replace(":float", _FLOAT)
# The column is newer than the table.
_TEXTS_WITHOUT_BOOLS = _TEXTS.replace("bool_value", "NULL")
_HARD_FLOATS = 5_000


def find_rows(file: sqlite3.Connection, segment: str, texts: Sequence[str]) -> dict[str, int]:
    """Return the row numbers of those ids that are there."""
    # As parameters of their own: a JSON text of them would end an id at its first U+0000.
    statement = _ROWS.format(f"embedding_id IN ({','.join('?' * len(texts))})")
    (found,) = file.execute(statement, (segment, *texts)).fetchone()
    return {text: row for row, text in orjson.loads(found)}


class Texts:
    """Documents and metadata of some rows; rows that have neither are not in it.

    Parameters
    ----------
    rows
        int64[n], ascending.
    documents, metadata
        Texts, and canonical JSON texts; None where a row has none.
    """

    def __init__(
        self,
        rows: npt.NDArray[np.int64],
        documents: Sequence[str | None],
        metadata: Sequence[bytes | None],
    ) -> None:
        self.rows, self.documents, self.metadata = rows, list(documents), list(metadata)


def read_texts(file: sqlite3.Connection, rows: Sequence[int], *, has_bools: bool, has_arrays: bool) -> Texts:
    """Return documents and metadata of these rows, which are many at a time but not all at once."""
    wanted = orjson.dumps(rows).decode()
    statement = _TEXTS if has_bools else _TEXTS_WITHOUT_BOOLS
    try:
        found, documents, fields = file.execute(statement, (wanted,)).fetchone()
    except sqlite3.DataError:  # together they are longer than a text can be in SQLite
        if len(rows) == 1:
            raise
        middle = len(rows) // 2
        parts = [
            read_texts(file, part, has_bools=has_bools, has_arrays=has_arrays)
            for part in (rows[:middle], rows[middle:])
        ]
        return _joined(parts)
    if found is None:
        texts = Texts(np.empty(0, np.int64), [], [])
    else:
        metadata = canonical_texts([text or None for text in fields.split(b"\n")])
        texts = Texts(np.array(found.split(b","), np.int64), orjson.loads(documents), metadata)
    return _with_arrays(file, texts, wanted) if has_arrays else texts


def _joined(parts: Sequence[Texts]) -> Texts:
    return Texts(
        np.concatenate([part.rows for part in parts]),
        [text for part in parts for text in part.documents],
        [text for part in parts for text in part.metadata],
    )


def _with_arrays(file: sqlite3.Connection, texts: Texts, wanted: str) -> Texts:
    """Return the texts with the lists that newer versions keep in a table of their own."""
    (found,) = file.execute(_ARRAYS, (wanted,)).fetchone()
    lists: dict[int, dict[str, list[Any]]] = {}
    for row, key, *values in load_json(found.decode()):
        item = _item(*values)
        if item is None:
            continue
        fields = lists.setdefault(row, {})
        if key in fields and type(fields[key][-1]) is type(item):
            fields[key].append(item)
        else:  # as Chroma answers where rows of a removed collection linger under the same number
            fields[key] = [item]
    if not lists:
        return texts
    return _merged(texts, lists)


def _item(text: str | None, integer: int | None, real: str | None, boolean: int | None) -> Any:
    if text is not None:
        return text
    if integer is not None:
        return integer
    if real is not None:
        return float(real)
    return None if boolean is None else bool(boolean)


def _merged(texts: Texts, lists: Mapping[int, Mapping[str, list[Any]]]) -> Texts:
    known = dict(zip(texts.rows.tolist(), zip(texts.documents, texts.metadata, strict=True), strict=True))
    for row, fields in lists.items():
        document, metadata = known.get(row, (None, None))
        whole = {**(load_metadata(metadata.decode()) if metadata else {}), **fields}
        known[row] = document, dump_metadata(whole).encode()
    rows = sorted(known)
    return Texts(np.array(rows, np.int64), [known[row][0] for row in rows], [known[row][1] for row in rows])


@lru_cache(maxsize=1)
def writes_exact_digits() -> bool:
    """Whether this SQLite writes doubles with digits that give the same doubles back.

    Some of before 2023, built without long doubles, don't.
    """
    bits = np.random.default_rng(0).integers(0, 2**64, _HARD_FLOATS, np.uint64, endpoint=False)
    drawn = bits.view(np.float64)
    doubles = [*drawn[np.isfinite(drawn)].tolist(), 5e-324, 2.2250738585072014e-308, 0.1 + 0.2]
    with sqlite3.connect(":memory:") as file:
        statement = f"SELECT {_FLOAT} FROM (SELECT ? AS float_value)"  # noqa: S608 - constants
        return all(float(file.execute(statement, (value,)).fetchone()[0]) == value for value in doubles)
