"""Floods one target with large messages until it is gone: `test_lifecycle.py` runs it.

    python large_flood.py TARGET CALLS SIZES

CALLS are in flight at any time, each of one of the SIZES in MiB (1,4,16), and each is made anew at
once, whatever became of it. It says "calling" once it had an answer, and prints how many calls came
to what, as JSON, when the target takes no connection any more: "wrong" is an OK with other codes
than the true ones, and behind a status stand the details, unless it is what semid itself says.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import sys
from pathlib import Path

import grpc
import grpc.aio
import numpy as np

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub

DATA = Path(__file__).parents[1] / "reference"
EMBEDDINGS = np.load(DATA / "data/digits.npy").astype("<f4")
CODES = np.load(DATA / "digits_rkmeans/codes.npy").astype("u1")
MIB = 1 << 20
ROOM = 1024
"""Bytes of a message that are not its rows, at most."""

CONNECTIONS = 4
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # else all channels share one connection
]

OWN = {
    grpc.StatusCode.UNAVAILABLE: "the server is shutting down",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "memory is short",
}
"""How the details begin of what semid itself says."""


def message_of(mebibytes: int) -> tuple[pb.EncodeRequest, bytes]:
    """A request of almost so many MiB, and the codes that answer it."""
    rows = (mebibytes * MIB - ROOM) // EMBEDDINGS[0].nbytes
    which = np.arange(rows) % len(EMBEDDINGS)
    tensor = pb.Tensor(
        dtype=pb.DATA_TYPE_FLOAT32,
        shape=[rows, EMBEDDINGS.shape[1]],
        data=EMBEDDINGS[which].tobytes(),
    )
    return pb.EncodeRequest(tensor=tensor), CODES[which].tobytes()


def is_gone(code: grpc.StatusCode, details: str) -> bool:
    """Whether nobody listens at the target any more."""
    return code is grpc.StatusCode.UNAVAILABLE and "Connection refused" in details


def outcome_of(code: grpc.StatusCode, details: str) -> str:
    own = code in OWN and details.startswith(OWN[code])
    return code.name if own else f"{code.name}: {details}"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def main(target: str, calls: int, sizes: list[int]) -> None:
    messages = [message_of(size) for size in sizes]
    outcomes: collections.Counter[str] = collections.Counter()
    async with contextlib.AsyncExitStack() as stack:
        stubs = [
            SemanticIdServiceStub(
                await stack.enter_async_context(grpc.aio.insecure_channel(target, OPTIONS))
            )
            for _ in range(CONNECTIONS)
        ]

        async def call_on(number: int) -> None:
            stub = stubs[number % CONNECTIONS]
            request, truth = messages[number % len(messages)]
            while True:
                try:
                    answer = await stub.Encode(request)
                except grpc.aio.AioRpcError as error:
                    code, details = error.code(), error.details() or ""
                    if is_gone(code, details):
                        return
                    outcomes[outcome_of(code, details)] += 1
                else:
                    if not (outcomes["OK"] or outcomes["wrong"]):
                        say("calling")
                    outcomes["OK" if answer.tensor.data == truth else "wrong"] += 1

        await asyncio.gather(*(call_on(number) for number in range(calls)))
    say(json.dumps(outcomes))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), [int(size) for size in sys.argv[3].split(",")]))
