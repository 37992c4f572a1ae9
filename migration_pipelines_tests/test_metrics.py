"""Metrics: what Prometheus scrapes, reads from a file or is sent is what the report says."""

from __future__ import annotations

import base64
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from migration_pipelines import errors
from migration_pipelines.errors import (
    ConfigurationError,
    MigrationError,
    StoreUnavailableError,
    TransientError,
)
from migration_pipelines.metrics import MetricsExporter
from migration_pipelines.migration import PHASES, Event, together
from migration_pipelines.migrator import run_migration
from migration_pipelines.retry import RetryPolicy
from migration_pipelines_tests.observed import failing_first, migration, refusing
from migration_pipelines_tests.shell import Shell, fill, shell

__all__ = ["shell"]


def samples(text: str) -> dict[tuple[str, str], float]:
    """Every sample by its name and the value of its label; of histograms the sums and counts."""
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def scrape(port: int | None) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        return str(reply.read().decode())


# ── the figures ──────────────────────────────────────────────────────────────────────────────────────


def test_a_scrape_during_the_run_shows_what_the_report_says_afterwards(tmp_path: Path) -> None:
    seen: list[str] = []
    with MetricsExporter(port=0) as exporter:

        def look(event: Event) -> None:
            if event.name in ("planned", "published"):
                seen.append(scrape(exporter.port))

        with migration(tmp_path, together(exporter.listen, look), filter="n<900") as moving:
            report = run_migration(moving)
        after = samples(scrape(exporter.port))
    begun, before = map(samples, seen)
    assert begun["migration_vectors_total", "plan"] == 900
    assert begun["migration_vectors_total", "verify"] == 0
    assert report.records["filtered"] == 100
    assert before["migration_vectors_total", "extract"] == report.records["read"] - 100
    assert before["migration_left_out_total", "filtered"] == report.records["filtered"]
    assert before["migration_vectors_total", "load"] == report.records["loaded"] == 900
    assert before["migration_vectors_total", "verify"] == report.records["verified"]
    assert before["migration_bytes_total", "verify"] == report.bytes
    assert before["migration_duration_seconds_count", "verify"] == report.partitions["verified"]
    assert before["migration_batch_size_sum", "load"] == 900
    assert before["migration_complete", ""] == 0
    assert after["migration_complete", ""] == 1
    assert after["migration_vectors_total", "validate"] == report.records["verified"]
    assert after["migration_duration_seconds_count", "migration"] == 1
    assert after["migration_duration_seconds_sum", "migration"] >= report.seconds


def test_retries_and_refused_records_are_counted_and_count_nothing_twice(tmp_path: Path) -> None:
    refuse, fail = refusing("doc#00123", "doc#00777"), failing_first(3, TransientError("busy"))

    def both(batch: object) -> None:
        fail(batch)  # type: ignore[arg-type]
        refuse(batch)  # type: ignore[arg-type]

    exporter = MetricsExporter()
    with migration(tmp_path, exporter.listen, fault=both) as moving:
        report = run_migration(moving)
    found = samples(exporter.text())
    assert report.records["rejected"] == 2
    assert found["migration_left_out_total", "rejected"] == 2
    assert found["migration_vectors_total", "load"] == report.records["loaded"] == 998
    assert found["migration_vectors_total", "verify"] == report.records["verified"] == 998
    assert found["migration_retry_attempts_total", "load"] == 3
    assert found["migration_errors_total", "TransientError"] == 3
    assert found["migration_complete", ""] == 0


def test_an_error_that_ends_the_run_is_counted_once(tmp_path: Path) -> None:
    exporter = MetricsExporter()
    gone = failing_first(1, StoreUnavailableError("nothing answers"))
    moving = migration(tmp_path, exporter.listen, fault=gone, workers=1, retry=RetryPolicy(attempts=1))
    with moving, pytest.raises(StoreUnavailableError):
        run_migration(moving)
    found = samples(exporter.text())
    assert found["migration_errors_total", "StoreUnavailableError"] == 1
    assert found["migration_duration_seconds_count", "migration"] == 1


def test_an_error_before_any_phase_is_counted_too(tmp_path: Path) -> None:
    exporter = MetricsExporter()
    with migration(tmp_path, exporter.listen) as moving, moving.ledger.lease(), pytest.raises(MigrationError):
        run_migration(moving)
    assert samples(exporter.text())["migration_errors_total", "LeaseHeldError"] == 1


def test_threads_count_exactly() -> None:
    exporter = MetricsExporter()

    def work() -> None:
        for _ in range(500):
            exporter.listen(Event(name="loaded", partition="p", records=3, bytes=5))
            exporter.listen(Event(name="batch-loaded", partition="p", records=3))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = samples(exporter.text())
    assert found["migration_vectors_total", "load"] == 8 * 500 * 3
    assert found["migration_bytes_total", "load"] == 8 * 500 * 5
    assert found["migration_batch_size_count", "load"] == 8 * 500


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────


