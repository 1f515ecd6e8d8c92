"""First centroids by clustering the buffered rows, rather than drawing among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from semid_server.model.layers import MiniBatchKMeans

if TYPE_CHECKING:
    from torch import Tensor


class MiniBatchKMeansInitializer:
    """Mini-batch k-means over the buffer, from k-means++ on, the whole buffer being each batch.

    Parameters
    ----------
    max_iterations : int
        Steps at most; fewer once no centroid moves.
    """

    def __init__(self, max_iterations: int = 50) -> None:
        self.max_iterations = max_iterations

    def __call__(self, points: Tensor, n_clusters: int) -> Tensor:
        """Centroids ``(n_clusters, E)`` of rows ``points`` (n, E), on their device.

        Raises
        ------
        ValueError
            If there are fewer rows than centroids.
        """
        layer = MiniBatchKMeans(
            n_clusters, points.shape[1], init_buffer_size=len(points), update_manually=True
        ).to(points)
        layer.model_step(points)
        for _ in range(self.max_iterations):
            before = layer.centroids.detach().clone()
            layer.model_step(points)
            if torch.equal(before, layer.centroids):
                break
        return layer.centroids.detach()
