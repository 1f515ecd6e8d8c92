"""Have glibc keep the memory of large messages instead of mapping it anew for each.

By default glibc maps a buffer of a few megabytes when it is asked for and unmaps it when it is
freed; the kernel clears every page in between. For messages of 1 MiB and more that costs several
times what gRPC itself does.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

OPTIONS: Final = {
    # From malloc.h: name in the environment, number, value.
    "MALLOC_ARENA_MAX": (-8, 1),  # one pool, so that what one thread frees another can use
    "MALLOC_MMAP_THRESHOLD_": (-3, 1 << 30),  # buffers below 1 GiB come from the pool
    "MALLOC_TRIM_THRESHOLD_": (-1, 1 << 30),  # which gives nothing back below 1 GiB
    "MALLOC_TOP_PAD_": (-2, 64 << 20),  # and grows by 64 MiB
}


def keep_large_buffers() -> bool:
    """Set glibc's allocator for large messages; False where it is another's, or already set.

    Resident memory then stays at the most that was ever in use. A setting in the environment is
    its operator's decision: it is left alone, and so are the others. Best called before any thread
    is started; it counts from then on.
    """
    if any(name in os.environ for name in OPTIONS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    results = [mallopt(number, value) for number, value in OPTIONS.values()]
    return all(results)
