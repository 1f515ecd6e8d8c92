"""The one place that chooses an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from semid_server.encoding.cpu import CpuEncoder
from semid_server.encoding.reference import ReferenceEncoder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from semid_server.encoding.protocol import Encoder
    from semid_server.model import ModelSpec


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
        Compute by the definition itself: the same codes, hundreds of times slower.
    """
    if reference or device.type != "cpu":
        return ReferenceEncoder(model, spec, device=device, threads=threads)
    return CpuEncoder(model, spec, threads=threads)
