"""Rename and rework metadata fields on the way."""

from passages import make_passages

from migration_pipelines import VectorStoreMigrator, inspect_collection, open_address

make_passages()
migrator = VectorStoreMigrator("chroma:./chroma_db", "parquet:./mapped/")
result = migrator.migrate(
    "passages",
    schema_mapping={
        "exclude_fields": ["anchor", "heading", "position"],
        "field_mapping": {"n_chars": "length", "section": "part"},
        "defaults": {"language": "en"},
        "transforms": {"part": "upper", "label": {"template": "{title} ({part})"}},
    },
)
print(result.success, result.vectors_migrated)

store, collection = open_address("parquet:./mapped/#passages")
print(*inspect_collection(store, collection).profile.fields)

# Prints:
# True 30
# has_code label language length number part title
