"""The ledger: each file is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migration_pipelines.errors import DiskFullError, LeaseHeldError, LedgerError, StagingCorruptError
from migration_pipelines.ledger import Ledger, Staged, write_batches, write_file
from migration_pipelines.migration import Migration, MigrationConfig
from migration_pipelines.model import Plan, Receipt
from migration_pipelines.plan import draft
from migration_pipelines.stores.memory import MemoryStore
from migration_pipelines_tests.records import by_id, from_batches, plain_records, plain_schema, to_batch

SCHEMA = plain_schema("docs")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


@pytest.fixture
def plan(ledger: Ledger, request: pytest.FixtureRequest) -> Plan:
    """A plan of three partitions."""
    source = MemoryStore(name=f"ledger-{request.node.name}")
    source.create(SCHEMA)
    source.upsert("docs", to_batch(plain_records(30), SCHEMA))
    target = f"memory:ledger-{request.node.name}-target#docs"
    config = MigrationConfig(source=source.address("docs"), target=target, partition_size=10)
    return draft(Migration(config=config, ledger=ledger))


def _receipt(key: str) -> Receipt:
    return Receipt(
        key=key,
        read=10,
        filtered=1,
        rejected=2,
        loaded=7,
        verified=7,
        bytes=2**40,
        digest="f" * 32,
        seconds={"extract": 0.1},
    )


def _stage(ledger: Ledger, key: str = "g1_00000", phase: str = "extracted") -> Staged:
    def describe(checksum: str) -> Staged:
        return Staged(
            checksum=checksum,
            read=10,
            filtered=0,
            rejected=0,
            records=10,
            bytes=1,
            digest="0" * 32,
            seconds=0.0,
        )

    batch = to_batch(plain_records(10), SCHEMA)
    return ledger.stage(key, phase, batch.schema, [batch.slice(0, 4), batch.slice(4)], describe)


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ── plan, receipts, report ───────────────────────────────────────────────────────────────────────────


def test_a_ledger_writes_nothing_before_there_is_something_to_write(ledger: Ledger) -> None:
    assert ledger.plan() is None
    assert ledger.receipt("g1_00000") is None
    assert ledger.report() is None
    assert ledger.staged("g1_00000", "extracted") is None
    assert list(ledger.rejects()) == []
    assert not ledger.folder.exists()


def test_a_plan_is_read_as_it_was_frozen(ledger: Ledger, plan: Plan) -> None:
    ledger.write_plan(plan)
    assert Ledger(ledger.folder).plan() == plan


def test_receipts_come_in_the_order_of_the_plan(ledger: Ledger, plan: Plan) -> None:
    keys = [partition.key for partition in plan.partitions]
    assert len(keys) == 3
    for key in (keys[2], keys[0]):
        ledger.write_receipt(_receipt(key))
    assert ledger.receipts(plan) == {keys[0]: _receipt(keys[0]), keys[2]: _receipt(keys[2])}
    assert list(ledger.receipts(plan)) == [keys[0], keys[2]]


def test_a_target_prepared_for_one_plan_is_not_prepared_for_the_next(ledger: Ledger, plan: Plan) -> None:
    assert not ledger.is_prepared(plan)
    ledger.mark_prepared(plan)
    assert ledger.is_prepared(plan)
    assert not ledger.is_prepared(plan.model_copy(update={"generation": plan.generation + 1}))


def test_what_another_version_wrote_is_refused_by_name(ledger: Ledger) -> None:
    write_file(ledger.folder / "plan.json", b'{"generation": "one"}')
    with pytest.raises(LedgerError, match=r"plan\.json can't be read as a plan"):
        ledger.plan()


def test_a_fresh_start_forgets_all_but_the_plan_that_it_replaces(ledger: Ledger, plan: Plan) -> None:
    ledger.write_plan(plan)
    ledger.mark_prepared(plan)
    ledger.write_receipt(_receipt("g1_00000"))
    ledger.write_report({"status": "complete"})
    ledger.write_span_ids("g1_00000", to_batch(plain_records(2), SCHEMA).select(["id", "id_type"]))
    ledger.write_rejects("g1_00000.load", [to_batch(plain_records(1), SCHEMA)], ["too long"])
    _stage(ledger)
    ledger.clear()
    assert _files(ledger.folder) == {"plan.json"}


# ── durable files ────────────────────────────────────────────────────────────────────────────────────


def test_a_crash_between_write_and_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_file(path, b"old")
    code = (
        "import os, pathlib, sys\n"
        "from migration_pipelines.ledger import write_file\n"
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "write_file(pathlib.Path(sys.argv[1]), b'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_bytes() == b"old"
    write_file(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_file_is_synced_before_it_takes_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "plan.json", list[tuple[bool, bool]]()
    sync = os.fsync

    def spy(handle: int) -> None:
        seen.append((stat.S_ISDIR(os.fstat(handle).st_mode), path.exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    write_file(path, b"new")
    assert seen == [(False, False), (True, True)]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "batches.arrow"
    batch = to_batch(plain_records(3), SCHEMA)
    write_batches(path, batch.schema, [batch])
    before = path.read_bytes()

    def breaks() -> Iterator[pa.RecordBatch]:
        yield batch
        raise RuntimeError("the source went away")

    with pytest.raises(RuntimeError):
        write_batches(path, batch.schema, breaks())
    assert path.read_bytes() == before
    assert _files(tmp_path) == {"batches.arrow"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_leaves_what_was_there(
    ledger: Ledger, plan: Plan, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.write_plan(plan)
    staged = _stage(ledger)

    def full(_handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError, match="make room and run again"):
            ledger.write_receipt(_receipt("g1_00000"))
        with pytest.raises(DiskFullError):
            _stage(ledger)
    assert ledger.receipt("g1_00000") is None
    assert ledger.plan() == plan
    assert ledger.staged("g1_00000", "extracted") == staged
    assert not [name for name in _files(ledger.folder) if name.endswith(".tmp")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_disk_that_fills_while_arrow_writes_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow writes through a Python file: the number of the error must survive the way through it."""
    opened = Path.open
    full = Path("/dev/full")
    monkeypatch.setattr(Path, "open", lambda self, mode="r": opened(full if "w" in mode else self, mode))
    batch = to_batch(plain_records(2_000), SCHEMA)
    with pytest.raises(DiskFullError):
        write_batches(tmp_path / "x.arrow", batch.schema, [batch])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("a file where the folder should be")
    with pytest.raises(LedgerError, match=r"plan\.json can't be written"):
        write_file(tmp_path / "ledger" / "plan.json", b"x")


