"""What Dagster is told when the engine raises: try again, or fail for good.

Only what is transient is tried again. Not by a RetryPolicy: with the in-process executor one of those
takes a Terminate for a failure, and a run that was cancelled goes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from migration_pipelines import errors
from migration_pipelines.components.declared import SESSION_TAG
from migration_pipelines.components.internals import INTERRUPTS
from migration_pipelines.components.plots import losses_table, table
from migration_pipelines.errors import MigrationError, TransientError

# Beyond the engine's own attempts: about half a minute in all.
ATTEMPTS = 3
DELAY_SECONDS = 4.0
_KIND, _FAILED = "error", "failed partitions"


@contextmanager
def engine_errors(context: dg.AssetExecutionContext) -> Iterator[None]:
    """Raise what Dagster understands in place of the engine's errors.

    Raises
    ------
    dagster.RetryRequested
        The error is transient, and there are attempts left.
    dagster.Failure
        Anything else; never tried again by itself.
    """
    try:
        yield
    except INTERRUPTS:
        if SESSION_TAG in context.run.tags:
            # Somebody stopped the process that executes the run itself: a person, not a fault.
            context.instance.report_run_canceling(context.run)
        raise
    except MigrationError as error:
        raise _request(context, error) from error


def _request(context: dg.AssetExecutionContext, error: MigrationError) -> Exception:
    if isinstance(error, TransientError):
        retry = retry_request(context)
        if retry is not None:
            return retry
    metadata: dict[str, Any] = {_KIND: type(error).__name__}
    if losses := error.facts.get("losses"):
        metadata["losses"] = losses_table(losses)
    return dg.Failure(str(error), metadata=metadata, allow_retries=False)


def retry_request(context: dg.AssetExecutionContext) -> dg.RetryRequested | None:
    """Return the request for another attempt; None where they are used up."""
    done = context.retry_number
    if done >= ATTEMPTS:
        return None
    delay = DELAY_SECONDS * 2**done
    jitter = random.uniform(0, delay / 4)  # noqa: S311 - spreads load, hides nothing
    return dg.RetryRequested(max_retries=ATTEMPTS, seconds_to_wait=delay + jitter)


def partitions_failure(failed: Mapping[str, MigrationError], total: int) -> dg.Failure:
    """Return the failure of a run in which some partitions failed; those that didn't stay materialized."""
    rows = [
        {
            "partition": key,
            "error": type(error).__name__,
            "different": different(error),
            "message": str(error),
        }
        for key, error in sorted(failed.items())
    ]
    first = rows[0]
    return dg.Failure(
        f"{len(failed)} of {total} partitions failed, first {first['partition']}: {first['message']}",
        metadata={_FAILED: table(rows)},
        allow_retries=False,
    )


def different(error: MigrationError) -> int:
    """Return how many records an error found different."""
    return int(error.facts.get("different", 0))


def errors_of(failure: Mapping[str, dg.MetadataValue[Any]], description: str) -> dict[str, MigrationError]:
    """Return the engine's errors that a failed step's metadata tell of, by partition ("" for the whole)."""
    found = failure.get(_FAILED)
    if isinstance(found, dg.TableMetadataValue):
        return {
            str(row.data["partition"]): _error(
                str(row.data["error"]), str(row.data["message"]), int(row.data["different"] or 0)
            )
            for row in found.records
        }
    kind = failure.get(_KIND)
    return {"": _error(str(kind.value) if kind else "", description, 0)}


def _error(kind: str, message: str, different_records: int) -> MigrationError:
    found: type[MigrationError] = getattr(errors, kind, MigrationError)
    return found(message, different=different_records)
