"""The definition of a code, in float64 with a fixed order of summation.

::

    r = network(x)                                        # every sum in index order
    for l in 0..L-1:
        if normalize_residuals: r_i = r_i / max(sqrt(sum_i r_i^2), 1e-12)
        k_l = the lowest j with the least sum_i (r_i - C_l[j]_i)^2
        r_i = r_i - C_l[k_l]_i

Every ``sum_i`` starts at zero and adds its terms one by one, ``i`` rising; each addition,
subtraction, product, quotient and square root is rounded once to float64 (IEEE 754, to nearest),
and no product is fused with an addition. Thereby a row's codes are the same bits of arithmetic on
every device, in every batch and on any number of threads. On the CPU a compiled loop does it, on
other devices torch's elementwise operations; a test holds the two bit-equal.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from semid_server.encoding import reference_kernel
from semid_server.encoding.network import Network, norm_in_order
from semid_server.encoding.protocol import EncodeCounts, code_dtype_of
from semid_server.encoding.rows import AtOnce, checked, default_threads, spans
from semid_server.model import NORM_EPS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from semid_server.model import ModelSpec

_CPU_CHUNK = 1 << 16
"""Numbers in an intermediate of torch operations on the CPU: half a MiB, within its cache."""

_DEVICE_CHUNK = 1 << 25
"""The same on a GPU: 256 MiB, enough rows to fill it."""


class ReferenceEncoder(AtOnce):
    """Codes by the definition above: slow, simple, and what every other encoder must equal.

    Parameters
    ----------
    model : nn.Module
        Its weights are copied.
    spec : ModelSpec
        Its shape.
    device : torch.device
        Where to compute.
    threads : int, optional
        At most so many threads on the CPU; all processors by default.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        *,
        device: torch.device,
        threads: int | None = None,
    ) -> None:
        state = model.state_dict()
        self._spec = spec
        self._device = device
        self._threads = threads or default_threads()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="semid-reference")
        self._network = Network.of(spec, state, device)
        # transposed: a feature of all centroids lies together
        self._codebooks = tuple(
            state[f"quantization_layer_list.{layer}.centroids"]
            .detach()
            .to(device, torch.float32)
            .T.contiguous()
            for layer in range(spec.n_layers)
        )
        self._rows = 0

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
        """All rows so far, each decided by the reference arithmetic."""
        return EncodeCounts(reference=self._rows)

    def warm_up(self) -> None:
        """Compile the loops."""
        self.codes(torch.zeros(1, self.input_dim, device=self._device))

    def encode(self, rows: Tensor) -> Tensor:
        """Codes ``(n, L)`` of ``rows`` (n, D), on their device; see `Encoder.encode`."""
        codes = self.codes(checked(rows, self.input_dim).to(self._device))
        self._rows += len(rows)
        return codes.to(self.code_dtype).to(rows.device)

    def codes(self, rows: Tensor) -> Tensor:
        """Codes int64 ``(n, L)`` of ``rows`` (n, D) that are on the encoder's device."""
        codes = torch.empty(len(rows), self.n_layers, dtype=torch.int64, device=self._device)
        for start, stop in spans(len(rows), self._rows_at_once()):
            residual = rows[start:stop].double()
            if self._network is not None:
                residual = self._network.in_order(residual)
            quantize = self._quantize_on_cpu if self._device.type == "cpu" else self._quantize
            codes[start:stop] = quantize(residual)
        return codes

    def _rows_at_once(self) -> int:
        widths = [*self._spec.codebook_widths, *(self._spec.encoder_hidden_dims or ())]
        if self._device.type != "cpu":
            return max(1, _DEVICE_CHUNK // max(*widths, self.input_dim))
        if self._network is not None:
            return max(1, _CPU_CHUNK // max(*widths, self.input_dim))
        return 1024 * self._threads

    def _quantize(self, residual: Tensor) -> Tensor:
        """Codes int64 ``(n, L)`` of float64 ``residual`` (n, E), by torch operations."""
        codes = []
        for codebook in self._codebooks:
            if self._spec.normalize_residuals:
                residual = residual / norm_in_order(residual).clamp(min=NORM_EPS)[:, None]
            columns = residual.T.contiguous()
            distances = torch.zeros(
                len(residual), codebook.shape[1], dtype=torch.float64, device=self._device
            )
            difference = torch.empty_like(distances)
            for feature, centroids in zip(columns, codebook, strict=True):
                # three operations, not one: each is rounded
                torch.sub(feature[:, None], centroids.double(), out=difference)
                torch.mul(difference, difference, out=difference)
                distances += difference
            code = lowest_argmin(distances)
            codes.append(code)
            residual = residual - codebook.T[code].double()
        return torch.stack(codes, dim=1)

    def _quantize_on_cpu(self, residual: Tensor) -> Tensor:
        """Do the same by a compiled loop, rows shared among threads."""
        values = np.ascontiguousarray(residual.numpy())
        codes = np.empty((len(values), self.n_layers), dtype=np.int64)
        tables = [codebook.numpy() for codebook in self._codebooks]
        share = -(-len(values) // self._threads)

        def work(span: tuple[int, int]) -> None:
            part = slice(*span)
            scratch = values[part].copy()  # the kernel leaves the residual behind
            for layer, table in enumerate(tables):
                reference_kernel.assign(
                    scratch, table, self._spec.normalize_residuals, codes[part, layer]
                )

        parts = list(spans(len(values), max(1, share)))
        if len(parts) == 1:
            work(parts[0])
        else:
            list(self._pool.map(work, parts))
        return torch.from_numpy(codes)


def lowest_argmin(distances: Tensor) -> Tensor:
    """Lowest index of the least of each row of ``distances`` (n, K); int64 ``(n,)``."""
    distances = torch.where(distances.isnan(), torch.inf, distances)
    least = distances.amin(dim=1, keepdim=True)
    indices = torch.arange(distances.shape[1], device=distances.device)
    return torch.where(distances == least, indices, distances.shape[1]).amin(dim=1)
