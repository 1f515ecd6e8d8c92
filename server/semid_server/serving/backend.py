"""What runs on the device: the model, its encoder, and the buffer that batches are copied into.

Called by one thread at a time: the batcher's worker, or the event loop while that rests. The worker
makes and warms up the first version of each model; a thread beside it does so with later ones.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import numpy as np
import torch

from semid_server.checkpoint import calibration_fingerprint, load_checkpoint
from semid_server.encoding import EncodeCounts, make_encoder
from semid_server.encoding.staging import RECORDING
from semid_server.errors import (
    ConfigurationError,
    DeviceError,
    DeviceLostError,
    FieldViolation,
    InvalidInputError,
    SemidError,
)
from semid_server.model import DecodeMode
from semid_server.serving.batcher import Runner
from semid_server.serving.device_use import DeviceUse, DeviceWatch
from semid_server.serving.drift import SAMPLED_ROWS, SAMPLED_SHARE, DriftWatch, LayerDrift
from semid_server.serving.fill import copy_finite, read_finite
from semid_server.serving.shared_memory import SharedRows
from semid_server.serving.types import (
    DecodeKey,
    DecodeModeName,
    EmbeddingType,
    EncodeKey,
    Payload,
    ServedModel,
    WorkKey,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    import numpy.typing as npt

    from semid_server.encoding import Encoder
    from semid_server.model import ModelSpec
    from semid_server.serving.config import ModelSource, ServeConfig

logger = logging.getLogger(__name__)

TORCH_TYPES: dict[EmbeddingType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
# Same-sized types that numpy knows too: a bfloat16 buffer is filled through its bits.
FILL_TYPES: dict[EmbeddingType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.uint16,
    "float64": torch.float64,
}

MAX_VIEWS: Final = 256
"""Sizes of batches whose views are kept."""


class Buffer:
    """Memory that batches of one type of numbers are copied into.

    Views of it are kept: to make one takes torch longer than a small batch is copied for.

    Attributes
    ----------
    rows : torch.Tensor, shape (n, D)
        All of it.
    host : numpy.ndarray, shape (n, D)
        The same memory; bfloat16 as its uint16 bits.
    """

    __slots__ = ("_prepared", "_views", "host", "rows")

    def __init__(self, rows: torch.Tensor, dtype: EmbeddingType) -> None:
        self.rows = rows
        self.host: npt.NDArray[Any] = rows.view(FILL_TYPES[dtype]).numpy()
        self._views: dict[int, torch.Tensor] = {}
        self._prepared: dict[int, Callable[[], npt.NDArray[np.unsignedinteger]]] = {}

    def first(self, count: int) -> torch.Tensor:
        """Return its first rows."""
        view = self._views.get(count)
        if view is None:
            if len(self._views) == MAX_VIEWS:
                self._views.clear()
            view = self._views[count] = self.rows[:count]
        return view

    def encode(self, count: int, encoder: Encoder) -> npt.NDArray[np.unsignedinteger]:
        """Codes (n, L) of its first rows, finite; always by the same encoder."""
        prepared = self._prepared.get(count)
        if prepared is None:
            if len(self._prepared) == MAX_VIEWS:
                self._prepared.clear()
            prepared = self._prepared[count] = encoder.prepare(self.first(count))
        return prepared()


def collect_garbage() -> None:
    """Free what is left of versions that were replaced.

    Not while graphs are recorded, which it would spoil. Blocks all of Python for milliseconds.
    """
    with RECORDING:
        gc.collect()


Buffers: TypeAlias = dict[EmbeddingType, Buffer]
"""A batch buffer for each type of numbers, page-locked where a GPU reads it."""

MAX_NAMED_ROWS = 8


class Device(Runner[WorkKey, Payload, "npt.NDArray[Any]"]):
    """Hands each batch to the version of the model that it was admitted for.

    Attributes
    ----------
    loading : int
        How many new versions are being loaded beside it.
    """

    divisible = True

    def __init__(self) -> None:
        self.loading = 0
        self._last: Backend | None = None

    def runs_quickly(self, key: WorkKey) -> bool:
        """Whether the event loop's thread may run short batches: see `Backend.quick`.

        Not while a version is loaded: a batch may be long in coming then, behind what that does.
        """
        backend: Backend = key.model.backend
        return backend.quick and not self.loading

    def company_pays(self, key: WorkKey) -> bool:
        """Whether it is the way to the device that takes most of the time of a short batch."""
        backend: Backend = key.model.backend
        return backend.far

    def run(
        self, key: WorkKey, payloads: Sequence[Payload]
    ) -> Sequence[npt.NDArray[Any] | SemidError]:
        """Answer each payload; see `Backend.run`.

        A batch that fails, for lack of memory or else, is tried again in halves, down to single
        requests; one that still fails then fails alone.

        Raises
        ------
        DeviceLostError
            The device can do nothing more for this process.
        """
        backend: Backend = key.model.backend
        self._last = backend
        try:
            return backend.run(key, payloads)
        except SemidError:
            raise
        except torch.cuda.OutOfMemoryError as error:
            if len(payloads) == 1:
                logger.warning("no device memory for %d rows: %s", len(payloads[0]), error)
            else:
                logger.warning("no device memory for %d requests at once; halving", len(payloads))
        except Exception as error:
            if not backend.device_works():
                logger.exception("the device failed")
                raise DeviceLostError(
                    "the device has failed and can do nothing more for this process"
                ) from error
            if len(payloads) == 1:
                raise
            logger.warning("a batch of %d requests failed (%r); halving", len(payloads), error)
        # Only now: the exception held on to what the attempt had allocated.
        backend.release_memory()
        if len(payloads) == 1:
            return [
                DeviceError(
                    f"the device has no memory for this request of {len(payloads[0])} rows; "
                    "send fewer at once"
                )
            ]
        return self._halve(key, payloads)

    def run_alone(self, key: WorkKey, payload: Payload) -> npt.NDArray[Any] | SemidError:
        """Answer one payload as `run` does, which gets it if it fails: that knows what to do."""
        if isinstance(key, EncodeKey):
            backend: Backend = key.model.backend
            self._last = backend
            try:
                return backend.encode_alone(key.dtype, payload)
            except Exception as error:  # noqa: BLE001 - `run` meets it again, and tells what it is
                logger.debug("a request of %d rows failed: %r", len(payload), error)
        (answer,) = self.run(key, (payload,))
        return answer

    def _halve(
        self, key: WorkKey, payloads: Sequence[Payload]
    ) -> Sequence[npt.NDArray[Any] | SemidError]:
        """Run a batch in two parts, so that what makes it fail is found and fails alone."""
        middle = len(payloads) // 2
        answers: list[npt.NDArray[Any] | SemidError] = []
        for half in (payloads[:middle], payloads[middle:]):
            try:
                answers += self.run(key, half)
            except SemidError:
                raise
            except Exception:  # of one request: a larger part is halved again
                logger.exception("a request of %d rows failed", len(half[0]))
                answers.append(DeviceError("the device failed while it computed this request"))
        return answers

    def kind(self, key: WorkKey) -> Hashable:
        """Return what batches that take equally long have in common, without their model."""
        model = key.model
        shape = key.dtype if isinstance(key, EncodeKey) else (key.depth, key.mode)
        return model.name, model.fingerprint, shape

    def part(self, payload: Payload, start: int, stop: int) -> Payload:
        """Return rows ``start`` to ``stop``, as a view."""
        if isinstance(payload, SharedRows):
            return payload.part(start, stop)
        return payload[start:stop]

    def join(self, answers: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Put the answers to the parts of a request together."""
        return np.concatenate(answers)

    def after(self) -> None:
        """Do what its model does after a batch, and let go of it."""
        if self._last is not None:
            self._last.after()
        self._last = None


