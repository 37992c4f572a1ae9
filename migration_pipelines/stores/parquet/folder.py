"""LocalFolder: the file operations that a collection in files needs, durable and whole or not at all.

Everything that touches the local file system goes through here. `Folder` is what reading needs of a folder,
wherever it is.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import pyarrow as pa

_TEMPORARY = ".tmp"


class Folder(Protocol):
    """A folder to read from; it needn't be there yet."""

    @property
    def prefetch(self) -> bool:
        """Whether a row group is best read as a whole."""

    def child(self, name: str) -> Self:
        """Return the folder of that name in this one."""

    def where(self, name: str | None = None) -> str:
        """Return what a message calls the folder, or a file in it."""

    def names(self, *, suffix: str) -> list[str]:
        """Return the names of the files that end so, hidden ones left out, sorted; none without a folder."""

    def folders(self) -> list[str]:
        """Return the names of the folders in this one, sorted; none without a folder."""

    def text(self, name: str) -> str | None:
        """Return what a file holds, None where it isn't there."""

    def version(self, name: str) -> tuple[int, Any, int]:
        """Return what changes when a file is replaced or written to; first its size in bytes."""

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for reading."""

    def make(self) -> None:
        """Make the folder, with those above it, where it isn't there."""


@dataclass(frozen=True)
class LocalFolder:
    """One folder on a local file system; it needn't be there yet.

    All methods raise OSError as the system gives it, except where they say otherwise.
    """

    path: Path

    prefetch = False

    def where(self, name: str | None = None) -> str:
        """Return the path of the folder, or of a file in it."""
        return str(self.path if name is None else self.path / name)

    def child(self, name: str) -> LocalFolder:
        """Return the folder of that name in this one."""
        return LocalFolder(self.path / name)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def names(self, *, suffix: str) -> list[str]:
        """Return the names of the files that end so, hidden ones left out, sorted; none without a folder."""
        try:
            return sorted(
                entry.name
                for entry in os.scandir(self.path)
                if entry.name.endswith(suffix) and not entry.name.startswith(".") and entry.is_file()
            )
        except (FileNotFoundError, NotADirectoryError):
            return []

    def folders(self) -> list[str]:
        """Return the names of the folders in this one, sorted; none without a folder."""
        try:
            return sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def text(self, name: str) -> str | None:
        """Return what a file holds, None where it isn't there."""
        try:
            return (self.path / name).read_text("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def version(self, name: str) -> tuple[int, int, int]:
        """Return what changes when a file is replaced or written to: size in bytes, mtime in ns, inode."""
        status = (self.path / name).stat()
        return status.st_size, status.st_mtime_ns, status.st_ino

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for reading."""
        return pa.OSFile(str(self.path / name))

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def make(self) -> None:
        """Make the folder, with those above it, where it isn't there."""
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)
            _sync(self.path.parent)

    @contextmanager
    def temporary(self) -> Iterator[tuple[str, pa.NativeFile]]:
        """Give the name of a hidden file and the file to write; on disk for good when the context ends.

        It is gone when the context is left by an exception. `move` gives it the name it is for.
        """
        name = f".{secrets.token_hex(8)}{_TEMPORARY}"
        path = self.path / name
        try:
            with pa.OSFile(str(path), "wb") as sink:
                yield name, sink
            _sync(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def write_text(self, name: str, text: str) -> None:
        """Write a file, whole or not at all."""
        with self.temporary() as (hidden, sink):
            sink.write(text.encode())
        self.move(hidden, self, name)

    def move(self, name: str, folder: LocalFolder, new_name: str) -> None:
        """Give a file another name, in this folder or another; one that has that name is replaced."""
        (self.path / name).replace(folder.path / new_name)
        _sync(folder.path)

    def remove(self, name: str) -> None:
        """Remove a file; one that isn't there is no error."""
        (self.path / name).unlink(missing_ok=True)

    def remove_temporary(self) -> None:
        """Remove what writers that were killed left behind."""
        for path in self.path.glob(f".*{_TEMPORARY}"):
            path.unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """Remove the folder where nothing is in it."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads and processes that ask for the same lock out; the folder must be there."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
