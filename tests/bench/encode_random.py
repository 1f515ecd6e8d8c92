"""Random small models and rows made to break an encoder, and the codes that they must have.

Independent of the package on purpose: only numpy, and an arithmetic of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

DTYPES = ("float16", "bfloat16", "float32", "float64")
LEAKY_SLOPE = 0.01
NORM_EPS = 1e-12
GREATEST_LENGTH = 1e150
"""Of a row whose square float64 still holds."""


@dataclass(frozen=True, eq=False)
class Network:
    """Batch norm, L2 normalisation, and an MLP of piecewise linear activation."""

    mean: np.ndarray
    variance: np.ndarray
    gain: np.ndarray
    shift: np.ndarray
    eps: float
    normalize: bool
    weights: list[np.ndarray]
    biases: list[np.ndarray]
    activation: str


@dataclass(frozen=True, eq=False)
class Case:
    """A model in arrays, float32, and rows float64 (n, D) that ``dtype`` holds exactly."""

    seed: int
    codebooks: list[np.ndarray]
    normalize: bool
    network: Network | None
    dtype: str
    rows: np.ndarray

    @property
    def told(self) -> str:
        """What a failure should name."""
        widths = [len(codebook) for codebook in self.codebooks]
        kind = "normalised" if self.normalize else "raw residuals"
        return f"seed {self.seed}: {self.rows.shape[1]} x {widths}, {kind}, {self.dtype}"


def make(seed: int, *, network: bool = False, shape: tuple[int, int] | None = None) -> Case:
    """The case of a number: the same on every machine.

    ``shape`` fixes the numbers of features and layers, and that the widest layer has 40: what the
    kernels of a GPU are compiled for.
    """
    rng = np.random.default_rng(seed)
    dim = int(rng.choice([1, 2, 3, 5, 8, 13, 16, 31, 48]))
    n_layers = int(rng.integers(1, 6))
    width = int(rng.choice([3, 9, 40]))
    widths = [int(rng.integers(1, width + 1)) for _ in range(n_layers)]
    if shape is not None:
        dim, n_layers = shape
        widths = [40, *rng.integers(1, 41, size=n_layers - 1).tolist()]
    scale = 10.0 ** rng.choice([0, 0, 0, 0, -3, 3, -6, 6, -13, 12, -25, 25])
    codebooks = [codebook(rng, k, dim, scale) for k in widths]
    if n_layers > 1 and rng.random() < 0.2:
        # what the first layer leaves is close to nothing, or is a centroid again
        codebooks[1][: widths[0]] = -codebooks[0][: widths[1]]
    dtype = str(rng.choice(DTYPES))
    if network:
        net = random_network(rng, dim)
        rows = np.concatenate([rng.standard_normal((40, net.mean.size)), wild(rng, net.mean.size)])
        rows = to_type(rows, dtype)
        features = in_order(net, rows)
        some = features[rng.integers(len(rows), size=sum(widths))]
        some = some + rng.choice([0, 1e-9, 0.1]) * rng.standard_normal(some.shape)
        some = np.clip(np.nan_to_num(some), -1e30, 1e30)
        starts = np.cumsum([0, *widths])
        books = [
            (some[a:b] / (layer + 1)).astype(np.float32)
            for layer, (a, b) in enumerate(pairwise(starts))
        ]
        return Case(seed, books, bool(rng.random() < 0.2), net, dtype, rows)
    normalize = bool(rng.random() < 0.6)
    rows = np.concatenate([hard(rng, codebooks, dtype, normalize=normalize), wild(rng, dim)])
    return Case(seed, codebooks, normalize, None, dtype, to_type(rows, dtype))


def codebook(  # noqa: C901 - a list of characters
    rng: np.random.Generator, k: int, dim: int, scale: float
) -> np.ndarray:
    """Centroids float32 (k, dim) of one of several bad characters."""
    kind = rng.integers(9)
    found = rng.standard_normal((k, dim))
    if kind == 1:  # many exact ties
        found = rng.integers(-2, 3, (k, dim)).astype(float)
    elif kind == 2:  # neighbours in float32
        found = np.repeat(found[:1], k, axis=0).astype(np.float32)
        steps = rng.integers(-2, 3, (k, dim))
        for _ in range(2):
            found = np.where(steps > 0, np.nextafter(found, np.float32(np.inf)), found)
            found = np.where(steps < 0, np.nextafter(found, np.float32(-np.inf)), found)
            steps -= np.sign(steps)
    elif kind == 3:  # a tight group far from zero
        found = found[:1] * 10 + found * 1e-6
    elif kind == 4:  # lengths of all sizes
        found *= 10.0 ** rng.integers(-8, 4, (k, 1))
    elif kind == 5:  # most on one short centroid
        found *= np.where(np.arange(k) == rng.integers(k), 1e-3, 1.0)[:, None]
    elif kind == 6:  # all of one length: their norms decide nothing
        found /= np.linalg.norm(found, axis=1, keepdims=True)
    elif kind == 7:  # along one line
        found = found[:1] * rng.integers(-4, 5, (k, 1))
    if rng.random() < 0.3:
        found[rng.integers(k)] = 0.0
    if rng.random() < 0.3:
        found[rng.integers(k)] = found[rng.integers(k)]
    if rng.random() < 0.1:
        found[rng.integers(k)] *= -0.0
    return (found * scale).astype(np.float32)


def hard(
    rng: np.random.Generator, codebooks: list[np.ndarray], dtype: str, *, normalize: bool
) -> np.ndarray:
    """Rows on centroids, half way between two, at sums of several, each an ulp to both sides."""
    first = codebooks[0].astype(np.float64)
    if normalize:
        # a row has length 1 when the first layer sees it: a border there is that of directions
        sizes = np.linalg.norm(first, axis=1, keepdims=True)
        first = np.concatenate([first, first / np.where(sizes > 0, sizes, 1)])
    a, b = first[rng.integers(len(first), size=(2, 12))]
    middle = (a + b) / 2
    sums = a.copy()
    for layer in codebooks[1:]:
        sums = sums + layer[rng.integers(len(layer), size=12)] * rng.choice([1.0, 0.3])
    # a step along the border stays on it
    along = rng.standard_normal(middle.shape)
    across = b - a
    square = np.maximum((across * across).sum(axis=1, keepdims=True), 1e-300)
    with np.errstate(all="ignore"):
        along = along - (along * across).sum(axis=1, keepdims=True) / square * across
    shifted = middle + np.nan_to_num(along) * np.abs(middle).max(initial=0)
    found = [a, middle, sums, shifted, a * 3.7, a * 2.0**20, a + 1e-7 * b, a + 1e-12 * b]
    if normalize:
        found.append(middle * 10.0 ** rng.integers(-6, 6, (len(middle), 1)))
    rows = to_type(np.concatenate(found), dtype)
    return np.concatenate([rows, step(rng, rows, dtype, 1), step(rng, rows, dtype, -1)])


def wild(rng: np.random.Generator, dim: int) -> np.ndarray:
    """Rows of all sizes: zeros, subnormals, shorter than the clamp, spikes, huge."""
    random = rng.standard_normal((8, dim))
    direction = random / np.maximum(np.linalg.norm(random, axis=1, keepdims=True), 1e-300)
    spikes = np.zeros((4, dim))
    spikes[np.arange(4), rng.integers(dim, size=4)] = 3.0
    return np.concatenate(
        [
            random,
            np.zeros((2, dim)),
            -np.zeros((1, dim)),
            direction * rng.uniform(0.5, 1.5, (8, 1)) * NORM_EPS,
            direction * 10.0 ** rng.integers(-46, 38, (8, 1)),
            random * 10.0 ** rng.integers(-20, 12, (8, dim)),
            random * 1e-41,
            random * 1e-7,
            random[:2] * 1e300,
            random[:2] * 1e-310,
            spikes,
        ]
    )


def to_type(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a type, and leave out what is not finite there; as float64."""
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            bits = rows.astype(np.float32).view(np.uint32)
            rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            found = (rounded & np.uint32(0xFFFF0000)).view(np.float32)
            found = np.where(np.isfinite(rows.astype(np.float32)), found, np.float32(np.inf))
        else:
            found = rows.astype(dtype)
    found = found.astype(np.float64)
    return found[np.isfinite(found).all(axis=1)]


