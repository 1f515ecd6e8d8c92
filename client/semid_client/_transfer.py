"""What encoding and decoding have in common, without any I/O: splitting, requests, answers.

A transfer is cut into spans of rows; each becomes one request, and its answer goes to a sink,
in order. `Encoding` and `Decoding` say what the requests and answers are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np

from semid.v1 import semid_pb2 as pb
from semid_client._errors import (
    ConfigurationError,
    FingerprintMismatchError,
    InvalidInputError,
    ProtocolError,
)
from semid_client._tensor import (
    CODE_TYPES,
    RECONSTRUCTION_TYPES,
    check_code_type,
    check_embedding_type,
    codes_to_tensor,
    embeddings_to_tensor,
    from_tensor,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from semid_client._model import ModelInfo
    from semid_client._shared_memory import Carrier

MESSAGE_BYTES: Final = 1 << 20
"""Size of the messages that large work is split into: gRPC in Python moves 1 MiB best."""

ENVELOPE_BYTES: Final = 256
"""More than a message holds besides its numbers and its model's name: fingerprint, shape, tags."""

DECODE_MODES: Final = {"sum": pb.DECODE_MODE_SUM, "calibrated": pb.DECODE_MODE_CALIBRATED}


@runtime_checkable
class RowSource(Protocol):
    """Rows that can be had by slices: a numpy array, a memory map, a reader of files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, m)``."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the numbers."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """Rows ``start`` to ``stop``, ``(stop - start, m)``."""


class Encoding:
    """Embeddings ``(n, D)`` to codes ``(n, L)``."""

    method: Final = "Encode"

    def __init__(self, source: RowSource) -> None:
        self.source = _checked(source, "embeddings")
        check_embedding_type(source.dtype)

    def row_bytes(self, info: ModelInfo) -> int:
        """Bytes of a row in the request or in the answer, whichever is more."""
        return max(
            self.source.shape[1] * self.source.dtype.itemsize,
            info.n_layers * info.code_dtype.itemsize,
        )

    def request(
        self,
        span: slice,
        *,
        model: str,
        expected_fingerprint: str,
        carrier: Carrier | None = None,
    ) -> pb.EncodeRequest:
        """Build the request of the rows of one span, which ``carrier`` puts into shared memory."""
        if carrier is not None:
            return pb.EncodeRequest(
                model=model,
                expected_fingerprint=expected_fingerprint,
                shared=carrier.tensor(span.start, self.source[span]),
            )
        return pb.EncodeRequest(
            model=model,
            expected_fingerprint=expected_fingerprint,
            tensor=embeddings_to_tensor(self.source[span]),
        )

    def answer(self, response: pb.EncodeResponse, n_rows: int) -> NDArray[Any]:
        """Codes in an answer of ``n_rows`` rows; `ProtocolError` if it is not sound."""
        return from_tensor(response.tensor, n_rows, CODE_TYPES)

    def first_fault(self, span: slice, info: ModelInfo) -> InvalidInputError | None:
        """Find the first row of a refused span that holds NaN or an infinity."""
        if self.source.shape[1] != info.input_dim:
            return None  # which is what the server minds
        bad = np.argwhere(~np.isfinite(self.source[span]))
        if not len(bad):
            return None
        row, column = (int(i) for i in bad[0])
        value = self.source[span][row, column]
        return InvalidInputError.at(
            span.start + row, f"number {column} is {value}; embeddings are finite"
        )


class Decoding:
    """Codes ``(n, l)``, the first ``l`` of ``L`` layers, to reconstructions ``(n, D)``."""

    method: Final = "Decode"

    def __init__(self, source: RowSource, mode: str, calibration: str | None = None) -> None:
        self.source = _checked(source, "codes")
        check_code_type(source.dtype)
        if mode not in DECODE_MODES:
            raise ConfigurationError(f"mode is {mode!r}; expected one of {', '.join(DECODE_MODES)}")
        self.mode = DECODE_MODES[mode]
        self._calibration = calibration

    def row_bytes(self, info: ModelInfo) -> int:
        """Bytes of a row in the request or in the answer, whichever is more."""
        widest_code, reconstruction = 4, np.dtype(np.float32).itemsize
        return max(self.source.shape[1] * widest_code, info.input_dim * reconstruction)

    def request(
        self,
        span: slice,
        *,
        model: str,
        expected_fingerprint: str,
        carrier: Carrier | None = None,  # noqa: ARG002 -- as Encoding needs it
    ) -> pb.DecodeRequest:
        """Build the request of the rows of one span; `InvalidInputError` names a bad row."""
        return pb.DecodeRequest(
            model=model,
            expected_fingerprint=expected_fingerprint,
            mode=self.mode,
            tensor=codes_to_tensor(self.source[span], span.start),
        )

    def answer(self, response: pb.DecodeResponse, n_rows: int) -> NDArray[Any]:
        """Reconstructions in an answer of ``n_rows`` rows; `ProtocolError` if it is not sound.

        `FingerprintMismatchError` if they were made with another calibration than is expected.
        """
        if self._calibration not in (None, response.calibration):
            raise FingerprintMismatchError(
                f"the model that answered has calibration {response.calibration or 'none'}, but "
                f"{self._calibration or 'none'} is expected: its vectors are on another scale"
            )
        return from_tensor(response.tensor, n_rows, RECONSTRUCTION_TYPES)

    def first_fault(self, span: slice, info: ModelInfo) -> InvalidInputError | None:
        """Find the first row of a refused span with a code that the model does not have."""
        codes = self.source[span]
        if codes.shape[1] > info.n_layers:
            return None  # which is what the server minds
        widths = np.array([layer.codebook_width for layer in info.layers[: codes.shape[1]]])
        bad = np.argwhere(codes >= widths)
        if not len(bad):
            return None
        row, layer = (int(i) for i in bad[0])
        return InvalidInputError.at(
            span.start + row,
            f"code {codes[row, layer]} of layer {layer} is out of range; "
            f"the layer has {widths[layer]} centroids",
        )


class Collected:
    """A sink that puts the answers together into one array, allocated with the first of them."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows
        self._array: NDArray[Any] | None = None

    def __call__(self, start: int, rows: NDArray[Any]) -> None:
        """Place the answer that begins at row ``start``."""
        if self._array is None:
            native = rows.dtype.newbyteorder("=")
            self._array = np.empty((self._n_rows, rows.shape[1]), native)
        self._array[start : start + len(rows)] = rows

    @property
    def array(self) -> NDArray[Any]:
        """All rows. Writable, native byte order; there is at least one answer, even of no rows."""
        assert self._array is not None  # noqa: S101 -- `spans` yields at least one span
        return self._array


