"""What the client's file commands borrow from this side: a checkpoint that computes, torch's files.

Found by entry points, so that the client never imports torch: ``semid.encoders`` and
``semid.tensor-files``.
"""

from __future__ import annotations

import mmap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch

from semid_client._errors import ConfigurationError, InvalidInputError
from semid_client._model import Layer, Limits, ModelInfo
from semid_client.files import FileError, NotFiniteError
from semid_client.files.memory import SLACK, pages
from semid_client.files.reading import AHEAD, READERS
from semid_server.checkpoint import Overrides
from semid_server.encoding.rows import default_threads, spans
from semid_server.errors import SemidError
from semid_server.serving.allocator import keep_large_buffers
from semid_server.serving.backend import TORCH_TYPES, Backend, choose_device
from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.serving.types import DecodeKey

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semid_client.files.memory import Memory
    from semid_server.serving.backend import Buffers


CPU_BLOCK_BYTES: Final = 4 << 20
LEAST_CPU_BLOCK_BYTES: Final = 1 << 20
"""A few of them stay in the processor's cache between being read and being encoded."""

CPU_BYTES: Final = 256 << 20
"""Of blocks that are encoded side by side, on a machine of very many processors."""

GPU_BLOCK_BYTES: Final = (16 << 20) - SLACK - mmap.PAGESIZE
"""With what `CheckpointEngine.memory` adds, 16 MiB: torch rounds page-locked memory up to a power
of two."""

GPU_BLOCKS: Final = 2
"""Blocks on their way to a GPU at once: one is fetched while another is computed, and a third would
only have more threads wait for Python's lock."""

LOCKED_AHEAD: Final = READERS + AHEAD + AHEAD * GPU_BLOCKS
"""Blocks that there is page-locked memory for from the beginning, as many as a file is read into:
16 MiB take the system 10 ms, in which a GPU encodes as much thirty times."""


