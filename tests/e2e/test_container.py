"""What docker/Dockerfile promises, tested without a container engine: its steps, one by one."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from semid_server.cli.serve import serve as serve_command

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def docker(request) -> Path:
    return request.config.rootpath / "docker"


@pytest.fixture(scope="module")
def stages(docker) -> list[list[tuple[str, str]]]:
    """The instructions of each stage: comments dropped, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (docker / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: list[list[tuple[str, str]]] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            instruction, _, rest = line.partition(" ")
            if instruction == "FROM":
                found.append([])
            found[-1].append((instruction, rest.strip()))
    return found


@pytest.fixture(scope="module")
def runtime(stages) -> dict[str, str]:
    """The instructions of the image that is run."""
    return dict(stages[-1])


def test_what_is_run_is_built_in_another_stage(stages):
    builder, final = stages
    assert any("pip install" in rest for instruction, rest in builder if instruction == "RUN")
    assert not any("pip" in rest or "apt" in rest for i, rest in final if i == "RUN")
    assert "slim" in final[0][1], "the full image brings compilers"
    assert [rest for instruction, rest in final if instruction == "COPY"] == [
        "--from=builder /opt/semid /opt/semid"
    ]


def test_the_steps_are_pinned(stages):
    (install,) = [rest for _, rest in stages[0] if "pip install" in rest]
    assert "-c docker/constraints.txt" in install
    assert "'.[server]'" in install


def test_it_runs_as_nobody_special_and_takes_signals_itself(runtime):
    assert int(runtime["USER"]) >= 1000
    assert runtime["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(runtime["ENTRYPOINT"]) == ["semid", "serve"]


def _default(name: str) -> str:
    """Default of a flag of `semid serve`."""
    (option,) = (option for option in serve_command.params if option.name == name)
    return str(option.default)


def test_it_exposes_the_default_ports(runtime):
    assert runtime["EXPOSE"].split() == [_default("port"), _default("metrics_port")]


def test_everything_that_is_installed_reaches_the_build(docker):
    """The context is an allow-list: what the wheel is made of must be on it."""
    allowed = {
        line[1:]
        for line in (docker / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for needed in ("pyproject.toml", "README.md", "LICENSE", "proto", "client", "server"):
        assert needed in allowed
    for path in allowed:
        assert (docker.parent / path).exists(), path
    assert not any(fnmatch.fnmatch("tests/reference", pattern) for pattern in allowed)


def _environment(runtime) -> dict[str, str]:
    """The settings of the image, with this environment in the place of its own."""
    text = runtime["ENV"].replace("/opt/semid/bin", str(BIN)).replace("$PATH", os.environ["PATH"])
    settings = dict(setting.split("=", 1) for setting in text.split())
    assert settings.keys() >= {"PATH", "NUMBA_CACHE_DIR"}
    return settings


def test_its_health_check_tells_a_healthy_server_from_none(runtime, digits_server):
    options, _, words = runtime["HEALTHCHECK"].partition("CMD ")
    assert "--interval=" in options
    command = json.loads(words)
    assert command[-1] == f"127.0.0.1:{_default('port')}"

    def check(target: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command[:-1], target],
            check=False,
            capture_output=True,
            text=True,
            env=_environment(runtime),
        )

    healthy = check(digits_server.target)
    assert (healthy.returncode, healthy.stdout) == (0, f"{digits_server.target}: SERVING\n")
    ill = check("127.0.0.1:1")
    assert ill.returncode == 1
    assert "UNAVAILABLE" in ill.stderr
    assert "Traceback" not in ill.stderr


def test_its_entry_point_serves_with_its_settings(runtime, serve, request):
    mount = request.config.rootpath / "checkpoints/movies"
    assert json.loads(runtime["CMD"]) == ["--checkpoint", "/checkpoint"]
    server = serve(mount, env=_environment(runtime))
    assert server.stop() == 0
