"""Back a collection up into plain files, and restore it."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
backup = VectorStoreMigrator("chroma:./chroma_db", "parquet:./backup/")
assert backup.migrate("passages", "passages-2026-01-31").success

restore = VectorStoreMigrator("parquet:./backup/", "chroma:./restored_db")
print(restore.migrate("passages-2026-01-31", "passages").vectors_migrated)
print(VectorStoreMigrator("chroma:./chroma_db", "chroma:./restored_db").verify("passages").agrees)

# Prints:
# 30
# True
