"""Which row of the input a row is that Ray has read.

Ray packs row groups of several files into one task and hands on blocks in any order, even where
it is told to preserve the order of blocks. What tells a row is what ``read_parquet`` adds to it:
``path``, and with ``include_row_hash`` the number

    row_hash = mix(seed(path) + i)  (mod 2^64)

for row ``i`` of the file, where ``seed`` is the first 8 bytes of the path's MD5 and ``mix`` is the
finalizer of splitmix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), a bijection. So it is undone here. Another version of Ray that mixes in another way
cannot go unnoticed: its numbers would fall outside of the file, but for one in 2^64 / rows of it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from semid_client._errors import SemidClientError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FACTORS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
INVERSES: Final = tuple(pow(factor, -1, 1 << 64) for factor in FACTORS)


class ClusterError(SemidClientError):
    """The cluster cannot do the work, or did it in a way that is not understood."""


def seed(path: str) -> int:
    """Number from which Ray counts the rows of a file."""
    digest = hashlib.md5(path.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "little")


def unmixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Undo the finalizer of splitmix64."""
    found: NDArray[np.uint64] = numbers ^ (numbers >> np.uint64(31)) ^ (numbers >> np.uint64(62))
    found = found * np.uint64(INVERSES[1])
    found = found ^ (found >> np.uint64(27)) ^ (found >> np.uint64(54))
    found = found * np.uint64(INVERSES[0])
    found ^= (found >> np.uint64(30)) ^ (found >> np.uint64(60))
    return found


def indices(
    paths: Any, hashes: NDArray[np.uint64], files: Mapping[str, tuple[int, int]]
) -> NDArray[np.int64]:
    """Index in the whole input of each row.

    Parameters
    ----------
    paths : arrow array of strings
        Of the file of each row.
    hashes : uint64 (n,)
        Ray's number of each.
    files : dict
        For each path the index of its first row in the input, and its number of rows.

    Raises
    ------
    ClusterError
        A row is of none of the files, or its number is none of this file's.
    """
    encoded = paths.dictionary_encode()
    which = encoded.indices.to_numpy()
    rows = unmixed(hashes)
    found = np.empty(len(rows), np.int64)
    for i, path in enumerate(encoded.dictionary.to_pylist()):
        if path not in files:
            raise ClusterError(f"Ray read {path}, which is none of the files it was given")
        start, n_rows = files[path]
        here = which == i
        places = rows[here] - np.uint64(seed(path))
        if len(places) and int(places.max()) >= n_rows:
            raise ClusterError(
                f"{path} has {n_rows} rows, but Ray numbers one in a way that is not understood: "
                "use a version of Ray that semid is tested with (docker/constraints.txt)"
            )
        found[here] = places.astype(np.int64) + start
    return found
