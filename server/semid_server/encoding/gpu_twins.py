"""The kernels of `gpu_kernels` again, in plain torch: what they compute, in a form that reads.

The tests hold each kernel to its twin. The twin of `finish` is `ReferenceEncoder`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from semid_server.encoding.plan import (
    GREATEST_LENGTH,
    LEAST_LENGTH,
    LOOSEST,
    SHORTEST_RESIDUAL,
    UNIT32,
    UNIT64,
)
from semid_server.encoding.reference import lowest_argmin

if TYPE_CHECKING:
    from torch import Tensor

    from semid_server.encoding.gpu import Tables


def round_rows(rows: Tensor, padded_dim: int) -> tuple[Tensor, Tensor]:
    """Rows as float16 ``(n, padded_dim)``, scaled, and their facts float64 ``(n, 4)``."""
    wide = rows.double()
    length = wide.norm(dim=1)
    fits = (length >= LEAST_LENGTH) & (length <= GREATEST_LENGTH)
    _, exponent = torch.frexp(torch.where(fits, length, 1.0).float())
    step = torch.ldexp(torch.ones_like(length), exponent - 10)
    scaled = torch.where(fits[:, None], wide / step[:, None], 0.0)
    rounded = scaled.float().half()
    distance = (scaled - rounded.double()).norm(dim=1) * step
    facts = torch.stack([length, step, 1.001 * distance, torch.zeros_like(length)], dim=1)
    return torch.nn.functional.pad(rounded, (0, padded_dim - rows.shape[1])), facts


def prove(products: Tensor, facts: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Codes int64 ``(n, L)`` by the products, and whether they are proved, bool ``(n,)``."""
    plan = tables.plan
    g = (plan.dim + 16) * UNIT64
    length, step, rounding, offset = facts.unbind(dim=1)
    proved = (length >= LEAST_LENGTH) & (length <= GREATEST_LENGTH) & (offset <= 0.01 * length)
    length = torch.where(proved, length, 1.0)
    offset = torch.where(proved, offset, 0.0)
    one = torch.ones_like(length)
    if plan.normalize:
        alpha, size, mass = 1 / length, one, one
        drift = error = 2.1 * offset / length + g
    else:
        alpha, size, mass = one, length, length
        drift = error = offset
    chosen: list[Tensor] = []
    weights: list[Tensor] = []
    for layer, (start, stop) in enumerate(pairwise(plan.offsets)):
        longest = plan.longest[layer]
        reach = size + longest
        exact_bound = 1.01 * (g * reach**2 + (2 * reach + error) * error)
        slope = alpha * (rounding + length * tables.rates[layer]) + drift
        slope = 1.002 * (slope + (mass + longest) * (4 * layer + 24) * UNIT32)
        slack = slope[:, None] * tables.margins[start:stop]
        factor = alpha * step * tables.steps[layer]
        scores = tables.half_norms[start:stop] - factor[:, None] * products[:, start:stop]
        for weight, column in zip(weights, chosen, strict=True):
            scores = scores + weight[:, None] * plan.grams[layer][column]
        cut = (scores + slack).amin(dim=1) + exact_bound
        hits = scores - slack <= cut[:, None]
        best = lowest_argmin(scores)
        proved = proved & (hits.sum(dim=1) == 1)
        proved = proved & (slope < GREATEST_LENGTH) & (mass < GREATEST_LENGTH)
        chosen.append(start + best)
        weights.append(one)
        if plan.normalize:
            square = 1 + 2 * scores.gather(1, best[:, None])[:, 0]
            unsure = 2.01 * slack.gather(1, best[:, None])[:, 0]
            enough = (unsure <= LOOSEST * square) & (square > 2 * SHORTEST_RESIDUAL**2)
            square = torch.where(enough, square, 1.0)
            share = torch.where(enough, unsure, 0.0) / square
            norm = square.sqrt()
            if layer < plan.n_layers - 1:
                proved = proved & enough
            weights = [weight / norm for weight in weights]
            alpha, mass = alpha / norm, (mass + longest) / norm
            drift = drift / norm + share / (1 + (1 - share).sqrt()) + 8 * UNIT32
            error = 2.12 * error / norm + 3.4 * UNIT64 + g
        else:
            mass, size = mass + longest, size + longest
            error = error + 2 * UNIT64 * (mass + error)
    return plan.codes[torch.stack(chosen, dim=1)], proved


def decide(rows: Tensor, facts: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Codes int64 ``(n, L)`` by float64 distances of all centroids, and whether those tell them.

    The kernel looks at the candidates that the products leave, and no others.
    """
    plan = tables.plan
    g = (plan.dim + 16) * UNIT64
    length, _, _, offset = facts.unbind(dim=1)
    decided = (length >= LEAST_LENGTH) & (length <= GREATEST_LENGTH) & (offset <= 0.01 * length)
    residual = rows.double()
    size = length
    error = offset
    if plan.normalize:
        residual = residual / torch.where(decided, length, 1.0)[:, None]
        size, error = torch.ones_like(length), 2.1 * offset / length + g
    mass = size
    codes = []
    for layer, (start, stop) in enumerate(pairwise(plan.offsets)):
        reach = size + plan.longest[layer]
        exact_bound = 1.01 * (g * reach**2 + (2 * reach + error) * error)
        centroids = plan.centroids[start:stop].double()
        distances = torch.stack(
            [(residual - centroid).square().sum(dim=1) for centroid in centroids], dim=1
        )
        best = lowest_argmin(distances)
        least = distances.gather(1, best[:, None])
        second = distances.scatter(1, best[:, None], math.inf).amin(dim=1)
        decided = decided & (second - least[:, 0] > 4 * exact_bound)
        codes.append(plan.codes[start + best])
        residual = residual - centroids[best]
        mass = mass + plan.longest[layer]
        if plan.normalize and layer < plan.n_layers - 1:
            norm = least[:, 0].sqrt()
            least_norm = norm - 1.01 * (error + g * norm)
            decided = decided & (least_norm > SHORTEST_RESIDUAL)
            residual = residual / torch.where(decided, norm, 1.0)[:, None]
            error = (2 * error + 3 * UNIT64 * norm) / least_norm + g
        elif not plan.normalize:
            size = size + plan.longest[layer]
            error = error + 2 * UNIT64 * (mass + error)
    return torch.stack(codes, dim=1), decided
