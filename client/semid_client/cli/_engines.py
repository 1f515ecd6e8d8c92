"""What computes for the commands that work on files: a server, or a checkpoint on this machine."""

from __future__ import annotations

from contextlib import contextmanager
from importlib.metadata import entry_points
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from semid_client._errors import ConfigurationError, FingerprintMismatchError
from semid_client._transfer import MESSAGE_BYTES, Collected
from semid_client.cli._options import F, connect, connection_options, option
from semid_client.files.memory import pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from semid_client._client import Client
    from semid_client.files import Engine
    from semid_client.files.memory import Memory

ENTRY_POINTS: Final = "semid.encoders"
"""Where the server's part offers to run a checkpoint, so that this one need not know torch."""

OF_A_CHECKPOINT: Final = ("device", "allow_degenerate")
"""Flags that say how to run a checkpoint on this machine."""

OF_A_SERVER: Final = (
    *("model", "timeout", "in_flight", "tls", "ca", "cert", "key", "token"),
    "allow_plaintext_token",
)
"""Flags that say which server, and how to reach it."""

RAY_NEEDS: Final = ("--engine ray", "ray,server")


class ServerEngine:
    """A server, with two blocks under way so that it need not wait between them.

    Parameters
    ----------
    in_flight : int
        Messages under way at once, of all blocks together.
    blocks : int
        Blocks under way at once, at most.
    connection
        What `connect` takes besides.
    """

    stage = "server"
    screens = False

    def __init__(self, *, in_flight: int, blocks: int = 2, **connection: Any) -> None:
        self.threads = min(blocks, in_flight)
        # A client for each block under way, so that their shares of the messages may differ by one.
        shares = [(in_flight + i) // self.threads for i in range(self.threads)]
        self.block_bytes = max(4, *shares) * MESSAGE_BYTES
        self._clients = [
            connect(in_flight=share, on_fingerprint_change="error", **connection)
            for share in shares
        ]
        self._free: SimpleQueue[Client] = SimpleQueue()
        for client in self._clients:
            self._free.put(client)
        try:
            self.info = self._clients[0].model()
        except BaseException:
            self.close()
            raise
        self.where = f"at {self._clients[0].target}"

    def memory(self, n_bytes: int) -> Memory:
        """Any memory: what is sent is copied from there."""
        return pages(n_bytes)

    def encode(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Codes of embeddings; waits for a server that is busy or restarts."""
        sink = Collected(len(rows))
        with self._client() as client:
            self._check(client.encode_into(rows, sink))
        return sink.array

    def decode(self, codes: NDArray[Any], mode: Any) -> NDArray[Any]:
        """Reconstructions of codes; waits likewise."""
        sink = Collected(len(codes))
        calibration = self.info.calibration if mode == "calibrated" else None
        with self._client() as client:
            self._check(client.decode_into(codes, sink, mode, calibration=calibration))
        return sink.array

    @contextmanager
    def _client(self) -> Iterator[Client]:
        """Have a client for one block."""
        client = self._free.get()
        try:
            yield client
        finally:
            self._free.put(client)

    def _check(self, fingerprint: str) -> None:
        if fingerprint != self.info.fingerprint:
            raise FingerprintMismatchError(
                f"the model {self.where} has been replaced: it has fingerprint {fingerprint}, but "
                f"the work was begun with {self.info.fingerprint}"
            )

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            client.close()


def engine_options(command: F) -> F:
    """Add the flags that say what computes; the command hands them to `open_engine`."""
    command = connection_options(command, required=False)
    command = option(
        "--allow-degenerate",
        is_flag=True,
        help="With --checkpoint: use a model whose codes mean nothing (layers never initialised, "
        "or one shared codebook), with a warning in place of the refusal.",
    )(command)
    command = option(
        "--device",
        default="auto",
        show_default=True,
        help="With --checkpoint: auto, cpu, cuda or cuda:i. Codes are the same on all.",
    )(command)
    return option(
        "--checkpoint",
        type=click.Path(),
        help="Work on this machine with this checkpoint, instead of a server: a folder, a GRID "
        ".ckpt or a .pt. Needs 'semid[server]'.",
    )(command)


def check_engine(
    *,
    checkpoint: str | None,
    target: str | None,
    cluster: dict[str, Any] | None = None,
    **_: Any,
) -> None:
    """Refuse, as a wrong use, flags that name nothing that computes, or two."""
    if cluster is not None and checkpoint is None:
        raise click.UsageError("--engine ray needs --checkpoint, which is sent to the cluster.")
    if checkpoint is None and target is None:
        raise click.UsageError(
            "Missing option '--target' (env var: 'SEMID_TARGET'): name a server, or a checkpoint "
            "on this machine by --checkpoint."
        )
    if checkpoint is not None and target is not None:
        raise click.UsageError("--target and --checkpoint exclude each other: give one of them.")
    of_the_other, flag = (OF_A_CHECKPOINT, "--checkpoint") if target else (OF_A_SERVER, "--target")
    context = click.get_current_context()
    for name in of_the_other:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} is of use with {flag} alone.")


def open_engine(
    *,
    checkpoint: str | None,
    device: str,
    allow_degenerate: bool,
    target: str | None,
    fingerprint: str,
    cluster: dict[str, Any] | None = None,
    **flags: Any,
) -> Engine:
    """Connect to the server, or load the checkpoint; ``cluster`` is what `cluster_of` returns.

    Raises
    ------
    SemidClientError
        If it cannot be used.
    """
    if checkpoint is None:
        return ServerEngine(target=target, fingerprint=fingerprint, **flags)
    name = "checkpoint" if cluster is None else "ray"
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            load = entry.load()
        except ModuleNotFoundError as error:
            needs, extras = ("--checkpoint", "server") if cluster is None else RAY_NEEDS
            raise ConfigurationError(
                f"{needs} needs {error.name}, which is not installed: pip install 'semid[{extras}]'"
            ) from error
        engine: Engine = load(
            checkpoint, device=device, allow_degenerate=allow_degenerate, **(cluster or {})
        )
        if fingerprint not in ("", engine.info.fingerprint):
            raise FingerprintMismatchError(
                f"{checkpoint} has fingerprint {engine.info.fingerprint}, but {fingerprint} is "
                "expected: its codes belong to another codebook"
            )
        return engine
    raise ConfigurationError("--checkpoint needs semid's server part, which is not installed")
