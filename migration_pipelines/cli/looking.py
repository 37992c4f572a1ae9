"""`inspect`, `stores`: the commands that only look."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from migration_pipelines.cli.migrations import warn_of_password
from migration_pipelines.cli.options import Quiet, takes
from migration_pipelines.cli.output import Shown

if TYPE_CHECKING:
    from migration_pipelines.inspect import Inspection
    from migration_pipelines.model import Capabilities
    from migration_pipelines.store import Store

_COLUMNS = ("store", "ids", "vectors", "dimensions", "metrics", "metadata", "filters", "also")
_ALSO = {
    "named_vectors": "named vectors",
    "missing_vectors": "missing vectors",
    "namespaces": "namespaces",
    "deletes": "deletes",
    "aliases": "aliases",
}


@takes(Shown)
def inspect(
    shown: Shown,
    *,
    address: Annotated[
        str, Argument(metavar="ADDRESS", help="A collection; or a store, to see which collections it has.")
    ],
    quiet: Quiet = False,
) -> int:
    """Show what a collection is made of and holds."""
    from migration_pipelines.store import open_address

    warn_of_password(address)
    store, collection = open_address(address)
    with tempfile.TemporaryDirectory(prefix="vector-migrate-") as scratch:
        reader = store.for_reading(Path(scratch))
        try:
            if collection is None:
                return _show_collections(store, reader, shown, quiet=quiet)
            return _show_collection(reader, collection, shown, quiet=quiet)
        finally:
            reader.close()


@takes(Shown)
def stores(
    shown: Shown,
    *,
    kind: Annotated[
        str | None, Argument(metavar="[STORE]", help="One store, with everything it declares.")
    ] = None,
    markdown: Annotated[bool, Option("--markdown", help="As the page docs/stores.md.")] = False,
) -> int:
    """Show what each store can hold and do."""
    from migration_pipelines.store import store_class, store_kinds

    kinds = store_kinds() if kind is None else [kind]
    found = {name: store_class(name).capabilities for name in kinds}
    if shown.show({name: _plain(can) for name, can in found.items()}):
        return 0
    if markdown:
        from migration_pipelines.cli.stores_page import stores_page

        sys.stdout.write(stores_page(found))
    elif kind is None:
        _show_table(found)
    else:
        _show_one(kind, found[kind])
    return 0


COMMANDS = (inspect, stores)


def _show_collections(store: Store, reader: Store, shown: Shown, *, quiet: bool) -> int:
    counts = {name: reader.count(name) for name in reader.list_collections()}
    rows = [{"name": name, "address": store.address(name), "count": n} for name, n in counts.items()]
    if not shown.show({"address": store.address(), "collections": rows}) and not quiet:
        from migration_pipelines.cli.show import console, table

        rows_shown = ((name, f"{count:,}", store.address(name)) for name, count in counts.items())
        heads = ("collection", "records", "address")
        console().print(table(store.address(), heads, rows_shown, right=("records",)))
    return 0


def _show_collection(reader: Store, collection: str, shown: Shown, *, quiet: bool) -> int:
    from migration_pipelines.inspect import inspect_collection

    found: Inspection = inspect_collection(reader, collection)
    if not shown.show(found.model_dump(mode="json")) and not quiet:
        from migration_pipelines.cli.show import show_inspection

        show_inspection(found)
    return 0


def _plain(can: Capabilities) -> dict[str, Any]:
    return {
        name: sorted(value) if isinstance(value, list) else value
        for name, value in can.model_dump(mode="json").items()
    }


def _show_table(found: dict[str, Capabilities]) -> None:
    from migration_pipelines.cli.show import console, table

    title = "What each store can hold and do (vector-migrate stores STORE shows everything)"
    rows = (_row(name, can) for name, can in found.items())
    console().print(table(title, _COLUMNS, rows, right=("dimensions",)))


def _row(name: str, can: Capabilities) -> tuple[str, ...]:
    from migration_pipelines.model import ValueKind

    kinds = len(can.value_kinds)
    return (
        name,
        _listed(can.id_kinds) + (" mixed" if can.mixed_ids and len(can.id_kinds) > 1 else ""),
        f"{_listed(can.vector_kinds)} of {_listed(can.dtypes)}",
        "any" if can.max_dimensions is None else f"{can.max_dimensions:,}",
        _listed(can.metrics),
        "all kinds" if kinds == len(ValueKind) else f"{kinds} of {len(ValueKind)} kinds",
        "native" if can.filter_operators else "here",
        ", ".join(word for field, word in _ALSO.items() if getattr(can, field)),
    )


def _show_one(kind: str, can: Capabilities) -> None:
    from migration_pipelines.cli.show import console, show_facts

    out = console()
    out.print(kind, style="bold")
    show_facts(out, ((name.replace("_", " "), _shown(value)) for name, value in _plain(can).items()))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {text}" for key, text in value.items()) or "all comes back as it was"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "no limit" if value is None else repr(value) if isinstance(value, str) else f"{value:,}"


def _listed(values: Any) -> str:
    return ", ".join(sorted(value.value for value in values))
