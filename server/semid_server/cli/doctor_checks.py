"""What `semid doctor` thinks of a host: each check takes facts, and says what to do about them.

Nothing here looks at the host: `doctor_facts` does.
"""

from __future__ import annotations

import errno
import math
import os
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

PROCESS_BYTES: Final = 700 * MIB
"""What a server process holds besides its queue and its batches: torch and its libraries."""

FEW_FILES, ENOUGH_FILES = 1024, 8192
"""Open files: each connection takes one, and an idle server some 50."""

MOST_SKEW: Final = 2.0
"""Seconds between two clocks that nobody minds. Certificates and traces do mind more."""

SLOW_CALL: Final = 0.05
"""Seconds of a call without work, at the median, from which on something lies between."""

SM_OF_TENSOR_CORES: Final = (8, 0)
"""Compute capability of the first GPUs with the TF32 products that encoding is fastest with."""


class Status(StrEnum):
    """How much a finding matters."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes
    ----------
    check : str
        Its name.
    status : Status
        FAIL: do not serve like this. WARN: it serves, but worse than it could. SKIP: not looked at.
    what : str
        What was found, with numbers.
    todo : str
        What to do about it; empty if nothing.
    """

    check: str
    status: Status
    what: str
    todo: str = ""


def ok(check: str, what: str) -> Finding:
    """Build the finding of a check with nothing to do."""
    return Finding(check, Status.OK, what)


def fail(check: str, what: str, todo: str) -> Finding:
    """Build the finding of something that keeps semid from serving."""
    return Finding(check, Status.FAIL, what, todo)


def warn(check: str, what: str, todo: str) -> Finding:
    """Build the finding of something that makes semid worse than it could be."""
    return Finding(check, Status.WARN, what, todo)


def skip(check: str, why: str) -> Finding:
    """Build the finding of a check that does not apply here."""
    return Finding(check, Status.SKIP, why)


def size(nbytes: float) -> str:
    """Write bytes for people."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes:.0f} bytes"


# --- libraries ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Library:
    """One requirement of semid, and what is installed of it (None: nothing)."""

    name: str
    required: str
    installed: str | None
    fits: bool


def check_python(version: tuple[int, int], least: tuple[int, int] = (3, 11)) -> Finding:
    """Python itself."""
    have, need = (".".join(map(str, each)) for each in (version, least))
    if version < least:
        return fail("python", f"Python {have}", f"install Python {need} or newer")
    return ok("python", f"Python {have}")


def check_libraries(libraries: Sequence[Library] | None) -> Finding:
    """Versions of everything that the server's part needs, against the supported ranges."""
    if libraries is None:
        return skip("libraries", "semid runs from its sources here: no record of what it needs")
    bad = [library for library in libraries if not library.fits]
    if not bad:
        return ok("libraries", f"all {len(libraries)} within the supported ranges")
    return fail(
        "libraries",
        "; ".join(
            f"{library.name} {library.installed or 'is not installed'}, "
            f"supported: {library.required or 'any'}"
            for library in bad
        ),
        "pip install 'semid[server]' into an environment of its own, with the versions of "
        "docker/constraints.txt if in doubt",
    )