def step(rng: np.random.Generator, rows: np.ndarray, dtype: str, sign: int) -> np.ndarray:
    """Each row with one number of it moved by a unit in the last place of its type."""
    found = rows.copy()
    places = rng.integers(rows.shape[1], size=len(rows))
    at = np.arange(len(rows)), places
    picked = found[at]
    if dtype == "bfloat16":
        bits = picked.astype(np.float32).view(np.uint32)
        found[at] = (bits + np.uint32(sign * 0x10000 & 0xFFFFFFFF)).view(np.float32)
    else:
        towards = np.array(sign * np.inf, dtype=dtype)
        found[at] = np.nextafter(picked.astype(dtype), towards)
    return found[np.isfinite(found).all(axis=1)]


def random_network(rng: np.random.Generator, out: int) -> Network:
    """A network with ``out`` features."""
    dims = [int(rng.integers(1, 30)), *rng.integers(1, 25, size=rng.integers(1, 4)), out]
    dims = [int(dim) for dim in dims]
    scale = float(rng.choice([1.0, 1.0, 1e-3, 30.0]))

    def normal(*shape):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return Network(
        mean=rng.standard_normal(dims[0]).astype(np.float32),
        variance=rng.uniform(0.0, 2.0, dims[0]).astype(np.float32),
        gain=rng.standard_normal(dims[0]).astype(np.float32),
        shift=rng.standard_normal(dims[0]).astype(np.float32),
        eps=float(rng.choice([1e-5, 1e-3])),
        normalize=bool(rng.random() < 0.6),
        weights=[normal(b, a) for a, b in pairwise(dims)],
        biases=[normal(b) for b in dims[1:]],
        activation=str(rng.choice(["relu", "leaky_relu", "identity"])),
    )


