"""RemoteFolder: a folder of an object store, by fsspec: S3 and whatever else fsspec has a file system for.

An object comes to be whole or not at all: a small one by a single PUT, a large one by an upload in pieces
that is completed when all of them are there, and aborted otherwise. Nothing is ever moved or appended to.
"""

from __future__ import annotations

import errno
import io
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from migration_pipelines.errors import ConfigurationError, MigrationError, MissingDriverError, TransientError
from migration_pipelines.stores.parquet.remote_errors import is_missing_object, translated

PIECE_BYTES = 8 * 2**20  # of an upload; S3 takes pieces from 5 MiB on, and 10,000 of them
_S3 = ("s3", "s3a")
_EXTRAS = {"s3": "migration-pipelines[s3]", "s3a": "migration-pipelines[s3]"}
_CONNECT_SECONDS, _READ_SECONDS = 20, 60


class RemoteFiles:
    """A file system of fsspec: connected on first use, without retries of its own, each request paced.

    Credentials are those of the environment (for S3 `AWS_*`, with `AWS_ENDPOINT_URL` for servers such as
    MinIO). A missing object is a FileNotFoundError; anything else that goes wrong is the project's error.

    Parameters
    ----------
    url
        Any URL of the file system; its scheme says which one.
    anonymous
        Sign nothing, as for public buckets.
    pace
        Called with the number of bytes that are sent, before each request.
    """

    def __init__(self, url: str, *, anonymous: bool, pace: Callable[[int], None]) -> None:
        self.scheme = url.partition("://")[0]
        self._url, self._anonymous, self.pace = url, anonymous, pace
        self._lock = threading.Lock()
        self._system: Any = None
        self.versions: dict[str, tuple[int, str, int]] = {}  # of objects that never change

    @property
    def is_s3(self) -> bool:
        """Whether requests can be conditional, and unfinished uploads be found."""
        return self.scheme in _S3

    def call(self, method: str, where: str, *arguments: Any, sent_bytes: int = 0, **options: Any) -> Any:
        """Return what a method of the file system does with a URL.

        Raises
        ------
        FileNotFoundError
        """
        system = self._connected()
        self.pace(sent_bytes)
        try:
            return getattr(system, method)(where, *arguments, **options)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            raise self.translated(error, where) from None

    def translated(self, error: Exception, where: str) -> Exception:
        """Return the error for what went wrong with a URL."""
        if isinstance(error, MigrationError):
            return error
        if is_missing_object(error):
            return FileNotFoundError(errno.ENOENT, "no such object", where)
        return translated(error, where)

    def requests(self, method: str, where: str, **options: Any) -> Any:
        """Return what S3 answers to a request of its own, by its Python name; `where` is for messages."""
        system = self._connected()
        self.pace(0)
        try:
            return system.call_s3(method, **options)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            raise self.translated(error, where) from None

    def close(self) -> None:
        """Forget the connection; the next request opens another."""
        with self._lock:
            self._system = None

    def _connected(self) -> Any:
        with self._lock:
            if self._system is None:
                self._system = self._connect()
            return self._system

    def _connect(self) -> Any:
        import fsspec

        try:
            system = fsspec.get_filesystem_class(self.scheme)
        except ImportError:
            package = _EXTRAS.get(self.scheme, f"the package that fsspec names for {self.scheme}")
            raise MissingDriverError(
                f"parquet: {self.scheme}:// needs its driver: pip install {package}"
            ) from None
        except ValueError:
            raise ConfigurationError(
                f"parquet: fsspec knows no {self.scheme}://; take a local folder, s3:// or gs://"
            ) from None
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self.is_s3:
            retries = {"total_max_attempts": 1, "mode": "standard"}
            timeouts = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
            options |= {"anon": self._anonymous, "max_concurrency": 1}
            options["config_kwargs"] = {"retries": retries, **timeouts}
        elif self._anonymous:
            options["token"] = "anon"  # noqa: S105 - as gcsfs has it
        try:
            connected = system(**options)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            raise translated(error, self._url) from None
        if self.is_s3:
            connected.retries = 1
        return connected


