"""Measure and rehearse one migration into several stores."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
for target in ("qdrant:./trial_qdrant", "parquet:./trial_parquet/", "chroma:./trial_chroma"):
    migrator = VectorStoreMigrator("chroma:./chroma_db", target)
    estimate = migrator.estimate("passages")
    losses = migrator.migrate("passages", dry_run=True).metadata["losses"]
    assert estimate.vectors_per_second > 0
    print(migrator.target.kind, estimate.compatible, sum(not loss["accepted"] for loss in losses))

# Prints:
# qdrant True 0
# parquet True 0
# chroma True 0
