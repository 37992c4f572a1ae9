"""The verify phase: one partition read back from the target and compared record by record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import reduce

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines import batch as batches
from migration_pipelines.batch import ID, NAMESPACE
from migration_pipelines.errors import VerificationError
from migration_pipelines.migration import Migration
from migration_pipelines.model import Receipt, Value
from migration_pipelines.sync import sum_up_moved
from migration_pipelines.transform import EXTRACTED, require_staged, staged_phase

_SHOWN = 20


class Difference(Value):
    """A record that isn't in the target as it was staged."""

    id: str
    what: str  # "missing", or the columns that differ
    namespace: str = ""


def verify(migration: Migration, key: str) -> Receipt:
    """Read one partition back from the target, compare it with what was staged, and leave the receipt.

    Raises
    ------
    VerificationError
        Something is missing or differs; the staged batches stay, so that loading again is possible.
    """
    done = migration.ledger.receipt(key)
    if done is not None:
        return done
    with migration.phase("verify", key):
        return _verify(migration, key)


def _verify(migration: Migration, key: str) -> Receipt:
    plan, ledger, started = migration.plan, migration.ledger, time.monotonic()
    extracted = require_staged(migration, key, EXTRACTED)
    staged = require_staged(migration, key, staged_phase(plan))
    rejected = ledger.rejected_ids(f"{key}.load")
    skipped = ledger.skipped_ids(key)
    left_out = [rejected] if skipped is None else [rejected, skipped]
    verified, different, examples = 0, 0, list[Difference]()
    for batch in ledger.staged_batches(key, staged_phase(plan)):
        expected = reduce(batches.without, left_out, batch)
        for part in batches.split(expected, max_records=migration.config.batch_size, max_bytes=None):
            found = _read_back(migration, key, part)
            differences = list(compare(part, found, tolerance=_tolerance(migration)))
            verified += part.num_rows - len(differences)
            different += len(differences)
            examples += differences[: _SHOWN - len(examples)]
            migration.tell("batch-verified", partition=key, records=part.num_rows, bytes=part.nbytes)
    if different:
        raise _failure(migration, key, different, examples)
    receipt = Receipt(
        key=key,
        read=extracted.read,
        filtered=extracted.filtered,
        rejected=staged.rejected + rejected.num_rows,
        skipped=0 if skipped is None else skipped.num_rows,
        loaded=verified,
        verified=verified,
        bytes=extracted.bytes,
        digest=extracted.digest,
        mark=extracted.mark,
        seconds={"extract": extracted.seconds, "verify": time.monotonic() - started},
    )
    _check_sum(receipt, migration)
    sum_up_moved(migration, key, left_out)
    ledger.write_receipt(receipt)
    ledger.discard_staged(key)
    migration.tell(
        "verified", partition=key, records=verified, bytes=receipt.bytes, seconds=receipt.seconds["verify"]
    )
    return receipt


def _read_back(migration: Migration, key: str, part: pa.RecordBatch) -> pa.RecordBatch:
    ids = batches.ids_of(part)
    collection = migration.plan.target_collection
    return migration.retry(
        lambda: migration.target.read_part(collection, key, ids), phase="verify", partition=key
    )


def _tolerance(migration: Migration) -> float:
    return migration.target.vector_tolerance(migration.plan.target_schema)


def compare(expected: pa.RecordBatch, found: pa.RecordBatch, *, tolerance: float) -> Iterator[Difference]:
    """Yield each record of `expected` that is missing in `found` or differs from it.

    Vectors are compared bit for bit, or where the store states a tolerance, by the distance of each
    component relative to the vector's largest; all else exactly.
    """
    ordered, missing = batches.take_by_id(found, expected)
    yield from (_difference(expected, int(row), "missing") for row in np.flatnonzero(missing))
    there = expected.filter(pa.array(~missing)) if missing.any() else expected
    differs: dict[int, list[str]] = {}
    for name in there.schema.names:
        same = _same(there.column(name), ordered.column(name), tolerance=tolerance)
        for row in map(int, np.flatnonzero(~same)):
            differs.setdefault(row, []).append(name)
    for row, names in sorted(differs.items()):
        yield _difference(there, row, ", ".join(names))


def _difference(batch: pa.RecordBatch, row: int, what: str) -> Difference:
    names = batches.ids_of(batch.slice(row, 1)).to_pylist()[0]
    return Difference(id=names[ID], what=what, namespace=names.get(NAMESPACE) or "")


def _same(left: pa.Array, right: pa.Array, *, tolerance: float) -> npt.NDArray[np.bool_]:
    """Return bool[n_records]: where two columns agree; null agrees with null alone."""
    nulls, other_nulls = np.asarray(left.is_null()), np.asarray(right.is_null())
    if batches.is_dense(left) and left.type == right.type:
        a, b = batches.dense_matrix(left), batches.dense_matrix(right)
        equal = _bitwise(a, b) if not tolerance else _near(a, b, tolerance)
    elif pa.types.is_string(left.type):
        equal = pc.equal(left, right).fill_null(fill_value=False).to_numpy(zero_copy_only=False)
    else:
        equal = np.fromiter(
            (x == y for x, y in zip(left.to_pylist(), right.to_pylist(), strict=True)), bool, len(left)
        )
    return np.where(nulls | other_nulls, nulls & other_nulls, equal)


def _bitwise(a: npt.NDArray[np.generic], b: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    width = f"u{a.dtype.itemsize}"
    return np.asarray((a.view(width) == b.view(width)).all(axis=1))


def _near(a: npt.NDArray[np.generic], b: npt.NDArray[np.generic], tolerance: float) -> npt.NDArray[np.bool_]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    scale = np.abs(x).max(axis=1, keepdims=True, initial=0.0)
    return np.asarray((np.abs(x - y) <= tolerance * scale).all(axis=1))


def _failure(migration: Migration, key: str, different: int, examples: list[Difference]) -> VerificationError:
    plan = migration.plan
    first = "; ".join(f"{item.id!r}: {item.what}" for item in examples[:3])
    return VerificationError(
        f"{plan.target}: partition {key}: {different} records differ from what was staged ({first}); "
        "run it again to load and compare it anew",
        partition=key,
        different=different,
        examples=[item.model_dump() for item in examples],
    )


def _check_sum(receipt: Receipt, migration: Migration) -> None:
    """G3: nothing that was read may be unaccounted for."""
    accounted = receipt.filtered + receipt.rejected + receipt.skipped + receipt.loaded
    if receipt.read != accounted:
        raise VerificationError(
            f"{migration.plan.target}: partition {receipt.key}: {receipt.read} records were read, "
            f"{accounted} are accounted for",
            partition=receipt.key,
        )
