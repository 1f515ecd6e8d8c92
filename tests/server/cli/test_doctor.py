"""`semid doctor`: what it thinks of hosts good and bad, and what it finds on this one."""

from __future__ import annotations

import dataclasses
import http.server
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from semid_server.checkpoint import inspect_checkpoint
from semid_server.cli import doctor as command
from semid_server.cli import doctor_facts as facts
from semid_server.cli.doctor_checks import (
    GIB,
    MIB,
    CheckpointFacts,
    Gpu,
    GpuFacts,
    Library,
    MountFacts,
    SelfTest,
    ServerFacts,
    Status,
    TritonFacts,
    check_allocator,
    check_architecture,
    check_checkpoint,
    check_clock,
    check_compiled_loops,
    check_device_memory,
    check_driver,
    check_libraries,
    check_memory,
    check_open_files,
    check_port,
    check_processors,
    check_python,
    check_self_test,
    check_server,
    check_shared_memory,
    check_triton,
)
from semid_server.serving.config import ModelSource, ServeConfig

OK, WARN, FAIL, SKIP = Status.OK, Status.WARN, Status.FAIL, Status.SKIP
SEMID = Path(sys.executable).with_name("semid")
FINGERPRINT, OTHER = "f" * 64, "0" * 64
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 70 * GIB, 79 * GIB)
HOST = GpuFacts(
    torch="2.13.0",
    torch_cuda="13.0",
    torch_archs=("sm_75", "sm_80", "sm_90", "compute_120"),
    driver="580.159.04",
    driver_cuda=(13, 0),
    files=1,
    gpus=(H100,),
)
CPU_HOST = GpuFacts(torch="2.13.0+cpu")


def but(facts, **changes):
    return dataclasses.replace(facts, **changes)


def judged(finding, status, *parts):
    """Hold a finding to its status and to words of what it says; whatever is wrong has a cure."""
    assert finding.status is status, finding
    for part in parts:
        assert part in finding.what + " -> " + finding.todo
    assert bool(finding.todo) == (status in {WARN, FAIL})


# --- the checks, on made-up hosts -----------------------------------------------------------


def test_an_old_python_is_named():
    judged(check_python((3, 13)), OK, "3.13")
    judged(check_python((3, 10)), FAIL, "3.10", "3.11")


def test_a_library_outside_its_range_or_missing_is_named_with_both_versions():
    good = Library("numpy", ">=1.26", "2.4.6", fits=True)
    judged(check_libraries([good]), OK, "all 1")
    judged(
        check_libraries([
            good,
            Library("protobuf", "<8,>=7.35.1", "6.33.0", fits=False),
            Library("numba", ">=0.61", None, fits=False),
        ]),
        FAIL,
        "protobuf 6.33.0, supported: <8,>=7.35.1",
        "numba is not installed",
    )  # fmt: skip
    judged(check_libraries(None), SKIP)


@pytest.mark.parametrize(
    ("gpus", "device", "status", "says"),
    [
        (HOST, "auto", OK, "driver 580.159.04 for CUDA up to 13.0, 1 GPU"),
        (but(HOST, gpus=(H100, H100)), "cuda:1", OK, "2 GPUs"),
        (CPU_HOST, "auto", OK, "serves on the CPU"),
        (CPU_HOST, "cuda", FAIL, "--gpus all"),
        (GpuFacts(error="libcudart.so: cannot open"), "auto", FAIL, "libcudart.so: cannot open"),
        (but(HOST, torch_cuda=None, gpus=()), "auto", WARN, "this build of torch uses no GPU"),
        (but(HOST, torch_cuda=None, gpus=()), "cuda", FAIL, "this build of torch uses no GPU"),
        (
            but(HOST, driver="550.54", driver_cuda=(12, 4), gpus=()),
            "auto",
            WARN,
            "too old for this build -> update the driver to one for CUDA 13",
        ),
        (
            but(HOST, gpus=(), error="RuntimeError: no CUDA-capable device"),
            "cuda",
            FAIL,
            "finds no GPU: RuntimeError: no CUDA-capable device",
        ),
        (but(HOST, driver=None, driver_cuda=None, gpus=()), "auto", WARN, "nvidia-smi"),
    ],
)
def test_torch_and_driver_must_fit_each_other_and_what_is_asked(gpus, device, status, says):
    judged(check_driver(gpus, device), status, says)


