"""What the commands around training share: options with environment twins, devices, progress."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import click
import torch
from tqdm import tqdm

from semid_server.errors import ConfigurationError
from semid_server.training import open_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from semid_server.checkpoint import Checkpoint
    from semid_server.training import Rows


def option(command: str, *names: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return an option with its environment twin, ``SEMID_<COMMAND>_<FLAG>``."""
    flag = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = flag.removeprefix("--").replace("-", "_").upper()
    attributes.setdefault("show_default", attributes.get("default") is not None)
    return click.option(
        *names, envvar=f"SEMID_{command.upper()}_{variable}", show_envvar=True, **attributes
    )


def column_option(command: str) -> Callable[[Any], Any]:
    """Return the option that names a column of a Parquet file."""
    return option(
        command,
        "--column",
        default=None,
        help="Column of a .parquet file that holds the embeddings. Needed when several hold lists "
        "of numbers.",
    )


def threads_option(command: str) -> Callable[[Any], Any]:
    """Return the option that bounds the threads of a command."""
    return option(
        command,
        "--threads",
        type=click.IntRange(min=1),
        default=None,
        help="CPU threads. Default: all cores; lower it on a shared machine.",
    )


def rows_for(checkpoint: Checkpoint, embeddings: Path, column: str | None) -> Rows:
    """Open embeddings that a checkpoint can encode.

    Raises
    ------
    ConfigurationError
        If they cannot be read, or are of another width.
    """
    rows = open_rows(embeddings, column)
    if rows.dim != checkpoint.spec.input_dim:
        raise ConfigurationError(
            f"{embeddings} has rows of {rows.dim} numbers; "
            f"{checkpoint.path} takes {checkpoint.spec.input_dim}"
        )
    return rows


def device_of(name: str) -> torch.device:
    """Return the device that ``--device`` names; ``auto`` is the first GPU if there is one.

    Raises
    ------
    ConfigurationError
        If it is not a device, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(
            f"device {name!r} is not known; expected auto, cpu, cuda or cuda:i"
        ) from error
    there = torch.cuda.device_count()
    if device.type not in {"cpu", "cuda"} or (
        device.type == "cuda" and (device.index or 0) >= there
    ):
        raise ConfigurationError(f"device {name!r} is not there; CUDA devices here: {there}")
    return device


class WatchedRows:
    """Rows whose reading shows on a progress bar, where there is a terminal to show it on."""

    def __init__(self, rows: Rows, description: str) -> None:
        self._rows, self._description = rows, description
        self._bar: tqdm[Any] | None = None

    @property
    def name(self) -> str:
        """What messages call them."""
        return self._rows.name

    @property
    def origin(self) -> Any:
        """What tells their file from another."""
        return self._rows.origin

    @property
    def n_rows(self) -> int:
        """How many there are."""
        return self._rows.n_rows

    @property
    def dim(self) -> int:
        """Numbers in each."""
        return self._rows.dim

    @property
    def blocks(self) -> Any:
        """Where each block starts and stops."""
        return self._rows.blocks

    def read(self, block: int) -> Any:
        """Rows of a block."""
        rows = self._rows.read(block)
        if self._bar is None or block == 0:
            self.close()
            self._bar = tqdm(
                total=self.n_rows, desc=self._description, unit="row", unit_scale=True, disable=None
            )
        self._bar.update(len(rows))
        return rows

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def refuse_if_taken(output: Path, *, force: bool) -> None:
    """Refuse to spend hours on a result that could not be written in the end."""
    if output.exists() and not force:
        raise ConfigurationError(f"{output} exists; give --force to replace it, or another name")


def provenance_of(embeddings: Path, rows: Rows, **others: str) -> dict[str, str]:
    """Where a checkpoint came from, in words that are kept in it."""
    with embeddings.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "embeddings": embeddings.name,
        "embeddings_shape": f"{rows.n_rows} x {rows.dim}",
        "embeddings_sha256": digest,
        **others,
        "written_by": f"semid {version('semid')}",
    }
