"""The fast path on a CUDA device: a float16 product for all layers and Triton kernels around it."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from semid_server.encoding import gpu_kernels as kernels
from semid_server.encoding import tensor_cores
from semid_server.encoding.network import Network
from semid_server.encoding.plan import Plan
from semid_server.encoding.protocol import (
    ROW_DTYPES,
    EncodeCounts,
    Screened,
    code_dtype_of,
)
from semid_server.encoding.reference import ReferenceEncoder
from semid_server.encoding.rows import AtOnce, checked
from semid_server.encoding.staging import STAGES, Stage, convey, own_stream, pieces
from semid_server.errors import ConfigurationError, InvalidInputError
from semid_server.model import NORM_EPS

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from semid_server.model import ModelSpec

WIDEST_ROW = 16384
"""Features up to which one program holds a row in its registers."""

WIDEST_CODEBOOK = 65536
"""The same of the scores of one layer."""

_PRODUCT_BYTES = 1 << 29
_MOST_ROWS = 1 << 17
"""Rows at once: their products take at most so many bytes, and so many rows fill any GPU."""

_PIECE_BYTES = 1 << 25
_RAMP = 4
"""Host rows are copied in pieces of 32 MiB, some while another is computed; the first and the last
are of a quarter."""

_GRAPH_ROWS = (1, 16, 64, 256)
"""Batches up to the last are padded to one of these. All that is queued for a batch is replayed as
a CUDA graph: one by one, kernels take the host longer to queue than the device to run."""

_DIVIDED = 1 << 14
_FULL = 0.75
"""A batch on the device of more rows than this is divided unless it has at least this share of the
rows of the next graph: padding costs their product, and dividing the latency of a second part."""

_ALIGNMENT = 16
"""Rows of float16 are padded to a multiple of it, which the library's product likes."""

_DECIDERS = 4096
"""Programs of `gpu_kernels.decide`: what a large GPU runs at once."""

_FINISHERS = 1056
_FINISH_BYTES = 1 << 26
"""Programs of `gpu_kernels.finish`: eight for each multiprocessor of a large GPU, as long as what
they write down of their rows fits into so many bytes."""

_TRITON_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the rows of a batch are, which the kernels learn only when they run.

    Attributes
    ----------
    call : Tensor
        int64 ``(2,)`` on the device: the address of contiguous rows, a multiple of 16, in memory
        that the device can read (its own, or all of it pinned on a host that has one space of
        addresses with it), and how many there are; the rest of ``n`` is padding, not read.
    n : int
        Rows that there is room for in what is queued.
    dim : int
        Numbers in a row.
    dtype : torch.dtype
        Their type.
    held : Tensor or None
        The rows, if nobody else keeps them.
    """

    call: Tensor
    n: int
    dim: int
    dtype: torch.dtype
    held: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor) -> Rows:
        """All of ``rows`` (n, D), on their device."""
        rows = aligned(rows.contiguous())
        call = torch.empty(2, dtype=torch.int64, device=rows.device)
        call[0].fill_(rows.data_ptr())
        call[1].fill_(len(rows))
        return cls(call, len(rows), rows.shape[1], rows.dtype, held=rows)


def aligned(rows: Tensor) -> Tensor:
    """``rows``, or a copy that begins where the kernels can read it."""
    return rows.clone() if rows.data_ptr() % kernels.ADDRESSES.value else rows


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
    margins : Tensor
        float32 ``(N,)``, ``m_k``: what the bound of a score grows with.
    rates : Tensor
        float64 ``(L,)``, ``t_l``: ``rates * margins`` is at least the error ``kappa_k`` of the
        product for a row of length 1.
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
    margins: Tensor
    rates: Tensor
    constants: Tensor

    @classmethod
    def of(cls, plan: Plan) -> Tables:
        """Round the centroids to float16, and say what that and the product may cost."""
        device = plan.centroids.device
        padded = -(-plan.dim // _ALIGNMENT) * _ALIGNMENT
        columns = torch.zeros(plan.offsets[-1], padded, dtype=torch.float16, device=device)
        lengths = plan.lengths.double()
        # what adding up in tensor cores loses, in whatever order
        lost = tensor_cores.allowed(plan.dim)
        steps, margins, rates = [], [], []
        for layer, (start, stop) in enumerate(itertools.pairwise(plan.offsets)):
            # a power of two that brings the longest centroid to a length from 2^9 to 2^10
            _, exponent = math.frexp(float(plan.longest[layer]) or 1.0)
            step = 2.0 ** (exponent - 10)
            centroids = plan.centroids[start:stop].double()
            rounded = (centroids / step).half()
            columns[start:stop, : plan.dim] = rounded
            steps.append(step)
            error = (centroids - rounded.double() * step).norm(dim=1)
            length = lengths[start:stop]
            spread = 1.02 * (error + lost * length)
            # of the longer half alone: rounding costs a very short centroid more than its share
            long = (length > 0) & (length >= plan.longest[layer] / 2)
            rate = (spread / length)[long].amax() if bool(long.any()) else length.new_tensor(lost)
            margins.append(torch.maximum(length, spread / rate))
            rates.append(rate)
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
            margins=(torch.cat(margins) * (1 + 2.0**-22)).float(),
            rates=torch.stack(rates),
            constants=torch.tensor([NORM_EPS], dtype=torch.float64, device=device),
        )

    @property
    def alignment(self) -> int:
        """A power of two, at most 16, that every layer's first column is a multiple of."""
        return math.gcd(16, *self.plan.offsets)

    @property
    def widest(self) -> int:
        """The most columns that a layer has."""
        return max(stop - start for start, stop in itertools.pairwise(self.plan.offsets))


