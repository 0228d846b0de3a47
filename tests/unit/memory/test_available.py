"""Free memory of the host, and the limits of containers."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from qlora_train.memory import available
from qlora_train.memory.available import available_bytes, cgroup_free_bytes

MIB = 2**20
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def write_group(folder: Path, version: tuple[str, str, str], limit: str, used_mib: int, inactive_mib: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / version[0]).write_text(f"{limit}\n")
    (folder / version[1]).write_text(f"{used_mib * MIB}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{version[2]} {inactive_mib * MIB}\n")


def membership(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cgroup_of_self"
    path.write_text(text)
    return path


def test_version_2_takes_the_tightest_of_the_groups_above(tmp_path: Path) -> None:
    write_group(tmp_path / "a", V2, str(100 * MIB), 60, 10)
    write_group(tmp_path / "a/b", V2, str(500 * MIB), 20, 0)
    write_group(tmp_path / "a/b/c", V2, "max", 20, 0)
    assert cgroup_free_bytes(tmp_path, membership(tmp_path, "0::/a/b/c\n")) == 50 * MIB


def test_version_1_reads_the_memory_controller(tmp_path: Path) -> None:
    write_group(tmp_path / "memory/job", V1, str(80 * MIB), 30, 5)
    found = cgroup_free_bytes(tmp_path, membership(tmp_path, "3:cpuset:/x\n4:cpu,memory:/job\n0::/\n"))
    assert found == 55 * MIB


def test_a_path_of_the_host_means_the_root_of_the_container(tmp_path: Path) -> None:
    write_group(tmp_path, V2, str(40 * MIB), 10, 0)
    assert cgroup_free_bytes(tmp_path, membership(tmp_path, "0::/kubepods/pod7/abc\n")) == 30 * MIB


def test_use_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    write_group(tmp_path, V2, str(40 * MIB), 50, 0)
    assert cgroup_free_bytes(tmp_path, membership(tmp_path, "0::/\n")) == 0


@pytest.mark.parametrize("lines", ["0::/\n", "2:cpu:/x\n", ""])
def test_no_limit(tmp_path: Path, lines: str) -> None:
    write_group(tmp_path, V2, "max", 10, 0)
    assert cgroup_free_bytes(tmp_path, membership(tmp_path, lines)) is None
    assert cgroup_free_bytes(tmp_path, tmp_path / "absent") is None


@pytest.mark.parametrize(("limited", "expected"), [(None, 1400), (1000, 770), (5000, 1400)])
def test_the_host_gives_a_share_of_the_tighter(
    monkeypatch: pytest.MonkeyPatch, limited: int | None, expected: int
) -> None:
    class Memory:
        available = 1900

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(available, "cgroup_free_bytes", lambda: limited)
    assert available_bytes(torch.device("cpu"), held_bytes=100) == expected
