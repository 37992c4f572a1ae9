"""The documentation says what the code does."""

from __future__ import annotations

from pathlib import Path

from migration_pipelines.cli.stores_page import stores_page
from migration_pipelines.store import store_class, store_kinds

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_stores_is_what_the_stores_declare() -> None:
    declared = {kind: store_class(kind).capabilities for kind in store_kinds()}
    written = (DOCS / "stores.md").read_text(encoding="utf-8")
    assert written == stores_page(declared), "run: vector-migrate stores --markdown > docs/stores.md"
