"""A server on a real GPU and its driver, as it is operated.

The first part runs in the environment of the CUDA image: the settings of docker/Dockerfile, what
its builder compiles, no C compiler, nowhere to write but one folder. Then the device runs out of
memory, and is broken: by real kernels, not by errors made up, as in tests/e2e/test_faults.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import pytest
import torch
from dockerfile import RUNTIME, STAGES, settings
from grpc_health.v1 import health_pb2, health_pb2_grpc
from running import ENVIRONMENT, SEMID, Gate, float32_tensor, run_server, settings_of_gated
from waiting import wait_until

from semid.v1 import semid_pb2 as pb
from semid_client import Client

driver = pytest.importorskip("triton.backends.nvidia.driver", reason="needs Triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)
OK, INTERNAL, UNAVAILABLE = (
    grpc.StatusCode.OK,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
)


@pytest.fixture(scope="module")
def movies(reference_set_named):
    return reference_set_named("movies_rkmeans")


def assert_recorded(codes, movies):
    kept = ~movies.vanishing[: len(codes)]
    np.testing.assert_array_equal(codes[kept], movies.codes[: len(codes)][kept])


def health_of(server):
    with server.channel() as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status


# --- as in the image ------------------------------------------------------------------------


class Place(NamedTuple):
    """The one folder that may be written to, and the environment of what runs there."""

    folder: Path
    environment: dict[str, str]

    def without_launcher(self, folder: Path) -> dict[str, str]:
        """Return an environment that lacks what the image's builder compiled."""
        lacking = self.environment | {"TRITON_CACHE_DIR": str(folder / "triton")}
        del lacking["TRITON_CACHE_MANAGER"]
        return lacking


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What servers of this file compile is kept here, so that the first alone has to."""
    return tmp_path_factory.mktemp("image")


@pytest.fixture(scope="module")
def image(folder) -> Place:
    if hasattr(driver, "make_launcher"):
        pytest.skip("docker/triton_launcher.py refuses this Triton: it takes 3.7 or newer")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here, which the image's builder has")
    subprocess.run(
        [sys.executable, ROOT / "docker/triton_launcher.py", folder / "site"], check=True
    )
    for name in ("empty", "tmp"):
        (folder / name).mkdir()
    image = settings(RUNTIME, "") | settings(STAGES["cuda"], "")
    assert image["TRITON_CACHE_MANAGER"] == "semid_triton_launcher:Cache"
    path = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        name: value.replace("/tmp", str(folder / "tmp"))  # noqa: S108 - the image's own
        for name, value in image.items()
    } | {
        "TMPDIR": str(folder / "tmp"),
        "HOME": "/proc",  # nobody can write there, root included
        "PATH": str(folder / "empty"),
        "PYTHONPATH": os.pathsep.join(path),
    }
    return Place(folder, environment)


def without_cc(*command):
    return (shutil.which("env"), "-u", "CC", *command)


@pytest.fixture(scope="module")
def server(image, movies):
    """A server as the image has it; rows are encoded again by the reference, on the GPU too."""
    with run_server(
        movies.checkpoint,
        *("--admin-port", 0, "--verify-fraction", 1),
        log=image.folder / "serve.log",
        env=image.environment,
        program=without_cc(SEMID, "serve"),
    ) as server:
        yield server
        assert server.process.poll() is None, f"the server died:\n{server.stderr()}"
        assert server.stop() == 0


def test_without_a_compiler_kernels_run_and_codes_are_the_recorded_ones(server, image, movies):
    with Client(server.target) as client:
        for dtype in (np.float32, np.float64):
            assert_recorded(client.encode(movies.embeddings.astype(dtype)), movies)
        for rows in (1, 17, 300):
            assert_recorded(client.encode(movies.embeddings[:rows]), movies)
        model = client.model()
    assert health_of(server) == SERVING
    name = torch.cuda.get_device_name(0)
    assert server.metric("semid_model_info", fingerprint=model.fingerprint, device=name) == 1
    cache = Path(image.environment["TRITON_CACHE_DIR"])
    assert list(cache.rglob("*.cubin")), "kernels were compiled here"
    assert not list(cache.rglob("*.so")), "nothing was that needs a C compiler"
    wait_until(lambda: server.metric("semid_verified_rows_total") >= len(movies.codes))
    assert server.metric("semid_verify_mismatches_total") == 0


def test_without_what_the_image_carries_a_server_says_what_is_missing(image, movies, tmp_path):
    with run_server(
        *(movies.checkpoint, "--admin-port", 0),
        log=tmp_path / "serve.log",
        env=image.without_launcher(tmp_path),
        program=without_cc(SEMID, "serve"),
        wait=False,
    ) as server:
        wait_until(lambda: server.process.poll() is not None or server.has_said("semid: serving "))
        assert server.process.poll() == 1, server.stderr()
        said = server.stderr()
    assert "Traceback" not in said
    (sentence,) = (line for line in said.splitlines() if line.startswith("Error: "))
    print(sentence)
    assert "Failed to find C compiler" in sentence
    assert "semid doctor" in sentence


@contextlib.contextmanager
def load(server, movies):
    """Keep a server busy; every answer is right, and no call fails."""
    left, wrong = threading.Event(), []

    def call():
        with Client(server.target, timeout=60) as client:
            while not left.is_set():
                try:
                    assert_recorded(client.encode(movies.embeddings), movies)
                except Exception as error:  # noqa: BLE001 - whatever it is, the test is told
                    wrong.append(error)
                    return

    callers = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        left.set()
        for caller in callers:
            caller.join(120)
    assert not wrong


def test_memory_and_utilisation_are_those_of_the_device(server, movies):
    name = torch.cuda.get_device_name(0)

    def metric(what):
        return server.metric(f"semid_device_{what}", device=name)

    _, total = torch.cuda.mem_get_info(0)
    assert metric("memory_total_bytes") == pytest.approx(total, rel=0.05)
    assert metric("memory_total_bytes") > metric("memory_used_bytes")
    assert metric("memory_used_bytes") > metric("memory_reserved_bytes") > 0
    with load(server, movies):
        busy = wait_until(lambda: metric("utilization_ratio"))
    assert 0 < busy <= 1
    print(*re.findall(r"^semid_device_m.*", server.scrape(), re.MULTILINE), sep="\n")
    print("utilisation under load:", busy)


def test_every_metric_of_the_readme_has_a_sample(server, movies):
    with Client(server.target) as client:
        client.decode(client.encode(movies.embeddings[:10]))
    section = (ROOT / "README.md").read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    told = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    page = server.scrape()
    sampled = set(
        re.findall(r"^(\w+?)(?:_bucket|_count|_sum)?(?:\{.*\})? \S+$", page, re.MULTILINE)
    )
    assert len(told) > 30
    assert told <= sampled


def test_a_new_version_is_made_ready_while_others_call(server, movies):
    before = server.metric("semid_model_reloads_total", result="ok")
    with load(server, movies):
        server.signal(signal.SIGHUP)
        wait_until(  # scrapes all the while
            lambda: server.metric("semid_model_reloads_total", result="ok") == before + 1
        )
        assert server.metric("semid_device_memory_reserved_bytes") > 0
    assert server.metric("semid_model_reloads_total", result="failed") == 0


def examined(movies, environment, folder):
    """Return the exit status of `semid doctor`, and its findings by the name of the check."""
    ran = subprocess.run(
        without_cc(
            *(SEMID, "doctor", "--checkpoint", movies.checkpoint, "--device", "cuda"),
            *("--port", "0", "--metrics-port", "0", "--json"),
        ),
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        cwd=folder,
        timeout=300,
    )
    assert "Traceback" not in ran.stderr
    findings = {}
    for finding in json.loads(ran.stdout)["findings"]:
        print(finding)  # shown if the test fails
        findings.setdefault(finding["check"], []).append(finding)
    return ran.returncode, findings


def test_the_doctor_finds_nothing_wrong_with_the_gpu(image, movies, tmp_path):
    _, findings = examined(movies, image.environment, tmp_path)
    memory = [f"gpu memory {i}" for i in range(torch.cuda.device_count())]
    on_gpu = ["driver", "gpu code", *memory, "gpu kernels", "self-test cuda:0"]
    found = {check: [each["status"] for each in findings[check]] for check in on_gpu}
    assert found == {
        "driver": ["OK"],
        "gpu code": ["OK"],
        **{check: ["OK"] for check in memory},
        "gpu kernels": ["OK"],
        "self-test cuda:0": ["OK"] * 2,  # a model of its own, and the checkpoint
    }
    (driver_,), (kernels,) = findings["driver"], findings["gpu kernels"]
    assert f"torch {torch.__version__} for CUDA {torch.version.cuda}" in driver_["what"]
    assert re.search(r"NVIDIA driver \d+\.\d+", driver_["what"])
    assert "C compiler none: compiled and ran one" in kernels["what"]
    for test in findings["self-test cuda:0"]:
        assert "rows as in float64" in test["what"]


def test_the_doctor_says_that_a_compiler_is_missing(image, movies, tmp_path):
    status, findings = examined(movies, image.without_launcher(tmp_path), tmp_path)
    assert status == 1
    (kernels,) = findings["gpu kernels"]
    assert kernels["status"] == "FAIL"
    assert "install gcc" in kernels["todo"]
    assert {test["status"] for test in findings["self-test cuda:0"]} == {"FAIL"}
    assert {test["status"] for test in findings["self-test cpu"]} == {"OK"}


# --- short of memory ------------------------------------------------------------------------

NO_MEMORY, ASSERTED, ASTRAY = 1002.0, 1006.0, 1007.0
"""Orders of tests/e2e/faulty_serve.py."""

ROWS = 40_000
"""Of a large request. Their reconstructions have 61 MB, and while they are made five times that."""


@contextlib.contextmanager
def gated(movies, folder, tmp_path, *arguments, **env):
    """Run a server on the GPU whose encoder waits, or fails, when the rows say so."""
    options = settings_of_gated(tmp_path / "gate")
    options["env"] |= env | {
        "TRITON_CACHE_DIR": str(folder / "tmp/triton"),
        "NUMBA_CACHE_DIR": str(folder / "tmp/numba"),
    }
    with run_server(
        *(movies.checkpoint, "--device", "cuda", *arguments),
        log=tmp_path / "serve.log",
        **options,
    ) as server:
        yield server, Gate(server, tmp_path / "gate")


@contextlib.contextmanager
def memory_hog():
    """Yield a function that leaves so many bytes of the GPU's memory to others."""
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("memory_hog.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def leave(nbytes):
            process.stdin.write(f"{nbytes}\n")
            process.stdin.flush()
            left = int(process.stdout.readline())
            assert left < nbytes + 64 * MIB, "somebody else gives memory back"

        try:
            yield leave
        finally:
            process.kill()


def test_a_device_without_memory_fails_what_needs_it_and_nothing_else(movies, folder, tmp_path):
    truth = movies.codes.astype("u1")

    def decode(rows):
        codes = np.resize(truth, (rows, movies.n_layers))
        tensor = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=codes.shape, data=codes.tobytes())
        return pb.DecodeRequest(tensor=tensor)

    def together(*requests):
        """Have requests share a batch; return their calls, ended."""
        first = gate.hold(stub, movies.embeddings.shape[1])
        calls = [stub.Decode.future(request, timeout=120) for request in requests]
        gate.wait_for_queue(len(requests))
        gate.release()
        assert first.code() is OK
        for call in calls:
            call.code()
        return calls

    def encoded():
        with Client(server.target, timeout=120) as client:
            return client.encode(movies.embeddings)

    with (
        gated(
            *(movies, folder, tmp_path),
            *("--max-message-bytes", 64 * MIB, "--max-batch-bytes", 1024 * MIB),
            *("--max-queue-bytes", 1024 * MIB, "--max-peer-bytes", 1024 * MIB),
            *("--max-batch-rows", 1 << 18, "--max-batch-seconds", 3600),
        ) as (server, gate),
        server.stub() as stub,
    ):
        whole = together(decode(ROWS))[0].result().tensor.data
        assert len(whole) == 4 * ROWS * movies.embeddings.shape[1]
        with memory_hog() as leave:
            # What the server keeps for later it gives back when it finds no memory.
            row = np.full((1, movies.embeddings.shape[1]), NO_MEMORY, np.float32)
            call = stub.Encode.future(pb.EncodeRequest(tensor=float32_tensor(row)), timeout=60)
            assert call.code() is INTERNAL

            leave(64 * MIB)
            *few, much = together(decode(9), decode(10), decode(11), decode(ROWS))
            assert much.code() is INTERNAL
            assert f"no memory for this request of {ROWS} rows" in much.details()
            assert [call.code() for call in few] == [OK] * 3
            for call, rows in zip(few, (9, 10, 11), strict=True):
                assert call.result().tensor.data == whole[: 4 * rows * movies.embeddings.shape[1]]
            # Encoding works in memory that it has had from the start.
            assert_recorded(encoded(), movies)
            assert health_of(server) == SERVING

            leave(900 * MIB)
            calls = together(*[decode(ROWS)] * 4)
            assert [call.code() for call in calls] == [OK] * 4
            assert all(call.result().tensor.data == whole for call in calls)
            assert "no device memory for 4 requests at once; halving" in server.stderr()
        said = server.stderr().count("no device memory")
        calls = together(*[decode(ROWS)] * 4)
        assert all(call.result().tensor.data == whole for call in calls)
        assert server.stderr().count("no device memory") == said, "now there is enough"
        assert_recorded(encoded(), movies)
        assert server.stop() == 0


