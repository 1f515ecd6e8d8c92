"""How much memory this process may have, and how much of it is in use."""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from pathlib import Path, PurePosixPath
from typing import Final

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

TRIM_EVERY: Final = 1.0
"""Seconds from one time that the allocator gives back what it keeps to the next: it takes long."""

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class _Mallinfo2(ctypes.Structure):
    """What glibc tells of its allocator: `mallinfo2(3)`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


class Memory:
    """Watches what a process has in use against a limit.

    To be made in the process that it is about.

    Parameters
    ----------
    limit : int
        Bytes.

    Attributes
    ----------
    limit : int
        May be changed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._mallinfo2 = _mallinfo2()
        # Kept open: it must be asked when no more files can be opened, above all.
        self._statm = os.open(PROC / "self/statm", os.O_RDONLY)
        weakref.finalize(self, os.close, self._statm)
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._trim_from = 0.0

    def in_use(self) -> int:
        """Bytes in use now.

        Within the limit, that is all that is resident, with pages that the allocator keeps for what
        comes next: a server has it keep what was ever in use (see `allocator`). Beyond it, what the
        allocator has given out: to ask for that goes through all that is free. Where it cannot
        tell, it is made to give back what it keeps.
        """
        resident = self._resident()
        if resident <= self.limit:
            return resident
        if self._mallinfo2 is not None:
            told = self._mallinfo2()
            return min(resident, int(told.uordblks + told.hblkhd))
        if self._trim is not None and (now := time.monotonic()) >= self._trim_from:
            self._trim(0)
            self._trim_from = now + TRIM_EVERY
            resident = self._resident()
        return resident

    def _resident(self) -> int:
        """Bytes of memory that are this process's own, not those of files."""
        _, resident, of_files, *_ = os.pread(self._statm, 256, 0).split()
        return _PAGE * (int(resident) - int(of_files))


def allowed(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that this process may have: the machine's, or the least that a control group allows."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    allowances = [int(fields["MemTotal"].split()[0]) << 10]
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path).relative_to("/")
        # Those above it as well; within a container its own is the root, whatever it is called.
        allowances += [
            limit
            for folder in (group, *group.parents)
            if (limit := number_in(root / folder / name)) is not None
        ]
    return min(allowances)


def number_in(path: Path) -> int | None:
    """What a file says, if it is there and says a number."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # ValueError: "max", for no limit
        return None


def _mallinfo2() -> ctypes._NamedFuncPointer | None:
    """Return what asks the allocator, unless that is not glibc's."""
    everywhere = ctypes.CDLL(None)
    mallinfo2: ctypes._NamedFuncPointer | None = getattr(everywhere, "mallinfo2", None)
    if mallinfo2 is None:
        return None
    # One that is preloaded stands before it, and glibc's has nothing to tell.
    glibc = ctypes.CDLL("libc.so.6")
    if _address(everywhere.malloc) != _address(glibc.malloc):
        return None
    mallinfo2.restype = _Mallinfo2
    return mallinfo2


def _address(function: ctypes._NamedFuncPointer) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
