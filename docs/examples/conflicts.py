"""Say what becomes of ids that the target holds already."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "parquet:./held/")
migrator.migrate("passages", filter={"number": {"$lt": 5}})
result = migrator.migrate("passages", on_conflict="skip")
print(result.success, result.vectors_migrated, result.metadata["skipped"])

# Prints:
# True 25 5
