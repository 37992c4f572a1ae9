"""The only module that Dagster loads: everything that is declared under `defs/`.

`VECTOR_MIGRATE_DEFS` names a folder to load in its place: a user's own project keeps its declarations there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import dagster as dg

_OWN = Path(__file__).parent / "defs"


def _as_module(folder: Path) -> ModuleType:
    """Return a folder as the package that Dagster loads components from; it need not be on any path."""
    spec = ModuleSpec("vector_migrate_defs", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module = importlib.util.module_from_spec(spec)
    module.__file__ = None
    sys.modules[spec.name] = module
    return module


@dg.definitions
def defs() -> dg.Definitions:
    """Return all that is declared. Needs no network, no driver, and none of the variables it names."""
    folder = Path(os.environ.get("VECTOR_MIGRATE_DEFS") or _OWN).absolute()
    tree = dg.ComponentTree.from_module(defs_module=_as_module(folder), project_root=folder.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # Dagster's own, of what its components use inside
        found = tree.build_defs()
    # In-process: a process per step would cost more than most steps take.
    return dg.Definitions.merge(found, dg.Definitions(executor=dg.in_process_executor))
