"""Traces: spans of the migration, its partitions and their phases, with the figures of the report."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from migration_pipelines.errors import StoreUnavailableError, TransientError
from migration_pipelines.migration import Event
from migration_pipelines.migrator import run_migration
from migration_pipelines.retry import RetryPolicy
from migration_pipelines.tracing import MigrationTracer
from migration_pipelines_tests.observed import failing_first, migration, refusing
from migration_pipelines_tests.shell import Shell, fill, shell

__all__ = ["shell"]

PHASES = ["migration.extract", "migration.load", "migration.verify"]  # of a plain partition


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> MigrationTracer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return MigrationTracer(provider)


def named(spans: Sequence[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def below(spans: Sequence[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    found = [span for span in spans if span.parent and span.parent.span_id == parent.context.span_id]
    return sorted(found, key=lambda span: span.start_time or 0)


def total(spans: Sequence[ReadableSpan], name: str, what: str) -> int:
    return sum(int(span.attributes[f"migration.{what}"]) for span in named(spans, name))  # type: ignore[index,arg-type]


def test_the_tree_of_spans_shows_the_figures_of_the_report(tmp_path, exporter, tracer):
    with migration(tmp_path, tracer.listen) as moving:
        report = run_migration(moving)
    spans = exporter.get_finished_spans()
    (root,) = [span for span in spans if span.parent is None]
    assert root.name == "migration"
    assert root.attributes["migration.id"] == moving.plan.migration_id
    children = [span.name for span in below(spans, root)]
    assert children == [
        "migration.plan", *["migration.partition"] * 10, "migration.publish", "migration.validate"
    ]  # fmt: skip
    for partition in named(spans, "migration.partition"):
        inside = below(spans, partition)
        assert [span.name for span in inside] == PHASES
        key = partition.attributes["migration.partition"]
        assert {span.attributes["migration.partition"] for span in inside} == {key}
        assert partition.start_time <= inside[0].start_time
        assert inside[-1].end_time <= partition.end_time
    records = report.records
    assert total(spans, "migration.plan", "records") == records["read"] - records["filtered"] == 1_000
    assert total(spans, "migration.extract", "records") == records["read"]
    assert total(spans, "migration.load", "records") == records["loaded"]
    assert total(spans, "migration.verify", "records") == records["verified"]
    assert total(spans, "migration.verify", "bytes") == report.bytes
    (last,) = named(spans, "migration.validate")
    assert last.attributes["migration.status"] == report.status
    assert all(span.status.status_code is trace.StatusCode.UNSET for span in spans)


def test_a_drivers_own_spans_hang_below_the_phase_that_called_it(tmp_path, exporter, tracer):
    seen: list[tuple[str, str]] = []

    def look(batch: object) -> None:
        current = trace.get_current_span()
        seen.append((current.name, current.attributes["migration.partition"]))  # type: ignore[attr-defined]

    with migration(tmp_path, tracer.listen, fault=look) as moving:
        run_migration(moving)
    assert {name for name, _ in seen} == {"migration.load"}
    assert len({partition for _, partition in seen}) == 10
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_retries_and_refusals_are_noted_where_they_happened(tmp_path, exporter, tracer):
    refuse, fail = refusing("doc#00123"), failing_first(2, TransientError("busy"))
    with migration(tmp_path, tracer.listen, fault=lambda batch: (fail(batch), refuse(batch))) as moving:
        report = run_migration(moving)
    spans = exporter.get_finished_spans()
    noted = [(span, event) for span in named(spans, "migration.load") for event in span.events]
    assert [event.name for _, event in noted].count("retried") == 2
    ((span, event),) = [(span, event) for span, event in noted if event.name == "rejected"]
    assert event.attributes["records"] == report.records["rejected"] == 1
    assert span.attributes["migration.records"] == 99


def test_an_error_is_recorded_without_what_the_driver_raised(tmp_path, exporter, tracer, monkeypatch):
    monkeypatch.setenv("QDRANT_API_KEY", "planted-secret-1")

    raised = StoreUnavailableError("nothing answers to planted-secret-1")
    raised.__cause__ = ValueError("headers: {'authorization': 'planted-secret-2'}")
    fail = failing_first(1, raised)
    moving = migration(tmp_path, tracer.listen, fault=fail, workers=1, retry=RetryPolicy(attempts=1))
    with moving, pytest.raises(StoreUnavailableError):
        run_migration(moving)
    spans = exporter.get_finished_spans()
    failed = [span for span in spans if span.status.status_code is trace.StatusCode.ERROR]
    assert sorted(span.name for span in failed) == ["migration", "migration.load", "migration.partition"]
    (event,) = named(spans, "migration.load")[0].events
    assert event.attributes["exception.type"] == "StoreUnavailableError"
    assert event.attributes["exception.message"] == "nothing answers to ***"
    assert "planted-secret" not in "".join(span.to_json() for span in spans)


def test_an_interrupted_run_leaves_no_span_open(tmp_path, exporter, tracer):
    def interrupt(_batch: object) -> None:
        raise KeyboardInterrupt

    moving = migration(tmp_path, tracer.listen, fault=interrupt, workers=1)
    with moving, contextlib.suppress(KeyboardInterrupt):
        run_migration(moving)
    spans = exporter.get_finished_spans()
    assert {"migration", "migration.partition", "migration.load"} <= {span.name for span in spans}
    (root,) = named(spans, "migration")
    assert root.status.description.startswith("KeyboardInterrupt")


def test_a_phase_on_its_own_hangs_below_what_is_current(exporter, tracer):
    provider = TracerProvider()
    with provider.get_tracer("outer").start_as_current_span("somebody's") as outer:
        tracer.listen(Event(name="started", phase="load", partition="p"))
        tracer.listen(Event(name="loaded", phase="load", partition="p", records=3))
        tracer.listen(Event(name="ended", phase="load", partition="p"))
    (span,) = exporter.get_finished_spans()
    assert span.parent.span_id == outer.get_span_context().span_id


def test_without_a_provider_nothing_of_the_sdk_is_needed(tmp_path):
    code = """
