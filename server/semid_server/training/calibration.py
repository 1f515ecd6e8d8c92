"""The lengths that residual normalisation divides out, measured on a set of embeddings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from semid_server.errors import ConfigurationError
from semid_server.model import NORM_EPS, Calibration
from semid_server.model.layers import sums_by_code
from semid_server.training.codebooks import nearest

if TYPE_CHECKING:
    from semid_server.model import ResidualQuantization
    from semid_server.training.rows import Rows


@torch.no_grad()
def calibrate(model: ResidualQuantization, rows: Rows) -> Calibration:
    """Measure what decode mode CALIBRATED needs, in one pass over ``rows``.

    ``m`` is the mean length of the rows that enter the first layer, ``s_l[k]`` that of what layer
    ``l`` leaves of the rows with code ``k`` there, before it is normalised. A code that no
    row has gets the mean of its layer.

    Parameters
    ----------
    model : ResidualQuantization
        On any device; left in evaluation mode.
    rows : Rows
        The embeddings, float32 ``(n, D)`` in blocks.

    Returns
    -------
    Calibration
        ``m``, and ``s_l`` float32 ``(K_l,)`` on the CPU for each layer.

    Raises
    ------
    ConfigurationError
        If the rows cannot be read, or a length that was measured is no number to decode by: ``m``
        is 0 or not finite, or an ``s_l`` is not finite.
    """
    model.eval()
    device = model.layers[0].centroids.device
    input_length = torch.zeros((), dtype=torch.float64, device=device)
    figures = [
        torch.zeros(layer.n_clusters, 2, dtype=torch.float64, device=device)
        for layer in model.layers
    ]
    for block in range(len(rows.blocks)):
        residual = model.features(torch.from_numpy(rows.read(block)).to(device))
        input_length += residual.norm(dim=1).double().sum()
        for index, layer in enumerate(model.layers):
            if model.normalize_residuals:
                residual = normalize(residual, dim=1, eps=NORM_EPS)
            codes = nearest(residual, layer.centroids)
            residual = residual - layer.centroids[codes]
            length = residual.norm(dim=1).double()
            each = torch.stack([torch.ones_like(length), length], dim=1)
            figures[index] += sums_by_code(each, codes, layer.n_clusters)
    input_norm = (input_length / rows.n_rows).item()
    if not 0 < input_norm < math.inf:
        raise ConfigurationError(
            f"{rows.name}: the mean length of the {rows.n_rows} rows that enter the first layer is "
            f"{input_norm:.6g} in float32; expected a finite number above 0, to decode by: bring "
            "the embeddings to a scale whose squares float32 holds"
        )
    residual_norms = tuple(_means(figure).float().cpu() for figure in figures)
    for index, norms in enumerate(residual_norms):
        if not norms.isfinite().all():
            raise ConfigurationError(
                f"{rows.name}: the mean length of what layer {index} leaves is "
                f"{norms[~norms.isfinite()][0]:.6g} for a code; expected a finite number"
            )
    return Calibration(input_norm=input_norm, residual_norms=residual_norms)


def _means(figure: torch.Tensor) -> torch.Tensor:
    counts, sums = figure.unbind(1)
    return torch.where(counts > 0, sums / counts.clamp_min(1), sums.sum() / counts.sum())
