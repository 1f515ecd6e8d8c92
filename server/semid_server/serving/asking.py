"""A gRPC server that asks for calls ahead of their coming.

gRPC's asyncio server asks for one call at a time: in a task of its own, which it waits for by
`asyncio.wait`, and for the next one a turn of the loop after that has come. Of calls that come
together each waits for all of this, and for gRPC's threads once more, where most of a short call is
spent already. Here some calls are always asked for, so that those that have come by one turn of the
loop are all begun in it; and what stands for each is no task. Nothing else about calls changes:
they are begun in the order in which they came.

There is no public way to this. So the server is of a subclass of gRPC's own, with one method
replaced, and gRPC's module sees another `asyncio.wait`, which does for all other servers what it
always did. Where gRPC has other names for what is needed here, its own way is left to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # has no types

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Generator

logger = logging.getLogger(__name__)

AHEAD: Final = 4
"""Calls that are asked for before they come. Each that has come is begun in the same turn of the
loop; more of them bring little, and keep the others waiting."""

NAMES: Final = ("_make_request_call_future", "_request_call")
"""What gRPC's server asks for the next call by: what makes a task of a coroutine, and that."""


class _Asked:
    """A call that was asked for; gRPC waits for it and takes it as it would a task.

    Parameters
    ----------
    asking : coroutine
        Asks for it, waits for one future, and returns the call.
    """

    __slots__ = ("_asking", "_came")

    def __init__(self, asking: Coroutine[asyncio.Future[None], None, Any]) -> None:
        self._asking = asking
        self._came = asking.send(None)
        # As a task does with what a coroutine waits for: it may be waited for anew.
        self._came._asyncio_future_blocking = False  # noqa: SLF001 - what is kept for tasks

    def __await__(self) -> Generator[Any, None, None]:
        return self._came.__await__()

    def done(self) -> bool:
        """Whether it has come, or cannot come any more."""
        return self._came.done()

    def cancel(self) -> bool:
        """Have nobody wait for it."""
        return self._came.cancel()

    def result(self) -> Any:
        """Return it; raise what gRPC raises where it cannot come any more."""
        try:
            self._asking.send(None)
        except StopIteration as returned:
            return returned.value
        raise RuntimeError("gRPC waits for more than that a call has come")

    def let_go(self) -> None:
        """Forget it: nobody asks for it any more."""
        # Not before gRPC has: it writes to what the coroutine holds.
        self._came.add_done_callback(self._forget)

    def _forget(self, came: asyncio.Future[None]) -> None:
        if not came.cancelled():
            came.exception()  # it is known that there is one: the server was shut down
        self._asking.close()


class _AskingServer(cygrpc.AioServer):  # type: ignore[misc]  # has no types
    """gRPC's server, which asks for `AHEAD` calls."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._ahead: deque[_Asked] = deque()
        # Methods that are registered are asked for one by one: then it is left as it is.
        self._any_method = True

    def _make_request_call_future(self, method: bytes | None) -> Any:
        """Return what stands for the next call, in place of a task."""
        self._any_method &= method is None
        if not self._any_method:
            return super()._make_request_call_future(method)
        while len(self._ahead) < AHEAD:
            self._ahead.append(_Asked(self._request_call()))
        return self._ahead.popleft()

    async def shutdown(self, grace: float | None) -> None:
        """Do as gRPC's does, and forget what was asked for."""
        try:
            await super().shutdown(grace)
        except Exception:  # noqa: BLE001 - who waits for the server's end is told by gRPC
            # What ended the asking for calls. It kept gRPC from ending those in progress as well:
            # their connections would close when their peers like, or after 20 s.
            await super().shutdown(None)
        finally:
            while self._ahead:
                self._ahead.popleft().let_go()


async def _wait(fs: Collection[Any], **settings: Any) -> tuple[Collection[Any], Collection[Any]]:
    """Do as `asyncio.wait` does, with fewer turns for a call that was asked for here."""
    if len(fs) == 1:
        (asked,) = fs
        if isinstance(asked, _Asked):
            with suppress(Exception):  # `result` raises it
                await asked
            return (asked,), ()
    return await asyncio.wait(fs, **settings)


def server(**settings: Any) -> grpc.aio.Server:
    """Return the server that `grpc.aio.server` returns, but that it asks for calls ahead.

    Parameters
    ----------
    **settings
        Those of `grpc.aio.server`.
    """
    before = cygrpc.AioServer
    if not (hasattr(cygrpc, "asyncio") and all(hasattr(before, name) for name in NAMES)):
        logger.warning(
            "this gRPC (%s) is not known here: it asks for calls one by one, which is slower",
            grpc.__version__,
        )
        return grpc.aio.server(**settings)
    cygrpc.asyncio = SimpleNamespace(**{**vars(asyncio), "wait": _wait})
    cygrpc.AioServer = _AskingServer
    try:
        return grpc.aio.server(**settings)
    finally:
        cygrpc.AioServer = before
