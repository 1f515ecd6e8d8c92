"""Codebooks fitted to a whole set: Lloyd iterations, and a recipe for IDs that are unique.

Mini-batches see each row once or twice and never move a centroid that fell on a bad spot. Here
every pass goes over all rows, one layer after the other, each on the residuals that the
fitted layers before it leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize

from semid_server.model import NORM_EPS, KMeansPlusPlusInitInitializer
from semid_server.model.layers import sums_by_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from semid_server.model import ResidualQuantization
    from semid_server.training.rows import Rows

CHUNK_ROWS = 8192
"""Rows whose distances to all centroids are held at a time."""

MEMORY_BYTES = 4 << 30
"""Residuals of a set up to this size are kept; those of a larger one are made anew each pass."""

SAMPLE_ROWS_PER_CENTROID = 256
"""Rows to which centroids are fitted first: more of them do not move means any further."""

SEPARATED_ROWS = 1 << 16
"""Sets up to this size have their equal IDs separated: it takes a pass for each, in memory."""

TOLERANCE = 1e-5
"""Lloyd iterations end when the error falls by less than this share of it."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over all rows, as progress reports it.

    Attributes
    ----------
    layer : int
        The layer that is fitted.
    stage : str
        What the pass is part of: ``spherical``, ``lloyd``, ``relocate`` or ``whole``.
    number : int
        Passes of this stage so far.
    error : float
        Mean squared distance of the rows to their centroids before the centroids moved.
    """

    layer: int
    stage: str
    number: int
    error: float


class Residuals:
    """The rows that one layer of a model quantises, of a whole set, chunk by chunk.

    Iterating gives float32 ``(m, E)`` on the model's device, always in the order of the set.

    Parameters
    ----------
    model : ResidualQuantization
        Its layers before ``layer`` are read at each pass, or once if the residuals are kept.
    rows : Rows
        The embeddings.
    layer : int
        The layer whose input is wanted.
    memory_bytes : int
        Residuals are kept if they take no more than this.
    """

    def __init__(
        self,
        model: ResidualQuantization,
        rows: Rows,
        layer: int,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.n_rows = rows.n_rows
        self._model, self._rows, self._layer = model, rows, layer
        self.dim = model.layers[layer].n_features
        self._kept: Tensor | None = None
        if 4 * self.n_rows * self.dim <= memory_bytes:
            self._kept = torch.empty(
                self.n_rows, self.dim, device=model.layers[layer].centroids.device
            )
            for block, (_, residual) in zip(rows.blocks, self._computed(), strict=True):
                self._kept[slice(*block)] = residual

    def __iter__(self) -> Iterator[Tensor]:
        """Chunks of at most `CHUNK_ROWS` rows."""
        if self._kept is not None:
            yield from torch.split(self._kept, CHUNK_ROWS)
            return
        for _, residual in self._computed():
            yield from torch.split(residual, CHUNK_ROWS)

    def sample(self, size: int, seed: int) -> Tensor:
        """Rows ``(min(size, n), E)`` drawn without replacement, in the order of the set."""
        generator = np.random.default_rng((seed, self._layer))
        size = min(size, self.n_rows)
        drawn = torch.from_numpy(np.sort(generator.choice(self.n_rows, size, replace=False)))
        found, start = [], 0
        for chunk in self:
            inside = (drawn >= start) & (drawn < start + len(chunk))
            found.append(chunk[(drawn[inside] - start).to(chunk.device)])
            start += len(chunk)
        return torch.cat(found)

    def prefixes(self) -> Tensor:
        """Numbers int64 ``(n,)``, equal for rows with equal codes in all layers before."""
        found = torch.cat([prefix for prefix, _ in self._computed()])
        prefixes: Tensor = torch.unique(found, dim=0, return_inverse=True)[1]
        return prefixes

    @torch.no_grad()
    def _computed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes ``(m, layer)`` of the layers before, and residuals ``(m, E)``, block by block."""
        model = self._model.eval()
        device = model.layers[0].centroids.device
        for block in range(len(self._rows.blocks)):
            residual = model.features(torch.from_numpy(self._rows.read(block)).to(device))
            codes = torch.empty(len(residual), self._layer, dtype=torch.int64, device=device)
            for index, layer in enumerate(model.layers[: self._layer]):
                residual = _prepared(model, residual)
                codes[:, index] = nearest(residual, layer.centroids)
                residual = residual - layer.centroids[codes[:, index]]
            yield codes, _prepared(model, residual)


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """Codes int64 ``(n,)`` of rows ``(n, E)`` by a matrix product: fast, for fitting.

    Its rounding may decide near-ties otherwise than encoding does, which is the authority.
    """
    squares = centroids.square().sum(dim=1)
    return torch.addmm(squares, rows, centroids.T, alpha=-2).argmin(dim=1)


