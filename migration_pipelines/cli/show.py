"""What the commands found, for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from migration_pipelines.compare import Comparison
    from migration_pipelines.inspect import Inspection
    from migration_pipelines.model import Changes, CollectionSchema, Loss, Plan, Profile
    from migration_pipelines.results import MigrationEstimate
    from migration_pipelines.validate import Report

_WIDTH_WITHOUT_TERMINAL = 110
_SHOWN_REJECTS = 5
_STATUS_STYLES = {"complete": "bold green", "incomplete": "bold yellow", "failed": "bold red"}


def console() -> Console:
    """Return where results go: standard output, wide enough for a file."""
    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(file=sys.stdout, width=width, highlight=False)


def table(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()
) -> Table:
    """Return a table; the columns in `right` hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for head in heads:
        justify: Any = "right" if head in right else "left"
        made.add_column(head, justify=justify, overflow="fold", no_wrap=head == "store")
    for row in rows:
        made.add_row(*(Text(str(item)) for item in row))
    return made


def show_facts(out: Console, pairs: Iterable[tuple[str, Any]]) -> None:
    """Show names and values side by side, long values whole: they are there to be copied."""
    listed = list(pairs)
    width = max(len(name) for name, _ in listed)
    for name, value in listed:
        line = Text(f"  {name:<{width}}  ", style="dim").append(str(value), style="not dim")
        out.print(line, soft_wrap=True)


def losses_table(losses: Sequence[Loss]) -> Table:
    """Return the losses that a plan lists."""
    return table(
        "Losses",
        ("field", "kind", "records", "what changes", "accepted"),
        (
            (x.field, x.kind, f"{x.count:,}", x.detail, f"kept in {x.kept}" if x.kept else _yes(x.accepted))
            for x in losses
        ),
        right=("records",),
    )


def show_plan(plan: Plan, *, heading: str) -> None:
    """Show what a migration would do, or will."""
    out, profile, estimate = console(), plan.profile, plan.estimate
    out.print(Text(f"{heading}  {plan.source} → {plan.target}", style="bold"))
    show_facts(
        out,
        (
            ("records", f"{profile.records:,} in scope, {amount(profile.bytes)}"),
            *_changes(plan.changes),
            ("partitions", f"{len(plan.partitions):,}"),
            ("vectors", vectors(plan.source_schema)),
            ("arrives as", vectors(plan.target_schema)),
            ("ids", f"{_counted(profile.id_kinds)}; {plan.id_strategy}"),
            ("target", _target(plan)),
            (
                "estimate",
                f"{duration(estimate.seconds)}, {estimate.records_per_second:,.0f} records a second",
            ),
            ("", f"from {estimate.basis}"),
            ("disk", f"{amount(estimate.staging_bytes)} for staging"),
        ),
    )
    if plan.losses:
        out.print(losses_table(plan.losses))
    else:
        out.print("  no losses: everything arrives as it is")
    for warning in plan.warnings:
        out.print(Text(f"  warning: {warning}", style="yellow"))


def _target(plan: Plan) -> str:
    if not plan.target_exists:
        return "is created"
    return f"is there with {plan.target_count:,} records; on existing: {plan.on_existing}"


def show_report(report: Report) -> None:
    """Show what a migration did."""
    out, records, partitions = console(), report.records, report.partitions
    title = Text(f"{report.status}  ", style=_STATUS_STYLES[report.status])
    out.print(title.append(f"{report.source['address']} → {report.target['address']}", style="bold"))
    failed = f", {partitions['failed']:,} failed" if partitions["failed"] else ""
    pairs = [
        ("records", ", ".join(f"{count:,} {name}" for name, count in records.items())),
        ("partitions", f"{partitions['verified']:,} of {partitions['total']:,} verified{failed}"),
        *_changes(report.changes),
        ("counts", f"{report.source['count']:,} in the source, {report.target['count']:,} in the target"),
        ("digest", report.digest),
        ("took", f"{duration(report.seconds)}, {report.records_per_second:,.0f} records a second"),
    ]
    pairs += [("loss", _loss_line(loss)) for loss in report.losses]
    pairs += [("check failed", f"{c.name}: expected {c.expected}, found {c.found}") for c in _broken(report)]
    pairs += [("rejected", f"{r['id']}: {r['reason']}") for r in report.rejects[:_SHOWN_REJECTS]]
    if report.rejects_folder:
        pairs.append(
            ("rejects", f"{report.rejects_folder}: a Parquet collection, to be moved once it is mended")
        )
    pairs += [("error", error) for error in report.errors]
    show_facts(out, pairs)


