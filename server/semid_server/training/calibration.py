"""The lengths that residual normalisation divides out, measured on a set of embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

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
    return Calibration(
        input_norm=(input_length / rows.n_rows).item(),
        residual_norms=tuple(_means(figure).float().cpu() for figure in figures),
    )


def _means(figure: torch.Tensor) -> torch.Tensor:
    counts, sums = figure.unbind(1)
    return torch.where(counts > 0, sums / counts.clamp_min(1), sums.sum() / counts.sum())
