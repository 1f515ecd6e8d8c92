"""The commands of a machine that serves, one module each, imported when called."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from semid_server.errors import SemidError

if TYPE_CHECKING:
    from collections.abc import Iterator


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
