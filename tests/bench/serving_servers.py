"""Servers to compare semid with, each in a process of its own: ``serving_servers.py KIND ...``.

``echo``
    The limit: grpcio's asyncio server on semid's event loop and with its options, the same
    messages, and no work between them.
``plain``
    The same on the event loop that Python brings, as most servers run.
``instant CHECKPOINT``
    semid's own serving around a device that takes no time: the copy into the batch is made, the
    numbers are checked, and every code is 0. What it loses against ``echo`` is what serving costs.
``asleep CHECKPOINT``
    semid's own serving around a device that takes a millisecond a row, and none of this machine's
    processors: a queue of 16 requests.
``unbatched CHECKPOINT``
    A peer: what one writes in an hour, a thread pool that calls ``predict_step`` on each request.

``collector``
    Takes what `semid serve --tracing` exports, and keeps nothing.

Each prints ``ready HOST:PORT`` once it serves, and ends when its stdin does.
"""

from __future__ import annotations

import semid_server.cli.quiet_threads  # noqa: F401 - before torch, as `semid serve` does

# isort: split
import argparse
import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import torch
import uvloop

from semid.v1 import semid_pb2 as pb
from semid.v1 import semid_pb2_grpc as pb_grpc
from semid_server.checkpoint import load_checkpoint
from semid_server.encoding import EncodeCounts
from semid_server.serving.backend import Backend
from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.serving.server import Server

MAX_MESSAGE = 32 << 20
LAYERS = 3
KINDS = ("echo", "plain", "instant", "asleep", "unbatched", "collector")
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.so_reuseport", 0),
)


class Echo(pb_grpc.SemanticIdServiceServicer):
    """Answers with as many bytes as codes would take."""

    async def Encode(self, request, context):
        shape = request.tensor.shape[0], LAYERS
        codes = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=shape, data=bytes(shape[0] * LAYERS))
        return pb.EncodeResponse(fingerprint="0" * 64, tensor=codes)

    async def GetModel(self, request, context):
        return pb.GetModelResponse()


async def echo() -> None:
    server = grpc.aio.server(options=OPTIONS)
    pb_grpc.add_SemanticIdServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready 127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


class InstantEncoder:
    """All codes are 0, at once."""

    def prepare(self, rows):
        codes = np.zeros((len(rows), LAYERS), np.uint8)
        return lambda: codes

    def warm_up(self):
        pass

    def counts(self):
        return EncodeCounts()


class AsleepEncoder(InstantEncoder):
    """The same, a millisecond a row later."""

    def prepare(self, rows):
        codes = np.zeros((len(rows), LAYERS), np.uint16)

        def encode():
            time.sleep(len(rows) / 1000)  # the device's time, and no processor's
            return codes

        return encode


async def around(encoder: InstantEncoder, checkpoint: Path, **settings) -> None:
    """Serve by semid with this encoder."""

    class StandIn(Backend):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self._encoder = encoder

    def announce(line: str) -> None:
        if line.startswith("serving "):
            print(f"ready {line.rpartition(' ')[2]}", flush=True)

    config = ServeConfig(
        models=(ModelSource(checkpoint),),
        host="127.0.0.1",
        port=0,
        metrics_port=0,
        device="cpu",
        max_message_bytes=MAX_MESSAGE,
        **settings,
    )
    server = Server(config, announce=announce, make_backend=StandIn)
    running = asyncio.ensure_future(server.run())
    await asyncio.to_thread(sys.stdin.read)
    server.request_stop()
    await running


class Unbatched(pb_grpc.SemanticIdServiceServicer):
    def __init__(self, checkpoint: Path) -> None:
        self._model = load_checkpoint(checkpoint).model

    def Encode(self, request, context):
        rows = np.frombuffer(request.tensor.data, "<f4").reshape(request.tensor.shape)
        codes = self._model.predict_step(torch.from_numpy(rows.copy())).codes
        data = codes.numpy().astype(np.uint8).tobytes()
        tensor = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=codes.shape, data=data)
        return pb.EncodeResponse(tensor=tensor)

    def GetModel(self, request, context):
        return pb.GetModelResponse()


def unbatched(checkpoint: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(8), options=OPTIONS)
    pb_grpc.add_SemanticIdServiceServicer_to_server(Unbatched(checkpoint), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"ready 127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    server.stop(0).wait()


async def collector() -> None:
    from opentelemetry.proto.collector.trace.v1 import (  # noqa: PLC0415 - of an extra
        trace_service_pb2,
        trace_service_pb2_grpc,
    )

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request, context):
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.aio.server(options=OPTIONS)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready 127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    arguments = parser.parse_args()
    match arguments.kind:
        case "echo":
            uvloop.run(echo())
        case "plain":
            asyncio.run(echo())
        case "instant":
            uvloop.run(around(InstantEncoder(), arguments.checkpoint))
        case "asleep":
            uvloop.run(around(AsleepEncoder(), arguments.checkpoint, max_queue_requests=16))
        case "unbatched":
            unbatched(arguments.checkpoint)
        case "collector":
            asyncio.run(collector())


if __name__ == "__main__":
    main()