class Backend:
    """One version of a model on its device.

    Parameters
    ----------
    source : ModelSource
        Where its checkpoint is.
    config : ServeConfig
        Names the device and the limits.
    on_verified : callable
        Told, after a sample of rows was encoded again in float64, how many and how many differed.
    rng : numpy.random.Generator, optional
        Chooses the rows that are verified.

    Attributes
    ----------
    quick : bool
        Whether any thread may run a short batch, and have done in no time.
    far : bool
        Whether the device is not where this runs: a GPU.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be used.
    ConfigurationError
        The device asked for cannot be used.
    """

    def __init__(
        self,
        source: ModelSource,
        config: ServeConfig,
        *,
        on_verified: Callable[[int, int], None],
        rng: np.random.Generator | None = None,
    ) -> None:
        self._device = choose_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        overrides = config.overrides_of(source)
        if source.kept is None:
            checkpoint = load_checkpoint(source.path, overrides=overrides)
        else:
            checkpoint = source.kept.load(source.path, overrides)
        for note in checkpoint.notes:
            logger.info("%s: %s", source.path, note)
        for warning in checkpoint.warnings:
            logger.warning("%s: %s", source.path, warning)
        spec = checkpoint.spec
        self._model = checkpoint.model.to(self._device)
        self._calibration = checkpoint.calibration
        self._encoder = make_encoder(
            self._model,
            spec,
            device=self._device,
            threads=config.threads,
            reference=config.reference,
        )
        self._verify_fraction = config.verify_fraction
        self._verifier = (
            make_encoder(
                self._model, spec, device=self._device, threads=config.threads, reference=True
            )
            if config.verify_fraction
            else None
        )
        self._on_verified = on_verified
        self._rng = rng or np.random.default_rng()
        # The batch buffer, and the codes of the rows of the last batch, which are at its beginning
        # until the next one begins.
        self._encoded: tuple[torch.Tensor, npt.NDArray[np.unsignedinteger]] | None = None
        self._drift = DriftWatch(
            [layer.centroids.detach().cpu().numpy() for layer in self._model.layers],
            normalize_residuals=spec.normalize_residuals,
            features=self._features,
        )
        self._to_sample: float = SAMPLED_ROWS
        self.far = self._device.type != "cpu"
        self._code_type = np.dtype(f"<u{spec.code_bits // 8}")
        self._buffers: Buffers = {}
        self._has_network = spec.has_network
        # To verify rows takes far longer than to encode them.
        self.quick = self._verifier is None and are_soon_back(
            spec, self._device, processes=config.processes
        )
        modes: tuple[DecodeModeName, ...] = ("sum",)
        if self._calibration is not None or not spec.normalize_residuals:
            modes = ("sum", "calibrated")
        self.served = ServedModel(
            name=checkpoint.name,
            fingerprint=checkpoint.fingerprint,
            kind=spec.kind.value,
            input_dim=spec.input_dim,
            embedding_dim=spec.embedding_dim,
            codebook_widths=spec.codebook_widths,
            normalize_residuals=spec.normalize_residuals,
            decode_modes=modes,
            code_dtype=self._code_type,
            device=_device_name(self._device),
            calibration=calibration_fingerprint(self._calibration),
            backend=self,
        )
        self._warm_up_counts = EncodeCounts()
        self._device_watch = (
            DeviceWatch(self._device, self.served.device) if self._device.type == "cuda" else None
        )

    def warm_up(self) -> None:
        """Run each path once: what is compiled or allocated at first use is not a caller's wait."""
        self._encoder.warm_up()
        row = np.zeros((1, self.served.input_dim), np.float32)
        codes = np.zeros((1, len(self.served.codebook_widths)), self._code_type)
        self.run(EncodeKey(self.served, "float32"), [row])
        for mode in self.served.decode_modes:
            self.run(DecodeKey(self.served, codes.shape[1], mode), [codes])
        self._encoded = None
        self._warm_up_counts = self._encoder.counts()

    def proved_rows(self) -> Mapping[str, int]:
        """Rows encoded for callers, by the level of precision that proved their codes."""
        warm_up = asdict(self._warm_up_counts)
        counts = asdict(self._encoder.counts())
        return {level: rows - warm_up[level] for level, rows in counts.items()}

    def release_memory(self) -> None:
        """Give memory that nothing uses back to the device."""
        if self._device.type == "cuda":
            with RECORDING:  # of a new version's graphs, which this would spoil
                torch.cuda.empty_cache()

    def device_works(self) -> bool:
        """Whether the device still does what it is asked: some errors end that for the process."""
        if self._device.type != "cuda":
            return True
        try:
            with RECORDING:
                torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True

    def drift(self) -> Sequence[LayerDrift]:
        """Code usage and quantisation error of the last rows, by layer."""
        return self._drift.summary()

    def device_use(self) -> DeviceUse | None:
        """How full and how busy the device is; None on a CPU, or if the driver cannot tell."""
        return None if self._device_watch is None else self._device_watch.read()

    def run(
        self, key: WorkKey, payloads: Sequence[Payload]
    ) -> Sequence[npt.NDArray[Any] | SemidError]:
        """Answer each payload: codes (n, L) of embeddings, or float32 (n, D) of codes.

        A payload with NaN or Inf gets an `InvalidInputError` of its own; the others are answered
        as if it had not been there.
        """
        match key:
            case EncodeKey(dtype=dtype):
                return self._encode(dtype, payloads)
            case DecodeKey(mode=mode):
                # Codes are never shared: they are small.
                codes = cast("Sequence[npt.NDArray[Any]]", payloads)
                return self._decode(DecodeMode(mode), codes)

    def after(self) -> None:
        """Look at the last batch once more: for drift, and for the share to be verified."""
        if self._encoded is None:
            return
        (rows, codes), self._encoded = self._encoded, None
        if not len(codes):
            return
        self._to_sample = min(self._to_sample + len(codes) * SAMPLED_SHARE, SAMPLED_ROWS)
        # Seldom, and then many: a few rows take as long as all that may be taken at once.
        if self._to_sample == SAMPLED_ROWS:
            count = min(SAMPLED_ROWS, len(codes))
            self._to_sample -= count
            # Spread over the batch: its requests may differ. A view: to gather so few rows, torch
            # would wake its threads.
            sample = slice(0, len(codes) // count * count, len(codes) // count)
            self._drift.observe(codes, rows[sample], codes[sample])
        else:
            self._drift.observe(codes)
        if self._verifier is not None:
            self._verify(self._verifier, rows, codes)

    def _verify(
        self, verifier: Encoder, rows: torch.Tensor, codes: npt.NDArray[np.unsignedinteger]
    ) -> None:
        kept = np.flatnonzero(self._rng.random(len(codes)) < self._verify_fraction)
        if not len(kept):
            return
        again = verifier.encode(rows[torch.from_numpy(kept)]).numpy()
        wrong = np.flatnonzero((again != codes[kept]).any(axis=1))
        self._on_verified(len(kept), len(wrong))
        if len(wrong):
            logger.error(
                "%d of %d verified rows differ from the float64 reference; the first: served %s, "
                "reference %s",
                len(wrong),
                len(kept),
                codes[kept[wrong[0]]].tolist(),
                again[wrong[0]].tolist(),
            )

    def _features(self, rows: torch.Tensor) -> npt.NDArray[np.floating[Any]]:
        if not self._has_network:
            # What is beyond float32 may be of a length that float64 can square.
            wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
            return cast("npt.NDArray[np.floating[Any]]", rows.to(wide).numpy())
        with torch.inference_mode():
            features: torch.Tensor = self._model.features(rows.to(self._device, torch.float32))
        return cast("npt.NDArray[np.float32]", features.cpu().numpy())

    def _encode(
        self, dtype: EmbeddingType, payloads: Sequence[Payload]
    ) -> list[npt.NDArray[Any] | SemidError]:
        self._encoded = None  # of a batch whose rows are about to be overwritten
        rows, errors = self.fill(dtype, payloads, self._buffers)
        host = self._buffers[dtype].encode(len(rows), self._encoder)
        self._encoded = rows, host
        answers: list[npt.NDArray[Any] | SemidError] = []
        start = 0
        for payload, error in zip(payloads, errors, strict=True):
            if error is not None:
                answers.append(error)
                continue
            answers.append(host[start : start + len(payload)])
            start += len(payload)
        return answers

    def encode_alone(
        self, dtype: EmbeddingType, payload: Payload
    ) -> npt.NDArray[np.unsignedinteger] | SemidError:
        """Answer one payload, as `run` does."""
        self._encoded = None
        total = len(payload)
        buffer = self._buffers.get(dtype)
        if buffer is None or len(buffer.host) < total:
            buffer = self._grow(dtype, total, self._buffers)
        try:
            finite = _copy(buffer.host[:total], payload, dtype)
            if not finite and (error := _describe_bad_rows(buffer.rows[:total])) is not None:
                return error
        except SemidError as unreadable:
            return unreadable
        codes = buffer.encode(total, self._encoder)
        self._encoded = buffer.rows, codes
        return codes

    def encode_rows(self, rows: torch.Tensor) -> npt.NDArray[np.unsignedinteger]:
        """Codes (n, L) of finite rows (n, D) in memory; on a GPU, one call at a time."""
        return self._host(self._encoder.encode(rows))

    def begin_rows(
        self, rows: torch.Tensor
    ) -> Callable[[], tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.bool_]]]:
        """Begin to encode rows (n, D) in memory, and return what waits.

        That tells the codes, and which rows are finite: the codes of others mean nothing. See
        `Encoder.begin`.
        """
        screened = self._encoder.begin(rows)

        def wait() -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.bool_]]:
            found = screened()
            return self._host(found.codes), found.finite.numpy()

        return wait

    def _host(self, codes: torch.Tensor) -> npt.NDArray[np.unsignedinteger]:
        return codes.cpu().numpy().astype(self._code_type, copy=False)

    def fill(
        self, dtype: EmbeddingType, payloads: Sequence[Payload], buffers: Buffers
    ) -> tuple[torch.Tensor, list[SemidError | None]]:
        """Copy the payloads one after another into the batch buffer: the one copy on the way.

        The buffer is the one in ``buffers``, and made or grown there. Returns the rows of the
        batch, and for each payload what keeps it out: the place of one that cannot be read, or that
        holds NaN or Inf, is given to the next.
        """
        total = sum(map(len, payloads))
        buffer = buffers.get(dtype)
        if buffer is None or len(buffer.host) < total:
            buffer = self._grow(dtype, total, buffers)
        host = buffer.host
        start = 0
        errors: list[SemidError | None] = []
        for payload in payloads:
            stop = start + len(payload)
            error: SemidError | None = None
            try:
                if not _copy(host[start:stop], payload, dtype):
                    # Described from the copy: what is shared may hold something else by now.
                    error = _describe_bad_rows(buffer.rows[start:stop])
            except SemidError as unreadable:
                error = unreadable
            errors.append(error)
            if error is None:
                start = stop
        return buffer.first(start), errors

    def _grow(self, dtype: EmbeddingType, total: int, buffers: Buffers) -> Buffer:
        """Make the buffer of a type of numbers, or a larger one in its place."""
        # Grown at least twofold, so that it seldom is; page-locked where a GPU reads it.
        before = buffers.get(dtype)
        capacity = max(total, 2 * len(before.host) if before is not None else 0)
        rows = torch.empty(
            (capacity, self.served.input_dim),
            dtype=TORCH_TYPES[dtype],
            pin_memory=self._device.type == "cuda",
        )
        buffer = buffers[dtype] = Buffer(rows, dtype)
        return buffer

    def _decode(
        self, mode: DecodeMode, payloads: Sequence[npt.NDArray[Any]]
    ) -> list[npt.NDArray[Any] | SemidError]:
        codes = torch.from_numpy(np.concatenate(payloads).astype(np.int64))
        out = self._model.decode(codes.to(self._device), mode=mode, calibration=self._calibration)
        host = out.cpu().numpy()
        ends = np.cumsum([len(payload) for payload in payloads])
        return list(np.split(host, ends[:-1]))