def test_labels_are_bounded_whatever_is_moved(tmp_path: Path) -> None:
    class StrangeError(TransientError):
        """Of no class that the project knows."""

    series = []
    for partition_size in (500, 20):
        exporter = MetricsExporter()
        fault = failing_first(2, StrangeError("doc#00001"))
        folder = tmp_path / str(partition_size)
        with migration(folder, exporter.listen, fault=fault, partition_size=partition_size) as moving:
            run_migration(moving)
            keys = [partition.key for partition in moving.plan.partitions]
        text = exporter.text()
        assert not any(key in text for key in keys)
        assert "memory:" not in text
        assert "doc#" not in text
        series.append(set(samples(text)))
    assert len(keys) == 50
    assert series[0] == series[1]
    known = {name for name in vars(errors) if name.endswith("Error")}
    allowed = {"", *PHASES, *known, "other", "filtered", "rejected", "skipped"}
    assert {label for _, label in series[0]} <= allowed
    assert ("migration_errors_total", "other") in series[0]


# ── where they go ────────────────────────────────────────────────────────────────────────────────────


def test_two_exporters_share_nothing(tmp_path: Path) -> None:
    one, other = MetricsExporter(), MetricsExporter()
    one.listen(Event(name="loaded", records=7))
    assert samples(other.text())["migration_vectors_total", "load"] == 0


def test_only_this_machine_is_served_and_only_until_close() -> None:
    exporter = MetricsExporter(port=0)
    port = exporter.port
    assert "migration_vectors_total" in scrape(port)
    exporter.close()
    exporter.close()
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with MetricsExporter(port=0) as exporter, pytest.raises(ConfigurationError, match="another port"):
        MetricsExporter(port=exporter.port)


def test_another_backend_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="statsd"):
        MetricsExporter(backend="statsd")


def test_the_text_file_is_there_from_the_start_and_whole_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "textfiles" / "move.prom"
    exporter = MetricsExporter(textfile=path)
    assert samples(path.read_text())["migration_vectors_total", "verify"] == 0
    with migration(tmp_path, exporter.listen) as moving:  # the exporter itself is never closed
        run_migration(moving)
    assert samples(path.read_text())["migration_vectors_total", "verify"] == 1_000
    assert [item.name for item in path.parent.iterdir()] == ["move.prom"]


def test_a_text_file_that_can_not_be_written_is_said_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="can't be written"):
        MetricsExporter(textfile=tmp_path / "file" / "move.prom")


class Gateway(HTTPServer):
    """Keeps what is pushed to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Pushed)
        self.pushed: list[tuple[str, str | None, str]] = []


class _Pushed(BaseHTTPRequestHandler):
    server: Gateway

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.pushed.append((self.path, self.headers["Authorization"], body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_short_lived_worker_pushes_before_it_is_gone(tmp_path: Path, gateway: Gateway) -> None:
    login = "worker:pa%40ss"
    exporter = MetricsExporter(push_gateway=f"http://{login}@127.0.0.1:{gateway.server_port}")
    with migration(tmp_path, exporter.listen) as moving:
        run_migration(moving)
    ((path, authorization, body),) = gateway.pushed
    assert path.startswith("/metrics/job/vector_migrate/instance/")
    assert authorization == "Basic " + base64.b64encode(b"worker:pa@ss").decode()
    assert samples(body)["migration_vectors_total", "verify"] == 1_000
    assert samples(body)["migration_complete", ""] == 1


def test_a_gateway_that_is_gone_harms_nothing_and_its_password_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = MetricsExporter(push_gateway="http://worker:hunter22@127.0.0.1:9")
    with migration(tmp_path, exporter.listen) as moving:
        assert run_migration(moving).status == "complete"
    assert "can't be pushed to 127.0.0.1:9" in caplog.text
    assert "hunter22" not in caplog.text


# ── the command line ─────────────────────────────────────────────────────────────────────────────────


def test_run_serves_and_writes_metrics(shell: Shell, tmp_path: Path) -> None:
    fill("parquet:source#docs")
    found = shell(
        "run", "--source", "parquet:source#docs", "--target", "parquet:target#docs", "--json",
        "--metrics-port", 0, "--metrics-file", "move.prom",
    )  # fmt: skip
    assert found.status == 0
    assert "metrics: http://127.0.0.1:" in found.err
    shown = samples((tmp_path / "move.prom").read_text())
    records = found.document["records"]
    assert shown["migration_vectors_total", "verify"] == records["verified"] == 300
    assert shown["migration_bytes_total", "verify"] == found.document["bytes"]
    assert shown["migration_complete", ""] == 1


def test_a_port_that_is_taken_is_a_matter_of_the_request(shell: Shell) -> None:
    fill("parquet:source#docs")
    with MetricsExporter(port=0) as exporter:
        found = shell(
            "run", "--source", "parquet:source#docs", "--target", "parquet:target#docs",
            "--metrics-port", exporter.port,
        )  # fmt: skip
    assert found.status == 2
    assert "choose another port" in found.err
    assert not Path("target").exists()


def test_the_report_says_what_the_run_took(shell: Shell) -> None:
    fill("parquet:source#docs")
    found = shell("run", "--source", "parquet:source#docs", "--target", "parquet:target#docs", "--json")
    took = found.document["resources"]
    assert took["taken"] >= 1
    assert took["rss_bytes_max"] > 10_000_000
    assert took["disk_free_bytes_min"] > 0
    assert took["samples"][-1]["rss_bytes"] <= took["rss_bytes_max"]
