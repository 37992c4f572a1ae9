"""Who else hears of a run: metrics, traces and logs, as the command line asks for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from migration_pipelines.cli.failures import say, saying, wants_json
from migration_pipelines.cli.options import MoveOptions, RunOptions

if TYPE_CHECKING:
    from migration_pipelines.migration import Listener

_listeners: tuple[Listener, ...] = ()


@contextmanager
def observing(request: MoveOptions) -> Iterator[None]:
    """Let what the request asks for hear of every migration of this command.

    Raises
    ------
    ConfigurationError
        It can't be had: a port is taken, a file can't be written, no endpoint is set.
    """
    global _listeners
    with ExitStack() as stack:
        _listeners = tuple(_wanted(request, stack))
        stack.callback(_forget)
        yield


def heard(progress: Listener) -> Listener:
    """Return a listener that tells progress and whoever is observing."""
    if not _listeners:
        return progress
    from migration_pipelines.migration import together

    return together(progress, *_listeners)


@contextmanager
def saying_as_asked(arguments: Sequence[str]) -> Iterator[None]:
    """Say things as lines of JSON where the command line or the environment asks for those."""
    if not wants_json(arguments):
        yield
        return
    from migration_pipelines.logs import JsonLog

    with saying(JsonLog(arguments=arguments).write_message):
        yield


def _forget() -> None:
    global _listeners
    _listeners = ()


def _wanted(request: MoveOptions, stack: ExitStack) -> Iterator[Listener]:
    if request.logs_json:
        from migration_pipelines.logs import JsonLog

        log = JsonLog(arguments=sys.argv)
        stack.enter_context(log.collecting())
        stack.enter_context(saying(log.write_message))
        yield log.listen
    if not isinstance(request, RunOptions):
        return
    if request.shows_metrics:
        from migration_pipelines.metrics import MetricsExporter

        exporter = MetricsExporter(
            port=request.metrics_port, textfile=request.metrics_file, push_gateway=request.metrics_push
        )
        stack.enter_context(exporter)
        if exporter.port is not None:
            say(f"metrics: http://127.0.0.1:{exporter.port}/metrics")
        yield exporter.listen
    if request.trace:
        from migration_pipelines.tracing import exporting

        yield stack.enter_context(exporting()).listen
