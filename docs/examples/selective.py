"""Move parts of a collection into collections of their own."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator

PARTS = {
    "library_with_code": {"section": "library", "has_code": True},
    "howtos": {"section": {"$in": ["howto", "tutorial", "faq"]}},
    "others": {"$not": {"$or": [{"section": "library"}, {"section": {"$in": ["howto", "tutorial", "faq"]}}]}},
}

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "parquet:./selected/")
for name, where in PARTS.items():
    print(name, migrator.migrate("passages", name, filter=where).vectors_migrated)

# Prints:
# library_with_code 14
# howtos 4
# others 9
