"""Load on one gRPC server from a process of its own.

Reads one JSON object, a `Load`, from the first line of stdin; connects, warms up, prints ``ready``;
begins at the time of the monotonic clock on the second line; prints one JSON object of results.

Bodies are sent and received as bytes, so that the client costs as little as a client can.
Latencies of open loops count from the moment at which a request was due, not from the one at which
it could be sent: a server that stalls is charged with all that should have been sent meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to send. ``calls`` are pairs of a method and the file of its body, sent in turn.

    With a ``rate`` (requests a second) the loop is open: requests are sent when they are due. With
    none it is closed: ``in_flight`` of them are always under way. ``nice`` lowers the priority.
    """

    target: str
    calls: list[tuple[str, str]]
    seconds: float
    in_flight: int = 1
    rate: float | None = None
    warmup: float = 0.3
    timeout: float = 20.0
    nice: int = 0


class Client:
    """Sends what a `Load` says, and notes each answer.

    Of each: its call, its status, the microseconds that it took, and those since the load began.
    """

    def __init__(self, load: Load, channel: grpc.aio.Channel) -> None:
        self._load = load
        self._calls = [
            (channel.unary_unary(method), Path(body).read_bytes()) for method, body in load.calls
        ]
        self.answers: list[tuple[int, str, int, int]] = []
        self.lag = self.begin = 0.0

    async def one(self, index: int, since: float) -> None:
        call, body = self._calls[index]
        try:
            await call(body, timeout=self._load.timeout)
            status = "OK"
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        now = time.monotonic()
        took, at = round((now - since) * 1e6), round((now - self.begin) * 1e6)
        self.answers.append((index, status, took, at))

    async def _closed_loop(self, begin: float, end: float, first: int) -> None:
        await asyncio.sleep(begin - time.monotonic())
        index = first
        while (now := time.monotonic()) < end:
            await self.one(index % len(self._calls), now)
            index += 1

    async def _open_loop(self, begin: float, end: float, rate: float) -> None:
        tasks = set()
        for number in range(int((end - begin) * rate)):
            due = begin + number / rate
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            self.lag = max(self.lag, time.monotonic() - due)
            task = asyncio.ensure_future(self.one(number % len(self._calls), due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if tasks:
            await asyncio.wait(tasks)

    async def run(self, begin: float, seconds: float, rate: float | None) -> None:
        self.begin = begin
        end = begin + seconds
        if rate is not None:
            await self._open_loop(begin, end, rate)
            return
        await asyncio.gather(
            *(self._closed_loop(begin, end, first) for first in range(self._load.in_flight))
        )


async def main() -> None:
    load = Load(**json.loads(sys.stdin.readline()))
    os.nice(load.nice)
    async with grpc.aio.insecure_channel(load.target, OPTIONS) as channel:
        await channel.channel_ready()
        client = Client(load, channel)
        # Warmed up in a closed loop: an open one must find the server as its rate left it.
        await client.run(time.monotonic(), load.warmup, None)
        client.answers.clear()
        print("ready", flush=True)
        begin = float(sys.stdin.readline())
        cpu = time.process_time()
        await client.run(begin, load.seconds, load.rate)
        result: dict[str, Any] = {
            "seconds": time.monotonic() - begin,
            "answers": client.answers,
            "lag": client.lag,
            "cpu": time.process_time() - cpu,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
