"""What fails where a store is a folder: no room, no permission, damage; through the command line.

In place of a server that is gone or refuses the login; once there is room again, or the file is as it was,
the same command completes.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from migration_pipelines_tests.records import plain_records
from migration_pipelines_tests.shell import Shell, fill, shell

__all__ = ["shell"]

# What stands behind the folder's name in an address.
FOLDERS = {"chroma": "", "qdrant": "", "milvus": "/lite.db", "faiss": "", "parquet": ""}
MEGABYTES = 48


def address_of(kind: str, folder: Path | str) -> str:
    return f"{kind}:{folder}{FOLDERS[kind]}#docs"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, that can be filled up and made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_completes(shell: Shell, source: str, target: str) -> None:
    done = shell("run", "--source", source, "--target", target, "--json", "--quiet")
    assert done.status == 0, done.everything
    assert done.document["records"]["verified"] == 300
    assert shell("validate", "--source", source, "--target", target).status == 0


@pytest.mark.parametrize("kind", ["chroma", "qdrant", "parquet"])
def test_a_target_without_room_is_1_and_completes_when_there_is_some(
    shell: Shell, disk: Path, kind: str
) -> None:
    source, target = "parquet:source#docs", address_of(kind, disk / "target")
    fill(source, plain_records(300))
    stuffing = disk / "stuffing"
    stuffing.write_bytes(bytes(MEGABYTES * 2**20 - 8192))
    found = shell("run", "--source", source, "--target", target, "--retry", 0)
    assert found.status == 1, found.everything
    assert "room" in found.err
    assert "Traceback" not in found.everything
    stuffing.unlink()
    assert_completes(shell, source, target)


@pytest.mark.parametrize("kind", ["qdrant", "milvus", "faiss", "parquet"])
def test_a_target_that_can_not_be_written_is_1_and_completes_when_it_can(
    shell: Shell, disk: Path, kind: str
) -> None:
    source, target = "parquet:source#docs", address_of(kind, disk / "target")
    fill(source, plain_records(300))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    found = shell("run", "--source", source, "--target", target, "--retry", 0)
    assert found.status == 1, found.everything
    assert "Traceback" not in found.everything
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert_completes(shell, source, target)


@pytest.mark.parametrize("kind", ["chroma", "milvus", "faiss", "parquet"])
def test_a_source_of_which_a_file_is_cut_is_refused_and_read_when_it_is_whole(
    shell: Shell, tmp_path: Path, kind: str
) -> None:
    source, target = address_of(kind, "damaged"), "parquet:target#docs"
    fill("parquet:origin#docs", plain_records(300))
    assert shell("run", "--source", "parquet:origin#docs", "--target", source).status == 0
    largest = max(
        (path for path in Path("damaged").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    whole = largest.read_bytes()
    largest.write_bytes(whole[: len(whole) // 2])
    found = shell("run", "--source", source, "--target", target, "--retry", 0)
    assert found.status == 1, found.everything
    assert "Traceback" not in found.everything
    largest.write_bytes(whole)
    assert_completes(shell, source, target)


def test_every_test_that_the_page_names_exists() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (tests.parent / "docs" / "failures.md").read_text())
    assert named
    missing = [one for one in named if f"def {one[1]}(" not in (tests / one[0]).read_text()]
    assert missing == []
