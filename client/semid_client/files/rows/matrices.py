"""Matrices: a part of a file that is rows of numbers, one after another."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from semid_client.files._extras import need, tensor_files
from semid_client.files.npy import Matrix
from semid_client.files.places import Place, place
from semid_client.files.rows.source import Block, Source, What, reading, the_one

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from semid_client.files.memory import Memory

SAFETENSORS_HEADER: Final = 100_000_000
"""Bytes that the header of a ``.safetensors`` file may have."""

SAFETENSORS_TYPES: Final = {
    **{f"F{8 * n}": f"<f{n}" for n in (2, 4, 8)},
    **{f"I{8 * n}": f"<i{n}" for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": f"<u{n}" for n in (1, 2, 4, 8)},
}


class MatrixRows(Source):
    """Rows of a matrix that can be read by slices.

    Parameters
    ----------
    path : str
        Its file.
    what : "embeddings" or "codes"
        What the rows are.
    matrix : object
        Has ``shape``, ``dtype`` and slices of rows, and reads some into memory.
    """

    def __init__(self, path: str, what: What, matrix: Any) -> None:
        super().__init__()
        self.path, self._matrix, self._place = path, matrix, place(path)
        self.n_rows, self.width = matrix.shape
        self.dtype = matrix.dtype
        self.metadata = getattr(matrix, "metadata", {})
        if what == "codes" and "semid.unique" in self.metadata:
            self.extra_digit = self.metadata["semid.unique"] != "none"

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read slice by slice."""
        assert self.n_rows is not None  # noqa: S101 -- a matrix has a shape
        for at in range(start, self.n_rows, n_rows):
            yield Block(at, self._matrix[at : min(at + n_rows, self.n_rows)])

    def read(self, start: int, stop: int, memory: Memory) -> NDArray[Any]:
        """Read rows ``start`` to ``stop - 1`` into ``memory``, which is theirs and `SLACK` more.

        Several threads may do that at once.
        """
        rows: NDArray[Any] = self._matrix.read(start, stop, memory)
        return rows

    def places(self) -> list[Place]:
        """The one file."""
        return [self._place]

    def close(self) -> None:
        """Close the matrix, where it can be."""
        close = getattr(self._matrix, "close", None)
        if close is not None:
            close()


class PtRows(MatrixRows):
    """Rows of a tensor in a file of `torch.save`; from a store, a copy of it is made first."""

    def __init__(self, path: str, what: What, column: str | None) -> None:
        files = tensor_files(path)
        with ExitStack() as stack:
            found = place(path)
            found.open().close()  # or torch says what is missing, and much more
            copy = stack.enter_context(found.on_disk())
            super().__init__(path, what, files.read(copy, what, column, name=path))
            self.extra_digit = what == "codes"
            self._copy = stack.pop_all()

    def close(self) -> None:
        """Remove the copy, if there is one."""
        self._copy.close()


class SafetensorsMatrix(Matrix):
    """A tensor of a ``.safetensors`` file, whose header tells where its numbers are.

    Read here, for the library takes a file of a store as a whole: eight bytes of the header's
    length, a JSON object, the numbers (https://github.com/huggingface/safetensors#format).
    """

    def __init__(self, path: str, column: str | None) -> None:
        super().__init__(path)
        try:
            with reading(path, "safetensors"):
                self._read_header(column)
        except BaseException:
            self.close()
            raise

    def _read_header(self, column: str | None) -> None:
        length = int.from_bytes(self.head(8), "little")
        if not 0 < length <= min(SAFETENSORS_HEADER, self._file.size - 8):
            raise ValueError(f"its header of {length} bytes is not there")
        tensors = json.loads(self.head(length, 8))
        self.metadata = {
            key: str(value)
            for key, value in tensors.pop("__metadata__", {}).items()
            if key.startswith("semid.")
        }
        matrices = [name for name, tensor in tensors.items() if len(tensor["shape"]) == 2]  # noqa: PLR2004 -- a matrix
        name = the_one(self.name, "two-dimensional tensors", matrices, column)
        tensor, (start, stop) = tensors[name], tensors[name]["data_offsets"]
        if tensor["dtype"] == "BF16":
            dtype = np.dtype(need("ml_dtypes", self.name).bfloat16)
        elif tensor["dtype"] in SAFETENSORS_TYPES:
            dtype = np.dtype(SAFETENSORS_TYPES[tensor["dtype"]])
        else:
            raise ValueError(f"tensor {name!r} is of {tensor['dtype']}; expected numbers")
        shape = (*map(int, tensor["shape"]),)
        if min(shape) < 0 or stop - start != shape[0] * shape[1] * dtype.itemsize:
            raise ValueError(f"tensor {name!r} of shape {shape} does not take {stop - start}")
        self._store(shape, dtype, 8 + length + int(start))
