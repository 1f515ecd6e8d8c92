"""The checkout, as the tests about the project itself see it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """Top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tracked(root) -> list[Path]:
    """Every file that git knows, relative to the top."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607 - the git of whoever made the checkout
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [Path(name) for name in listing.split("\0") if name]