def _prepared(model: ResidualQuantization, residual: Tensor) -> Tensor:
    return normalize(residual, dim=1, eps=NORM_EPS) if model.normalize_residuals else residual


class _Moments(NamedTuple):
    """What a pass learns of each centroid, float64 but for the counts."""

    sums: Tensor  # (K, E), of its rows
    counts: Tensor  # int64 (K,)
    errors: Tensor  # (K,), squared distances of its rows, summed
    gains: Tensor  # (K,), by how much the errors would grow without it

    @property
    def error(self) -> float:
        """Mean squared distance of all rows."""
        return (self.errors.sum() / self.counts.sum()).item()


@torch.no_grad()
def _moments(residuals: Iterable[Tensor], centroids: Tensor) -> _Moments:
    width = len(centroids)
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    figures = centroids.new_zeros(width, 3, dtype=torch.float64)
    squares = centroids.square().sum(dim=1)
    for chunk in residuals:
        scores = torch.addmm(squares, chunk, centroids.T, alpha=-2)
        # With a single centroid there is no second one, and nothing to move either.
        (least, *second), (codes, *_) = (
            part.unbind(1) for part in scores.topk(min(2, width), dim=1, largest=False)
        )
        gain = second[0] - least if second else torch.zeros_like(least)
        distance = (least + chunk.square().sum(dim=1)).clamp_min(0)
        sums += sums_by_code(chunk, codes, width)
        each = torch.stack([torch.ones_like(distance), distance, gain], dim=1).double()
        figures += sums_by_code(each, codes, width)
    counts, errors, gains = figures.unbind(1)
    return _Moments(sums, counts.long(), errors, gains)


def lloyd(
    residuals: Iterable[Tensor],
    centroids: Tensor,
    iterations: int,
    *,
    spherical: bool = False,
    on_pass: Callable[[int, float], None] = lambda _number, _error: None,
) -> Tensor:
    """Move ``centroids`` (K, E) to the means of their rows, up to ``iterations`` times.

    ``residuals`` are the rows in chunks ``(m, E)``, iterated once for each pass.

    A centroid without rows goes beside the one whose rows are farthest from it. ``spherical``
    brings the means to length 1 (Dhillon and Modha, 2001): no centroid can then win rows by
    being short. Stops early once the error hardly falls.
    """
    before = float("inf")
    for number in range(iterations):
        moments = _moments(residuals, centroids)
        on_pass(number, moments.error)
        if before - moments.error <= TOLERANCE * moments.error:
            break
        before = moments.error
        means = (moments.sums / moments.counts[:, None].clamp_min(1)).to(centroids)
        dead = (moments.counts == 0).nonzero().squeeze(1)
        centroids = _split(means, moments, dead)
        if spherical:
            centroids = normalize(centroids, dim=1, eps=NORM_EPS)
    return centroids


def relocate(
    residuals: Iterable[Tensor],
    centroids: Tensor,
    *,
    rounds: int = 10,
    iterations: int = 15,
    on_pass: Callable[[int, float], None] = lambda _number, _error: None,
) -> Tensor:
    """Leave the optimum that Lloyd iterations found for a better one.

    Moves the centroids that would be missed least beside those with the greatest errors, lets
    Lloyd iterations settle, and keeps what has become better; else it moves half as many. (The
    idea of breathing k-means, Fritzke, 2020, https://arxiv.org/abs/2006.15666.)
    """
    moved = len(centroids) // 4
    moments = _moments(residuals, centroids)
    for number in range(rounds):
        if moved == 0:
            break
        on_pass(number, moments.error)
        least_missed = moments.gains.topk(moved, largest=False).indices
        candidate = lloyd(residuals, _split(centroids, moments, least_missed), iterations)
        after = _moments(residuals, candidate)
        if after.error < moments.error * (1 - TOLERANCE):
            centroids, moments = candidate, after
        else:
            moved //= 2
    return centroids


