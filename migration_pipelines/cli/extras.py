"""`demo`, `benchmark`, `ui`: the commands beside the work itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Option

from migration_pipelines.cli.failures import say, show_json
from migration_pipelines.cli.options import Defs, Home, Json, Quiet, defs_folder, home_folder

if TYPE_CHECKING:
    from migration_pipelines.benchmark import Benchmark

_WANTED_OF_READER, _WANTED_TIMES_GUIDES = 0.85, 12


def demo(*, home: Home = None) -> int:
    """Run a whole migration on real data, as a Dagster backfill."""
    from migration_pipelines.demo import run_demo

    return run_demo(home=home_folder(home))


def benchmark(
    *,
    records: Annotated[int, Option(metavar="N", min=1_000, help="Records to move.")] = 100_000,
    dimensions: Annotated[int, Option(metavar="N", min=1, help="Dimensions of their vectors.")] = 384,
    keep: Annotated[bool, Option("--keep", help="Leave the tables that were written.")] = False,
    home: Home = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure a transfer beside the limits of the drivers.

    Chroma to PostgreSQL (PGVECTOR_URL, else one that is started), beside one reader, one writer and the
    loop of common guides, all in the same run.
    """
    from migration_pipelines.benchmark import run_benchmark

    found = run_benchmark(
        records=records,
        dimensions=dimensions,
        home=home_folder(home),
        keep=keep,
        tell=(lambda text: None) if quiet else say,  # noqa: ARG005
    )
    if json:
        show_json(found.document())
    elif not quiet:
        _show(found)
    return 0


def ui(
    *,
    home: Home = None,
    defs: Defs = None,
    port: Annotated[int, Option(metavar="N", min=1, max=65_535, help="Port on this machine.")] = 3000,
) -> int:
    """Open Dagster's UI on the runs of this home."""
    from migration_pipelines.components.headless import close_abandoned_runs
    from migration_pipelines.components.home import serve

    folder, declared = home_folder(home), defs_folder(defs)
    close_abandoned_runs(folder)
    serve(folder, defs=declared, port=port)
    return 0


COMMANDS = (demo, benchmark, ui)


def _show(found: Benchmark) -> None:
    from migration_pipelines.cli.show import amount, console, duration, show_facts, table

    out, transfer = console(), found.transfer
    named = (
        ("one reader, nothing else", found.reader),
        ("one writer, packed before", found.writer),
        ("the guides' loop", found.guides),
        ("this tool, read back and compared", transfer),
    )
    rows = (
        (what, f"{rate.records:,}", duration(rate.seconds), f"{rate.records_per_second:,.0f}")
        for what, rate in named
    )
    title = f"Chroma to PostgreSQL, {found.records:,} records of {found.dimensions:,} dimensions"
    heads = ("what", "records", "time", "records/s")
    out.print(table(title, heads, rows, right=heads[1:]))
    above = transfer.peak - transfer.opened
    own = transfer.anonymous_peak - transfer.anonymous_opened
    show_facts(
        out,
        (
            ("of one reader's limit", f"{found.of_reader:.2f} (at least {_WANTED_OF_READER} is wanted)"),
            (
                "times the guides' loop",
                f"{found.times_guides:.1f} (at least {_WANTED_TIMES_GUIDES} is wanted)",
            ),
            ("plan, before the transfer", duration(transfer.plan_seconds)),
            ("search index, after it", duration(transfer.index_seconds)),
            ("memory", f"{amount(above)} above the opened stores' {amount(transfer.opened)}"),
            ("", f"{amount(own)} of it not pages of files"),
        ),
    )
