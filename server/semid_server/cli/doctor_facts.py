"""What `semid doctor` asks of a host; `doctor_checks` judges it.

Whatever may be missing or broken is imported where it is asked about: a host whose torch cannot be
loaded is told so, like everything else.
"""

from __future__ import annotations

import ctypes
import http.client
import importlib
import math
import os
import platform
import resource
import shutil
import sys
import tempfile
import textwrap
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from semid_server.cli.doctor_checks import (
    CheckpointFacts,
    Gpu,
    GpuFacts,
    Library,
    MountFacts,
    SelfTest,
    ServerFacts,
    TritonFacts,
)
from semid_server.serving.memory import number_in

if TYPE_CHECKING:
    from torch import Tensor

    from semid_client import Client
    from semid_server.encoding import Encoder

SELF_TEST_ROWS: Final = 512
"""Of each type of numbers. The reference takes a millisecond for some of them."""

CALLS: Final = 50
"""Calls by which the latency of a server is judged."""

LONGEST: Final = 400
"""Characters of an error that are shown."""

TIME_ERROR: Final = 5
"""What Linux's adjtimex answers while nobody keeps the clock right (adjtimex(2))."""

_SIZE_OF_TIMEX: Final = 512
"""More than ``struct timex`` takes."""


def libraries() -> list[Library] | None:
    """Every requirement of the base and the server's part; None where there is no record."""
    from packaging.requirements import Requirement  # noqa: PLC0415

    try:
        texts = requires("semid")
    except PackageNotFoundError:
        texts = None
    if not texts:
        return None
    found = []
    for requirement in map(Requirement, texts):
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", "cli", "server")
        )
        if not wanted or requirement.name == "semid":
            continue
        try:
            installed: str | None = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        found.append(Library(requirement.name, str(requirement.specifier), installed, fits))
    return found


# --- GPUs -----------------------------------------------------------------------------------


def gpus() -> GpuFacts:
    """What torch, the driver and /dev say."""
    files = len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])
    driver, driver_cuda = _driver()
    try:
        import torch  # noqa: PLC0415 - may be missing or broken
    except (ImportError, OSError) as error:
        return GpuFacts(driver=driver, driver_cuda=driver_cuda, files=files, error=_line(error))
    found: list[Gpu] = []
    problem = ""
    if torch.version.cuda is not None:
        try:
            for index in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(index)
                free, total = torch.cuda.mem_get_info(index)
                capability = (properties.major, properties.minor)
                found.append(Gpu(properties.name, capability, free, total))
            if not found and (driver or files):
                torch.zeros(1, device="cuda")  # says why there is none
        except (RuntimeError, AssertionError) as error:
            problem = _line(error)
    return GpuFacts(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_archs=tuple(torch.cuda.get_arch_list()),
        driver=driver,
        driver_cuda=driver_cuda,
        files=files,
        gpus=tuple(found),
        error=problem,
    )