def _split(centroids: Tensor, moments: _Moments, free: Tensor) -> Tensor:
    """Put the ``free`` centroids beside those with the greatest errors, a tenth of their spread."""
    crowded = moments.errors.topk(len(free)).indices
    spread = (moments.errors[crowded] / moments.counts[crowded].clamp_min(1)).sqrt()
    direction = normalize(torch.randn(len(free), centroids.shape[1]), dim=1).to(centroids)
    offset = 0.1 * spread.to(centroids)[:, None] * direction
    beside = centroids[crowded]
    centroids = centroids.clone()
    centroids[crowded] = beside - offset
    centroids[free] = beside + offset
    return centroids


@torch.no_grad()
def separate(
    prefixes: Tensor,
    rows: Tensor,
    centroids: Tensor,
    *,
    passes: int = 4,
    neighbours: int = 6,
    attempts: int = 4096,
) -> Tensor:
    """Nudge the last layer's ``centroids`` (K, E) so that rows with equal IDs fall apart.

    For each row that shares its ID, a centroid close by is drawn towards it, just until it is
    the nearest; that is kept if more rows then have an ID of their own. The moves are so
    small that the error hardly grows, and unseen rows gain too.

    Parameters
    ----------
    prefixes : Tensor
        int64 ``(n,)``, equal where the codes of all layers before are.
    rows : Tensor
        ``(n, E)``, what the last layer quantises.
    passes : int
        How often to go through the rows that share an ID.
    neighbours : int
        Centroids tried for each.
    attempts : int
        Nudges tried in all: where most IDs are shared, a wider or a further layer is what helps.
    """
    centroids = centroids.clone()
    state = _Collisions(prefixes, rows, centroids)
    for _ in range(passes):
        before = state.unique
        for row in state.sharing().tolist():
            if not state.shares(row):  # an earlier nudge has helped this row too
                continue
            for index in state.others_near(row, neighbours):
                if attempts == 0:
                    return centroids
                attempts -= 1
                moved = state.towards(row, index, centroids[index])
                if state.try_moving(index, moved):
                    centroids[index] = moved
                    break
        if state.unique == before:
            break
    return centroids


class _Collisions:
    """IDs as they are under centroids that move one at a time, kept up to date by the changes."""

    def __init__(self, prefixes: Tensor, rows: Tensor, centroids: Tensor) -> None:
        self._rows = rows
        self._squares = rows.square().sum(dim=1)
        self._width = len(centroids)
        self._distances = torch.stack([self._squared_distances(c) for c in centroids], dim=1)
        self._nearest, self._codes = self._distances.min(dim=1)
        self._first_id = prefixes * self._width
        sizes = (int(prefixes.max()) + 1) * self._width
        self._sizes = torch.bincount(self._first_id + self._codes, minlength=sizes)
        self.unique = int((self._sizes == 1).sum())

    def sharing(self) -> Tensor:
        """Rows whose ID another row has too."""
        return (self._sizes[self._first_id + self._codes] > 1).nonzero().squeeze(1)

    def shares(self, row: int) -> bool:
        """Whether another row has the ID of this one."""
        return bool(self._sizes[self._first_id[row] + self._codes[row]] > 1)

    def others_near(self, row: int, count: int) -> list[int]:
        """The centroids nearest to a row but for its own."""
        near = self._distances[row].topk(min(count + 1, self._width), largest=False).indices
        indices: list[int] = near[1:].tolist()
        return indices

    def towards(self, row: int, index: int, centroid: Tensor) -> Tensor:
        """Draw a centroid towards a row until it is the nearest, clear of rounding: by 0.5 %."""
        own, other = self._nearest[row].sqrt(), self._distances[row, index].sqrt()
        return torch.lerp(centroid, self._rows[row], (1 - 0.995 * own / other).clamp(0, 1))

    def try_moving(self, index: int, moved: Tensor) -> bool:
        """Move centroid ``index`` if more IDs are then unique; says whether it was moved."""
        column = self._squared_distances(moved)
        changed = ((self._codes == index) | (column < self._nearest)).nonzero().squeeze(1)
        distances = self._distances[changed]
        distances[:, index] = column[changed]
        nearest_now, codes = distances.min(dim=1)
        old = self._first_id[changed] + self._codes[changed]
        new = self._first_id[changed] + codes
        touched = torch.unique(torch.cat([old, new]))
        before = int((self._sizes[touched] == 1).sum())
        ones = torch.ones_like(old)
        self._sizes.index_add_(0, old, ones, alpha=-1).index_add_(0, new, ones)
        gained = int((self._sizes[touched] == 1).sum()) - before
        if gained <= 0:
            self._sizes.index_add_(0, new, ones, alpha=-1).index_add_(0, old, ones)
            return False
        self._distances[:, index] = column
        self._nearest[changed], self._codes[changed] = nearest_now, codes
        self.unique += gained
        return True

    def _squared_distances(self, centroid: Tensor) -> Tensor:
        product = torch.addmv(self._squares, self._rows, centroid, alpha=-2)
        return (product + centroid.square().sum()).clamp_min(0)


