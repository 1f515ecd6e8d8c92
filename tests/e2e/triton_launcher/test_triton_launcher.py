"""What the image brings for Triton is enough: kernels are compiled and launched without gcc.

The GPU is a stand-in, libcuda.c: it takes kernels for a device like an H100, and writes down what
it is told to launch. All else is real: the builder's script, Triton and its assembler, the settings
of docker/Dockerfile. PATH is empty. Triton's launcher is one module for kernels of any arguments;
were there one for each again, or one more, launching what semid launches would fail here.
tests/gpu/test_operate_gpu.py has a real GPU launch them, and looks at the codes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
import triton
from triton.backends.nvidia import driver

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
INCLUDED = Path(triton.__file__).parent / "backends/nvidia/include"

if shutil.which("gcc") is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
    pytest.skip(
        "the builder's script needs gcc and Python.h, which this machine lacks",
        allow_module_level=True,
    )


class Place(NamedTuple):
    """A folder, and the environment of a process in the image there."""

    folder: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """What the builder leaves, and a driver."""
    folder = tmp_path_factory.mktemp("image")
    built = _run(sys.executable, ROOT / "docker/triton_launcher.py", folder / "site")
    assert Path(built.strip()).is_relative_to(folder / "site")
    library = folder / "driver/libcuda.so.1"
    library.parent.mkdir()
    _run(
        *("gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
        *(f"-Wl,-soname,{library.name}", "-I", INCLUDED, HERE / "libcuda.c", "-o", library),
    )
    (folder / "empty").mkdir()
    text = (ROOT / "docker/Dockerfile").read_text()
    settings = dict(re.findall(r"\b(TRITON_\w+)=(\S+)", text))
    assert set(settings) == {"TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER"}
    settings["TRITON_CACHE_DIR"] = str(folder / "cache")
    path = [folder / "site", ROOT / "tests/bench"]
    return Place(
        folder,
        settings
        | {
            "PATH": str(folder / "empty"),
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "LD_LIBRARY_PATH": f"{library.parent}:{sys.base_prefix}/lib",
            "STAND_IN_LAUNCHES": str(folder / "launches.jsonl"),
        },
    )


def _run(*command, **options) -> str:
    ran = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True, **options
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _passed(argument) -> list[tuple[int, int]]:
    """Return size and bytes of what a kernel gets for an argument: nothing for 1, compiled in."""
    if isinstance(argument, dict):
        return [(8, argument["pointer"])]
    if isinstance(argument, float):
        return [(4, int.from_bytes(struct.pack("<f", argument), "little"))]
    return [] if argument == 1 else [(4, argument)]


def test_kernels_are_compiled_and_launched_without_a_c_compiler(place):
    _run(sys.executable, HERE / "launches.py", place.folder / "expected", env=place.environment)
    launched, expected = _lines(place.folder / "launches.jsonl"), _lines(place.folder / "expected")
    for was, should in zip(launched, expected, strict=True):
        assert [was[key] for key in ("name", "grid", "block")] == [
            should[key] for key in ("name", "grid", "block")
        ]
        # Triton adds two pointers to working memory, which none of these kernels asks for.
        passed = [pair for one in should["arguments"] for pair in _passed(one)]
        assert [tuple(one) for one in was["arguments"]] == [*passed, (8, 0), (8, 0)], was["name"]
        assert was["stream"] == 0x5EED


def _load(environment, folder: Path) -> str:
    """Have Triton load its launcher, with a new cache folder; return the error's line."""
    ran = subprocess.run(
        [
            *(sys.executable, "-c"),
            "from triton.backends.nvidia.driver import CudaUtils; CudaUtils()",
        ],
        check=False,
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
    )
    return "".join(ran.stderr.splitlines()[-1:])


def test_without_it_a_compiler_would_be_called(place, tmp_path):
    environment = {
        name: value for name, value in place.environment.items() if name != "TRITON_CACHE_MANAGER"
    }
    assert "Failed to find C compiler" in _load(environment, tmp_path), "the test above can fail"
    assert _load(place.environment, tmp_path) == ""


UNABLE = """
from triton.backends.nvidia.driver import CudaDriver
from semid_server.encoding import factory

CudaDriver.is_active = staticmethod(lambda: True)  # torch here may be one for CPUs
try:
    factory.check_launcher()
except factory.ConfigurationError as error:
    print(error)
"""


@pytest.mark.slow  # Triton compiles in each of two processes
def test_who_has_neither_launcher_nor_compiler_is_told_so(place, tmp_path):
    def told(environment):
        settings = environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
        return _run(sys.executable, "-c", UNABLE, env=settings)

    assert told(place.environment) == ""
    lacking = {
        name: value for name, value in place.environment.items() if name != "TRITON_CACHE_MANAGER"
    }
    sentence = told(lacking)
    assert "Failed to find C compiler" in sentence
    assert sentence.endswith("`semid doctor` says what to do\n")


def test_it_is_not_taken_for_that_of_another_triton(place, tmp_path):
    site = shutil.copytree(place.folder / "site", tmp_path / "site")
    (module,) = site.glob("*/*/*.so")
    module.parent.rename(module.parent.with_name("0" * 64))  # made from other source
    environment = place.environment | {"PYTHONPATH": str(site)}
    assert "Failed to find C compiler" in _load(environment, tmp_path)


def test_a_triton_that_makes_a_launcher_for_every_kernel_is_refused(tmp_path, monkeypatch):
    """Those before 3.7 do: an image of theirs would look for a compiler at its first request."""
    spec = importlib.util.spec_from_file_location("launcher", ROOT / "docker/triton_launcher.py")
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    monkeypatch.setattr(driver, "make_launcher", None, raising=False)
    with pytest.raises(RuntimeError, match=r"launcher for every kernel.*3\.7 or newer"):
        launcher.build(tmp_path)
    assert not list(tmp_path.iterdir())
