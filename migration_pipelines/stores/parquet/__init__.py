"""Folders of Parquet files, readable by any Parquet reader."""

from migration_pipelines.stores.parquet.store import ParquetStore

__all__ = ["STORE", "ParquetStore"]

STORE = ParquetStore
