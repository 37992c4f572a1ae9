"""`vector-migrate`, the command line: drives the same phases, over the same ledgers, as Dagster does.

What a command found goes to standard output, with `--output json` or `yaml` as one document; progress,
warnings and errors go to standard error. Nothing heavy is imported before a command runs, and no driver
before its store is used, so that `vector-migrate --help` answers at once.

====  ==============================================================================================
exit  means
====  ==============================================================================================
0     complete and verified; equal; compatible
1     incomplete or failed, or more records were refused than allowed
2     the request must change: usage, configuration, no such collection, a move that can't be made
3     validation found differences
4     a store is unreachable or refuses the login
130   interrupted; the same command goes on
====  ==============================================================================================
"""

from __future__ import annotations

from migration_pipelines.cli.entry import main

__all__ = ["main"]
