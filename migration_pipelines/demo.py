"""The main job on engines that come with the package: a Chroma folder moves into PostgreSQL."""

from __future__ import annotations

from pathlib import Path

SAMPLE = Path(__file__).parent / "data" / "python_docs_minilm.parquet"
