from __future__ import annotations

import os
import resource

import pytest

from semid_server.serving import memory
from semid_server.serving.memory import Memory, allowed

MIB = 1 << 20
MEMINFO = "MemTotal:       1024 kB\nMemFree:         512 kB\n"


@pytest.fixture
def machine(tmp_path):
    """Return a function that makes a machine of 1 MiB: its control groups, and which is ours."""

    def make(groups, ours):
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        cgroups.mkdir()
        (proc / "meminfo").write_text(MEMINFO)
        (proc / "self/cgroup").write_text(ours)
        for name, limit in groups.items():
            (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
            (cgroups / name).write_text(f"{limit}\n")
        return allowed(proc, cgroups)

    return make


@pytest.mark.parametrize(
    ("groups", "ours", "expected"),
    [
        ({}, "0::/\n", MIB),
        ({"memory.max": "max"}, "0::/\n", MIB),
        ({"memory.max": 5000}, "0::/\n", 5000),
        ({"memory.max": 5 * MIB}, "0::/\n", MIB),
        ({"a/b/memory.max": 7000}, "0::/a/b\n", 7000),
        ({"a/b/memory.max": "max", "a/memory.max": 6000}, "0::/a/b\n", 6000),
        # What a container is called outside of it, where its own group is the root.
        ({"memory.max": 4000}, "0::/docker/0123\n", 4000),
        ({"memory/a/memory.limit_in_bytes": 3000}, "4:cpu,memory:/a\n2:pids:/b\n", 3000),
        ({"memory/memory.limit_in_bytes": 1 << 63}, "4:memory:/\n0::/\n", MIB),
    ],
)
def test_no_more_is_allowed_than_the_machine_has_and_control_groups_say(
    machine, groups, ours, expected
):
    assert machine(groups, ours) == expected


def test_this_machine_allows_something():
    assert 64 * MIB < allowed() < 1 << 50


@pytest.mark.parametrize("exactly", [True, False], ids=["glibc", "another allocator"])
def test_what_is_in_use_grows_with_what_is_allocated(monkeypatch, exactly):
    watched = Memory(0)
    if exactly:
        assert watched._mallinfo2 is not None, "no glibc here, or another allocator is preloaded"
    else:
        watched._mallinfo2 = None
        monkeypatch.setattr(memory, "TRIM_EVERY", 0.0)
    before = watched.in_use()
    taken = bytearray(b"x") * (256 * MIB)
    grown = watched.in_use() - before
    assert 240 * MIB < grown < 300 * MIB
    del taken
    assert watched.in_use() - before < 64 * MIB


def test_what_the_allocator_keeps_is_not_in_use(monkeypatch):
    watched = Memory(1 << 49)
    monkeypatch.setattr(watched, "_resident", lambda: 1 << 50)
    assert watched.in_use() < 1 << 40


def test_an_allocator_that_cannot_tell_gives_back_what_it_keeps_now_and_then(monkeypatch):
    watched, trims = Memory(1 << 30), []
    resident = {"now": 3 << 30}

    def trim(_pad):
        trims.append(None)
        resident["now"] = 2 << 30

    watched._mallinfo2, watched._trim = None, trim
    monkeypatch.setattr(watched, "_resident", lambda: resident["now"])
    assert [watched.in_use() for _ in range(3)] == [2 << 30] * 3
    assert len(trims) == 1


def test_memory_is_known_when_no_more_files_can_be_opened():
    watched = Memory(1 << 40)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(OSError, match="Too many open files"):
            os.open("/proc/self/statm", os.O_RDONLY)
        assert watched.in_use() > 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_allocator_is_not_asked_while_all_that_is_resident_is_within_the_limit():
    watched, asked = Memory(1 << 49), []
    watched._mallinfo2 = lambda: asked.append("mallinfo2")
    watched._trim = lambda _pad: asked.append("malloc_trim")
    assert 0 < watched.in_use() < 1 << 49
    assert not asked


def test_an_allocator_that_stands_before_glibc_s_is_not_asked_by_its_name(monkeypatch):
    addresses = iter(range(1, 10))
    monkeypatch.setattr(memory, "_address", lambda _function: next(addresses))
    assert Memory(0)._mallinfo2 is None
