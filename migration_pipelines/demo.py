"""The main job on engines that come with the package: a Chroma folder moves into PostgreSQL.

Everything lies in one home of its own, so that it can be looked at afterwards and thrown away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from migration_pipelines import batch as batches
from migration_pipelines.components.declared import NAME_TAG
from migration_pipelines.components.headless import run_declared
from migration_pipelines.components.home import dagster_home
from migration_pipelines.components.internals import newest_backfill
from migration_pipelines.declarations import MIGRATION
from migration_pipelines.migration import Listener, ignore
from migration_pipelines.model import CollectionSchema, IdKind, Metric, VectorField
from migration_pipelines.postgres import postgres
from migration_pipelines.stores.chroma import ChromaStore
from migration_pipelines.stores.pgvector import PgVectorStore
from migration_pipelines.validate import Report

SAMPLE = Path(__file__).parent / "data" / "python_docs_minilm.parquet"
NAME = "demo"
COLLECTION = "python_docs"
_PARTITION_SIZE = 1_000
_BATCH_RECORDS = 1_000


def run_demo(*, home: Path, tell: Callable[[str], None], listener: Listener = ignore) -> Report:
    """Make a Chroma collection from the sample, move it into PostgreSQL as a Dagster backfill, report.

    Parameters
    ----------
    home
        The demo's own home: its Chroma folder, its PostgreSQL, its declaration, ledger and Dagster history.
    tell
        Is told what is done, a line each.
    """
    with engines(home) as target:
        tell(f"writing the sample, real passages with real embeddings, into Chroma: {home / 'chroma'}")
        make_source(home / "chroma")
        tell(f"moving it into PostgreSQL, as a backfill of partitions of {_PARTITION_SIZE:,}")
        _declare(home, target)
        return run_declared(NAME, defs=home / "defs", home=home, fresh=True, listener=listener)


def page_of_run(home: Path) -> str:
    """Return the path of the UI's page that shows the demo's last run."""
    backfill = newest_backfill(dagster_home(home), {NAME_TAG: NAME})
    return f"/runs/b/{backfill}" if backfill else "/runs"


@contextmanager
def engines(home: Path) -> Iterator[PgVectorStore]:
    """Yield the demo's target, its server running."""
    with postgres(home / "postgres") as url:
        target = PgVectorStore.from_url(url)
        if target.password is not None:
            # The declaration names no password: the runs find it where every run does.
            os.environ.setdefault("PGVECTOR_PASSWORD", target.password.get_secret_value())
        yield target


def make_source(folder: Path) -> None:
    """Make the Chroma folder from the sample; one that is there is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    store = ChromaStore(path=str(folder))
    sample = pq.read_table(SAMPLE).combine_chunks()
    vector = VectorField(dimensions=sample.schema.field(batches.VECTOR).type.list_size, metric=Metric.COSINE)
    schema = CollectionSchema(name=COLLECTION, vectors=(vector,), id_kinds=frozenset({IdKind.STR}))
    store.create(schema)
    for part in sample.to_batches(max_chunksize=_BATCH_RECORDS):
        kinds = batches.constant(IdKind.STR.value, part.num_rows)
        columns = {**{name: part.column(name) for name in part.schema.names}, batches.ID_TYPE: kinds}
        layout = batches.arrow_schema(schema)
        arrays = [columns[item.name].cast(item.type) for item in layout]
        store.upsert(COLLECTION, pa.RecordBatch.from_arrays(arrays, schema=layout))
    store.close()


def _declare(home: Path, target: PgVectorStore) -> None:
    attributes = {
        "name": NAME,
        "source": ChromaStore(path=str(home / "chroma")).address(COLLECTION),
        "target": target.address(COLLECTION),
        "partition_size": _PARTITION_SIZE,
        "on_existing": "replace",
    }
    path = home / "defs" / NAME / "defs.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"type": MIGRATION, "attributes": attributes}, sort_keys=False))
