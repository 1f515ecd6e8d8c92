"""Whether the embeddings still look like those that the codebooks were made for.

Codes keep coming out when embeddings have drifted, but fewer of them are used and what the layers
leave grows. Both are watched over a sliding window, beside serving: counting codes costs a pass
over them, and the error is taken of a few rows of each batch.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types

from semid_server.encoding.compiled import compiled
from semid_server.model import NORM_EPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

WINDOW_ROWS = 1 << 17
"""Rows that the figures speak of: the last so many, or up to a sixteenth more; or, where batches
are larger than that, up to one of them more."""

SAMPLED_ROWS = 8
"""Rows of one batch whose error is taken, at most: few enough for torch to wake no other thread."""

SAMPLED_SHARE = 1 / 512
"""Share of all rows whose error is taken, 256 of a window: in float64, by code that nothing else
keeps in the caches."""

_PARTS = 16

_BATCHES = 64
"""Batches whose codes are counted together, at most: counting costs more than a few codes do."""


@dataclass(frozen=True, slots=True)
class LayerDrift:
    """What a window tells of one layer; the sum of two tells of both windows.

    Attributes
    ----------
    counts : int64 (K,)
        Rows of the window that chose each centroid.
    entering, left : float
        Sums over sampled rows of the squared length of what the layer gets, and of what it leaves.
    """

    counts: npt.NDArray[np.int64]
    entering: float
    left: float

    @property
    def perplexity(self) -> float:
        """``exp`` of the entropy of its codes: so many, used equally, would be as unpredictable."""
        shares = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def dead_codes(self) -> int:
        """Centroids that no row of the window chose."""
        return int((self.counts == 0).sum())

    @property
    def error(self) -> float:
        """Share of the squared length of what it gets that it leaves."""
        # Rows of zeros alone leave nothing of nothing.
        return self.left / self.entering if self.entering > 0 else 0.0

    def __add__(self, other: LayerDrift) -> LayerDrift:
        return LayerDrift(
            self.counts + other.counts, self.entering + other.entering, self.left + other.left
        )


def add_windows(windows: Iterable[Sequence[LayerDrift]]) -> Sequence[LayerDrift]:
    """Return what windows of several processes tell together, by layer.

    While a new version replaces another, they may be of both: of those that have other layers or
    widths than the first, nothing is told until they have gone.
    """
    told = [window for window in windows if window]
    fitting = [window for window in told if _widths(window) == _widths(told[0])]
    return [reduce(add, layers) for layers in zip(*fitting, strict=True)]


def _widths(window: Sequence[LayerDrift]) -> list[int]:
    return [len(layer.counts) for layer in window]


@dataclass(slots=True)
class _Part:
    rows: int
    counts: list[npt.NDArray[np.int64]]
    entering: npt.NDArray[np.float64]
    left: npt.NDArray[np.float64]


class DriftWatch:
    """Code usage and quantisation error of one model, by layer, over the last rows served.

    `observe` is called by the thread that encodes, `summary` by any.

    Parameters
    ----------
    codebooks : sequence of numpy.ndarray
        float32 ``(K_l, E)`` of each layer, contiguous.
    normalize_residuals : bool
        As in the model.
    features : callable
        From rows ``(n, D)`` to numbers ``(n, E)``: what the first layer gets.
    window_rows : int
        See `WINDOW_ROWS`.
    """

    def __init__(
        self,
        codebooks: Sequence[npt.NDArray[np.float32]],
        *,
        normalize_residuals: bool,
        features: Callable[[Any], npt.NDArray[np.floating[Any]]],
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        self._codebooks, self._normalize = codebooks, normalize_residuals
        self._features = features
        self._window_rows, self._part_rows = window_rows, max(1, window_rows // _PARTS)
        self._parts: deque[_Part] = deque()
        self._rows = 0
        self._lock = threading.Lock()
        self._nothing = np.zeros(len(codebooks))
        self._uncounted: list[npt.NDArray[Any]] = []
        self._uncounted_rows = 0
        self._entering = self._left = self._nothing

    def observe(
        self,
        codes: npt.NDArray[Any],
        sample: Any = None,
        sample_codes: npt.NDArray[Any] | None = None,
    ) -> None:
        """Count ``codes`` (n, L) of a batch, and take the error of ``sample`` rows with theirs.

        The codes are kept, and counted with those of other batches when there are enough.
        """
        errors = None
        if sample_codes is not None and len(sample_codes):
            errors = self._squared_lengths(sample, sample_codes)
            if not np.isfinite(errors).all():  # of numbers whose squares are none
                errors = None
        with self._lock:
            self._uncounted.append(codes)
            self._uncounted_rows += len(codes)
            if errors is not None:
                self._entering = self._entering + errors[0]
                self._left = self._left + errors[1]
            if self._uncounted_rows >= self._part_rows // 2 or len(self._uncounted) >= _BATCHES:
                self._count()

    def _count(self) -> None:
        """Add what was observed to the newest part; the lock is held."""
        codes = np.concatenate(self._uncounted)
        self._uncounted.clear()
        self._uncounted_rows = 0
        counts = [
            np.bincount(codes[:, layer], minlength=len(codebook))
            for layer, codebook in enumerate(self._codebooks)
        ]
        if not self._parts or self._parts[-1].rows + len(codes) > self._part_rows:
            empty = [np.zeros_like(count) for count in counts]
            self._parts.append(_Part(0, empty, self._nothing, self._nothing))
        part = self._parts[-1]
        part.rows += len(codes)
        self._rows += len(codes)
        while self._rows - self._parts[0].rows >= self._window_rows:
            self._rows -= self._parts.popleft().rows
        part.counts = [a + b for a, b in zip(part.counts, counts, strict=True)]
        part.entering = part.entering + self._entering
        part.left = part.left + self._left
        self._entering = self._left = self._nothing

    def summary(self) -> list[LayerDrift]:
        """Return what there is to tell of each layer, or nothing while no row was seen."""
        with self._lock:
            if self._uncounted:
                self._count()
            if not self._parts:
                return []
            by_layer = zip(*(part.counts for part in self._parts), strict=True)
            counts = [np.sum(layer, axis=0) for layer in by_layer]
            entering = np.sum([part.entering for part in self._parts], axis=0)
            left = np.sum([part.left for part in self._parts], axis=0)
        return [
            LayerDrift(count, float(gets), float(leaves))
            for count, gets, leaves in zip(counts, entering, left, strict=True)
        ]

    def _squared_lengths(
        self, rows: Any, codes: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Sums over ``rows`` of the squared length of what each layer gets and leaves."""
        # Its own array, which the layers change.
        residual = np.array(self._features(rows), np.float64, order="C")
        columns = np.ascontiguousarray(codes.T, np.int64)
        entering, left = np.zeros(len(self._codebooks)), np.zeros(len(self._codebooks))
        for layer, codebook in enumerate(self._codebooks):
            sums = _subtract(residual, codebook, columns[layer], self._normalize)
            entering[layer], left[layer] = sums
        return entering, left


