"""Frozen values that the whole project speaks in."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Value(BaseModel):
    """A frozen value: keyword-only, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class IdKind(StrEnum):
    """A record id is one of these; `1` and `"1"` are different ids."""

    INT = "int"
    UUID = "uuid"
    STR = "str"


class VectorKind(StrEnum):
    """What a vector field holds for one record."""

    DENSE = "dense"
    SPARSE = "sparse"
    MULTI = "multi"


class DType(StrEnum):
    """Element type of a vector. `bit` packs eight dimensions into a byte, most significant first."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    UINT8 = "uint8"
    BIT = "bit"


class Metric(StrEnum):
    """Distance by which a vector field is searched."""

    COSINE = "cosine"
    DOT = "dot"
    EUCLIDEAN = "euclidean"
    MANHATTAN = "manhattan"
    HAMMING = "hamming"
    JACCARD = "jaccard"


class ValueKind(StrEnum):
    """Finest classes of a metadata value that some store treats differently.

    A store declares the kinds that come back from it exactly; `metadata.value_kinds` says
    which kinds a value is made of.
    """

    TEXT = "text"
    EMPTY_TEXT = "empty-text"
    NUL_TEXT = "nul-text"  # holds U+0000
    BOOL = "bool"
    INT53 = "int53"  # |n| <= 2**53
    INT64 = "int64"
    UINT64 = "uint64"
    BIG_INT = "big-int"
    SHORT_FLOAT = "short-float"  # at most 15 digits, |exponent| <= 22: survives any decimal parser
    FLOAT = "float"  # any other finite double
    INTEGRAL_FLOAT = "integral-float"  # 1e16 and above: some stores give back an integer
    NEGATIVE_ZERO = "negative-zero"
    NON_FINITE = "non-finite"
    NULL = "null"
    OBJECT = "object"
    LIST_OF_TEXT = "list-of-text"
    LIST_OF_NUMBERS = "list-of-numbers"  # all int or all float
    LIST_OF_BOOLS = "list-of-bools"
    MIXED_LIST = "mixed-list"  # several types, nested, or with nulls
    EMPTY_LIST = "empty-list"
    DATETIME = "datetime"
    DECIMAL = "decimal"
    BYTES = "bytes"
    NO_FIELDS = "no-fields"  # metadata that is {}, where a store can't tell it from none


class VectorField(Value):
    """One named array of a record; the unnamed one is the default vector.

    `dimensions` is None for a sparse vector without a bound. `index` holds the search index that
    travels with the field, in the field's common words: `{"type": "hnsw", "m": 16, "ef_construction": 100}`
    or `{"type": "ivf", "lists": 100}`; empty means the store's default.
    """

    name: str = ""
    kind: VectorKind = VectorKind.DENSE
    dtype: DType = DType.FLOAT32
    dimensions: int | None
    metric: Metric | None = None
    index: Mapping[str, Any] = Field(default_factory=dict)


# Key in a schema's options: why the vectors that are read aren't those that were put in, as from a quantised
# index. Plan declares it as a loss.
APPROXIMATE = "approximate_vectors"


class CollectionSchema(Value):
    """What a collection is made of, beside its records.

    `id_kinds` are the kinds that the collection can or does hold. `properties` is the user's own
    metadata of the collection; `options` what only the store itself understands.
    """

    name: str
    vectors: tuple[VectorField, ...]
    id_kinds: frozenset[IdKind]
    has_documents: bool = True
    has_namespaces: bool = False
    properties: Mapping[str, Any] = Field(default_factory=dict)
    options: Mapping[str, Any] = Field(default_factory=dict)


class Capabilities(Value):
    """What a store can hold and do. Every field is declared by every store.

    `max_*` are None where the store documents no limit.
    """

    id_kinds: frozenset[IdKind]
    mixed_ids: bool  # ids of several kinds in one collection stay different
    max_id_bytes: int | None
    empty_ids: bool  # a text id may be empty
    id_text_refuses: str  # characters that a string id can't hold
    vector_kinds: frozenset[VectorKind]
    dtypes: frozenset[DType]
    max_dimensions: int | None
    named_vectors: bool
    missing_vectors: bool  # a record may have no vector
    non_finite_vectors: bool
    metrics: frozenset[Metric]
    documents: bool
    document_refuses: str  # characters that a document can't hold
    value_kinds: frozenset[ValueKind]  # metadata that comes back exactly
    no_metadata: bool  # a record without metadata stays different from one with {}
    namespaces: bool
    deletes: bool
    aliases: bool
    stable_scan: bool  # spans hold while others write
    conditional_write: bool
    filter_operators: frozenset[str]  # answered natively, by a superset of the right records
    max_batch_records: int | None
    max_batch_bytes: int | None
    round_trip: Mapping[str, str]  # for people: what comes back changed, and how


class Span(Value):
    """One part of a collection, fixed for good when the plan is frozen.

    `bounds` is JSON that only the store that made it reads. Where a span is a list of ids, it
    lies in a file of the ledger, and `ids_file` names it.
    """

    bounds: Mapping[str, Any] = Field(default_factory=dict)
    records: int
    ids_file: str | None = None


class Loss(Value):
    """A change that the target forces on data, counted from the data before anything is written.

    `kept` says where the original is kept, if it is: such a change is undone when the collection
    is read again by this tool, and it doesn't stop a plan.
    """

    field: str
    kind: str
    count: int
    detail: str
    kept: str | None = None
    accepted: bool = False


class Partition(Value):
    """One independently resumable part of a plan; its key is also the Dagster partition key."""

    key: str
    span: Span
    change: Literal["new", "changed"] | None = None  # by an incremental plan: the span is a list of ids


class Changes(Value):
    """What an incremental plan found since the last complete run.

    `claimed` of the changed records may have been added by a run that wasn't completed, or not; `removes`
    says whether the deleted ones are removed from the target.
    """

    new: int
    changed: int
    claimed: int
    unchanged: int
    deleted: int
    removes: bool


class Profile(Value):
    """What a whole collection holds, counted record by record without its vectors.

    `fields` counts the kinds of value (`ValueKind`) by metadata field, things inside lists and objects
    under the field that holds them; `present` the records in which a field is there and not null. `bytes`
    are those of the batches, vectors included.
    """

    records: int
    bytes: int
    id_kinds: Mapping[str, int]
    awkward_ids: int  # ids that the target can't hold as they are
    duplicate_ids: int
    repeated_ids: int = 0  # records whose id stands in another namespace too
    documents: int
    refused_documents: int  # documents with a character that the target refuses
    with_metadata: int
    empty_metadata: int
    fields: Mapping[str, Mapping[str, int]]
    present: Mapping[str, int] = Field(default_factory=dict)
    namespaces: Mapping[str, int]
    missing_vectors: int  # counted only where source and target differ in what they take
    non_finite_vectors: int  # likewise
    norms: tuple[float, float] | None  # least and greatest, of a sample
    sample_read_records_per_second: float


class Estimate(Value):
    """How long a migration will take and how much it moves, from a sample of the source."""

    seconds: float
    records_per_second: float
    bytes: int
    staging_bytes: int
    basis: str


class Plan(Value):
    """The frozen decision: everything that must not change between two attempts at a migration."""

    generation: int
    name: str
    config_digest: str
    config: Mapping[str, Any]
    source: str
    source_collection: str
    source_schema: CollectionSchema
    source_fingerprint: str
    target: str
    target_collection: str
    target_schema: CollectionSchema
    target_exists: bool
    target_count: int  # records in the target before
    on_existing: str
    where: Any  # the filter in its JSON form
    id_strategy: str
    encodes: bool  # whether metadata or ids of some records need the envelope
    profile: Profile
    losses: tuple[Loss, ...]
    warnings: tuple[str, ...]
    estimate: Estimate
    partitions: tuple[Partition, ...]
    schema_mapping: str | None = None  # the digest of the user's own mapping
    mapped_schema: CollectionSchema | None = None  # of the source's records after it
    changes: Changes | None = None  # of an incremental plan, whose profile and partitions are of what changed

    @property
    def moved_schema(self) -> CollectionSchema:
        """Schema of the records that are moved: the source's, after the user's own mapping."""
        return self.mapped_schema or self.source_schema

    @property
    def migration_id(self) -> str:
        """What names this plan in logs, traces and the tags of Dagster's runs: short, stable, no secret."""
        return f"{self.config_digest[:12]}-g{self.generation}"

    @property
    def joins(self) -> bool:
        """Whether the records go beside those that the target holds already."""
        return self.on_existing in ("merge", "skip", "add") and self.target_count > 0


class Receipt(Value):
    """The proof of one partition: read = filtered + rejected + skipped + loaded, and loaded = verified.

    `skipped` records were left as the target held them, since their ids were in it before.

    `digest` is that of the source's records in scope, as hexadecimal text; it is order-independent,
    and the digests of partitions add up to that of the collection.
    """

    key: str
    read: int
    filtered: int
    rejected: int
    skipped: int = 0
    loaded: int
    verified: int
    bytes: int
    digest: str
    seconds: Mapping[str, float]
    mark: str | None = None  # the greatest watermark that was read