@pytest.mark.parametrize(
    ("capability", "status", "says"),
    [
        ((9, 0), OK, "H100 80GB HBM3 (9.0)"),
        ((8, 9), OK, "(8.9)"),  # runs what was compiled for 8.0
        ((7, 5), WARN, "older than Ampere"),
        ((7, 0), FAIL, "capability 7.0; torch has code for sm_75"),
        ((10, 3), FAIL, "capability 10.3"),
        ((12, 1), OK, "(12.1)"),  # compiles what is written for 12.0
    ],
)
def test_torch_must_have_code_for_the_gpu(capability, status, says):
    gpus = but(HOST, gpus=(dataclasses.replace(H100, capability=capability),))
    judged(check_architecture(gpus), status, says)


@pytest.mark.parametrize(("free", "status"), [(10, OK), (3, WARN), (1, FAIL)])
def test_device_memory_must_do(free, status):
    gpus = but(HOST, gpus=(H100, dataclasses.replace(H100, free=free * GIB)))
    first, second = check_device_memory(gpus, 2 * GIB)
    judged(first, OK, "70.0 GiB of 79.0 GiB free")
    judged(second, status, f"{free}.0 GiB of 79.0 GiB free, about 2.0 GiB needed")


@pytest.mark.parametrize(
    ("triton", "status", "says"),
    [
        (TritonFacts("3.7.1", "/usr/bin/gcc", seconds=1.25), OK, "compiled and ran one in 1.2 s"),
        (TritonFacts(None, None, error="No module named 'triton'"), FAIL, "No module named"),
        (TritonFacts("3.7.1", None, error="Failed to find C compiler"), FAIL, "install gcc"),
        (TritonFacts("3.7.1", "/usr/bin/gcc", error="exit 1"), FAIL, "python3-dev"),
    ],
)
def test_kernels_must_compile(triton, status, says):
    judged(check_triton(triton), status, says)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from semid_server.cli.doctor_kernel import double

