"""Elasticsearch: a cluster that is reached over HTTP."""

from migration_pipelines.stores.elasticsearch.store import ElasticsearchStore

__all__ = ["STORE", "ElasticsearchStore"]

STORE = ElasticsearchStore
