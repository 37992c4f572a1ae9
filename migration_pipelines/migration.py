"""One migration at work: its configuration, its two stores, its ledger, and who listens to its progress."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import orjson
import pyarrow as pa
from pydantic import Field

from migration_pipelines import filters
from migration_pipelines.errors import ConfigurationError, PlanChangedError
from migration_pipelines.ledger import Ledger
from migration_pipelines.model import Metric, Partition, Plan, Value
from migration_pipelines.redaction import remember_secrets
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.schema_mapping import SchemaMapping
from migration_pipelines.store import Address, Store, open_address

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class MigrationConfig(Value):
    """What a migration is asked to do.

    Parameters
    ----------
    source, target
        Addresses of two collections. The target's may leave the collection out: it gets the source's name.
    name
        Names the ledger; made from the addresses where it is left out.
    filter
        Which records are in scope, in the grammar of `filters`.
    schema_mapping
        What becomes of their fields, ids and vectors on the way; in YAML it is called `mapping`.
    partition_size
        Records in a partition.
    batch_size, max_batch_bytes
        Limits of one batch in flight, beside the store's own.
    workers
        Partitions in work at a time; each has at most a few batches in memory.
    on_existing
        What to do with a target that holds records: refuse, merge (each record in scope replaces the one
        under its id, others stay), skip (what is under its id stays, and the record isn't moved), add (refuse
        where the target holds the id of any record in scope) or replace (drop the collection first).
    allow_losses
        Accepted losses: a kind (`vector-rounding`), a field and kind (`price:float`), or `all`.
    metric
        The metric of the target, where it isn't the source's.
    max_rejects
        How many refused records still count as complete.
    incremental
        Move only what is new or changed since the last complete run; all of it where there was none. What
        `on_existing` says is then about ids that no earlier run moved; what one did move is replaced.
    apply_deletes
        Remove from the target what earlier runs moved and the source doesn't have any more, or not in scope;
        else it is only counted.
    watermark, watermark_overlap
        A metadata field that grows with every change of a record, and how far before the greatest value that
        the last run saw an incremental one begins: in the field's own unit, for moments in seconds. Without
        it every record is read and compared by its digest.
    """

    source: str
    target: str
    name: str = ""
    filter: Any = None
    schema_mapping: SchemaMapping | None = None
    partition_size: int = Field(default=20_000, ge=1)
    batch_size: int = Field(default=2_000, ge=1)
    max_batch_bytes: int = Field(default=16_000_000, ge=1_000)
    workers: int = Field(default=2, ge=1)
    on_existing: Literal["refuse", "merge", "skip", "add", "replace"] = "refuse"
    allow_losses: tuple[str, ...] = ()
    metric: Metric | None = None
    max_rejects: int = Field(default=0, ge=0)
    incremental: bool = False
    apply_deletes: bool = False
    watermark: str | None = None
    watermark_overlap: float = Field(default=0.0, ge=0)
    retry: RetryPolicy = RetryPolicy()

    def frozen_part(self) -> dict[str, Any]:
        """Return what decides on the data, secrets left out: it may not change once there is a plan."""
        chosen = self.model_dump(
            mode="json", include={"filter", "partition_size", "on_existing", "allow_losses", "metric"}
        )
        chosen["allow_losses"] = sorted(chosen["allow_losses"])
        where = filters.parse(self.filter)
        chosen["filter"] = None if where is None else filters.to_json(where)
        chosen["schema_mapping"] = None if self.schema_mapping is None else self.schema_mapping.document()
        if self.incremental:
            names = ("incremental", "apply_deletes", "watermark", "watermark_overlap")
            chosen |= {name: getattr(self, name) for name in names}
        for side in ("source", "target"):
            store, collection = open_address(getattr(self, side))
            chosen[side] = _wherever_we_are(store.address(collection))
        return chosen

    def digest(self) -> str:
        """Return a digest of all that may not change once there is a plan."""
        chosen = self.frozen_part()
        if chosen["schema_mapping"] is None:
            del chosen["schema_mapping"]  # plans from before there were mappings keep their digest
        frozen = orjson.dumps(chosen, option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(frozen).hexdigest()

    def ledger_name(self) -> str:
        """Return the name of the ledger's folder: the migration's own, or one made from its addresses."""
        if self.name:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
                raise ConfigurationError(
                    f"{self.name!r} can't name a migration: letters, digits, '_', '-' and '.' can"
                )
            return self.name
        frozen = self.frozen_part()
        both = f"{frozen['source']}\n{frozen['target']}"
        readable = re.sub(r"[^A-Za-z0-9]+", "-", f"{_last(frozen['source'])}-to-{_last(frozen['target'])}")
        return f"{readable.strip('-')[:60]}-{hashlib.sha256(both.encode()).hexdigest()[:8]}"


def _wherever_we_are(address: str) -> str:
    """Return an address that means the same in every working directory: the path of files made absolute."""
    if address.partition(":")[2].startswith("//"):
        return address
    parsed = Address.parse(address)
    if "://" in parsed.path:
        return address
    return str(parsed.model_copy(update={"path": str(Path(parsed.path).absolute())}))


def _last(address: str) -> str:
    return f"{address.partition(':')[0]}-{re.split(r'[/#]', address.partition('?')[0])[-1]}"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, for progress bars, metrics, traces, logs and tests.

    `name` is one of

    - what was done: batch-planned, planned, prepared, batch-extracted, extracted, transformed, batch-loaded,
      loaded, batch-verified, verified, published, validated; with `records` and `bytes`, and for a whole
      partition with `seconds`;
    - filtered, rejected, skipped: records of a partition that are out of scope, refused, or in the target
      already;
    - started, ended: a `phase` began, or came to an end after so many `seconds`, with the `error` that
      ended it where one did;
    - retried: attempt number `attempt` failed of `error`, and the next follows in so many `seconds`;
    - failed: an `error`, told once, by the phase in which it arose.

    `phase` is one of `PHASES`; `migration` is the migration's id: the plan's, or its beginning while there
    is no plan.
    """

    name: str
    migration: str = ""
    phase: str = ""
    partition: str = ""
    records: int = 0
    bytes: int = 0
    seconds: float = 0.0
    message: str = ""
    attempt: int = 0
    error: BaseException | None = None