source = ASTSource(double, {"numbers": "*fp32", "WIDTH": "constexpr"}, {"WIDTH": 64})
print("double" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


def test_the_kernel_that_is_compiled_is_one_that_can_be(tmp_path):
    # To an H100's machine code: that takes no GPU. In a process of its own, since other tests have
    # Triton interpret what it would compile.
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_codes_that_differ_from_float64_fail_and_are_counted():
    test = SelfTest("movies", "cuda:0", rows=2000, fast=1900, float64=99, reference=1, seconds=0.01)
    judged(
        check_self_test(test),
        OK,
        "2000 rows as in float64; 1900 proved by the fast product, 99 decided in float64, 1 by",
        "10 ms",
    )
    judged(check_self_test(but(test, different=1)), FAIL, "1 of 2000 rows", "do not serve")
    judged(check_self_test(SelfTest("m", "cpu", error="Boom: no")), FAIL, "Boom: no")


def test_a_checkpoint_must_load_mean_something_and_be_the_one_expected():
    good = CheckpointFacts("here", "movies", "rq-kmeans", FINGERPRINT)
    judged(check_checkpoint(good), OK, FINGERPRINT)
    judged(check_checkpoint(good, FINGERPRINT), OK)
    judged(check_checkpoint(good, OTHER), FAIL, FINGERPRINT, OTHER)
    judged(check_checkpoint(but(good, warnings=("layer 1: 3 of 64",))), WARN, "layer 1: 3 of 64")
    judged(check_checkpoint(but(good, problems=("all zero",))), FAIL, "all zero")
    judged(check_checkpoint(CheckpointFacts("here", error="no file")), FAIL, "no file")
    judged(check_checkpoint(None), SKIP, "--checkpoint PATH")


def test_a_port_in_use_is_told_with_the_flag_that_changes_it():
    judged(check_port("--port", "0.0.0.0:50051", ""), OK, "is free")
    judged(
        check_port("--port", "0.0.0.0:50051", "Address already in use"),
        FAIL,
        "0.0.0.0:50051: Address already in use",
        "sport = :50051",
        "--port",
    )


def test_an_address_that_cannot_be_had_is_told_with_what_to_change():
    nowhere = check_port("--port", "10.9.9.9:50051", "Cannot assign requested address")
    judged(nowhere, FAIL, "10.9.9.9:50051: Cannot assign", "--host")
    privileged = check_port("--metrics-port", "0.0.0.0:80", "Permission denied")
    judged(privileged, FAIL, "0.0.0.0:80: Permission denied", "1024", "--metrics-port")


@pytest.mark.parametrize(
    ("hard", "status"), [(256, FAIL), (1024, WARN), (65536, OK), (math.inf, OK)]
)
def test_few_open_files_are_few_connections(hard, status):
    said = "unlimited" if hard == math.inf else f"{hard:,}"
    judged(check_open_files(hard, hard), status, f"{said} allowed")
    # `semid serve` takes all that it may have.
    judged(check_open_files(256, hard), status, f"{said} allowed")


def test_shared_memory_must_hold_what_callers_may_share():
    need = GIB
    judged(check_shared_memory(MountFacts(2 * GIB, 2 * GIB, writable=True), need), OK)
    small = MountFacts(64 * MIB, 64 * MIB, writable=True)  # docker's own
    judged(check_shared_memory(small, need), WARN, "64.0 MiB of 64.0 MiB", "--shm-size")
    judged(check_shared_memory(small, 0), SKIP)
    judged(check_shared_memory(but(small, writable=False), need), WARN, "not writable")
    judged(check_shared_memory(but(small, exists=False), need), WARN, "missing")


@pytest.mark.parametrize(("available", "status"), [(4, OK), (1.5, WARN), (0.5, FAIL)])
def test_memory_must_do_for_all_processes(available, status):
    finding = check_memory(int(available * GIB), 2 * GIB, "the container's limit")
    judged(finding, status, "the container's limit", "2.0 GiB needed")


@pytest.mark.parametrize(
    ("host", "asked", "status", "says"),
    [
        ((16, math.inf), (None, 1), OK, "16 threads"),
        ((16, math.inf), (None, 4), OK, "16 threads"),
        ((64, 2.0), (None, 1), WARN, "2 by the container's limit; 64 threads"),
        ((64, 2.0), (None, 1), WARN, "-> --threads 2"),
        ((64, 2.0), (2, 1), OK, "2 threads"),
        ((64, 1.5), (2, 1), OK, "1.5 by"),
        ((4, math.inf), (4, 2), WARN, "wait for each other -> --threads 2"),
        ((2, math.inf), (None, 4), WARN, "-> --processes 2 --threads 1"),
    ],
)
def test_threads_must_not_outnumber_processors(host, asked, status, says):
    judged(check_processors(*host, *asked), status, says)


def test_the_clock_must_go_forwards_and_be_kept_right():
    judged(check_clock(2e9, 1e9, 0.0, synchronised=True), OK, "synchronised")
    judged(check_clock(2e9, 1e9, 0.0, synchronised=None), OK)
    judged(check_clock(2e9, 1e9, 0.0, synchronised=False), WARN, "chrony")
    judged(check_clock(0.0, 1e9, 0.0, synchronised=True), FAIL, "before the day")
    judged(check_clock(2e9, 1e9, 0.5, synchronised=True), FAIL, "back by 0.5 s")


def test_an_allocator_that_is_not_glibcs_is_told():
    judged(check_allocator("glibc", [], ""), OK)
    judged(check_allocator("glibc", ["MALLOC_ARENA_MAX=1"], ""), OK, "MALLOC_ARENA_MAX=1")
    judged(check_allocator("glibc", [], "/usr/lib/libjemalloc.so.2"), OK, "libjemalloc")
    judged(check_allocator("", [], ""), WARN, "half the speed")


def test_a_cache_that_cannot_be_kept_is_told():
    judged(check_compiled_loops("/cache"), OK, "/cache")
    judged(check_compiled_loops(None), WARN, "NUMBA_CACHE_DIR")


SERVER = ServerFacts(
    "host:1",
    model="movies",
    fingerprint=FINGERPRINT,
    max_message_bytes=16 * MIB,
    max_rows=1000,
    calls=(0.001, 0.002, 0.003),
    encode=0.004,
    skew=-0.4,
)


@pytest.mark.parametrize(
    ("server", "expected", "check", "status", "says"),
    [
        (SERVER, FINGERPRINT, "server health", OK, "host:1: SERVING"),
        (SERVER, FINGERPRINT, "server model", OK, FINGERPRINT),
        (SERVER, "", "server latency", OK, "2.0 ms at the median and 3.0 at most of 3"),
        (SERVER, "", "server limits", OK, "16.0 MiB, 1,000 rows"),
        (SERVER, "", "server clock", OK, "within 2 s"),
        (but(SERVER, health="NOT_SERVING"), "", "server health", WARN, "NOT_SERVING"),
        (but(SERVER, error="refused"), "", "server", FAIL, "refused"),
        (SERVER, OTHER, "server model", FAIL, f"{FINGERPRINT}, but {OTHER} is expected"),
        (but(SERVER, calls=(0.2,)), "", "server latency", WARN, "proxy"),
        (but(SERVER, max_message_bytes=70000), "", "server limits", WARN, "--max-message-bytes"),
        (but(SERVER, skew=90.0), "", "server clock", WARN, "90 s ahead of this one"),
        (but(SERVER, skew=-90.0), "", "server clock", WARN, "90 s behind this one"),
        (but(SERVER, skew=None), "", "server clock", SKIP, "not reached"),
    ],
)
def test_a_server_is_judged_by_what_it_says(server, expected, check, status, says):
    (finding,) = [found for found in check_server(server, expected) if found.check == check]
    judged(finding, status, says)


# --- the facts, of this host and of made-up files -------------------------------------------


def test_every_library_that_the_server_needs_is_looked_at():
    found = {library.name: library for library in facts.libraries()}
    assert {"torch", "grpcio", "numba", "click", "protobuf"} <= set(found)
    assert not {"pytest", "pyarrow", "semid"} & set(found)
    assert all(library.fits for library in found.values())


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_containers_limits_count_where_there_are_any(tmp_path):
    host = write(tmp_path, meminfo="MemTotal: 100 kB\nMemAvailable:     4194304 kB\n") / "meminfo"
    none, new, old = tmp_path / "none", tmp_path / "new", tmp_path / "old"
    usable = len(os.sched_getaffinity(0))
    assert facts.memory(none, host) == (4 * GIB, "the system's word")
    assert facts.processors(none) == (usable, math.inf)

    write(new, memoryDOTmax="max\n", memoryDOTcurrent="5\n", cpuDOTmax="max 100000\n")
    assert facts.memory(new, host) == (4 * GIB, "the system's word")
    assert facts.processors(new) == (usable, math.inf)
    write(
        new,
        memoryDOTmax=f"{2 * GIB}\n",
        memoryDOTcurrent=f"{GIB}\n",
        memoryDOTstat=f"anon 1\ninactive_file {GIB // 2}\n",
        cpuDOTmax="150000 100000\n",
    )
    assert facts.memory(new, host) == (GIB + GIB // 2, "the container's limit")
    assert facts.processors(new) == (usable, 1.5)

    write(
        old,
        memory__memoryDOTlimit_in_bytes=f"{GIB}\n",
        memory__memoryDOTusage_in_bytes="0\n",
        cpu__cpuDOTcfs_quota_us="200000\n",
        cpu__cpuDOTcfs_period_us="100000\n",
    )
    assert facts.memory(old, host) == (GIB, "the container's limit")
    assert facts.processors(old) == (usable, 2.0)
    write(old, cpu__cpuDOTcfs_quota_us="-1\n")
    assert facts.processors(old) == (usable, math.inf)


def test_a_folder_in_memory_is_measured(tmp_path):
    found = facts.mount(tmp_path)
    assert found.exists
    assert found.writable
    assert 0 < found.free <= found.total
    assert not facts.mount(tmp_path / "none").exists


def test_a_port_that_somebody_has_is_refused_with_the_systems_reason():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert facts.port_refused("127.0.0.1", port, "--port") == "Address already in use"
    assert facts.port_refused("127.0.0.1", port, "--port") == ""


def test_a_missing_checkpoint_is_told_in_a_sentence(tmp_path):
    assert str(tmp_path / "none") in facts.checkpoint(str(tmp_path / "none")).error


def test_rows_and_near_ties_of_a_checkpoint_are_encoded_as_in_float64(reference_dir):
    path = reference_dir / "movies_rkmeans_64/model.ckpt"
    test = facts.self_test("cpu", str(path), threads=1)
    assert test.error == ""
    assert test.different == 0
    assert test.rows == test.fast + test.float64 + test.reference == 4 * facts.SELF_TEST_ROWS


def test_near_ties_are_not_all_proved_by_the_fast_product():
    test = facts.self_test("cpu", None, threads=1)
    assert test.different == 0
    assert test.float64 + test.reference > 0


class _Halves:
    """An encoder that gets every second row wrong."""

    def __init__(self, encoder):
        self._encoder = encoder

    def encode(self, rows):
        codes = self._encoder.encode(rows)
        codes[::2] += 1
        return codes

    def counts(self):
        return self._encoder.counts()


def test_an_encoder_that_errs_is_found_out():
    import torch  # noqa: PLC0415 - of this test alone

    from semid_server.encoding import ReferenceEncoder  # noqa: PLC0415
    from semid_server.model import ModelKind, ModelSpec, build_model  # noqa: PLC0415

    spec = ModelSpec(
        kind=ModelKind.R_VQ,
        input_dim=4,
        codebook_widths=(8,),
        embedding_dim=4,
        normalize_residuals=False,
    )
    model = build_model(spec)
    torch.nn.init.normal_(model.layers[0].centroids)
    reference = ReferenceEncoder(model, spec, device=torch.device("cpu"))
    rows = [torch.randn(10, 4)]
    test = facts._compare("m", "cpu", _Halves(reference), reference, rows)
    assert (test.rows, test.different) == (10, 5)


def test_a_device_that_is_not_there_cannot_be_tested():
    assert facts.self_test("cuda:7", None, threads=1).error


class _Late(http.server.BaseHTTPRequestHandler):
    """A metrics endpoint whose clock is an hour behind."""

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() - 3600)

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_clock_of_a_server_is_read_from_its_metrics():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Late) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found = None
        while found is None:  # unless this machine was too busy to answer
            found = facts.skew(f"127.0.0.1:{server.server_port}")
        assert found == pytest.approx(-3600, abs=120)
        server.shutdown()
        thread.join()
    assert facts.skew("127.0.0.1:1") is None


