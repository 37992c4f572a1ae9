"""`demo`, `benchmark`, `ui`: the commands beside the work itself."""

from __future__ import annotations

from migration_pipelines.cli.options import Home, home_folder


def demo(*, home: Home = None) -> int:
    """Run a whole migration on real data, as a Dagster backfill."""
    from migration_pipelines.demo import run_demo

    return run_demo(home=home_folder(home))


COMMANDS = (demo,)
