"""One filter grammar with one meaning on every store."""

from __future__ import annotations

from migration_pipelines.model import Value


class Filter(Value):
    """A parsed filter."""
