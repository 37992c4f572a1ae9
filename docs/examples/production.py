"""A migration as it is made in production: rehearsed, estimated, resumable."""

import sys

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "qdrant:./production", max_retries=8)

rehearsed = migrator.migrate("passages", dry_run=True)
if not rehearsed.success:
    sys.exit("\n".join(rehearsed.errors))
estimate = migrator.estimate("passages")
if estimate.estimated_duration_seconds > 4 * 3600:
    sys.exit("too long for tonight")

result = migrator.migrate("passages", resume=True, checkpoint_file="tonight.json")
if not result.success:
    sys.exit("\n".join(result.errors))
print(f"{result.vectors_migrated} records proven")

# Prints:
# 30 records proven
