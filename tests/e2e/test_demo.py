"""`semid demo` shows the whole service and leaves nothing behind."""

from __future__ import annotations

import contextlib
import http.client
import signal
import subprocess
import sys

import pytest

PATIENCE = 300.0


@pytest.fixture
def demo(tmp_path):
    """Start `semid demo`, in a folder that has nothing to do with the project."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, program=("-m", "semid_client")):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, *program, "demo", *map(str, arguments)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=tmp_path,
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def _metrics_answer(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
        try:
            connection.request("GET", "/metrics")
        except ConnectionRefusedError:
            return False
        return connection.getresponse().status == 200


def test_it_shows_each_part_and_ends_with_status_0(demo):
    process = demo()
    told, complaints = process.communicate(timeout=PATIENCE)
    assert (process.returncode, complaints) == (0, "")
    for part in (
        "3,201 movies",
        "semid: serving movies-3x256 on 127.0.0.1:",
        "3,201 x 384 float32 (4.9 MB) -> 3,201 x 3 uint8",
        "rows/s",
        "139-162-153 The Lord of the Rings: The Two Towers (Adventure)",
        "90-227-82   The Matrix Revolutions (Action)",
        "cosine similarity to the original",
        'semid_rows_total{operation="encode"} 6402.0',
        "SIGTERM: drained and ended with status 0",
    ):
        assert part in told
    assert len(told.splitlines()) < 60


HELD = """
import importlib, signal, time, semid_client.cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # what shells start behind them ignores it

def show(*_):
    while True:
        time.sleep(0.1)

shown = importlib.import_module("semid_server.cli.demo")
shown._show_everything = show
semid_client.cli.main()
"""
"""The demo, with something to show that never ends: in pieces, since Python sees no interrupt that
comes just before it begins to wait for a lock until that wait is over."""


def test_ctrl_c_stops_the_server_too(demo):
    process = demo(program=("-c", HELD))
    address = ""
    for line in process.stdout:
        if "semid: metrics on " in line:
            address = line.split()[-1]
        if "semid: serving " in line:
            break
    assert _metrics_answer(address)
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert complaints.strip() == "Interrupted; the server is stopped."
    assert not _metrics_answer(address)


def test_a_server_that_cannot_start_is_quoted(demo, reference_dir):
    process = demo("--checkpoint", reference_dir / "nothing")
    _, complaints = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "nothing" in complaints
    assert "Traceback" not in complaints


def test_a_checkpoint_of_another_width_is_told_apart(demo, reference_dir):
    process = demo("--checkpoint", reference_dir / "digits_rkmeans/model.ckpt")
    _, complaints = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "384" in complaints
    assert "64" in complaints
    assert "Traceback" not in complaints