# ── staging ──────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_staged_comes_back_batch_by_batch(ledger: Ledger) -> None:
    staged = _stage(ledger)
    assert ledger.staged("g1_00000", "extracted") == staged
    parts = list(ledger.staged_batches("g1_00000", "extracted"))
    assert [part.num_rows for part in parts] == [4, 6]
    assert by_id(from_batches(parts)) == by_id(plain_records(10))


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove", "no note", "broken note"])
def test_a_damaged_staged_file_counts_as_not_there(ledger: Ledger, damage: str) -> None:
    _stage(ledger)
    path, note = (ledger.folder / f"staged/g1_00000/extracted.{end}" for end in ("arrow", "json"))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage in ("cut", "grow"):
        path.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
    elif damage == "broken note":
        note.write_text(note.read_text()[:20])
    else:
        (path if damage == "remove" else note).unlink()
    assert ledger.staged("g1_00000", "extracted") is None


def test_a_file_staged_anew_without_its_note_does_not_pass_for_the_old_one(ledger: Ledger) -> None:
    """Killed between the two: the note still tells of the file before."""
    _stage(ledger)
    batch = to_batch(plain_records(10, seed=1), SCHEMA)
    write_batches(ledger.folder / "staged/g1_00000/extracted.arrow", batch.schema, [batch])
    assert ledger.staged("g1_00000", "extracted") is None


def test_batches_that_are_not_there_are_asked_for_by_name(ledger: Ledger) -> None:
    with pytest.raises(StagingCorruptError, match="g1_00000 has nothing staged by extracted"):
        list(ledger.staged_batches("g1_00000", "extracted"))


def test_discarding_one_partition_leaves_the_others(ledger: Ledger) -> None:
    _stage(ledger, "g1_00000")
    kept = _stage(ledger, "g1_00001")
    ledger.discard_staged("g1_00000")
    ledger.discard_staged("g1_00000")
    assert ledger.staged("g1_00000", "extracted") is None
    assert ledger.staged("g1_00001", "extracted") == kept


def test_ids_of_a_span_come_back_typed(ledger: Ledger) -> None:
    ids = pa.RecordBatch.from_pydict({"id": ["1", "1"], "id_type": ["int", "str"]})
    assert ledger.span_ids(ledger.write_span_ids("g1_00000", ids)).equals(ids)


