"""The benchmark of shared memory runs, and says what it must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("shared_memory.py")


@pytest.mark.slow  # it says whether the benchmark runs, not whether semid does
def test_the_quick_run_measures_every_way(tmp_path):
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, BENCH, "--quick", "--json", figures],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert len(found) == 12
    assert min(found.values()) > 0
