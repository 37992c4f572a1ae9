"""Move only the records that a filter selects."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "parquet:./filtered/")
result = migrator.migrate("passages", filter={"number": {"$gte": 10, "$lt": 20}})
print(result.vectors_migrated)
assert migrator.verify("passages", filter="number>=10,number<20").agrees

# Prints:
# 10
