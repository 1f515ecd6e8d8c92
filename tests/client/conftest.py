"""A server of simple arithmetic over a real socket, with failures to order, and both clients."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from semid.v1 import semid_pb2 as pb
from semid.v1 import semid_pb2_grpc
from semid_client import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FINGERPRINT = "f" * 64
MODES = [pb.DECODE_MODE_SUM, pb.DECODE_MODE_CALIBRATED]
WIRE = {
    pb.DATA_TYPE_FLOAT16: "<f2",
    pb.DATA_TYPE_FLOAT32: "<f4",
    pb.DATA_TYPE_FLOAT64: "<f8",
    pb.DATA_TYPE_UINT8: "<u1",
    pb.DATA_TYPE_UINT16: "<u2",
    pb.DATA_TYPE_UINT32: "<u4",
}


@dataclass
class FakeServer(semid_pb2_grpc.SemanticIdServiceServicer):
    """`semid.v1` by arithmetic.

    Code ``l`` of a row is its first number plus ``l``, modulo K; number ``d`` of a reconstruction
    is the sum of the codes plus ``d``.

    ``script[method]`` holds what the next calls do instead, one entry each; None does the usual.
    """

    input_dim: int = 4
    n_layers: int = 3
    codebook_width: int = 256
    code_dtype: int = pb.DATA_TYPE_UINT8
    max_message_bytes: int = 1 << 20
    max_rows: int = 1000
    fingerprint: str = FINGERPRINT
    calibration: str = ""
    port: int = 0
    script: dict[str, deque] = field(default_factory=lambda: defaultdict(deque))
    requests: dict[str, list] = field(default_factory=lambda: defaultdict(list))
    metadata: list[dict[str, str]] = field(default_factory=list)
    time_remaining: list[float] = field(default_factory=list)
    largest_message: int = 0
    health: health.HealthServicer = field(default_factory=health.HealthServicer)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def says_serving(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self.health.set(
            "semid.v1.SemanticIdService", status.SERVING if serving else status.NOT_SERVING
        )

    def calls(self, method: str) -> int:
        return len(self.requests[method])

    def _do(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        with self.lock:
            self.requests[method].append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            self.time_remaining.append(context.time_remaining())
            instead = self.script[method].popleft() if self.script[method] else None
        answer = instead(request, context) if instead else None
        if answer is None:
            answer = getattr(self, f"usual_{method}")(request, context)
        self.largest_message = max(self.largest_message, request.ByteSize(), answer.ByteSize())
        return answer

    def GetModel(self, request, context):  # noqa: N802 - gRPC's name
        return self._do("GetModel", request, context)

    def ListModels(self, request, context):  # noqa: N802 - gRPC's name
        return self._do("ListModels", request, context)

    def Encode(self, request, context):  # noqa: N802 - gRPC's name
        return self._do("Encode", request, context)

    def Decode(self, request, context):  # noqa: N802 - gRPC's name
        return self._do("Decode", request, context)

    def model(self) -> pb.Model:
        layer = pb.Layer(codebook_width=self.codebook_width, embedding_dim=self.input_dim)
        return pb.Model(
            name="fake",
            fingerprint=self.fingerprint,
            kind=pb.MODEL_KIND_RQ_KMEANS,
            input_dim=self.input_dim,
            layers=[layer] * self.n_layers,
            normalize_residuals=True,
            code_dtype=self.code_dtype,
            decode_modes=MODES if self.calibration else MODES[:1],
            calibration=self.calibration,
            limits=pb.Limits(max_message_bytes=self.max_message_bytes, max_rows=self.max_rows),
        )

    def usual_GetModel(self, request, context):  # noqa: N802 - after the method
        return pb.GetModelResponse(model=self.model())

    def usual_ListModels(self, request, context):  # noqa: N802 - after the method
        return pb.ListModelsResponse(models=[self.model()], default_model="fake")

    def _judge(self, request, context) -> np.ndarray:
        tensor = request.tensor
        if request.expected_fingerprint not in ("", self.fingerprint):
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"has {self.fingerprint}, expected {request.expected_fingerprint}",
            )
        if tensor.shape[0] > self.max_rows:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{tensor.shape[0]} rows")
        if tensor.dtype == pb.DATA_TYPE_BFLOAT16:
            bits = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
            return bits.view("<f4").reshape(tensor.shape)
        return np.frombuffer(tensor.data, WIRE[tensor.dtype]).reshape(tensor.shape)

    def usual_Encode(self, request, context):  # noqa: N802 - after the method
        rows = self._judge(request, context)
        if rows.shape[1] != self.input_dim:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"rows of {rows.shape[1]} numbers")
        if not np.isfinite(rows).all():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not finite")
        codes = self.expected_codes(rows)
        tensor = pb.Tensor(dtype=self.code_dtype, shape=codes.shape, data=codes.tobytes())
        return pb.EncodeResponse(fingerprint=self.fingerprint, tensor=tensor)

    def usual_Decode(self, request, context):  # noqa: N802 - after the method
        codes = self._judge(request, context)
        if (codes >= self.codebook_width).any():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a code is out of range")
        calibrated = request.mode == pb.DECODE_MODE_CALIBRATED
        if calibrated and not self.calibration:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the checkpoint has no norms")
        rows = self.expected_reconstruction(codes)
        if calibrated:
            rows += ord(self.calibration[0])
        tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=rows.shape, data=rows.tobytes())
        return pb.DecodeResponse(
            fingerprint=self.fingerprint,
            tensor=tensor,
            calibration=self.calibration if calibrated else "",
        )

    def expected_codes(self, rows) -> np.ndarray:
        first = np.asarray(rows)[:, :1].astype(np.int64)
        return ((first + np.arange(self.n_layers)) % self.codebook_width).astype(
            WIRE[self.code_dtype]
        )

    def expected_reconstruction(self, codes) -> np.ndarray:
        total = np.asarray(codes).astype(np.int64).sum(1, keepdims=True)
        return (total + np.arange(self.input_dim)).astype(np.float32)


@pytest.fixture
def make_server() -> Iterator[Callable[..., FakeServer]]:
    """Start servers; the keywords are those of `FakeServer`, and ``credentials`` for TLS."""
    running = []

    def make(*, credentials: grpc.ServerCredentials | None = None, **settings) -> FakeServer:
        fake = FakeServer(**settings)
        # Threads are started as calls come; a test that holds calls back needs many.
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 << 20)]
        server = grpc.server(ThreadPoolExecutor(16), options=options)
        semid_pb2_grpc.add_SemanticIdServiceServicer_to_server(fake, server)
        health_pb2_grpc.add_HealthServicer_to_server(fake.health, server)
        fake.says_serving(serving=True)
        address = f"127.0.0.1:{fake.port}"
        if credentials is None:
            fake.port = server.add_insecure_port(address)
        else:
            fake.port = server.add_secure_port(address, credentials)
        server.start()
        running.append(server)
        return fake

    yield make
    for server in running:
        server.stop(None).wait()


@pytest.fixture
def release(make_server) -> Iterator[threading.Event]:
    """What calls that are held wait for; it comes at the latest when the test is over."""
    released = threading.Event()
    yield released
    released.set()


@pytest.fixture
def server(make_server) -> FakeServer:
    return make_server()


class BlockingAsyncClient:
    """An AsyncClient and its event loop, used like a Client."""

    def __init__(self, *arguments, **keywords) -> None:
        self.loop = asyncio.new_event_loop()

        async def make() -> AsyncClient:
            return AsyncClient(*arguments, **keywords)

        self.client = self.loop.run_until_complete(make())

    @property
    def fingerprints(self) -> tuple[str, ...]:
        return self.client.fingerprints

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.client, name)
        return lambda *args, **kwargs: self.loop.run_until_complete(method(*args, **kwargs))


@pytest.fixture(params=[Client, BlockingAsyncClient], ids=["Client", "AsyncClient"])
def connect(request) -> Iterator[Callable[..., Client]]:
    """Make clients of one kind or the other; both must satisfy every test that asks for this."""
    made = []

    def make(server: FakeServer | str, **settings) -> Client:
        target = server if isinstance(server, str) else server.target
        made.append(request.param(target, **settings))
        return made[-1]

    yield make
    for client in made:
        client.close()
        if isinstance(client, BlockingAsyncClient):
            client.loop.close()


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script, given as text, in an interpreter of its own."""

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    return run