def test_a_span_without_ids_comes_back_empty(ledger: Ledger) -> None:
    ids = to_batch([], SCHEMA).select(["id", "id_type"])
    assert ledger.span_ids(ledger.write_span_ids("g1_00000", ids)).num_rows == 0


# ── rejects ──────────────────────────────────────────────────────────────────────────────────────────


def test_rejects_are_a_parquet_file_that_anything_reads(ledger: Ledger) -> None:
    refused = plain_records(3)
    ledger.write_rejects("g1_00000.load", [to_batch(refused, SCHEMA)], ["a", "b", "c"])
    table = pq.read_table(ledger.rejects_folder / "g1_00000.load.parquet")
    assert table.column("reject_reason").to_pylist() == ["a", "b", "c"]
    records = from_batches(table.drop_columns(["reject_reason"]).combine_chunks().to_batches())
    assert by_id(records) == by_id(refused)
    assert list(ledger.rejects()) == [
        {"partition": "g1_00000.load", "namespace": "", "id": record.id, "reason": reason}
        for record, reason in zip(refused, "abc", strict=True)
    ]
    assert ledger.rejected_ids("g1_00000.load").to_pylist() == [
        {"id": record.id, "id_type": "str"} for record in refused
    ]


def test_rejects_of_a_later_attempt_replace_the_earlier(ledger: Ledger) -> None:
    ledger.write_rejects("g1_00000.load", [to_batch(plain_records(3), SCHEMA)], ["no"] * 3)
    ledger.write_rejects("g1_00000.load", [to_batch(plain_records(1), SCHEMA)], ["no"])
    assert len(list(ledger.rejects())) == 1
    ledger.write_rejects("g1_00000.load", [], [])
    assert list(ledger.rejects()) == []
    assert ledger.rejected_ids("g1_00000.load").num_rows == 0


def test_rejects_of_several_batches_stand_in_one_file(ledger: Ledger) -> None:
    parts = [to_batch(plain_records(2), SCHEMA), to_batch(plain_records(2, start=2), SCHEMA)]
    ledger.write_rejects("g1_00000.transform", parts, list("abcd"))
    assert ledger.rejected_ids("g1_00000.transform").num_rows == 4


# ── leases ───────────────────────────────────────────────────────────────────────────────────────────

_HOLD = """
import pathlib, sys
from migration_pipelines.ledger import Ledger
ledger = Ledger(pathlib.Path(sys.argv[1]))
kind = sys.argv[2]
with {
    "alone": lambda: ledger.lease(),
    "shared": lambda: ledger.lease(shared=True),
    "partition": lambda: ledger.partition_lease("g1_00000"),
}[kind]():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _held_elsewhere(ledger: Ledger, kind: str) -> Iterator[Any]:
    """Hold a lease in another process."""
    command = [sys.executable, "-c", _HOLD, str(ledger.folder), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_lease_held_alone_keeps_every_other_process_out(ledger: Ledger) -> None:
    with _held_elsewhere(ledger, "alone"):
        for shared in (False, True):
            with (
                pytest.raises(LeaseHeldError, match="another worker holds lease"),
                ledger.lease(shared=shared),
            ):
                pass


def test_shared_leases_stand_beside_each_other_but_not_beside_one_alone(ledger: Ledger) -> None:
    with _held_elsewhere(ledger, "shared"):
        with ledger.lease(shared=True):
            pass
        with pytest.raises(LeaseHeldError), ledger.lease():
            pass


def test_a_partition_is_held_by_one_worker_and_others_are_free(ledger: Ledger) -> None:
    with _held_elsewhere(ledger, "partition"):
        with pytest.raises(LeaseHeldError, match="g1_00000"), ledger.partition_lease("g1_00000"):
            pass
        with ledger.partition_lease("g1_00001"):
            pass


def test_a_killed_process_leaves_no_lease_behind(ledger: Ledger) -> None:
    with _held_elsewhere(ledger, "alone") as process:
        process.kill()
        process.wait()
        with ledger.lease():
            pass


def test_a_lease_is_free_again_after_an_error_inside(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="inside"), ledger.lease():
        raise ValueError("inside")
    with ledger.lease():
        pass


def test_two_threads_of_one_process_exclude_each_other_too(ledger: Ledger) -> None:
    """`flock` belongs to the open file, not to the process."""
    with (
        ledger.partition_lease("g1_00000"),
        pytest.raises(LeaseHeldError),
        ledger.partition_lease("g1_00000"),
    ):
        pass
