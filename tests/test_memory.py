import pytest

from infoprune_export import memory as subject
from infoprune_export.memory import Memory, memory

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"


@pytest.fixture
def system(monkeypatch):
    """Replaces the small system files that are read."""
    files = {"/proc/meminfo": MEMINFO}
    monkeypatch.setattr(subject, "read_small", lambda path: files.get(str(path), ""))
    return files


def test_memory_of_the_machine(system):
    assert memory() == Memory(16_000_000 * 1024, 8_000_000 * 1024)
    system["/sys/fs/cgroup/memory.max"] = "max"
    assert memory().total == 16_000_000 * 1024


def test_memory_of_a_control_group_counts_file_cache_as_free(system):
    system |= {"/sys/fs/cgroup/memory.max": "4000000000", "/sys/fs/cgroup/memory.current": "3000000000"}
    system["/sys/fs/cgroup/memory.stat"] = "anon 1\nfile 900000000\ninactive_file 500000000"
    assert memory() == Memory(4_000_000_000, 1_500_000_000)


def test_a_control_group_never_has_more_than_the_machine(system):
    system |= {"/sys/fs/cgroup/memory.max": "12000000000", "/sys/fs/cgroup/memory.current": "0"}
    assert memory() == Memory(12_000_000_000, 8_000_000 * 1024)


def test_memory_here_is_plausible():
    here = memory()
    assert 0 < here.available <= here.total
