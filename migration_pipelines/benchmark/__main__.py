"""One measurement in a process of its own: its name and the setup as arguments, its result as JSON."""

from __future__ import annotations

import sys

from migration_pipelines.benchmark import Setup
from migration_pipelines.benchmark.measures import MEASURES

if __name__ == "__main__":
    found = MEASURES[sys.argv[1]](Setup.model_validate_json(sys.argv[2]))
    sys.stdout.write("null" if found is None else found.model_dump_json())