def _driver() -> tuple[str | None, tuple[int, int] | None]:
    """Version of NVIDIA's driver, and of the CUDA that it supports, by NVML (in thousands)."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None, None
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return str(nvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10)
    finally:
        nvml.nvmlShutdown()


def triton(facts: GpuFacts) -> TritonFacts:
    """Compile and run a kernel on every GPU."""
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None
    )
    try:
        import torch  # noqa: PLC0415 - was found by `gpus`, or there would be none
        from triton import __version__  # noqa: PLC0415 - may be missing

        from semid_server.cli import doctor_kernel  # noqa: PLC0415 - needs Triton
    except (ImportError, OSError) as error:
        return TritonFacts(None, compiler, error=_line(error))
    began = time.perf_counter()
    try:
        for index in range(len(facts.gpus)):
            if not doctor_kernel.run(torch.device("cuda", index)):
                return TritonFacts(__version__, compiler, error=f"wrong numbers from cuda:{index}")
    except Exception as error:  # noqa: BLE001 - compilers, drivers and files fail in many ways
        return TritonFacts(__version__, compiler, error=_line(error))
    return TritonFacts(__version__, compiler, seconds=time.perf_counter() - began)


def self_test(device: str, checkpoint: str | None, *, threads: int | None) -> SelfTest:
    """Encode rows of all types on a device, and by the float64 reference on the CPU.

    The rows are of a model made up here, or of a checkpoint; among them are some that lie halfway
    between two centroids, moved by a unit in the last place or not at all.
    """
    name = "a model of 3 x 256 codes" if checkpoint is None else checkpoint
    try:
        import torch  # noqa: PLC0415 - may be broken

        from semid_server.checkpoint import load_checkpoint  # noqa: PLC0415 - needs torch
        from semid_server.encoding import ReferenceEncoder, make_encoder  # noqa: PLC0415
        from semid_server.model import ModelKind, ModelSpec, build_model  # noqa: PLC0415

        if checkpoint is None:
            spec = ModelSpec(
                kind=ModelKind.RQ_KMEANS,
                input_dim=256,
                codebook_widths=(256, 256, 256),
                embedding_dim=256,
                normalize_residuals=True,
            )
            model = build_model(spec)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for layer in model.layers:
                    layer.centroids.copy_(torch.randn(256, 256, generator=generator) / 16)
        else:
            loaded = load_checkpoint(checkpoint)
            model, spec = loaded.model, loaded.spec
        where = torch.device(device)
        encoder = make_encoder(model, spec, device=where, threads=threads)
        encoder.warm_up()
        reference = ReferenceEncoder(model, spec, device=torch.device("cpu"), threads=threads)
        return _compare(name, device, encoder, reference, _rows(model, spec.input_dim))
    except Exception as error:  # noqa: BLE001 - whatever it is, this device cannot serve
        return SelfTest(name, device, error=_line(error))


def _rows(model: Any, input_dim: int) -> list[Tensor]:
    """Random rows and near-ties, in every type of numbers."""
    import torch  # noqa: PLC0415 - the caller has it

    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(SELF_TEST_ROWS, input_dim, generator=generator)
    centroids = model.layers[0].centroids.detach().float()
    if centroids.shape[1] == input_dim and len(centroids) > 1:
        pairs = torch.randint(len(centroids), (SELF_TEST_ROWS // 4, 2), generator=generator)
        halfway = (centroids[pairs[:, 0]] + centroids[pairs[:, 1]]) / 2
        third = len(halfway) // 3
        halfway[:third] = torch.nextafter(halfway[:third], torch.tensor(math.inf))
        halfway[third : 2 * third] = torch.nextafter(
            halfway[third : 2 * third], torch.tensor(-math.inf)
        )
        rows[: len(halfway)] = halfway
    return [
        rows.to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    ]


def _compare(
    name: str, device: str, encoder: Encoder, reference: Encoder, batches: list[Tensor]
) -> SelfTest:
    before, different, seconds = encoder.counts(), 0, 0.0
    for rows in batches:
        began = time.perf_counter()
        codes = encoder.encode(rows)
        seconds += time.perf_counter() - began
        truth = reference.encode(rows)
        different += int((codes.cpu().long() != truth.long()).any(dim=1).sum())
    after = encoder.counts()
    return SelfTest(
        name,
        device,
        rows=sum(map(len, batches)),
        different=different,
        fast=after.fast - before.fast,
        float64=after.float64 - before.float64,
        reference=after.reference - before.reference,
        seconds=seconds,
    )


def checkpoint(path: str) -> CheckpointFacts:
    """What `semid inspect` says."""
    try:
        from semid_server.checkpoint import inspect_checkpoint  # noqa: PLC0415 - needs torch
        from semid_server.errors import SemidError  # noqa: PLC0415
    except (ImportError, OSError) as error:
        return CheckpointFacts(path, error=f"{path} was not read: {_line(error)}")
    try:
        inspection = inspect_checkpoint(path)
    except SemidError as error:
        return CheckpointFacts(path, error=str(error))
    except OSError as error:
        return CheckpointFacts(path, error=f"{path}: {error.strerror}")
    return CheckpointFacts(
        path,
        name=inspection.name,
        kind=str(inspection.spec.kind),
        fingerprint=inspection.fingerprint,
        warnings=inspection.warnings,
        problems=inspection.problems,
    )


# --- the host -------------------------------------------------------------------------------


def port_refused(host: str, port: int, flag: str) -> str:
    """Why an address cannot be bound; empty if it can."""
    from semid_server.errors import ConfigurationError  # noqa: PLC0415 - beside its neighbour
    from semid_server.serving.addresses import Address, check_address  # noqa: PLC0415 - may lack
    # prometheus_client

    try:
        check_address(Address(host, port, flag))
    except ConfigurationError as error:
        reason = error.__cause__
        return (isinstance(reason, OSError) and reason.strerror) or str(error)
    return ""


def open_files() -> tuple[float, float]:
    """Soft and hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return tuple(math.inf if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))  # type: ignore[return-value]  # of two


def mount(folder: Path) -> MountFacts:
    """Room in a folder."""
    try:
        status = os.statvfs(folder)
    except FileNotFoundError:
        return MountFacts(0, 0, writable=False, exists=False)
    try:
        tempfile.TemporaryFile(dir=folder).close()
        writable = True
    except OSError:
        writable = False
    unit = status.f_frsize
    return MountFacts(unit * status.f_blocks, unit * status.f_bavail, writable=writable)