def _changes(found: Changes | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    fate = "" if not found.deleted or found.removes else ", left in the target"
    counts = f"{found.new:,} new, {found.changed:,} changed, {found.unchanged:,} unchanged"
    return [("since then", f"{counts}, {found.deleted:,} deleted{fate}")]


def _broken(report: Report) -> list[Any]:
    return [check for check in report.checks if not check.passed]


def _loss_line(loss: Loss) -> str:
    kept = f"; kept in {loss.kept}" if loss.kept else ""
    return f"{loss.field}: {loss.kind}, {loss.count:,} records ({loss.detail}){kept}"


def show_inspection(found: Inspection) -> None:
    """Show what a collection is made of and holds."""
    out, schema, profile = console(), found.collection, found.profile
    out.print(Text(found.address, style="bold"))
    size = amount(profile.bytes)
    each = f", {amount(profile.bytes // profile.records)} each" if profile.records else ""
    show_facts(
        out,
        (
            ("records", f"{found.count:,}, {size}{each}"),
            ("vectors", vectors(schema)),
            ("norms", _norms(profile)),
            ("ids", _counted(profile.id_kinds) or "none"),
            ("duplicate ids", f"{profile.duplicate_ids:,}"),
            ("documents", f"{profile.documents:,}"),
            ("metadata", f"{profile.with_metadata:,}, {profile.empty_metadata:,} of them empty"),
            *((("namespaces", _counted(profile.namespaces)),) if profile.namespaces else ()),
            *((f"option {key}", value) for key, value in schema.options.items()),
            *((f"property {key}", value) for key, value in schema.properties.items()),
            ("reads", f"{profile.sample_read_records_per_second:,.0f} records a second, of a sample"),
        ),
    )
    if profile.fields:
        out.print(
            table(
                "Metadata",
                ("key", "kinds of value"),
                ((key, _counted(kinds)) for key, kinds in profile.fields.items()),
            )
        )


def show_comparison(found: Comparison) -> None:
    """Show what two collections have in common."""
    out = console()
    word, style = ("equal", "bold green") if found.agrees else ("different", "bold red")
    title = Text(f"{word}  ", style=style)
    out.print(title.append(f"{found.source.address} ↔ {found.target.address}", style="bold"))
    show_facts(
        out,
        (
            ("records", f"{found.source.count:,} in the source, {found.target.count:,} in the target"),
            ("equal", f"{found.equal:,}"),
            *((("within tolerance", f"{found.within_tolerance:,}"),) if found.within_tolerance else ()),
            ("missing in the target", f"{found.missing:,}"),
            ("only in the target", f"{found.extra:,}"),
            ("different", f"{found.different:,}"),
            *(
                (f"namespace {name or '(default)'}", f"{ours:,} in the source, {theirs:,} in the target")
                for name, ours, theirs in found.namespaces()
            ),
            ("digest of the source", found.source.digest),
            ("digest of the target", found.target.digest),
        ),
    )
    if found.examples:
        rows = ((item.id, item.what) for item in found.examples)
        out.print(table("Examples", ("id", "what differs"), rows))


def show_estimate(found: MigrationEstimate, *, source: str, target: str) -> None:
    """Show what a migration would take."""
    out = console()
    word, style = ("compatible", "bold green") if found.compatible else ("incompatible", "bold red")
    out.print(Text(f"{word}  ", style=style).append(f"{source} → {target}", style="bold"))
    pairs = [
        ("records", f"{found.total_vectors:,} in scope, {found.estimated_batches:,} batches"),
        ("dimensions", f"{found.source_dimension or 'none'} → {found.target_dimension or 'none'}"),
        (
            "takes",
            f"{duration(found.estimated_duration_seconds)}, {found.vectors_per_second:,.0f} records a second",
        ),
        ("to move", amount(found.bytes_to_move)),
        ("in the target", f"{amount(found.target_bytes)}, without its indexes"),
        ("staging", f"{amount(found.staging_bytes)} at a time"),
    ]
    if found.egress_cost is not None:
        cost = f"{found.egress_cost:,.2f}" if found.egress_cost >= 0.01 else "less than 0.01"
        pairs.append(("egress", f"{cost} in your currency"))
    show_facts(out, pairs)
    for warning in found.warnings:
        out.print(Text(f"  warning: {warning}", style="yellow"), soft_wrap=True)


def vectors(schema: CollectionSchema) -> str:
    """Return a collection's vector fields in a line."""
    return "; ".join(
        f"{field.name + ': ' if field.name else ''}{field.kind.value} {field.dtype.value}"
        f"{f' × {field.dimensions:,}' if field.dimensions else ''}, {field.metric or 'no metric'}"
        for field in schema.vectors
    )


def _norms(profile: Profile) -> str:
    return (
        "none" if profile.norms is None else f"{profile.norms[0]:.4g} to {profile.norms[1]:.4g}, of a sample"
    )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _yes(accepted: bool) -> str:  # noqa: FBT001 - a cell of a table
    return "yes" if accepted else "no"


def amount(n_bytes: int) -> str:
    """Return a number of bytes with a fitting unit."""
    size, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """Return a time with fitting units."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