def are_soon_back(spec: ModelSpec, device: torch.device, *, processes: int) -> bool:
    """Whether the codes of a few rows are there as soon as another thread could wait for them.

    From a GPU they are not where a network has the host ask for more than once, nor where processes
    take turns on it.
    """
    return device.type == "cpu" or (not spec.has_network and processes == 1)


def choose_device(device: str) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:i`` means on this machine.

    Raises
    ------
    ConfigurationError
        No such device here; the message says which there are.
    """
    if device == "auto":
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info("device auto: %s", _device_name(chosen))
        return chosen
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(
            f"device {device!r} is not one of auto, cpu, cuda, cuda:0, cuda:1, ..."
        ) from error
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ConfigurationError(
            f"device {device!r} is not one of auto, cpu, cuda, cuda:0, cuda:1, ..."
        )
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"device {device!r} asked for, but torch {torch.__version__} finds no CUDA device; "
            "use --device cpu, or install a CUDA build of torch and a driver"
        )
    count = torch.cuda.device_count()
    if (chosen.index or 0) >= count:
        raise ConfigurationError(
            f"device {device!r} asked for, but there are {count} CUDA devices: "
            f"cuda:0 to cuda:{count - 1}"
        )
    return chosen


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _copy(target: npt.NDArray[Any], payload: Payload, dtype: EmbeddingType) -> bool:
    """Copy a payload, and tell whether all of its numbers are finite."""
    if isinstance(payload, SharedRows):
        return read_finite(target, payload, dtype)
    return copy_finite(target, payload, dtype)


def _describe_bad_rows(rows: torch.Tensor) -> InvalidInputError | None:
    """Name the rows that hold NaN or Inf; None if all are finite."""
    finite = torch.isfinite(rows)
    bad = (~finite.all(dim=1)).nonzero()[:, 0].tolist()
    if not bad:
        return None
    violations = []
    for row in bad[:MAX_NAMED_ROWS]:
        feature = int((~finite[row]).nonzero()[0])
        violations.append(
            FieldViolation(
                f"embeddings[{row}]",
                f"feature {feature} is {rows[row, feature].item()}; expected a finite number",
            )
        )
    others = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
    return InvalidInputError(
        f"{violations[0].field}: {violations[0].description}{others}", violations
    )