# --- GPUs -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as torch sees it; memory in bytes."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What torch, the driver and the system say of GPUs.

    Attributes
    ----------
    torch : str or None
        torch's version; None if it cannot be imported, for the reason in ``error``.
    torch_cuda : str or None
        The CUDA version that torch was built for; None for a build without.
    torch_archs : tuple of str
        ``sm_90`` and the like, for which torch has machine code, ``compute_90`` code to compile.
    driver : str or None
        Version of NVIDIA's driver.
    driver_cuda : tuple of int or None
        The newest CUDA version that the driver supports.
    files : int
        NVIDIA devices under /dev.
    gpus : tuple of Gpu
        Those that torch can use.
    error : str
        Why torch cannot use what should be there.
    """

    torch: str | None = None
    torch_cuda: str | None = None
    torch_archs: tuple[str, ...] = ()
    driver: str | None = None
    driver_cuda: tuple[int, int] | None = None
    files: int = 0
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


def check_driver(facts: GpuFacts, device: str) -> Finding:
    """Driver and torch: whether a GPU that is here, or asked for, can be used."""
    name, wanted = "driver", device.startswith("cuda")
    if facts.torch is None:
        return fail(
            name, f"torch cannot be imported: {facts.error}", "install torch: semid[server]"
        )
    what = _driver(facts)
    if facts.gpus:
        return ok(name, f"{what}, {len(facts.gpus)} GPU{'s' * (len(facts.gpus) > 1)}")
    if facts.driver or facts.files:
        return _unused(facts, what, fail if wanted else warn)
    if wanted:
        return fail(
            name,
            f"{what}, but --device {device} is asked for",
            "install NVIDIA's driver; in a container, run it with --gpus all",
        )
    return ok(name, f"{what}: serves on the CPU")


def _driver(facts: GpuFacts) -> str:
    driver = f"NVIDIA driver {facts.driver}" if facts.driver else "no NVIDIA driver"
    supports = "" if facts.driver_cuda is None else f" for CUDA up to {_dotted(facts.driver_cuda)}"
    build = f"torch {facts.torch}" + (f" for CUDA {facts.torch_cuda}" if facts.torch_cuda else "")
    return f"{build}, {driver}{supports}"


def _unused(facts: GpuFacts, what: str, judge: Callable[[str, str, str], Finding]) -> Finding:
    """Say why a GPU that is there is none for torch."""
    name = "driver"
    if facts.torch_cuda is None:
        return judge(
            name,
            f"{what}: this build of torch uses no GPU",
            "install torch's build for CUDA, or say --device cpu if the GPU is not for semid",
        )
    needs = tuple(int(part) for part in facts.torch_cuda.split(".")[:2])
    if facts.driver_cuda is not None and facts.driver_cuda[0] < needs[0]:
        return judge(
            name,
            f"{what}: the driver is too old for this build",
            f"update the driver to one for CUDA {needs[0]} or newer, or install torch's build for "
            f"CUDA {facts.driver_cuda[0]}",
        )
    return judge(
        name,
        f"{what}, but torch finds no GPU{': ' + facts.error if facts.error else ''}",
        "see what nvidia-smi says; in a container, run it with --gpus all; CUDA_VISIBLE_DEVICES "
        "may hide them",
    )


def check_architecture(facts: GpuFacts) -> Finding:
    """Whether torch has code for every GPU, of which there is at least one."""
    name = "gpu code"
    ready = [int(arch[3:].rstrip("af")) for arch in facts.torch_archs if arch.startswith("sm_")]
    portable = [
        int(arch[8:].rstrip("af")) for arch in facts.torch_archs if arch.startswith("compute_")
    ]
    for index, gpu in enumerate(facts.gpus):
        major, minor = gpu.capability
        sm = 10 * major + minor
        if not (
            any(other // 10 == major and other <= sm for other in ready)
            or any(other <= sm for other in portable)
        ):
            return fail(
                name,
                f"cuda:{index}, {gpu.name}, has capability {major}.{minor}; torch has code for "
                f"{', '.join(facts.torch_archs)}",
                "install a build of torch for this GPU",
            )
    kinds = ", ".join(
        sorted({f"{gpu.name} ({gpu.capability[0]}.{gpu.capability[1]})" for gpu in facts.gpus})
    )
    if any(gpu.capability < SM_OF_TENSOR_CORES for gpu in facts.gpus):
        return warn(
            name,
            f"{kinds}: older than Ampere, without TF32 products",
            "codes are the same there, but slower: compare with --device cpu by `semid doctor`",
        )
    return ok(name, kinds)


def check_device_memory(facts: GpuFacts, need: int) -> list[Finding]:
    """Free memory of each GPU, against what one server is going to take."""
    findings = []
    for index, gpu in enumerate(facts.gpus):
        name = f"gpu memory {index}"
        what = f"{size(gpu.free)} of {size(gpu.total)} free, about {size(need)} needed"
        if gpu.free < need:
            findings.append(
                fail(
                    name,
                    what,
                    "end what else runs there (nvidia-smi), choose another --device, or lower "
                    "--max-batch-bytes",
                )
            )
        elif gpu.free < 2 * need:
            findings.append(
                warn(name, what, "little is left for what else runs there: lower --max-batch-bytes")
            )
        else:
            findings.append(ok(name, what))
    return findings


@dataclass(frozen=True, slots=True)
class TritonFacts:
    """What came of compiling and running a kernel of one line on each GPU.

    Attributes
    ----------
    version : str or None
        Triton's; None if it cannot be imported.
    compiler : str or None
        The C compiler that it finds.
    seconds : float
        What the compilation took.
    error : str
        Why it failed; empty if it did not.
    """

    version: str | None
    compiler: str | None
    seconds: float = 0.0
    error: str = ""


def check_triton(facts: TritonFacts) -> Finding:
    """Whether GPU kernels can be compiled: Triton, and the C compiler that it calls."""
    name = "gpu kernels"
    if facts.version is None:
        return fail(
            name,
            f"Triton cannot be imported: {facts.error}",
            "install torch's build for CUDA, which brings the Triton that fits",
        )
    what = f"Triton {facts.version}, C compiler {facts.compiler or 'none'}"
    if not facts.error:
        return ok(name, f"{what}: compiled and ran one in {facts.seconds:.1f} s")
    if facts.compiler is None:
        return fail(
            name,
            f"{what}: {facts.error}",
            "install gcc (Debian: gcc and libc6-dev), or name a compiler by CC: Triton compiles "
            "its launcher in C; semid's image has it, and TRITON_CACHE_MANAGER says where",
        )
    return fail(
        name,
        f"{what}: {facts.error}",
        "look at the first error above; Python.h may be missing (Debian: python3-dev), or the "
        "folder of TRITON_CACHE_DIR (~/.triton by default) not writable",
    )


# --- the self-test --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Rows of one model encoded on one device, and by the float64 reference.

    Attributes
    ----------
    model, device : str
        Which.
    rows : int
        How many rows, of all types of numbers together.
    different : int
        How many of them got other codes.
    fast, float64, reference : int
        How many were decided by the fast product, in float64, and by the reference arithmetic.
    seconds : float
        What the encoder under test took, warm.
    error : str
        Why there is no result.
    """

    model: str
    device: str
    rows: int = 0
    different: int = 0
    fast: int = 0
    float64: int = 0
    reference: int = 0
    seconds: float = 0.0
    error: str = ""


