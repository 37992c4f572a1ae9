"""Move several collections side by side, and the partitions of one."""

from concurrent.futures import ThreadPoolExecutor

from passages import make_passages

from migration_pipelines import MigrationResult, VectorStoreMigrator, open_address

SOURCE, TARGET = "chroma:./chroma_db", "parquet:./side_by_side/"


def move(collection: str) -> MigrationResult:
    # A migrator of its own: a migration closes its stores when it is done.
    return VectorStoreMigrator(SOURCE, TARGET).migrate(collection)


make_passages()
store, _ = open_address(SOURCE)
with ThreadPoolExecutor(max_workers=2) as pool:
    for result in pool.map(move, store.list_collections()):
        print(result.source_collection, result.success)

result = VectorStoreMigrator(SOURCE, TARGET).migrate("passages", chunk_size=10, parallel=True, max_workers=2)
print(result.success, result.metadata["report"]["partitions"])

# Prints:
# passages True
# True {'total': 3, 'verified': 3, 'failed': 0}
