"""The fast path on the CPU: one certified product for all layers, then a compiled chain."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba.core.registry import cpu_target

from semid_server.encoding import cpu_kernels
from semid_server.encoding.network import Network
from semid_server.encoding.plan import UNIT32, Plan
from semid_server.encoding.protocol import EncodeCounts, code_dtype_of
from semid_server.encoding.reference import ReferenceEncoder
from semid_server.encoding.rows import AtOnce, checked, default_threads, spans
from semid_server.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from torch import Tensor, nn

    from semid_server.model import ModelSpec

    Array = npt.NDArray[Any]

_BLOCK_BYTES = 1 << 19
"""Rounded rows and products of a block stay in a core's own cache with this."""

_CHUNK = 4096
"""Rows that float32 products, or the network, work on at once."""

_SHARE = 4.5e7
"""Products of numbers that make a share of work: about 0.3 ms, some times what it takes to hand it
to another thread."""

_FEW_PRODUCTS = 8e6
"""Products of numbers up to which they are `cpu_kernels.multiply`'s, at most 0.3 to 0.4 ms: the
library's product first wakes threads, which takes 0.2, and longer where they have to wait for a
processor."""

_WIDEST_INTEGER = 1 << 16
"""Features up to which the int16 product cannot overflow (BOUNDS.md, "Rounding to integers")."""


_LEAST_STEP = 2.0**-100
"""Centroids that would need a finer step are rounded to zeros, at an error of their length."""

_PROBED = (1, 16, 256)
_PROBED_COLUMNS = 1024
"""Rows and columns that the float32 product is tried with: the library has several kernels."""


def has_integer_product() -> bool:
    """Whether numba compiles for a processor with the instruction of the int16 product.

    That is the one it runs on, unless ``NUMBA_CPU_NAME`` and the like say otherwise.
    """
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return "+avx512vnni" in features.split(",")


