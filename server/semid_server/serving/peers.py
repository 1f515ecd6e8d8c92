"""Who calls, and how many bytes of theirs are in work: no caller may have all of the queue.

A caller is whoever its connection or its calls prove it to be: the names in its certificate, else
its token, else the address it calls from, whatever the port. Callers behind one proxy are one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from semid_server.errors import OverloadedError
from semid_server.serving.tokens import bearer_token, hashed

if TYPE_CHECKING:
    from collections.abc import Callable

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


def cut_off(peer: str) -> bool:
    """Close the connection to a peer, whatever is under way there; False if it is not found.

    gRPC has no way to end a call whose peer takes nothing that it is sent: the status waits behind
    what went before, and the rest of its message goes on coming.

    Parameters
    ----------
    peer : str
        As gRPC tells it of a call.
    """
    wanted = _address_of(peer)
    found = False
    for opened in Path("/proc/self/fd").iterdir():
        try:
            connection = socket.socket(fileno=int(opened.name))
        except OSError:  # no socket, or closed meanwhile
            continue
        try:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                host, port, *_ = connection.getpeername()
                if (_plain(host), port) == wanted:
                    connection.shutdown(socket.SHUT_RDWR)
                    found = True
        except OSError:  # it listens, or has ended
            continue
        finally:
            connection.detach()  # it is gRPC's, who closes it
    return found


def _address_of(peer: str) -> tuple[str, int] | None:
    """The address in ``ipv4:127.0.0.1:1234`` or ``ipv6:%5B::1%5D:1234``; None in other kinds."""
    kind, _, rest = unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    return (_plain(host.strip("[]")), int(port)) if kind in ("ipv4", "ipv6") else None


def _plain(host: str) -> str:
    """An address in one spelling; one of IPv4 that a socket of IPv6 has as itself."""
    address = ipaddress.ip_address(host)
    return str(getattr(address, "ipv4_mapped", None) or address)


class Untaken:
    """Answers of one stream that its caller has not taken yet, in their order.

    Parameters
    ----------
    limit : int
        Bytes of them; one alone may be of any size.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._nbytes = 0
        self._answers: deque[tuple[int, Callable[[], None]]] = deque()
        self._taken = asyncio.Event()

    async def room(self, nbytes: int) -> None:
        """Wait until there is room for one more."""
        while self._answers and self._nbytes + nbytes > self._limit:
            self._taken.clear()
            await self._taken.wait()

    def add(self, nbytes: int, let_go: Callable[[], None]) -> None:
        """Keep one; ``let_go`` is called when it has been taken."""
        self._answers.append((nbytes, let_go))
        self._nbytes += nbytes

    def take(self) -> None:
        """Let go of the first."""
        nbytes, let_go = self._answers.popleft()
        self._nbytes -= nbytes
        let_go()
        self._taken.set()

    def take_all(self) -> None:
        """Let go of all."""
        while self._answers:
            self.take()


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
        self._waiting: dict[str, deque[tuple[asyncio.Future[None], int]]] = {}

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
        if not self._has_room(caller, nbytes):
            used = self._bytes[caller]
            raise OverloadedError(
                f"{used} bytes of this caller are in work, and {nbytes} more are beyond the limit "
                f"of {self._limit} (--max-peer-bytes)",
                retry_after=RETRY_AFTER,
            )
        self._count_in(caller, nbytes)

    async def take_when_room(self, caller: str, nbytes: int) -> None:
        """Count a request in once there is room: for flow-controlled streams.

        It waits behind those of its caller that wait already, even if there is room for it: small
        ones would keep a large one waiting for ever.
        """
        if caller not in self._waiting and self._has_room(caller, nbytes):
            self._count_in(caller, nbytes)
            return
        waiter = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(caller, deque())
        waiting.append((waiter, nbytes))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                with contextlib.suppress(ValueError):  # who made room may have found it first
                    waiting.remove((waiter, nbytes))
                self._count_in_waiting(caller)  # it may have been in the way of the next
            else:  # counted in and cancelled at once
                self.give_back(caller, nbytes)
            raise

    def give_back(self, caller: str, nbytes: int) -> None:
        """Count a request out."""
        left = self._bytes.pop(caller, 0) - nbytes
        if left:
            self._bytes[caller] = left
        self._count_in_waiting(caller)

    def _has_room(self, caller: str, nbytes: int) -> bool:
        used = self._bytes.get(caller, 0)
        return not used or used + nbytes <= self._limit

    def _count_in(self, caller: str, nbytes: int) -> None:
        self._bytes[caller] = self._bytes.get(caller, 0) + nbytes

    def _count_in_waiting(self, caller: str) -> None:
        """Count in those that wait, in their order, as far as there is room, and let them go on."""
        waiting = self._waiting.get(caller)
        while waiting:
            waiter, nbytes = waiting[0]
            if not waiter.done():  # else it was cancelled
                if not self._has_room(caller, nbytes):
                    return
                self._count_in(caller, nbytes)
                waiter.set_result(None)
            waiting.popleft()
        self._waiting.pop(caller, None)
