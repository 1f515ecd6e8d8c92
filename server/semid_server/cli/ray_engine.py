"""A cluster that encodes: `semid encode --engine ray`, the same encode as a Ray Data job.

The job reads the Parquet files (``read_parquet``), hands blocks of rows to encoders that each hold
the model on a GPU or on some CPUs (``map_batches``), and writes codes beside the rows' indices
(``write_parquet``). Scheduling, and doing again what a lost node had done, is Ray's; see
`ray_parts` for how order comes into it. The codes then go, in the order of the rows, into the work
that an engine of this machine would have filled, and whatever is made of them is made by the same
code: the extra digit over all rows, and the output, byte for byte.

Found by an entry point of the group ``semid.encoders``, so that the client never imports torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np

from semid_client._errors import (
    ConfigurationError,
    FingerprintMismatchError,
    InvalidInputError,
    SemidClientError,
)
from semid_client.files import FileError, Work
from semid_client.files.finite import not_finite
from semid_client.files.memory import Memory, pages
from semid_client.files.rows import ListColumns, ParquetRows
from semid_server.cli.batch import CheckpointEngine
from semid_server.cli.ray_parts import Parts, gaps, locate, part_of
from semid_server.cli.ray_rows import ClusterError, indices

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pyarrow as pa
    from numpy.typing import NDArray

    from semid_client.files import OnBadRow, Source, Stages
    from semid_client.files.pipeline import Sink

OWN_COLUMNS: Final = ("path", "row_hash")
"""Columns that Ray adds to tell what row a row is."""

PART_ROWS: Final = 1 << 17
"""Rows of a part, at least: with fewer there would be very many files."""

GPU_BATCH_BYTES: Final = 2 * CheckpointEngine.block_bytes
"""Rows that an encoder on a GPU is given at once: one piece is copied while another is encoded."""

RAY_ADDS: Final = "\nFailed to apply UDF transform"
"""How Ray goes on in the message of an encoder's error."""

CONNECT_SECONDS: Final = 10.0
"""For a connection to the cluster's head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What each encoder of the cluster is told. It is sent to the nodes, the checkpoint with it.

    Attributes
    ----------
    checkpoint : str
        Name of its file or folder.
    content : dict
        Its files, by their path below the folder; of one file, by ``""``.
    fingerprint : str
        Of the model that it is.
    device : str
        ``cpu`` or ``cuda``.
    threads : int
        CPU threads of an encoder.
    source : str
        The input, as the command names it.
    files : dict
        Of each of its files, by Ray's name for it: index of the first row, and number of rows.
    names : dict
        What messages call each of them, by Ray's name for it.
    column : str
        Column of the embeddings.
    width, dtype
        Of an embedding.
    fail : bool
        Whether a bad row is the end of the job.
    allow_degenerate : bool
        Whether a model whose codes mean nothing is used all the same.
    """

    checkpoint: str
    content: Mapping[str, bytes]
    fingerprint: str
    device: str
    threads: int
    source: str
    files: Mapping[str, tuple[int, int]]
    names: Mapping[str, str]
    column: str
    width: int
    dtype: str
    fail: bool
    allow_degenerate: bool = False

    def named(self, row: int) -> tuple[str, int]:
        """What a message calls a row: its file, and its index there."""
        return next(
            (self.names[name], row - start)
            for name, (start, n_rows) in self.files.items()
            if start <= row < start + n_rows
        )


