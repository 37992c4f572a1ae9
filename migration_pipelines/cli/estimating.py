"""`estimate`: what a move would take, measured."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from migration_pipelines.cli.failures import say
from migration_pipelines.cli.options import AllowLoss, BatchSize, Metric, OnExisting, Request, takes
from migration_pipelines.cli.reporting import emit, reporting

_INCOMPATIBLE = 2


@dataclass(frozen=True, kw_only=True)
class EstimateRequest(Request):
    """Which move, and what is to be measured."""

    batch_size: BatchSize = None
    allow_loss: AllowLoss = None
    metric: Metric = None
    on_existing: OnExisting = None
    write_sample: Annotated[
        bool,
        Option(
            "--write-sample/--no-write-sample",
            help="Move the first records, up to 16,000, into a scratch collection of the target, which is "
            "dropped again (default), or never write into the target and take its typical rate.",
            show_default=False,
        ),
    ] = True
    price_per_gb: Annotated[
        float | None,
        Option(metavar="PRICE", min=0, help="Of egress, a GB of 10^9 bytes, in your currency."),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return what was asked for beside the addresses, in the words of `MigrationConfig`."""
        return {**super().settings(), **self.said("batch_size", "allow_loss", "metric", "on_existing")}


@takes(EstimateRequest)
def estimate(request: EstimateRequest) -> int:
    """Measure what a move would take: time, room, money.

    By one worker. The records in scope are counted, and a sample of them is moved, read back and compared.
    """
    with reporting(request), tempfile.TemporaryDirectory(prefix="vector-migrate-") as home:
        return _estimated(request, Path(home))


COMMANDS = (estimate,)


def _estimated(request: EstimateRequest, home: Path) -> int:
    from migration_pipelines import estimation
    from migration_pipelines.cli.progress import listening

    with (
        listening(quiet=request.quiet) as meter,
        request.migration(home=home, listener=meter, workers=1) as migration,
    ):
        meter.migration = migration
        if migration.config.on_existing == "refuse":  # a target that holds records is for the run to refuse
            migration.config = migration.config.model_copy(update={"on_existing": "merge"})
        found = estimation.estimate(
            migration, write_sample=request.write_sample, price_per_gb=request.price_per_gb
        )
        sides = {
            "source": migration.config.source,
            "target": migration.target.address(migration.target_collection),
        }
    status = "compatible" if found.compatible else "incompatible"
    if not emit(request, {"status": status, **sides, **asdict(found)}) and not request.quiet:
        from migration_pipelines.cli.show import show_estimate

        show_estimate(found, **sides)
    if found.compatible:
        return 0
    say(f"error: the move can't be made as it is asked for: {'; '.join(found.warnings)}")
    return _INCOMPATIBLE