def fits(spec: ModelSpec) -> bool:
    """Whether the kernels can hold a model of this shape."""
    return spec.embedding_dim <= WIDEST_ROW and max(spec.codebook_widths) <= WIDEST_CODEBOOK


class GpuEncoder(AtOnce):
    """Codes of the reference, from one float16 matrix product for all layers and a certificate.

    Everything stays on the device: rows that the certificate does not prove are decided there by
    float64 distances of their candidates, and the few that those cannot tell apart by the
    reference arithmetic. Only a model with an encoder network asks the host, once for each part of
    a call, whether there are such rows. The first batch of a size records a graph, and waits.

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
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._rows_at_once = max(1, min(_MOST_ROWS, _PRODUCT_BYTES // (4 * self._plan.offsets[-1])))
        self._graphs: dict[tuple[int, int, torch.dtype], _Graph] = {}
        self._host_graphs: dict[tuple[int, torch.dtype], _HostGraph] = {}
        self._sizes = {dtype: self._graph_rows(dtype) for dtype in ROW_DTYPES}
        self._check_product()
        self._stages: list[Stage] = []
        self._turns = itertools.cycle(range(STAGES))
        self._copies = own_stream(self, device)

    def _check_product(self) -> None:
        """Refuse a device whose tensor cores lose more than the certificate allows for."""
        columns = self._tables.columns
        with torch.cuda.device(self._device):
            loss = tensor_cores.worst_loss(
                (columns.shape[0], columns.shape[1]),
                self._plan.dim,
                sorted({n for sizes in self._sizes.values() for n in sizes}),
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
        """Compile the kernels and record the graphs of rows from the host, for every type."""
        before = self._counts.clone()
        with torch.cuda.device(self._device):
            # the largest first: the others find room in its memory
            for dtype in sorted(ROW_DTYPES, key=self._most_rows, reverse=True):
                most = self._most_rows(dtype)
                for i, size in itertools.product(range(STAGES), reversed(self._sizes[dtype])):
                    if size <= most:
                        self._graph(i, size, dtype)
                for size in reversed(_GRAPH_ROWS):
                    self._host_graph(size, dtype)
                self.encode(torch.ones(1, self.input_dim, dtype=dtype))
                self.encode(torch.ones(1, self.input_dim, dtype=dtype, device=self._device))
        self._counts.copy_(before)

    def encode(self, rows: Tensor) -> Tensor:
        """Codes ``(n, L)`` of ``rows`` (n, D), on their device; see `Encoder.encode`."""
        rows = checked(rows, self.input_dim).detach()
        if rows.device.type != "cpu" and rows.device != self._counts.device:
            raise InvalidInputError.at(
                "embeddings", f"on {rows.device}; expected cpu or {self._counts.device}"
            )
        if not len(rows):
            return torch.empty(0, self.n_layers, dtype=self.code_dtype, device=rows.device)
        with torch.cuda.device(self._device):
            if rows.device.type != "cpu":
                return self._encode_there(rows)
            if len(rows) <= _GRAPH_ROWS[-1]:
                graph = self._host_graph(len(rows), rows.dtype)
                return torch.from_numpy(graph.encode(rows))
            least = -(-self._most_rows(rows.dtype) // _RAMP)
            return self._begin_from_host(rows, least=least)().codes

    def prepare(self, rows: Tensor) -> Callable[[], npt.NDArray[np.unsignedinteger]]:
        """Return what encodes ``rows`` (n, D) whenever it is called; see `Encoder.prepare`."""
        asked = checked(rows, self.input_dim).detach()
        if not 0 < len(asked) <= _GRAPH_ROWS[-1] or not _can_be_read(asked):
            return super().prepare(rows)
        with torch.cuda.device(self._device):
            graph = self._host_graph(len(asked), asked.dtype)

        def encode() -> npt.NDArray[np.unsignedinteger]:
            return graph.encode_at(asked.data_ptr(), len(asked))

        return encode

    def begin(self, rows: Tensor) -> Callable[[], Screened]:
        """Queue ``rows`` (n, D), and return what waits for their codes; see `Encoder.begin`.

        Many rows are copied beside the work for those before them, and looked through there.
        """
        if rows.device.type != "cpu" or len(rows) <= _GRAPH_ROWS[-1]:
            return super().begin(rows)
        rows = checked(rows, self.input_dim).detach()
        with torch.cuda.device(self._device):
            return self._begin_from_host(rows, least=self._most_rows(rows.dtype), screen=True)

    def _encode_there(self, rows: Tensor) -> Tensor:
        """Rows on the device are read where they are; all of it is queued."""
        rows = rows.contiguous()
        codes = torch.empty(len(rows), self.n_layers, dtype=self.code_dtype, device=self._device)
        stage = self._stage(0)
        stage.wait_for_room()
        start = 0
        try:
            while start < len(rows):
                part = aligned(rows[start : start + self._part(len(rows) - start, rows.dtype)])
                graph = self._graph(0, len(part), rows.dtype)
                codes[start : start + len(part)] = graph.replay(part.data_ptr(), len(part))
                start += len(part)
        finally:
            stage.release()
        return codes

    def _begin_from_host(
        self, rows: Tensor, *, least: int, screen: bool = False
    ) -> Callable[[], Screened]:
        """Queue pieces, copied while others are computed; pinned rows are read where they are.

        The first piece and the last have ``least`` rows. Stages are taken in turn, whoever's the
        pieces before are: what a stage still has to do is waited for by the device alone.
        To ``screen`` is to encode zeros in the place of rows that are not finite, and to tell.
        """
        codes = torch.empty(len(rows), self.n_layers, dtype=self.code_dtype, pin_memory=True)
        finite = torch.empty(len(rows) if screen else 0, dtype=torch.bool, pin_memory=True)
        pinned = rows.is_pinned() and rows.is_contiguous()
        parts = pieces(len(rows), least=least, most=self._most_rows(rows.dtype))
        turns = [next(self._turns) for _ in parts]

        def send(i: int, start: int, stop: int) -> None:
            stage = self._stage(turns[i])
            stage.send(rows[start:stop], self._copies, pinned=pinned)

        def work(i: int, start: int, stop: int) -> None:
            stage = self._stage(turns[i])
            # a stream for each stage: the last rows of a piece are decided beside the next piece
            with torch.cuda.stream(stage.stream):
                stage.wait_for_rows()
                try:
                    if screen:
                        finite[start:stop].copy_(stage.screen(), non_blocking=True)
                    graph = self._graph(turns[i], stop - start, rows.dtype)
                    found = graph.replay(stage.address, stop - start)
                    codes[start:stop].copy_(found, non_blocking=True)
                finally:
                    stage.release()

        try:
            convey(parts, ahead=STAGES - 1, send=send, work=work)
            done = [self._stage(turn).mark() for turn in sorted(set(turns))]
        except BaseException:
            self._wait_for_all()
            raise

        def wait() -> Screened:
            try:
                for event in done:
                    event.synchronize()
            except BaseException:
                self._wait_for_all()
                raise
            return Screened(codes, finite)

        return wait

    def _wait_for_all(self) -> None:
        """Wait until nothing reads rows, or writes codes, that nobody may have any more."""
        self._copies.synchronize()
        for stage in self._stages:
            stage.stream.synchronize()

    def _most_rows(self, dtype: torch.dtype) -> int:
        """Rows of a large piece from the host."""
        size = self.input_dim * dtype.itemsize
        return max(1, min(self._rows_at_once // STAGES, self._piece_bytes // size))

    def _graph_rows(self, dtype: torch.dtype) -> list[int]:
        """Numbers of rows that there is a graph for: few, those of pieces, and some between."""
        most = self._most_rows(dtype)
        sizes = {*_GRAPH_ROWS, self._rows_at_once}
        sizes |= {-(-most // share) for share in (1, 2, _RAMP)}
        size = 4 * _GRAPH_ROWS[-1]
        while size < self._rows_at_once:
            sizes.add(size)
            size *= 4 if size < _DIVIDED else 2
        return sorted(sizes)

    def _part(self, n: int, dtype: torch.dtype) -> int:
        """How many of ``n`` rows on the device to do next."""
        sizes = self._sizes[dtype]
        at = bisect_left(sizes, n)
        if n <= min(_DIVIDED, sizes[-1]) or (at < len(sizes) and n >= _FULL * sizes[at]):
            return n
        return sizes[at - 1]

    def _stage(self, i: int) -> Stage:
        while len(self._stages) <= i:
            # a batch of the largest of few rows fits, in any type
            size = max(self._piece_bytes, 8 * self.input_dim * _GRAPH_ROWS[-1])
            self._stages.append(Stage(size, self.input_dim, self._device))
        return self._stages[i]

    def _graph(self, i: int, n: int, dtype: torch.dtype) -> _Graph:
        """Graph for ``n`` rows or some more, that runs in a stage."""
        sizes = self._sizes[dtype]
        size = sizes[bisect_left(sizes, n)]
        graph = self._graphs.get((i, size, dtype))
        if graph is None:
            graph = _Graph(self, self._stage(i), size, dtype)
            self._graphs[i, size, dtype] = graph
        return graph

    def _host_graph(self, n: int, dtype: torch.dtype) -> _HostGraph:
        """Graph for ``n`` rows or some more on the host, up to the largest of few."""
        size = _GRAPH_ROWS[bisect_left(_GRAPH_ROWS, n)]
        graph = self._host_graphs.get((size, dtype))
        if graph is None:
            graph = _HostGraph(self, self._stage(0), size, dtype)
            self._host_graphs[size, dtype] = graph
        return graph

    def queue(self, rows: Rows) -> Queued:
        """Queue everything for ``rows``; the host does not wait."""
        if self._network is None:
            codes, _ = self.launch(rows)
            return Queued(codes)
        wide = torch.empty(rows.n, rows.dim, dtype=torch.float64, device=self._device)
        widen(rows, wide)
        features, offsets = self._network.fast(wide)
        offsets = torch.where(features.isfinite().all(dim=1), offsets, torch.inf)
        of_features = Rows.of(features.nan_to_num(0.0, 0.0, 0.0))
        of_features.call[1].copy_(rows.call[1])
        codes, levels = self.launch(of_features, offsets)
        return Queued(codes, levels, wide)

    def resolve(self, rows: Tensor, codes: Tensor, left: Tensor) -> Tensor:
        """Codes ``(n, L)``, by the reference arithmetic for the rows numbered ``left``."""
        wide = codes.int()
        wide[left] = self._reference.codes(rows[left]).int()
        return wide.to(self.code_dtype)

    def launch(self, rows: Rows, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queue all kernels for ``rows`` (n, E); the host does not wait.

        ``offsets`` float64 (n,) says how far each row may be from the exact one; with it, codes of
        rows at level `gpu_kernels.REFERENCE` mean nothing. Returns codes ``(n, L)`` and levels
        int32 ``(n,)``; those of padding mean nothing.
        """
        plan, tables, n = self._plan, self._tables, rows.n
        empty = partial(torch.empty, device=self._device)
        codes = empty(n, plan.n_layers, dtype=self.code_dtype)
        levels = empty(n, dtype=torch.int32)
        work = Work.of(n, self._device)
        if not self._within_range:
            levels.fill_(kernels.REFERENCE.value)
            work.progress[1].copy_(rows.call[1])
            torch.arange(n, out=work.undecided)
        else:
            rounded = empty(n, tables.columns.shape[1], dtype=torch.float16)
            facts = empty(n, 4, dtype=torch.float64)
            if offsets is not None:
                facts[:, 3] = offsets
            round_rows(rows, rounded, facts)
            products = _product(rounded, tables.columns)
            for step in (prove, decide):
                step(
                    rows,
                    products,
                    facts,
                    tables,
                    codes=codes,
                    levels=levels,
                    work=work,
                    has_offset=offsets is not None,
                )
        finish(rows, tables, codes=codes, counts=self._counts, work=work, resolve=offsets is None)
        return codes, levels


