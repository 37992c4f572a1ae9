"""Traces of a migration, made of nothing but the engine's events: spans of it, its partitions, their phases.

Needs opentelemetry-api alone; without a provider its spans are none and cost nothing worth naming.
`exporting` sets one up for the environment's OTLP endpoint.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from migration_pipelines.errors import ConfigurationError, MissingDriverError
from migration_pipelines.migration import DONE, Event
from migration_pipelines.redaction import redacted

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, TracerProvider

NAME = "migration_pipelines"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_NOTED = ("filtered", "rejected", "skipped")


@dataclass
class _Open:
    span: Span
    token: Any  # what takes the span off this thread's context again


class MigrationTracer:
    """Turns events into spans; safe to use from several threads.

    Hand `listen` to a migration as its listener. A span is current in the thread that is at work on it, so
    that spans of an instrumented driver hang below the phase that called it.

    Parameters
    ----------
    provider
        The process's own where left out.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        from opentelemetry import trace

        self._trace = trace
        self._tracer = trace.get_tracer(NAME, tracer_provider=provider)
        self._open: dict[tuple[str, str], _Open] = {}
        self._lock = threading.Lock()

    def listen(self, event: Event) -> None:
        """Begin, end or annotate a span."""
        if event.name == "started":
            self._start(event)
        elif event.name == "ended":
            self._end(event)
        elif event.name in DONE:
            self._annotate(event)
        elif event.name == "retried":
            self._note(event, {"attempt": event.attempt, "error.type": type(event.error).__name__})
        elif event.name in _NOTED:
            self._note(event, {"records": event.records})

    def _start(self, event: Event) -> None:
        from opentelemetry import context

        name = event.phase if event.phase == "migration" else f"migration.{event.phase}"
        attributes = {"migration.id": event.migration, "migration.phase": event.phase}
        if event.partition:
            attributes["migration.partition"] = event.partition
        span = self._tracer.start_span(name, context=self._parent(event), attributes=attributes)
        token = context.attach(self._trace.set_span_in_context(span))
        with self._lock:
            self._open[event.phase, event.partition] = _Open(span, token)

    def _parent(self, event: Event) -> Context | None:
        """Return the context of the partition's span, else the migration's, else what is current here."""
        above = [("migration", "")] if event.phase == "partition" else [("partition", event.partition)]
        with self._lock:
            for key in (*above, ("migration", "")):
                if key in self._open and key != (event.phase, event.partition):
                    return self._trace.set_span_in_context(self._open[key].span)
        return None

    def _end(self, event: Event) -> None:
        from opentelemetry import context

        with self._lock:
            found = self._open.pop((event.phase, event.partition), None)
        if found is None:
            return
        found.span.set_attribute("migration.id", event.migration)  # with the plan's generation by now
        if event.error is not None:
            self._fail(found.span, event.error)
        context.detach(found.token)
        found.span.end()

    def _fail(self, span: Span, error: BaseException) -> None:
        # Not record_exception: its stack trace goes on to what a driver raised, tokens in headers and all.
        message = redacted(str(error))
        facts = {"exception.type": type(error).__name__, "exception.message": message}
        span.add_event("exception", facts)
        span.set_status(self._trace.StatusCode.ERROR, f"{type(error).__name__}: {message}")

    def _annotate(self, event: Event) -> None:
        phase = DONE[event.name]
        found = self._find(phase, event.partition)
        if found is not None:
            found.set_attributes({"migration.records": event.records, "migration.bytes": event.bytes})
            if event.message:
                found.set_attribute("migration.status", event.message)

    def _note(self, event: Event, facts: dict[str, Any]) -> None:
        found = self._find(event.phase, event.partition)
        if found is not None:
            found.add_event(event.name, facts)

    def _find(self, phase: str, partition: str) -> Span | None:
        with self._lock:
            found = self._open.get((phase, partition))
        return found.span if found is not None else None


@contextmanager
def exporting() -> Iterator[MigrationTracer]:
    """Yield a tracer whose spans go to the OTLP endpoint that the environment names; flushed on leaving.

    Raises
    ------
    ConfigurationError
        `OTEL_EXPORTER_OTLP_ENDPOINT` isn't set.
    MissingDriverError
        The exporter for the protocol isn't installed.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        raise ConfigurationError(
            f"traces go to an OTLP endpoint: set {_ENDPOINTS[1]}, such as http://localhost:4317"
        )
    exporter = _exporter()
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME") or "vector-migrate"
    provider = SdkProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield MigrationTracer(provider)
    finally:
        provider.shutdown()


def _exporter() -> Any:
    protocol = next(filter(None, map(os.environ.get, _PROTOCOLS)), "grpc")
    kind = "grpc" if protocol == "grpc" else "http"
    try:
        found = import_module(f"opentelemetry.exporter.otlp.proto.{kind}.trace_exporter")
    except ImportError:
        raise MissingDriverError(
            f"traces by {protocol} need an exporter: pip install opentelemetry-exporter-otlp-proto-{kind}"
        ) from None
    return found.OTLPSpanExporter()
