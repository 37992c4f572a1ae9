"""What every example moves: 30 passages of the Python documentation, in a folder of Chroma's."""

import json
from pathlib import Path

import chromadb
import pyarrow.parquet as pq

import migration_pipelines

DATA = Path(migration_pipelines.__file__).parent / "data" / "python_docs_minilm.parquet"


def make_passages(folder: str = "./chroma_db") -> None:
    """Write the collection `passages` by Chroma's own client; one that is there is left as it is."""
    if Path(folder).exists():
        return
    rows = pq.read_table(DATA).to_pylist()[::167]
    settings = chromadb.Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(Path(folder).absolute(), settings)
    client.create_collection("passages").add(
        ids=[row["id"] for row in rows],
        embeddings=[row["vector"] for row in rows],
        documents=[row["document"] for row in rows],
        metadatas=[json.loads(row["metadata"]) | {"number": n} for n, row in enumerate(rows)],
    )
    client.close()
