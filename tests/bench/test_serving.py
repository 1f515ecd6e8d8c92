"""The benchmark of serving runs, and says what it must (`pytest -m slow tests/bench`: a minute)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("serving.py")
TURNS = Path(__file__).with_name("serving_turns.py")


@pytest.mark.slow
def test_the_quick_run_measures_every_section(tmp_path):
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, BENCH, "--quick", "--json", figures],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("machine")
    assert "versions  Python" in done.stdout
    found = json.loads(figures.read_text())
    for name in (
        "mb_per_s.echo.1048576.8",
        "mb_per_s.semid.1048576.8",
        "mb_per_s.unbatched.1048576.8",
        "one_row.beyond_empty.p99.semid",
        "under_load.p99.beside bulk",
        "processes.mb_per_s.1",
        "overload.10x.goodput_of_capacity",
        "overload.10x.refusal_p99",
    ):
        assert name in found
    # Everything was answered: figures of errors would be no figures.
    assert min(value for name, value in found.items() if "mb_per_s" in name) > 0
    assert found["one_row.rate.semid"] > 0


@pytest.mark.slow
def test_versions_take_turns():
    options = ["--rounds", "1", "--seconds", "0.2", "--cases", "64:2"]
    done = subprocess.run(
        [sys.executable, TURNS, f"here={BENCH.parents[2]}", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    for server in ("echo", "here semid", "here instant"):
        (figure,) = re.findall(rf" {server} +([0-9.]+)", row)
        assert float(figure) > 0


def test_what_is_no_checkout_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, TURNS, f"here={tmp_path}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path} is no checkout of semid: it has no server/semid_server\n"
