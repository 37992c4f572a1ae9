"""The validate phase: every receipt, the counts, the source unchanged; and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from migration_pipelines import batch as batches
from migration_pipelines.errors import IncompleteError, MigrationError, SourceChangedError
from migration_pipelines.migration import Migration
from migration_pipelines.model import Changes, Loss, Plan, Receipt, Value
from migration_pipelines.resources import Resources
from migration_pipelines.sync import keep_what_was_moved

_SHOWN_REJECTS = 100


class Check(Value):
    """One thing that must hold for a migration to be complete."""

    name: str
    passed: bool
    expected: str
    found: str


class Report(Value):
    """What a migration did, and what it proved.

    `status` is complete (every record verified), incomplete (run it again, or look at the rejects) or
    failed (a check of the whole doesn't hold).
    """

    status: Literal["complete", "incomplete", "failed"]
    name: str
    generation: int
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    partitions: Mapping[str, int]
    records: Mapping[str, int]
    losses: tuple[Loss, ...]
    checks: tuple[Check, ...]
    rejects: tuple[Mapping[str, str], ...]
    rejects_folder: str | None
    errors: tuple[str, ...]
    digest: str
    bytes: int
    seconds: float
    records_per_second: float
    changes: Changes | None = None  # of an incremental run
    resources: Resources | None = None

    @property
    def exit_status(self) -> int:
        """0 for complete, 1 for anything else."""
        return 0 if self.status == "complete" else 1


def validate(
    migration: Migration,
    *,
    seconds: float = 0.0,
    failed: Mapping[str, Exception] | None = None,
    different: int = 0,
    resources: Resources | None = None,
) -> Report:
    """Check the whole migration and write the report into the ledger; never raises for what it finds.

    Where it can't look, it raises the first of `failed`, or else what keeps it from looking.

    Parameters
    ----------
    seconds
        Wall time of this run, for the rate; without it the sum of the partitions' own time.
    failed
        Partitions that failed in this run, with their errors.
    different
        Records that this run found different on reading them back.
    resources
        What this run took of its machine.
    """
    with migration.phase("validate"):
        try:
            report = _report(migration, seconds=seconds, failed=failed or {}, different=different)
        except MigrationError:
            if failed:  # such as a `create` that was refused: that nothing is there to count follows from it
                raise next(iter(failed.values())) from None
            raise
        report = report.model_copy(update={"resources": resources})
        if report.status == "complete":
            keep_what_was_moved(migration, migration.ledger.receipts(migration.plan).values())
        migration.ledger.write_report(report.model_dump(mode="json"))
        migration.tell(
            "validated", records=report.records["verified"], bytes=report.bytes, message=report.status
        )
    return report


def _report(
    migration: Migration, *, seconds: float, failed: Mapping[str, Exception], different: int
) -> Report:
    plan, ledger = migration.plan, migration.ledger
    receipts = ledger.receipts(plan)
    rejects = list(ledger.rejects())
    all_verified = len(receipts) == len(plan.partitions)
    source_count, target_count = _counts(migration)
    checks = tuple(_checks(migration, receipts, target_count)) if all_verified else ()
    records = _records(receipts.values()) | {"different": different}
    if plan.on_existing == "skip":
        records["skipped"] = sum(receipt.skipped for receipt in receipts.values())
    within = records["rejected"] <= migration.config.max_rejects
    spent = seconds or sum(sum(receipt.seconds.values()) for receipt in receipts.values())
    return Report(
        status=_status(all_verified=all_verified, within=within, checks=checks),
        name=plan.name,
        generation=plan.generation,
        source={"address": plan.source, "count": source_count},
        target={"address": plan.target, "count": target_count},
        partitions={
            "total": len(plan.partitions),
            "verified": len(receipts),
            "failed": len(failed),
        },
        records=records,
        losses=plan.losses,
        checks=checks,
        rejects=tuple(rejects[:_SHOWN_REJECTS]),
        rejects_folder=str(ledger.rejects_folder) if rejects else None,
        errors=tuple(f"{key}: {error}" for key, error in sorted(failed.items())),
        digest=f"{batches.add_digests(int(receipt.digest, 16) for receipt in receipts.values()):032x}",
        bytes=sum(receipt.bytes for receipt in receipts.values()),
        seconds=spent,
        records_per_second=records["read"] / spent if spent else 0.0,
        changes=plan.changes,
    )


def require_complete(report: Report) -> None:
    """Raise where a report isn't complete.

    Raises
    ------
    SourceChangedError, IncompleteError
    """
    if report.status == "complete":
        return
    broken = [check for check in report.checks if not check.passed]
    what = "; ".join(f"{c.name}: expected {c.expected}, found {c.found}" for c in broken) or (
        f"{report.partitions['verified']} of {report.partitions['total']} partitions verified, "
        f"{report.records['rejected']} records rejected"
    )
    kind = SourceChangedError if any(c.name == "source unchanged" for c in broken) else IncompleteError
    raise kind(f"{report.name} is {report.status}: {what}", report=report.model_dump(mode="json"))


def _status(
    *, all_verified: bool, within: bool, checks: Iterable[Check]
) -> Literal["complete", "incomplete", "failed"]:
    if not all_verified or not within:
        return "incomplete"
    return "complete" if all(check.passed for check in checks) else "failed"


def _counts(migration: Migration) -> tuple[int, int]:
    plan = migration.plan
    source = migration.retry(lambda: migration.source.count(plan.source_collection), phase="validate")
    target = migration.retry(lambda: migration.target.count(plan.target_collection), phase="validate")
    return source, target


def _records(receipts: Iterable[Receipt]) -> dict[str, int]:
    names = ("read", "filtered", "loaded", "rejected", "verified")
    sums = dict.fromkeys(names, 0)
    for receipt in receipts:
        for name in names:
            sums[name] += getattr(receipt, name)
    return sums


def _checks(migration: Migration, receipts: Mapping[str, Receipt], target_count: int) -> Iterable[Check]:
    plan = migration.plan
    sums = _records(receipts.values())
    skipped = sum(receipt.skipped for receipt in receipts.values())
    in_scope = sums["read"] - sums["filtered"]
    yield _check("records in scope", plan.profile.records, in_scope)
    accounted = sums["rejected"] + skipped + sums["verified"]
    yield _check("read = filtered + rejected + verified", in_scope, accounted)
    low, high = _expected_count(plan, receipts, sums["verified"])
    yield Check(
        name="target count",
        passed=low <= target_count <= high,
        expected=str(low) if low == high else f"{low} to {high}",
        found=str(target_count),
    )
    unchanged = migration.source.fingerprint(plan.source_collection) == plan.source_fingerprint
    yield Check(
        name="source unchanged",
        passed=unchanged,
        expected="the source as it was planned",
        found="the same" if unchanged else "another: records came, went or changed; start afresh",
    )


def _expected_count(plan: Plan, receipts: Mapping[str, Receipt], verified: int) -> tuple[int, int]:
    """Return how many records the target holds at least and at most."""
    if plan.changes is not None:
        return _expected_after(plan, plan.changes, receipts)
    before = plan.target_count if plan.joins else 0
    if plan.on_existing == "merge":
        return max(before, verified), before + verified
    return before + verified, before + verified


def _expected_after(plan: Plan, changes: Changes, receipts: Mapping[str, Receipt]) -> tuple[int, int]:
    """Return the same of an incremental run; what earlier runs moved must be there too."""
    keys = {partition.key for partition in plan.partitions if partition.change == "new"}
    added = sum(receipt.verified for key, receipt in receipts.items() if key in keys)
    replaced = sum(receipt.verified for key, receipt in receipts.items() if key not in keys)
    gone = changes.deleted if changes.removes else 0
    low = plan.target_count + (added if plan.on_existing == "add" else 0) - gone
    return max(low, changes.unchanged + replaced + added), plan.target_count + added + changes.claimed


def _check(name: str, expected: int, found: int) -> Check:
    return Check(name=name, passed=expected == found, expected=str(expected), found=str(found))
