"""`verify`, and every other comparison of two collections: one for all commands."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migration_pipelines.cli.failures import say
from migration_pipelines.cli.options import Options, Request, takes
from migration_pipelines.cli.progress import counting
from migration_pipelines.cli.reporting import emit, reporting

if TYPE_CHECKING:
    from migration_pipelines.compare import Comparison
    from migration_pipelines.migration import Migration

DIFFERENT = 3


@takes(Request)
def verify(request: Request) -> int:
    """Compare two collections record by record, whoever wrote them.

    Counts, ids, digests, namespaces; both are read from scratch, without a ledger, and neither is written.
    """
    with reporting(request):
        return compare(request)


COMMANDS = (verify,)


def compare(request: Request) -> int:
    """Compare the two collections of a request and show what came of it; returns the exit status."""
    from migration_pipelines.migration import ignore

    with tempfile.TemporaryDirectory(prefix="vector-migrate-") as home:
        found = compared(request, request.migration(home=Path(home), listener=ignore))
    if not emit(request, document_of(found)) and not request.quiet:
        from migration_pipelines.cli.show import show_comparison

        show_comparison(found)
    return judge(found)


def compared(request: Options, migration: Migration) -> Comparison:
    """Return what the two collections of a migration have in common, as it filters and maps them."""
    from migration_pipelines.compare import compare_collections

    source, target = migration.source_store, migration.target_store
    assert source is not None
    assert target is not None
    with counting("comparing", quiet=request.quiet or request.logs_json) as on_batch:
        return compare_collections(
            source,
            migration.source_collection,
            target,
            migration.target_collection,
            where=migration.where,
            mapping=migration.mapping,
            on_batch=on_batch,
        )


def document_of(found: Comparison) -> dict[str, Any]:
    """Return a comparison as a document."""
    return {"status": "equal" if found.agrees else "different", **found.model_dump(mode="json")}


def judge(found: Comparison) -> int:
    """Return the exit status, and say what differs."""
    if found.agrees:
        return 0
    say(
        f"error: {found.target.address} isn't what {found.source.address} is: "
        f"{found.missing:,} records missing, {found.extra:,} too many, {found.different:,} different"
    )
    return DIFFERENT