class CheckpointEngine:
    """A checkpoint on this machine: the very code that a server runs, without one.

    A CPU works on as many blocks as it has processors, each by one thread. Were one block shared
    among all of them, they would wait for one another several times in each, and all for the one
    that a thread which reads the file has just kept waiting.

    Parameters
    ----------
    path : str
        Checkpoint of any format.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
    threads : int, optional
        CPU threads; as many as there are processors by default.
    allow_degenerate : bool
        Whether a model whose codes mean nothing is warned of, in place of the refusal.

    Raises
    ------
    ConfigurationError
        If the checkpoint or the device cannot be used.
    """

    stage = "encoding"
    block_bytes = GPU_BLOCK_BYTES

    def __init__(
        self,
        path: str,
        *,
        device: str,
        threads: int | None = None,
        allow_degenerate: bool = False,
    ) -> None:
        source = ModelSource(Path(path))
        keep_large_buffers()  # blocks are read into memory that earlier ones left
        before = torch.get_num_threads()
        try:
            chosen = choose_device(device)
            on_cpu = chosen.type == "cpu"
            config = ServeConfig(
                models=(source,),
                device=device,
                threads=1 if on_cpu else threads,
                overrides=Overrides(allow_degenerate=allow_degenerate),
            )
            with ThreadPoolExecutor(1) as beside:
                locked = None if on_cpu else beside.submit(_lock_pages, chosen)
                self._backend = Backend(source, config, on_verified=_nothing)
                if locked is not None:
                    locked.result()
            self._backend.warm_up()
        except (SemidError, OSError) as error:
            raise ConfigurationError(str(error)) from error
        finally:
            torch.set_num_threads(before)  # of the caller's thread: ours are others
        served = self._served = self._backend.served
        self.threads = GPU_BLOCKS
        # A GPU looks through rows faster than this machine's memory can bring them.
        self.screens = not on_cpu
        self._workers: ThreadPoolExecutor | None = None
        if on_cpu:
            self.threads = threads or default_threads()
            self._workers = ThreadPoolExecutor(
                self.threads, "semid-block", initializer=torch.set_num_threads, initargs=(1,)
            )
            self.block_bytes = min(
                CPU_BLOCK_BYTES, max(LEAST_CPU_BLOCK_BYTES, CPU_BYTES // self.threads)
            )
        self._device = Lock()
        self._buffers: SimpleQueue[Buffers] = SimpleQueue()
        for _ in range(self.threads):
            self._buffers.put({})
        self.where = f"of {path}"
        self.info = ModelInfo(
            name=served.name,
            fingerprint=served.fingerprint,
            kind=served.kind,
            input_dim=served.input_dim,
            layers=tuple(Layer(width, served.embedding_dim) for width in served.codebook_widths),
            normalize_residuals=served.normalize_residuals,
            code_dtype=served.code_dtype.newbyteorder("="),
            decode_modes=served.decode_modes,
            limits=Limits(config.max_message_bytes, config.max_batch_rows),
            calibration=served.calibration,
        )

    def memory(self, n_bytes: int) -> Memory:
        """At least so many bytes, from the beginning of a page; page-locked for a GPU."""
        if self._served.device == "cpu":
            return pages(n_bytes)
        locked = torch.empty(n_bytes + mmap.PAGESIZE, dtype=torch.uint8, pin_memory=True)
        return locked.numpy()[-locked.data_ptr() % mmap.PAGESIZE :]

    def encode(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Codes (n, L) of finite embeddings (n, D), read where they are if the device can.

        Raises
        ------
        NotFiniteError
            If some are not finite and ``screens`` is true.
        """
        name: Any = rows.dtype.name
        if name == "bfloat16":
            rows = rows.view(np.uint16)
        if not rows.dtype.isnative:
            rows = rows.astype(rows.dtype.newbyteorder("="))
        # torch has no tensors of memory that must not be written to.
        if rows.flags.carray and len(rows):
            tensor = torch.from_numpy(rows).view(TORCH_TYPES[name])
            if self._workers is not None or tensor.is_pinned():
                return self._encode_rows(tensor)
        buffers = self._buffers.get()
        try:
            whole = np.ascontiguousarray(rows)
            filled, (error,) = self._backend.fill(name, [whole], buffers)
            if error is not None:
                raise NotFiniteError(str(error)) from error
            return self._encode_rows(filled)
        finally:
            self._buffers.put(buffers)

    def _encode_rows(self, rows: torch.Tensor) -> NDArray[Any]:
        """Codes (n, L) of rows (n, D) that the device can read where they are."""
        if self._workers is None:
            with self._device:
                screened = self._backend.begin_rows(rows)
            codes, finite = screened()
            if not finite.all():
                raise NotFiniteError(f"{np.count_nonzero(~finite)} rows hold NaN or an infinity")
            return codes
        # A CPU's encoder has nothing that one call could spoil for another but the counts of what
        # it did, which nobody asks for here.
        size = max(1, self.block_bytes // max(1, rows[:1].nbytes))
        pieces = [rows[start:stop] for start, stop in spans(len(rows), size)] or [rows]
        parts = list(self._workers.map(self._backend.encode_rows, pieces))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decode(self, codes: NDArray[Any], mode: Any) -> NDArray[Any]:
        """Reconstructions float32 (n, D) of codes (n, l)."""
        if mode not in self.info.decode_modes:
            raise InvalidInputError(
                f"mode {mode} needs residual norms, which model {self.info.name!r} {self.where} "
                "lacks: record them by `semid calibrate`"
            )
        widths = np.array([layer.codebook_width for layer in self.info.layers[: codes.shape[1]]])
        bad = np.argwhere((codes < 0) | (codes >= widths))
        if len(bad):
            row, layer = (int(i) for i in bad[0])
            raise InvalidInputError.at(
                row,
                f"code {codes[row, layer]} of layer {layer} is out of range; "
                f"the layer has {widths[layer]} centroids",
            )
        key = DecodeKey(self._served, codes.shape[1], mode)
        if self._workers is None:
            with self._device:
                (answer,) = self._backend.run(key, [codes])
        else:
            (answer,) = self._workers.submit(self._backend.run, key, [codes]).result()
        if isinstance(answer, SemidError):
            raise InvalidInputError(str(answer)) from answer
        return answer

    def close(self) -> None:
        """Let the threads end, when they have done what they are at."""
        if self._workers is not None:
            self._workers.shutdown(wait=False, cancel_futures=True)


def _lock_pages(device: torch.device) -> None:
    """Have page-locked memory for some blocks, which torch keeps for those who ask for it later."""
    size = GPU_BLOCK_BYTES + SLACK + mmap.PAGESIZE
    with torch.cuda.device(device):
        _ = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(LOCKED_AHEAD)]


def _nothing(rows: int, wrong: int) -> None:
    """Verify nothing."""


class PtFiles:
    """Files of `torch.save`: a tensor, or a dict that holds one."""

    @staticmethod
    def read(
        path: Path, what: Literal["embeddings", "codes"], column: str | None, *, name: str
    ) -> TensorRows:
        """Open the rows of a file, ``name`` in messages; codes are GRID's, an item a column."""
        return TensorRows(path, column, name=name, turned=what == "codes")

    @staticmethod
    def write(to: Path, matrix: NDArray[Any]) -> None:
        """Save a matrix, which may be mapped memory, as a tensor."""
        with to.open("wb") as file:  # an open file: else its name would be part of the content
            try:
                torch.save(torch.from_numpy(matrix), file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # a full disk, over which it stumbled
                    raise error.__context__ from error
                raise


class TensorRows:
    """Rows of a tensor in a file, mapped for each slice anew so that memory stays small.

    bfloat16, which numpy lacks, is read as the same numbers in float32.
    """

    def __init__(self, path: Path, column: str | None, *, name: str, turned: bool) -> None:
        self._path, self._column, self._name, self._turned = path, column, name, turned
        tensor = self._load()
        self.shape = tuple(tensor.shape)
        self.dtype = self._numpy(tensor[:0]).dtype

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        return self._numpy(self._load()[rows]).copy()

    def read(self, start: int, stop: int, memory: Memory) -> NDArray[Any]:
        """Copy rows ``start`` to ``stop - 1`` into memory."""
        some = self._numpy(self._load()[start:stop])
        rows = memory[: some.nbytes].view(some.dtype).reshape(some.shape)
        rows[:] = some
        return rows

    @staticmethod
    def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
        numbers: NDArray[Any] = (
            tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        ).numpy()
        return numbers

    def _load(self) -> torch.Tensor:
        if not zipfile.is_zipfile(self._path):
            raise FileError(
                self._name,
                "cannot be read as tensors alone: it is no file of torch.save, or one of torch "
                "before 1.6, to be saved again",
            )
        try:
            found = torch.load(self._path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            # torch raises anything, and says much; the first line is what happened.
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise FileError(self._name, f"cannot be read as tensors alone: {said}") from error
        if isinstance(found, dict):
            matrices = {
                str(name): value
                for name, value in found.items()
                if isinstance(value, torch.Tensor) and value.ndim == 2  # noqa: PLR2004 - a matrix
            }
            name = self._column or (next(iter(matrices)) if len(matrices) == 1 else None)
            if name not in matrices:
                raise FileError(
                    self._name,
                    f"its two-dimensional tensors are {', '.join(matrices) or 'none'}; name the "
                    "one to read by --column",
                )
            found = matrices[name]
        elif isinstance(found, torch.Tensor) and self._column is not None:
            raise FileError(
                self._name, f"has one tensor and no names: --column {self._column} says nothing"
            )
        if not isinstance(found, torch.Tensor) or found.ndim != 2:  # noqa: PLR2004 - a matrix
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise FileError(self._name, f"holds {shape}; expected a tensor (rows, columns)")
        if found.layout != torch.strided or found.is_quantized:
            raise FileError(self._name, f"holds a {_form(found)} tensor; expected a dense one")
        if found.is_meta:
            raise FileError(
                self._name,
                f"holds a tensor of {_type(found)} on the meta device, which has no numbers; "
                "expected one on the CPU or a GPU",
            )
        found = found.detach()
        try:
            self._numpy(found[:0])
        except (TypeError, RuntimeError) as error:  # of a type that numpy lacks
            expected = "an integer type" if self._turned else "a float type, such as float32"
            raise FileError(
                self._name, f"holds a tensor of {_type(found)}; expected {expected}"
            ) from error
        return found.T if self._turned else found


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _form(tensor: torch.Tensor) -> str:
    return "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