@dataclass(frozen=True)
class RemoteFolder:
    """One folder of an object store; it is there as long as anything is in it.

    Parameters
    ----------
    url
        Without a slash at its end.
    """

    files: RemoteFiles
    url: str

    prefetch = True  # a request costs more than what it brings: row groups are read as a whole

    def child(self, name: str) -> RemoteFolder:
        """Return the folder of that name in this one."""
        return RemoteFolder(self.files, f"{self.url}/{name}")

    def where(self, name: str | None = None) -> str:
        """Return the URL of the folder or of an object in it."""
        return self.url if name is None else f"{self.url}/{name}"

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def names(self, *, suffix: str) -> list[str]:
        """Return the names of the objects that end so, hidden ones left out, sorted."""
        return sorted(name for name in self.listing() if name.endswith(suffix) and not name.startswith("."))

    def folders(self) -> list[str]:
        """Return the names of the folders in this one, sorted."""
        return sorted(_name(entry) for entry in self._entries() if entry["type"] == "directory")

    def listing(self) -> dict[str, tuple[int, str]]:
        """Return size and tag of every object, by name."""
        found = (entry for entry in self._entries() if entry["type"] == "file" and _name(entry))
        return {_name(entry): _version(entry)[:2] for entry in found}

    def text(self, name: str) -> str | None:
        """Return what an object holds, None where it isn't there."""
        try:
            found: bytes = self.files.call("cat_file", self.where(name))
        except FileNotFoundError:
            return None
        return found.decode()

    def version(self, name: str) -> tuple[int, str, int]:
        """Return what changes when an object is replaced: its size in bytes, its tag; and 0."""
        where = self.where(name)
        known = self.files.versions.get(where)
        if known is None:
            known = _version(self.files.call("info", where))
            if is_unique(name):
                self.files.versions[where] = known
        return known

    def open(self, name: str) -> pa.NativeFile:
        """Open an object for reading."""
        return pa.PythonFile(_Ranges(self.files, self.where(name), self.version(name)[0]), mode="r")

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def make(self) -> None:
        """Do nothing: folders come with what is in them."""

    @contextmanager
    def upload(self, name: str) -> Iterator[pa.NativeFile]:
        """Give the file to write; the object is there when the context ends, if not by an exception."""
        upload = _Upload(self.files, self.where(name))
        try:
            with pa.PythonFile(upload, mode="w") as sink:
                yield sink
            upload.complete()
        except BaseException:
            upload.abort()
            raise

    def write_text(self, name: str, text: str, *, over: str | None) -> None:
        """Write an object whole, over the version that has this tag, or where none is.

        Only S3 keeps the condition.

        Raises
        ------
        TransientError
            Another writer was faster.
        """
        data = text.encode()
        condition = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over}
        options = condition if self.files.is_s3 else {}
        self.files.call("pipe_file", self.where(name), data, sent_bytes=len(data), **options)

    def remove(self, name: str) -> None:
        """Remove an object; one that isn't there is no error."""
        self.files.versions.pop(self.where(name), None)
        with suppress(FileNotFoundError):
            self.files.call("rm_file", self.where(name))

    def abort_uploads(self) -> None:
        """Remove the pieces of uploads into this folder that were never completed; S3 alone tells of them."""
        if not self.files.is_s3:
            return
        bucket, _, key = self.url.partition("://")[2].partition("/")
        found = self.files.requests("list_multipart_uploads", self.url, Bucket=bucket, Prefix=f"{key}/")
        for upload in found.get("Uploads") or ():
            with suppress(FileNotFoundError):
                where = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                self.files.requests("abort_multipart_upload", self.url, **where)

    def _entries(self) -> list[dict[str, Any]]:
        try:
            return list(self.files.call("ls", self.url, detail=True))
        except FileNotFoundError:
            return []


def unique_name(stem: str) -> str:
    """Return a name that no object has had: what is under it never changes."""
    return f"{stem}.{secrets.token_hex(6)}.parquet"


def is_unique(name: str) -> bool:
    """Whether a name is one that `unique_name` made."""
    token = name.removesuffix(".parquet").rpartition(".")[2]
    return "~" in name and len(token) == 12 and set(token) <= set("0123456789abcdef")


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _version(entry: dict[str, Any]) -> tuple[int, str, int]:
    marks = (entry.get(mark) for mark in ("ETag", "etag", "mtime", "LastModified", "created"))
    return int(entry["size"] or 0), str(next((mark for mark in marks if mark), "")), 0


class _Ranges(io.RawIOBase):
    """An object that is read by ranges, one request each."""

    def __init__(self, files: RemoteFiles, where: str, size: int) -> None:
        self._files, self._where, self._size = files, where, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        return self._size

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        found: bytes = self._files.call("cat_file", self._where, start=self._at, end=self._at + wanted)
        if len(found) != wanted:
            raise TransientError(
                f"{self._where}: a reply was cut: {wanted} bytes expected, {len(found)} found",
                expected=wanted,
                found=len(found),
            )
        self._at += wanted
        return found


class _Upload(io.RawIOBase):
    """An object that is written: in pieces where it is large, by one request where it is small."""

    def __init__(self, files: RemoteFiles, where: str) -> None:
        self._files, self._where = files, where
        self._waiting = bytearray()
        self._pieces: Any = None
        self._is_broken = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._is_broken:  # what came before is lost: nothing that is written now makes it whole
            raise TransientError(
                f"{self._where}: the upload failed before; write the part again from its start"
            )
        view = memoryview(data).cast("B")
        self._waiting += view
        if len(self._waiting) >= PIECE_BYTES:
            self._send()
        return len(view)

    def complete(self) -> None:
        """Make the object of what was written."""
        if self._pieces is None:
            data = bytes(self._waiting)
            self._files.call("pipe_file", self._where, data, sent_bytes=len(data))
            return
        if self._waiting:
            self._send()
        with self._guarded():
            self._pieces.close()
            self._pieces.commit()

    def abort(self) -> None:
        """Remove what was sent; what can't be now is found by `RemoteFolder.abort_uploads`."""
        if self._pieces is not None:
            with suppress(Exception):
                self._pieces.discard()
            self._pieces.closed = True  # or fsspec would try to send the rest when it is collected

    def _send(self) -> None:
        if self._pieces is None:
            options = {"block_size": PIECE_BYTES, "autocommit": False}
            self._pieces = self._files.call("open", self._where, "wb", **options)
        data = bytes(self._waiting)
        self._waiting.clear()
        with self._guarded():
            self._files.pace(len(data))
            self._pieces.write(data)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            self._is_broken = True
            raise self._files.translated(error, self._where) from None
