"""Tables and plots as Dagster metadata: plain text that the UI renders, no library behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import dagster as dg

from migration_pipelines.model import Loss, Receipt
from migration_pipelines.resources import Resources

_BARS = 40
_WIDTH = 30


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Return rows of one shape as a table; what isn't a number or a truth value is shown as text."""
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    columns = list(cells[0]) if cells else ["none"]
    schema = dg.TableSchema([dg.TableColumn(name, _kind(cells, name)) for name in columns])
    return dg.MetadataValue.table([dg.TableRecord(row) for row in cells], schema=schema)


def _cell(value: Any) -> str | int | float | bool | None:
    return value if isinstance(value, bool | int | float | None) else str(value)


def _kind(cells: Sequence[Mapping[str, Any]], name: str) -> str:
    kinds = {type(row[name]) for row in cells}
    known = {bool: "bool", int: "int", float: "float"}
    return known.get(kinds.pop(), "string") if len(kinds) == 1 else "string"


def losses_table(losses: Iterable[Loss | Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Return a plan's losses as a table."""
    rows = [loss.model_dump() if isinstance(loss, Loss) else dict(loss) for loss in losses]
    return table(rows)


def rates_plot(receipts: Sequence[Receipt]) -> dg.MarkdownMetadataValue:
    """Return how fast each partition was read and proven, as bars; many partitions share a bar."""
    together = -(-len(receipts) // _BARS) or 1
    groups = [receipts[start : start + together] for start in range(0, len(receipts), together)]
    rates = [(group[0].key, _rate(group)) for group in groups]
    most = max((rate for _, rate in rates), default=0.0)
    lines = [f"{key}  {_bar(rate, most):<{_WIDTH}} {rate:>10,.0f}" for key, rate in rates]
    unit = "partition" if together == 1 else f"{together} partitions"
    title = f"Records per second, by {unit}: reading from the source and comparing with the target"
    return dg.MetadataValue.md("\n".join([title, "", "```", *lines, "```"]))


def resources_plot(found: Resources | None) -> dg.MarkdownMetadataValue:
    """Return what a run took of its machine while it was at work, as bars; neighbours share a bar."""
    if found is None:
        return dg.MetadataValue.md("Nothing could be sampled.")
    together = -(-len(found.samples) // _BARS)
    groups = [found.samples[start : start + together] for start in range(0, len(found.samples), together)]
    most = max(found.rss_bytes_max, 1)
    lines = [
        f"{group[0].seconds:>8,.1f} s  {_bar(rss, most):<{_WIDTH}} {rss / 1e6:>8,.0f} MB {cpu:>6.0f} %"
        for group in groups
        for rss, cpu in [(max(s.rss_bytes for s in group), fmean(s.cpu_percent for s in group))]
    ]
    title = (
        f"Memory and processor (of one core) of this run: at most {found.rss_bytes_max / 1e6:,.0f} MB and "
        f"{found.cpu_percent_max:,.0f} %, {found.cpu_percent_mean:,.0f} % on average; on the home's disk "
        f"at least {found.disk_free_bytes_min / 1e9:,.1f} GB were free"
    )
    return dg.MetadataValue.md("\n".join([title, "", "```", *lines, "```"]))


def _rate(receipts: Iterable[Receipt]) -> float:
    receipts = list(receipts)
    seconds = sum(sum(receipt.seconds.values()) for receipt in receipts)
    return sum(receipt.read for receipt in receipts) / seconds if seconds else 0.0


def _bar(rate: float, most: float) -> str:
    return "█" * max(round(_WIDTH * rate / most), 1) if most else ""