def memory(cgroups: Path, meminfo: Path) -> tuple[int, str]:
    """Bytes available to this process, and by whose word."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    by = "the system's word"
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, usage = number_in(cgroups / limit_file), number_in(cgroups / usage_file)
        if limit is not None and usage is not None and limit - usage < available:
            # The page cache counts as used, and is given back when memory is short.
            statistics = cgroups / Path(usage_file).with_name("memory.stat")
            cached = _field(statistics, "inactive_file")
            available, by = max(0, limit - usage + cached), "the container's limit"
    return available, by


def processors(cgroups: Path) -> tuple[int, float]:
    """Processors that this process may run on, and how many of them the container's limit pays."""
    usable = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
        return usable, math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass  # not this version of control groups
    quota_us = number_in(cgroups / "cpu/cpu.cfs_quota_us")
    period_us = number_in(cgroups / "cpu/cpu.cfs_period_us")
    if quota_us is None or period_us is None or quota_us <= 0:
        return usable, math.inf
    return usable, quota_us / period_us


def numba_folder() -> str | None:
    """Where numba keeps the loops of the encoder; None if nowhere."""
    from semid_server.encoding import cpu_kernels  # noqa: PLC0415 - needs numba and torch

    for value in vars(cpu_kernels).values():
        statistics = getattr(value, "stats", None)
        if statistics is not None and hasattr(statistics, "cache_path"):
            path: str | None = statistics.cache_path
            return path if path is not None and os.access(path, os.W_OK) else None
    return None


def allocator() -> tuple[str, list[str], str]:
    """The C library, settings of its allocator in the environment, and one that is preloaded."""
    from semid_server.serving.allocator import OPTIONS  # noqa: PLC0415 - beside its only use

    preloaded = [
        part
        for part in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
        if any(name in part for name in ("malloc", "mimalloc", "hoard"))
    ]
    settings = [f"{name}={os.environ[name]}" for name in OPTIONS if name in os.environ]
    return platform.libc_ver()[0], settings, " ".join(preloaded)


def clock() -> tuple[float, float, float]:
    """Now, when semid was installed, and how far the monotonic clock goes back."""
    backwards, last = 0.0, time.monotonic()
    for _ in range(10_000):
        now = time.monotonic()
        backwards, last = max(backwards, last - now), now
    built = Path(__file__).stat().st_mtime
    return time.time(), built, backwards


def synchronised() -> bool | None:
    """Whether the kernel says that somebody keeps the clock right; None if it does not say."""
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    state = -1 if adjtimex is None else adjtimex(ctypes.create_string_buffer(_SIZE_OF_TIMEX))
    return None if state < 0 else state != TIME_ERROR


# --- a running server -----------------------------------------------------------------------


def server(client: Client, health: str, metrics: str | None) -> ServerFacts:
    """Ask a server what it is, and how fast it answers."""
    import numpy as np  # noqa: PLC0415 - the client needs it too

    from semid_client import SemidClientError  # noqa: PLC0415 - may lack grpc

    try:
        info = client.model()
        calls = sorted(_timed(client.model) for _ in range(CALLS))
        row = np.zeros((1, info.input_dim), np.float32)
        encodes = sorted(_timed(lambda: client.encode(row)) for _ in range(CALLS))
    except SemidClientError as error:
        return ServerFacts(client.target, health, error=str(error))
    return ServerFacts(
        client.target,
        health,
        model=info.name,
        fingerprint=info.fingerprint,
        max_message_bytes=info.limits.max_message_bytes,
        max_rows=info.limits.max_rows,
        calls=tuple(calls),
        encode=encodes[CALLS // 2],
        skew=None if metrics is None else skew(metrics),
    )


def skew(metrics: str) -> float | None:
    """Seconds by which the clock behind a metrics endpoint is ahead, by HTTP's ``Date``."""
    from email.utils import parsedate_to_datetime  # noqa: PLC0415 - beside its only use

    host, _, port = metrics.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=3)
    try:
        before = time.time()
        connection.request("HEAD", "/metrics")
        date = connection.getresponse().getheader("Date")
        after = time.time()
    except OSError:
        return None
    finally:
        connection.close()
    if date is None:
        return None
    # The header has whole seconds, rounded down.
    return parsedate_to_datetime(date).timestamp() + 0.5 - (before + after) / 2


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _field(path: Path, name: str) -> int:
    try:
        fields = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0


def _line(error: BaseException) -> str:
    """An error in one line, with its kind: the text alone may say little."""
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {textwrap.shorten(text, LONGEST)}"
        if text
        else type(error).__name__
    )


def python() -> tuple[int, int]:
    """Version of the interpreter."""
    return sys.version_info[:2]
