"""Messages on their way, and who goes without when they take too much.

A message is in this process's memory from its first byte on, and gRPC tells of it when its last has
come. So nobody knows how much of it there is, and a caller may take any time to send the rest. As
long as there is memory, and room for further calls, that is nobody's loss. When there is not, no
more than a few calls may begin, and those that wait for a message are *given up*, with an honest
status: those of the caller who has the most of them, and of these the one that has waited longest.
A caller who does not take even that loses the connection.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from asyncio import current_task
from contextlib import aclosing
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from semid_server.errors import OverloadedError
from semid_server.serving.peers import cut_off

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from semid_server.serving.memory import Memory

    CallContext = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    GiveUp = Callable[[OverloadedError], Awaitable[object]]

logger = logging.getLogger(__name__)

FEW: Final = 32
"""Calls that there may be whatever memory there is; and so many streams are never given up."""

FASTEST: Final = 4 << 30
"""Bytes a second that memory is taken to fill with at most: twice what gRPC was seen to receive."""

SOONEST: Final = 0.02
LATEST: Final = 1.0
"""Seconds from one look at the memory to the next, while there are more than a few calls."""

SHARE_OF_LOOKING: Final = 10
"""Looking may take one part in so many of the time: allocators may be slow to answer."""

AT_ONCE: Final = 8
"""One call in so many is given up at each look: it takes half a millisecond each."""

LEAST_AT_ONCE: Final = 8

GONE: Final = 0.1
"""Seconds in which gRPC is sure to cancel what answers a call whose caller has left."""

TELL_EVERY: Final = 10.0
"""Seconds from one line of the log that says so to the next."""

PATIENCE: Final = 0.2
"""Seconds that a caller has to take the status of a call that is given up."""

SHORT_RETRY_AFTER: Final = 1.0
"""Seconds after which a call may be tried again for which there was no memory."""

FULL_RETRY_AFTER: Final = 0.1
"""The same, where there was no room among the calls in progress."""

NO_MESSAGE: Final = "the call has no message"

UNREADABLE: Final = "the message cannot be read: its bytes are no message of its type"


class Awaited:
    """A call that waits for a message, or a stream that does so again and again.

    Made by the task that answers it.

    Parameters
    ----------
    caller, peer : str
        Whose it is, and at the other end of which connection.
    give_up : callable
        Ends the call by its context's ``abort``, with an error that says why.

    Attributes
    ----------
    over : bool
        Whether it is too late to give it up.
    task : asyncio.Task
        What answers it.
    """

    __slots__ = ("caller", "give_up", "over", "peer", "task")

    def __init__(self, caller: str, peer: str, give_up: GiveUp) -> None:
        self.caller, self.peer, self.give_up = caller, peer, give_up
        self.task = cast("asyncio.Task[Any]", current_task())  # gRPC calls in tasks only
        self.over = False


class Waiting:
    """Calls that wait for a message: by caller, and of each who has waited longest first.

    Attributes
    ----------
    count : int
        How many there are.
    """

    def __init__(self) -> None:
        self._of: dict[str, dict[Awaited, None]] = {}
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def add(self, awaited: Awaited) -> None:
        """Count one in."""
        self._of.setdefault(awaited.caller, {})[awaited] = None
        self.count += 1

    def discard(self, awaited: Awaited) -> None:
        """Count one out, if it is in."""
        others = self._of.get(awaited.caller, {})
        if awaited not in others:
            return
        del others[awaited]
        self.count -= 1
        if not others:
            del self._of[awaited.caller]

    def renew(self, awaited: Awaited) -> None:
        """Have one wait from now on, if it is in."""
        others = self._of.get(awaited.caller, {})
        if awaited in others:
            del others[awaited]
            others[awaited] = None

    def of(self, caller: str) -> int:
        """How many a caller has."""
        return len(self._of.get(caller, ()))

    def next_to_go(self, count: int) -> list[Awaited]:
        """Of the caller who has most, the one that has waited longest, and so on; up to so many."""
        # How many each has left, less than none so that the most come first; a number, as nothing
        # else of two can be compared; and those that it has.
        left = [(-len(own), i, iter(own)) for i, own in enumerate(self._of.values())]
        heapq.heapify(left)
        found: list[Awaited] = []
        while left and len(found) < count:  # not at all if that is less than none
            most, i, own = left[0]
            found.append(next(own))
            if most + 1:
                heapq.heapreplace(left, (most + 1, i, own))
            else:
                heapq.heappop(left)
        return found


class Incoming:
    """Waits for the messages of calls, and gives some up when memory or room is short.

    Parameters
    ----------
    memory : Memory, optional
        Its limit is kept; without it there is none.
    caller : callable
        Tells whose a call is.

    Attributes
    ----------
    calls, streams, others : Waiting
        Calls of the service that wait for their one message; streams, whether they wait for their
        next, or with one for room; and calls of other services. Streams are given up last: some are
        idle and take nothing.
    """

    def __init__(
        self,
        memory: Memory | None = None,
        *,
        caller: Callable[[CallContext], str] = lambda context: context.peer(),
    ) -> None:
        self._memory, self._caller = memory, caller
        self.calls, self.streams, self.others = Waiting(), Waiting(), Waiting()
        self._short: OverloadedError | None = None
        self._tell_from = 0.0
        # When memory is looked at next, and whether anybody asked for it since the last time.
        self._looking: asyncio.TimerHandle | None = None
        self._watched = False
        self._giving_up: set[asyncio.Task[None]] = set()

    def refusal(self) -> OverloadedError | None:
        """Return what calls are refused with whose messages there is no memory for, if so."""
        return self._short

    def watch(self) -> None:
        """Have memory looked at, as there are more than a few calls."""
        self._watched = True
        if self._memory is not None and self._looking is None:
            self._look_in(SOONEST, self._memory)

    def awaited(self, context: CallContext, give_up: GiveUp) -> Awaited:
        """Return what stands for a call in `Waiting`."""
        return Awaited(self._caller(context), context.peer(), give_up)

    async def message(
        self, context: CallContext, waiting: Waiting, give_up: GiveUp
    ) -> bytes | None:
        """Wait for the next message of a call, and return its bytes; None after the last.

        Parameters
        ----------
        context : grpc.aio.ServicerContext
            Of the call; nobody else reads from it.
        waiting : Waiting
            One of this object's.
        give_up : callable
            As in `Awaited`.

        Raises
        ------
        grpc.aio.AbortError
            The call was given up.
        """
        awaited = self.awaited(context, give_up)
        waiting.add(awaited)
        if self._count > FEW:
            self.watch()
        try:
            return await next_message(context)
        finally:
            waiting.discard(awaited)
            awaited.over = True

    def make_way(self, context: CallContext) -> bool:
        """Give a call up whose caller has more of them on their way than the caller of this one.

        Returns whether there was one.
        """
        awaited = next(iter(self.calls.next_to_go(1)), None)
        if (
            awaited is None
            or self.calls.of(awaited.caller) <= self.calls.of(self._caller(context)) + 1
        ):
            return False
        count = self.calls.of(awaited.caller)
        self._give_up(
            self.calls,
            awaited,
            OverloadedError(
                "the server takes no more calls, and of all callers this one had the most whose "
                f"messages were still on their way: {count}. This had waited longest",
                retry_after=FULL_RETRY_AFTER,
            ),
        )
        return True

    @property
    def _count(self) -> int:
        return len(self.calls) + len(self.streams) + len(self.others)

    def _look_in(self, seconds: float, memory: Memory) -> None:
        # In no call's context: what is found is not about the one that is let in just now.
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(seconds, self._look, memory, context=Context())

    def _look(self, memory: Memory) -> None:
        """See whether memory is short, and give up some of what takes it if so."""
        self._looking = None
        began = time.thread_time()  # what others have of the processor meanwhile is not its cost
        in_use, limit = memory.in_use(), memory.limit
        self._short = None if in_use <= limit else _shortage(in_use, limit)
        if self._short is not None:
            if time.monotonic() > self._tell_from:
                logger.warning("%s; %d calls wait for messages", self._short, self._count)
                self._tell_from = time.monotonic() + TELL_EVERY
            self._give_some_up(self._short)
        if self._watched or self.others or self.calls or len(self.streams) > FEW:
            took = time.thread_time() - began
            until_full = min(LATEST, (limit - in_use) / FASTEST)
            self._look_in(max(SOONEST, until_full, SHARE_OF_LOOKING * took), memory)
        self._watched = False

    def _give_some_up(self, short: OverloadedError) -> None:
        count = max(LEAST_AT_ONCE, self._count // AT_ONCE)
        surely = sorted((self.calls, self.others), key=len, reverse=True)
        for waiting, left in (*((waiting, 0) for waiting in surely), (self.streams, FEW)):
            gone = waiting.next_to_go(min(count, len(waiting) - left))
            for awaited in gone:
                self._give_up(waiting, awaited, short)
            count -= len(gone)

    def _give_up(self, waiting: Waiting, awaited: Awaited, error: OverloadedError) -> None:
        waiting.discard(awaited)  # at once: it is not to be found again
        task = asyncio.ensure_future(_end(awaited, error))
        self._giving_up.add(task)
        task.add_done_callback(self._giving_up.discard)


def _shortage(in_use: int, limit: int) -> OverloadedError:
    return OverloadedError(
        f"memory is short: {in_use} bytes are in use, and more than {FEW} calls may be in progress "
        f"while it is no more than {limit} (--max-memory-bytes)",
        retry_after=SHORT_RETRY_AFTER,
    )


async def next_message(context: CallContext) -> bytes | None:
    """Wait for the next message of a call, and return its bytes; None after the last."""
    message: bytes | Any = await context.read()
    return message if isinstance(message, bytes) else None


async def may_be_gone() -> None:
    """Wait until this task would be cancelled if the caller of its call had left.

    No message may come because none was sent, or because nobody is there to send it; gRPC tells
    which a moment later.
    """
    await asyncio.sleep(GONE)


async def _end(awaited: Awaited, error: OverloadedError) -> None:
    if awaited.over:
        return
    ending = asyncio.ensure_future(awaited.give_up(error))
    await asyncio.wait({ending, awaited.task}, timeout=PATIENCE)
    if not (ending.done() and awaited.task.done()):
        # What it was sent before is in the way: with it, what answers it waits for ever.
        awaited.task.cancel()
        if cut_off(awaited.peer):  # else another of its calls was first
            logger.warning("%s takes nothing that it is sent: it was cut off", awaited.peer)
    try:
        await ending
    except grpc.aio.AbortError:  # as it should end
        return
    except Exception as failed:  # noqa: BLE001 - its caller left: gRPC's error for that is its own
        logger.debug("a call could not be given up: %r", failed)


class Guarded(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not generic at run time
    """Has another service's messages waited for by `Incoming`.

    Parameters
    ----------
    service : GenericRpcHandler
        What answers the calls.
    incoming : Incoming
        What waits.
    """

    def __init__(self, service: grpc.GenericRpcHandler[Any, Any], incoming: Incoming) -> None:
        self._service, self._incoming = service, incoming
        self._handlers: dict[str, Handler] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """Return what answers a call."""
        name = handler_call_details.method
        handler = self._handlers.get(name)
        if handler is None:
            unguarded = self._service.service(handler_call_details)
            if unguarded is None:
                return None
            handler = self._handlers[name] = self._guard(unguarded)
        return handler

    def _guard(self, handler: Handler) -> Handler:
        streams = handler.request_streaming
        if not handler.response_streaming:
            unary: Any = handler.unary_unary

            async def answer(_messages: object, context: CallContext) -> Any:
                return await unary(await self._first(handler, context), context)

            return grpc.stream_unary_rpc_method_handler(
                answer, response_serializer=handler.response_serializer
            )
        behaviour: Any = handler.stream_stream if streams else handler.unary_stream

        async def answer_stream(_messages: object, context: CallContext) -> AsyncIterator[Any]:
            if streams:
                asked = self._requests(handler, context)
            else:
                asked = await self._first(handler, context)
            async with aclosing(behaviour(asked, context)) as responses:
                async for response in responses:
                    yield response

        return grpc.stream_stream_rpc_method_handler(
            answer_stream, response_serializer=handler.response_serializer
        )

    async def _first(self, handler: Handler, context: CallContext) -> Any:
        request = await self._next(handler, context)
        if request is None:
            await may_be_gone()
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
        return request

    async def _requests(self, handler: Handler, context: CallContext) -> AsyncIterator[Any]:
        while (request := await self._next(handler, context)) is not None:
            yield request

    async def _next(self, handler: Handler, context: CallContext) -> Any:
        read: Any = handler.request_deserializer  # generated handlers have one
        give_up = partial(_abort, context)
        message = await self._incoming.message(context, self._incoming.others, give_up)
        if message is None:
            return None
        try:
            return read(message)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, UNREADABLE)


async def _abort(context: CallContext, error: OverloadedError) -> None:
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
