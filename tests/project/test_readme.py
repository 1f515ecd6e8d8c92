"""The README tells the truth: its commands run, its tables list what there is."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from semid_server.cli.serve import serve
from semid_server.serving.status import CODES

DEFAULTS_IN_WORDS = {
    "",
    "off",
    "on",
    "from the file",
    "none",
    "all cores",
    "as `--host`",
    "the checkpoint's",
}

NOT_RUN = {
    "bash tests/run.sh": "it runs this very test",
    "docker build": "needs a container engine; tests/e2e/test_container.py takes its steps apart",
    "pip install -q -c docker/constraints.txt -e '.[dev]'": "tests/run.sh installs the same",
    "semid encode embeddings -o": "needs Ray; tests/e2e/test_ray.py runs it, word for word",
}
"""Blocks that no test runs, by their beginning, and why."""

SET_UP = "python3 -m venv .venv"
SERVE = "semid serve"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the output that follows it."""

    language: str
    text: str
    output: tuple[str, ...] = ()


def _blocks(readme: str) -> list[Block]:
    found: list[Block] = []
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL):
        if language == "text":
            found[-1] = Block(found[-1].language, found[-1].text, tuple(text.splitlines()))
        else:
            found.append(Block(language, text))
    return found


BLOCKS = _blocks((Path(__file__).parents[2] / "README.md").read_text())


def _with_beginning(beginning: str) -> Block:
    (block,) = (block for block in BLOCKS if block.text.startswith(beginning))
    return block


SESSION = [block for block in BLOCKS if not block.text.startswith((*NOT_RUN, SET_UP, SERVE))]
"""Blocks that talk to the server of the README, in order."""


def test_every_block_is_run_or_has_its_reason():
    assert {block.language for block in BLOCKS} == {"bash", "python"}
    for beginning in NOT_RUN:
        assert _with_beginning(beginning)
    assert len(SESSION) == len(BLOCKS) - len(NOT_RUN) - 2


@pytest.fixture(scope="module")
def checkout(root, tmp_path_factory) -> Path:
    """A copy of the checkout, so that the README's commands may write where they say."""
    copy = tmp_path_factory.mktemp("readme") / "semid"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607 - git of this machine
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listing.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (root / name).exists():
            shutil.copy2(root / name, copy / name, follow_symlinks=False)
    return copy


def _environment() -> dict[str, str]:
    """That of a shell in which the environment of the tests is activated."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("SEMID_", "PYTHON"))}
    # What is installed is compiled when it is imported: most of it never.
    kept["PIP_NO_COMPILE"] = "1"
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def ports() -> dict[str, str]:
    """Free ports in the place of the README's own."""
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        return {"50051": str(one.getsockname()[1]), "9464": str(other.getsockname()[1])}


@pytest.fixture(scope="module")
def server(checkout, ports, tmp_path_factory):
    """The README's server, with its command word for word but for the ports."""
    command = _with_beginning(SERVE).text.strip()
    command += f" --port {ports['50051']} --metrics-port {ports['9464']}"
    log = tmp_path_factory.mktemp("server") / "stderr"
    with (
        log.open("w") as file,
        subprocess.Popen(
            ["bash", "-c", f"exec {command}"],  # noqa: S607 - as a reader would
            cwd=checkout,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        ) as process,
    ):
        try:
            said = [process.stdout.readline() for _ in range(2)]
            assert said[1].startswith("semid: serving movies on 0.0.0.0:"), log.read_text()
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("block", SESSION, ids=lambda block: block.text.split("\n")[0][:40])
def test_a_block_runs_as_written_and_prints_what_it_says(block, checkout, server, ports):
    assert server.poll() is None
    text = block.text
    for written, free in ports.items():
        text = text.replace(written, free)
    shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else ["python", "-c"]
    ran = subprocess.run(
        [*shell, text],
        check=False,
        cwd=checkout,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout.splitlines()
    for line in block.output:
        for written, free in ports.items():
            line = line.replace(written, free)  # noqa: PLW2901 - the same line, as printed here
        assert line in printed


@pytest.mark.slow  # two minutes: it makes an environment
def test_the_first_command_takes_a_fresh_checkout_to_the_demo(checkout):
    block = _with_beginning(SET_UP)
    assert len(block.text.strip().splitlines()) == 1, "one line to paste"
    ran = subprocess.run(
        ["bash", "-c", block.text],  # noqa: S607 - as a reader would
        check=False,
        cwd=checkout,
        env={n: v for n, v in _environment().items() if n != "VIRTUAL_ENV"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    printed = [line.strip() for line in ran.stdout.splitlines()]
    for line in block.output:
        assert line in printed


def test_making_the_stubs_again_changed_nothing(checkout, root):
    for path in (root / "proto/semid/v1").glob("*_pb2*"):
        assert (checkout / "proto/semid/v1" / path.name).read_bytes() == path.read_bytes()


# --- the tables -----------------------------------------------------------------------------


def _table(root: Path, title: str) -> list[list[str]]:
    """Cells of the rows of the first table below a title."""
    section = (root / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:]]


def test_the_flags_are_those_of_the_command_with_their_defaults(root):
    told = {row[0].strip("`"): row[1] for row in _table(root, "Flags of `semid serve`")}
    options = {
        option.opts[0]: option for option in serve.params if isinstance(option, click.Option)
    }
    assert set(told) == set(options)
    for flag, option in options.items():
        default = option.to_info_dict()["default"]
        if option.required:
            assert told[flag] == "required"
        elif isinstance(default, bool) or default is None:
            assert told[flag] in DEFAULTS_IN_WORDS, flag
        else:
            assert told[flag] == str(default), flag
        assert option.envvar == f"SEMID_SERVE_{flag[2:].replace('-', '_').upper()}"


def test_the_metrics_are_those_of_the_endpoint(root, server, ports):
    assert server.poll() is None
    connection = http.client.HTTPConnection("127.0.0.1", int(ports["9464"]), timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    served = dict(re.findall(r"^# TYPE ((?:semid|grpc)_\w+) (\w+)$", page, re.MULTILINE))
    table = _table(root, "Metrics")
    told = {name: row[1] for row in table for name in re.findall(r"`(\w+)`", row[0])}
    assert told == served


def test_the_status_codes_are_those_of_the_server(root):
    told = {row[0].strip("`") for row in _table(root, "Status codes")}
    assert told == {code.name for code in CODES.values()}