# --- broken ---------------------------------------------------------------------------------


BROKEN = pytest.mark.parametrize(
    ("order", "error"),
    [(ASSERTED, "device-side assert triggered"), (ASTRAY, "an illegal memory access")],
)


@BROKEN
def test_a_kernel_that_breaks_the_device_ends_the_process_once_every_call_has_its_answer(
    movies, folder, tmp_path, order, error
):
    def encode(rows):
        return stub.Encode.future(pb.EncodeRequest(tensor=float32_tensor(rows)), timeout=120)

    with gated(movies, folder, tmp_path) as (server, gate), server.stub() as stub:
        assert encode(movies.embeddings[:9]).code() is OK
        with server.channel() as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == SERVING
            held = gate.hold(stub, movies.embeddings.shape[1])
            breaking = movies.embeddings[:3].copy()
            breaking[0, 0] = order
            calls = [encode(breaking)]
            calls += [encode(movies.embeddings[n : n + 9]) for n in range(30)]
            gate.wait_for_queue(31)
            gate.release()
            assert held.code() is OK
            # Another server can answer what this one no longer can.
            assert {call.code() for call in calls} == {UNAVAILABLE}, server.stderr()
            assert next(watch).status == NOT_SERVING
        assert server.wait() == 1, server.stderr()
        said = server.stderr()
        assert f"CUDA error: {error}" in said
        assert "Error: the device has failed and can do nothing more for this process" in said


