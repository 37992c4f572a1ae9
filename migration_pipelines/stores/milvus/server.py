"""What is asked of a Milvus server: collections, records by key and in the order of their keys, writes.

Every read is consistent with all writes before it (`Strong`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from migration_pipelines.errors import RecordRejectedError, TransientError
from migration_pipelines.stores.milvus.client import Client, mapping, pairs
from migration_pipelines.stores.milvus.columns import scalars
from migration_pipelines.stores.milvus.creation import NewCollection
from migration_pipelines.stores.milvus.errors import INPUT_CODES, MilvusRefusal
from migration_pipelines.stores.milvus.expressions import Key, among, beyond, chunks, everything
from migration_pipelines.stores.milvus.schema import Described, Kind, Layout

# Keys and offset together may be at most this many in an answer (quotaAndLimits.limits.maxQueryResultWindow).
KEYS_PAGE = 16_384
# Records: measured on Milvus Lite, half and double of it are slower.
PAGE = 500
_DELETE_KEYS = 5_000
_INDEX_NOT_FOUND = 700
_LITE_NO_INDEX = 11
_LOADED = 3  # LoadState.LoadStateLoaded
_POLL_SECONDS = 0.2


class Server:
    """A server, or Milvus Lite's in this process.

    Parameters
    ----------
    load_seconds
        How long reading a collection into the server's memory may take.
    """

    def __init__(self, client: Client, *, load_seconds: float) -> None:
        self.client = client
        self._load_seconds = load_seconds

    # ── collections ──────────────────────────────────────────────────────────────────────────────────

    def names(self) -> list[str]:
        """Return the names of all collections."""
        from pymilvus.grpc_gen import milvus_pb2

        reply = self.client.call("ShowCollections", milvus_pb2.ShowCollectionsRequest())
        return list(reply.collection_names)

    def describe(self, name: str, *, indexes: bool) -> Described:
        """Return what a collection, or one that an alias points at, is made of.

        Its `indexes` only where they are asked for: Milvus Lite counts all records to tell of them.
        """
        from pymilvus.grpc_gen import milvus_pb2

        reply = self.client.call(
            "DescribeCollection", milvus_pb2.DescribeCollectionRequest(collection_name=name)
        )
        found = reply.collection_name or name
        partitions = self.client.call(
            "ShowPartitions", milvus_pb2.ShowPartitionsRequest(collection_name=found)
        ).partition_names
        return Described(
            name=found,
            number=reply.collectionID,
            proto=reply.schema,
            indexes=self._indexes(found) if indexes else {},
            partitions=tuple(partitions),
            properties=mapping(reply.properties),
            n_shards=reply.shards_num,
        )

    def _indexes(self, name: str) -> dict[str, dict[str, str]]:
        from pymilvus.grpc_gen import milvus_pb2

        try:
            reply = self.client.call("DescribeIndex", milvus_pb2.DescribeIndexRequest(collection_name=name))
        except MilvusRefusal as error:
            if error.code == _INDEX_NOT_FOUND or error.legacy_code == _LITE_NO_INDEX:
                return {}
            raise
        return {index.field_name: mapping(index.params) for index in reply.index_descriptions}

    def create(self, made: NewCollection) -> None:
        """Create a collection with its search indexes."""
        from pymilvus.grpc_gen import common_pb2, milvus_pb2

        name = made.proto.name
        request = milvus_pb2.CreateCollectionRequest(
            collection_name=name,
            schema=made.proto.SerializeToString(),
            shards_num=made.n_shards,
            consistency_level=common_pb2.ConsistencyLevel.Strong,
            properties=pairs(made.properties),
        )
        self.client.call("CreateCollection", request)
        for field, params in made.indexes.items():
            request = milvus_pb2.CreateIndexRequest(
                collection_name=name, field_name=field, extra_params=pairs(params)
            )
            self.client.call("CreateIndex", request)

    def create_partition(self, name: str, partition: str) -> None:
        """Create a partition that isn't there yet."""
        from pymilvus.grpc_gen import milvus_pb2

        self.client.call(
            "CreatePartition",
            milvus_pb2.CreatePartitionRequest(collection_name=name, partition_name=partition),
        )

    def drop(self, name: str) -> None:
        """Remove a collection, and the aliases that point at it, which Milvus asks for."""
        from pymilvus.grpc_gen import milvus_pb2

        for alias in self.aliases(name):
            self.client.call("DropAlias", milvus_pb2.DropAliasRequest(alias=alias))
        self.client.call("DropCollection", milvus_pb2.DropCollectionRequest(collection_name=name))

    def flush(self, name: str) -> None:
        """Seal what was written, so that its search index is built."""
        from pymilvus.grpc_gen import milvus_pb2

        self.client.call("Flush", milvus_pb2.FlushRequest(collection_names=[name]))

    def load(self, found: Described) -> None:
        """Have the collection in the server's memory, which nothing is read without.

        Raises
        ------
        TransientError
            It takes longer than it may.
        """
        from pymilvus.grpc_gen import milvus_pb2

        asked = milvus_pb2.GetLoadStateRequest(collection_name=found.name)
        if self.client.call("GetLoadState", asked).state == _LOADED:
            return
        self.client.call("LoadCollection", milvus_pb2.LoadCollectionRequest(collection_name=found.name))
        until = time.monotonic() + self._load_seconds
        while self.client.call("GetLoadState", asked).state != _LOADED:
            if time.monotonic() > until:
                raise TransientError(
                    f"milvus: {found.name} is not loaded within {self._load_seconds:g} s; try again later"
                )
            time.sleep(_POLL_SECONDS)

    # ── aliases ──────────────────────────────────────────────────────────────────────────────────────

    def aliases(self, name: str) -> list[str]:
        """Return the aliases of a collection, without their database."""
        from pymilvus.grpc_gen import milvus_pb2

        reply = self.client.call("ListAliases", milvus_pb2.ListAliasesRequest(collection_name=name))
        return sorted(reply.aliases)

    def all_aliases(self) -> list[str]:
        """Return all aliases."""
        from pymilvus.grpc_gen import milvus_pb2

        return list(self.client.call("ListAliases", milvus_pb2.ListAliasesRequest()).aliases)

    def set_alias(self, alias: str, name: str) -> None:
        """Point an alias at a collection, atomically."""
        from pymilvus.grpc_gen import milvus_pb2

        is_there = alias in self.all_aliases()
        kind = milvus_pb2.AlterAliasRequest if is_there else milvus_pb2.CreateAliasRequest
        method = "AlterAlias" if is_there else "CreateAlias"
        self.client.call(method, kind(collection_name=name, alias=alias))

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def count(self, found: Described, layout: Layout, partition: str | None) -> int:
        """Return how many records a collection or a partition holds; a key that is there twice is two."""
        self.load(found)
        field = layout.key.name
        expression = "" if partition is None else everything(field, is_text=layout.key_is_text)
        (column,) = self._query(found, expression, ["count(*)"], partition).fields_data
        return int(column.scalars.long_data.data[0])

    def keys(self, found: Described, layout: Layout, partition: str | None) -> Iterator[list[Key]]:
        """Yield the keys of a collection or a partition in ascending order, page by page, each once.

        After the last key of a page: records that come or go meanwhile move none of the others.
        """
        self.load(found)
        last: Key | None = None
        while True:
            expression = beyond(layout.key.name, last)
            ordered = {"limit": KEYS_PAGE, "iterator": "True", "reduce_stop_for_best": "True"}
            reply = self._query(found, expression, [layout.key.name], partition, ordered)
            keys = [
                key
                for data in reply.fields_data
                if data.field_name == layout.key.name
                for key in scalars(data)
            ]
            if keys:
                yield keys
            if len(keys) < KEYS_PAGE:
                return
            last = keys[-1]

    def records(
        self,
        found: Described,
        layout: Layout,
        keys: Sequence[Key],
        partition: str | None,
        *,
        vectors: bool,
    ) -> Sequence[Any]:
        """Return the columns of the records of at most a page of keys, in any order."""
        fields = [layout.key.name, *layout.output_fields(vectors=vectors)]
        return self._query(found, among(layout.key.name, keys), fields, partition).fields_data  # type: ignore[no-any-return]

    def held(self, found: Described, layout: Layout, keys: Sequence[Key], partition: str | None) -> set[Key]:
        """Return which of these keys are there."""
        held: set[Key] = set()
        for part in chunks(keys, KEYS_PAGE):
            columns = self._query(
                found, among(layout.key.name, part), [layout.key.name], partition
            ).fields_data
            held.update(
                key for data in columns if data.field_name == layout.key.name for key in scalars(data)
            )
        return held

    def _query(
        self,
        found: Described,
        expression: str,
        fields: Sequence[str],
        partition: str | None,
        params: Mapping[str, Any] | None = None,
    ) -> Any:
        from pymilvus.grpc_gen import common_pb2, milvus_pb2

        request = milvus_pb2.QueryRequest(
            collection_name=found.name,
            expr=expression,
            output_fields=fields,
            partition_names=[] if partition is None else [partition],
            use_default_consistency=False,
            consistency_level=common_pb2.ConsistencyLevel.Strong,
            query_params=pairs(params or {}),
        )
        return self.client.call("Query", request)

    def search(
        self,
        found: Described,
        field: str,
        vector: bytes,
        *,
        metric: str,
        limit: int,
        partition: str | None,
    ) -> Any:
        """Return the nearest keys and their scores, as Milvus's `SearchResultData`."""
        from pymilvus.grpc_gen import common_pb2, milvus_pb2

        self.load(found)
        place = common_pb2.PlaceholderValue(tag="$0", type=Kind.FLOAT_VECTOR, values=[vector])
        request = milvus_pb2.SearchRequest(
            collection_name=found.name,
            placeholder_group=common_pb2.PlaceholderGroup(placeholders=[place]).SerializeToString(),
            partition_names=[] if partition is None else [partition],
            dsl_type=common_pb2.DslType.BoolExprV1,
            nq=1,
            use_default_consistency=False,
            consistency_level=common_pb2.ConsistencyLevel.Strong,
            search_params=pairs(
                {
                    "anns_field": field,
                    "topk": limit,
                    "metric_type": metric,
                    "params": "{}",
                    "round_decimal": -1,
                }
            ),
        )
        return self.client.call("Search", request).results

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────

    def replace(self, found: Described, partition: str, data: Sequence[Any], n_records: int) -> None:
        """Write whole records, each in place of what is under its key.

        Milvus's `insert` of a key that is there makes a second record, and its `upsert` replaces; in Milvus
        Lite `insert` replaces, and `upsert` keeps old dynamic fields.

        Raises
        ------
        RecordRejectedError
            Milvus finds fault with what some record holds.
        TransientError
            It doesn't say that it wrote all of them.
        """
        from pymilvus.grpc_gen import milvus_pb2

        kind = milvus_pb2.InsertRequest if self.client.is_lite else milvus_pb2.UpsertRequest
        request = kind(
            collection_name=found.name, partition_name=partition, fields_data=data, num_rows=n_records
        )
        try:
            with self.client.writing:
                reply = self.client.call("Insert" if self.client.is_lite else "Upsert", request)
        except MilvusRefusal as error:
            if error.code in INPUT_CODES:
                raise RecordRejectedError(f"milvus: {found.name}: {error}; mend the record") from None
            raise
        written = reply.insert_cnt if self.client.is_lite else reply.upsert_cnt
        if written != n_records or reply.err_index:
            raise TransientError(
                f"milvus: {found.name}: {n_records} records were sent and {written} acknowledged, "
                f"{len(reply.err_index)} of them refused; write them again",
                expected=n_records,
                found=written,
            )

    def delete(self, found: Described, layout: Layout, keys: Sequence[Key], partition: str | None) -> None:
        """Remove the records of these keys; those that aren't there are no error."""
        from pymilvus.grpc_gen import common_pb2, milvus_pb2

        for part in chunks(keys, _DELETE_KEYS):
            request = milvus_pb2.DeleteRequest(
                collection_name=found.name,
                partition_name=partition or "",
                expr=among(layout.key.name, part),
                consistency_level=common_pb2.ConsistencyLevel.Strong,
            )
            with self.client.writing:
                self.client.call("Delete", request)

    def close(self) -> None:
        """Close the channel."""
        self.client.close()
