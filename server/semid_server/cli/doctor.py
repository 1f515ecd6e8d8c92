"""`semid doctor`: look at a host, or at a running server, and say what to fix."""

from __future__ import annotations

import semid_server.cli.quiet_threads  # noqa: F401 - before whatever imports torch

# isort: split
import json
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from semid_server.cli import doctor_facts as facts
from semid_server.cli.doctor_checks import (
    GIB,
    MIB,
    PROCESS_BYTES,
    Finding,
    GpuFacts,
    Status,
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
    fail,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CGROUPS, MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/meminfo")

# As `semid serve` has them; a test compares. Its own module would import torch.
HOST, PORT, METRICS_PORT = "0.0.0.0", 50051, 9464  # noqa: S104 - what is asked is whether it is free
MAX_BATCH_BYTES, MAX_QUEUE_BYTES, SHARED_MEMORY_BYTES = 64 * MIB, 256 * MIB, 1024 * MIB

BATCH_BUFFERS: Final = 4
"""Batches whose buffers a server holds at once: one for each type of numbers."""

GPU_BYTES: Final = GIB
"""What a process takes of a GPU besides its batches: CUDA's context, kernels, tables, graphs."""

COLOURS: Final = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red", Status.SKIP: None}

PEM: Final = click.Path(exists=True, dir_okay=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command was asked; the attributes are its flags."""

    checkpoint: tuple[str, ...]
    device: str
    host: str
    port: int
    metrics_host: str | None
    metrics_port: int
    processes: int
    threads: int | None
    max_batch_bytes: int
    max_queue_bytes: int
    shared_memory_bytes: int
    target: str | None
    metrics: str | None
    fingerprint: str
    tls: bool
    ca: str | None
    cert: str | None
    key: str | None
    token: str | None


def _option(*names: str, serve: bool = False, **attributes: Any) -> Callable[[Any], Any]:
    """Return an option with its environment twin, and that of `semid serve` where it has one."""
    flag = names[0].removeprefix("--").replace("-", "_").upper()
    twins = [f"SEMID_DOCTOR_{flag}"] + ([f"SEMID_SERVE_{flag}"] if serve else [])
    return click.option(*names, envvar=twins, show_envvar=True, **attributes)


@click.command(short_help="Check a host, or a running server.")
@_option(
    "--checkpoint",
    serve=True,
    multiple=True,
    metavar="[NAME=]PATH",
    help="Checkpoint to load, examine and encode with; repeat it for several.",
)
@_option(
    "--device",
    serve=True,
    default="auto",
    show_default=True,
    help="As for serve. cuda asks for a GPU: without one that is a FAIL. The CPU and every GPU are "
    "tested in any case.",
)
@_option("--host", serve=True, default=HOST, show_default=True, help="Address that serve gets.")
@_option(
    "--port",
    serve=True,
    type=click.IntRange(0, 65535),
    default=PORT,
    show_default=True,
    help="Port that serve gets.",
)
@_option("--metrics-host", serve=True, help="Address that serve's metrics get, if not --host.")
@_option(
    "--metrics-port",
    serve=True,
    type=click.IntRange(0, 65535),
    default=METRICS_PORT,
    show_default=True,
    help="Port that serve's metrics get.",
)
@_option(
    "--processes",
    serve=True,
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Server processes that serve is told to start: what memory and processors must do for.",
)
@_option(
    "--threads",
    serve=True,
    type=click.IntRange(1),
    help="Threads that serve is given. Default: all processors, divided by --processes.",
)
@_option(
    "--max-batch-bytes",
    serve=True,
    type=click.IntRange(1),
    default=MAX_BATCH_BYTES,
    show_default=True,
    help="As for serve: what memory, and a GPU's, must do for.",
)
@_option(
    "--max-queue-bytes",
    serve=True,
    type=click.IntRange(1),
    default=MAX_QUEUE_BYTES,
    show_default=True,
    help="As for serve: what memory must do for.",
)
@_option(
    "--shared-memory-bytes",
    serve=True,
    type=click.IntRange(0),
    default=SHARED_MEMORY_BYTES,
    show_default=True,
    help="As for serve: what /dev/shm must have room for; 0 for nothing.",
)
@_option(
    "--target",
    metavar="HOST:PORT",
    help="Look at the server there as well; this host's ports are then not asked for.",
)
@_option(
    "--metrics",
    metavar="HOST:PORT",
    help="Metrics endpoint of that server, which tells its clock. Default: its host, "
    "--metrics-port.",
)
@_option(
    "--fingerprint", default="", metavar="SHA256", help="Of the model that must be found there."
)
@_option("--tls", is_flag=True, help="Encrypt calls to the server.")
@_option("--ca", type=PEM, help="PEM file of the server's authorities. Implies --tls.")
@_option("--cert", type=PEM, help="PEM file of a client certificate. Implies --tls.")
@_option("--key", type=PEM, help="PEM file of its private key.")
@_option("--token", help="Bearer token for the server. Better set by the environment.")
@_option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object, for programs; its keys stay the same between versions.",
)
@click.pass_context
def doctor(context: click.Context, /, *, as_json: bool, **settings: Any) -> None:
    """Check this host for all that serving needs, and say what to fix.

    Drivers, libraries, memory, limits, ports, clock, the checkpoint; and codes of random rows, on
    the CPU and on every GPU, against float64. With --target a running server too. The exit status
    is 1 if anything FAILs.
    """
    findings = []
    for finding in examine(Settings(**settings)):
        findings.append(finding)
        if not as_json:
            click.echo(as_text(finding))  # at once: a self-test takes its time
    counts = Counter(finding.status for finding in findings)
    if as_json:
        found = {
            "findings": [asdict(finding) for finding in findings],
            "counts": {status: counts[status] for status in Status},
        }
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo("\n" + ", ".join(f"{counts[status]} {status}" for status in Status))
    context.exit(1 if counts[Status.FAIL] else 0)


def as_text(finding: Finding) -> str:
    """Lay a finding out: status, check and facts in columns, and below what to do."""
    status = click.style(f"{finding.status:<5}", fg=COLOURS[finding.status])
    lines = [f"{status} {finding.check:<17} {finding.what}"]
    if finding.todo:
        lines.append(f"{'':<23} -> {finding.todo}")
    return "\n".join(lines)


def examine(settings: Settings) -> Iterator[Finding]:
    """Run all checks, one after the other. One that breaks is a finding, and ends no other."""
    yield from _run("python", lambda: check_python(facts.python()))
    yield from _run("libraries", lambda: check_libraries(facts.libraries()))
    gpus: list[GpuFacts] = []
    yield from _run("driver", lambda: _driver(settings, gpus))
    found = gpus[0] if gpus else GpuFacts()
    if found.gpus:
        need = settings.processes * (GPU_BYTES + BATCH_BUFFERS * settings.max_batch_bytes)
        yield from _run("gpu code", lambda: check_architecture(found))
        yield from _run("gpu memory", lambda: check_device_memory(found, need))
        yield from _run("gpu kernels", lambda: check_triton(facts.triton(found)))
    yield from _host(settings)
    yield from _models(settings, found)
    if settings.target is not None:
        yield from _run("server", lambda: _server(settings, settings.target or ""))


def _driver(settings: Settings, gpus: list[GpuFacts]) -> Finding:
    gpus.append(facts.gpus())
    return check_driver(gpus[0], settings.device)


def _host(settings: Settings) -> Iterator[Finding]:
    batches = BATCH_BUFFERS * settings.max_batch_bytes
    need = settings.processes * (PROCESS_BYTES + settings.max_queue_bytes + batches)
    yield from _run("memory", lambda: _memory(need))
    yield from _run(
        "processors",
        lambda: check_processors(*facts.processors(CGROUPS), settings.threads, settings.processes),
    )
    yield from _run("open files", lambda: check_open_files(*facts.open_files()))
    yield from _run(
        "/dev/shm",  # noqa: S108 - where callers share memory
        lambda: check_shared_memory(
            facts.mount(Path("/dev/shm")),  # noqa: S108 - for the same reason
            settings.shared_memory_bytes,
        ),
    )
    if settings.target is None:
        for host, port, flag in (
            (settings.host, settings.port, "--port"),
            (settings.metrics_host or settings.host, settings.metrics_port, "--metrics-port"),
        ):
            if port:
                yield from _run(f"port {port}", partial(_port, host, port, flag))
    yield from _run("clock", lambda: check_clock(*facts.clock(), synchronised=facts.synchronised()))
    yield from _run("allocator", lambda: check_allocator(*facts.allocator()))
    yield from _run("numba cache", lambda: check_compiled_loops(facts.numba_folder()))


def _memory(need: int) -> Finding:
    available, by = facts.memory(CGROUPS, MEMINFO)
    return check_memory(available, need, by)


def _port(host: str, port: int, flag: str) -> Finding:
    return check_port(flag, f"{host}:{port}", facts.port_refused(host, port, flag))


def _models(settings: Settings, gpus: GpuFacts) -> Iterator[Finding]:
    paths = [_path(given) for given in settings.checkpoint]
    expected = settings.fingerprint if settings.target is None else ""
    sound: list[str] = []
    if not paths:
        yield from _run("checkpoint", lambda: check_checkpoint(None))
    for path in paths:
        for finding in _run("checkpoint", partial(_checkpoint, path, expected)):
            yield finding
            if finding.status is not Status.FAIL:
                sound.append(path)
    for device in ("cpu", *(f"cuda:{index}" for index in range(len(gpus.gpus)))):
        for model in (None, *sound):
            yield from _run(
                f"self-test {device}", partial(_self_test, device, model, settings.threads)
            )


def _path(given: str) -> str:
    """``PATH`` of ``[NAME=]PATH``."""
    _, separator, path = given.partition("=")
    return path if separator and not Path(given).exists() else given


def _checkpoint(path: str, expected: str) -> Finding:
    return check_checkpoint(facts.checkpoint(path), expected)


def _self_test(device: str, model: str | None, threads: int | None) -> Finding:
    return check_self_test(facts.self_test(device, model, threads=threads))


def _server(settings: Settings, target: str) -> list[Finding]:
    import grpc  # noqa: PLC0415 - a host may lack it, and is told so
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    from semid_client import TLS, Client  # noqa: PLC0415
    from semid_server.cli.health import open_channel  # noqa: PLC0415

    encrypted = settings.tls or settings.ca or settings.cert or settings.key
    tls = TLS.from_files(settings.ca, settings.cert, settings.key) if encrypted else None
    with open_channel(target, tls) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=5
            )
            health = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
        except grpc.RpcError as error:
            health = f"{error.code().name}: {error.details()}"
    host = target.rpartition("/")[2].rpartition(":")[0]
    metrics = settings.metrics or (f"{host}:{settings.metrics_port}" if host else None)
    with Client(target, timeout=5, tls=tls, token=settings.token) as client:
        return check_server(facts.server(client, health, metrics), settings.fingerprint)


def _run(check: str, run: Callable[[], Finding | Iterable[Finding]]) -> Iterator[Finding]:
    try:
        found = run()
    except ModuleNotFoundError as error:
        yield fail(check, f"{error.name} is not installed", "pip install 'semid[server]'")
    except Exception as error:  # noqa: BLE001 - a doctor who faints helps nobody
        yield fail(
            check,
            f"could not be checked: {type(error).__name__}: {error}",
            "this is a bug of semid doctor, or a host unlike others: please report it",
        )
    else:
        yield from [found] if isinstance(found, Finding) else found


if __name__ == "__main__":
    doctor()
