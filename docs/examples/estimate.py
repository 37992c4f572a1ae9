"""Measure what a migration would take, before it is made."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "qdrant:./qdrant_data")
estimate = migrator.estimate("passages", price_per_gb=0.09)
print(estimate.total_vectors, estimate.estimated_batches, estimate.compatible)
print(estimate.source_dimension, estimate.target_dimension, estimate.warnings)
assert 0 < estimate.estimated_duration_seconds < 60
assert estimate.vectors_per_second > 1
assert estimate.egress_cost < 0.01

# Prints:
# 30 1 True
# 384 384 []
