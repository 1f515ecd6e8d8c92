"""The reference's inner loop on the CPU, compiled: float64, in order, nothing fused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from semid_server.encoding.compiled import compiled
from semid_server.model import NORM_EPS

if TYPE_CHECKING:
    import numpy.typing as npt


# Without `fastmath` LLVM may neither reorder a sum nor fuse a product with it: the loop over
# centroids is vectorised, the loop over features runs in order.
@compiled(nogil=True)
def assign(
    residual: npt.NDArray[np.float64],
    codebook: npt.NDArray[np.float32],
    normalize: bool,  # noqa: FBT001 - numba has no keyword-only arguments
    codes: npt.NDArray[np.int64],
) -> None:
    """One layer: normalise ``residual`` (n, E) if asked, set ``codes`` (n,), subtract.

    ``codebook`` is float32 ``(E, K)``, transposed, widened without loss. Each sum runs over
    features in index order.
    """
    n, dim = residual.shape
    width = codebook.shape[1]
    distances = np.empty(width)
    for row in range(n):
        r = residual[row]
        if normalize:
            total = 0.0
            for i in range(dim):
                total += r[i] * r[i]
            norm = max(math.sqrt(total), NORM_EPS)
            for i in range(dim):
                r[i] /= norm
        distances[:] = 0.0
        for i in range(dim):
            value = r[i]
            column = codebook[i]
            for k in range(width):
                difference = value - np.float64(column[k])
                distances[k] += difference * difference
        best, code = np.inf, 0
        for k in range(width):
            if distances[k] < best:
                best, code = distances[k], k
        codes[row] = code
        for i in range(dim):
            r[i] -= np.float64(codebook[i, code])
