"""A checkpoint file: a small JSON file that names the folder beside it which holds a migration's ledger.

    {"version": 1, "ledger": "nightly.json.ledger", "source": "...", "target": "..."}

The folder is the checkpoint; the file is what people and programs hand on. Both can be moved together.
"""

from __future__ import annotations

from pathlib import Path

import orjson

from migration_pipelines.errors import ConfigurationError
from migration_pipelines.ledger import Ledger, write_file

_VERSION = 1


def open_checkpoint(file: Path, *, resume: bool, source: str, target: str) -> Ledger:
    """Return the ledger of a checkpoint file; where there is no file yet, write it.

    Parameters
    ----------
    resume
        Take the ledger that the file names. Else it is named anew, in the folder `<file>.ledger` beside it.
    source, target
        Addresses, for people who look into the file. Whether the ledger is that of the same move, its plan
        tells.

    Raises
    ------
    ConfigurationError
        The file is no checkpoint.
    """
    if resume and file.exists():
        return Ledger(file.parent / _ledger_name(file))
    name = f"{file.name}.ledger"
    content = {"version": _VERSION, "ledger": name, "source": source, "target": target}
    write_file(file, orjson.dumps(content, option=orjson.OPT_INDENT_2))
    return Ledger(file.parent / name)


def _ledger_name(file: Path) -> str:
    try:
        found = orjson.loads(file.read_bytes())
        version, name = found["version"], found["ledger"]
    except (OSError, ValueError, KeyError, TypeError):
        version = name = None
    # The folder lies beside the file: a name with a path in it is none that was written here.
    if version != _VERSION or not isinstance(name, str) or Path(name).name != name:
        raise ConfigurationError(
            f"{file} is no checkpoint of version {_VERSION}: name another file, or start without resume",
            expected=_VERSION,
            found=version,
        )
    return name
