"""Go on where an earlier run stopped."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "parquet:./resumed/")
result = migrator.migrate("passages", resume=True, checkpoint_file="passages.checkpoint.json")
print(result.success)

# Prints:
# True
