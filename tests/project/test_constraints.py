"""`docker/constraints.txt` pins what is installed, all of it."""

from __future__ import annotations

import re
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OF_TORCH = ("nvidia-", "cuda-", "triton")
"""What torch's CUDA builds bring is pinned by torch itself, build by build."""

OF_SEMID = frozenset({"nvidia-ml-py"})
"""What is named like those, but is asked for by semid."""


@pytest.fixture(scope="module")
def pins(root) -> dict[str, str]:
    lines = (root / "docker/constraints.txt").read_text().splitlines()
    pinned = [re.fullmatch(r"([^=\s]+)==([^=\s]+)", line) for line in lines if line[:1] != "#"]
    assert all(pinned), "every line is a comment or NAME==VERSION"
    return {canonicalize_name(match[1]): match[2] for match in pinned}


def _requirements(name: str, extras: frozenset[str]) -> dict[str, frozenset[str]]:
    """What a distribution needs here, with the extras of each."""
    needed: dict[str, frozenset[str]] = {}
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
        ):
            key = canonicalize_name(requirement.name)
            needed[key] = needed.get(key, frozenset()) | frozenset(requirement.extras)
    return needed


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    """Every distribution that ``semid[dev]`` needs on this machine, with its version."""
    seen: dict[str, frozenset[str]] = {}
    waiting = {"semid": frozenset({"dev"})}
    while waiting:
        name, extras = waiting.popitem()
        extras |= seen.get(name, frozenset())
        if seen.get(name) == extras:
            continue
        seen[name] = extras
        for key, wanted in _requirements(name, extras).items():
            waiting[key] = waiting.get(key, frozenset()) | wanted
    return {
        name: distribution(name).version
        for name in seen
        if name in OF_SEMID or (name != "semid" and not name.startswith(OF_TORCH))
    }


def test_everything_installed_is_pinned(installed, pins):
    assert sorted(set(installed) - set(pins)) == []


def test_the_tests_run_with_the_pinned_versions(installed, pins):
    public = {name: version.partition("+")[0] for name, version in installed.items()}
    assert {n: v for n, v in public.items() if pins.get(n) != v} == {}


def test_no_pin_names_one_build(pins):
    assert [version for version in pins.values() if "+" in version] == []
