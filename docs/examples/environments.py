"""The same migration into staging and production."""

import os

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

TARGETS = {"staging": "qdrant:./staging", "production": "qdrant:./production"}

make_passages()
environment = os.environ.get("ENVIRONMENT", "staging")
migrator = VectorStoreMigrator("chroma:./chroma_db", TARGETS[environment])
result = migrator.migrate("passages", dry_run=environment == "production")
print(environment, result.success)

# Prints:
# staging True
