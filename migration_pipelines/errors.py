"""Every error of the project, grouped by what the caller does next.

MigrationError                          exit status
├── UsageError                          2   change the request
│   ├── ConfigurationError                  a setting, an address or a file can't be used
│   │   ├── FilterError                     a filter can't be parsed
│   │   ├── SchemaMappingError              a record can't be mapped as it was asked for
│   │   └── MissingDriverError              install the extra that it names
│   ├── CollectionNotFoundError             no such collection
│   ├── CollectionExistsError               create was asked for one that is there
│   ├── TargetNotEmptyError                 say `merge` or `replace`
│   ├── DimensionMismatchError              the vectors don't fit the target
│   ├── UnsupportedOperationError           the store doesn't declare it
│   ├── LossNotAcceptedError                name the losses that are accepted
│   └── PlanChangedError                    keep the plan or start a fresh one
├── StoreError
│   ├── TransientError                  1   retried; when retries are used up, run again
│   │   └── StoreUnavailableError       4   nothing answers at the address
│   ├── AuthenticationError             4   mend the login
│   ├── StoreRefusedError               1   the store refused for good
│   └── RecordRejectedError             1   one record (or a batch that holds it) is refused: bisected
├── LedgerError                         1
│   ├── LeaseHeldError                      another worker has it
│   ├── StagingCorruptError                 a staged file fails its checksum: extracted again
│   └── DiskFullError                       make room and run again
├── IncompleteError                     1   run again, or look at the rejects
│   ├── TooManyRejectsError                 more records were refused than the threshold allows
│   ├── VerificationError                   what was read back differs from what was staged
│   └── SourceChangedError                  the source changed under an offline migration
└── ValidationError                     3   source and target differ
"""

from __future__ import annotations

from typing import Any, ClassVar


class MigrationError(Exception):
    """Root of the tree.

    Parameters
    ----------
    message
        What was found, what was expected and what to do. Never a secret.
    facts
        The same as attributes for programs: `store`, `collection`, `expected`, `found`, …
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


class UsageError(MigrationError):
    """The request must change before it can succeed."""

    exit_status = 2


class ConfigurationError(UsageError):
    """A setting, an address or a file can't be used as it is."""


class FilterError(ConfigurationError):
    """A filter can't be parsed."""


class SchemaMappingError(ConfigurationError):
    """A rule of the schema mapping can't be applied to a record, and is told to fail."""


class MissingDriverError(ConfigurationError):
    """The driver of a store isn't installed."""


class CollectionNotFoundError(UsageError):
    """The store has no collection of that name."""


class CollectionExistsError(UsageError):
    """A collection of that name is there already."""


class TargetNotEmptyError(UsageError):
    """The target collection holds records and neither `merge` nor `replace` was asked for."""


class DimensionMismatchError(UsageError):
    """The source's vectors have another number of dimensions than the target takes."""


class UnsupportedOperationError(UsageError):
    """The store doesn't declare this capability."""


class LossNotAcceptedError(UsageError):
    """The target would change data, and the change was not accepted by name."""


class PlanChangedError(UsageError):
    """The request differs from the frozen plan."""


class StoreError(MigrationError):
    """A store answered with an error, or not at all."""


class TransientError(StoreError):
    """The same call may succeed later.

    `facts["retry_after_seconds"]` carries the store's own wish where it has one.
    """


class StoreUnavailableError(TransientError):
    """Nothing answers at the store's address."""

    exit_status = 4


class AuthenticationError(StoreError):
    """The store refuses the login."""

    exit_status = 4


class StoreRefusedError(StoreError):
    """The store refuses the call, and will refuse it again."""


class RecordRejectedError(StoreError):
    """The store refuses at least one record of the batch, for what the record holds."""


class LedgerError(MigrationError):
    """The ledger or the staging folder can't be used."""


class LeaseHeldError(LedgerError):
    """Another worker holds the lease of this migration or partition."""


class StagingCorruptError(LedgerError):
    """A staged file is missing or fails its checksum."""


class DiskFullError(LedgerError):
    """No room is left for staging or the ledger."""


class IncompleteError(MigrationError):
    """The migration isn't complete; nothing is lost."""


class TooManyRejectsError(IncompleteError):
    """More records were refused than the threshold allows."""


class VerificationError(IncompleteError):
    """What was read back from the target differs from what was staged."""


class SourceChangedError(IncompleteError):
    """The source is no longer what the plan was made from."""


class ValidationError(MigrationError):
    """Source and target differ."""

    exit_status = 3
