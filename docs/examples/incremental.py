"""Only what changed since the last complete run, deletes included."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator, open_address

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "parquet:./in_step/")
print(migrator.migrate("passages", incremental=True).vectors_migrated)

store, collection = open_address("chroma:./chroma_db#passages")
assert collection is not None
span, ids = next(store.split(collection, span_records=2))
assert ids is not None
store.delete(collection, ids)
store.close()

second = migrator.migrate("passages", incremental=True, apply_deletes=True)
print(second.success, second.vectors_migrated, second.metadata["changes"]["deleted"])
assert migrator.verify("passages").agrees
print(migrator.migrate("passages", incremental=True).metadata["changes"]["unchanged"])

# Prints:
# 30
# True 0 2
# 28
