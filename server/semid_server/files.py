"""Files, read as a whole if they are such: anything else might be waited for without end."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

KINDS: Final = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "pipe",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFSOCK: "socket",
}
"""What a path may lead to in place of a regular file."""


def read_file(path: Path) -> bytes:
    """Return what a file holds. Links are followed.

    Raises
    ------
    OSError
        It cannot be read, or is a pipe, say, which might be waited for until somebody writes.
    """
    refuse_irregular(path, path.stat())
    # What takes its place by now, a pipe say, would be waited for as it is opened already.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        refuse_irregular(path, os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def refuse_irregular(path: Path, status: os.stat_result) -> None:
    """Raise OSError if ``status``, which is that of ``path``, is of anything but a regular file."""
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "thing of another kind")
        raise OSError(errno.EINVAL, f"not a regular file but a {kind}", str(path))
