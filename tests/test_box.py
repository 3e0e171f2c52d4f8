from pathlib import Path

import pytest

from smg_sglang.box import box_memory

GIB = 1 << 30


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 67108864 kB\nMemFree: 1048576 kB\nMemAvailable: 33554432 kB\n"
    )
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_machine_without_cgroups_has_what_it_has(root):
    assert box_memory(root) == (64 * GIB, 32 * GIB)


def test_the_tightest_enclosing_cgroup_counts(root):
    write(root, "proc/self/cgroup", "0::/pod/container\n")
    write(root, "sys/fs/cgroup/pod/memory.max", f"{8 * GIB}\n")
    write(root, "sys/fs/cgroup/pod/memory.current", f"{3 * GIB}\n")
    write(root, "sys/fs/cgroup/pod/container/memory.max", "max\n")
    assert box_memory(root) == (8 * GIB, 5 * GIB)


def test_a_container_sees_its_own_limit_at_the_root(root):
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/memory.max", f"{4 * GIB}\n")
    assert box_memory(root).total == 4 * GIB


def test_cgroups_of_the_first_version_count(root):
    write(root, "proc/self/cgroup", "3:cpu:/x\n5:memory:/docker/1\n")
    write(root, "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(root, "sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes", f"{GIB}\n")
    assert box_memory(root) == (2 * GIB, GIB)


def test_page_cache_that_can_be_dropped_is_available(root):
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/memory.max", f"{8 * GIB}\n")
    write(root, "sys/fs/cgroup/memory.current", f"{7 * GIB}\n")
    write(root, "sys/fs/cgroup/memory.stat", f"anon 5\ninactive_file {4 * GIB}\n")
    assert box_memory(root) == (8 * GIB, 5 * GIB)


def test_page_cache_of_the_whole_v1_hierarchy_is_available(root):
    write(root, "proc/self/cgroup", "5:memory:/docker/1\n")
    group = "sys/fs/cgroup/memory/docker/1/memory"
    write(root, f"{group}.limit_in_bytes", f"{2 * GIB}\n")
    write(root, f"{group}.usage_in_bytes", f"{2 * GIB}\n")
    write(root, f"{group}.stat", f"inactive_file 7\ntotal_inactive_file {GIB}\n")
    assert box_memory(root) == (2 * GIB, GIB)


def test_this_machine_has_memory():
    memory = box_memory()
    assert 0 < memory.available <= memory.total
