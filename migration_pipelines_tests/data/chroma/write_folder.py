"""Writes a Chroma folder with whatever version of Chroma is installed, and says what it should hold.

The archives beside this file were written by it: `python write_folder.py <folder>` in an environment with
that version (0.3.29 needs duckdb 0.8.1 and pandas 2.0), then `tar -cJf <version>.tar.xz -C <folder> .`
"""

import sys

SPACES = {"squares": "l2", "angles": "cosine", "products": "ip"}
PROPERTIES = {"topic": "law", "count": 3, "share": 0.5}


def vector(number, salt):
    """Return a vector of eighths, which any float32 holds."""
    return [((number * 37 + salt * 11 + place * 17) % 97 - 48) / 8 or 1.0 for place in range(4)]


def metadata(number):
    """Return what a record's metadata is."""
    return {"n": number, "half": number / 2, "text": f"käse {number}"}


def history(salt):
    """Yield (method, arguments) for `Collection`, in order."""
    for start in range(0, 40, 8):
        numbers = range(start, start + 8)
        yield (
            "add",
            {
                "ids": [f"id{n}" for n in numbers],
                "embeddings": [vector(n, salt) for n in numbers],
                "metadatas": [metadata(n) for n in numbers],
                "documents": [f"Passage {n} über 漢字" for n in numbers],
            },
        )
    yield "delete", {"ids": ["id3", "id17", "id39"]}
    yield "update", {"ids": ["id5", "id30"], "embeddings": [vector(105, salt), vector(130, salt)]}
    yield "update", {"ids": ["id6"], "metadatas": [{"n": -6}]}
    yield (
        "upsert",
        {
            "ids": ["id7", "new"],
            "embeddings": [vector(107, salt), vector(200, salt)],
            "metadatas": [{"n": 107}, {"n": 200}],
            "documents": ["again", "new"],
        },
    )
    yield "add", {"ids": ["bare"], "embeddings": [vector(300, salt)]}


def expected(salt, merges=True):
    """Return {id: (vector, document, metadata)}; 0.3 replaces metadata where later versions merge it."""
    found = {}
    for method, given in history(salt):
        for place, text in enumerate(given["ids"]):
            if method == "delete":
                del found[text]
                continue
            old = found.get(text, (None, None, None))
            fields = given["metadatas"][place] if "metadatas" in given else None
            if fields is not None and merges:
                fields = {**(old[2] or {}), **fields}
            found[text] = (
                given["embeddings"][place] if "embeddings" in given else old[0],
                given["documents"][place] if "documents" in given else old[1],
                fields if fields is not None else old[2],
            )
    return found


def client_of(chromadb, folder):
    """Return a client that keeps its data in `folder`."""
    from chromadb.config import Settings

    if hasattr(chromadb, "PersistentClient"):
        return chromadb.PersistentClient(folder, Settings(anonymized_telemetry=False))
    return chromadb.Client(
        Settings(chroma_db_impl="duckdb+parquet", persist_directory=folder, anonymized_telemetry=False)
    )


def main(folder):
    """Write the folder."""
    import chromadb

    client, is_old = client_of(chromadb, folder), not hasattr(chromadb, "PersistentClient")
    gone = client.create_collection("gone")
    gone.add(ids=["ghost"], embeddings=[[1.0, 2.0]], metadatas=[{"ghost": 1}], documents=["ghost"])
    client.delete_collection("gone")
    for salt, (name, space) in enumerate(sorted(SPACES.items())):
        # "products" stays in the queue; of the others most is written into files.
        sync = {} if space == "ip" or is_old else {"hnsw:batch_size": 5, "hnsw:sync_threshold": 20}
        collection = client.create_collection(name, metadata={**PROPERTIES, "hnsw:space": space, **sync})
        for method, given in history(salt):
            getattr(collection, method)(**given)
    client.create_collection("empty")
    if is_old:
        client.persist()


if __name__ == "__main__":
    main(sys.argv[1])
