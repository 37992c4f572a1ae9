"""Collections whose user chooses the shard of each point by a key (`sharding_method` "custom").

A point's key travels as a metadata field of its own, `_source_shard_key`, and says where it goes in a target
that is sharded likewise. Elsewhere it is a field as any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from migration_pipelines import batch as batches
from migration_pipelines.errors import RecordRejectedError
from migration_pipelines.metadata import dump_metadata, load_metadata
from migration_pipelines.model import CollectionSchema
from migration_pipelines.stores.qdrant.collection import OPTIONS
from migration_pipelines.stores.qdrant.points import SHARD_KEY


def is_sharded_by_key(schema: CollectionSchema) -> bool:
    """Whether each point of the collection needs the key of its shard."""
    return bool(schema.options.get(OPTIONS, {}).get("sharding_method") == "custom")


def by_shard(batch: pa.RecordBatch, *, where: str) -> Iterator[tuple[Any, pa.RecordBatch]]:
    """Yield the records of each shard with its key, which is taken out of their metadata.

    Raises
    ------
    RecordRejectedError
        A record has no key.
    """
    rows = defaultdict[Any, list[int]](list)
    texts = []
    for row, text in enumerate(batch.column(batches.METADATA).to_pylist()):
        fields = load_metadata(text or "{}")
        key = fields.pop(SHARD_KEY, None)
        if type(key) not in (int, str):
            raise RecordRejectedError(
                f"{where} is sharded by key, and the record {batch.column(batches.ID)[row]} has none; put a "
                f"number or text into its metadata field {SHARD_KEY!r}",
                expected=SHARD_KEY,
            )
        rows[key].append(row)
        texts.append(dump_metadata(fields))
    at = batch.schema.names.index(batches.METADATA)
    batch = batch.set_column(at, batches.METADATA, pa.array(texts, pa.string()))
    for key, members in rows.items():
        yield key, batch.take(pa.array(np.array(members)))
