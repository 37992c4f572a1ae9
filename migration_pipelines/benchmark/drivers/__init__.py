"""What each driver can do at most: a bare loop over it, in its fastest known way.

A module for each kind of store has `bare_read(store, collection)` and `bare_write(store, collection, pages)`;
both return how many records they moved. `PUBLISHES = True` says that its `bare_write` leaves a
collection that is ready to be read, as a file that is written whole is. What `bare_write` wrote is on disk
for good when it returns, as what a server has acknowledged is.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync(*paths: Path) -> None:
    """Wait until files, and what stands in folders, are on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
