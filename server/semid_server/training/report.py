"""How good the IDs of a model are on a set of embeddings: collisions, use of codes, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from semid_server.model import DecodeMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from semid_server.model import Calibration, ResidualQuantization
    from semid_server.training.rows import Rows


@dataclass(frozen=True, slots=True)
class LayerUse:
    """How the codes of one layer are used.

    Attributes
    ----------
    counts : tuple of int
        Items with each code.
    """

    counts: tuple[int, ...]

    @property
    def dead(self) -> int:
        """Codes that no item has."""
        return self.counts.count(0)

    @property
    def coverage(self) -> float:
        """Share of the codes that some item has."""
        return 1 - self.dead / len(self.counts)

    @property
    def entropy(self) -> float:
        """Of the codes, in bits; at most ``log2 K``."""
        total = sum(self.counts)
        return -sum(n / total * math.log2(n / total) for n in self.counts if n)

    @property
    def perplexity(self) -> float:
        """``2^entropy``: as many codes, used equally, would tell items apart as well."""
        return math.exp2(self.entropy)


@dataclass(frozen=True, slots=True)
class DepthFigures:
    """What the first ``depth`` codes of each ID say of the embeddings.

    Errors are squared distances to the normalised embeddings, summed over all items, as a share
    of what decoding every item to the mean of all would give: 0 is exact, 1 says nothing.

    Attributes
    ----------
    depth : int
        How many codes.
    sum_error : float
        Of decode mode SUM.
    calibrated_error : float or None
        Of decode mode CALIBRATED; None where the model has no calibration and needs one.
    least_error : float
        Of decoding items to the mean of all items with the same codes: no use of these codes
        can have less.
    neighbour_recall : float
        Share of an item's nearest items that have these codes too.
    chance : float
        Share of all pairs of items that do.
    """

    depth: int
    sum_error: float
    calibrated_error: float | None
    least_error: float
    neighbour_recall: float
    chance: float


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of a model on a set.

    Attributes
    ----------
    n_items : int
        Items in the set.
    group_sizes : dict of int to int
        For each size, how many IDs that many items share; 1 are IDs of a single item.
    layers : tuple of LayerUse
        The first layer first.
    depths : tuple of DepthFigures
        For the first code, the first two, and so on.
    neighbours : int
        Nearest items that `DepthFigures.neighbour_recall` is of.
    """

    n_items: int
    group_sizes: dict[int, int]
    layers: tuple[LayerUse, ...]
    depths: tuple[DepthFigures, ...]
    neighbours: int

    @property
    def unique_items(self) -> int:
        """Items with an ID of their own."""
        return self.group_sizes.get(1, 0)

    @property
    def colliding_share(self) -> float:
        """Share of the items whose ID another item has too."""
        return 1 - self.unique_items / self.n_items

    @property
    def distinct_ids(self) -> int:
        """IDs that some item has."""
        return sum(self.group_sizes.values())

    @property
    def largest_group(self) -> int:
        """Items that share the most frequent ID."""
        return max(self.group_sizes)


