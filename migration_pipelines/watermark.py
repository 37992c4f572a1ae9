"""Watermarks: a metadata field that grows with every change of a record, and how far a run has seen it.

A mark is kept as metadata of that one field, in which a moment stays a moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, datetime, timedelta
from math import ceil
from typing import Any

import pyarrow as pa

from migration_pipelines import filters
from migration_pipelines.batch import METADATA
from migration_pipelines.metadata import dump_metadata, load_all, load_metadata


def mark_of(batch: pa.RecordBatch, field: str) -> str | None:
    """Return the greatest value of a field in a batch; None where there is none."""
    every = load_all(batch.column(METADATA).drop_null().to_pylist())
    found = [fields[field] for fields in every if field in fields]
    return greatest((dump_metadata({field: value}) for value in found if _is_ordered(value)), field)


def greatest(marks: Iterable[str | None], field: str) -> str | None:
    """Return the greatest of some marks; None where there is none, or they can't be compared."""
    values = [load_metadata(mark)[field] for mark in marks if mark is not None]
    kinds = {float if isinstance(value, int) else type(value) for value in values}
    try:
        return dump_metadata({field: max(values)}) if len(kinds) == 1 else None
    except TypeError:  # moments with a time zone and without
        return None


def not_older(field: str, mark: str, *, overlap: float) -> filters.Filter:
    """Return which records may have changed since a mark, and `overlap` before it.

    Whatever isn't surely older may have: records without the field, and those in which it is of another type.
    """
    value = _less(load_metadata(mark)[field], overlap)
    return filters.Not(filters.Comparison(field, "$lt", value))


def _less(value: Any, overlap: float) -> Any:
    """Return a value moved back: a number by so much, a moment by so many seconds."""
    if not overlap:
        return value
    if isinstance(value, (int, float)):
        return value - overlap
    if isinstance(value, datetime):
        return value - timedelta(seconds=overlap)
    if isinstance(value, date):
        return value - timedelta(days=ceil(overlap / 86_400))
    try:
        moment = datetime.fromisoformat(value) - timedelta(seconds=overlap)
    except ValueError:
        return ""  # no moment: every text may be newer
    text = moment.isoformat() if len(value) > len("2026-01-31") else moment.date().isoformat()
    return text.replace("+00:00", "Z") if value.endswith("Z") else text


def _is_ordered(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return is_number or isinstance(value, (str, date))
