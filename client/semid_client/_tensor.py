"""Between numpy arrays and the contract's Tensor: little-endian, row-major, contiguous."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from semid.v1 import semid_pb2 as pb
from semid_client._errors import InvalidInputError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

EMBEDDING_TYPES: Mapping[str, pb.DataType] = MappingProxyType(
    {
        "float16": pb.DATA_TYPE_FLOAT16,
        "bfloat16": pb.DATA_TYPE_BFLOAT16,
        "float32": pb.DATA_TYPE_FLOAT32,
        "float64": pb.DATA_TYPE_FLOAT64,
    }
)
"""By numpy's name, so that ml_dtypes' bfloat16 is known without importing ml_dtypes."""

CODE_TYPES: Mapping[pb.DataType, np.dtype[Any]] = MappingProxyType(
    {
        pb.DATA_TYPE_UINT8: np.dtype("<u1"),
        pb.DATA_TYPE_UINT16: np.dtype("<u2"),
        pb.DATA_TYPE_UINT32: np.dtype("<u4"),
    }
)

RECONSTRUCTION_TYPES: Mapping[pb.DataType, np.dtype[Any]] = MappingProxyType(
    {pb.DATA_TYPE_FLOAT32: np.dtype("<f4")}
)

MAX_CODE = 2**32 - 1


def as_matrix(array: ArrayLike, what: str) -> tuple[NDArray[Any], bool]:
    """View ``array`` as rows; tell whether it was a single one.

    Parameters
    ----------
    array : array_like
        ``(n, m)``, or ``(m,)`` for a single row. Never copied if it is an array already.
    what : str
        What its rows are, for the message.

    Returns
    -------
    rows : numpy.ndarray
        ``(n, m)``.
    single : bool
        Whether ``array`` had one dimension.

    Raises
    ------
    InvalidInputError
        If it has another number of dimensions, rows of different lengths, or masked numbers.
    """
    try:
        rows = np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises all of them
        raise InvalidInputError(f"{what} do not form an array: {error}") from error
    if rows.ndim not in (1, 2):
        raise InvalidInputError(
            f"{what} are of type {type(array).__name__} and shape {rows.shape}; expected "
            "(rows, columns), or (columns,) for one row"
        )
    if rows.shape == (0,):
        raise InvalidInputError(
            f"{what} are empty and tell no width; no rows at all have shape (0, columns)"
        )
    if rows.dtype == object:
        raise InvalidInputError(
            f"{what} are objects of Python, perhaps a column of lists or arrays; make them one "
            "array of numbers first, such as by numpy.stack(column)"
        )
    single = rows.ndim == 1
    if single:
        rows = rows[np.newaxis]
    if isinstance(array, np.ndarray) and type(array) is not np.ndarray:
        _check_mask(array, rows.shape, what)
    return rows, single


def _check_mask(array: NDArray[Any], shape: tuple[int, ...], what: str) -> None:
    """Refuse masked numbers: what lies under the mask would be taken for a number."""
    masked = np.argwhere(np.ma.getmaskarray(array).reshape(shape))
    if len(masked):
        row, column = masked[0].tolist()
        raise InvalidInputError.at(row, f"number {column} is masked; {what} are whole rows")


def check_embedding_type(dtype: np.dtype[Any]) -> None:
    """Refuse numbers that are not embeddings: integers are mostly codes in the wrong place."""
    if dtype.name not in EMBEDDING_TYPES:
        raise InvalidInputError(
            f"embeddings are {dtype.name}; expected float32, float16, bfloat16 or float64: "
            "if these are embeddings, convert them first, such as by astype('float32')"
        )


def check_code_type(dtype: np.dtype[Any]) -> None:
    """Refuse numbers that are not codes, whatever their values."""
    if dtype.kind not in "iu":
        raise InvalidInputError(f"codes are {dtype.name}; expected an integer type")


def wire_form(rows: NDArray[Any]) -> tuple[pb.DataType, np.dtype[Any], NDArray[Any]]:
    """Return the contract's type of embeddings, numpy's of what is written, and them as such."""
    kind = EMBEDDING_TYPES[rows.dtype.name]
    if kind == pb.DATA_TYPE_BFLOAT16:
        rows = rows.view(np.uint16)  # numpy has no name for it; its bits are what is sent
    return kind, rows.dtype.newbyteorder("<"), rows


def embeddings_to_tensor(rows: NDArray[Any]) -> pb.Tensor:
    """Put embeddings ``(n, D)`` of any layout and byte order on the wire, in their own type."""
    kind, wire, rows = wire_form(rows)
    return _tensor(rows, kind, wire)


def codes_to_tensor(codes: NDArray[Any], first_row: int) -> pb.Tensor:
    """Put codes ``(n, l)`` of any integer type on the wire, in the smallest type that holds them.

    Raises
    ------
    InvalidInputError
        If a code is negative or above 2**32 - 1; it names the row, counted from ``first_row``.
    """
    largest = int(codes.max(initial=0))
    if (codes.dtype.kind == "i" and codes.min(initial=0) < 0) or largest > MAX_CODE:
        row, layer = (int(i) for i in np.argwhere((codes < 0) | (codes > MAX_CODE))[0])
        raise InvalidInputError.at(
            first_row + row,
            f"code {codes[row, layer]} of layer {layer} is out of range; "
            f"codes run from 0 to {MAX_CODE} at most",
        )
    kind = next(kind for kind, dtype in CODE_TYPES.items() if largest <= np.iinfo(dtype).max)
    return _tensor(codes, kind, CODE_TYPES[kind])


def _tensor(rows: NDArray[Any], kind: pb.DataType, wire: np.dtype[Any]) -> pb.Tensor:
    data = rows.astype(wire, copy=False).tobytes()  # tobytes is row-major whatever the layout
    return pb.Tensor(dtype=kind, shape=rows.shape, data=data)


def from_tensor(
    tensor: pb.Tensor, n_rows: int, types: Mapping[pb.DataType, np.dtype[Any]]
) -> NDArray[Any]:
    """Read an answer as a read-only array, little-endian; `ProtocolError` if it is not sound."""
    if tensor.dtype not in types:
        raise ProtocolError(f"the server answered with numbers of type {tensor.dtype}")
    dtype, shape, data = types[tensor.dtype], tuple(tensor.shape), tensor.data
    if len(shape) != 2 or shape[0] != n_rows or shape[1] < 0:  # noqa: PLR2004 -- a matrix
        raise ProtocolError(f"the server answered {n_rows} rows with shape {shape}")
    if len(data) != shape[0] * shape[1] * dtype.itemsize:
        raise ProtocolError(
            f"the server answered with {len(data)} bytes for shape {shape} of {dtype.name}"
        )
    return np.frombuffer(data, dtype).reshape(shape)
