"""The fast path on a CUDA device: a float16 product for all layers and Triton kernels around it."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton

from semid_server.encoding import gpu_kernels as kernels
from semid_server.encoding import tensor_cores
from semid_server.encoding.network import Network
from semid_server.encoding.plan import Plan
from semid_server.encoding.protocol import ROW_DTYPES, EncodeCounts, code_dtype_of
from semid_server.encoding.reference import ReferenceEncoder
from semid_server.encoding.rows import checked, spans
from semid_server.encoding.staging import STAGES, Stage, convey, pieces
from semid_server.errors import ConfigurationError
from semid_server.model import NORM_EPS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from semid_server.model import ModelSpec

WIDEST_ROW = 16384
"""Features up to which one program holds a row in its registers."""

WIDEST_CODEBOOK = 65536
"""The same of the scores of one layer."""

_PRODUCT_BYTES = 1 << 29
_MOST_ROWS = 1 << 17
"""Rows in flight: their products take at most so many bytes, and so many rows fill any GPU."""

_PIECE_BYTES = 1 << 25
_RAMP = 4
"""Host rows are copied in pieces of 32 MiB, some while another is computed; the first and the last
are of a quarter."""

_GRAPH_ROWS = (1, 16, 64, 256)
"""Batches up to the last are padded to one of these and replayed as a CUDA graph. Larger ones are,
too, up to the size of a piece from the host: queueing the kernels one by one takes the host longer
than the device needs for them, or for the copy of a piece."""

_PROBED_ROWS = 4096
"""A large batch, for the check of the product when an encoder is made."""

_ALIGNMENT = 16
"""Rows of float16 are padded to a multiple of it, which the library's product likes."""

_PROVED_SCORES = 512
_PROVED_PAIR = 2048
"""One program of `gpu_kernels.prove` holds so many scores at once, or, up to layers of the second
width, those of two rows (measured on an H100: 22 ns a row for three layers of 2,048, not 26)."""

_DECIDERS = 4096
"""Programs of `gpu_kernels.decide`: what a large GPU runs at once."""

_FINISH_ROWS = 32
"""Rows that one program of `gpu_kernels.finish` looks after."""