@dataclass(frozen=True, eq=False)
class Queued:
    """What comes of a batch: codes ``(n, L)``, those of padding without a meaning.

    Of a model with a network codes at level `gpu_kernels.REFERENCE` mean nothing either:
    `GpuEncoder.resolve` makes them. ``levels`` is int32 ``(n,)``, ``wide`` float64 ``(n, D)``, the
    rows.
    """

    codes: Tensor
    levels: Tensor | None = None
    wide: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Work:
    """Numbers of rows that one kernel leaves to the next.

    Attributes
    ----------
    progress : Tensor
        int32 ``(3,)``: how many ``waiting`` and ``undecided`` have, and how many float64 decided.
    waiting, undecided : Tensor
        int32 ``(n,)``.
    """

    progress: Tensor
    waiting: Tensor
    undecided: Tensor

    @classmethod
    def of(cls, n: int, device: torch.device) -> Work:
        """Room for ``n`` rows, and none there yet."""
        return cls(
            torch.zeros(3, dtype=torch.int32, device=device),
            torch.empty(n, dtype=torch.int32, device=device),
            torch.empty(n, dtype=torch.int32, device=device),
        )


class _Graph:
    """All that is queued for a batch in a stage, as one call."""

    def __init__(self, encoder: GpuEncoder, stage: Stage, n: int, dtype: torch.dtype) -> None:
        self._encoder, self._stage = encoder, stage
        rows = Rows(stage.call, n, encoder.input_dim, dtype)
        stage.wait_for_room()
        # what runs meanwhile has no rows, reads nothing and counts nothing
        stage.point(stage.address, 0)
        self._graph, self._queued = stage.recorded(lambda: encoder.queue(rows))
        stage.release()

    def replay(self, address: int, n: int) -> Tensor:
        """Codes of the ``n`` rows at ``address``; the next replay in this stage overwrites them.

        Only of a model with a network the host waits, to see what is left to the reference.
        """
        self._stage.point(address, n)
        self._graph.replay()
        queued = self._queued
        codes = queued.codes[:n]
        if queued.levels is None or queued.wide is None:
            return codes
        left = (queued.levels[:n] == kernels.REFERENCE.value).nonzero()[:, 0]
        return self._encoder.resolve(queued.wide, codes, left) if len(left) else codes


