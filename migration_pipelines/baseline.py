"""The baseline: what names and sums up each record that complete runs have left in the target.

One file of the ledger, `baseline.arrow`: by record its id, the kind of that, its namespace, and the digest of
what the source held. The number of a batch is that of its bucket; the file's own metadata says whose it is.

An incremental run moves what differs from the baseline. It is replaced when a run is complete, in one step,
and not before. What a run adds is claimed before it is written: after a crash nobody could tell the records
that the run wrote from those of others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pyarrow as pa

from migration_pipelines.buckets import N_BUCKETS, Buckets, one_batch, without
from migration_pipelines.ledger import NAMES, SUMMED_UP, Ledger, write_batches
from migration_pipelines.model import Value

_ABOUT = b"baseline"


class Baseline(Value):
    """Whose baseline it is, and by what it was made.

    `mark` is the greatest value of the field `watermark` among the records, as metadata of that one field.
    """

    generation: int
    source: str
    target: str
    id_strategy: str
    schema_mapping: str | None
    watermark: str | None = None
    mark: str | None = None

    def is_of(self, source: str, target: str) -> bool:
        """Whether it tells of a move between these addresses."""
        return (self.source, self.target) == (source, target)


def read_baseline(ledger: Ledger) -> Baseline | None:
    """Return what the last complete run has left; None where there was none."""
    path = _file(ledger)
    if not path.exists():
        return None
    with pa.memory_map(str(path)) as source:
        return Baseline.model_validate_json(pa.ipc.open_file(source).schema.metadata[_ABOUT])


def forget_baseline(ledger: Ledger) -> None:
    """Remove it, and all claims: the target is about to be written by a run that doesn't build on it."""
    _file(ledger).unlink(missing_ok=True)
    ledger.settle_claims(NAMES.empty_table())


def baseline_rows(ledger: Ledger, bucket: int) -> pa.Table:
    """Return the rows of one bucket; none where there is no baseline."""
    path = _file(ledger)
    if not path.exists():
        return SUMMED_UP.empty_table()
    with pa.memory_map(str(path)) as source:
        found = pa.Table.from_batches([pa.ipc.open_file(source).get_batch(bucket)])
    return found.replace_schema_metadata(None)


def keep_baseline(
    ledger: Ledger, found: Baseline, moved: Iterable[pa.Table], gone: Iterable[pa.Table]
) -> None:
    """Replace the baseline by one that has these records moved and those gone.

    Parameters
    ----------
    found
        Whose it is.
    moved
        Rows of `SUMMED_UP` of what the run has left in the target.
    gone
        Rows of `NAMES` of what it has removed from there.
    """
    schema = SUMMED_UP.with_metadata({_ABOUT: found.model_dump_json().encode()})
    with tempfile.TemporaryDirectory(dir=ledger.scratch) as folder:
        later = Buckets(Path(folder) / "later", SUMMED_UP)
        with later.writing() as put:
            for table in chain(moved, map(undigested, gone)):
                for batch in table.to_batches():
                    put(batch)
        write_batches(_file(ledger), schema, (_merged(ledger, later, bucket) for bucket in range(N_BUCKETS)))


def _merged(ledger: Ledger, later: Buckets, bucket: int) -> pa.RecordBatch:
    new = later.read(bucket)
    kept = without(baseline_rows(ledger, bucket), new)
    return one_batch(pa.concat_tables([kept, new.filter(new["digest"].is_valid())]))


def undigested(names: pa.Table) -> pa.Table:
    """Return rows of `SUMMED_UP` for names, their digests null."""
    return names.append_column(SUMMED_UP.field("digest"), pa.nulls(len(names), pa.binary(16)))


def _file(ledger: Ledger) -> Path:
    return ledger.folder / "baseline.arrow"
