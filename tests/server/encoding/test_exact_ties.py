"""Rows on the border of two codes in exact arithmetic, at any layer, and models that are as bad.

Where `test_random_models` searches, this computes: 60 decimal digits find the border, and steps of
single units in the last place bring a row as near to it as its type can be, which is often far
nearer than one such unit. What the codes must be is said by a few lines of numpy of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

import encode_cases as cases
import numpy as np
import pytest
import torch

from semid_server.encoding import ReferenceEncoder
from semid_server.encoding.cpu import CpuEncoder, has_integer_product
from semid_server.encoding.plan import Plan

CPU = torch.device("cpu")
DTYPES = ("float16", "bfloat16", "float32", "float64")
DIGITS = {
    "float64": (53, -1074),
    "float32": (24, -149),
    "float16": (11, -24),
    "bfloat16": (8, -133),
}
FEW = range(6)
MANY = range(100, 2100)
SHARES = 8
TIES = 6


@dataclass(frozen=True, eq=False)
class Case:
    """Codebooks float32 ``(K_l, D)`` and whether residuals are normalised."""

    rng: np.random.Generator
    codebooks: list[np.ndarray]
    normalize: bool

    @classmethod
    def of(cls, seed: int) -> Case:
        rng = np.random.default_rng([seed, 77])
        dim = int(rng.choice([1, 2, 3, 4, 6, 7, 11, 17]))
        n_layers = int(rng.choice([1, 2, 3, 4, 8]))
        normalize = bool(rng.random() < 0.6)
        alike = rng.random() < 0.5
        scale = 10.0 ** rng.integers(-6, 10) if not normalize or rng.random() < 0.3 else 1.0
        codebooks: list[np.ndarray] = []
        for _ in range(n_layers):
            width = int(rng.choice([1, 2, 3, 5, 8, 20]))
            before = codebooks[-1] if codebooks else None
            table = codebook(rng, width, dim, before)
            # layers of their own sizes, or of one
            own = 1.0 if alike else 10.0 ** rng.uniform(-6, 6)
            codebooks.append((table * own * scale).astype(np.float32))
        return cls(rng, codebooks, normalize)

    @property
    def dim(self) -> int:
        return self.codebooks[0].shape[1]

    def rows(self, dtype: str) -> np.ndarray:
        """Rows float64 (n, D) that ``dtype`` holds exactly."""
        found = [np.zeros((0, self.dim))]
        for _ in range(TIES):
            start = self._start(dtype)
            if np.isfinite(start).all() and start.any():
                found.append(self._ties(start, dtype))
        return np.concatenate(found)

    def _start(self, dtype: str) -> np.ndarray:
        """A row whose residuals are small at the deeper layers, or any row."""
        rng = self.rng
        row = rng.standard_normal(self.dim)
        if rng.random() < 0.6:
            row = row * 10.0 ** rng.uniform(-9, 1)
            row = row + sum(
                table[rng.integers(len(table))].astype(float) for table in self.codebooks
            )
        else:
            row = row * np.linalg.norm(self.codebooks[0].astype(float), axis=1).max()
        if self.normalize and rng.random() < 0.5:
            row = row * 10.0 ** rng.uniform(-5, 5)
        return rounded(row, dtype)

    def _ties(self, start: np.ndarray, dtype: str) -> np.ndarray:
        """Rows about the border of two centroids of a layer, near ``start``."""
        rng, layer = self.rng, int(self.rng.integers(len(self.codebooks)))
        path = codes_of(start[None], self.codebooks, normalize=self.normalize)[0, : layer + 1]
        table = exact(self.codebooks[layer])
        with localcontext() as context:
            context.prec, context.Emax, context.Emin = 60, 10**9, -(10**9)
            residual = self._residual(exact(start), path[:-1])
            if residual is None:
                return start[None]
            distances = [square_distance(residual, centroid) for centroid in table]
            others = [
                j for j in np.argsort(distances) if j != path[-1] and table[j] != table[path[-1]]
            ]
            if not others:
                return start[None]
            rival = others[0] if rng.random() < 0.7 else others[rng.integers(len(others))]

            def gap(row: list[Decimal]) -> Decimal | None:
                left = self._residual(row, path[:-1])
                if left is None:
                    return None
                return square_distance(left, table[rival]) - square_distance(left, table[path[-1]])

            middle = border(exact(start), table[path[-1]], table[rival], gap)
            if middle is None:
                return start[None]
            return nearest(rng, rounded(np.array(middle, dtype=float), dtype), gap, dtype)

    def _residual(self, row: list[Decimal], path: np.ndarray) -> list[Decimal] | None:
        """Residual before the layer after ``path``; None if there is nothing to normalise."""
        residual = row
        for layer in range(len(path) + 1):
            if self.normalize:
                length = sum((x * x for x in residual), Decimal(0)).sqrt()
                if not length:
                    return None
                residual = [x / length for x in residual]
            if layer < len(path):
                centroid = exact(self.codebooks[layer][path[layer]])
                residual = [x - c for x, c in zip(residual, centroid, strict=True)]
        return residual


def codebook(
    rng: np.random.Generator, width: int, dim: int, before: np.ndarray | None
) -> np.ndarray:
    """Centroids (width, dim) of one of several bad characters."""
    table = rng.standard_normal((width, dim))
    kind = rng.integers(8)
    if kind == 0:  # of hugely different lengths
        table = table * 10.0 ** rng.uniform(-12, 0, (width, 1))
    elif kind == 1:  # a tight group
        table = table[:1] + table * 10.0 ** rng.uniform(-9, -5)
    elif kind == 2:  # pairs that differ by a unit in the last place
        table = np.repeat(table[: (width + 1) // 2], 2, axis=0)[:width].astype(np.float32)
        place = rng.integers(dim)
        table[1::2, place] = np.nextafter(table[1::2, place], np.float32(np.inf))
    elif kind == 3:  # many exact ties
        table = np.round(table * 4) / 4
    elif kind == 4 and before is not None:  # what is left vanishes, nearly, or is a centroid again
        again = -before.astype(float) * rng.choice([1, 1 - 1e-7, 0.5])
        table = np.concatenate([again, table])[:width]
    elif kind == 5:  # all of one length
        table = table / np.linalg.norm(table, axis=1, keepdims=True)
    elif kind == 6:  # short
        table = table * 1e-5
    return table


def border(start, chosen, rival, gap):
    """Where the line from ``start`` towards ``rival`` meets the border; None if it does not."""
    direction = [b - a for a, b in zip(chosen, rival, strict=True)]
    length = sum((x * x for x in direction), Decimal(0)).sqrt()
    size = sum((x * x for x in start), Decimal(0)).sqrt() / length

    def at(t):
        return [x + t * size * d for x, d in zip(start, direction, strict=True)]

    low, of_low = Decimal(0), gap(start)
    high = Decimal("0.01")
    for _ in range(12):
        of_high = gap(at(high))
        if of_high is None or of_high * of_low <= 0:
            break
        high *= 2
    if of_high is None or of_high * of_low > 0:
        return None
    for _ in range(60):  # regula falsi, the Illinois way
        if of_high == of_low or abs(of_high) < Decimal(10) ** -45:
            break
        between = high - of_high * (high - low) / (of_high - of_low)
        of_between = gap(at(between))
        if not of_between:
            break
        if of_between * of_high < 0:
            low, of_low = high, of_high
        else:
            of_low /= 2
        high, of_high = between, of_between
    return at(high)


def nearest(rng, row, gap, dtype):
    """``row``, and on the way to where no unit in the last place of it brings less of a gap."""
    found = [row]
    if not np.isfinite(row).all():
        return np.zeros((0, len(row)))
    now = gap(exact(row))
    units = [unit(x, dtype) for x in row]
    slopes = []
    for i in range(len(row)):
        moved = gap(exact(row + np.eye(len(row))[i] * units[i]))
        slopes.append(Decimal(0) if moved is None or now is None else moved - now)
    for i in sorted(range(len(row)), key=lambda i: -abs(slopes[i])):
        if not slopes[i]:
            continue
        steps = max(-1000, min(1000, int((-now / slopes[i]).to_integral_value())))
        moved = found[-1].copy()
        moved[i] = rounded(moved[i : i + 1] + steps * units[i], dtype)[0]
        left = gap(exact(moved)) if np.isfinite(moved[i]) else None
        if left is not None and abs(left) < abs(now):
            now = left
            found.append(moved)
    for _ in range(4):
        moved = found[-1].copy()
        i = rng.integers(len(row))
        moved[i] = rounded(moved[i : i + 1] + rng.choice([-1, 1]) * units[i], dtype)[0]
        found.append(moved)
    found = np.stack(found)
    return found[np.isfinite(found).all(axis=1)]


def exact(numbers):
    """The numbers as decimals, of one row or of several."""
    if numbers.ndim == 1:
        return [Decimal(float(x)) for x in numbers]
    return [exact(row) for row in numbers]


def square_distance(a, b):
    return sum(((x - y) ** 2 for x, y in zip(a, b, strict=True)), Decimal(0))


def rounded(numbers, dtype):
    if dtype == "bfloat16":
        return torch.from_numpy(numbers).to(torch.bfloat16).double().numpy()
    with np.errstate(over="ignore"):
        return numbers.astype(dtype).astype(np.float64)


def unit(number, dtype):
    """A unit in the last place of a number of that type."""
    bits, least = DIGITS[dtype]
    if number == 0:
        return 2.0 ** max(least, -200)
    return 2.0 ** max(math.frexp(abs(number))[1] - bits, least)


def codes_of(rows, codebooks, *, normalize):
    """Codes int64 (n, L) by the definition: float64, in order, the lowest index of equals."""
    residual, codes = rows.astype(np.float64), []
    for table in codebooks:
        if normalize:
            squares = np.zeros(len(residual))
            for column in residual.T:
                squares = squares + column * column
            residual = residual / np.maximum(np.sqrt(squares), 1e-12)[:, None]
        distances = np.zeros((len(residual), len(table)))
        for column, feature in zip(residual.T, table.T.astype(np.float64), strict=True):
            difference = column[:, None] - feature
            distances = distances + difference * difference
        codes.append(distances.argmin(axis=1))
        residual = residual - table[codes[-1]].astype(np.float64)
    return np.stack(codes, axis=1)


def check(seed: int) -> tuple[int, int]:
    """Hold every encoder that a CPU has to the definition; return rows, and those not decided."""
    case = Case.of(seed)
    model, spec = cases.model_of(
        [torch.from_numpy(table) for table in case.codebooks], normalize=case.normalize
    )
    products = [False, True] if has_integer_product() else [False]
    encoders = {
        f"{'int16' if integer else 'float32'}, {threads} threads": CpuEncoder(
            model, spec, threads=threads, integer_product=integer, share=1
        )
        for integer in products
        for threads in (1, 3)
    }
    encoders["reference"] = ReferenceEncoder(model, spec, device=CPU, threads=2)
    for dtype in DTYPES:
        rows = case.rows(dtype)
        want = codes_of(rows, case.codebooks, normalize=case.normalize)
        typed = torch.from_numpy(rows).to(getattr(torch, dtype))
        wide = torch.zeros(2 * len(rows), 2 * case.dim + 3, dtype=typed.dtype)
        strided = wide[::2, 1 : 2 * case.dim + 1 : 2]
        strided.copy_(typed)
        for name, encoder in encoders.items():
            ways = {"": encoder.encode(typed)}
            if name.endswith("1 threads"):
                ways[", strided"] = encoder.encode(strided)
                ways[", transposed"] = encoder.encode(typed.T.contiguous().T)
                alone = [encoder.encode(row[None]) for row in typed]
                ways[", one by one"] = torch.cat([encoder.encode(typed[:0]), *alone])
            for how, codes in ways.items():
                wrong = np.flatnonzero((codes.numpy() != want).any(axis=1))
                assert not len(wrong), (
                    f"seed {seed}, {dtype}, {name}{how}: row {rows[wrong[0]].tolist()} has codes "
                    f"{codes[wrong[0]].tolist()}, by the definition {want[wrong[0]].tolist()}"
                )
        check_twins(seed, model, spec, typed, want)
    counts = encoders["float32, 1 threads"].counts()
    return counts.rows, counts.reference


def check_twins(seed, model, spec, rows, want):
    """What the certificate and the float64 step of the GPU take for known is right."""
    gpu = pytest.importorskip("semid_server.encoding.gpu", reason="needs Triton")
    twins = pytest.importorskip("semid_server.encoding.gpu_twins")
    plan = Plan.of(spec, model.state_dict(), CPU)
    if not plan.within_range:
        return
    tables = gpu.Tables.of(plan)
    halves, facts = twins.round_rows(rows, tables.columns.shape[1])
    codes, proved = twins.prove(halves.float() @ tables.columns.float().T, facts, tables)
    assert np.array_equal(codes[proved], want[proved.numpy()]), seed
    codes, decided = twins.decide(rows, facts, tables)
    assert np.array_equal(codes[decided], want[decided.numpy()]), seed


def test_rows_on_exact_borders_have_the_codes_of_the_definition():
    counted = np.array([check(seed) for seed in FEW]).sum(axis=0)
    rows, reference = counted
    # so near that float64 in any other order could not tell
    assert rows > 800
    assert reference > rows // 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(20, 24))
def test_rows_on_exact_borders_have_the_codes_of_the_definition_on_a_device(seed):
    gpu = pytest.importorskip("semid_server.encoding.gpu", reason="needs Triton")
    case = Case.of(seed)
    model, spec = cases.model_of(
        [torch.from_numpy(table) for table in case.codebooks], normalize=case.normalize
    )
    device = torch.device("cuda", 0)
    encoder = gpu.GpuEncoder(model, spec, device=device)
    for dtype in ("float32", "float64"):
        rows = case.rows(dtype)
        want = torch.from_numpy(codes_of(rows, case.codebooks, normalize=case.normalize))
        typed = torch.from_numpy(rows).to(getattr(torch, dtype))
        assert torch.equal(encoder.encode(typed).long(), want)
        assert torch.equal(encoder.encode(typed.to(device)).cpu().long(), want)
        alone = [encoder.encode(row[None].to(device)).cpu() for row in typed]
        assert torch.equal(torch.cat(alone).long(), want)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("share", range(SHARES))
def test_many_rows_on_exact_borders_have_the_codes_of_the_definition(share):
    for seed in MANY[share::SHARES]:
        check(seed)