class _HostGraph:
    """The same for a few rows on the host, whose codes are to be there, too.

    The kernels read pinned rows where they are, over the bus: a copy of its own would have to be
    queued, and waited for. Where the rows are and how many comes to the device within the graph.
    """

    def __init__(self, encoder: GpuEncoder, stage: Stage, n: int, dtype: torch.dtype) -> None:
        self._encoder, self._stage = encoder, stage
        self._rows = torch.empty(n, encoder.input_dim, dtype=dtype, pin_memory=True)
        self._call = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        self._numbers = self._call.numpy()
        self._numbers[0] = self._rows.data_ptr()
        self._codes = torch.empty(n, encoder.n_layers, dtype=encoder.code_dtype, pin_memory=True)
        self._codes_there = self._codes.numpy()
        self._levels = torch.zeros(n, dtype=torch.int32, pin_memory=True)
        call = torch.zeros(2, dtype=torch.int64, device=stage.call.device)
        # kept: the graph writes and reads there
        self._there = Rows(call, n, encoder.input_dim, dtype)

        def all_of_it() -> Queued:
            call.copy_(self._call, non_blocking=True)
            queued = encoder.queue(self._there)
            self._codes.copy_(queued.codes, non_blocking=True)
            if queued.levels is not None:
                self._levels.copy_(queued.levels, non_blocking=True)
            return queued

        stage.wait_for_room()
        self._graph, self._queued = stage.recorded(all_of_it)
        stage.release()

    def encode(self, rows: Tensor) -> npt.NDArray[np.unsignedinteger]:
        """Codes of ``rows`` on the host."""
        n = len(rows)
        if _can_be_read(rows):
            return self.encode_at(rows.data_ptr(), n)
        self._rows[:n].copy_(rows)
        return self.encode_at(self._rows.data_ptr(), n)

    def encode_at(self, address: int, n: int) -> npt.NDArray[np.unsignedinteger]:
        """Codes of the ``n`` rows at ``address``, where the kernels can read them."""
        self._numbers[0], self._numbers[1] = address, n
        self._stage.wait_for_room()
        try:
            self._graph.replay()
        finally:  # it reads what the next call changes
            self._stage.settle()
        codes: npt.NDArray[np.unsignedinteger] = self._codes_there[:n].copy()
        if self._queued.levels is None or self._queued.wide is None:
            return codes
        left = (self._levels[:n] == kernels.REFERENCE.value).nonzero()[:, 0]
        if len(left):
            wide = self._queued.wide
            there = torch.from_numpy(codes).to(wide.device)
            codes = self._encoder.resolve(wide, there, left.to(wide.device)).cpu().numpy()
        return codes


