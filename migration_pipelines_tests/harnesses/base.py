"""What a store's harness gives the conformance suite: the store under test, and a way around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

from migration_pipelines.model import CollectionSchema
from migration_pipelines.store import Store
from migration_pipelines_tests.records import Record


class Harness(ABC):
    """A running engine of one store.

    `write` and `read` go to the engine natively, around the connector: a bug in the connector's reading
    can't hide a bug in its writing.
    """

    store: Store
    mixes_kinds: ClassVar[bool] = True  # whether a metadata field natively holds values of several kinds
    holds_zero_vectors: ClassVar[bool] = True  # whether the engine takes a vector of zeros alone
    one_type_a_field: ClassVar[bool] = False  # the engine refuses a value unlike those that came before
    sparse_is_positive: ClassVar[bool] = False  # the engine refuses other weights of sparse vectors

    @classmethod
    @abstractmethod
    def start(cls, folder: Path) -> AbstractContextManager[Harness]:
        """Start (or find) an engine that keeps its data in `folder`, and stop it afterwards."""

    @abstractmethod
    def write(self, schema: CollectionSchema, records: Sequence[Record]) -> None:
        """Create the collection natively and put the records into it."""

    @abstractmethod
    def read(self, collection: str) -> list[Record]:
        """Read every record natively."""

    def known_gaps(self) -> Mapping[str, str]:
        """Names of conformance tests that can't pass, each with its reason; strict."""
        return {}
