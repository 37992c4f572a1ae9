"""`demo`, `benchmark`, `ui`: the commands beside the work itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from migration_pipelines.cli.failures import program, say
from migration_pipelines.cli.migrations import defs_folder, home_folder, warn_of_password
from migration_pipelines.cli.options import Defs, Home, Quiet, takes
from migration_pipelines.cli.output import Shown

if TYPE_CHECKING:
    from migration_pipelines.benchmark import Benchmark
    from migration_pipelines.benchmark.one_store import StoreBenchmark

Port = Annotated[int, Option(metavar="N", min=1, max=65_535, help="Port on this machine.")]
_WANTED_OF_READER, _WANTED_TIMES_GUIDES = 0.85, 12


@takes(Shown)
def demo(
    shown: Shown,
    *,
    ui: Annotated[bool, Option("--ui", help="Open Dagster's UI on the demo's last run instead.")] = False,
    port: Port = 3000,
    home: Home = None,
    quiet: Quiet = False,
) -> int:
    """Run a whole migration on real data, as a Dagster backfill.

    5,000 passages of the Python documentation, with real embeddings, move from a Chroma folder into
    PostgreSQL (PGVECTOR_URL, else one that is started).
    """
    folder = home_folder(home) / "demo"
    return _serve_demo(folder, port) if ui else _run_demo(folder, shown, quiet=quiet)


def _run_demo(folder: Path, shown: Shown, *, quiet: bool) -> int:
    from migration_pipelines.cli.progress import listening
    from migration_pipelines.cli.show import show_report
    from migration_pipelines.demo import run_demo

    with listening(quiet=quiet) as meter:
        tell = (lambda text: None) if quiet else say  # noqa: ARG005
        report = run_demo(home=folder, tell=tell, listener=meter)
    if not shown.show(report.model_dump(mode="json")) and not quiet:
        show_report(report)
        say(f"see it in Dagster's UI: {program()} demo --ui")
    return report.exit_status


def _serve_demo(folder: Path, port: int) -> int:
    """Serve the UI while the demo's PostgreSQL runs, so that its partitions can be run again there."""
    from migration_pipelines.demo import engines, page_of_run

    if not (folder / "defs").exists():
        say(f"there is no demo in {folder} yet: run {program()} demo first")
        return 2
    with engines(folder):
        say(f"the run is at http://127.0.0.1:{port}{page_of_run(folder)}; Ctrl-C stops")
        command = [sys.executable, "-m", "migration_pipelines.cli", "ui", "--port", str(port)]
        served = subprocess.Popen([*command, "--home", str(folder), "--defs", str(folder / "defs")])  # noqa: S603
        # Ctrl-C reaches both: the UI stops first, then PostgreSQL.
        while True:
            try:
                return max(served.wait(), 0)
            except KeyboardInterrupt:
                continue


@takes(Shown)
def benchmark(
    shown: Shown,
    *,
    store: Annotated[
        str | None,
        Argument(metavar="[ADDRESS]", help="A store to measure by itself, beside its driver's own limit."),
    ] = None,
    records: Annotated[int, Option(metavar="N", min=1_000, help="Records to move.")] = 100_000,
    dimensions: Annotated[int, Option(metavar="N", min=1, help="Dimensions of their vectors.")] = 384,
    keep: Annotated[bool, Option("--keep", help="Leave the tables that were written.")] = False,
    home: Home = None,
    quiet: Quiet = False,
) -> int:
    """Measure a transfer beside the limits of the drivers.

    Chroma to PostgreSQL (PGVECTOR_URL, else one that is started), beside one reader, one writer and the
    loop of common guides, all in the same run. Or the store at an address, read and written beside a bare
    loop over its driver, in collections that are removed again.
    """
    if store is not None:
        return _benchmark_store(store, records=records, dimensions=dimensions, shown=shown, quiet=quiet)
    from migration_pipelines.benchmark import run_benchmark

    found = run_benchmark(
        records=records,
        dimensions=dimensions,
        home=home_folder(home),
        keep=keep,
        tell=(lambda text: None) if quiet else say,  # noqa: ARG005
    )
    if not shown.show(found.document()) and not quiet:
        _show(found)
    return 0


def _benchmark_store(address: str, *, records: int, dimensions: int, shown: Shown, quiet: bool) -> int:
    from migration_pipelines.benchmark.one_store import run_store_benchmark
    from migration_pipelines.store import open_address

    warn_of_password(address)
    store, _ = open_address(address)
    tell = (lambda text: None) if quiet else say  # noqa: ARG005
    try:
        found = run_store_benchmark(store, records=records, dimensions=dimensions, tell=tell)
    finally:
        store.close()
    if not shown.show(found.document()) and not quiet:
        _show_store(found)
    return 0


def ui(
    *,
    home: Home = None,
    defs: Defs = None,
    port: Port = 3000,
) -> int:
    """Open Dagster's UI on the runs of this home."""
    from migration_pipelines.components.headless import close_abandoned_runs
    from migration_pipelines.components.home import serve

    folder, declared = home_folder(home), defs_folder(defs)
    close_abandoned_runs(folder)
    serve(folder, defs=declared, port=port)
    return 0


COMMANDS = (demo, benchmark, ui)


def _show_store(found: StoreBenchmark) -> None:
    from migration_pipelines.cli.show import console, table

    heads = ("what", "the driver alone, records/s", "this tool, records/s", "ratio")
    rows = [
        (what, f"{bare.records_per_second:,.0f}", f"{ours.records_per_second:,.0f}", f"{ratio:.2f}")
        for what, bare, ours, ratio in (
            ("reading", found.driver_read, found.read, found.of_driver_read),
            ("writing", found.driver_write, found.write, found.of_driver_write),
        )
    ]
    title = f"{found.store}, {found.records:,} records of {found.dimensions:,} dimensions"
    console().print(table(title, heads, rows, right=heads[1:]))


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
