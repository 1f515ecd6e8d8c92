"""The commands of a machine that serves, one module each, imported when called."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from semid_server.errors import SemidError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """End a command with one sentence and exit status 1 where semid or the system refuses.

    For use with ``with``, or as a decorator below `click.command`. A bug keeps its traceback.
    """
    try:
        yield
    except SemidError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(f"{where}{error.strerror or error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name ``path`` in an error of the system that names no file, as a full disk's does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file under another name and rename it: it is never there in part."""
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        temporary.write_bytes(contents)
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()