def in_order(network: Network, rows: np.ndarray) -> np.ndarray:
    """Features float64 of rows float64, every sum in index order, every operation rounded once."""
    with np.errstate(all="ignore"):
        deviation = np.sqrt(network.variance.astype(np.float64) + network.eps)
        x = (rows - network.mean) / deviation * network.gain + network.shift.astype(np.float64)
        if network.normalize:
            x = x / np.maximum(length(x), NORM_EPS)[:, None]
        for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
            if i and network.activation == "relu":
                x = np.maximum(x, 0.0)
            elif i and network.activation == "leaky_relu":
                x = np.where(x >= 0, x, x * LEAKY_SLOPE)
            total = np.zeros((len(x), len(weight)))
            for feature in range(weight.shape[1]):
                total = total + x[:, feature, None] * weight[:, feature].astype(np.float64)
            x = total + bias
    return x


def length(rows: np.ndarray) -> np.ndarray:
    """Root of the sum of squares in index order."""
    total = np.zeros(len(rows))
    for i in range(rows.shape[1]):
        total = total + rows[:, i] * rows[:, i]
    return np.sqrt(total)


def codes_of(case: Case) -> np.ndarray:
    """Codes int64 (n, L) by the definition: float64, in order, the lowest index of equals."""
    residual = case.rows if case.network is None else in_order(case.network, case.rows)
    codes = []
    with np.errstate(all="ignore"):
        for table in case.codebooks:
            if case.normalize:
                residual = residual / np.maximum(length(residual), NORM_EPS)[:, None]
            distances = np.zeros((len(residual), len(table)))
            for i in range(residual.shape[1]):
                difference = residual[:, i, None] - table[:, i].astype(np.float64)
                distances = distances + difference * difference
            distances = np.where(np.isnan(distances), np.inf, distances)
            code = distances.argmin(axis=1)
            codes.append(code)
            residual = residual - table[code]
    return np.stack(codes, axis=1)


def excess(case: Case, codes: np.ndarray) -> np.ndarray:
    """How much farther than the nearest each chosen centroid is, in extended precision (n, L).

    In units of what float64 can tell apart there: a few at the most, if the codes are right. Rows
    whose lengths overflow, or vanish on the way, are left out as zeros.
    """
    residual = case.rows.astype(np.longdouble)
    blur = np.full(len(residual), 2.0**-53, dtype=np.longdouble)
    blur[np.sqrt((residual**2).sum(axis=1)) > GREATEST_LENGTH] = np.inf
    found = np.zeros(codes.shape)
    with np.errstate(all="ignore"):
        for layer, table in enumerate(case.codebooks):
            norm = np.sqrt((residual**2).sum(axis=1))
            if case.normalize:
                usable = norm > 1e-6 if layer else norm > 2 * NORM_EPS
                blur = np.where(usable, blur / np.where(layer, np.minimum(norm, 1), 1), np.inf)
                residual = residual / np.where(norm > 0, norm, 1)[:, None]
                norm = np.ones_like(norm)
            distances = ((residual[:, None] - table) ** 2).sum(axis=-1)
            chosen = np.take_along_axis(distances, codes[:, layer, None], axis=1)[:, 0]
            reach = norm + np.linalg.norm(table.astype(np.longdouble), axis=1).max()
            share = (chosen - distances.min(axis=1)) / (reach**2 * blur * (case.rows.shape[1] + 8))
            within = (reach < 1e140) & (reach > 1e-140) & np.isfinite(share)
            found[:, layer] = np.where(within, share, 0.0)
            residual = residual - table[codes[:, layer]]
    return found