def _can_be_read(rows: Tensor) -> bool:
    """Whether the kernels can read ``rows`` on the host where they are."""
    return (
        rows.is_pinned() and rows.is_contiguous() and rows.data_ptr() % kernels.ADDRESSES.value == 0
    )


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products float32 ``(n, N)`` of float16 ``rows`` (n, E) and ``columns`` (N, E)."""
    return torch.mm(rows, columns.T, out_dtype=torch.float32)


def widen(rows: Rows, wide: Tensor) -> None:
    """Launch `gpu_kernels.widen`."""
    block = triton.next_power_of_2(rows.dim)
    kernels.widen[(rows.n,)](
        rows.call,
        wide,
        DTYPE=_TRITON_TYPES[rows.dtype],
        DIM=rows.dim,
        BLOCK=block,
        num_warps=_warps(block, 512),
    )


def round_rows(rows: Rows, rounded: Tensor, facts: Tensor) -> None:
    """Launch `gpu_kernels.round_rows`."""
    padded = rounded.shape[1]
    block = triton.next_power_of_2(padded)
    kernels.round_rows[(rows.n,)](
        rows.call,
        rounded,
        facts,
        DTYPE=_TRITON_TYPES[rows.dtype],
        DIM=rows.dim,
        PADDED=padded,
        BLOCK=block,
        num_warps=_warps(block, 512),
    )


def prove(
    rows: Rows,
    products: Tensor,
    facts: Tensor,
    tables: Tables,
    *,
    codes: Tensor,
    levels: Tensor,
    work: Work,
    has_offset: bool,
) -> None:
    """Launch `gpu_kernels.prove`."""
    plan = tables.plan
    block_width = triton.next_power_of_2(tables.widest)
    kernels.prove[(rows.n,)](
        rows.call,
        products,
        facts,
        tables.codes,
        tables.half_norms,
        tables.margins,
        tables.rates,
        tables.grams,
        tables.offsets,
        tables.gram_offsets,
        plan.longest,
        tables.steps,
        codes,
        levels,
        work.progress,
        work.waiting,
        work.undecided,
        products.stride(0),
        DIM=plan.dim,
        LAYERS=plan.n_layers,
        NORMALIZE=plan.normalize,
        HAS_OFFSET=has_offset,
        ALIGNMENT=tables.alignment,
        BLOCK_WIDTH=block_width,
        num_warps=_warps(block_width, 2048),
    )


def decide(
    rows: Rows,
    products: Tensor,
    facts: Tensor,
    tables: Tables,
    *,
    codes: Tensor,
    levels: Tensor,
    work: Work,
    has_offset: bool,
) -> None:
    """Launch `gpu_kernels.decide`."""
    plan = tables.plan
    block_dim = triton.next_power_of_2(plan.dim)
    block_width = triton.next_power_of_2(tables.widest)
    kernels.decide[(min(rows.n, _DECIDERS),)](
        rows.call,
        products,
        facts,
        plan.centroids,
        tables.codes,
        tables.half_norms,
        tables.margins,
        tables.rates,
        tables.grams,
        tables.offsets,
        tables.gram_offsets,
        plan.longest,
        tables.steps,
        codes,
        levels,
        work.progress,
        work.waiting,
        work.undecided,
        products.stride(0),
        DTYPE=_TRITON_TYPES[rows.dtype],
        DIM=plan.dim,
        LAYERS=plan.n_layers,
        NORMALIZE=plan.normalize,
        HAS_OFFSET=has_offset,
        ALIGNMENT=tables.alignment,
        BLOCK_LAYERS=triton.next_power_of_2(plan.n_layers),
        BLOCK_WIDTH=block_width,
        BLOCK_DIM=block_dim,
        num_warps=max(_warps(block_width, 1024), _warps(block_dim, 2048)),
    )


def finish(
    rows: Rows,
    tables: Tables,
    *,
    codes: Tensor,
    counts: Tensor,
    work: Work,
    resolve: bool,
) -> None:
    """Launch `gpu_kernels.finish`."""
    plan = tables.plan
    programs = max(1, min(rows.n, _FINISHERS, _FINISH_BYTES // (8 * plan.dim))) if resolve else 1
    scratch = torch.empty(
        programs if resolve else 0, plan.dim, dtype=torch.float64, device=codes.device
    )
    block_dim = triton.next_power_of_2(plan.dim)
    block_width = triton.next_power_of_2(tables.widest)
    kernels.finish[(programs,)](
        rows.call,
        work.progress,
        work.undecided,
        tables.codebooks,
        tables.offsets,
        tables.codes,
        tables.constants,
        scratch,
        codes,
        counts,
        DTYPE=_TRITON_TYPES[rows.dtype],
        DIM=plan.dim,
        LAYERS=plan.n_layers,
        NORMALIZE=plan.normalize,
        RESOLVE=resolve,
        BLOCK_WIDTH=block_width,
        BLOCK_DIM=block_dim,
        num_warps=_warps(max(block_width, block_dim), 512),
        enable_fp_fusion=False,
    )


def _warps(block: int, numbers_each: int) -> int:
    """Warps of a program that holds ``block`` numbers: a power of two, at most 16."""
    return min(16, max(1, block // numbers_each))
