"""How long batches take, learned from those that ran.

A batch has a cost of its own and a cost a row. Neither is known beforehand, and both change with
the model, the device and what else the machine does. So batches are remembered by size, in powers
of two, each size by a moving average. Between sizes one thing is relied on: that a batch of m times
the rows takes at most m times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

OUTLIER: Final = 4.0
"""By how many times the average a single batch may raise what is averaged: one long stall (a page
that is read from disk, a process that was stopped) says nothing of the batches after it."""

SMOOTHING: Final = 0.2
"""Weight of the newest batch in the average of its size."""

FORGETTING: Final = 1.05
"""By how much the shortest time of a size grows with each batch that was not as short."""

PROBE_ROWS: Final = 64
"""Rows of a first batch, of which nothing is known."""


@dataclass(slots=True)
class _Size:
    rows: float
    seconds: float
    shortest: float


class Pace:
    """What is known of the time that batches of one kind take.

    Written by whoever runs the batches, one at a time; read by any thread.
    """

    def __init__(self) -> None:
        # By the number of bits of the rows.
        self._sizes: dict[int, _Size] = {}
        self._best = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Learn that a batch of ``rows`` took ``seconds``."""
        if rows <= 0 or seconds <= 0:
            return
        size = self._sizes.get(rows.bit_length())
        if size is None:
            # Replaced, not changed: a reader in another thread may be going through it.
            self._sizes = self._sizes | {rows.bit_length(): _Size(float(rows), seconds, seconds)}
        else:
            size.rows += SMOOTHING * (rows - size.rows)
            # The second time tells whether the first, of which nothing was known, was a stall.
            expected = min(size.seconds, OUTLIER * seconds)
            size.seconds = expected + SMOOTHING * (min(seconds, OUTLIER * expected) - expected)
            size.shortest = min(seconds, FORGETTING * size.shortest)
        self._best = max([size.rows / size.seconds for size in self._sizes.values()])

    @property
    def known(self) -> bool:
        """Whether any batch has run."""
        return bool(self._sizes)

    def work(self, rows: int) -> float:
        """Seconds that ``rows`` take at the best rate there was, among others in a large batch.

        0 if nothing is known.
        """
        return rows / self._best if self._best else 0.0

    def predict(self, rows: int) -> float:
        """Seconds that a batch of ``rows`` is expected to take; 0 if nothing is known."""
        return self.times(rows)[0]

    def times(self, rows: int) -> tuple[float, float]:
        """Seconds that a batch of ``rows`` is expected to take, and those that it itself takes.

        The latter are the shortest of the last few dozen: what a busy machine adds to the others is
        not their own. Both are 0 if nothing is known.
        """
        sizes = self._sizes
        bits = rows.bit_length()
        size = sizes.get(bits)
        if size is None:
            if not sizes:
                return 0.0, 0.0
            larger = [known for known in sizes if known > bits]
            size = sizes[min(larger) if larger else max(sizes)]
            if not larger:
                times = rows / size.rows
                return times * size.seconds, times * size.shortest
        return size.seconds, size.shortest

    def rows_within(self, seconds: float) -> int:
        """Rows, at least one, of a batch that takes about ``seconds``.

        Where even the quickest batch takes longer than half of that, as its cost is not of rows,
        twice that batch's time is meant instead: smaller batches would waste the device.
        """
        sizes = self._sizes.values()
        if not sizes:
            return PROBE_ROWS
        quickest = min(sizes, key=lambda size: size.seconds)
        seconds = max(seconds, 2 * quickest.seconds)
        return max(
            1,
            *(
                round(seconds * size.rows / size.seconds)
                for size in sizes
                if size.seconds <= 1.5 * seconds  # about so long
            ),
        )