@torch.no_grad()
def refine(
    model: ResidualQuantization,
    rows: Rows,
    *,
    iterations: int,
    first_layer: int = 0,
    seed: int = 0,
    on_pass: Callable[[Pass], None] = lambda _pass: None,
) -> Iterator[int]:
    """Fit the layers of a trained ``model`` from ``first_layer`` on by Lloyd iterations.

    Yields each layer once it is done, so that the caller can save the model there and go on
    later from the next: the result is the same.
    """
    for index in range(first_layer, model.n_layers):
        torch.manual_seed(seed + index)
        layer = model.layers[index]
        report = _reporter(on_pass, index)
        residuals = Residuals(model, rows, index)
        layer.centroids.copy_(
            lloyd(residuals, layer.centroids, iterations, on_pass=report("lloyd"))
        )
        yield index


@torch.no_grad()
def fit_distinct(
    model: ResidualQuantization,
    rows: Rows,
    *,
    first_layer: int = 0,
    seed: int = 0,
    on_pass: Callable[[Pass], None] = lambda _pass: None,
) -> Iterator[int]:
    """Fit the layers of a fresh ``model`` so that nearly every row gets an ID of its own.

    Each layer: k-means++, spherical Lloyd iterations (which cannot collapse onto a short
    centroid), plain ones, relocations; the last: `separate`. RECIPE.md has what each brings.
    Yields layers as `refine` does.
    """
    for index in range(first_layer, model.n_layers):
        torch.manual_seed(seed + index)
        layer = model.layers[index]
        report = _reporter(on_pass, index)
        residuals = Residuals(model, rows, index)
        sample = residuals.sample(SAMPLE_ROWS_PER_CENTROID * layer.n_clusters, seed)
        part = torch.split(sample, CHUNK_ROWS)
        centroids = KMeansPlusPlusInitInitializer()(sample, layer.n_clusters)
        centroids = lloyd(part, centroids, 30, spherical=True, on_pass=report("spherical"))
        centroids = lloyd(part, centroids, 100, on_pass=report("lloyd"))
        centroids = relocate(part, centroids, on_pass=report("relocate"))
        if len(sample) < rows.n_rows:
            centroids = lloyd(residuals, centroids, 10, on_pass=report("whole"))
        if index == model.n_layers - 1 and rows.n_rows <= SEPARATED_ROWS:
            whole = torch.cat(list(residuals))
            centroids = separate(residuals.prefixes(), whole, centroids)
        layer.centroids.copy_(centroids)
        yield index


def _reporter(
    on_pass: Callable[[Pass], None], layer: int
) -> Callable[[str], Callable[[int, float], None]]:
    def of_stage(stage: str) -> Callable[[int, float], None]:
        return lambda number, error: on_pass(Pass(layer, stage, number, error))

    return of_stage