import sys
from migration_pipelines.migration import Event
from migration_pipelines.tracing import MigrationTracer
tracer = MigrationTracer()
tracer.listen(Event(name="started", phase="load"))
tracer.listen(Event(name="ended", phase="load"))
print([name for name in sys.modules if name.startswith("opentelemetry.sdk")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_trace_without_an_endpoint_says_which_variable_to_set(shell: Shell, monkeypatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    fill("parquet:source#docs")
    found = shell("run", "--source", "parquet:source#docs", "--target", "parquet:target#docs", "--trace")
    assert found.status == 2
    assert "set OTEL_EXPORTER_OTLP_ENDPOINT" in found.err
    assert not Path("target").exists()


# ── a collector ──────────────────────────────────────────────────────────────────────────────────────


class Collector(TraceServiceServicer):  # type: ignore[misc]
    """An OTLP collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:  # noqa: N802 - gRPC's name
        self.spans += [
            span
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return ExportTraceServiceResponse()


def test_trace_sends_the_tree_to_the_endpoint_of_the_environment(shell: Shell, monkeypatch) -> None:
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    fill("parquet:source#docs")
    found = shell(
        "run", "--source", "parquet:source#docs", "--target", "parquet:target#docs", "--trace", "--json"
    )  # fmt: skip
    server.stop(None)
    assert found.status == 0
    loaded = [
        attribute.value.int_value
        for span in collector.spans
        if span.name == "migration.load"
        for attribute in span.attributes
        if attribute.key == "migration.records"
    ]
    assert sum(loaded) == found.document["records"]["loaded"] == 300
    assert [span.name for span in collector.spans if not span.parent_span_id] == ["migration"]