class CpuEncoder(AtOnce):
    """Codes of the reference, from one matrix product for all layers and a certificate.

    The product is of int16 where the processor has AVX512-VNNI, else of float32. Rows that the
    certificate does not prove are decided by float64 distances of their candidates, and the few
    that those cannot tell apart by `ReferenceEncoder`.

    Calls of several threads may overlap: they share nothing but the counts, which may miss some.

    Parameters
    ----------
    model : nn.Module
        Its weights are copied.
    spec : ModelSpec
        Its shape.
    threads : int, optional
        At most so many threads; all processors by default.
    integer_product : bool, optional
        Which product to use; the faster one that works here by default.
    share : float
        Products of numbers that are worth another thread.

    Raises
    ------
    ConfigurationError
        If the float32 product is needed, and is less exact here than BOUNDS.md takes it to be.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        *,
        threads: int | None = None,
        integer_product: bool | None = None,
        share: float = _SHARE,
    ) -> None:
        device = torch.device("cpu")
        state = model.state_dict()
        plan = Plan.of(spec, state, device)
        self._spec = spec
        self._threads = threads or default_threads()
        self._network = Network.of(spec, state, device)
        self._reference = ReferenceEncoder(model, spec, device=device, threads=threads)
        self._within_range = plan.within_range
        if integer_product is None:
            integer_product = has_integer_product()
        self._product: _IntegerProduct | _FloatProduct = (
            _IntegerProduct(plan)
            if integer_product and plan.dim <= _WIDEST_INTEGER
            else _FloatProduct(plan)
        )
        self._tables = _tables(plan, self._product)
        self._least_share = math.ceil(share / (plan.dim * plan.offsets[-1]))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="semid-encode")
        self._counts = EncodeCounts()
        self._code_type = np.dtype(f"u{spec.code_bits // 8}")

    @property
    def input_dim(self) -> int:
        """``D``, numbers in a row."""
        return self._spec.input_dim

    @property
    def n_layers(self) -> int:
        """``L``, codes of a row."""
        return self._spec.n_layers

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest of uint8, uint16 and uint32 that holds every code."""
        return code_dtype_of(self._spec)

    def counts(self) -> EncodeCounts:
        """Rows decided at each level so far."""
        return self._counts

    def warm_up(self) -> None:
        """Compile the loops, for both types of rows that they know."""
        before = self._counts
        for dtype in (torch.float32, torch.float64):
            self.encode(torch.ones(1, self.input_dim, dtype=dtype))
        self._reference.warm_up()
        self._counts = before

    def encode(self, rows: Tensor) -> Tensor:
        """Codes ``(n, L)`` of ``rows`` (n, D); see `Encoder.encode`."""
        return torch.from_numpy(self._codes(self._without_torch(rows)))

    def prepare(self, rows: Tensor) -> Callable[[], Array]:
        """Return what encodes ``rows`` (n, D) whenever it is called; see `Encoder.prepare`."""
        return partial(self._codes, self._without_torch(rows))

    def _without_torch(self, rows: Tensor) -> Tensor | Array:
        """Return rows as numpy has them, if nothing has to be done to them that torch does."""
        checked(rows, self.input_dim)
        plain = self._network is None and rows.dtype in {torch.float32, torch.float64}
        return rows.numpy() if plain else rows

    def _codes(self, rows: Tensor | Array) -> Array:
        n = len(rows)
        codes = np.empty((n, self.n_layers), dtype=np.int64)
        levels = np.full(n, cpu_kernels.REFERENCE, dtype=np.uint8)
        if n and self._within_range:
            # spread evenly over the threads, in blocks of which each thread finishes many
            size = self._threads * min(_CHUNK, -(-n // self._threads))
            if n <= size:  # without views, which take as long as the loops do for a row
                self._encode_chunk(rows, codes, levels)
            else:
                for start, stop in spans(n, size):
                    self._encode_chunk(rows[start:stop], codes[start:stop], levels[start:stop])
        fast, float64, undecided = np.bincount(levels, minlength=cpu_kernels.REFERENCE + 1).tolist()
        if undecided:
            left = np.flatnonzero(levels == cpu_kernels.REFERENCE)
            # equal rows, such as those of zeros for items without an embedding, are decided once
            distinct, which = torch.unique(
                torch.as_tensor(rows)[torch.from_numpy(left)].double(), dim=0, return_inverse=True
            )
            codes[left] = self._reference.codes(distinct)[which].numpy()
        self._counts += EncodeCounts(fast, float64, undecided)
        return codes.astype(self._code_type)

    def _encode_chunk(self, rows: Tensor | Array, codes: Array, levels: Array) -> None:
        n = len(rows)
        offsets = np.zeros(n)
        if isinstance(rows, torch.Tensor):
            if self._network is not None:
                features, errors = self._network.fast(rows.double())
                offsets = torch.where(features.isfinite().all(dim=1), errors, torch.inf).numpy()
                rows = features.nan_to_num(0.0, 0.0, 0.0)
            elif rows.dtype in {torch.float16, torch.bfloat16}:
                rows = rows.float()  # exact
            rows = rows.numpy()
        values = np.ascontiguousarray(rows)
        products = self._product.of_chunk(values)
        share = max(-(-n // self._threads), self._least_share)
        if n <= share:
            self._product.decide(values, products, offsets, self._tables, codes, levels)
            return

        def work(span: tuple[int, int]) -> None:
            part = slice(*span)
            self._product.decide(
                values[part],
                None if products is None else products[part],
                offsets[part],
                self._tables,
                codes[part],
                levels[part],
            )

        list(self._pool.map(work, spans(n, share)))


class _IntegerProduct:
    """Inner products of rows and centroids that were rounded to int16: exact sums of those."""

    def __init__(self, plan: Plan) -> None:
        steps, spreads, rounded = [], [], []
        for start, stop in pairwise(plan.offsets):
            centroids = plan.centroids[start:stop].double()
            # each centroid has a step of its own; one that is rounded to zeros has step 1
            step = torch.maximum(
                centroids.norm(dim=1) / cpu_kernels.LONGEST,
                centroids.abs().amax(dim=1) / cpu_kernels.LARGEST,
            ).float()
            step = torch.where(step >= _LEAST_STEP, step, 1.0)
            nearest = torch.round(centroids / step.double()[:, None])
            error = (centroids - nearest * step.double()[:, None]).norm(dim=1)
            steps.append(step)
            spreads.append(1.01 * error)
            rounded.append(nearest.short())
        self.steps = torch.cat(steps).numpy()
        self.spreads = _upwards(torch.cat(spreads))
        self._packed = _packed(torch.cat(rounded))

    def of_chunk(self, rows: Array) -> None:
        """Nothing: each thread makes the products of its own rows."""
        del rows

    def decide(  # noqa: PLR0917 - slices of one batch, in one order
        self,
        rows: Array,
        products: Array | None,
        offsets: Array,
        tables: cpu_kernels.Tables,
        codes: Array,
        levels: Array,
    ) -> None:
        """Codes of ``rows``, block by block, on the thread that calls."""
        del products
        tiles, pairs, columns = self._packed.shape
        # a stride that is no power of two: rows of one tile do not share a place in the cache
        stride = 2 * pairs + 32
        bytes_of_row = 2 * stride + 4 * tiles * columns
        tile = cpu_kernels.ROW_TILE
        block = min(
            max(tile, _BLOCK_BYTES // bytes_of_row // tile * tile), -(-len(rows) // tile) * tile
        )
        rounded = np.zeros((block, stride), dtype=np.int16)
        sums = np.empty((block, tiles * columns), dtype=np.int32)
        facts = np.empty((block, 4))
        for start, stop in spans(len(rows), block):
            part, size = rows[start:stop], stop - start
            cpu_kernels.round_rows(part, rounded, facts)
            facts[:size, 3] = offsets[start:stop]
            cpu_kernels.product(rounded[: -(-size // tile) * tile], self._packed, sums)
            cpu_kernels.decide(
                part, sums, facts[:size], tables, codes[start:stop], levels[start:stop]
            )


class _FloatProduct:
    """Inner products in float32: the library's, whose order of sums is unknown, but of few rows."""

    def __init__(self, plan: Plan) -> None:
        self._centroids = plan.centroids.T.contiguous()
        self._few_rows = _FEW_PRODUCTS / self._centroids.numel()
        # gamma_D, and room for products that underflow
        rounding = plan.dim * UNIT32 / (1 - plan.dim * UNIT32)
        self.steps = np.ones(len(plan.centroids), dtype=np.float32)
        self.spreads = _upwards(1.05 * rounding * plan.lengths.double())
        loss = loss_of_short_factors(plan.dim, min(len(plan.centroids), _PROBED_COLUMNS))
        if not loss <= rounding:
            raise ConfigurationError(
                f"the library's float32 product is off by {loss:.2g} of the sum of its terms; "
                f"float32 explains {rounding:.2g} at the most: it rounds its factors to fewer "
                "bits. Unset ONEDNN_DEFAULT_FPMATH_MODE and what else asks for that, or encode by "
                "the reference arithmetic"
            )

    def of_chunk(self, rows: Array) -> Array:
        """Inner products float32 ``(n, N)`` of ``rows`` (n, E) and all centroids."""
        products: Array
        if len(rows) > self._few_rows:
            products = (torch.from_numpy(rows).float() @ self._centroids).numpy()
        else:
            products = np.empty((len(rows), self._centroids.shape[1]), dtype=np.float32)
            cpu_kernels.multiply(rows, self._centroids.numpy(), products)
        return products

    def decide(  # noqa: PLR0917 - slices of one batch, in one order
        self,
        rows: Array,
        products: Array | None,
        offsets: Array,
        tables: cpu_kernels.Tables,
        codes: Array,
        levels: Array,
    ) -> None:
        """Codes of ``rows`` from their products, on the thread that calls."""
        assert products is not None  # noqa: S101 - it comes from `of_chunk`
        facts = np.empty((len(rows), 4))
        cpu_kernels.measure(rows, facts)
        facts[:, 3] = offsets
        cpu_kernels.decide(rows, products, facts, tables, codes, levels)


def loss_of_short_factors(
    dim: int, width: int, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> float:
    """Error of float32 products of rows and ``width`` columns, relative to the sum of their terms.

    All factors are one number, which lies just below the middle of two that bfloat16, or TF32,
    have: rounded to those, each loses as much as it can, and all in one direction.
    """
    worst = 0.0
    for bits in (7, 10):
        number = 1.0 + 2.0 ** -(bits + 1) - 2.0**-23
        columns = torch.full((dim, width), number)
        exact = dim * number**2
        for n in _PROBED:
            products = product(torch.full((n, dim), number), columns)
            worst = max(worst, float((products.double() - exact).abs().max()) / exact)
    return worst


def _tables(plan: Plan, product: _IntegerProduct | _FloatProduct) -> cpu_kernels.Tables:
    sizes = [gram.numel() for gram in plan.grams]
    return cpu_kernels.Tables(
        normalize=plan.normalize,
        offsets=np.array(plan.offsets),
        centroids=plan.centroids.numpy(),
        codes=plan.codes.numpy(),
        half_norms=(plan.square_norms / 2).float().numpy(),
        square_norms=plan.square_norms.numpy(),
        lengths=plan.lengths.numpy(),
        longest=plan.longest.numpy(),
        grams=torch.cat([gram.reshape(-1) for gram in plan.grams]).numpy(),
        gram_offsets=np.cumsum([0, *sizes[:-1]]),
        steps=product.steps,
        spreads=product.spreads,
    )


def _upwards(numbers: Tensor) -> Array:
    """Numbers float64 as float32, none of them less."""
    upwards: Array = (numbers * (1 + 2.0**-22)).float().numpy()
    return upwards


def _packed(columns: Tensor) -> Array:
    """Columns int16 ``(N, E)`` as `cpu_kernels.product` reads them, padded with zeros."""
    count, dim = columns.shape
    tile = cpu_kernels.COLUMN_TILE
    tiles, pairs = -(-count // tile), -(-dim // 2)
    padded = np.zeros((tiles * tile, 2 * pairs), dtype=np.int16)
    padded[:count, :dim] = columns.numpy()
    line = 64  # bytes, the size of a vector: loads of it must be aligned
    size = tiles * pairs * tile * 4
    memory = np.empty(size + line, dtype=np.uint8)
    first = -memory.ctypes.data % line
    packed = memory[first : first + size].view(np.int32).reshape(tiles, pairs, tile)
    packed[:] = padded.view(np.int32).reshape(tiles, tile, pairs).transpose(0, 2, 1)
    return packed
