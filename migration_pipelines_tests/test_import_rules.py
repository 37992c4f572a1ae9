"""What may import what, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

from pathlib import Path

import migration_pipelines

ROOT = Path(next(iter(migration_pipelines.__path__))).parent
HEAVY = {
    *("boto3", "botocore", "chromadb", "dagster", "elasticsearch", "faiss", "great_expectations"),
    *("milvus_lite", "pandas", "pgvector", "pinecone", "psycopg", "pymilvus", "qdrant_client", "s3fs"),
    "weaviate",
}
