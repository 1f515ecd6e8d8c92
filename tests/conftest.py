"""What every test may ask for: the reference sets, read from `tests/reference`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Before any test's module is: Triton reads it when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes tells of the machine and its load.
settings.register_profile(
    "any-machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-machine")

REFERENCE_DIR = Path(__file__).parent / "reference"

REFERENCE_SETS = (
    "digits_rkmeans",
    "digits_rkmeans_raw_residuals",
    "digits_rqvae",
    "digits_rvq",
    "movies_rkmeans",
    "movies_rkmeans_64",
)


SHARING = {
    "tests/operate/": "a fleet",
    "tests/e2e/test_codes.py": "a server of each set",
    "tests/e2e/test_reconstructions.py": "a server of each set",
    "tests/e2e/test_shared_memory.py": "a server of each set",
}
"""Files that share what is dear to start, by the beginning of their paths."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Where several processes share the run, keep a file's tests in one, and those that share.

    Done here since pytest-xdist 3.8 does not see its own groups under pytest 9.2.
    """
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415 - it need not be there

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid):
            shared = (what for path, what in SHARING.items() if nodeid.startswith(path))
            return next(shared, super()._split_scope(nodeid))

    # In their order: the dear ones, of which each has few, come before the cheap ones, not after.
    config.option.loadscopereorder = False
    return Together(config, log)


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """One recorded run of the original implementation.

    Its arrays are shared and read-only: copy them into torch with ``torch.tensor(array)``.

    Attributes
    ----------
    name : str
        Name of its folder.
    checkpoint : Path
        The ``.ckpt`` file, in the original's own format.
    embeddings : float32 (n_items, D)
        What was encoded.
    codes : int32 (n_items, L)
        What the original returned.
    vanishing : bool (n_items,)
        Rows whose recorded codes are rounding noise; all False where the set records none.
        There the float64 arithmetic decides, everywhere else the recorded codes do.
    reconstruction : float32 (n_reconstructed, D)
        What the original decoded, of the first ``n_reconstructed`` items: of all, or of 256.
    info : dict
        Kind, parameters and counts: ``info.json``.
    """

    name: str
    checkpoint: Path
    embeddings: np.ndarray
    codes: np.ndarray
    vanishing: np.ndarray
    reconstruction: np.ndarray
    info: dict

    @property
    def folder(self) -> Path:
        return self.checkpoint.parent

    @property
    def n_layers(self) -> int:
        return self.codes.shape[1]


def _load(path: Path) -> np.ndarray:
    array = np.load(path)
    array.setflags(write=False)
    return array


@cache
def load_reference_set(name: str) -> ReferenceSet:
    """Read one set; every test of a run shares its arrays."""
    folder = REFERENCE_DIR / name
    info = json.loads((folder / "info.json").read_text())
    codes = _load(folder / "codes.npy")
    vanishing = np.zeros(len(codes), dtype=bool)
    if (folder / "vanishing.npy").exists():
        vanishing = _load(folder / "vanishing.npy")
    whole = folder / "reconstruction.npy"
    return ReferenceSet(
        name=name,
        checkpoint=folder / "model.ckpt",
        embeddings=_load((folder / info["embeddings"]).resolve()),
        codes=codes,
        vanishing=vanishing,
        reconstruction=_load(whole if whole.exists() else folder / "reconstruction_first_256.npy"),
        info=info,
    )


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """`tests/reference`, for tests that read a file of their own choice."""
    return REFERENCE_DIR


@pytest.fixture(scope="session", params=REFERENCE_SETS)
def reference_set(request) -> ReferenceSet:
    """Each of the reference sets in turn.

    A test of some of them only says so with
    ``@pytest.mark.parametrize("reference_set", ["digits_rvq"], indirect=True)``.
    """
    return load_reference_set(request.param)


@pytest.fixture(scope="session")
def reference_set_named():
    """Return the function that reads one of the sets by name."""
    return load_reference_set


@pytest.fixture(scope="session")
def lasting_port():
    """Return a function that finds a port to which a server can come back.

    It is none of those that the system gives to whoever asks for any, a connection included:
    between one server and the next nobody takes it. (Where the system says what those are.)
    """
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first, last = map(int, given.read_text().split()) if given.exists() else (0, 0)
    lasting = [port for port in range(10_000, 1 << 16) if not first <= port <= last]
    random = np.random.default_rng()

    def find(*hosts: str) -> int:
        while True:
            port = int(random.choice(lasting)) if lasting else 0
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                for host in hosts or ("127.0.0.1",):
                    probe = stack.enter_context(socket.socket())
                    probe.bind((host, port))
                    port = probe.getsockname()[1]
                return port

    return find
