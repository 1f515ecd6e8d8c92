"""One layer of a residual quantiser: a codebook, and how it is fitted to batches of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.functional import one_hot

from semid_server.model.distances import SquaredEuclideanDistance
from semid_server.model.initializers import KMeansPlusPlusInitInitializer
from semid_server.model.losses import BetaQuantizationLoss, WeightedSquaredError
from semid_server.model.ranks import by_itself, from_first_rank, is_first_rank, summed_over_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from semid_server.model.distances import Distance
    from semid_server.model.initializers import Initializer

T = TypeVar("T")

DEFAULT_OPTIMIZER = partial(torch.optim.SGD, lr=0.5)
"""At this rate a step on ``w ||c - m||^2`` moves ``c`` by exactly ``w (m - c)``."""

DEFAULT_INIT_BUFFER_SIZE = 3072
"""Rows from which the first centroids are drawn."""


class Assignment(NamedTuple):
    """Rows under a codebook.

    Attributes
    ----------
    codes : Tensor
        int64 ``(n,)``, the centroid nearest to each row; the lowest index wins a tie.
    embeddings : Tensor
        ``(n, E)``, those centroids.
    """

    codes: Tensor
    embeddings: Tensor


class LayerStep(NamedTuple):
    """What a training step of a layer gives: an `Assignment` and the loss to step on.

    Attributes
    ----------
    codes : Tensor
        int64 ``(n,)``, under the centroids as they were before the step.
    embeddings : Tensor
        ``(n, E)``, those centroids; zeros while the layer buffers rows.
    loss : Tensor or None
        A scalar; None when the centroids were moved by hand (``update_manually``).
    """

    codes: Tensor
    embeddings: Tensor
    loss: Tensor | None


class QuantizationLayer(nn.Module, ABC):
    """A codebook of ``n_clusters`` centroids, all zero until it is trained or loaded.

    Training starts by buffering rows; the batch that fills the buffer initialises the
    centroids, and every later one fits them (`forward`).

    Parameters
    ----------
    n_clusters : int
        ``K``, centroids.
    n_features : int
        ``E``, numbers in a centroid.
    distance_function : Distance
        What "nearest" means.
    initializer : Initializer
        Draws the first centroids from the buffered rows.
    loss_function : nn.Module
        What the layer minimises.
    optimizer : callable, optional
        Makes the optimizer from the parameters; None is `DEFAULT_OPTIMIZER`.
    init_buffer_size : int
        Rows that are buffered before the centroids are drawn.
    update_manually : bool
        Assign new centroids directly, without a loss and an optimizer.

    Where a distance, an initializer or a loss is expected, its class does too: it is constructed
    without arguments.

    Attributes
    ----------
    centroids : nn.Parameter
        ``(K, E)``.
    is_initialized : bool
        Whether training has drawn the first centroids.
    has_trained : bool
        Whether training has fitted them to a batch since.
    """

    def __init__(
        self,
        n_clusters: int,
        n_features: int,
        *,
        distance_function: Distance | type[Distance],
        initializer: Initializer | type[Initializer],
        loss_function: nn.Module | type[nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer] | None,
        init_buffer_size: int,
        update_manually: bool,
    ) -> None:
        super().__init__()
        self.n_clusters = n_clusters
        self.n_features = n_features
        self.distance_function = _instance(distance_function)
        self.initializer = _instance(initializer)
        self.loss_function = _instance(loss_function)
        self.optimizer = optimizer or DEFAULT_OPTIMIZER
        self.init_buffer_size = init_buffer_size
        self.update_manually = update_manually
        self.centroids = nn.Parameter(torch.zeros(n_clusters, n_features))
        self.is_initialized = False
        self.has_trained = False
        self._buffer: list[Tensor] = []

    @torch.no_grad()
    def predict_step(self, batch: Tensor) -> Assignment:
        """Codes and centroids of rows ``batch`` (n, E). Changes nothing."""
        codes = self.distance_function.compute(batch, self.centroids).argmin(dim=1)
        return Assignment(codes, self.centroids[codes])

    def model_step(self, batch: Tensor) -> LayerStep:
        """Train on rows ``batch`` (n, E): buffer them, draw the centroids, or fit them."""
        if not self.is_initialized:
            return self.initialization_step(batch)
        self.has_trained = True
        step: LayerStep = self(batch)
        return step

    def initialization_step(self, batch: Tensor) -> LayerStep:
        """Buffer rows ``batch`` (n, E); when the buffer is full, draw the first centroids.

        A step of `DEFAULT_OPTIMIZER` on the loss returned puts the centroids exactly there. Of
        several ranks the first decides when, and draws from its own buffer for all of them.

        Raises
        ------
        ValueError
            If the buffer holds fewer rows than there are centroids.
        """
        self._buffer_points(batch)
        full = torch.tensor(self.buffered_rows >= self.init_buffer_size, device=batch.device)
        if not from_first_rank(full):
            codes = torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
            loss = self._initial_loss(torch.zeros_like(self.centroids))
            return LayerStep(codes, torch.zeros_like(batch), loss)
        drawn = torch.empty_like(self.centroids)
        if is_first_rank():
            with by_itself():
                drawn = self.initializer(torch.cat(self._buffer), self.n_clusters)
        drawn = from_first_rank(drawn)
        self._buffer = []
        self.is_initialized = True
        codes = self.distance_function.compute(batch.detach(), drawn).argmin(dim=1)
        return LayerStep(codes, drawn[codes], self._initial_loss(drawn))

    @property
    def buffered_rows(self) -> int:
        """Rows in the buffer; 0 before training and once the layer is initialised."""
        return sum(map(len, self._buffer))

    def _buffer_points(self, batch: Tensor) -> None:
        """Append rows of ``batch`` (n, E) until the buffer is full; the rest is not used."""
        room = self.init_buffer_size - self.buffered_rows
        self._buffer.append(batch[:room].detach().clone())

    def training_state(self) -> dict[str, object]:
        """What training needs to go on besides the parameters: counts, flags and buffered rows."""
        return {
            "is_initialized": self.is_initialized,
            "has_trained": self.has_trained,
            "buffer": [rows.clone() for rows in self._buffer],
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `training_state` gave."""
        self.is_initialized = state["is_initialized"]
        self.has_trained = state["has_trained"]
        self._buffer = [rows.to(self.centroids.device) for rows in state["buffer"]]

    def _initial_loss(self, drawn: Tensor) -> Tensor | None:
        if not self.update_manually:
            loss: Tensor = WeightedSquaredError()(self.centroids, drawn)
            return loss
        with torch.no_grad():
            self.centroids.copy_(drawn)
        return None

    @abstractmethod
    def forward(self, batch: Tensor) -> LayerStep:
        """Fit the initialised centroids to rows ``batch`` (n, E)."""