@BROKEN
def test_a_kernel_that_breaks_the_device_amid_the_event_loop_ends_the_process_as_well(
    movies, folder, tmp_path, order, error
):
    def encode(rows):
        return stub.Encode.future(pb.EncodeRequest(tensor=float32_tensor(rows)), timeout=120)

    with (
        gated(movies, folder, tmp_path, SEMID_TEST_IN_LOOP="1") as (server, _),
        server.stub() as stub,
        server.channel() as channel,
    ):
        for _ in range(9):
            assert encode(movies.embeddings[:3]).code() is OK
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        breaking = movies.embeddings[:3].copy()
        breaking[0, 0] = order
        assert encode(breaking).code() is UNAVAILABLE, server.stderr()
        server.wait_for("in the event loop")
        assert next(watch).status == NOT_SERVING
        assert server.wait() == 1, server.stderr()
        said = server.stderr()
        assert f"CUDA error: {error}" in said
        assert "Error: the device has failed and can do nothing more for this process" in said


# --- replaced -------------------------------------------------------------------------------

MANY, TIMES = 9, 3
# As the benchmarks do: there is no installed command where a checkout is tested.
PROGRAM = (sys.executable, "-c", "from semid_server.cli.serve import serve; serve()")


def test_many_models_are_reloaded_again_and_again_while_others_call(movies, tmp_path):
    names = [f"m{number}" for number in range(MANY)]
    arguments = [f"--checkpoint={name}={movies.checkpoint}" for name in names]
    rows = movies.embeddings[:20]
    complaints, leave = [], threading.Event()

    def call(first):
        with server.stub() as stub:
            for number in itertools.count(first):
                if leave.is_set():
                    return
                request = pb.EncodeRequest(model=names[number % MANY], tensor=float32_tensor(rows))
                try:
                    answer = stub.Encode(request, timeout=60).tensor
                    assert_recorded(np.frombuffer(answer.data, "u1").reshape(answer.shape), movies)
                except (grpc.RpcError, AssertionError) as error:
                    complaints.append(error)
                    return

    def reloads(result):
        return server.metric("semid_model_reloads_total", result=result)

    settings = {"log": tmp_path / "serve.log", "program": PROGRAM}
    with run_server(None, "--device=cuda", *arguments, **settings) as server:
        callers = [threading.Thread(target=call, args=[first]) for first in range(3)]
        for caller in callers:
            caller.start()
        try:
            for times in range(1, TIMES + 1):
                server.signal(signal.SIGHUP)
                wait_until(lambda done=times * MANY: reloads("ok") + reloads("failed") == done)
        finally:
            leave.set()
            for caller in callers:
                caller.join()
        assert complaints == []
        assert reloads("failed") == 0, server.stderr()
        assert server.stop() == 0