def check_self_test(test: SelfTest) -> Finding:
    """Codes of a device against float64: they are equal, all of them, or something is broken."""
    name = f"self-test {test.device}"
    if test.error:
        return fail(
            name,
            f"{test.model}: {test.error}",
            "do not serve from this device; see the findings above, and `semid serve --device cpu`",
        )
    if test.different:
        return fail(
            name,
            f"{test.model}: {test.different} of {test.rows} rows have other codes than in float64",
            "do not serve from this device: its arithmetic, its driver or semid is broken. "
            "`semid serve --reference` rules the fast path out",
        )
    return ok(
        name,
        f"{test.model}: {test.rows} rows as in float64; {test.fast} proved by the fast product, "
        f"{test.float64} decided in float64, {test.reference} by the reference; "
        f"{1e3 * test.seconds:.0f} ms",
    )


# --- the checkpoint -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """A checkpoint as `semid inspect` describes it, or why it cannot be read."""

    path: str
    name: str = ""
    kind: str = ""
    fingerprint: str = ""
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    error: str = ""


def check_checkpoint(facts: CheckpointFacts | None, expected: str = "") -> Finding:
    """Whether it loads, means something, and is the one expected."""
    name = "checkpoint"
    if facts is None:
        return skip(name, "none given: --checkpoint PATH looks at one")
    if facts.error:
        return fail(
            name,
            facts.error,
            "give the folder of config.json and model.safetensors, as it is mounted where semid "
            "runs; if a file was cut short, copy it again; `semid inspect` says what it holds",
        )
    what = f"{facts.path}: {facts.kind}, fingerprint {facts.fingerprint}"
    if facts.problems:
        return fail(
            name,
            f"{what}; {'; '.join(facts.problems)}",
            "train it on, or repair what wrote it: semid refuses to serve it",
        )
    if expected and facts.fingerprint != expected:
        return fail(
            name,
            f"{what}, but {expected} is expected",
            "this is another model: codes of the two must not be mixed",
        )
    if facts.warnings:
        return warn(
            name, f"{what}; {'; '.join(facts.warnings)}", "see `semid report` on real embeddings"
        )
    return ok(name, what)


# --- the host -------------------------------------------------------------------------------