# --- the command ----------------------------------------------------------------------------


def test_its_defaults_are_those_of_serve():
    config = ServeConfig(models=(ModelSource(Path()),))
    assert config.host == command.HOST
    assert (config.port, config.metrics_port) == (command.PORT, command.METRICS_PORT)
    assert config.max_batch_bytes == command.MAX_BATCH_BYTES
    assert config.max_queue_bytes == command.MAX_QUEUE_BYTES
    assert config.shared_memory_bytes == command.SHARED_MEMORY_BYTES


def test_a_check_that_breaks_is_a_finding_and_ends_no_other():
    def break_down():
        raise ZeroDivisionError("by nothing")

    (finding,) = command._run("here", break_down)
    judged(finding, FAIL, "ZeroDivisionError: by nothing")

    def lack():
        raise ModuleNotFoundError("No module named 'x'", name="x")

    (finding,) = command._run("here", lack)
    judged(finding, FAIL, "x is not installed", "semid[server]")


@pytest.fixture
def free_ports(lasting_port):
    ports = [lasting_port() for _ in range(2)]
    return ["--host", "127.0.0.1", "--port", str(ports[0]), "--metrics-port", str(ports[1])]


def test_this_host_can_be_looked_at_for_real(free_ports, reference_dir):
    checkpoint = reference_dir / "digits_rkmeans/model.ckpt"
    # In a process of its own: it sets threads and environment as serve does.
    done = subprocess.run(
        [SEMID, "doctor", "--json", "--checkpoint", checkpoint, *free_ports],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("SEMID_")},
    )
    told = json.loads(done.stdout)
    findings = {finding["check"]: finding for finding in told["findings"]}
    assert done.returncode == (1 if told["counts"]["FAIL"] else 0)
    for check in ("python", "libraries", "driver", f"port {free_ports[3]}", "self-test cpu"):
        assert findings[check]["status"] == "OK", findings[check]
    for check in ("processors", "open files", "clock", "allocator", "numba cache"):
        assert findings[check]["status"] in {"OK", "WARN"}, findings[check]
    assert "memory" in findings  # how much there is at the moment is the machine's affair
    assert inspect_checkpoint(checkpoint).fingerprint in findings["checkpoint"]["what"]
    assert sum(told["counts"].values()) == len(told["findings"])


def test_what_fails_is_shown_with_its_cure_and_is_status_1(free_ports, tmp_path):
    # The name of serve's own setting counts too: in its container no flag needs repeating.
    environment = {
        "SEMID_SERVE_CHECKPOINT": str(tmp_path / "none"),
        "SEMID_SERVE_SHARED_MEMORY_BYTES": "0",
    }
    done = CliRunner().invoke(command.doctor, free_ports, env=environment)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    (at,) = [index for index, line in enumerate(lines) if line.startswith("FAIL  checkpoint")]
    assert str(tmp_path / "none") in lines[at]
    assert lines[at + 1].lstrip().startswith("-> ")
    assert any(re.match(r"SKIP +/dev/shm +--shared-memory-bytes 0", line) for line in lines)
    assert lines[-1].endswith(" FAIL, 1 SKIP")
