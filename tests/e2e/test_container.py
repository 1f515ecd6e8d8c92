"""What docker/Dockerfile promises, tested without a container engine.

What it says is looked at always. Where mount namespaces can be made, `pytest -m slow` also runs its
steps, as they stand, in an empty folder that is mounted where the image has it, and starts the
result as a container would be: another user, a read-only root, nothing but /tmp to write to, no
compiler. In the place of the base image is this machine, with the interpreter of the tests in the
place of the image's.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from dockerfile import DOCKER, RUNTIME, STAGES, settings

from semid_client import Client
from semid_server.cli.serve import serve as serve_command

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
USER = 10001


# --- as written -----------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "builder"), [("cpu", "builder"), ("cuda", "builder-cuda")])
def test_what_is_run_is_built_in_another_stage(target, builder):
    stage = STAGES[target]
    assert stage.base == "runtime"
    assert stage.the("COPY") == f"--from={builder} /opt/semid /opt/semid"
    assert not stage.all("RUN")
    assert "slim" in RUNTIME.base, "the full image brings compilers"
    assert not any("pip" in step or "apt" in step for step in RUNTIME.all("RUN"))


def test_the_default_target_is_the_one_for_a_cpu():
    assert list(STAGES)[-1] == "cpu"


def test_builder_and_image_have_the_same_python():
    bases = {stage.base for stage in STAGES.values() if stage.base not in STAGES}
    versions = {re.match(r"python:(3\.\d+)-(?:slim-)?(\w+)$", base).groups() for base in bases}
    assert len(versions) == 1
    ((version, _),) = versions
    assert f"/lib/python{version}/" in STAGES["builder-cuda"].the("RUN")


def test_the_packages_are_pinned():
    (install,) = [step for step in STAGES["builder"].all("RUN") if "pip install" in step]
    assert "-c docker/constraints.txt '.[server,tracing]'" in install
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        assert f" {name}=docker/constraints.txt " in install, "so is what builds the wheel"


def test_it_runs_as_nobody_special_and_takes_signals_itself():
    assert RUNTIME.the("USER") == f"{USER}:{USER}"
    assert f"--uid {USER}" in RUNTIME.the("RUN")
    assert RUNTIME.the("STOPSIGNAL") == "SIGTERM"
    assert json.loads(RUNTIME.the("ENTRYPOINT")) == ["semid", "serve"]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_each_target_names_its_device_so_that_a_missing_one_is_an_error(target):
    assert settings(STAGES[target], "")["SEMID_SERVE_DEVICE"] == target


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_of_the_server_is_one_of_its_flags(stage):
    known = {option.envvar for option in serve_command.params}
    named = {name for name in settings(STAGES[stage], "") if name.startswith("SEMID_")}
    assert named <= known


def _default(name: str) -> str:
    """Default of a flag of `semid serve`."""
    (option,) = (option for option in serve_command.params if option.name == name)
    return str(option.default)


def test_it_exposes_the_default_ports():
    assert RUNTIME.the("EXPOSE").split() == [_default("port"), _default("metrics_port")]


def test_everything_that_is_installed_reaches_the_build():
    """The context is an allow-list: what the steps use must be on it."""
    allowed = _allowed()
    steps = " ".join(step for stage in STAGES.values() for step in stage.all("RUN"))
    used = {"pyproject.toml", "README.md", "LICENSE", "proto", "client", "server"}
    assert used | set(re.findall(r"\bdocker/[\w.]+", steps)) <= allowed
    for path in allowed:
        assert (ROOT / path).exists(), path
    assert not any(fnmatch.fnmatch("tests/reference", pattern) for pattern in allowed)


def _allowed() -> set[str]:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    return {line[1:] for line in lines if line.startswith("!")}


# --- step by step ---------------------------------------------------------------------------


def _namespace_refused() -> str:
    """Why this machine cannot stand in for a container; empty if it can."""
    # gcc: the builder's image has it
    needed = ("unshare", "setpriv", "mount", "gcc")
    tools = [name for name in needed if shutil.which(name) is None]
    if tools:
        return f"no {', '.join(tools)} here"
    if Path(sys.base_prefix) == Path("/usr"):
        return "this Python is the system's, and cannot be mounted where the image has its own"
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "--bind", "/opt", "/opt"],  # noqa: S607 - found above
        check=False,
        capture_output=True,
        text=True,
    )
    return f"no mount namespace can be made: {tried.stderr.strip()}" if tried.returncode else ""


REFUSED = _namespace_refused()


def in_place(test):
    """Mark a test of the image: minutes, for all packages are installed in an empty place."""
    return pytest.mark.slow(pytest.mark.skipif(bool(REFUSED), reason=REFUSED or "it can")(test))


OUTSIDE = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
# How packages are reached is this machine's business.
REGISTRY = re.compile(r"(PIP|SSL|REQUESTS)_|\w+_proxy$", re.IGNORECASE)


class Image:
    """The folders of an image in the making, and commands with these in their places."""

    def __init__(self, folder: Path) -> None:
        self.opt, self.src, self.etc = folder / "opt", folder / "src", folder / "etc"
        self._folder = folder
        for path in (self.opt, self.src):
            path.mkdir()
        shutil.copytree("/etc", self.etc, symlinks=True)

    def command(self, script: str, *, read_only: bool = False) -> list[str]:
        """Return the command that runs a shell script in the image."""
        mounts = [
            f"mount --bind {sys.base_prefix} /usr/local",
            "mount -t tmpfs tmpfs /opt && mkdir /opt/semid /opt/src /opt/checkpoint",
            f"mount --bind {self.opt} /opt/semid",
            f"mount --bind {self.etc} /etc",
        ]
        if read_only:
            mounts += [
                f"mount --bind {ROOT}/checkpoints/movies /opt/checkpoint",
                "mount -o remount,ro,bind /opt/checkpoint",
                "mount -o remount,ro,bind /opt/semid",
                "mount -o remount,ro /opt",
                "mount -o remount,ro,bind /",
                "mount -t tmpfs -o noexec,nosuid,nodev tmpfs /tmp",
                "cd /",
            ]
        else:
            mounts.append(f"mount --bind {self.src} /opt/src && cd /opt/src")
        lines = " && ".join(mounts)
        return ["unshare", "--mount", "sh", "-c", f"{lines} && {script}"]

    def build(self, step: str) -> None:
        """Run a step as the builder would."""
        options = r"^(--mount=\S+\s+)*"
        ran = subprocess.run(
            self.command(re.sub(options, "", step)),
            check=False,
            capture_output=True,
            text=True,
            env={name: value for name, value in os.environ.items() if REGISTRY.match(name)}
            | {"PATH": OUTSIDE, "HOME": str(Path.home())},
        )
        assert ran.returncode == 0, f"{step}\n{ran.stdout}\n{ran.stderr}"

    def contained(self, words: list[str]) -> list[str]:
        """Return the command that runs words as a container does: no root, nothing to write to."""
        drop = f"setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs"
        script = f"exec {drop} --bounding-set=-all {shlex.join(words)}"
        return self.command(script, read_only=True)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Iterator[Image]:
    """All steps run, in order; the context is what the allow-list lets through."""
    made = Image(tmp_path_factory.mktemp("image"))
    for path in _allowed():
        target = made.src / path
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy2
        copy(ROOT / path, target)
    for step in STAGES["builder"].all("RUN"):
        made.build(step)
    # The index here has torch for CPUs, which comes without Triton: it is lent for this step.
    packages = made.opt / "lib/python3.11/site-packages"
    with contextlib.ExitStack() as lent:
        if not (packages / "triton").exists():
            triton = Path(str(distribution("triton").locate_file("triton")))
            (packages / "triton").symlink_to(triton.resolve())
            lent.callback((packages / "triton").unlink)
        made.build(STAGES["builder-cuda"].the("RUN"))
    made.build(RUNTIME.the("RUN"))
    yield made
    shutil.rmtree(made.opt)  # more than a gigabyte, of which pytest would keep three


@in_place
def test_all_steps_run_in_an_empty_place(image):
    assert (image.opt / "bin/semid").exists()
    assert f"semid:x:{USER}:{USER}:" in (image.etc / "passwd").read_text()
    packages = image.opt / "lib/python3.11/site-packages"
    (wheel,) = packages.glob("semid-*.dist-info/WHEEL")
    (hatchling,) = re.findall(
        r"^hatchling==(.+)$", (DOCKER / "constraints.txt").read_text(), re.MULTILINE
    )
    assert f"\nGenerator: hatchling {hatchling}\n" in wheel.read_text()
    assert list(packages.glob("semid_triton_launcher/*/*.so"))
    assert list(packages.glob("opentelemetry/exporter/otlp/proto/grpc")), "for --tracing"


SETTINGS = (
    settings(RUNTIME, OUTSIDE)
    | settings(STAGES["cpu"], OUTSIDE)
    # Where the image's Python stands by itself, this one's library has to be pointed out.
    | {"LD_LIBRARY_PATH": "/usr/local/lib"}
    # The checkpoint is mounted where a folder can be made, and ports are those that are free.
    | {"SEMID_SERVE_CHECKPOINT": "/opt/checkpoint", "SEMID_SERVE_HOST": "127.0.0.1"}
    | {f"SEMID_SERVE_{kind}PORT": "0" for kind in ("", "METRICS_", "ADMIN_")}
)


@in_place
def test_it_serves_from_a_read_only_root_as_another_user_and_ends_on_sigterm(image, tmp_path):
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            image.contained(json.loads(RUNTIME.the("ENTRYPOINT"))),
            env=SETTINGS,
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            until = time.monotonic() + 300
            while not (
                serving := re.search(
                    r"^semid: serving \S+ on (\S+)$", log.read_text(), re.MULTILINE
                )
            ):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            with Client(serving[1]) as client:
                assert client.model().name == "movies"
            admin = re.search(r"^semid: admin on (\S+)$", log.read_text(), re.MULTILINE)[1]
            healthy = _check(image, admin)
            assert (healthy.returncode, healthy.stdout) == (0, f"{admin}: SERVING\n")
            process.send_signal(getattr(signal, RUNTIME.the("STOPSIGNAL")))
            assert process.wait(300) == 0, log.read_text()
        finally:
            process.kill()
    # What is compiled at the start had a place to be kept.
    assert "compiled by every process anew" not in log.read_text()
    ill = _check(image, "127.0.0.1:1")
    assert ill.returncode == 1
    assert "UNAVAILABLE" in ill.stderr
    assert "Traceback" not in ill.stderr


def _check(image, target: str) -> subprocess.CompletedProcess[str]:
    """Run the image's health check against a server elsewhere."""
    options, _, words = RUNTIME.the("HEALTHCHECK").partition("CMD ")
    assert "--interval=" in options
    *command, own = json.loads(words)
    assert own == f"127.0.0.1:{settings(RUNTIME, '')['SEMID_SERVE_ADMIN_PORT']}"
    return subprocess.run(
        # The limit of a probe is short; what else this machine does must not decide the test.
        image.contained([*command, target, "--timeout", "100"]),
        check=False,
        capture_output=True,
        text=True,
        env=SETTINGS,
    )
