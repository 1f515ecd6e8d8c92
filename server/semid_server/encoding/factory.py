"""The one place that chooses an encoder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from semid_server.encoding.cpu import CpuEncoder
from semid_server.encoding.plan import gram_bytes
from semid_server.encoding.reference import ReferenceEncoder
from semid_server.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import nn

    from semid_server.encoding.protocol import Encoder
    from semid_server.model import ModelSpec

_GRAM_SHARE = 4
"""Gram tables may take this share of a device's memory. They grow with the square of the number
of centroids: 3 x 8,192 of them need 0.75 GiB, 8 x 8,192 need 7."""


def make_encoder(
    model: nn.Module,
    spec: ModelSpec,
    *,
    device: torch.device,
    threads: int | None = None,
    reference: bool = False,
) -> Encoder:
    """Build the encoder of ``model`` for ``device``.

    Parameters
    ----------
    model : nn.Module
        A `semid_server.model.ResidualQuantization`; its weights are copied.
    spec : ModelSpec
        Its shape.
    device : torch.device
        Where to compute.
    threads : int, optional
        At most so many threads on the CPU; all processors by default.
    reference : bool
        Compute by the definition itself: the same codes, hundreds of times slower. So it is,
        too, for a model whose Gram tables do not fit or whose rows or codebooks are too wide
        for the GPU's kernels.

    Raises
    ------
    ConfigurationError
        The device cannot be used; the message says why.
    """
    if reference or gram_bytes(spec.codebook_widths) > _memory(device) // _GRAM_SHARE:
        return ReferenceEncoder(model, spec, device=device, threads=threads)
    if device.type == "cpu":
        return CpuEncoder(model, spec, threads=threads)
    # Triton comes with torch for CUDA, and only with that
    from semid_server.encoding import gpu  # noqa: PLC0415 - for the reason above

    if not gpu.fits(spec):
        return ReferenceEncoder(model, spec, device=device, threads=threads)
    check_launcher()
    return gpu.GpuEncoder(model, spec, device=device)


def check_launcher() -> None:
    """Have Triton load what it launches kernels with; it has a C compiler make that at first use.

    Raises
    ------
    ConfigurationError
        There is neither.
    """
    import triton  # noqa: PLC0415 - comes with torch for CUDA

    try:
        _ = triton.runtime.driver.active
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise ConfigurationError(
            f"Triton cannot launch kernels here ({type(error).__name__}: {text}); `semid doctor` "
            "says what to do"
        ) from error


def _memory(device: torch.device) -> int:
    """Bytes of memory that the device has, used or not."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.cuda.get_device_properties(device).total_memory
