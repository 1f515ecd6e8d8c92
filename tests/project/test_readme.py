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
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from semid_server.cli.serve import serve
from semid_server.serving.status import CODES

NOT_THERE = """
import os
from importlib.machinery import PathFinder

names, find = frozenset(os.environ["NOT_THERE"].split()), PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name in names else find(name, *where)
"""
"""Python runs it as it starts: some modules that are installed are not there."""

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

DEVELOP = "pip install -q -c docker/constraints.txt -e '.[dev]'"

NOT_RUN = {
    "bash tests/run.sh": "it runs this very test",
    "docker build": "needs a container engine; tests/e2e/test_container.py takes its steps apart",
    DEVELOP: "tests/run.sh installs the same",
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


README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = _blocks(README)


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


def _brought_by(extras: frozenset[str]) -> set[str]:
    """Names of all distributions that semid with these extras brings."""
    seen: dict[str, frozenset[str]] = {}
    waiting = [("semid", extras)]
    while waiting:
        name, extras = waiting.pop()
        if name in seen and extras <= seen[name]:
            continue
        seen[name] = seen.get(name, frozenset()) | extras
        with contextlib.suppress(PackageNotFoundError):  # what is for other machines
            for requirement in map(Requirement, distribution(name).requires or ()):
                marker = requirement.marker
                if marker is None or any(marker.evaluate({"extra": e}) for e in extras | {""}):
                    wanted = frozenset(requirement.extras)
                    waiting.append((canonicalize_name(requirement.name), wanted))
    return set(seen)


@pytest.fixture(scope="module")
def as_installed_first(tmp_path_factory) -> dict[str, str]:
    """Environment in which there is nothing but what the README's first command installs."""
    (named,) = re.findall(r"'\.\[([\w,]+)\]'", _with_beginning(SET_UP).text)
    there = _brought_by(frozenset(named.split(",")))
    hidden = [
        module
        for module, names in packages_distributions().items()
        if there.isdisjoint(map(canonicalize_name, names)) and module not in {"pip", "setuptools"}
    ]
    assert {"pytest", "boto3"} <= set(hidden)
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(NOT_THERE)
    return {"PYTHONPATH": str(folder), "NOT_THERE": " ".join(hidden)}


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
def test_a_block_runs_as_written_and_prints_what_it_says(
    block, checkout, server, ports, as_installed_first
):
    assert server.poll() is None
    environment = _environment()
    if BLOCKS.index(block) < BLOCKS.index(_with_beginning(DEVELOP)):
        environment |= as_installed_first
    text = block.text
    for written, free in ports.items():
        text = text.replace(written, free)
    shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else ["python", "-c"]
    for _ in range(2 if block.language == "python" else 1):  # pasted again, it does the same
        ran = subprocess.run(
            [*shell, text],
            check=False,
            cwd=checkout,
            env=environment,
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


# --- links and names --------------------------------------------------------------------------


def _anchor(title: str) -> str:
    """The anchor of a title, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-")


def test_links_within_the_readme_lead_somewhere():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    anchors = {_anchor(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert links
    assert [link for link in links if link not in anchors] == []


def test_files_that_the_readme_links_are_there(root):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []


def test_extras_are_those_of_the_project_and_named_in_one_way(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = re.findall(r"(?<=')\.\[([\w,]+)\](?=')", README)
    assert {extra for extras in named for extra in extras.split(",")} <= set(
        project["optional-dependencies"]
    )
    assert README.count("semid[") == 1, "the other way is explained once"


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
