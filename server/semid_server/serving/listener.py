"""A gRPC server that is opened again where gRPC ends it unasked.

gRPC's asyncio server ends itself for good when it cannot read what a call begins with: one whose
path is not UTF-8 is enough, and anybody who can connect can send that. All calls in progress are
lost with it; those that come a moment later need not be.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from semid_server.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc.aio

logger = logging.getLogger(__name__)

PATIENCE: Final = 5.0
"""Seconds in which the address has to be free again."""

PAUSE: Final = 0.05
"""Seconds from one attempt to the next."""


class Listener:
    """Keeps a gRPC server open at one port.

    Parameters
    ----------
    make : callable
        Given a port, or None for that which is configured, returns a server bound to it, with all
        that it serves, and the port.

    Attributes
    ----------
    port : int
        Where it listens.
    """

    def __init__(self, make: Callable[[int | None], tuple[grpc.aio.Server, int]]) -> None:
        self._make = make
        self._server, self.port = make(None)
        self._ended: asyncio.Future[Any]
        self._keeping: asyncio.Task[None]

    async def start(self) -> None:
        """Begin to serve."""
        await self._begin(self._server)
        self._keeping = asyncio.create_task(self._keep())

    async def lost(self) -> None:
        """Wait until it cannot be kept open any more, and raise why.

        Raises
        ------
        ConfigurationError
            The address cannot be had again.
        """
        await asyncio.shield(self._keeping)

    async def stop(self, grace: float | None) -> None:
        """Do as `grpc.aio.Server.stop` does, for good."""
        self._keeping.cancel()
        await asyncio.wait({self._keeping})
        if not self._keeping.cancelled():
            logger.error("port %d: %s", self.port, self._keeping.exception())
        await self._server.stop(grace)

    async def _begin(self, server: grpc.aio.Server) -> None:
        self._server = server  # first: it is this one that `stop` has to end from now on
        await server.start()
        # Not awaited itself: to be cancelled there would spoil what it waits for.
        self._ended = asyncio.ensure_future(server.wait_for_termination())
        # Whoever does not ask why it ended knows.
        self._ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def _keep(self) -> None:
        while True:
            await asyncio.wait({self._ended})
            logger.error(
                "gRPC ended its server at port %d unasked, and with it the calls in progress (%r); "
                "it is to be opened again",
                self.port,
                self._ended.exception(),
            )
            await self._open_again()
            logger.info("port %d is open again", self.port)

    async def _open_again(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + PATIENCE
        while True:
            try:
                server, _ = self._make(self.port)
            except ConfigurationError:
                if loop.time() > end:
                    raise
                await asyncio.sleep(PAUSE)
            else:
                await self._begin(server)
                return
