"""Libraries that only some formats need: imported when one of these is met, and not before."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from semid_client.files._errors import FileError

if TYPE_CHECKING:
    import os

PLUGS: Final = "semid.tensor-files"
"""Entry points, by suffix, of what reads and writes files that only torch knows."""


def need(module: str, path: str | os.PathLike[str], extra: str = "files") -> Any:
    """Import ``module``; where it is not installed, say what ``path`` needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise FileError(
            path, f"needs {package}, which is not installed: pip install 'semid[{extra}]'"
        ) from error


def tensor_files(path: str | os.PathLike[str]) -> Any:
    """Return what reads and writes ``.pt`` files: a part of the server, since it needs torch."""
    for entry in entry_points(group=PLUGS, name="pt"):
        try:
            return entry.load()
        except ModuleNotFoundError as error:
            raise FileError(
                path,
                f"a .pt file needs {error.name}, which is not installed: "
                "pip install 'semid[server]', or use .safetensors or .npy",
            ) from error
    raise FileError(path, "a .pt file needs semid's server part, which is not installed")
