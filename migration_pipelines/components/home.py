"""The project's home as Dagster needs it: `<home>/dagster` holds its history, beside the ledgers."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

_SETTINGS = Path(__file__).parent  # dagster.yaml and workspace.yaml, which the checkout links to


def dagster_home(home: Path) -> Path:
    """Return Dagster's folder in a home; make it, with the project's settings, where it isn't there.

    The settings are copied once: whoever changes them there keeps the change.
    """
    folder = home.absolute() / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dagster.yaml", "workspace.yaml"):
        if not (folder / name).exists():
            shutil.copyfile(_SETTINGS / name, folder / name)
    return folder


def environment(home: Path, defs: Path | None = None) -> Mapping[str, str]:
    """Return the variables by which every process of Dagster finds the home and the declarations."""
    found = {"VECTOR_MIGRATE_HOME": str(home.absolute()), "DAGSTER_HOME": str(dagster_home(home))}
    return {**found, "VECTOR_MIGRATE_DEFS": str(defs.absolute())} if defs else found


def serve(home: Path, *, defs: Path | None = None, port: int = 3000) -> None:
    """Become Dagster's webserver and daemon on this home, reachable from this machine only; never returns."""
    # A shell that starts us in the background ignores SIGINT, and what is ignored stays so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    variables = {**os.environ, **environment(home, defs), "PYTHONWARNINGS": "ignore"}
    workspace = str(dagster_home(home) / "workspace.yaml")
    command = [sys.executable, "-m", "dagster", "dev", "-w", workspace, "-h", "127.0.0.1", "-p", str(port)]
    os.execve(sys.executable, command, variables)  # noqa: S606 - our own interpreter