class MiniBatchKMeans(QuantizationLayer):
    """Mini-batch k-means (Sculley, 2010, https://dl.acm.org/doi/10.1145/1772690.1772862).

    Parameters are those of `QuantizationLayer`.
    """

    counts: Tensor

    def __init__(  # noqa: PLR0917 - the published signature
        self,
        n_clusters: int,
        n_features: int,
        distance_function: Distance | type[Distance] = SquaredEuclideanDistance,
        initializer: Initializer | type[Initializer] = KMeansPlusPlusInitInitializer,
        loss_function: nn.Module | type[nn.Module] = WeightedSquaredError,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        init_buffer_size: int = DEFAULT_INIT_BUFFER_SIZE,
        update_manually: bool = False,  # noqa: FBT001, FBT002 - one of the published parameters
    ) -> None:
        super().__init__(
            n_clusters,
            n_features,
            distance_function=distance_function,
            initializer=initializer,
            loss_function=loss_function,
            optimizer=optimizer,
            init_buffer_size=init_buffer_size,
            update_manually=update_manually,
        )
        # Rows seen by each centroid in training, N_j: no part of a served model's state.
        self.register_buffer("counts", torch.zeros(n_clusters, dtype=torch.int64), persistent=False)

    def training_state(self) -> dict[str, object]:
        """What training needs to go on, the rows that each centroid has seen included."""
        return super().training_state() | {"counts": self.counts.clone()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `training_state` gave."""
        super().load_training_state(state)
        self.counts.copy_(state["counts"])

    def forward(self, batch: Tensor) -> LayerStep:
        """Move each centroid towards the mean of its rows in ``batch`` (n, E).

        With ``n_j`` rows in the batch and ``N_j`` so far, these included, centroid ``j`` goes the
        share ``n_j / N_j`` of the way: directly with ``update_manually``, else through a step of
        `DEFAULT_OPTIMIZER` on the loss ``sum_j (n_j / N_j) ||c_j - m_j||^2``. Several ranks do what
        one would do with all of their rows.
        """
        codes, embeddings = self.predict_step(batch)
        rows = summed_over_ranks(torch.bincount(codes, minlength=self.n_clusters))
        sums = summed_over_ranks(sums_by_code(batch.detach(), codes, self.n_clusters))
        self.counts += rows
        hit = rows.nonzero().squeeze(1)
        means = sums[hit] / rows[hit, None]
        weights = rows[hit] / self.counts[hit]
        if not self.update_manually:
            return LayerStep(
                codes, embeddings, self.loss_function(self.centroids[hit], means, weights)
            )
        with torch.no_grad():
            self.centroids[hit] += weights[:, None] * (means - self.centroids[hit])
        return LayerStep(codes, embeddings, None)


class VectorQuantization(QuantizationLayer):
    """A codebook that gradients move, as in VQ-VAE (https://arxiv.org/abs/1711.00937).

    Parameters are those of `QuantizationLayer`.
    """

    def __init__(  # noqa: PLR0917 - the published signature
        self,
        n_clusters: int,
        n_features: int,
        distance_function: Distance | type[Distance] = SquaredEuclideanDistance,
        initializer: Initializer | type[Initializer] = KMeansPlusPlusInitInitializer,
        loss_function: nn.Module | type[nn.Module] = BetaQuantizationLoss,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        init_buffer_size: int = DEFAULT_INIT_BUFFER_SIZE,
    ) -> None:
        super().__init__(
            n_clusters,
            n_features,
            distance_function=distance_function,
            initializer=initializer,
            loss_function=loss_function,
            optimizer=optimizer,
            init_buffer_size=init_buffer_size,
            update_manually=False,
        )

    def forward(self, batch: Tensor) -> LayerStep:
        """Loss of rows ``batch`` (n, E) under their centroids; the embeddings are straight-through.

        That is, their values are the centroids and their gradient goes to ``batch`` unchanged.
        """
        codes = self.predict_step(batch).codes
        chosen = self.centroids[codes]
        straight_through = batch + (chosen - batch).detach()
        return LayerStep(codes, straight_through, self.loss_function(batch, chosen))


def sums_by_code(rows: Tensor, codes: Tensor, n_clusters: int) -> Tensor:
    """Sums ``(K, E)`` of the rows ``(n, E)`` that have each code, the same in every run."""
    if rows.is_cuda:  # there index_add_ adds in the order in which threads happen to arrive
        return one_hot(codes, n_clusters).to(rows.dtype).T @ rows
    return rows.new_zeros(n_clusters, rows.shape[1]).index_add_(0, codes, rows)


def _instance(part: T | type[T]) -> T:
    return part() if isinstance(part, type) else part