@torch.no_grad()
def report(
    model: ResidualQuantization,
    rows: Rows,
    encode: Callable[[Tensor], Tensor],
    *,
    calibration: Calibration | None = None,
    neighbours: int = 10,
    queries: int = 1000,
    seed: int = 0,
) -> Report:
    """Measure the IDs of ``rows``, in three passes over them.

    Parameters
    ----------
    model : ResidualQuantization
        On the CPU.
    rows : Rows
        The embeddings, at least two.
    encode : callable
        Gives the codes ``(n, L)`` of embeddings ``(n, D)``; they decide, whatever the model says.
    calibration : Calibration, optional
        For decode mode CALIBRATED.
    neighbours, queries : int
        How many nearest items of how many items, drawn by ``seed``, the recall is of.
    """
    model.eval()
    blocks = range(len(rows.blocks))

    def block_of(index: int) -> Tensor:
        return torch.from_numpy(rows.read(index))

    codes = torch.cat([encode(block_of(block)).long() for block in blocks])
    neighbours = min(neighbours, rows.n_rows - 1)
    calibrated = calibration is not None or not model.normalize_residuals
    groups = [_Groups(codes[:, : depth + 1], rows.dim) for depth in range(model.n_layers)]
    errors = torch.zeros(model.n_layers, 2, dtype=torch.float64)
    total, squares = torch.zeros(rows.dim, dtype=torch.float64), 0.0
    drawn = np.random.default_rng(seed).permutation(rows.n_rows)[:queries]
    asked = torch.from_numpy(np.sort(drawn))
    query_rows = torch.empty(len(asked), rows.dim)
    for block, (start, stop) in zip(blocks, rows.blocks, strict=True):
        target = model.normalization_layer(block_of(block))
        total += target.double().sum(dim=0)
        squares += target.double().square().sum().item()
        inside = (asked >= start) & (asked < stop)
        query_rows[inside] = target[asked[inside] - start]
        for depth, group in enumerate(groups):
            prefix = codes[start:stop, : depth + 1]
            group.add(target, start)
            errors[depth, 0] += _squared_error(target, model.decode(prefix))
            if calibrated:
                decoded = model.decode(prefix, mode=DecodeMode.CALIBRATED, calibration=calibration)
                errors[depth, 1] += _squared_error(target, decoded)
    # The error of decoding to the mean of all; a set of equal rows has none to share.
    whole = squares - (total.square().sum() / rows.n_rows).item() or 1.0

    nearest = _nearest(model, rows, asked, query_rows, neighbours)
    depths = []
    for depth, group in enumerate(groups):
        same = (codes[nearest][:, :, : depth + 1] == codes[asked][:, None, : depth + 1]).all(dim=2)
        depths.append(
            DepthFigures(
                depth=depth + 1,
                sum_error=errors[depth, 0].item() / whole,
                calibrated_error=errors[depth, 1].item() / whole if calibrated else None,
                least_error=group.error() / whole,
                neighbour_recall=same.double().mean().item(),
                chance=group.chance(),
            )
        )
    sizes, number = torch.unique(groups[-1].counts, return_counts=True)
    return Report(
        n_items=rows.n_rows,
        group_sizes=dict(zip(sizes.tolist(), number.tolist(), strict=True)),
        layers=tuple(
            LayerUse(tuple(torch.bincount(column, minlength=layer.n_clusters).tolist()))
            for column, layer in zip(codes.unbind(dim=1), model.layers, strict=True)
        ),
        depths=tuple(depths),
        neighbours=neighbours,
    )


class _Groups:
    """Items with equal codes, and how far they lie from their means."""

    def __init__(self, codes: Tensor, dim: int) -> None:
        _, self._of_item, self.counts = torch.unique(
            codes, dim=0, return_inverse=True, return_counts=True
        )
        # An item alone is its own mean: only groups of several have an error, and take memory.
        several = self.counts > 1
        self._slot = torch.where(several, several.cumsum(dim=0) - 1, -1)
        self._sums = torch.zeros(int(several.sum()), dim, dtype=torch.float64)
        self._squares = 0.0

    def add(self, rows: Tensor, start: int) -> None:
        """Take in rows ``(m, D)``, the items from ``start`` on."""
        slot = self._slot[self._of_item[start : start + len(rows)]]
        shared = rows[slot >= 0].double()
        self._sums.index_add_(0, slot[slot >= 0], shared)
        self._squares += shared.square().sum().item()

    def error(self) -> float:
        """Squared distances of all items to the means of their groups."""
        counts = self.counts[self.counts > 1]
        means = (self._sums.square().sum(dim=1) / counts).sum()
        return max(0.0, self._squares - float(means))

    def chance(self) -> float:
        """Share of all pairs of items that are in one group."""
        n = int(self.counts.sum())
        return int((self.counts * (self.counts - 1)).sum()) / (n * (n - 1))


def _squared_error(target: Tensor, decoded: Tensor) -> float:
    return float((target - decoded).double().square().sum())


def _nearest(
    model: ResidualQuantization, rows: Rows, asked: Tensor, query_rows: Tensor, neighbours: int
) -> Tensor:
    """Items int64 ``(queries, neighbours)`` nearest to each item asked for, itself left out."""
    distances = torch.empty(len(asked), 0)
    items = torch.empty(len(asked), 0, dtype=torch.int64)
    for block, (start, stop) in enumerate(rows.blocks):
        target = model.normalization_layer(torch.from_numpy(rows.read(block)))
        here = torch.cdist(query_rows, target)
        own = (asked >= start) & (asked < stop)
        here[own.nonzero().squeeze(1), asked[own] - start] = float("inf")
        distances = torch.cat([distances, here], dim=1)
        items = torch.cat([items, torch.arange(start, stop).expand(len(asked), -1)], dim=1)
        distances, kept = distances.topk(min(neighbours, distances.shape[1]), largest=False)
        items = items.gather(1, kept)
    return items