def check_port(flag: str, address: str, refused: str) -> Finding:
    """Whether an address of the server is free."""
    name = f"port {address.rpartition(':')[2]}"
    if not refused:
        return ok(name, f"{address} is free")
    host, _, port = address.rpartition(":")
    todo = {
        os.strerror(errno.EADDRNOTAVAIL): f"no network interface of this machine is {host}: choose "
        "another with --host; 0.0.0.0 is all of them",
        os.strerror(errno.EACCES): f"choose a port from 1024 on with {flag}: those below are for "
        "root",
    }
    return fail(
        name,
        f"{address}: {refused}",
        todo.get(refused)
        or f"see who listens (ss -ltnp 'sport = :{port}'), or choose another with {flag}; if it is "
        "semid, ask it: --target",
    )


def check_open_files(soft: float, hard: float) -> Finding:
    """The limit on open files, of which every connection takes one."""
    what = f"{_limit(hard)} allowed"
    if soft < hard:
        what += f"; {_limit(soft)} in this shell, beyond which `semid serve` goes by itself"
    todo = (
        "as root: ulimit -Hn 65536, or nofile in /etc/security/limits.conf; for systemd "
        "LimitNOFILE=65536, for docker --ulimit nofile=65536"
    )
    if hard < FEW_FILES:
        return fail("open files", what, todo)
    if hard < ENOUGH_FILES:
        return warn("open files", f"{what}: each connection takes one", todo)
    return ok("open files", what)


@dataclass(frozen=True, slots=True)
class MountFacts:
    """A folder in memory: bytes in all and free, whether files can be made there."""

    total: int
    free: int
    writable: bool
    exists: bool = True


def check_shared_memory(facts: MountFacts, need: int) -> Finding:
    """Room in /dev/shm for callers on this machine."""
    name = "/dev/shm"  # noqa: S108 - where callers share memory
    if need == 0:
        return skip(name, "--shared-memory-bytes 0: nothing is shared")
    if not facts.exists or not facts.writable:
        return warn(
            name,
            f"{name} is {'not writable' if facts.exists else 'missing'}",
            "callers on this machine will send what they could share; mount a tmpfs there",
        )
    what = f"{size(facts.free)} of {size(facts.total)} free, up to {size(need)} used by callers"
    if facts.free < need:
        return warn(
            name,
            what,
            "give it more (docker: --shm-size; Kubernetes: an emptyDir of medium Memory), or lower "
            "--shared-memory-bytes",
        )
    return ok(name, what)


def check_memory(available: int, need: int, limit: str) -> Finding:
    """Memory that the system, or the container, still gives."""
    what = f"{size(available)} available ({limit}), about {size(need)} needed under load"
    todo = "give it more, or lower --processes, --max-queue-bytes or --max-batch-bytes"
    if available < need / 2:
        return fail("memory", what, todo)
    if available < need:
        return warn("memory", what, todo)
    return ok("memory", what)