def spans(
    transfer: Encoding | Decoding,
    info: ModelInfo,
    *,
    names_bytes: int,
    start: int = 0,
    carrier: Carrier | None = None,
) -> Iterator[slice]:
    """Cut the rows of a transfer so that no message, either way, is above the server's limits.

    Yields at least one span: a transfer of no rows is one request, so that the server has
    judged it and its answer has the right shape and type.

    Parameters
    ----------
    transfer : Encoding or Decoding
        What is sent.
    info : ModelInfo
        The model, with the limits.
    names_bytes : int
        Bytes of the names that go along in each request.
    start : int
        The first row that is sent.
    carrier : Carrier, optional
        Bounds the rows of a request in place of the size of messages.

    Raises
    ------
    InvalidInputError
        If a single row is above the server's limit.
    """
    n_rows = transfer.source.shape[0]
    if carrier is not None:
        step = carrier.rows_at_once(transfer.source.shape[1] * transfer.source.dtype.itemsize)
    else:
        step = _rows_of_message(info, transfer.row_bytes(info), names_bytes)
    for begin in range(start, max(n_rows, 1), step):
        yield slice(begin, min(begin + step, n_rows))


def _rows_of_message(info: ModelInfo, row_bytes: int, names_bytes: int) -> int:
    room = info.limits.max_message_bytes - ENVELOPE_BYTES - names_bytes
    if row_bytes > room:
        raise InvalidInputError(
            f"one row takes {row_bytes} bytes, but the server accepts messages of "
            f"{info.limits.max_message_bytes}: raise its limit"
        )
    return min(info.limits.max_rows, max(1, min(room, MESSAGE_BYTES) // row_bytes))


class Answers:
    """The answers to one transfer: all of one model, of one width and type, handed on in order.

    ``next_row`` is the first row whose answer has not been handed on.

    Parameters
    ----------
    transfer : Encoding or Decoding
        What was asked.
    expected_fingerprint : str
        The model that must answer; if empty, the one that answers first.
    sink : callable
        Given the index of the first row, and the rows.
    """

    def __init__(
        self,
        transfer: Encoding | Decoding,
        expected_fingerprint: str,
        sink: Callable[[int, NDArray[Any]], None],
    ) -> None:
        self.fingerprint = expected_fingerprint
        self.next_row = 0
        self._transfer = transfer
        self._sink = sink
        self._like: tuple[int, np.dtype[Any]] | None = None

    def read(self, span: slice, response: Any) -> NDArray[Any]:
        """Rows in the answer to one span.

        Raises
        ------
        FingerprintMismatchError
            If another model answered than the one expected, or than the one before.
        ProtocolError
            If the answer is not sound, or does not go with those before.
        """
        if not response.fingerprint:
            raise ProtocolError("the server answered without a fingerprint")
        self.fingerprint = self.fingerprint or response.fingerprint
        if response.fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                f"the model that answered has fingerprint {response.fingerprint}, but "
                f"{self.fingerprint} is expected: its codes belong to another codebook"
            )
        rows = self._transfer.answer(response, span.stop - span.start)
        like = (rows.shape[1], rows.dtype)
        if self._like not in (None, like):
            raise ProtocolError(
                f"the server answered rows of {like[0]} {like[1]} after rows of "
                f"{self._like[0]} {self._like[1]} in one call"
            )
        self._like = like
        return rows

    def hand_on(self, span: slice, rows: NDArray[Any]) -> None:
        """Give the rows of one span to the sink, whose errors are its own."""
        self._sink(span.start, rows)
        self.next_row = span.stop


def _checked(source: RowSource, what: str) -> RowSource:
    if len(source.shape) != 2:  # noqa: PLR2004 -- a matrix
        raise InvalidInputError(f"{what} have shape {source.shape}; expected (rows, columns)")
    return source