class Encoder:
    """One encoder of the cluster: a stateful actor, called with one block of rows after another.

    A checkpoint or device that cannot be used on its node is told by the first call: of an actor
    that cannot be made Ray says anything but why.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._refused: SemidClientError | None = None
        try:
            self._engine = self._loaded()
        except SemidClientError as error:
            self._refused = error
            return
        self._pool = ThreadPoolExecutor(self._engine.threads, "semid-encode")

    def _loaded(self) -> CheckpointEngine:
        task = self._task
        with tempfile.TemporaryDirectory(prefix="semid-") as folder:
            path = Path(folder) / task.checkpoint
            for name, content in task.content.items():
                file = path / name if name else path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            engine = CheckpointEngine(
                str(path),
                device=task.device,
                threads=task.threads,
                allow_degenerate=task.allow_degenerate,
            )
        found = engine.info.fingerprint
        if found != task.fingerprint:
            raise FingerprintMismatchError(
                f"{task.checkpoint} has fingerprint {task.fingerprint} where the job was begun, "
                f"but {found} on a node: install the same semid on all"
            )
        return engine

    def __call__(self, table: pa.Table) -> pa.Table:
        """Codes of a block: columns of `part_schema` for the column of embeddings and Ray's own.

        Raises
        ------
        SemidClientError
            The checkpoint or the device cannot be used on this node, or it is another model here.
        FileError
            A row is bad, and that is the end of the job.
        """
        if self._refused is not None:
            raise self._refused
        task = self._task
        (batch,) = table.combine_chunks().to_batches() or [None]
        if batch is None:
            return part_of(np.empty(0, np.int64), self._no_codes(), {})
        rows = indices(
            batch.column("path"),
            batch.column("row_hash").to_numpy(),
            task.files,
        )
        columns = ListColumns(task.source, table.schema, "embeddings", task.column, None)
        numbers, bad = columns.rows(batch, 0, task.width, np.dtype(task.dtype))
        bad |= not_finite(numbers, 0)
        if bad and task.fail:
            first = min(bad, key=lambda place: int(rows[place]))
            file, row = task.named(int(rows[first]))
            raise FileError(file, f"row {row}: {bad[first]}")
        if bad:
            numbers = numbers.copy()
            numbers[list(bad)] = 0  # as on one machine: finite, and a code of every model
        return part_of(rows, self._codes(rows, numbers), bad)

    def _codes(self, rows: NDArray[np.int64], numbers: NDArray[Any]) -> NDArray[Any]:
        """Codes of the embeddings of these rows, piece by piece."""
        n = max(1, self._engine.block_bytes // max(1, numbers[:1].nbytes))

        def some(start: int) -> NDArray[Any]:
            try:
                return self._engine.encode(numbers[start : start + n])
            except InvalidInputError as error:
                if error.row is None:
                    raise FileError(self._task.source, error.problem) from error
                file, row = self._task.named(int(rows[start + error.row]))
                raise FileError(file, f"row {row}: {error.problem}") from error

        return np.concatenate(list(self._pool.map(some, range(0, len(numbers), n))))

    def _no_codes(self) -> NDArray[Any]:
        info = self._engine.info
        return np.empty((0, info.n_layers), info.code_dtype)


class RayEngine:
    """A Ray cluster, and a checkpoint of this machine, which is sent to it.

    Parameters
    ----------
    path : str
        Checkpoint of any format.
    device : str
        Of the nodes: ``auto`` (GPUs if the cluster has any), ``cpu`` or ``cuda``.
    address : str
        The cluster: ``auto`` for the one that this machine is part of or that ``RAY_ADDRESS``
        names, ``HOST:PORT``, or ``local`` for one that is begun on this machine and ends with the
        command.
    workers : int, optional
        Encoders at most; by default one for each GPU, or for every second CPU.
    worker_cpus : int
        CPUs of each.
    parts : str, optional
        Path or URL of a folder that all nodes and this process see, for a folder of parts; by
        default that is beside the output.
    part_rows : int
        Rows that are written at once, at least.
    allow_degenerate : bool
        As of `CheckpointEngine`.

    Raises
    ------
    ConfigurationError
        If Ray is not installed, or the checkpoint or the device cannot be used.
    """

    stage = "cluster"
    threads = 1
    block_bytes = CheckpointEngine.block_bytes
    screens = False

    def __init__(
        self,
        path: str,
        *,
        device: str,
        address: str = "auto",
        workers: int | None = None,
        worker_cpus: int = 1,
        parts: str | None = None,
        part_rows: int = PART_ROWS,
        allow_degenerate: bool = False,
    ) -> None:
        if device not in {"auto", "cpu", "cuda"}:
            raise ConfigurationError(
                f"device {device!r} is not one of auto, cpu, cuda: Ray gives each encoder its GPU"
            )
        if address.startswith("ray://"):
            raise ConfigurationError(
                f"{address} is for Ray Client, through which Ray Data cannot be used: run the "
                "command on a node of the cluster, or by `ray job submit`"
            )
        self._ray = import_ray()
        self._path, self._device, self._address = Path(path), device, address
        self._workers, self._worker_cpus = workers, worker_cpus
        self._parts, self._part_rows = parts, part_rows
        self._connected = False
        # Here it is loaded for what is to be known of the model; any device will do for that.
        self._allow_degenerate = allow_degenerate
        self._here = CheckpointEngine(path, device="cpu", allow_degenerate=allow_degenerate)
        self.info, self.where = self._here.info, self._here.where

    def memory(self, n_bytes: int) -> Memory:
        """Any memory."""
        return pages(n_bytes)

    def encode(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Codes (n, L) of embeddings (n, D), without the cluster."""
        return self._here.encode(rows)

    def decode(self, codes: NDArray[Any], mode: Any) -> NDArray[Any]:
        """Reconstructions float32 (n, D) of codes (n, l), without the cluster."""
        return self._here.decode(codes, mode)

    def fill(
        self,
        source: Source,
        work: Sink,
        *,
        on_bad_row: OnBadRow,
        restart: bool,
        stages: Stages,
    ) -> None:
        """Bring all rows of a source, from where the work is, into it.

        Parts that an earlier command left behind are used; what they lack is encoded, by whole
        files. When all is in the work they are removed.

        Raises
        ------
        FileError
            The source is no Parquet file, holds a bad row, or the parts cannot be used.
        ConfigurationError
            There is no such cluster, or it has no such device.
        ClusterError
            The job failed. What is written stays, and the same command goes on with it.
        """
        if not isinstance(work, Work):
            raise FileError(
                "standard output", "is no place for the ray engine: give it the name of a file"
            )
        if not isinstance(source, ParquetRows):
            raise FileError(
                source.path, "is not Parquet, which the ray engine reads: use --engine local"
            )
        n_rows = source.starts[-1]
        if source.column in OWN_COLUMNS:
            raise FileError(
                source.path, f"Ray names a column {source.column!r} of its own: rename this one"
            )
        parts = Parts(self._root(str(work.output)), work.progress.task)
        if restart:
            parts.remove()
        parts.check_alone()
        runs = parts.runs()
        missing = gaps(runs, work.progress.rows_in, n_rows)
        lost = sum(stop - start for start, stop in missing)
        if runs:
            click.echo(f"{parts.root}: goes on, with {lost:,} of {n_rows:,} rows to do", err=True)
        if missing:
            work.save()  # whoever kills this finds what it was about
            began = time.perf_counter()
            try:
                with _naming(source.path, self._ray.exceptions.RayError):
                    self._run(source, missing, parts, fail=on_bad_row == "fail")
            except BaseException:
                if not parts.remove_if_empty():
                    click.echo(
                        f"{parts.root}: keeps codes, and the same command goes on with them",
                        err=True,
                    )
                raise
            stages.computing += time.perf_counter() - began
            runs = parts.runs()
            missing = gaps(runs, work.progress.rows_in, n_rows)
        if missing:
            lost = sum(stop - start for start, stop in missing)
            raise FileError(
                parts.root,
                f"{lost} of {n_rows} rows are not here after the job: some nodes write to "
                "another disk than this process reads; name by --parts a folder or URL that all "
                "see",
            )
        began = time.perf_counter()
        stages.bytes_read += (n_rows - work.progress.rows_in) * source.width * source.dtype.itemsize
        parts.append_to(work, runs, on_bad_row)
        work.save()
        parts.remove()
        stages.writing += time.perf_counter() - began

    def _root(self, output: str) -> str:
        """Where the parts of an output go."""
        if self._parts is None:
            return f"{output}.parts"
        return f"{self._parts.rstrip('/')}/{PurePosixPath(output).name}.parts"

    def _run(
        self, source: ParquetRows, missing: list[tuple[int, int]], parts: Parts, *, fail: bool
    ) -> None:
        """Have the files encoded that hold missing rows."""
        device, workers = self._connect()
        files = files_of(source)
        todo = [
            name
            for name, (start, n_rows) in files.items()
            if any(a < start + n_rows and start < b for a, b in missing)
        ]
        task = Task(
            checkpoint=self._path.absolute().name,
            content=content_of(self._path),
            fingerprint=self.info.fingerprint,
            device=device,
            threads=self._worker_cpus,
            source=source.path,
            files={name: files[name] for name in todo},
            names=dict(zip(files, (place.name for place in source.places()), strict=True)),
            column=source.column,
            width=source.width,
            dtype=source.dtype.str,
            fail=fail,
            allow_degenerate=self._allow_degenerate,
        )
        parts.create()
        data = self._ray.data
        context = data.DataContext.get_current()
        context.raise_original_map_exception = True  # else what an encoder says is lost
        context.enable_progress_bars = sys.stderr.isatty()
        row_bytes = source.width * source.dtype.itemsize
        rows = data.read_parquet(
            todo,
            filesystem=locate(source.places()[0].name)[0],
            include_paths=True,
            include_row_hash=True,
            partitioning=None,
            file_extensions=None,
        ).select_columns([source.column, *OWN_COLUMNS])
        codes = rows.map_batches(
            Encoder,
            fn_constructor_args=(task,),
            # Blocks as they come, 128 MiB at most: an encoder that waits for more may wait long.
            # For GPUs Ray insists on a number.
            batch_size=max(1, GPU_BATCH_BYTES // row_bytes) if device == "cuda" else None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=data.ActorPoolStrategy(min_size=1, max_size=workers),
            num_cpus=self._worker_cpus,
            num_gpus=1 if device == "cuda" else None,
        )
        codes.write_parquet(
            parts.folder, filesystem=parts.filesystem, min_rows_per_file=self._part_rows
        )

    def _connect(self) -> tuple[str, int]:
        """Join the cluster; return the device of its encoders, and how many there may be."""
        ray = self._ray
        if not ray.is_initialized():
            auto = self._address == "auto"
            check_reachable(os.environ.get("RAY_ADDRESS", "") if auto else self._address)
            try:
                with _quiet_backend():
                    ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
            except Exception as error:
                # Ray raises anything here, from ConnectionError to a plain Exception.
                raise ConfigurationError(
                    f"cannot join the Ray cluster {self._address!r} ({first_line(error)}): start "
                    "one by `ray start --head`, name it by --ray-address HOST:PORT, or give "
                    "--ray-address local for one on this machine"
                ) from error
            self._connected = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
        if self._device == "cuda" and not gpus:
            raise ConfigurationError("the Ray cluster has no GPU: give --device cpu, or auto")
        device = "cuda" if gpus and self._device != "cpu" else "cpu"
        each = self._worker_cpus
        if not any(
            node.get("CPU", 0) >= each and (device == "cpu" or node.get("GPU", 0) >= 1)
            for node in nodes
        ):
            raise ConfigurationError(
                f"no node of the Ray cluster has the {each} CPUs of --worker-cpus"
                + (" and a GPU" if device == "cuda" else "")
            )
        # With every CPU taken by encoders nobody would read, and all would wait for ever.
        most = (cpus - 1) // each
        if not most:
            raise ConfigurationError(
                f"the Ray cluster has {cpus} CPUs: an encoder takes {each} (--worker-cpus), and "
                "what reads and writes takes one more"
            )
        if ray.available_resources().get("CPU", 0) <= each:
            click.echo("The CPUs of the Ray cluster are taken: waiting for some.", err=True)
        wanted = self._workers or (gpus if device == "cuda" else max(1, cpus // 2 // each))
        return device, min(wanted, most)

    def close(self) -> None:
        """Leave the cluster."""
        if self._connected:
            self._ray.shutdown()
            self._connected = False


def import_ray() -> Any:
    """Import Ray and its Data, which send nothing anywhere but where they are told.

    Raises
    ------
    ConfigurationError
        If it is not installed.
    """
    # Else a cluster that is begun here would report its use to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"--engine ray needs {error.name}, which is not installed: "
            "pip install 'semid[ray,server]', on all nodes"
        ) from error
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # what goes wrong is raised, and said once
            handler.setLevel(logging.CRITICAL)
    return ray


@contextmanager
def _quiet_backend() -> Iterator[None]:
    """Let Ray's part in C++ log nothing here: what goes wrong is raised, and said once."""
    name = "RAY_BACKEND_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "fatal"
    try:
        yield
    finally:
        del os.environ[name]


def check_reachable(address: str) -> None:
    """Refuse a ``HOST:PORT`` where nobody listens: Ray would wait for many minutes.

    Raises
    ------
    ConfigurationError
        Nobody does, or it is no such address.
    """
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"there is no Ray cluster at {address!r} ({error}): start one by `ray start --head`, "
            "name it by --ray-address HOST:PORT, or give --ray-address local for one on this "
            "machine"
        ) from error


def files_of(source: ParquetRows) -> dict[str, tuple[int, int]]:
    """Each file of a source by Ray's name for it: index of its first row, number of rows."""
    return {
        locate(place.name)[1]: (start, stop - start)
        for place, (start, stop) in zip(source.places(), pairwise(source.starts), strict=True)
    }


def content_of(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint: its own content by ``""``, or those of its folder by name.

    Raises
    ------
    ConfigurationError
        If one cannot be read.
    """
    try:
        if not path.is_dir():
            return {"": path.read_bytes()}
        return {
            str(file.relative_to(path)): file.read_bytes()
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
    except OSError as error:
        raise ConfigurationError(f"{error.filename or path}: {error.strerror}") from error


def first_line(error: BaseException) -> str:
    """What an error says, without its details."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class _naming:  # noqa: N801 -- used like a function
    """Let what fails a job be one sentence: semid's own, if the cause was one."""

    def __init__(self, source: str, ray_error: type[Exception]) -> None:
        self._source, self._ray_error = source, ray_error

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if not isinstance(error, Exception):
            return
        causes = list(_causes(error))
        for cause in causes:
            # Ray's own errors are made to look like what they were caused by, and say too much.
            if isinstance(cause, SemidClientError) and not isinstance(cause, self._ray_error):
                said, added, _ = str(cause).partition(RAY_ADDS)
                if added:
                    raise ClusterError(said) from error
                raise cause from error
        root = causes[-1]
        if isinstance(root, OSError):
            raise FileError(
                self._source,
                f"a node says: {first_line(root)}; the input must be where all nodes see it",
            ) from error
        raise ClusterError(
            f"the Ray job failed: {type(root).__name__}: {first_line(root)}"
        ) from error


def _causes(error: BaseException) -> Any:
    """An error, and what it came of, through Ray's own errors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "cause", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__  # type: ignore[assignment]  # None ends it