def check_processors(usable: int, quota: float, threads: int | None, processes: int) -> Finding:
    """Threads against processors: more of them than a container may use stand in line."""
    name = "processors"
    per_process = max(1, usable // processes) if threads is None else threads
    wanted = per_process * processes
    limited = "" if math.isinf(quota) else f", {quota:g} by the container's limit"
    what = f"{usable} usable{limited}; {wanted} thread{'s' * (wanted > 1)} of the encoder"
    have = min(float(usable), quota)
    if wanted <= math.ceil(have):
        return ok(name, what)
    why = "they wait for each other" if quota >= usable else "the system stops all of them, often"
    most = max(1, math.floor(have))
    fewer = f"--processes {most} " if processes > most else ""
    return warn(
        name, f"{what}: {why}", f"{fewer}--threads {max(1, most // processes)}, or more processors"
    )


def check_compiled_loops(folder: str | None) -> Finding:
    """Where numba keeps what it compiles."""
    if folder is None:
        return warn(
            "numba cache",
            "no folder can be written to: every start compiles anew, which takes seconds",
            "make one writable and name it by NUMBA_CACHE_DIR",
        )
    return ok("numba cache", folder)


def check_allocator(libc: str, settings: Sequence[str], preloaded: str) -> Finding:
    """The allocator decides how fast large messages move."""
    name = "allocator"
    if preloaded:
        return ok(name, f"{preloaded} is preloaded: semid leaves it alone")
    if libc != "glibc":
        return warn(
            name,
            f"{libc or 'not glibc'}: semid cannot tell it to keep large buffers",
            "messages of 1 MiB and more move at half the speed; use an image with glibc",
        )
    if settings:
        return ok(name, f"glibc as set in the environment: {', '.join(settings)}")
    return ok(name, "glibc; semid serve has it keep large buffers")


def check_clock(
    now: float, built: float, backwards: float, *, synchronised: bool | None
) -> Finding:
    """The clock: certificates, logs and traces rely on it."""
    name = "clock"
    if backwards > 0:
        return fail(
            name, f"the monotonic clock went back by {backwards:g} s", "the machine is broken"
        )
    if now < built:
        return fail(
            name,
            "it is before the day that semid was installed",
            "set the clock: certificates are checked by it",
        )
    if synchronised is False:
        return warn(
            name, "the kernel says that nobody keeps it right", "run chrony or systemd-timesyncd"
        )
    return ok(name, "sane" + ("" if synchronised is None else ", and synchronised"))


# --- a running server -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a running server says, and how fast.

    Attributes
    ----------
    target : str
        Where it was asked.
    health : str
        What its health service says, or why it could not be asked.
    error : str
        Why it did not describe its model; empty if it did.
    model, fingerprint : str
        What it serves.
    max_message_bytes, max_rows : int
        What it accepts.
    calls : tuple of float
        Seconds of calls without work, in order of their length.
    encode : float
        Seconds of the median Encode of one row.
    skew : float or None
        Seconds by which its clock is ahead; None if it tells no time.
    """

    target: str
    health: str = "SERVING"
    error: str = ""
    model: str = ""
    fingerprint: str = ""
    max_message_bytes: int = 0
    max_rows: int = 0
    calls: tuple[float, ...] = field(default=())
    encode: float = 0.0
    skew: float | None = None


def check_server(facts: ServerFacts, expected: str) -> list[Finding]:
    """A running server: health, model, latency, limits, clock."""
    if facts.error:
        return [fail("server", facts.error, "nothing else could be asked; its log may say why")]
    findings = [
        ok("server health", f"{facts.target}: {facts.health}")
        if facts.health == "SERVING"
        else warn(
            "server health",
            f"{facts.target} answers, but its health service does not say SERVING: {facts.health}",
            "a probe or a client that asks it would turn away; it may be draining",
        )
    ]
    what = f"{facts.model}, fingerprint {facts.fingerprint}"
    if expected and expected != facts.fingerprint:
        findings.append(
            fail(
                "server model",
                f"{what}, but {expected} is expected",
                "the server has another codebook: codes of the two must not be mixed",
            )
        )
    else:
        findings.append(ok("server model", what))
    median, worst = facts.calls[len(facts.calls) // 2], facts.calls[-1]
    what = (
        f"a call without work {1e3 * median:.1f} ms at the median and {1e3 * worst:.1f} at most of "
        f"{len(facts.calls)}; Encode of one row {1e3 * facts.encode:.1f} ms"
    )
    if median > SLOW_CALL:
        findings.append(
            warn("server latency", what, "look for a proxy, a distant region or a busy host")
        )
    else:
        findings.append(ok("server latency", what))
    what = f"messages up to {size(facts.max_message_bytes)}, {facts.max_rows:,} rows a request"
    if facts.max_message_bytes < MIB:
        findings.append(
            warn("server limits", what, "raise --max-message-bytes: 1 to 4 MiB are fastest")
        )
    else:
        findings.append(ok("server limits", what))
    if facts.skew is None:
        findings.append(
            skip("server clock", "its metrics endpoint, which tells the time, was not reached")
        )
    elif abs(facts.skew) > MOST_SKEW:
        findings.append(
            warn(
                "server clock",
                f"{abs(facts.skew):.0f} s {'ahead of' if facts.skew > 0 else 'behind'} this one",
                "run chrony or systemd-timesyncd on both: certificates, logs and traces need it",
            )
        )
    else:
        findings.append(ok("server clock", f"within {MOST_SKEW:g} s of this one"))
    return findings


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _limit(value: float) -> str:
    return "unlimited" if math.isinf(value) else f"{value:,.0f}"
