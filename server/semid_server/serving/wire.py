"""Between the messages of `semid.v1` and numpy: views in, bytes out, and every check of shape.

Tensors are read as views of the message's bytes: nothing is copied here. Rows written out as
numbers are for people; they are converted, many times slower.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from semid.v1 import semid_pb2 as pb
from semid_server.errors import FieldViolation, InvalidInputError, MessageTooLargeError
from semid_server.serving.received import varint
from semid_server.serving.shared_memory import SharedRows
from semid_server.serving.types import HOST_TYPES, EmbeddingType

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from semid_server.serving.received import ReceivedEncode
    from semid_server.serving.shared_memory import SharedMemory
    from semid_server.serving.types import DecodeModeName, ServedModel

EMBEDDING_TYPES: Final[dict[pb.DataType, EmbeddingType]] = {
    pb.DATA_TYPE_FLOAT32: "float32",
    pb.DATA_TYPE_FLOAT16: "float16",
    pb.DATA_TYPE_BFLOAT16: "bfloat16",
    pb.DATA_TYPE_FLOAT64: "float64",
}
CODE_TYPES: Final[dict[pb.DataType, np.dtype[np.unsignedinteger]]] = {
    pb.DATA_TYPE_UINT8: np.dtype("<u1"),
    pb.DATA_TYPE_UINT16: np.dtype("<u2"),
    pb.DATA_TYPE_UINT32: np.dtype("<u4"),
}
CODE_TYPE_NAMES: Final[dict[np.dtype[Any], pb.DataType]] = {
    dtype: number for number, dtype in CODE_TYPES.items()
}
DECODE_MODES: Final[dict[pb.DecodeMode, DecodeModeName]] = {
    pb.DECODE_MODE_UNSPECIFIED: "sum",
    pb.DECODE_MODE_SUM: "sum",
    pb.DECODE_MODE_CALIBRATED: "calibrated",
}
MODEL_KINDS: Final = {
    "rq-kmeans": pb.MODEL_KIND_RQ_KMEANS,
    "r-vq": pb.MODEL_KIND_R_VQ,
    "rq-vae": pb.MODEL_KIND_RQ_VAE,
}

MAX_NAMED_ROWS = 8
MAX_NAMED_DIMENSIONS = 8


def read_embeddings(
    received: ReceivedEncode, model: ServedModel, max_rows: int
) -> tuple[npt.NDArray[Any], EmbeddingType]:
    """Return the rows of a request, and the type of their numbers.

    Returns
    -------
    rows : numpy.ndarray, shape (n, D)
        A read-only view of the message where it carries a tensor; bfloat16 as its uint16 bits.
    dtype : str
        What the numbers are.

    Raises
    ------
    InvalidInputError
        The type, shape or length is not what the model takes.
    MessageTooLargeError
        More rows than ``max_rows``.
    """
    head = received.head
    fits: _Fits | None = head.fits
    if fits is not None and fits.input_dim == model.input_dim and fits.max_rows == max_rows:
        return np.ndarray(fits.shape, fits.host, received.data), fits.dtype
    request = head.request
    if head.form is None:
        raise InvalidInputError.at("embeddings", "missing; give either tensor or rows")
    if head.form == "rows":
        _check_rows(len(request.rows.rows), max_rows)
        rows = [row.values for row in request.rows.rows]
        _check_lengths("embeddings", rows, model.input_dim, f"model {model.name!r} expects")
        # Filled row by row: an array of the container itself would be several times slower.
        array = np.empty((len(rows), model.input_dim), np.float32)
        for index, row in enumerate(rows):
            array[index] = row
        return array, "float32"
    dtype = _embedding_type("tensor", request.tensor.dtype)
    array = _view(request.tensor, HOST_TYPES[dtype], max_rows, received.data)
    _check_width("tensor", array.shape[1], model)
    if received.data:
        # What follows this head is as long every time.
        head.fits = _Fits(model.input_dim, max_rows, dtype, HOST_TYPES[dtype], array.shape)
    return array, dtype


class _Fits(NamedTuple):
    """What was checked of a tensor, and what it was found to be."""

    input_dim: int
    max_rows: int
    dtype: EmbeddingType
    host: np.dtype[Any]
    shape: tuple[int, ...]


def read_shared(
    request: pb.EncodeRequest,
    model: ServedModel,
    memory: SharedMemory,
    *,
    max_rows: int,
    max_bytes: int,
) -> tuple[SharedRows, EmbeddingType]:
    """Return where in shared memory the rows of a request are, and the type of their numbers.

    Raises
    ------
    InvalidInputError
        The type, the shape or the place is not what the model takes or what is shared.
    MessageTooLargeError
        More rows than ``max_rows``, or bytes than ``max_bytes``.
    SegmentNotFoundError
        No such memory is shared.
    """
    shared = request.shared
    dtype = _embedding_type("shared", shared.dtype)
    rows, columns = _check_matrix("shared", shared.shape, max_rows)
    _check_width("shared", columns, model)
    nbytes = rows * columns * HOST_TYPES[dtype].itemsize
    if nbytes > max_bytes:
        raise MessageTooLargeError(
            f"{nbytes} bytes of embeddings in one request; this server takes at most {max_bytes} "
            "(SharedMemoryLimits.max_request_bytes): send them in several"
        )
    segment = memory.find(shared.segment)
    if not 0 <= shared.offset <= segment.nbytes - nbytes:
        raise InvalidInputError.at(
            "shared.offset",
            f"{shared.offset}, and {nbytes} bytes from there; the memory shared has "
            f"{segment.nbytes} bytes",
        )
    return SharedRows(segment, shared.offset, (rows, columns), nbytes), dtype


def read_codes(
    request: pb.DecodeRequest, model: ServedModel, max_rows: int
) -> npt.NDArray[np.unsignedinteger]:
    """Return the codes of a request, shape (n, l), every one of them in its layer's range.

    Raises
    ------
    InvalidInputError
        The type, shape, length or a code is not what the model takes; rows are named.
    MessageTooLargeError
        More rows than ``max_rows``.
    """
    form = request.WhichOneof("codes")
    layers = len(model.codebook_widths)
    if form is None:
        raise InvalidInputError.at("codes", "missing; give either tensor or rows")
    codes: npt.NDArray[np.unsignedinteger]
    if form == "rows":
        _check_rows(len(request.rows.rows), max_rows)
        rows = [row.codes for row in request.rows.rows]
        depth = len(rows[0]) if rows else layers
        _check_lengths("codes", rows, depth, "the first row has")
        codes = np.array([list(row) for row in rows], np.uint32).reshape(len(rows), depth)
    else:
        dtype = CODE_TYPES.get(request.tensor.dtype)
        if dtype is None:
            raise InvalidInputError.at(
                "tensor.dtype",
                f"{_name(pb.DataType, request.tensor.dtype)} is not a type of codes; "
                f"expected one of {_names(pb.DataType, CODE_TYPES)}",
            )
        codes = _view(request.tensor, dtype, max_rows)
    if not 1 <= codes.shape[1] <= layers:
        raise InvalidInputError.at(
            "tensor.shape" if form == "tensor" else "codes[0]",
            f"{codes.shape[1]} codes a row; model {model.name!r} has {layers} layers, "
            f"so between 1 and {layers}",
        )
    widths = np.array(model.codebook_widths[: codes.shape[1]], np.int64)
    # The largest of each column first: the common case is settled without a matrix of verdicts.
    if codes.shape[0] and (codes.max(axis=0) >= widths).any():
        wrong = np.argwhere(codes >= widths)
        violations = [
            FieldViolation(
                f"codes[{row}][{layer}]",
                f"{codes[row, layer]} is out of range; expected 0 to {widths[layer] - 1}",
            )
            for row, layer in wrong[:MAX_NAMED_ROWS]
        ]
        others = f" (and {len(wrong) - 1} more codes)" if len(wrong) > 1 else ""
        raise InvalidInputError(
            f"{violations[0].field}: {violations[0].description}{others}", violations
        )
    return codes


def read_mode(request: pb.DecodeRequest) -> DecodeModeName:
    """Return the mode that a request asks for."""
    mode = DECODE_MODES.get(request.mode)
    if mode is None:
        raise InvalidInputError.at(
            "mode",
            f"{_name(pb.DecodeMode, request.mode)} is not a decode mode; "
            f"expected one of {_names(pb.DecodeMode, DECODE_MODES)}",
        )
    return mode


def encode_response(
    codes: npt.NDArray[np.unsignedinteger], model: ServedModel, form: str | None
) -> bytes:
    """Write an EncodeResponse: codes in the form in which the embeddings came."""
    if form == "rows":
        rows = pb.CodeRows(rows=[pb.CodeRows.Row(codes=row) for row in codes.tolist()])
        return pb.EncodeResponse(fingerprint=model.fingerprint, rows=rows).SerializeToString()
    head = _response_head(
        pb.EncodeResponse,
        model.fingerprint,
        CODE_TYPE_NAMES[codes.dtype],
        codes.shape,
        codes.nbytes,
    )
    return head + codes.tobytes()


def decode_response(
    reconstructions: npt.NDArray[np.float32],
    model: ServedModel,
    form: str | None,
    *,
    calibration: str = "",
) -> bytes:
    """Write a DecodeResponse: reconstructions in the form in which the codes came.

    ``calibration`` is the model's, where it was used.
    """
    if form == "rows":
        rows = pb.FloatRows(rows=[pb.FloatRows.Row(values=row) for row in reconstructions.tolist()])
        return pb.DecodeResponse(
            fingerprint=model.fingerprint, rows=rows, calibration=calibration
        ).SerializeToString()
    head = _response_head(
        pb.DecodeResponse,
        model.fingerprint,
        pb.DATA_TYPE_FLOAT32,
        reconstructions.shape,
        reconstructions.nbytes,
    )
    if calibration:
        head = pb.DecodeResponse(calibration=calibration).SerializeToString() + head
    return b"".join((head, np.ascontiguousarray(reconstructions).data))  # the one copy of them


def in_stream(response: bytes) -> bytes:
    """Write an EncodeStreamResponse or DecodeStreamResponse around a response."""
    return _IN_STREAM + varint(len(response)) + response


_DATA: Final = b"\x1a"
"""Tag of field 3, length-delimited: the numbers of a Tensor."""

_TENSOR: Final = b"\x12"
"""Tag of field 2, length-delimited: the Tensor of both responses."""

_IN_STREAM: Final = b"\x0a"
"""Tag of field 1, length-delimited: the response in the messages of both streams."""


@lru_cache(maxsize=1024)
def _response_head(
    message: type[pb.EncodeResponse | pb.DecodeResponse],
    fingerprint: str,
    dtype: pb.DataType,
    shape: tuple[int, ...],
    nbytes: int,
) -> bytes:
    """Return a serialised response without its numbers, which come last.

    protobuf would copy them twice; so it writes what is before them, and their lengths are put
    there as it does (https://protobuf.dev/programming-guides/encoding/).
    """
    tensor = pb.Tensor(dtype=dtype, shape=shape).SerializeToString()
    if nbytes:  # protobuf leaves out what is empty
        tensor += _DATA + varint(nbytes)
    written = message(fingerprint=fingerprint).SerializeToString()
    return written + _TENSOR + varint(len(tensor) + nbytes) + tensor


def model_message(
    model: ServedModel,
    *,
    max_message_bytes: int,
    max_rows: int,
    shared_memory: pb.SharedMemoryLimits | None = None,
) -> pb.Model:
    """Describe a model, and the limits of this server."""
    modes = {"sum": pb.DECODE_MODE_SUM, "calibrated": pb.DECODE_MODE_CALIBRATED}
    return pb.Model(
        name=model.name,
        fingerprint=model.fingerprint,
        kind=MODEL_KINDS[model.kind],
        input_dim=model.input_dim,
        layers=[
            pb.Layer(codebook_width=width, embedding_dim=model.embedding_dim)
            for width in model.codebook_widths
        ],
        normalize_residuals=model.normalize_residuals,
        code_dtype=CODE_TYPE_NAMES[model.code_dtype],
        decode_modes=[modes[mode] for mode in model.decode_modes],
        limits=pb.Limits(
            max_message_bytes=max_message_bytes, max_rows=max_rows, shared_memory=shared_memory
        ),
        calibration=model.calibration,
    )


def _check_rows(rows: int, limit: int) -> None:
    """Refuse more rows than one request may have."""
    if rows > limit:
        raise MessageTooLargeError(
            f"{rows} rows in one request; this server takes at most {limit} (Limits.max_rows): "
            "send them in several"
        )


def _view(
    tensor: pb.Tensor, dtype: np.dtype[Any], max_rows: int, data: memoryview | bytes | None = None
) -> npt.NDArray[Any]:
    """View the bytes of a tensor, its own or ``data``, as a matrix, or say what does not fit."""
    shape = _check_matrix("tensor", tensor.shape, max_rows)
    expected = math.prod(shape) * dtype.itemsize
    if data is None:
        data = tensor.data  # once: every look at the field makes a copy
    if len(data) != expected:
        raise InvalidInputError.at(
            "tensor.data",
            f"{len(data)} bytes; shape {list(shape)} of "
            f"{_name(pb.DataType, tensor.dtype)} takes {expected}",
        )
    if shape[0] == 0:  # [0, columns]: frombuffer refuses no bytes at all
        _check_columns_fit(shape)
        return np.empty(shape, dtype)
    return np.frombuffer(data, dtype).reshape(shape)


def _embedding_type(field: str, number: pb.DataType) -> EmbeddingType:
    dtype = EMBEDDING_TYPES.get(number)
    if dtype is None:
        raise InvalidInputError.at(
            f"{field}.dtype",
            f"{_name(pb.DataType, number)} is not a type of embeddings; "
            f"expected one of {_names(pb.DataType, EMBEDDING_TYPES)}",
        )
    return dtype


def _check_matrix(field: str, shape: Sequence[int], max_rows: int) -> tuple[int, int]:
    """Return rows and columns, neither negative, and not too many rows."""
    if len(shape) != 2:  # noqa: PLR2004 - a matrix
        raise InvalidInputError.at(
            f"{field}.shape",
            f"[{_first(shape)}] has {len(shape)} dimensions; expected [rows, columns]",
        )
    if min(shape) < 0:
        raise InvalidInputError.at(f"{field}.shape", f"{list(shape)} has a negative dimension")
    _check_rows(shape[0], max_rows)
    return shape[0], shape[1]


def _first(shape: Sequence[int]) -> str:
    """Write out the first dimensions: a message may hold millions, and all would take seconds."""
    more = ", ..." if len(shape) > MAX_NAMED_DIMENSIONS else ""
    return ", ".join(map(str, shape[:MAX_NAMED_DIMENSIONS])) + more


def _check_width(field: str, columns: int, model: ServedModel) -> None:
    if columns != model.input_dim:
        raise InvalidInputError.at(
            f"{field}.shape",
            f"rows of {columns} numbers; model {model.name!r} expects {model.input_dim}",
        )


def _check_columns_fit(shape: tuple[int, ...]) -> None:
    """Refuse a width that no array can have: with no rows, no bytes speak against it."""
    if shape[1] > 1 << 31:
        raise InvalidInputError.at("tensor.shape", f"{list(shape)} has too many columns")


def _check_lengths(field: str, rows: Sequence[Sequence[Any]], length: int, whose: str) -> None:
    wrong = [index for index, row in enumerate(rows) if len(row) != length]
    if wrong:
        first = f"{field}[{wrong[0]}]: {len(rows[wrong[0]])} numbers; {whose} {length}"
        others = f" (and {len(wrong) - 1} more rows)" if len(wrong) > 1 else ""
        raise InvalidInputError(
            first + others,
            [
                FieldViolation(f"{field}[{index}]", f"{len(rows[index])} numbers; {whose} {length}")
                for index in wrong[:MAX_NAMED_ROWS]
            ],
        )


def _name(enum: Any, number: int) -> str:
    try:
        return str(enum.Name(number))
    except ValueError:  # proto3 lets unknown numbers through
        return str(number)


def _names(enum: Any, numbers: Any) -> str:
    return ", ".join(_name(enum, number) for number in numbers)