_pair: Any = types.Tuple  # numba annotates it with nothing


# The sums may be in any order: no code depends on them. In numpy each step is a pass of its own
# over arrays made for it, which together took as long as serving the requests of the rows.
@compiled(
    [
        _pair((types.float64, types.float64))(
            types.Array(types.float64, 2, "C"),
            types.Array(types.float32, 2, "C", readonly=True),
            types.Array(types.int64, 1, "C", readonly=True),
            types.boolean,
        )
    ],
    nogil=True,
    fastmath={"reassoc", "contract"},
)
def _subtract(
    residual: Any,
    codebook: Any,
    codes: Any,
    normalize: bool,  # noqa: FBT001 - numba has no keyword-only arguments
) -> tuple[float, float]:
    """Normalise ``residual`` (n, E) if asked, and subtract the centroids; squared lengths of it."""
    entering = left = 0.0
    for row in range(len(residual)):
        r, centroid = residual[row], codebook[codes[row]]
        squared = 0.0
        for i in range(len(r)):
            squared += r[i] * r[i]
        scale = 1.0
        if normalize:
            scale = 1 / max(math.sqrt(squared), NORM_EPS)
        entering += squared * scale * scale
        for i in range(len(r)):
            difference = r[i] * scale - centroid[i]
            r[i] = difference
            left += difference * difference
    return entering, left
