"""Find out what a migration would do, without writing anything."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "qdrant:./qdrant_data")
found = migrator.migrate("passages", dry_run=True)
print(found.success, found.vectors_migrated, found.metadata["in_scope"])
for loss in found.metadata["losses"]:
    print(loss["field"], loss["kind"], loss["count"], loss["detail"])

# Prints:
# True 0 30
# id id 30 written as a UUID made from the id
