"""Copies of the folder of an embedded store whose driver writes on being opened.

The original is only ever read as bytes: it is never opened as a database, so that no lock of ours holds up
its writers, no journal of theirs is rolled back, and a read-only file system will do. A copy is taken
together with whatever journals lie beside the database; if anything changed meanwhile, it is thrown away.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from migration_pipelines.errors import ConfigurationError, DiskFullError, TransientError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_SQLITE_MAGIC = b"SQLite format 3\0"
_SQLITE_SUFFIXES = frozenset({".sqlite3", ".sqlite", ".db"})
# https://www.sqlite.org/fileformat.html: bytes 24 to 27 of the header count the transactions.
_CHANGE_COUNTER = slice(24, 28)
# Readers of a SQLite database in WAL mode write here too; it holds no data.
_SHARED_MEMORY = "-shm"


def folder_fingerprint(folder: Path) -> str:
    """Return a text that changes with the name, size or time of any file in a folder.

    Of a SQLite database it also takes the change counter, for writes within one tick of the clock.
    """
    digest = hashlib.sha256()
    for path in _files(folder):
        name = os.fsencode(path.relative_to(folder))
        try:
            stat, counter = path.stat(), _change_counter(path)
        except FileNotFoundError:  # a journal of somebody who is writing: it is gone with its transaction
            continue
        digest.update(b"%d\0%s\0%d\0%d\0" % (len(name), name, stat.st_size, stat.st_mtime_ns))
        digest.update(counter)
    return digest.hexdigest()


def snapshot(folder: Path, scratch: Path) -> Path:
    """Return a copy of a folder, taken now or before and still what the folder holds.

    Two processes never copy at once: the second waits, and takes what the first has made. Older copies of
    the same folder are removed. What a killed process left behind is removed by the next one.

    Raises
    ------
    TransientError
        The folder changed while it was copied.
    DiskFullError
        The copy doesn't fit; nothing is left of it.
    ConfigurationError
        `scratch` lies inside the folder.
    """
    folder, scratch = folder.resolve(), scratch.resolve()
    if scratch.is_relative_to(folder):
        raise ConfigurationError(
            f"{scratch} lies inside {folder}, which is to be copied into it: choose another home"
        )
    key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    scratch.mkdir(parents=True, exist_ok=True)
    with _locked(scratch / f"{key}.lock"):
        before = folder_fingerprint(folder)
        copy = scratch / f"{key}-{before[:32]}"
        if not copy.is_dir():
            for older in scratch.glob(f"{key}-*"):
                shutil.rmtree(older)
            _copy_whole(folder, copy, fingerprint=before)
    return copy


def _copy_whole(folder: Path, copy: Path, *, fingerprint: str) -> None:
    # The name matches the pattern of older copies: what a killed process leaves is removed with them.
    partial = copy.with_name(f"{copy.name}.partial")
    try:
        for path in _files(folder):
            _copy_file(path, partial / path.relative_to(folder))
        if folder_fingerprint(folder) != fingerprint:
            raise TransientError(
                f"{folder} was written to while it was copied; stop its writers, or run again",
                found=str(folder),
            )
        partial.rename(copy)
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                f"no room in {copy.parent} for a copy of {folder}, which is read from a copy because its "
                "driver would write to it; make room, or put the project's home on a larger disk"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise TransientError(f"{folder} lost a file while it was copied; stop its writers") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_file(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    # A copy that is found after a power failure is taken as it is: it must be whole before it gets its name.
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if not path.name.endswith(_SHARED_MEMORY))
    return sorted(path for path in found if path.is_file())


def _change_counter(path: Path) -> bytes:
    if path.suffix not in _SQLITE_SUFFIXES:
        return b""
    with path.open("rb") as file:
        header = file.read(_CHANGE_COUNTER.stop)
    return header[_CHANGE_COUNTER] if header.startswith(_SQLITE_MAGIC) else b""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
