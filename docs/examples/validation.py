"""Prove a migration, and compare two collections whoever wrote them."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "parquet:./proven/")
result = migrator.migrate("passages")
print(result.metadata["validated"])

comparison = migrator.verify("passages")
print(comparison.agrees, comparison.equal, comparison.missing, comparison.extra, comparison.different)
assert comparison.source.digest == comparison.target.digest

# Prints:
# True
# True 30 0 0 0
