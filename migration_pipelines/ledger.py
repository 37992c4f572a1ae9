"""The ledger: one folder that holds a migration's plan, receipts, staged batches and rejects.

    plan.json             the frozen plan
    prepared.json         the target is created (or was found fit) for this plan
    spans/<key>.arrow     ids of a partition, where the store's span is a list of ids
    staged/<key>/         what a partition's phases left: <phase>.arrow and <phase>.json (its checksum);
                          digests.arrow, what names and sums up each of its records
    receipts/<key>.json   the proof of a partition
    moved/<key>.arrow     what names and sums up each record that is proven to be in the target
    skipped/<key>.arrow   ids of a partition that the target held before, where those are left as they are
    baseline.arrow        the same of all complete runs together (see `baseline`)
    claimed/<key>.arrow   names of records that a run which wasn't completed may have added
    deleted.arrow         ids of records that are in the baseline and no longer in the source
    rejects/              refused records with their reasons: a Parquet collection that can be migrated again
    report.json           the last report
    lease                 held while somebody works on the migration (kernel locks: a crash releases them)

Each file is written under another name, fsynced and renamed: after a crash it is there whole or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import ValidationError as SchemaError

from migration_pipelines.batch import ID, ID_TYPE, NAMESPACE, id_batch, id_names
from migration_pipelines.errors import DiskFullError, LeaseHeldError, LedgerError, StagingCorruptError
from migration_pipelines.model import Plan, Receipt, Value

V = TypeVar("V", bound=Value)
_CHUNK = 1 << 20
_DELETED_ROWS = 1_000
# What names a record of the source, whatever its store; and its digest (`batch.record_digests`), null where
# it isn't known.
NAMES = pa.schema([(ID, pa.string()), (ID_TYPE, pa.string()), (NAMESPACE, pa.string())])
SUMMED_UP = NAMES.append(pa.field("digest", pa.binary(16)))


class Staged(Value):
    """What a phase staged of one partition. `digest` is that of the records in scope, hexadecimal."""

    checksum: str
    read: int
    filtered: int
    rejected: int
    records: int
    bytes: int
    digest: str
    seconds: float
    mark: str | None = None  # the greatest watermark that was read


class Ledger:
    """One migration's folder. It is made when something is written into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    # ── lease ────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def lease(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the migration: alone, or shared with workers that each hold their own partition.

        Raises
        ------
        LeaseHeldError
            Another process is at work on this migration.
        """
        with self._lock("lease", shared=shared, wait=False):
            yield

    @contextmanager
    def partition_lease(self, key: str) -> Iterator[None]:
        """Hold one partition.

        Raises
        ------
        LeaseHeldError
            Another worker has this partition.
        """
        with self._lock(f"leases/{key}", shared=False, wait=False):
            yield

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Hold the preparation of the target; waits for whoever is at it."""
        with self._lock("leases/prepare", shared=False, wait=True):
            yield

    @contextmanager
    def _lock(self, name: str, *, shared: bool, wait: bool) -> Iterator[None]:
        path = self.folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("a")
        with handle:
            mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            try:
                fcntl.flock(handle, mode if wait else mode | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LeaseHeldError(
                    f"{self.folder}: another worker holds {name}; wait until it is done, or stop it",
                    ledger=str(self.folder),
                    lease=name,
                ) from None
            yield

    # ── plan, receipts, report ───────────────────────────────────────────────────────────────────────

    def plan(self) -> Plan | None:
        """Return the frozen plan, or None where there is none."""
        return self._read("plan.json", Plan)

    def write_plan(self, plan: Plan) -> None:
        """Freeze a plan: from here on nothing of it changes."""
        self._write("plan.json", plan)

    def is_prepared(self, plan: Plan) -> bool:
        """Whether the target is ready for this plan's records."""
        path = self.folder / "prepared.json"
        return path.exists() and orjson.loads(path.read_bytes())["generation"] == plan.generation

    def mark_prepared(self, plan: Plan) -> None:
        """Note that the target is ready for this plan's records."""
        write_file(self.folder / "prepared.json", orjson.dumps({"generation": plan.generation}))

    def receipt(self, key: str) -> Receipt | None:
        """Return a partition's receipt, or None where it isn't verified yet."""
        return self._read(f"receipts/{key}.json", Receipt)

    def receipts(self, plan: Plan) -> dict[str, Receipt]:
        """Return the receipts that there are, by partition key, in the plan's order."""
        found = ((partition.key, self.receipt(partition.key)) for partition in plan.partitions)
        return {key: receipt for key, receipt in found if receipt is not None}

    def write_receipt(self, receipt: Receipt) -> None:
        """Make a receipt durable."""
        self._write(f"receipts/{receipt.key}.json", receipt)

    def write_report(self, report: dict[str, Any]) -> None:
        """Keep the last report."""
        write_file(self.folder / "report.json", orjson.dumps(report, option=orjson.OPT_INDENT_2))

    def report(self) -> dict[str, Any] | None:
        """Return the last report."""
        path = self.folder / "report.json"
        return orjson.loads(path.read_bytes()) if path.exists() else None

    def clear(self) -> None:
        """Forget everything but the lease and what can be made again, for a fresh plan."""
        for name in ("prepared.json", "report.json", "deleted.json", "deleted.arrow"):
            (self.folder / name).unlink(missing_ok=True)
        for name in ("staged", "spans", "skipped", "receipts", "rejects", "moved"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _read(self, name: str, kind: type[V]) -> V | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return kind.model_validate_json(path.read_bytes())
        except SchemaError as error:
            raise LedgerError(
                f"{path} can't be read as a {kind.__name__.lower()} of this version; "
                "start a fresh plan, or use the version that wrote it"
            ) from error

    def _write(self, name: str, value: Value) -> None:
        write_file(self.folder / name, value.model_dump_json(indent=1).encode())

    # ── spans ────────────────────────────────────────────────────────────────────────────────────────

    def write_span_ids(self, key: str, ids: pa.RecordBatch) -> str:
        """Keep a span's list of ids; returns the file's name."""
        name = f"spans/{key}.arrow"
        write_batches(self.folder / name, ids.schema, [ids])
        return name

    def span_ids(self, name: str) -> pa.RecordBatch:
        """Return a span's list of ids."""
        with pa.memory_map(str(self.folder / name)) as source:
            return pa.ipc.open_file(source).get_batch(0)

    def write_skipped(self, key: str, ids: pa.RecordBatch) -> None:
        """Keep the ids of a partition that the target held before anything of it was written."""
        write_batches(self.folder / f"skipped/{key}.arrow", ids.schema, [ids])

    def skipped_ids(self, key: str) -> pa.RecordBatch | None:
        """Return the ids of a partition that the target held before; None where nobody looked."""
        name = f"skipped/{key}.arrow"
        return self.span_ids(name) if (self.folder / name).exists() else None

    # ── staging ──────────────────────────────────────────────────────────────────────────────────────

    def staged(self, key: str, phase: str) -> Staged | None:
        """Return what a phase staged of a partition, if it is there and whole.

        A file that fails its checksum counts as not there: the phase does it again.
        """
        try:
            found = self._read(f"staged/{key}/{phase}.json", Staged)
            return found if found and self._checksum(key, phase) == found.checksum else None
        except (LedgerError, OSError):
            return None

    def stage(
        self,
        key: str,
        phase: str,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        describe: Callable[[str], Staged],
    ) -> Staged:
        """Stage a phase's batches; `describe` gets the checksum when all are written.

        Raises
        ------
        DiskFullError
        """
        path = self._staged_file(key, phase)
        staged = describe(write_batches(path, schema, batches))
        self._write(f"staged/{key}/{phase}.json", staged)
        return staged

    def staged_batches(self, key: str, phase: str) -> Iterator[pa.RecordBatch]:
        """Yield what a phase staged of a partition, batch by batch.

        Read, not mapped: a mapped file's pages count as memory of the process, a partition at a time.

        Raises
        ------
        StagingCorruptError
        """
        try:
            source = pa.OSFile(str(self._staged_file(key, phase)))
        except FileNotFoundError:
            raise StagingCorruptError(
                f"{self.folder}: partition {key} has nothing staged by {phase}; run that phase again"
            ) from None
        with source:
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)

    def discard_staged(self, key: str) -> None:
        """Remove what a verified partition staged."""
        shutil.rmtree(self.folder / "staged" / key, ignore_errors=True)

    def _staged_file(self, key: str, phase: str) -> Path:
        return self.folder / "staged" / key / f"{phase}.arrow"

    def _checksum(self, key: str, phase: str) -> str:
        checksum = xxhash.xxh3_128()
        with self._staged_file(key, phase).open("rb") as file:
            while chunk := file.read(_CHUNK):
                checksum.update(chunk)
        return checksum.hexdigest()

    # ── what names and sums up records ───────────────────────────────────────────────────────────────

    def write_digests(self, key: str, rows: Sequence[pa.RecordBatch]) -> None:
        """Keep what names and sums up each record that a partition extracted."""
        write_batches(self.folder / f"staged/{key}/digests.arrow", SUMMED_UP, rows)

    def digests(self, key: str) -> pa.Table | None:
        """Return what `write_digests` kept of a partition; None where it isn't there."""
        path = self.folder / f"staged/{key}/digests.arrow"
        return _table(path) if path.exists() else None

    def write_moved(self, key: str, rows: pa.Table) -> None:
        """Keep what names and sums up the records of a partition that are proven to be in the target."""
        write_batches(self.folder / f"moved/{key}.arrow", SUMMED_UP, rows.to_batches())

    def moved(self, key: str) -> pa.Table:
        """Return what `write_moved` kept of a partition."""
        return _table(self.folder / f"moved/{key}.arrow")

    def has_moved(self, key: str) -> bool:
        """Whether `write_moved` kept something of a partition."""
        return (self.folder / f"moved/{key}.arrow").exists()

    def discard_moved(self) -> None:
        """Remove what `write_moved` kept of all partitions."""
        shutil.rmtree(self.folder / "moved", ignore_errors=True)

    def write_deleted(self, rows: Iterable[pa.Table]) -> int:
        """Keep the names of records that are in the target and no longer in the source; return how many."""
        path = self.folder / "deleted.arrow"
        write_batches(path, NAMES, (batch for table in rows for batch in table.to_batches()))
        return len(_table(path))

    def deleted(self) -> Iterator[pa.Table]:
        """Yield the names of records that are in the target and no longer in the source, some at a time."""
        path = self.folder / "deleted.arrow"
        every = _table(path) if path.exists() else NAMES.empty_table()
        for start in range(0, len(every), _DELETED_ROWS):
            yield every.slice(start, _DELETED_ROWS)

    def claim(self, key: str, names: pa.Table) -> None:
        """Note, before they are written, which records a partition adds to the target."""
        write_batches(self.folder / f"claimed/{key}.arrow", NAMES, names.to_batches())

    def claimed(self) -> pa.Table:
        """Return the names of all records that were claimed, some perhaps twice."""
        return pa.concat_tables([NAMES.empty_table(), *map(_table, sorted(self._claims.glob("*.arrow")))])

    def settle_claims(self, left: pa.Table) -> None:
        """Forget all claims but those on the records that are `left`."""
        for path in self._claims.glob("*.arrow"):
            path.unlink()
        if len(left):
            self.claim("left", left)

    @property
    def _claims(self) -> Path:
        return self.folder / "claimed"

    def removed(self) -> int | None:
        """Return how many records were removed from the target; None where that isn't done."""
        path = self.folder / "deleted.json"
        return int(orjson.loads(path.read_bytes())["removed"]) if path.exists() else None

    def mark_removed(self, records: int) -> None:
        """Note that those records are gone from the target."""
        write_file(self.folder / "deleted.json", orjson.dumps({"removed": records}))

    # ── rejects ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def rejects_folder(self) -> Path:
        """Where the refused records lie, as a Parquet collection that can be migrated again."""
        return self.folder / "rejects"

    def write_rejects(self, name: str, batches: list[pa.RecordBatch], reasons: list[str]) -> None:
        """Keep the records that a phase of a partition refused; none removes an older attempt's file."""
        path = self.rejects_folder / f"{name}.parquet"
        if not batches:
            path.unlink(missing_ok=True)
            return
        table = pa.Table.from_batches(batches).append_column("reject_reason", pa.array(reasons, pa.string()))

        def write(file: Any) -> None:
            pq.write_table(table, file)

        replace_file(path, write)

    def rejected_ids(self, name: str) -> pa.RecordBatch:
        """Return what names the records (`batch.ids_of`) that a phase of a partition refused."""
        path = self.rejects_folder / f"{name}.parquet"
        if not path.exists():
            return id_batch([])
        table = pq.read_table(path, columns=id_names(pq.read_schema(path)))
        return table.combine_chunks().to_batches()[0]

    def rejects(self) -> Iterator[dict[str, str]]:
        """Yield `partition`, `namespace`, `id` and `reason` of every refused record."""
        for path in sorted(self.rejects_folder.glob("*.parquet")):
            names = id_names(pq.read_schema(path))
            for row in pq.read_table(path, columns=[*names, "reject_reason"]).to_pylist():
                yield {
                    "partition": path.stem,
                    "namespace": row.get(NAMESPACE) or "",
                    "id": row[ID],
                    "reason": row["reject_reason"],
                }

    # ── scratch ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def scratch(self) -> Path:
        """A folder for what can be made again, such as the copy that an embedded source is read from."""
        path = self.folder / "scratch"
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def discard_scratch(self) -> None:
        """Remove what can be made again; of an incremental plan the spans stay, which say what changed."""
        plan = self.plan()
        spans = ["spans"] if plan is None or plan.changes is None else []
        for name in ("scratch", "skipped", *spans):
            shutil.rmtree(self.folder / name, ignore_errors=True)


# ── durable files ────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk and other failures to write into errors that name the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"no room left on the disk of {path}; what is there stays valid: make room and run again",
                path=str(path),
            ) from error
        raise LedgerError(f"{path} can't be written: {error.strerror or error}", path=str(path)) from error


def write_file(path: Path, content: bytes) -> None:
    """Write a small file durably: whole or not at all."""
    replace_file(path, lambda file: file.write(content))


def replace_file(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file durably through `write(file)`: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> str:
    """Write an Arrow IPC file durably; returns its checksum (xxh3, 128 bits, hexadecimal)."""
    checksum = xxhash.xxh3_128()

    def write(file: Any) -> None:
        sink = pa.PythonFile(_Checked(file, checksum), mode="w")
        with pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    replace_file(path, write)
    return checksum.hexdigest()


def _table(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


class _Checked:
    """A file that is hashed while it is written."""

    def __init__(self, file: Any, checksum: Any) -> None:
        self._file, self._checksum = file, checksum

    def write(self, data: Any) -> int:
        self._checksum.update(data)
        return int(self._file.write(data))

    def flush(self) -> None:
        self._file.flush()

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        """The file is closed by who opened it, after it is fsynced."""


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
