"""Files that are looked at while the server serves: by threads, and never by the event loop.

A disk may hang: whoever asks it for anything, a file's size even, waits until it comes back,
perhaps for ever. Only threads that nothing waits for without limit may do so.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from typing import TYPE_CHECKING, Final, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

logger = logging.getLogger(__name__)

SLOW: Final = 10.0
"""Seconds after which the log says that files are still waited for."""


def in_daemon(work: Callable[..., T], *args: object) -> asyncio.Future[T]:
    """Do as `asyncio.to_thread`, in a thread that does not keep the process from ending.

    Storage may take for ever to be read; the interpreter waits at its end for the threads of
    `asyncio.to_thread`.
    """
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()  # who waits may leave, and the thread goes on
    threading.Thread(
        target=_settle, args=(done, work, *args), name="semid-disk", daemon=True
    ).start()
    return asyncio.wrap_future(done)


def _settle(done: concurrent.futures.Future[T], work: Callable[..., T], *args: object) -> None:
    try:
        done.set_result(work(*args))
    except BaseException as error:  # noqa: BLE001 - handed to whoever awaits it
        done.set_exception(error)
        del done  # which has the error, which has this frame: what it holds would stay


async def patiently(
    work: asyncio.Future[T], *, where: object, meanwhile: str, slow: float = SLOW
) -> T:
    """Wait for what a thread does with files, however long it takes; the log says so if it is slow.

    Parameters
    ----------
    work : Future
        What is waited for.
    where, meanwhile : str
        The files, and what holds until it has ended, for the log.
    slow : float
        Seconds after which it is slow.
    """
    try:
        done, _ = await asyncio.wait({work}, timeout=slow)
        if not done:
            _tell(where, meanwhile, slow)
            await asyncio.wait({work})
            logger.warning("%s: the disk has answered", where)
        return await work
    finally:
        work.cancel()


class Lookout:
    """Looks at files again and again while it is entered, in a thread of its own.

    While a look hangs there is no second one, and nobody waits for it, at the end neither. It is
    one thread for all looks, since to start one takes longer than to look. Entered in the event
    loop's thread, which tells of a look that hangs.

    Parameters
    ----------
    look : callable
        Looks once.
    every : float
        Seconds from one look to the next.
    where, meanwhile, slow
        As of `patiently`.
    """

    def __init__(
        self,
        look: Callable[[], None],
        every: float,
        *,
        where: object,
        meanwhile: str,
        slow: float = SLOW,
    ) -> None:
        self._look, self._every = look, every
        self._where, self._meanwhile, self._slow = where, meanwhile, slow
        self._began: float | None = None
        self._told = False
        self._failed = ""
        self._left = threading.Event()
        self._noticing: asyncio.TimerHandle

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="semid-lookout", daemon=True).start()
        self._notice()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._noticing.cancel()

    def _watch(self) -> None:
        while not self._left.wait(self._every):
            self._began = time.monotonic()
            try:
                self._look()
            except Exception as error:  # a bug, say; the next look may do better
                if self._failed != (failed := repr(error)):
                    logger.exception(
                        "%s: could not be looked at; until it can, %s", self._where, self._meanwhile
                    )
                self._failed = failed
            else:
                self._failed = ""
            self._began = None
            if self._told:
                self._told = False
                logger.warning("%s: the disk has answered", self._where)

    def _notice(self) -> None:
        began = self._began
        if not self._told and began is not None and time.monotonic() - began >= self._slow:
            self._told = True
            _tell(self._where, self._meanwhile, self._slow)
        self._noticing = asyncio.get_running_loop().call_later(self._slow, self._notice)


def _tell(where: object, meanwhile: str, slow: float) -> None:
    logger.warning(
        "%s: the disk has not answered within %g s; until it does, %s", where, slow, meanwhile
    )
