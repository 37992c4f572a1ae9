"""Metrics of a migration in Prometheus' words, made of nothing but the engine's events.

Labels are phases and classes of error, never ids, addresses or partitions: however long it runs and
whatever it moves, an exporter has the same few series.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError
from urllib.parse import SplitResult, unquote, urlsplit

from migration_pipelines import errors
from migration_pipelines.errors import ConfigurationError, LedgerError, MissingDriverError
from migration_pipelines.ledger import write_file
from migration_pipelines.migration import DONE, PHASES, Event

JOB = "vector_migrate"
_SECONDS_BETWEEN_FILES = 10.0
_PUSH_TIMEOUT_SECONDS = 5.0
_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1_800, 7_200, 28_800, 86_400)
_RECORDS = (1, 10, 50, 100, 250, 500, 1_000, 2_000, 5_000, 10_000, 50_000)
_MOVED = ("plan", "extract", "transform", "load", "verify", "validate")
_BATCHES = {"batch-extracted": "extract", "batch-loaded": "load", "batch-verified": "verify"}
_LEFT_OUT = ("filtered", "rejected", "skipped")
_log = logging.getLogger(__name__)


class MetricsExporter:
    """Counts what a migration tells of, and shows it to Prometheus; safe to use from several threads.

    Hand `listen` to a migration as its listener. What it shows:

    - `migration_vectors_total{phase}`, `migration_bytes_total{phase}`: what a phase has done, by whole
      partitions; each is counted when the phase is done, so that retries count nothing twice and the figures
      of a run from start to end are those of its report;
    - `migration_left_out_total{why}`: records that were filtered, rejected or skipped;
    - `migration_batch_size{phase}`: a histogram of batches as they pass; its sum follows the work while it is
      done, what is done again included;
    - `migration_duration_seconds{phase}`: a histogram, of the whole migration and of partitions as well;
    - `migration_errors_total{type}`: errors by class, the transient ones that were overcome among them;
    - `migration_retry_attempts_total{phase}`: attempts that were made again;
    - `migration_complete`: 1 once a report says complete.

    Parameters
    ----------
    backend
        `prometheus`.
    port
        Serve the metrics on 127.0.0.1 at this port; 0 takes a free one, which `port` then names.
    textfile
        Write them to this file, whole or not at all, every ten seconds and at the end: for the textfile
        collector of Prometheus' node exporter.
    push_gateway
        Push them to the Pushgateway at this URL when the migration ends and on `close`: for workers that are
        gone before they are scraped. A login in the URL is sent as basic authentication.

    Raises
    ------
    ConfigurationError
        There is no such backend, the port is taken, or the file can't be written.
    MissingDriverError
        prometheus-client isn't installed.
    """

    def __init__(
        self,
        backend: str = "prometheus",
        *,
        port: int | None = None,
        textfile: str | Path | None = None,
        push_gateway: str | None = None,
    ) -> None:
        if backend != "prometheus":
            raise ConfigurationError(f"no metrics backend {backend!r}; there is: prometheus")
        self._client = _client()
        self.registry = self._client.CollectorRegistry()
        self._make()
        self._textfile = None if textfile is None else Path(textfile).absolute()
        self._gateway = None if push_gateway is None else _split(push_gateway)
        self._lock = threading.Lock()  # around files alone: the client's own counters are thread-safe
        self._written = 0.0
        self._server: Any = None
        if self._textfile is not None:
            self._try_file(self._textfile)
        if port is not None:
            self._serve(port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int | None:
        """The port that the metrics are served at."""
        return int(self._server.server_port) if self._server is not None else None

    def listen(self, event: Event) -> None:
        """Count an event."""
        if event.name in DONE:
            self._count_done(event)
        elif event.name in _BATCHES:
            self._batches.labels(_BATCHES[event.name]).observe(event.records)
        elif event.name in _LEFT_OUT:
            self._left_out.labels(event.name).inc(event.records)
        elif event.name == "started" and event.phase == "migration":
            self._complete.set(0)
        elif event.name == "ended":
            self._durations.labels(event.phase).observe(event.seconds)
            self._show(at_the_end=event.phase == "migration")
        elif event.name == "retried":
            self._retries.labels(event.phase).inc()
            self._errors.labels(_kind(event.error)).inc()
        elif event.name == "failed":
            self._errors.labels(_kind(event.error)).inc()

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        shown: bytes = self._client.generate_latest(self.registry)
        return shown.decode()

    def close(self) -> None:
        """Write and push for the last time, and serve no more."""
        self._show(at_the_end=True)
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def _make(self) -> None:
        make = {
            name: partial(getattr(self._client, name), registry=self.registry)
            for name in ("Counter", "Gauge", "Histogram")
        }
        self._vectors = make["Counter"]("migration_vectors", "Records that a phase has done.", ["phase"])
        self._bytes = make["Counter"]("migration_bytes", "Bytes that a phase has done.", ["phase"])
        self._left_out = make["Counter"]("migration_left_out", "Records left out, by why.", ["why"])
        self._errors = make["Counter"]("migration_errors", "Errors by class.", ["type"])
        self._retries = make["Counter"]("migration_retry_attempts", "Attempts made again.", ["phase"])
        self._complete = make["Gauge"]("migration_complete", "1 once the report says complete.")
        self._durations = make["Histogram"](
            "migration_duration_seconds", "How long a phase took.", ["phase"], buckets=_SECONDS
        )
        self._batches = make["Histogram"](
            "migration_batch_size", "Records in a batch as it passes.", ["phase"], buckets=_RECORDS
        )
        # Series are there from the start, at zero: a rate over one that appears late misses its first rise.
        for name in _MOVED:
            self._vectors.labels(name)
            self._bytes.labels(name)
        for name in _LEFT_OUT:
            self._left_out.labels(name)
        for name in PHASES:
            self._retries.labels(name)

    def _count_done(self, event: Event) -> None:
        phase = DONE[event.name]
        if event.records:
            self._vectors.labels(phase).inc(event.records)
        if event.bytes:
            self._bytes.labels(phase).inc(event.bytes)
        if event.name == "validated":
            self._complete.set(event.message == "complete")

    # ── where they are shown ─────────────────────────────────────────────────────────────────────────

    def _serve(self, port: int) -> None:
        try:
            self._server, _ = self._client.start_http_server(port, addr="127.0.0.1", registry=self.registry)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"metrics can't be served on 127.0.0.1:{port}: {error}; choose another port"
            ) from None

    def _try_file(self, path: Path) -> None:
        try:
            write_file(path, self.text().encode())
        except LedgerError as error:
            raise ConfigurationError(f"metrics can't be written: {error}") from error

    def _show(self, *, at_the_end: bool) -> None:
        """Write the file where it is due, and at the end push; metrics that can't be shown stop nothing."""
        with self._lock:
            if self._textfile and (at_the_end or time.monotonic() - self._written > _SECONDS_BETWEEN_FILES):
                self._written = time.monotonic()
                try:
                    write_file(self._textfile, self.text().encode())
                except LedgerError as error:
                    _log.warning("metrics can't be written: %s", error)
            if self._gateway and at_the_end:
                self._push(self._gateway)

    def _push(self, gateway: SplitResult) -> None:
        where = gateway.netloc.rpartition("@")[2]
        try:
            self._client.push_to_gateway(
                gateway._replace(netloc=where).geturl(),
                job=JOB,
                registry=self.registry,
                grouping_key={"instance": socket.gethostname()},  # or workers would replace each other's
                timeout=_PUSH_TIMEOUT_SECONDS,
                handler=partial(_send, self._client.exposition, gateway),
            )
        except (OSError, URLError, ValueError) as error:
            _log.warning("metrics can't be pushed to %s: %s", where, error)


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError:
        raise MissingDriverError(
            "metrics need prometheus-client: pip install 'prometheus-client>=0.20'"
        ) from None
    return prometheus_client


def _split(url: str) -> SplitResult:
    found = urlsplit(url if "://" in url else f"http://{url}")
    if found.scheme not in ("http", "https") or not found.hostname:
        raise ConfigurationError("metrics are pushed to http://HOST:PORT or https://…, which this isn't")
    return found


def _send(exposition: Any, gateway: SplitResult, **request: Any) -> Any:
    """Return the client's own way to send, with the login of the gateway's URL where it has one."""
    if gateway.username is None:
        return exposition.default_handler(**request)
    login = {"username": unquote(gateway.username), "password": unquote(gateway.password or "")}
    return exposition.basic_auth_handler(**request, **login)


def _kind(error: BaseException | None) -> str:
    """Return an error's class where it is one of ours: there are only so many of them."""
    found = type(error)
    return found.__name__ if found.__module__ == errors.__name__ else "other"
