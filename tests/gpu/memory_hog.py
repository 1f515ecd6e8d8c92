"""Take the memory of the first GPU, so that other processes find it short.

    python memory_hog.py

Each line of its input is a number of bytes: it takes what is free but for so many, or gives back
what that needs, and answers with the bytes that are left. It gives all back when its input ends.
"""

from __future__ import annotations

import sys

import torch

LEAST = 1 << 21
"""Bytes of the smallest piece; torch takes memory in multiples of it."""


def leave(nbytes: int, taken: list[torch.Tensor]) -> int:
    """Take all but so many bytes into ``taken``, and return how many are left."""
    taken.clear()
    torch.cuda.empty_cache()
    size = 1 << 33
    while (free := torch.cuda.mem_get_info(0)[0]) - nbytes >= LEAST:
        size = min(size, (free - nbytes) // LEAST * LEAST)
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device="cuda:0"))
        except torch.cuda.OutOfMemoryError:  # what is free need not be in one piece
            if size == LEAST:
                break
            size = max(LEAST, size // 2)
    return torch.cuda.mem_get_info(0)[0]


def main() -> None:
    taken: list[torch.Tensor] = []
    for line in sys.stdin:
        print(leave(int(line), taken), flush=True)


if __name__ == "__main__":
    main()
