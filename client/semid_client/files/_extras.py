"""Libraries that only some formats need: imported when one of these is met, and not before."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from semid_client.files._errors import FileError

if TYPE_CHECKING:
    import os


def need(module: str, path: str | os.PathLike[str], extra: str = "files") -> Any:
    """Import ``module``; where it is not installed, say what ``path`` needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise FileError(
            path, f"needs {package}, which is not installed: pip install 'semid[{extra}]'"
        ) from error
