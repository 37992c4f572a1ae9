"""Tell the ways apart in which a migration ends that can't be made."""

from passages import make_passages

from migration_pipelines import CollectionNotFoundError, MigrationError, ValidationError, VectorStoreMigrator

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "qdrant:./qdrant_data")
try:
    result = migrator.migrate("pasages")
except CollectionNotFoundError:
    print("there is no such collection")
except ValidationError as error:
    print("the target differs from the source", error.facts["result"].errors)
except MigrationError as error:
    print("the migration could not be made, or not be finished", error)

# Prints:
# there is no such collection
