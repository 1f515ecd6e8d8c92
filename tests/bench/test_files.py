"""The benchmark of files runs and says what it must; its bounds on memory hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("files.py")


def measured(tmp_path, *flags):
    figures = tmp_path / "figures.json"
    # Not in the system's folder for temporary files, which may be no disk.
    folder = ("--folder", tmp_path)
    done = subprocess.run(
        [sys.executable, BENCH, *folder, "--json", figures, *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(figures.read_text())


@pytest.mark.slow  # it says whether the benchmark runs, not whether semid does
def test_a_quick_run_measures_every_section(tmp_path):
    found = measured(
        tmp_path,
        *("--rows", "4000", "--items", "50000", "--spill-items", "4500000"),
        *("--sparse-bytes", "5e7", "--repeat", "1"),
    )
    assert set(found) == {"encode", "digits", "spill", "sparse"}
    for name in (
        "reading the disk",
        "reading the page cache",
        "copying in memory",
        "bare product, float32",
        "reading the page cache, 4 threads",
        "copying in memory, 4 threads",
        "the encoder alone",
        "the pipeline alone, disk",
        "the pipeline alone, page cache",
        "original arithmetic",
        "semid encode, disk",
        "semid encode, page cache",
        "of the slowest limit, disk",
    ):
        assert found["encode"][name] > 0
    assert found["digits"]["semid"] > 0
    assert found["digits"]["a loop over items"] > 0
    assert found["spill"]["spilled_bytes"] >= 16 * 4_500_000
    assert found["spill"]["checked_items"] > 0
    assert found["sparse"]["peak_bytes"] > 1e8


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes, where no GPU is
def test_ten_gigabytes_take_less_than_one_and_a_half_of_memory(tmp_path):
    found = measured(tmp_path, "--only", "sparse")
    assert found["sparse"]["peak_bytes"] < 1.5e9


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_million_items_are_numbered_in_less_than_a_gigabyte(tmp_path):
    found = measured(tmp_path, "--only", "spill")
    assert found["spill"]["peak_bytes"] < 1e9
    assert found["spill"]["spilled_bytes"] >= 16 * 100_000_000
