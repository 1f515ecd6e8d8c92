"""Where the centroids of a layer start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Initializer(Protocol):
    """Draws the first centroids of a layer from the rows that it buffered."""

    def __call__(self, points: Tensor, n_clusters: int) -> Tensor:
        """Centroids ``(n_clusters, E)`` for rows ``points`` (n, E), on their device."""
        ...


class KMeansPlusPlusInitInitializer:
    """K-means++ (Arthur and Vassilvitskii, 2007): centroids drawn from the rows, far apart.

    The first is a uniform row. Each next one is a row drawn with probability proportional to
    its squared distance to the nearest centroid so far; once every row lies on a centroid, the
    rest are uniform rows. Random numbers come from torch's default generator of the device on
    which the work happens.

    Parameters
    ----------
    initialize_on_cpu : bool
        Draw on the CPU, wherever the rows are; the centroids come back on the rows' device.
    """

    def __init__(self, initialize_on_cpu: bool = False) -> None:  # noqa: FBT001, FBT002 - the published signature
        self.initialize_on_cpu = initialize_on_cpu

    def __call__(self, points: Tensor, n_clusters: int) -> Tensor:
        """Draw ``n_clusters`` rows ``(K, E)`` of ``points`` (n, E).

        Raises
        ------
        ValueError
            If there are fewer rows than centroids.
        """
        if len(points) < n_clusters:
            raise ValueError(
                f"k-means++ draws {n_clusters} centroids from {len(points)} rows; "
                f"give at least {n_clusters} rows, or fewer centroids"
            )
        rows = points.detach()
        if self.initialize_on_cpu:
            rows = rows.cpu()
        chosen = [torch.randint(len(rows), (1,), device=rows.device)]
        nearest = (rows - rows[chosen[0]]).square().sum(dim=1)
        while len(chosen) < n_clusters:
            # Rows on a centroid are at a distance of exactly 0: differences of equal rows are.
            weights = nearest if nearest.any() else torch.ones_like(nearest)
            chosen.append(torch.multinomial(weights, 1))
            nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(dim=1))
        return rows[torch.cat(chosen)].to(points.device)
