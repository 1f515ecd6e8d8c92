"""Sees that batches and the event loop come to an end, and ends the process where they do not.

A device that hangs raises nothing: whoever waits for it waits for ever, while the server looks
healthy. So a thread looks, every few seconds, whether the same batch still runs, and whether the
event loop has run since it looked last.

- A batch that hangs in the worker leaves the event loop free: the server is told (``hung``),
  answers every call, and ends in order.
- An event loop that hangs, in a short batch that it ran itself or in anything else, can answer
  nobody. The process ends at once, and gRPC tells the callers that it is gone.

Looks are counted, not seconds: a process that was stopped, or a machine that was suspended, has not
hung. Code that hangs and keeps the interpreter's lock stops this thread as well. Then health checks
go without an answer, which is for whoever asks to act upon (a liveness probe).
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

LOOKS: Final = 8
"""Looks within the limit."""

LAST_LINES: Final = 5.0
"""Seconds for the log to be written where nothing else is waited for."""

AT_ONCE: Final = 0.01


class Watchdog:
    """Watches while it is entered, in the event loop's thread.

    Parameters
    ----------
    limit : float
        Seconds that a batch, or one step of the event loop, may take.
    batch : callable
        Returns the number of the batch that runs, None if none does. Called by another thread.
    hung : callable
        Called in the event loop, once, when a batch has taken too long; the process has to end.
    patience : float
        Seconds that it may take to end in order.
    end : callable
        Ends the process within so many seconds, whatever hangs.
    """

    def __init__(
        self,
        limit: float,
        *,
        batch: Callable[[], int | None],
        hung: Callable[[], None],
        patience: float,
        end: Callable[[float], None] | None = None,
    ) -> None:
        self._limit, self._batch, self._hung = limit, batch, hung
        self._patience, self._end = patience, end or end_within
        self._same_batch = self._same_step = 0
        self._last: int | None = None
        self._ran = True
        self._told = False
        self._left = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._watch, name="semid-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def look(self) -> None:
        """Look once: as many looks in a row that see the same are the limit."""
        self._look_at_the_loop()
        batch = self._batch()
        same = batch is not None and batch == self._last
        self._same_batch, self._last = (self._same_batch + 1 if same else 0), batch
        # A loop that hangs runs no batch but its own, and can be told nothing.
        loop_runs = self._same_step == 0
        if self._same_batch >= LOOKS and loop_runs and not self._told:
            self._told = True
            logger.critical("a batch has not ended within %g s", self._limit)
            faulthandler.dump_traceback(all_threads=True)
            self._end(self._patience)
            self._loop.call_soon_threadsafe(self._hung)

    def _look_at_the_loop(self) -> None:
        if self._ran:
            self._ran, self._same_step = False, 0
            self._loop.call_soon_threadsafe(self._run)
            return
        self._same_step += 1
        if self._same_step == LOOKS:
            self._end(LAST_LINES)  # first: logging may be what hangs
            logger.critical("the event loop has not run for %g s; the process ends", self._limit)
            for handler in logging.getLogger().handlers:
                handler.flush()
            faulthandler.dump_traceback(all_threads=True)
            self._end(AT_ONCE)

    def _run(self) -> None:
        self._ran = True

    def _watch(self) -> None:
        while not self._left.wait(self._limit / LOOKS):
            self.look()


def end_within(seconds: float) -> None:
    """End this process with status 1 after so long, unless it has ended: no lock is in the way."""
    nowhere = os.open(Path(os.devnull), os.O_WRONLY)  # a log that nobody reads would hold it up
    faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
