"""`semid serve`: a checkpoint in, a gRPC service out."""

from __future__ import annotations

import semid_server.cli.quiet_grpc  # before whatever imports grpc
import semid_server.cli.quiet_threads  # noqa: F401 - before whatever imports torch

# isort: split
import logging
import os
import resource
import sys
import tomllib
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import uvloop
from click.exceptions import Exit

from semid_server.cli import errors_as_sentences
from semid_server.cli.checkpoint_options import override_options
from semid_server.errors import ConfigurationError, SemidError
from semid_server.serving import logs
from semid_server.serving.addresses import check_apart
from semid_server.serving.allocator import keep_large_buffers
from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.serving.processes import Processes
from semid_server.serving.server import Server, leave_at_once
from semid_server.serving.tls import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from semid_server.checkpoint import Overrides

logger = logging.getLogger(__name__)

F = TypeVar("F", bound="Callable[..., Any] | click.Command")


def _read_config(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    """Take the defaults of all other flags from a file, so that flags and environment win."""
    if value is None:
        return
    try:
        settings = tomllib.loads(value.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{value} is not valid TOML: {error}", param=parameter) from error
    options = {str(option.name): option for option in context.command.params}
    del options["config"]
    defaults: dict[str, Any] = {}
    written: dict[str, str] = {}
    for key, setting in settings.items():
        name = key.replace("-", "_")
        if name in defaults:
            raise click.BadParameter(
                f"{value} sets {written[name]!r} to {_as_written(defaults[name])} and {key!r} to "
                f"{_as_written(setting)}, which are the same flag; expected one of them",
                param=parameter,
            )
        defaults[name], written[name] = setting, key
    if unknown := sorted(defaults.keys() - options.keys()):
        raise click.BadParameter(
            f"{value} sets {', '.join(map(repr, unknown))}, which no flag has as its name; "
            f"known: {', '.join(sorted(options))}",
            param=parameter,
        )
    tables = sorted(
        name
        for name, setting in defaults.items()
        if isinstance(setting, dict) or (isinstance(setting, list) and not options[name].multiple)
    )
    if tables:
        raise click.BadParameter(
            f"{value} gives {', '.join(map(repr, tables))} more than one value; expected one",
            param=parameter,
        )
    # As the command line would give them: every flag's own type checks what the value is.
    context.default_map = {}
    for name, setting in defaults.items():
        kinds, expected = _kinds(options[name])
        several = setting if isinstance(setting, list) else [setting]
        for one in several:
            if type(one) not in kinds:  # not isinstance: to Python true is a 1
                raise click.BadParameter(
                    f"{value} sets {written[name]!r} to {_as_written(one)}; expected {expected}",
                    param=parameter,
                )
        given = several if bool in kinds else [*map(str, several)]
        context.default_map[name] = given if options[name].multiple else given[0]


def _kinds(option: click.Parameter) -> tuple[set[type], str]:
    """What a file may say of an option: the types of its values, and what to call them."""
    if isinstance(option.type, click.types.BoolParamType):
        return {bool}, "true or false"
    if isinstance(option.type, click.types.IntParamType):
        return {int}, "an integer"
    if isinstance(option.type, click.types.FloatParamType):
        return {int, float}, "a number"
    return {str}, "a string"


def _as_written(setting: object) -> str:
    """Write a value as TOML has it."""
    return str(setting).lower() if isinstance(setting, bool) else repr(setting)


def _option(*names: str, **attributes: Any) -> Callable[[F], F]:
    """Return an option with its environment twin, SEMID_SERVE_ and the flag's name."""
    flag = names[0].split("/")[0].removeprefix("--").replace("-", "_")
    return click.option(
        *names, envvar=f"SEMID_SERVE_{flag.upper()}", show_envvar=True, **attributes
    )


class _ModelSource(click.ParamType[ModelSource, Any]):
    """PATH or NAME=PATH."""

    name = "[NAME=]PATH"
    envvar_list_splitter = ","

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> ModelSource:
        if isinstance(value, ModelSource):
            return value
        name, separator, path = str(value).partition("=")
        if not separator or Path(value).exists():  # a path may hold an equals sign itself
            return ModelSource(Path(value))
        if not name or not path:
            self.fail(f"{value!r} lacks a name or a path; expected NAME=PATH", parameter, context)
        return ModelSource(Path(path), name)


def _tls_files(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        missing = "--tls-cert" if cert is None else "--tls-key"
        raise ConfigurationError(f"{missing} is missing: TLS takes a certificate and its key")
    return TlsFiles(certificate=cert, key=key, client_ca=client_ca)


DEFAULTS = ServeConfig(models=(ModelSource(Path()),))


def _default(name: str) -> dict[str, Any]:
    return {"default": getattr(DEFAULTS, name), "show_default": True}


@click.command(short_help="Serve a checkpoint over gRPC.")
@_option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file of settings named like these flags (max_batch_rows = 8192). Flags win over "
    "the environment, and both over the file.",
)
@_option(
    "--checkpoint",
    required=True,
    multiple=True,
    type=_ModelSource(),
    help="Native checkpoint folder, GRID .ckpt, or .pt with a model_state_dict. Repeat it to serve "
    "several, the first as the default; NAME=PATH gives one a name. In the environment, separate "
    "them by commas.",
)
@_option(
    "--host",
    **_default("host"),
    help="Address to listen on. 127.0.0.1 keeps the service to this machine.",
)
@_option(
    "--port",
    type=click.IntRange(0, 65535),
    **_default("port"),
    help="Port of the gRPC service; 0 picks a free one and prints it.",
)
@_option(
    "--metrics-host",
    default=None,
    help="Address of the metrics endpoint, if not --host: set it to keep metrics internal.",
)
@_option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    **_default("metrics_port"),
    help="Port of the Prometheus endpoint; 0 picks a free one and prints it.",
)
@_option(
    "--admin-host",
    default=None,
    help="Address of the admin port, if not --host: set it to keep that port internal.",
)
@_option(
    "--admin-port",
    type=click.IntRange(0, 65535),
    default=None,
    help="Port of health and reflection alone, without TLS, tokens and limits: for probes that "
    "have no certificate, and that many callers must not crowd out. Reflection is then there "
    "only. 0 picks a free one and prints it. Default: none; both are with the service.",
)
@_option(
    "--device",
    **_default("device"),
    help="auto, cpu, cuda or cuda:i. auto takes the first GPU if there is one; name the device "
    "to have the start fail where it is missing.",
)
@_option(
    "--processes",
    type=click.IntRange(1),
    **_default("processes"),
    help="Server processes that share the address; each loads the models and has queues and "
    "limits of its own. A process moves about 1 GB/s: raise it on machines of many cores, for "
    "many connections (each stays with one process).",
)
@_option(
    "--threads",
    type=click.IntRange(1),
    default=None,
    help="CPU threads of the encoder, in each process. Default: all cores, divided by --processes; "
    "lower it on a shared machine.",
)
@_option(
    "--max-message-bytes",
    type=click.IntRange(1),
    **_default("max_message_bytes"),
    help="Largest message in either direction, in bytes. 1 to 4 MiB messages are the fastest; "
    "raise it only for callers that cannot split.",
)
@_option(
    "--max-batch-rows",
    type=click.IntRange(1),
    **_default("max_batch_rows"),
    help="Rows of a batch, and of a request, at most. Lower it for latency under load, raise it "
    "for throughput of small rows on a GPU.",
)
@_option(
    "--max-batch-bytes",
    type=click.IntRange(1),
    **_default("max_batch_bytes"),
    help="Bytes of a batch at most; at least --max-message-bytes. Bounds the device's buffers.",
)
@_option(
    "--max-batch-seconds",
    type=click.FloatRange(0.0001),
    **_default("max_batch_seconds"),
    help="Seconds that a batch is made to take at most, by what earlier ones took; larger requests "
    "are done in parts. Lower it to let small callers wait less for large ones. Four times as long "
    "while, for a second or more, none has come that takes less than half of it.",
)
@_option(
    "--max-queue-requests",
    type=click.IntRange(1),
    **_default("max_queue_requests"),
    help="Requests that may wait; more are refused at once with RESOURCE_EXHAUSTED.",
)
@_option(
    "--max-queue-bytes",
    type=click.IntRange(1),
    **_default("max_queue_bytes"),
    help="Bytes that may wait. Bounds memory and, with the device's speed, the wait.",
)
@_option(
    "--max-peer-bytes",
    type=click.IntRange(1),
    **_default("max_peer_bytes"),
    help="Bytes that one caller may have in work, reconstructions that it has not taken yet "
    "included: by the names in its certificate (the common one and the alternative ones), else its "
    "token, else its address. More are refused, streams wait. Raise it where all callers share a "
    "proxy.",
)
@_option(
    "--max-concurrent-rpcs",
    type=click.IntRange(1),
    **_default("max_concurrent_rpcs"),
    help="Calls in progress, those included whose message is on its way; more are refused with "
    "RESOURCE_EXHAUSTED. A caller with fewer messages on their way than another takes the place "
    "of one of the other's.",
)
@_option(
    "--max-memory-bytes",
    type=click.IntRange(0),
    **_default("max_memory_bytes"),
    help="Bytes that a process may have in use, its models among them, while messages come. Beyond "
    "it those on their way are given up with RESOURCE_EXHAUSTED, of the caller with most first, "
    "and no more than a few come at a time. 0 stands for three fifths of what the models leave "
    "of the machine's memory, or of the container's limit.",
)
@_option(
    "--shared-memory-bytes",
    type=click.IntRange(0),
    **_default("shared_memory_bytes"),
    help="Bytes that callers on this machine may share through /dev/shm, instead of sending them; "
    "one connection a quarter of it. The memory is theirs. 0 takes none.",
)
@_option(
    "--keepalive",
    type=click.FloatRange(0),
    **_default("keepalive"),
    help="Seconds of silence after which a connection is asked for a sign of life; without one "
    "for as long again (a minute at most) it is closed and its calls end. What a peer is sending "
    "is ahead of its answer: over slow links leave it time. 0 asks after two hours.",
)
@_option(
    "--max-connection-age",
    type=click.FloatRange(0),
    **_default("max_connection_age"),
    help="Seconds after which a client is told to connect again, once its calls are done, so that "
    "it asks for the name's addresses anew: how long a server that was added to a fleet may wait "
    "for its share. 0 never does.",
)
@_option(
    "--max-connection-age-grace",
    type=click.FloatRange(0),
    **_default("max_connection_age_grace"),
    help="Seconds after its age at which a connection is closed although calls are in progress. "
    "0 lets them end in their own time: set it where streams never end.",
)
@_option(
    "--max-connection-idle",
    type=click.FloatRange(0),
    **_default("max_connection_idle"),
    help="Seconds without a call after which a connection is closed. 0 keeps it.",
)
@_option(
    "--max-connection-streams",
    type=click.IntRange(1),
    **_default("max_connection_streams"),
    help="Calls in progress on one connection; gRPC has further ones wait at the client.",
)
@_option(
    "--min-ping-interval",
    type=click.FloatRange(0),
    **_default("min_ping_interval"),
    help="Seconds between pings that a client may send on a connection without calls; one that "
    "sends them faster again and again is disconnected.",
)
@_option(
    "--grace",
    type=click.FloatRange(0),
    **_default("grace"),
    help="Seconds after SIGTERM or SIGINT to finish what was admitted. Keep it under the "
    "supervisor's own patience.",
)
@_option(
    "--max-stall",
    type=click.FloatRange(0),
    **_default("max_stall"),
    help="Seconds that a batch, or the event loop, may take before it is taken to hang (and 16 "
    "times --max-batch-seconds at least). Calls then fail as UNAVAILABLE, and the process ends "
    "with status 1, for a supervisor to start another. 0 waits for ever.",
)
@_option(
    "--watch",
    type=click.FloatRange(0),
    **_default("watch"),
    help="Seconds between looks at the checkpoints' files: when they have changed, the new "
    "version is loaded beside the old one and takes its place. 0 never looks; SIGHUP reloads too.",
)
@_option(
    "--tls-cert",
    type=click.Path(path_type=Path),
    default=None,
    help="PEM file of the server's certificate chain; with --tls-key the service speaks TLS only. "
    "Renewed files are taken up without a restart.",
)
@_option(
    "--tls-key",
    type=click.Path(path_type=Path),
    default=None,
    help="PEM file of the certificate's private key, without a passphrase.",
)
@_option(
    "--tls-client-ca",
    type=click.Path(path_type=Path),
    default=None,
    help="PEM file of authorities; clients without a certificate of theirs are turned away "
    "(mutual TLS).",
)
@_option(
    "--token-file",
    type=click.Path(path_type=Path),
    default=None,
    help="File of SHA-256 hashes of bearer tokens, one a line, each followed by the methods it is "
    "good for if not all, and by a newline, the last too; read again when it changes. Calls "
    "without a token are refused. Use it with TLS.",
)
@_option(
    "--reflection/--no-reflection",
    **_default("reflection"),
    help="Whether clients may ask for the contract: tools at a keyboard need it, services do not. "
    "--admin-port has it elsewhere.",
)
@_option(
    "--metrics/--no-metrics",
    **_default("metrics"),
    help="Whether there is a metrics endpoint.",
)
@_option(
    "--tracing",
    is_flag=True,
    help="Export spans of calls and batches by OTLP over gRPC, as the OTEL_ variables say. Needs "
    "'semid[tracing]'.",
)
@_option(
    "--reference",
    is_flag=True,
    help="Encode by the float64 reference alone, hundreds of times slower: to rule out the fast "
    "path when looking for an error.",
)
@_option(
    "--verify-fraction",
    type=click.FloatRange(0, 1),
    **_default("verify_fraction"),
    help="Share of rows to encode again by the float64 reference while serving; differences are "
    "counted in semid_verify_mismatches_total. 0.001 costs little and watches always.",
)
@override_options("serve")
@_option(
    "--allow-degenerate",
    is_flag=True,
    help="Serve a model whose codes mean nothing (layers never initialised, or one shared "
    "codebook), with a warning in place of the refusal.",
)
@_option(
    "--keep-buffers/--no-keep-buffers",
    default=True,
    show_default=True,
    help="Whether glibc keeps the memory of large messages: 2 to 3 times their throughput, while "
    "resident memory stays at its highest. MALLOC_ settings in the environment win.",
)
@_option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least severity of what is logged to stderr; debug has a line for every call.",
)
@_option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Lines for people, or one JSON object a line for what collects them; also of "
    "why a start failed.",
)
def serve(
    *,
    checkpoint: tuple[ModelSource, ...],
    keep_buffers: bool,
    log_level: str,
    log_format: str,
    overrides: Overrides,
    allow_degenerate: bool,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    **settings: Any,
) -> None:
    """Serve trained checkpoints: Encode and Decode over gRPC, metrics for Prometheus.

    Prints where it listens, serves until SIGTERM or Ctrl-C, then finishes what was admitted.
    SIGHUP loads new versions of the checkpoints beside the old ones and switches to them.
    """
    prepare = partial(
        _prepare, keep_buffers=keep_buffers, log_level=log_level, log_format=log_format
    )
    prepare()
    show = _log if log_format == "json" else click.ClickException.show
    with _refusals_by(show), errors_as_sentences():
        overrides = replace(overrides, allow_degenerate=allow_degenerate)
        tls = _tls_files(tls_cert, tls_key, tls_client_ca)
        config = ServeConfig(models=checkpoint, overrides=overrides, tls=tls, **settings)
        check_apart(config)

        async def run() -> None:
            server: Server | Processes
            if config.processes > 1:
                server = Processes(config, announce=_announce, prepare=prepare)
            else:
                server = Server(config, announce=_announce)
            try:
                await server.run()
            except SemidError as error:
                if server.unfinished:
                    show(click.ClickException(str(error)))
                    leave_at_once(1)
                raise
            if server.unfinished:
                leave_at_once(0)

        uvloop.run(run())


@contextmanager
def _refusals_by(show: Callable[[click.ClickException], None]) -> Iterator[None]:
    """End the command as click does, but say why by ``show``."""
    try:
        yield
    except click.ClickException as error:
        show(error)
        raise Exit(error.exit_code) from error


def _log(error: click.ClickException) -> None:
    """Say why the command ends where every line of stderr is to be JSON."""
    logger.error("%s", error.format_message())


def _announce(line: str) -> None:
    try:
        click.echo(f"semid: {line}")
    except OSError as error:
        logger.warning("standard output: %s; it would have been: semid: %s", error.strerror, line)
        # What could not be written would be tried again at the end, and fail the command.
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _prepare(*, keep_buffers: bool, log_level: str, log_format: str) -> None:
    """Set up what a process has but one of."""
    logs.configure(level=log_level, as_json=log_format == "json")
    if keep_buffers:
        keep_large_buffers()
    _take_all_open_files()


def _take_all_open_files() -> None:
    """Raise the soft limit on open files to the hard one: every connection takes one.

    The soft limit, often 1,024, is for programs that call `select`, which knows no more. Nothing
    here does; and a caller beyond it would wait in vain, with no word of it in any log.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning("open files: %d of %d allowed: %s", soft, hard, error)