@dataclass(frozen=True, eq=False)
class Tables:
    """`Plan` as the kernels take it, with the float16 product that goes with it.

    Attributes
    ----------
    plan : Plan
    columns : Tensor
        float16 ``(N, padded E)``: the centroids, scaled by a power of two for each layer.
    codebooks : Tensor
        float32 ``(E, N)``, for the reference arithmetic.
    half_norms : Tensor
        float32 ``(N,)``, ``||c||^2 / 2``.
    codes, offsets : Tensor
        int32, as in `Plan`.
    grams : Tensor
        float32, the Gram tables one after another.
    gram_offsets : Tensor
        int64 ``(L,)``, where each begins.
    steps : Tensor
        float64 ``(L,)``, what one in the columns of each layer stands for.
    spreads : Tensor
        float32 ``(N,)``, ``kappa_k``: error of the product for a row of length 1.
    constants : Tensor
        float64 ``(1,)``, 1e-12.
    """

    plan: Plan
    columns: Tensor
    codebooks: Tensor
    half_norms: Tensor
    codes: Tensor
    offsets: Tensor
    grams: Tensor
    gram_offsets: Tensor
    steps: Tensor
    spreads: Tensor
    constants: Tensor

    @classmethod
    def of(cls, plan: Plan) -> Tables:
        """Round the centroids to float16, and say what that and the product may cost."""
        device = plan.centroids.device
        padded = -(-plan.dim // _ALIGNMENT) * _ALIGNMENT
        columns = torch.zeros(plan.offsets[-1], padded, dtype=torch.float16, device=device)
        steps, errors = [], []
        for layer, (start, stop) in enumerate(itertools.pairwise(plan.offsets)):
            # a power of two that brings the longest centroid to a length from 2^9 to 2^10
            _, exponent = math.frexp(float(plan.longest[layer]) or 1.0)
            step = 2.0 ** (exponent - 10)
            centroids = plan.centroids[start:stop].double()
            rounded = (centroids / step).half()
            columns[start:stop, : plan.dim] = rounded
            steps.append(step)
            errors.append((centroids - rounded.double() * step).norm(dim=1))
        # what adding up in tensor cores loses, in whatever order
        lost = tensor_cores.allowed(plan.dim)
        spreads = 1.02 * (torch.cat(errors) + lost * plan.lengths.double())
        sizes = torch.tensor([0, *(gram.numel() for gram in plan.grams[:-1])])
        return cls(
            plan=plan,
            columns=columns,
            codebooks=plan.centroids.T.contiguous(),
            half_norms=(plan.square_norms / 2).float(),
            codes=plan.codes.int(),
            offsets=torch.tensor(plan.offsets, dtype=torch.int32, device=device),
            grams=torch.cat([gram.reshape(-1) for gram in plan.grams]),
            gram_offsets=sizes.cumsum(0).to(device),
            steps=torch.tensor(steps, dtype=torch.float64, device=device),
            spreads=spreads.float(),
            constants=torch.tensor([NORM_EPS], dtype=torch.float64, device=device),
        )

    @property
    def widest(self) -> int:
        """The most columns that a layer has."""
        return max(stop - start for start, stop in itertools.pairwise(self.plan.offsets))


def fits(spec: ModelSpec) -> bool:
    """Whether the kernels can hold a model of this shape."""
    return spec.embedding_dim <= WIDEST_ROW and max(spec.codebook_widths) <= WIDEST_CODEBOOK


class GpuEncoder:
    """Codes of the reference, from one float16 matrix product for all layers and a certificate.

    Everything stays on the device: rows that the certificate does not prove are decided there by
    float64 distances of their candidates, and the few that those cannot tell apart by the
    reference arithmetic. Only a model with an encoder network asks the host, once a call, whether
    there are such rows.

    Parameters
    ----------
    model : nn.Module
        Its weights are copied.
    spec : ModelSpec
        Its shape; see `fits`.
    device : torch.device
        A CUDA device.
    piece_bytes : int
        Size of the pieces in which rows come from the host.

    Raises
    ------
    ConfigurationError
        If the device's float16 product is less exact than BOUNDS.md takes it to be.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        *,
        device: torch.device,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        state = model.state_dict()
        self._spec = spec
        self._device = device
        self._piece_bytes = piece_bytes
        self._network = Network.of(spec, state, device)
        self._reference = ReferenceEncoder(model, spec, device=device)
        self._plan = Plan.of(spec, state, device)
        self._within_range = self._plan.within_range
        self._tables = Tables.of(self._plan)
        self._check_product()
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._n_rows = torch.zeros(1, dtype=torch.int32, device=device)
        self._rows_at_once = max(1, min(_MOST_ROWS, _PRODUCT_BYTES // (4 * self._plan.offsets[-1])))
        self._graphs: dict[tuple[int, int, torch.dtype], _Graph] = {}
        self._sizes = {dtype: self._graph_rows(dtype) for dtype in ROW_DTYPES}
        self._stages: list[Stage] = []
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's own

    def _check_product(self) -> None:
        """Refuse a device whose tensor cores lose more than the certificate allows for."""
        columns = self._tables.columns
        with torch.cuda.device(self._device):
            loss = tensor_cores.worst_loss(
                (columns.shape[0], columns.shape[1]),
                self._plan.dim,
                (*_GRAPH_ROWS, _PROBED_ROWS),
                device=self._device,
                product=_product,
            )
        if not loss <= 1:
            raise ConfigurationError(
                f"{torch.cuda.get_device_name(self._device)} adds up products of float16 with "
                f"{loss:.2g} times the error that codes are proved with; encode on the CPU, or by "
                "the reference arithmetic"
            )

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
        """Rows decided at each level so far; waits for the device."""
        return EncodeCounts(*self._counts.tolist())

    def warm_up(self) -> None:
        """Compile the kernels and record the graphs, for every type of rows."""
        before = self._counts.clone()
        for dtype in ROW_DTYPES:
            # more than the largest graph: what a graph runs need not be what a large batch does
            n = min(self._sizes[dtype][-1] + 1, self._rows_at_once)
            self.encode(torch.ones(n, self.input_dim, dtype=dtype, device=self._device))
            with torch.cuda.device(self._device):
                for i, size in itertools.product(range(STAGES), self._sizes[dtype]):
                    self._graph(i, size, dtype)
            self.encode(torch.ones(1, self.input_dim, dtype=dtype))
        self._counts.copy_(before)

    def encode(self, rows: Tensor) -> Tensor:
        """Codes ``(n, L)`` of ``rows`` (n, D), on their device; see `Encoder.encode`."""
        checked(rows, self.input_dim)
        if not len(rows):
            return torch.empty(0, self.n_layers, dtype=self.code_dtype, device=rows.device)
        with torch.cuda.device(self._device):
            if rows.device.type == "cpu":
                return self._encode_from_host(rows)
            if len(rows) <= self._rows_at_once:
                return self._codes(rows.contiguous())
            codes = torch.empty(
                len(rows), self.n_layers, dtype=self.code_dtype, device=self._device
            )
            for start, stop in spans(len(rows), self._rows_at_once):
                codes[start:stop] = self._codes(rows[start:stop].contiguous())
            return codes

    def _encode_from_host(self, rows: Tensor) -> Tensor:
        """Copy pieces while others are computed; pinned rows are read where they are."""
        if len(rows) <= _GRAPH_ROWS[-1]:
            return self._graph(0, len(rows), rows.dtype).encode_from_host(rows)
        codes = torch.empty(len(rows), self.n_layers, dtype=self.code_dtype, pin_memory=True)
        pinned = rows.is_pinned() and rows.is_contiguous()

        def send(i: int, start: int, stop: int) -> None:
            stage = self._stage(i % STAGES)
            stage.send(rows[start:stop], self._copies, pinned=pinned)

        def work(i: int, start: int, stop: int) -> None:
            stage = self._stage(i % STAGES)
            # a stream for each stage: the last rows of a piece are decided beside the next piece
            with torch.cuda.stream(stage.stream):
                stage.wait_for_rows()
                graph = self._graph(i % STAGES, stop - start, rows.dtype)
                codes[start:stop].copy_(graph.replay(stop - start), non_blocking=True)
                stage.release()

        most = self._most_rows(rows.dtype)
        parts = pieces(len(rows), least=-(-most // _RAMP), most=most)
        convey(parts, ahead=STAGES - 1, send=send, work=work)
        for stage in self._stages:
            stage.stream.synchronize()
        return codes

    def _codes(self, rows: Tensor) -> Tensor:
        """Codes ``(n, L)`` of contiguous ``rows`` on the device, not more than fit at once."""
        if len(rows) <= self._sizes[rows.dtype][-1]:
            return self._graph(0, len(rows), rows.dtype).encode(rows)
        self._n_rows.fill_(len(rows))
        codes, levels = self.queue(rows, self._n_rows)
        return codes if levels is None else self.resolve(rows, codes, levels)

    def _most_rows(self, dtype: torch.dtype) -> int:
        """Rows of a large piece from the host."""
        size = self.input_dim * dtype.itemsize
        return max(1, min(self._rows_at_once // STAGES, self._piece_bytes // size))

    def _graph_rows(self, dtype: torch.dtype) -> list[int]:
        """Numbers of rows that there is a graph for."""
        most = self._most_rows(dtype)
        return sorted({*_GRAPH_ROWS, *(-(-most // share) for share in (1, 2, _RAMP))})

    def _stage(self, i: int) -> Stage:
        while len(self._stages) <= i:
            # a batch of the largest graph fits, in any type
            size = max(self._piece_bytes, 8 * self.input_dim * _GRAPH_ROWS[-1])
            self._stages.append(Stage(size, self.input_dim, self._device))
        return self._stages[i]

    def _graph(self, i: int, n: int, dtype: torch.dtype) -> _Graph:
        """Graph for ``n`` rows or some more at the beginning of a stage's memory."""
        sizes = self._sizes[dtype]
        size = sizes[bisect_left(sizes, n)]
        graph = self._graphs.get((i, size, dtype))
        if graph is None:
            graph = _Graph(self, self._stage(i), size, dtype)
            self._graphs[i, size, dtype] = graph
        return graph

    def queue(self, rows: Tensor, n_rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queue everything for contiguous ``rows`` (n, D); the host does not wait.

        Only the first ``n_rows`` of them, int32 (1,), are counted; the others are padding. Returns
        codes ``(n, L)``. Of a model with a network they are int32 and come with levels, int32
        ``(n,)``: the rest is left to `resolve`.
        """
        if self._network is None:
            codes, _ = self.launch(rows, n_rows)
            return codes.to(self.code_dtype), None
        features, offsets = self._network.fast(rows.double())
        offsets = torch.where(features.isfinite().all(dim=1), offsets, torch.inf)
        return self.launch(features.nan_to_num(0.0, 0.0, 0.0), n_rows, offsets)

    def resolve(self, rows: Tensor, codes: Tensor, levels: Tensor) -> Tensor:
        """Codes ``(n, L)``, by the reference arithmetic where ``levels`` ask for it; waits."""
        left = (levels == kernels.REFERENCE.value).nonzero()[:, 0]
        if len(left):
            codes[left] = self._reference.codes(rows[left]).int()
        return codes.to(self.code_dtype)

    def launch(
        self, rows: Tensor, n_rows: Tensor, offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queue all kernels for contiguous ``rows`` (n, E); the host does not wait.

        ``offsets`` float64 (n,) says how far each row may be from the exact one; with it, codes of
        rows at level `gpu_kernels.REFERENCE` mean nothing. Returns codes int32 ``(n, L)`` and
        levels int32 ``(n,)``.
        """
        plan, tables, n = self._plan, self._tables, len(rows)
        codes = torch.empty(n, plan.n_layers, dtype=torch.int32, device=self._device)
        levels = torch.empty(n, dtype=torch.int32, device=self._device)
        if not self._within_range:
            codes.zero_()
            levels.fill_(kernels.REFERENCE.value)
        else:
            padded = tables.columns.shape[1]
            rounded = torch.empty(n, padded, dtype=torch.float16, device=self._device)
            facts = torch.empty(n, 4, dtype=torch.float64, device=self._device)
            waiting = torch.zeros(1 + n, dtype=torch.int32, device=self._device)
            if offsets is not None:
                facts[:, 3] = offsets
            round_rows(rows, rounded, facts)
            products = _product(rounded, tables.columns)
            chain = {"codes": codes, "levels": levels, "waiting": waiting}
            prove(products, facts, tables, **chain, has_offset=offsets is not None)
            decide(rows, products, facts, tables, **chain, has_offset=offsets is not None)
        finish(
            rows,
            levels,
            tables,
            codes=codes,
            counts=self._counts,
            n_rows=n_rows,
            resolve=offsets is None,
        )
        return codes, levels


class _Graph:
    """All that is queued for the first rows of a stage, as one call."""

    def __init__(self, encoder: GpuEncoder, stage: Stage, n: int, dtype: torch.dtype) -> None:
        self._encoder, self._stage = encoder, stage
        self._rows = stage.rows(n, dtype)
        self._host_codes: Tensor | None = None
        # what runs meanwhile counts nothing
        stage.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stage.stream):
            stage.n_rows.fill_(0)
            encoder.queue(self._rows, stage.n_rows)  # compiles, which a capture must not
        self._graph = torch.cuda.CUDAGraph()
        # Graphs of a stage run one after another, and may use the same memory. Those of two stages
        # run side by side; the library, too, has working memory for each stream of its own.
        with torch.cuda.graph(
            self._graph,
            pool=stage.graph_memory,
            stream=stage.stream,
            capture_error_mode="thread_local",
        ):
            self._codes, self._levels = encoder.queue(self._rows, stage.n_rows)
        torch.cuda.current_stream().wait_stream(stage.stream)

    def replay(self, n: int) -> Tensor:
        """Codes of the first ``n`` rows; the next replay in this stage overwrites them."""
        self._stage.n_rows.fill_(n)
        self._graph.replay()
        codes = self._codes[:n]
        if self._levels is None:
            return codes
        return self._encoder.resolve(self._rows[:n], codes, self._levels[:n])

    def encode(self, rows: Tensor) -> Tensor:
        """Codes of a few ``rows`` on the device; all of it is queued."""
        codes = self._encode(rows).clone()
        self._stage.release()
        return codes

    def encode_from_host(self, rows: Tensor) -> Tensor:
        """Codes, on the host, of a few ``rows`` there."""
        if not rows.is_pinned():
            rows = self._stage.pinned(rows)
        found = self._encode(rows)
        if self._host_codes is None:
            self._host_codes = torch.empty(
                len(self._rows), found.shape[1], dtype=found.dtype, pin_memory=True
            )
        codes = self._host_codes[: len(rows)].copy_(found, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return codes.clone()

    def _encode(self, rows: Tensor) -> Tensor:
        self._stage.wait_for_room()
        self._rows[: len(rows)].copy_(rows, non_blocking=True)
        return self.replay(len(rows))


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products float32 ``(n, N)`` of float16 ``rows`` (n, E) and ``columns`` (N, E)."""
    return torch.mm(rows, columns.T, out_dtype=torch.float32)


def round_rows(rows: Tensor, rounded: Tensor, facts: Tensor) -> None:
    """Launch `gpu_kernels.round_rows`."""
    dim, padded = rows.shape[1], rounded.shape[1]
    block = triton.next_power_of_2(padded)
    kernels.round_rows[(len(rows),)](
        rows,
        rounded,
        facts,
        rows.stride(0),
        DIM=dim,
        PADDED=padded,
        BLOCK=block,
        num_warps=_warps(block, 512),
    )


def prove(
    products: Tensor,
    facts: Tensor,
    tables: Tables,
    *,
    codes: Tensor,
    levels: Tensor,
    waiting: Tensor,
    has_offset: bool,
) -> None:
    """Launch `gpu_kernels.prove`."""
    plan = tables.plan
    block_width = triton.next_power_of_2(tables.widest)
    pair = block_width <= _PROVED_PAIR
    rows = max(2 if pair else 1, _PROVED_SCORES // block_width)
    kernels.prove[(triton.cdiv(len(products), rows),)](
        products,
        facts,
        tables.codes,
        tables.half_norms,
        tables.grams,
        tables.offsets,
        tables.gram_offsets,
        plan.lengths,
        tables.spreads,
        plan.longest,
        tables.steps,
        codes,
        levels,
        waiting,
        len(products),
        products.stride(0),
        DIM=plan.dim,
        LAYERS=plan.n_layers,
        NORMALIZE=plan.normalize,
        HAS_OFFSET=has_offset,
        BLOCK_LAYERS=triton.next_power_of_2(plan.n_layers),
        BLOCK_WIDTH=block_width,
        ROWS=rows,
        num_warps=_warps(rows * block_width, 2048 if pair else 1024),
    )


def decide(
    rows: Tensor,
    products: Tensor,
    facts: Tensor,
    tables: Tables,
    *,
    codes: Tensor,
    levels: Tensor,
    waiting: Tensor,
    has_offset: bool,
) -> None:
    """Launch `gpu_kernels.decide`."""
    plan = tables.plan
    block_dim = triton.next_power_of_2(plan.dim)
    block_width = triton.next_power_of_2(tables.widest)
    kernels.decide[(min(len(rows), _DECIDERS),)](
        rows,
        products,
        facts,
        plan.centroids,
        tables.codes,
        tables.half_norms,
        tables.grams,
        tables.offsets,
        tables.gram_offsets,
        plan.lengths,
        tables.spreads,
        plan.longest,
        tables.steps,
        codes,
        levels,
        waiting,
        rows.stride(0),
        products.stride(0),
        DIM=plan.dim,
        LAYERS=plan.n_layers,
        NORMALIZE=plan.normalize,
        HAS_OFFSET=has_offset,
        BLOCK_LAYERS=triton.next_power_of_2(plan.n_layers),
        BLOCK_WIDTH=block_width,
        BLOCK_DIM=block_dim,
        num_warps=max(_warps(block_width, 512), _warps(block_dim, 2048)),
    )


def finish(
    rows: Tensor,
    levels: Tensor,
    tables: Tables,
    *,
    codes: Tensor,
    counts: Tensor,
    n_rows: Tensor,
    resolve: bool,
) -> None:
    """Launch `gpu_kernels.finish`."""
    plan = tables.plan
    programs = triton.cdiv(len(rows), _FINISH_ROWS)
    scratch = torch.empty(
        programs if resolve else 0, plan.dim, dtype=torch.float64, device=rows.device
    )
    block_dim = triton.next_power_of_2(plan.dim)
    block_width = triton.next_power_of_2(tables.widest)
    kernels.finish[(programs,)](
        rows,
        levels,
        tables.codebooks,
        tables.offsets,
        tables.codes,
        tables.constants,
        scratch,
        codes,
        counts,
        n_rows,
        rows.stride(0),
        DIM=plan.dim,
        LAYERS=plan.n_layers,
        NORMALIZE=plan.normalize,
        RESOLVE=resolve,
        BLOCK_WIDTH=block_width,
        BLOCK_DIM=block_dim,
        ROWS=_FINISH_ROWS,
        num_warps=_warps(max(block_width, block_dim), 512),
        enable_fp_fusion=False,
    )


def _warps(block: int, numbers_each: int) -> int:
    """Warps of a program that holds ``block`` numbers: a power of two, at most 16."""
    return min(16, max(1, block // numbers_each))
