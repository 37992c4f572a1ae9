"""Show Prometheus how a migration goes."""

from urllib.request import urlopen

from passages import make_passages

from migration_pipelines import MetricsExporter, VectorStoreMigrator

make_passages()
with MetricsExporter(backend="prometheus", port=0) as exporter:  # 0 takes a free port; say 9090 for yours
    migrator = VectorStoreMigrator("chroma:./chroma_db", "parquet:./measured/", metrics_exporter=exporter)
    migrator.migrate("passages")
    page = urlopen(f"http://127.0.0.1:{exporter.port}/metrics").read().decode()
print(
    *(
        line
        for line in page.splitlines()
        if line.startswith(("migration_vectors_total", "migration_complete"))
    ),
    sep="\n",
)

# Prints:
# migration_vectors_total{phase="plan"} 30.0
# migration_vectors_total{phase="extract"} 30.0
# migration_vectors_total{phase="transform"} 0.0
# migration_vectors_total{phase="load"} 30.0
# migration_vectors_total{phase="verify"} 30.0
# migration_vectors_total{phase="validate"} 30.0
# migration_complete 1.0
