"""Follow a migration batch by batch."""

from passages import make_passages

from migration_pipelines import MigrationProgress, VectorStoreMigrator


def show(progress: MigrationProgress) -> None:
    print(
        f"{progress.percentage:.0f} %: {progress.vectors_processed} of {progress.total_vectors}, "
        f"batch {progress.current_batch} of {progress.total_batches}, {progress.errors} errors"
    )


make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "parquet:./followed/", on_progress=show)
migrator.migrate("passages", batch_size=10)

# Prints:
# 33 %: 10 of 30, batch 1 of 3, 0 errors
# 67 %: 20 of 30, batch 2 of 3, 0 errors
# 100 %: 30 of 30, batch 3 of 3, 0 errors
# 100 %: 30 of 30, batch 3 of 3, 0 errors
# 100 %: 30 of 30, batch 3 of 3, 0 errors
