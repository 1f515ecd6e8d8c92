"""The wheel that a user installs is whole, and its base install is the client alone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"),
            *("--wheel-dir", str(folder), str(root)),
        ],
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def base(wheel, root, tmp_path_factory) -> Path:
    """Python of an environment that holds the wheel and its base dependencies."""
    folder = tmp_path_factory.mktemp("base")
    # Its packages are installed by the pip of this environment: one of its own takes seconds.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    _install(python, root, str(wheel))
    return python


def _pip(python: Path, *arguments: object) -> str:
    return subprocess.run(
        list(map(str, [sys.executable, "-m", "pip", "--python", python, *arguments])),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=CLEAN,
    ).stdout


def _install(python: Path, root: Path, what: str) -> None:
    _pip(python, "install", "-q", "--no-compile", "-c", root / "docker/constraints.txt", what)


def _run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        check=False,
        capture_output=True,
        text=True,
        env=CLEAN | environment,
        cwd="/",
    )


def test_the_wheel_holds_packages_types_and_the_demo(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "semid/py.typed",
        "semid/v1/semid_pb2.py",
        "semid/v1/semid_pb2.pyi",
        "semid/v1/semid_pb2_grpc.py",
        "semid_client/py.typed",
        "semid_client/__init__.py",
        "semid_server/py.typed",
        "semid_server/cli/demo.py",
        "semid_server/cli/demo_data/movies.npy",
        "semid_server/cli/demo_data/movies.tsv",
        "semid_server/cli/demo_data/checkpoint/config.json",
        "semid_server/cli/demo_data/checkpoint/model.safetensors",
    } <= names


def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"semid", "semid_client", "semid_server", f"semid-{version('semid')}.dist-info"}


def test_the_base_install_is_the_client_alone(base):
    script = (
        "import importlib.util as u, semid_client; "
        "print([n for n in ('torch', 'numba', 'click', 'tqdm') if u.find_spec(n)])"
    )
    assert _run(base, "-c", script).stdout.strip() == "[]"


def test_the_base_install_has_three_dependencies_and_what_they_need(base):
    listed = _pip(base, "list", "--format=freeze").split()
    assert {line.partition("==")[0] for line in listed} == {
        *("semid", "grpcio", "numpy", "protobuf"),
        "typing_extensions",  # of grpcio
    }


def test_the_command_of_a_base_install_says_what_to_install(base):
    told = _run(base.with_name("semid"), "--version")
    assert told.returncode != 0
    assert "semid[cli]" in told.stderr
    assert "Traceback" not in told.stderr


@pytest.fixture(scope="module")
def cli(base, wheel, root) -> Path:
    """The command of a client machine: the same environment with the extra `cli`."""
    _install(base, root, f"{wheel}[cli]")
    return base.with_name("semid")


def test_a_client_machine_has_the_commands_of_the_client(cli):
    assert _run(cli, "--version").stdout.strip().endswith(version("semid"))
    for command in ("encode", "decode", "info"):
        assert _run(cli, command, "--help").returncode == 0


def test_a_client_machine_can_ask_a_server_whether_it_is_ready(cli):
    told = _run(cli, "health", "--target", "127.0.0.1:1")
    assert told.returncode == 1
    assert told.stderr.startswith("Error: 127.0.0.1:1: UNAVAILABLE: ")


def test_a_client_machine_says_what_the_server_needs(cli):
    told = _run(cli, "serve", "--checkpoint", "nowhere")
    assert told.returncode != 0
    assert "semid[server]" in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.slow  # the checkout's own runs in `e2e/test_demo.py`
def test_the_demo_runs_from_the_wheel(wheel, tmp_path):
    # The wheel unpacked in front of the checkout; what it needs comes from this environment.
    zipfile.ZipFile(wheel).extractall(tmp_path)
    told = _run(sys.executable, "-m", "semid_client", "demo", PYTHONPATH=str(tmp_path))
    assert told.returncode == 0, told.stderr
    assert "ended with status 0" in told.stdout
