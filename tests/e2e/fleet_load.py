"""Calls one target until told to stop, and then gives an account: `test_fleet.py` runs it.

    python fleet_load.py KIND TARGET SETTINGS

KIND is Client, AsyncClient, encode_into or EncodeStream, the last without the client, as another
language would; SETTINGS, in JSON, go to the client. It says "calling" once all workers had answers,
stops at the first line on its standard input, and prints its account as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub
from semid_client import AsyncClient, Client, SemidClientError

DATA = Path(__file__).parents[1] / "reference"
EMBEDDINGS = np.load(DATA / "data/digits.npy")
CODES = np.load(DATA / "digits_rkmeans/codes.npy")

WORKERS = 4
PAUSE = 0.01
"""Seconds between calls, so that servers that start have a processor too."""

SIZES = (1, 20, 90)
"""Rows of a call; the most are several messages of a fleet whose servers take 40."""

MESSAGE_ROWS = 40
AHEAD = 4
"""Messages of a stream that have no answer yet."""

MOST_FRUITLESS = 600
"""Streams in a row that no server takes, a tenth of a second each."""


@dataclass
class Account:
    """What came of the calls."""

    calls: int = 0
    wrong: int = 0
    resumed: int = 0
    longest: float = 0.0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, seconds: float, answer, truth) -> None:
        """Count a call, which ended with an answer or with an error."""
        with self.lock:
            self.calls += 1
            self.longest = max(self.longest, seconds)
            if isinstance(answer, Exception):
                self.errors.append(f"{type(answer).__name__}: {answer}")
            elif not np.array_equal(answer, truth):
                self.wrong += 1
            if self.calls == 10 * WORKERS:
                say("calling")

    def show(self) -> None:
        names = ("calls", "wrong", "resumed", "longest", "errors")
        say(json.dumps({name: getattr(self, name) for name in names}))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def some_rows(random: np.random.Generator) -> slice:
    start = int(random.integers(1700))
    return slice(start, start + int(random.choice(SIZES)))


def call(client: Client, account: Account, stop: threading.Event, seed: int) -> None:
    random = np.random.default_rng(seed)
    while not stop.wait(PAUSE):
        rows, began = some_rows(random), time.monotonic()
        try:
            answer = client.encode(EMBEDDINGS[rows])
        except SemidClientError as error:
            answer = error
        account.add(time.monotonic() - began, answer, CODES[rows])


async def call_async(client: AsyncClient, account: Account, stop: threading.Event, seed: int):
    random = np.random.default_rng(seed)
    while not stop.is_set():
        await asyncio.sleep(PAUSE)
        rows, began = some_rows(random), time.monotonic()
        try:
            answer = await client.encode(EMBEDDINGS[rows])
        except SemidClientError as error:
            answer = error
        account.add(time.monotonic() - began, answer, CODES[rows])


class Pieces:
    """A sink that takes what comes for the next rows, and nothing else."""

    def __init__(self) -> None:
        self.codes: list[np.ndarray] = []
        self.rows = 0

    def __call__(self, start: int, codes: np.ndarray) -> None:
        assert start == self.rows, f"rows from {start} after {self.rows} rows"
        self.codes.append(codes)
        self.rows += len(codes)


def encode_into(client: Client, account: Account, stop: threading.Event, _seed: int) -> None:
    """Encode the whole set again and again, in many messages each time."""
    while not stop.wait(PAUSE):
        pieces, began = Pieces(), time.monotonic()
        try:
            client.encode_into(EMBEDDINGS, pieces)
            answer = np.concatenate(pieces.codes)
        except SemidClientError as error:
            answer = error
        account.add(time.monotonic() - began, answer, CODES)


class Stream:
    """One endless stream of messages, gone on with on another server when it breaks.

    The rule: answers come in order, so the number of them says where to go on.
    """

    def __init__(self, account: Account, stop: threading.Event) -> None:
        self.account, self.stop = account, stop
        self.answered = 0
        starts = range(0, len(EMBEDDINGS) - MESSAGE_ROWS, MESSAGE_ROWS)
        self.spans = [slice(start, start + MESSAGE_ROWS) for start in starts]

    def messages(self, broken: threading.Event, sent: list[int]):
        index = self.answered
        while not (self.stop.wait(PAUSE) or broken.is_set()):
            if index - self.answered < AHEAD:
                rows = EMBEDDINGS[self.spans[index % len(self.spans)]]
                tensor = pb.Tensor(
                    dtype=pb.DATA_TYPE_FLOAT32, shape=rows.shape, data=rows.astype("<f4").tobytes()
                )
                index += 1
                sent[0] = index
                yield pb.EncodeStreamRequest(request=pb.EncodeRequest(tensor=tensor))

    def run(self, stub: SemanticIdServiceStub) -> None:
        fruitless = 0
        while not self.stop.is_set() and fruitless < MOST_FRUITLESS:
            before, broken, sent = self.answered, threading.Event(), [self.answered]
            began = time.monotonic()
            try:
                for answer in stub.EncodeStream(self.messages(broken, sent)):
                    codes = np.frombuffer(answer.response.tensor.data, np.uint8)
                    truth = CODES[self.spans[self.answered % len(self.spans)]]
                    self.answered += 1
                    self.account.add(time.monotonic() - began, codes.reshape(truth.shape), truth)
                    began = time.monotonic()
            except grpc.RpcError as error:
                broken.set()
                if error.code() not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
                    self.account.add(0, error, None)
                self.account.resumed += 1
                fruitless = 0 if self.answered > before else fruitless + 1
                self.stop.wait(0.1)
            else:
                if self.answered != sent[0]:
                    lost = RuntimeError(f"{sent[0]} messages sent, {self.answered} answers")
                    self.account.add(0, lost, None)
        if fruitless:
            self.account.add(0, RuntimeError("no server took the stream"), None)


def in_threads(work, arguments) -> None:
    threads = [threading.Thread(target=work, args=(*arguments, seed)) for seed in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def in_tasks(target: str, settings: dict, account: Account, stop: threading.Event) -> None:
    async with AsyncClient(target, **settings) as client:
        calls = (call_async(client, account, stop, seed) for seed in range(WORKERS))
        await asyncio.gather(*calls)


def main(kind: str, target: str, settings: dict) -> None:
    account, stop = Account(), threading.Event()

    def wait() -> None:
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    if kind == "AsyncClient":
        asyncio.run(in_tasks(target, settings, account, stop))
    elif kind == "EncodeStream":
        config = {
            "loadBalancingConfig": [{"round_robin": {}}],
            "healthCheckConfig": {"serviceName": "semid.v1.SemanticIdService"},
        }
        options = (
            ("grpc.service_config", json.dumps(config)),
            ("grpc.dns_min_time_between_resolutions_ms", 1000),
            ("grpc.max_reconnect_backoff_ms", 1000),
        )
        with grpc.insecure_channel(target, options) as channel:
            stub = SemanticIdServiceStub(channel)
            in_threads(lambda _seed: Stream(account, stop).run(stub), ())
    else:
        with Client(target, **settings) as client:
            work = {"Client": call, "encode_into": encode_into}[kind]
            in_threads(work, (client, account, stop))
    account.show()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
