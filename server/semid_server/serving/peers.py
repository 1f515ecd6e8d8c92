"""Who calls, and how many bytes of theirs are in work: no caller may have all of the queue.

A caller is whoever its connection or its calls prove it to be: the names in its certificate, else
its token, else the address it calls from, whatever the port. Callers behind one proxy are one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from semid_server.errors import OverloadedError
from semid_server.serving.tokens import bearer_token, hashed

if TYPE_CHECKING:
    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]

CERTIFICATE_NAMES: Final = ("x509_common_name", "x509_subject_alternative_name")
"""What gRPC tells of the names in a verified certificate."""

RETRY_AFTER: Final = 0.1
"""Seconds after which a caller that had too much in work may try again."""


def caller_of(context: Context, *, certificates: bool, tokens: bool) -> str:
    """Return what tells one caller from another; no secret.

    Parameters
    ----------
    context : grpc.aio.ServicerContext
        Of one call.
    certificates, tokens : bool
        Whether callers show certificates that were verified, and tokens that were checked.
    """
    if certificates:
        # All of its names: what tells the parts of a fleet apart is often not the common one.
        shown = context.auth_context()
        names = [list(shown.get(kind, ())) for kind in CERTIFICATE_NAMES]
        if any(names):
            return f"certificate {names}"  # as Python writes them: no two lists look the same
    if tokens:
        # The one that was checked, of several the last, and without the scheme, which has 64
        # spellings: nobody is several callers by what is sent beside a token.
        sent = dict(context.invocation_metadata() or ()).get("authorization")
        if (token := bearer_token(sent)) is not None:
            return f"token {hashed(token)[:12]}"
    return context.peer().rpartition(":")[0]


class PeerBytes:
    """Bytes in work by caller, each of whom may have so many.

    A caller with nothing in work may have a single request of any size.

    Parameters
    ----------
    limit : int
        Bytes of one caller.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def idle(self) -> bool:
        """Whether nobody has anything in work."""
        return not self._bytes

    def of(self, caller: str) -> int:
        """Bytes that a caller has in work."""
        return self._bytes.get(caller, 0)

    def take(self, caller: str, nbytes: int) -> None:
        """Count a request in.

        Raises
        ------
        OverloadedError
            Its caller has too much in work.
        """
        used = self._bytes.get(caller, 0)
        if used and used + nbytes > self._limit:
            raise OverloadedError(
                f"{used} bytes of this caller are in work, and {nbytes} more are beyond the limit "
                f"of {self._limit} (--max-peer-bytes)",
                retry_after=RETRY_AFTER,
            )
        self._bytes[caller] = used + nbytes

    async def take_when_room(self, caller: str, nbytes: int) -> None:
        """Count a request in once there is room: for flow-controlled streams."""
        woken = False
        while (used := self._bytes.get(caller, 0)) and used + nbytes > self._limit:
            waiter = asyncio.get_running_loop().create_future()
            waiting = self._waiting.setdefault(caller, deque())
            if woken:  # there was not room enough: still the first
                waiting.appendleft(waiter)
            else:
                waiting.append(waiter)
            woken = True
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter not in waiting:  # woken and cancelled at once: the next may go
                    self._wake(caller)
                else:
                    waiting.remove(waiter)
                raise
        self._bytes[caller] = used + nbytes
        self._wake(caller)

    def give_back(self, caller: str, nbytes: int) -> None:
        """Count a request out."""
        left = self._bytes.pop(caller, 0) - nbytes
        if left:
            self._bytes[caller] = left
        self._wake(caller)

    def _wake(self, caller: str) -> None:
        """Let the first who waits look again; it wakes the next if there is room for it."""
        waiting = self._waiting.get(caller)
        while waiting:
            waiter = waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._waiting.pop(caller, None)
