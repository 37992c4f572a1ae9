"""The plan phase: refuse or accept, map the schema, list the losses, estimate, and freeze it all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from migration_pipelines import filters
from migration_pipelines.baseline import Baseline
from migration_pipelines.batch import ID
from migration_pipelines.envelope import RESERVED, decode
from migration_pipelines.errors import (
    CollectionNotFoundError,
    ConfigurationError,
    LossNotAcceptedError,
    SourceChangedError,
    TargetNotEmptyError,
)
from migration_pipelines.inspect import ProfileCounter, Sample, take_sample
from migration_pipelines.mapping import (
    IdStrategy,
    check_existing,
    check_namespaces,
    choose_id_strategy,
    find_losses,
    ids_in_target,
    keeps_namespaces,
    map_schema,
)
from migration_pipelines.migration import Migration
from migration_pipelines.model import (
    Changes,
    CollectionSchema,
    Estimate,
    IdKind,
    Loss,
    Partition,
    Plan,
    Profile,
)
from migration_pipelines.store import Address, Store
from migration_pipelines.sync import (
    baseline_of,
    change_partitions,
    compared,
    is_done,
    on_existing,
)

_SHOWN = 5  # ids in a message


def make_plan(migration: Migration, *, fresh: bool = False) -> Plan:
    """Return the frozen plan; make it where there is none, or where a fresh one is asked for.

    An incremental migration whose plan is complete is planned anew: with what changed since.

    Nothing is written but the ledger. The source is read whole, without its vectors, so that losses are
    counted and ids proven distinct before anything reaches the target.

    Raises
    ------
    PlanChangedError
        There is a plan, made from another configuration.
    CollectionNotFoundError, DimensionMismatchError, ConfigurationError
        The move can't be made.
    TargetNotEmptyError
        The target holds records, and nothing was said of those; or `add` was asked for and ids are taken.
    LossNotAcceptedError
        The target would change data in a way that was not accepted.
    SourceChangedError
        The source changed while it was counted.
    """
    previous = migration.ledger.plan()
    if previous is not None and not fresh and not _asks_what_changed(migration, previous):
        migration.check_unchanged(previous)
        return previous
    with migration.phase("plan"):
        migration.__dict__.pop("plan", None)
        made = draft(migration, generation=previous.generation + 1 if previous else 1, keep=True)
        check_losses(made)
        check_free(migration, made)
        migration.ledger.write_plan(made)
        found = migration.plan  # as it was frozen
        migration.tell("planned", records=found.profile.records, bytes=found.profile.bytes)
    return found


def _asks_what_changed(migration: Migration, plan: Plan) -> bool:
    return migration.config.incremental and is_done(migration, plan)


@dataclass(frozen=True)
class _Scope:
    """What is to be moved. `id_kinds` and `repeated_ids` are those of the whole collection."""

    partitions: tuple[Partition, ...]
    profile: Profile
    sample: Sample
    id_kinds: frozenset[IdKind]
    repeated_ids: int
    changes: Changes | None = None


def draft(migration: Migration, *, generation: int = 1, keep: bool = False) -> Plan:
    """Return the plan that would be frozen, its losses accepted or not; only `keep` writes span files.

    Begun again, as the configuration says, where a store can't answer for a moment.
    """
    begin = partial(_draft, migration, generation=generation, keep=keep)
    return migration.retry(begin, phase="plan")


def _draft(migration: Migration, *, generation: int, keep: bool) -> Plan:
    config, source, target = migration.config, migration.source, migration.target
    collection, wanted = migration.source_collection, migration.target_collection
    fingerprint = source.fingerprint(collection)
    schema = source.describe(collection)
    baseline = baseline_of(migration)
    existing, count = _existing_target(migration, baseline)
    if existing is None:
        baseline = None  # nothing is left of what was moved: everything is new
    how = config.on_existing if baseline is None else on_existing(config.on_existing)
    if keep:
        migration.ledger.clear()
    mapping = migration.mapping
    moved = schema if mapping is None else mapping.map_schema(schema)
    counter = ProfileCounter(
        moved,
        where=migration.where,
        source=source.capabilities,
        target=target.capabilities,
        accepts_id=target.accepts_id,
        mapping=mapping,
    )
    scope = _scope(migration, baseline, counter, generation=generation, keep=keep)
    profile = scope.profile
    if source.fingerprint(collection) != fingerprint:
        raise SourceChangedError(
            f"{source.address(collection)} changed while the plan was made: stop its writers, plan again"
        )
    made_from = None if mapping is None else mapping.id_from
    _check_ids(profile, source.address(collection), made_from=made_from)
    source_schema, schema = _as_found(schema, profile, same_ids=made_from is None), _as_found(moved, profile)
    kept = existing if how != "replace" else None
    strategy = _strategy(migration, scope, schema, kept, baseline)
    mapped = map_schema(schema, target, name=wanted, strategy=strategy, metric=config.metric)
    if kept is not None:
        check_existing(mapped, kept, where=target.address(wanted))
        mapped = kept
    else:
        mapped = target.adapt(mapped, profile.fields)
    found = [*counter.losses(source_schema), *find_losses(schema, mapped, profile, target, strategy)]
    losses = accept(found, config.allow_losses)
    return Plan(
        generation=generation,
        name=config.ledger_name(),
        config_digest=config.digest(),
        config=config.frozen_part(),
        source=source.address(collection),
        source_collection=collection,
        source_schema=source_schema,
        source_fingerprint=fingerprint,
        target=target.address(wanted),
        target_collection=wanted,
        target_schema=mapped,
        target_exists=existing is not None,
        target_count=count,
        on_existing=how,
        where=config.frozen_part()["filter"],
        id_strategy=strategy.value,
        encodes=any(loss.kept in RESERVED for loss in losses) or _needs_envelope(migration, profile),
        profile=profile,
        losses=losses,
        warnings=tuple(_warnings(schema, mapped, profile)),
        estimate=estimate(migration, profile, scope.sample),
        partitions=scope.partitions,
        schema_mapping=None if mapping is None else mapping.digest(),
        mapped_schema=None if mapping is None else schema,
        changes=scope.changes,
    )


def _existing_target(migration: Migration, baseline: Baseline | None) -> tuple[CollectionSchema | None, int]:
    """Return schema and count of the target collection as it is; (None, 0) where there is none."""
    target, collection = migration.target, migration.target_collection
    try:
        schema, count = target.describe(collection), target.count(collection)
    except CollectionNotFoundError:
        return None, 0
    if _is_within(migration.source, target, migration.source_collection, collection):
        raise ConfigurationError(f"{target.address(collection)} is both source and target")
    if count and baseline is None and migration.config.on_existing == "refuse":
        raise TargetNotEmptyError(
            f"{target.address(collection)} holds {count} records, an empty or absent collection was "
            "expected: say --on-existing merge or replace, or choose another target",
            expected=0,
            found=count,
        )
    return schema, count


def _is_within(source: Store, target: Store, source_collection: str, target_collection: str) -> bool:
    """Whether records that are written would be among those that are read."""
    addresses = [source.address(source_collection), target.address(target_collection)]
    if source.is_bound and target.is_bound:
        return addresses[0] == addresses[1]
    parsed = map(Address.parse, addresses)
    wholes = [str(one.model_copy(update={"query": _without_namespace(one.query)})) for one in parsed]
    return wholes[0] == wholes[1]


def _without_namespace(query: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in query.items() if name != "namespace"}


def _partitions(
    migration: Migration, counter: ProfileCounter, *, generation: int, keep: bool
) -> tuple[Partition, ...]:
    """Fix the partitions, and count what they hold on the way."""
    source, collection = migration.source, migration.source_collection
    found = []
    spans = source.split(collection, span_records=migration.config.partition_size, where=migration.where)
    for number, (span, ids) in enumerate(spans):
        key = f"g{generation}_{number:05d}"
        counter.add_span(source, collection, span, ids)
        if ids is not None and keep:
            span = span.model_copy(update={"ids_file": migration.ledger.write_span_ids(key, ids)})
        migration.tell("batch-planned", partition=key, records=span.records)
        found.append(Partition(key=key, span=span))
    return tuple(found)


def _scope(
    migration: Migration, baseline: Baseline | None, counter: ProfileCounter, *, generation: int, keep: bool
) -> _Scope:
    """Fix the partitions, of all records in scope or of what changed since the baseline, and count them."""
    source, collection = migration.source, migration.source_collection
    if baseline is None:
        partitions = _partitions(migration, counter, generation=generation, keep=keep)
        sample = take_sample(source, collection, mapping=migration.mapping)
        profile = counter.profile(sample)
        kinds = frozenset(map(IdKind, profile.id_kinds))
        return _Scope(partitions, profile, sample, kinds, profile.repeated_ids)
    with compared(migration, baseline) as found:
        partitions, changes = change_partitions(migration, found, generation=generation)
    for partition in partitions:
        ids = migration.span_ids(partition)
        assert ids is not None
        counter.add_ids(source, collection, ids)
    sample = take_sample(source, collection, mapping=migration.mapping)
    return _Scope(partitions, counter.profile(sample), sample, found.id_kinds, found.repeated_ids, changes)


def _strategy(
    migration: Migration,
    scope: _Scope,
    schema: CollectionSchema,
    kept: CollectionSchema | None,
    baseline: Baseline | None,
) -> IdStrategy:
    """Decide how ids are mapped; an incremental run does so as the runs before it."""
    target, where = migration.target, migration.target.address(migration.target_collection)
    has_namespaces = keeps_namespaces(schema, target, kept)
    if has_namespaces:
        check_namespaces(scope.profile.namespaces.keys() or {""}, target, where=where)
    repeats = scope.repeated_ids > 0 and not (has_namespaces and target.shares_ids)
    before = None if baseline is None else IdStrategy(baseline.id_strategy)
    chosen = choose_id_strategy(
        scope.id_kinds or schema.id_kinds,
        target.capabilities,
        needs_namespace=repeats or before is IdStrategy.NAMESPACE_UUID5,
    )
    if before not in (None, chosen):
        raise ConfigurationError(
            f"{where} holds ids by strategy {before}, and the source now needs {chosen}: move the whole "
            "collection anew, without incremental",
            expected=before,
            found=chosen.value,
        )
    return chosen


def _check_ids(profile: Profile, where: str, *, made_from: str | None) -> None:
    if profile.duplicate_ids:
        by = f", made from {made_from!r}," if made_from else ""
        raise ConfigurationError(
            f"{where}: {profile.duplicate_ids} of {profile.records} records share their id{by} with another: "
            "a target would keep only one of each; make the ids distinct first",
            found=profile.duplicate_ids,
        )


def _as_found(schema: CollectionSchema, profile: Profile, *, same_ids: bool = True) -> CollectionSchema:
    """Return the schema with the kinds of id that were found, and namespaces that an envelope holds."""
    kinds = frozenset(IdKind(kind) for kind in profile.id_kinds if same_ids)
    has_namespaces = schema.has_namespaces or bool(profile.namespaces)
    return schema.model_copy(update={"id_kinds": kinds or schema.id_kinds, "has_namespaces": has_namespaces})


def _needs_envelope(migration: Migration, profile: Profile) -> bool:
    """Whether records need the envelope though nothing of them is lost.

    Those without metadata where the target can't tell them from empty ones, and those with fields of the
    user's own that are called as the envelope is.
    """
    alike = not migration.target.capabilities.no_metadata and profile.with_metadata < profile.records
    return alike or not RESERVED.isdisjoint(profile.fields)


def accept(losses: Iterable[Loss], allowed: tuple[str, ...]) -> tuple[Loss, ...]:
    """Return the losses, those marked accepted that are named in `allowed` (or are kept anyway)."""
    names = set(allowed)

    def is_named(loss: Loss) -> bool:
        return bool(names & {"all", loss.kind, f"{loss.field}:{loss.kind}"})

    return tuple(loss.model_copy(update={"accepted": loss.accepted or is_named(loss)}) for loss in losses)


def check_losses(made: Plan) -> None:
    """Raise where a loss isn't accepted.

    Raises
    ------
    LossNotAcceptedError
        Its facts hold the `losses` that were refused and the whole `plan`, which is not frozen.
    """
    refused = [loss for loss in made.losses if not loss.accepted]
    if refused:
        listing = "; ".join(f"{x.field}: {x.kind}, {x.count} records ({x.detail})" for x in refused)
        names = " ".join(f"--allow-loss {kind}" for kind in sorted({loss.kind for loss in refused}))
        raise LossNotAcceptedError(
            f"{made.target} would change data: {listing}. Nothing was written. To accept it: {names}",
            losses=[loss.model_dump() for loss in refused],
            plan=made,
        )


def check_free(migration: Migration, made: Plan) -> None:
    """Raise where `add` was asked for and the target holds ids of records in scope; reads, never writes.

    Raises
    ------
    TargetNotEmptyError
        Its facts hold how many ids were `found` and some `examples`.
    """
    if made.on_existing != "add" or not made.joins:
        return
    found, examples = migration.retry(partial(_taken, migration, made), phase="plan")
    if found:
        shown = ", ".join(map(repr, examples))
        raise TargetNotEmptyError(
            f"{made.target} holds {found} of the ids in scope ({shown}): merge replaces what is under them, "
            "skip leaves it as it is",
            expected=0,
            found=found,
            examples=examples,
        )


def _taken(migration: Migration, made: Plan) -> tuple[int, list[str]]:
    """Return how many ids in scope the target holds, and some of them."""
    found = 0
    examples: list[str] = []
    for batch in _in_scope(migration, made):
        ids = ids_in_target(batch, plan=made, target=migration.target)
        held = migration.target.fetch(made.target_collection, ids, vectors=False)
        found += held.num_rows
        examples += held.column(ID).to_pylist()[: _SHOWN - len(examples)]
    return found, examples


def _in_scope(migration: Migration, made: Plan) -> Iterator[pa.RecordBatch]:
    """Yield the records in scope as they are moved, without their vectors; no batch is empty.

    Of an incremental plan only those that no earlier run has moved.
    """
    where = migration.where
    for stored in _stored(migration, made):
        batch = decode(stored)
        kept = batch if where is None else batch.filter(filters.mask(where, batch))
        moved = migration.mapped(kept)
        if moved.num_rows:
            yield moved


def _stored(migration: Migration, made: Plan) -> Iterator[pa.RecordBatch]:
    source, collection, size = migration.source, made.source_collection, migration.config.batch_size
    if made.changes is None:
        yield from source.scan_all(collection, batch_records=size, where=migration.where, vectors=False)
        return
    for partition in made.partitions:
        ids = migration.span_ids(partition)
        if partition.change == "new" and ids is not None:
            yield from source.fetch_all(collection, ids, batch_records=size, vectors=False)


def _warnings(source: CollectionSchema, target: CollectionSchema, profile: Profile) -> list[str]:
    found = []
    if not profile.records:
        found.append("no record is in scope")
    for field in target.vectors:
        if field.metric is None:
            label = field.name or "(default)"
            found.append(f"the metric of vector {label} is unknown: the target gets no search index for it")
    if source.has_documents and not profile.documents and profile.records:
        found.append("no record has a document")
    return found


def estimate(migration: Migration, profile: Profile, sample: Sample) -> Estimate:
    """Return how long the migration will take.

    Reading is measured on a sample of the source; writing is the target's typical rate in bytes per
    second, because nothing is written to the target for an estimate. The two overlap, and verification reads
    everything back once.
    """
    record_bytes = profile.bytes / profile.records if profile.records else 0.0
    write_rate = migration.target.typical_write_bytes_per_second
    read_seconds = profile.records * sample.seconds / sample.records if sample.records else 0.0
    write_seconds = profile.bytes / write_rate
    seconds = max(read_seconds, write_seconds) * 1.25
    in_flight = min(profile.records, migration.config.partition_size * migration.config.workers)
    return Estimate(
        seconds=seconds,
        records_per_second=profile.records / seconds if seconds else 0.0,
        bytes=profile.bytes,
        staging_bytes=int(in_flight * record_bytes * 2),
        basis=f"{sample.records} records read, and the typical write rate of {migration.target.kind}",
    )
