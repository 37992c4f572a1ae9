"""Say how often and after how long a store is tried again."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
migrator = VectorStoreMigrator(
    "chroma:./chroma_db", "qdrant:./qdrant_data", max_retries=5, retry_delay=0.5, retry_backoff=3.0
)
print(migrator.migrate("passages").success)

# Prints:
# True
