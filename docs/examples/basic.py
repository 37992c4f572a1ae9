"""A first migration: from a Chroma folder to a Qdrant folder."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "qdrant:./qdrant_data")
result = migrator.migrate("passages")
print(result.success, result.vectors_migrated, result.vectors_failed)
print(result.total_vectors, result.success_rate)

# Prints:
# True 30 0
# 30 1.0