# Nested: a migration has its plan, partitions, publish and validate, a partition the four in between.
PHASES = ("migration", "plan", "partition", "extract", "transform", "load", "verify", "publish", "validate")
# The events that say what a phase has done, once it has.
DONE = {
    "planned": "plan",
    "extracted": "extract",
    "transformed": "transform",
    "loaded": "load",
    "verified": "verify",
    "published": "publish",
    "validated": "validate",
}
Listener = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Listen to nothing."""


def together(*listeners: Listener) -> Listener:
    """Return a listener that hands every event on to several; one that fails is left out from then on."""
    hearing = list(listeners)

    def listen(event: Event) -> None:
        for listener in tuple(hearing):
            try:
                listener(event)
            except Exception as error:  # noqa: BLE001 - the others, and the migration, go on
                _log.warning("a listener failed and hears no more: %s: %s", type(error).__name__, error)
                with suppress(ValueError):  # another thread was faster
                    hearing.remove(listener)

    return listen


class Stopped(BaseException):
    """A worker notices that the migration is being stopped.

    Like KeyboardInterrupt it is no Exception: nothing on its way may take it for a fault and try again.
    """


@dataclass(kw_only=True)
class Migration:
    """What the phases work on.

    The stores are opened on first use; `close` (or leaving the context) closes them.
    """

    config: MigrationConfig
    ledger: Ledger
    listener: Listener = ignore
    source_store: Store | None = None  # in place of the one that the address would open, secrets and all
    target_store: Store | None = None
    history_ledger: Ledger | None = None  # of the real migration, where this one is only tried
    stopping: threading.Event = field(default_factory=threading.Event)  # workers stop at their next batch
    _failures: list[BaseException] = field(
        default_factory=list, init=False
    )  # those told; a run holds them anyway

    def __enter__(self) -> Migration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _source_address(self) -> tuple[Store, str | None]:
        return _opened(self.config.source, self.source_store)

    @cached_property
    def _target_address(self) -> tuple[Store, str | None]:
        return _opened(self.config.target, self.target_store)

    @property
    def source_collection(self) -> str:
        """The source's collection; an address that names none must name it."""
        collection = self._source_address[1]
        if collection is None:
            store = self._source_address[0]
            there_are = ", ".join(store.list_collections()) or "none"
            raise ConfigurationError(f"{store.address()} names no collection; there are: {there_are}")
        return collection

    @property
    def target_collection(self) -> str:
        """The target's collection, by default called like the source's."""
        return self._target_address[1] or self.source_collection

    @cached_property
    def source(self) -> Store:
        """The store to read from, which never writes the original."""
        return self._source_address[0].for_reading(self.ledger.scratch)

    @cached_property
    def target(self) -> Store:
        """The store to write to."""
        return self._target_address[0]

    @property
    def history(self) -> Ledger:
        """The ledger that tells what earlier runs have left in the target."""
        return self.history_ledger or self.ledger

    @cached_property
    def scanning(self) -> AbstractContextManager[Any]:
        """Entered to read the source: waits while as many workers read it as its store is best read by."""
        limit = self.source.scans_at_once()
        return nullcontext() if limit is None else threading.Semaphore(limit)

    @cached_property
    def where(self) -> filters.Filter | None:
        """The filter, parsed."""
        return filters.parse(self.config.filter) if self.config.filter else None

    @property
    def mapping(self) -> SchemaMapping | None:
        """The user's own mapping; None where it has no rule."""
        found = self.config.schema_mapping
        return None if found is None or found.changes_nothing else found

    def mapped(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the records of the source as they are moved, those that can't be mapped left out."""
        return batch if self.mapping is None else self.mapping.apply(batch).batch

    @cached_property
    def plan(self) -> Plan:
        """The frozen plan.

        Raises
        ------
        ConfigurationError
            There is none yet.
        PlanChangedError
            The configuration differs from what was frozen.
        """
        plan = self.ledger.plan()
        if plan is None:
            raise ConfigurationError(f"{self.ledger.folder} holds no plan yet: run the plan phase first")
        self.check_unchanged(plan)
        return plan

    def check_unchanged(self, plan: Plan) -> None:
        """Raise where the configuration isn't the one that the plan was made from."""
        if plan.config_digest == self.config.digest():
            return
        now = self.config.frozen_part()
        changed = sorted(key for key in {*now, *plan.config} if now.get(key) != plan.config.get(key))
        listing = "; ".join(f"{key} was {plan.config.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise PlanChangedError(
            f"the plan in {self.ledger.folder} was frozen with other settings ({listing}): "
            "go on with those, or start afresh with --fresh",
            changed=changed,
        )

    def partition(self, key: str) -> Partition:
        """Return a partition of the plan by its key."""
        for partition in self.plan.partitions:
            if partition.key == key:
                return partition
        raise ConfigurationError(
            f"the plan of generation {self.plan.generation} in {self.ledger.folder} has no partition {key}",
            partition=key,
        )

    def pending(self) -> list[str]:
        """Return the keys of the partitions that have no receipt yet, in order."""
        done = self.ledger.receipts(self.plan)
        return [partition.key for partition in self.plan.partitions if partition.key not in done]

    def span_ids(self, partition: Partition) -> pa.RecordBatch | None:
        """Return the list of ids of a partition's span, where it has one."""
        name = partition.span.ids_file
        return self.ledger.span_ids(name) if name else None

    @property
    def id(self) -> str:
        """The plan's `migration_id`; its beginning, before the plan is known here."""
        plan = self.__dict__.get("plan")
        return plan.migration_id if plan is not None else self._digest[:12]

    @cached_property
    def _digest(self) -> str:
        return self.config.digest()

    def tell(self, name: str, **facts: Any) -> None:
        """Tell the listener; one that fails doesn't hurt the migration.

        Raises
        ------
        Stopped
            The migration is being stopped: every batch comes by here.
        """
        if self.stopping.is_set():
            raise Stopped
        self._tell(name, **facts)

    def _tell(self, name: str, **facts: Any) -> None:
        try:
            self.listener(Event(name=name, migration=self.id, **facts))
        except Exception:  # noqa: BLE001 - a progress bar must not stop a migration
            self.listener = ignore

    @contextmanager
    def phase(self, name: str, partition: str = "") -> Iterator[None]:
        """Tell that a phase begins and, whatever happens, that it ends; an error is told where it arose."""
        self.tell("started", phase=name, partition=partition)
        started, found = time.monotonic(), None
        try:
            yield
        except BaseException as error:
            found = error
            if isinstance(error, Exception) and not any(error is told for told in self._failures):
                self._failures.append(error)
                self._tell("failed", phase=name, partition=partition, error=error)
            raise
        finally:
            seconds = time.monotonic() - started
            self._tell("ended", phase=name, partition=partition, seconds=seconds, error=found)

    def retry(self, function: Callable[[], Result], *, phase: str, partition: str = "") -> Result:
        """Return `function()`, tried again as the configuration says; every failed attempt is told.

        Raises
        ------
        TransientError
            The last one, when the attempts are used up.
        """

        def tell(attempt: int, seconds: float, error: BaseException) -> None:
            self.tell(
                "retried", phase=phase, partition=partition, attempt=attempt, seconds=seconds, error=error
            )

        return self.config.retry.call(function, listener=tell)

    def close(self) -> None:
        """Close both stores."""
        for name in ("source", "target"):
            store = self.__dict__.get(name)
            if store is not None:
                store.close()


def _opened(address: str, given: Store | None) -> tuple[Store, str | None]:
    store, collection = open_address(address)
    found = given or store
    remember_secrets(found)
    return found, collection


def ledger_for(config: MigrationConfig, home: Path) -> Ledger:
    """Return the ledger of a migration under a home folder."""
    return Ledger(home / "migrations" / config.ledger_name())


def default_home() -> Path:
    """Return the folder for ledgers and Dagster's storage: `VECTOR_MIGRATE_HOME`, else `./home`."""
    return Path(os.environ.get("VECTOR_MIGRATE_HOME") or "home").absolute()
