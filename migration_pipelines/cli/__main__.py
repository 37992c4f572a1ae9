"""`python -m migration_pipelines.cli` is `vector-migrate`."""

from __future__ import annotations

from migration_pipelines.cli.entry import main

main()
