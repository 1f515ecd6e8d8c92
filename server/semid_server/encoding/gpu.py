"""The fast path on a CUDA device: a float16 product for all layers and Triton kernels around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import triton

from semid_server.encoding import gpu_kernels as kernels
from semid_server.encoding.network import Network
from semid_server.encoding.plan import TENSOR_CORE_UNIT, Plan
from semid_server.encoding.protocol import ROW_DTYPES, EncodeCounts, code_dtype_of
from semid_server.encoding.reference import ReferenceEncoder
from semid_server.encoding.rows import checked, spans
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

_STAGE_BYTES = 1 << 26
"""Host rows are copied in pieces of 64 MiB, one while another is computed."""

_GRAPH_ROWS = (1, 16, 64, 256)
"""Batches up to the last are padded to one of these and replayed as a CUDA graph."""

_ALIGNMENT = 16
"""Rows of float16 are padded to a multiple of it, which the library's product likes."""

_SCORES = 512
"""Scores that one program of `gpu_kernels.prove` holds at once."""

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
        for layer, (start, stop) in enumerate(pairwise(plan.offsets)):
            # a power of two that brings the longest centroid to a length from 2^9 to 2^10
            _, exponent = math.frexp(float(plan.longest[layer]) or 1.0)
            step = 2.0 ** (exponent - 10)
            centroids = plan.centroids[start:stop].double()
            rounded = (centroids / step).half()
            columns[start:stop, : plan.dim] = rounded
            steps.append(step)
            errors.append((centroids - rounded.double() * step).norm(dim=1))
        # what adding up in tensor cores loses, in whatever order
        lost = plan.dim * TENSOR_CORE_UNIT
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
        return max(stop - start for start, stop in pairwise(self.plan.offsets))


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
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, *, device: torch.device) -> None:
        state = model.state_dict()
        self._spec = spec
        self._device = device
        self._network = Network.of(spec, state, device)
        self._reference = ReferenceEncoder(model, spec, device=device)
        self._plan = Plan.of(spec, state, device)
        self._within_range = self._plan.within_range
        self._tables = Tables.of(self._plan)
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._n_rows = torch.zeros(1, dtype=torch.int32, device=device)
        self._rows_at_once = max(1, min(_MOST_ROWS, _PRODUCT_BYTES // (4 * self._plan.offsets[-1])))
        self._graphs: dict[tuple[int, torch.dtype], _Graph] = {}
        self._stages: list[_Stage] = []
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's own

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
            for n in (*_GRAPH_ROWS, _GRAPH_ROWS[-1] + 1):
                self.encode(torch.ones(n, self.input_dim, dtype=dtype, device=self._device))
        self._counts.copy_(before)

    def encode(self, rows: Tensor) -> Tensor:
        """Codes ``(n, L)`` of ``rows`` (n, D), on their device; see `Encoder.encode`."""
        checked(rows, self.input_dim)
        with torch.cuda.device(self._device):
            if rows.device.type == "cpu":
                return self._encode_from_host(rows)
            codes = torch.empty(
                len(rows), self.n_layers, dtype=self.code_dtype, device=self._device
            )
            for start, stop in spans(len(rows), self._rows_at_once):
                codes[start:stop] = self._codes(rows[start:stop].contiguous())
            return codes

    def _encode_from_host(self, rows: Tensor) -> Tensor:
        """Copy pieces while others are computed; pinned rows are read where they are."""
        codes = torch.empty(len(rows), self.n_layers, dtype=self.code_dtype, pin_memory=True)
        size = rows.shape[1] * rows.element_size()
        step = max(1, min(self._rows_at_once, _STAGE_BYTES // size))
        pinned = rows.is_pinned() and rows.is_contiguous()
        compute = torch.cuda.current_stream()
        while len(self._stages) < min(2, -(-len(rows) // step)):
            self._stages.append(_Stage(max(_STAGE_BYTES, size), self._device))
        for i, (start, stop) in enumerate(spans(len(rows), step)):
            stage = self._stages[i % 2]
            part = stage.read(rows[start:stop], self._copies, pinned=pinned)
            compute.wait_event(stage.arrived)
            codes[start:stop].copy_(self._codes(part), non_blocking=True)
            stage.used.record(compute)
        compute.synchronize()
        return codes

    def _codes(self, rows: Tensor) -> Tensor:
        """Codes ``(n, L)`` of contiguous ``rows`` on the device, not more than fit at once."""
        self._n_rows.fill_(len(rows))
        if self._network is None and len(rows) <= _GRAPH_ROWS[-1]:
            key = (min(size for size in _GRAPH_ROWS if size >= len(rows)), rows.dtype)
            if key not in self._graphs:
                self._graphs[key] = _Graph(self, *key)
            return self._graphs[key].replay(rows)
        features, offsets = rows, None
        if self._network is not None:
            features, offsets = self._network.fast(rows.double())
            offsets = torch.where(features.isfinite().all(dim=1), offsets, torch.inf)
            features = features.nan_to_num(0.0, 0.0, 0.0)
        codes, levels = self.launch(features, offsets)
        if self._network is not None:
            left = (levels == kernels.REFERENCE.value).nonzero()[:, 0]
            codes[left] = self._reference.codes(rows[left]).int()
        return codes.to(self.code_dtype)

    def launch(self, rows: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
            products = torch.mm(rounded, tables.columns.T, out_dtype=torch.float32)
            chain = {"codes": codes, "levels": levels, "waiting": waiting}
            prove(products, facts, tables, **chain, has_offset=offsets is not None)
            decide(rows, products, facts, tables, **chain, has_offset=offsets is not None)
        finish(
            rows,
            levels,
            tables,
            codes=codes,
            counts=self._counts,
            n_rows=self._n_rows,
            resolve=offsets is None,
        )
        return codes, levels


class _Graph:
    """The kernels of a small batch of fixed size, queued by one call."""

    def __init__(self, encoder: GpuEncoder, n: int, dtype: torch.dtype) -> None:
        device = encoder._device  # noqa: SLF001 - a part of the encoder, split off
        self._rows = torch.zeros(n, encoder.input_dim, dtype=dtype, device=device)
        counts = encoder._counts.clone()  # noqa: SLF001 - as above
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's own
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            encoder.launch(self._rows)  # compiles, which a capture must not
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            codes, _ = encoder.launch(self._rows)
            self._codes = codes.to(encoder.code_dtype)
        encoder._counts.copy_(counts)  # noqa: SLF001 - as above

    def replay(self, rows: Tensor) -> Tensor:
        """Codes of at most as many rows; the memory is used again by the next call."""
        self._rows[: len(rows)].copy_(rows)
        self._graph.replay()
        return self._codes[: len(rows)].clone()


class _Stage:
    """Pinned memory and device memory for one piece of host rows on its way."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._host: Tensor | None = None
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's own
        self.used = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's own

    def read(self, rows: Tensor, stream: torch.cuda.Stream, *, pinned: bool) -> Tensor:
        """Begin the copy of ``rows`` on ``stream``; they may be used after ``arrived``."""
        size = rows.numel() * rows.element_size()
        if not pinned:
            if self._host is None:
                self._host = torch.empty(len(self._memory), dtype=torch.uint8, pin_memory=True)
            self.arrived.synchronize()  # the last piece has left the pinned memory
            staged = self._host[:size].view(rows.dtype).view(rows.shape)
            rows = staged.copy_(rows)
        part = self._memory[:size].view(rows.dtype).view(rows.shape)
        stream.wait_event(self.used)
        with torch.cuda.stream(stream):
            part.copy_(rows, non_blocking=True)
        self.arrived.record(stream)
        return part


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
    rows = max(1, _SCORES // block_width)
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
        num_warps=_warps(rows * block_width, 1024),
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
