"""The project's home as Dagster needs it: `<home>/dagster` holds its history, beside the ledgers."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def dagster_home(home: Path) -> Path:
    """Return Dagster's folder in a home; make it, with the project's settings, where it isn't there.

    The settings are copied once: whoever changes them there keeps the change.
    """
    folder = home.absolute() / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "dagster.yaml").exists():
        shutil.copyfile(_settings(), folder / "dagster.yaml")
    return folder


def _settings() -> Path:
    """Return the project's dagster.yaml: the checkout's, or the copy that lies in an installed package."""
    checkout = _PACKAGE.parent / "dagster.yaml"
    return checkout if checkout.exists() else _PACKAGE / "dagster.yaml"


def environment(home: Path, defs: Path | None = None) -> Mapping[str, str]:
    """Return the variables by which every process of Dagster finds the home and the declarations."""
    found = {"VECTOR_MIGRATE_HOME": str(home.absolute()), "DAGSTER_HOME": str(dagster_home(home))}
    return {**found, "VECTOR_MIGRATE_DEFS": str(defs.absolute())} if defs else found


def serve(home: Path, *, defs: Path | None = None, port: int = 3000) -> None:
    """Become Dagster's webserver and daemon on this home, reachable from this machine only; never returns."""
    # A shell that starts us in the background ignores SIGINT, and what is ignored stays so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    module = "migration_pipelines.definitions"
    command = [sys.executable, "-W", "ignore", "-m", "dagster", "dev", "-m", module, "-h", "127.0.0.1"]
    variables = {**os.environ, **environment(home, defs), "PYTHONWARNINGS": "ignore"}
    os.execve(sys.executable, [*command, "-p", str(port)], variables)  # noqa: S606 - our own interpreter
