"""Large buffers stay with the process, unless somebody has decided otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from semid_server.serving.allocator import OPTIONS

FAULTS = """
import resource
from semid_server.serving.allocator import keep_large_buffers
kept = keep_large_buffers()
bytearray(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(b"x") * (16 << 20)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

PAGES = (16 << 20) // os.sysconf("SC_PAGE_SIZE")


def run(**environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    answer, faults = done.stdout.split()
    return answer, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are settings of glibc")
def test_a_buffer_of_16_mib_is_mapped_once_and_not_ten_times():
    answer, faults = run()
    assert answer == "True"
    assert faults < 3 * PAGES


@pytest.mark.parametrize("name", OPTIONS)
def test_a_setting_in_the_environment_is_left_alone(name):
    answer, _ = run(**{name: "1048576" if name != "MALLOC_ARENA_MAX" else "4"})
    assert answer == "False"
