"""`{{ env.NAME }}` in a declaration, kept as it is until a run needs the value.

Dagster would fill it in while it loads the definitions. Then they couldn't be loaded where the variable
isn't set, and the value would lie in every snapshot of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import dagster as dg

from migration_pipelines.errors import ConfigurationError

_WHOLE = re.compile(r"\s*\{\{\s*env\.([A-Za-z_][A-Za-z0-9_]*)\s*\}\}\s*")


def holds_template(value: Any) -> bool:
    """Whether a value, or one inside it, waits for a run to fill it in."""
    if isinstance(value, Mapping):
        return any(holds_template(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(holds_template(item) for item in value)
    return isinstance(value, str) and "{{" in value


def as_variable(value: Any, kind: Any, *, where: str) -> Any:
    """Return a setting with `{{ env.NAME }}` as Dagster's own reference to the variable.

    Raises
    ------
    ConfigurationError
        The template is only a part of the text: Dagster knows no such reference.
    """
    if not holds_template(value):
        return value
    found = _WHOLE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ConfigurationError(f"{where}: a variable is a whole value, such as {{{{ env.NAME }}}}")
    return dg.EnvVar.int(found[1]) if kind in (int, int | None) else dg.EnvVar(found[1])
