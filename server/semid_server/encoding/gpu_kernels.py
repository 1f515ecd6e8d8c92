"""The Triton kernels of the GPU path. Symbols and proofs: BOUNDS.md.

`round_rows` brings rows to float16, a library product follows, `decide` runs the chain of layers
with its certificate and takes what is not proved from the residual in float64, and `finish` gives
the rows that are still left to the reference arithmetic. None of them needs the host in between.
Each has a twin in `gpu_twins`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from semid_server.encoding import plan

FAST = tl.constexpr(0)
FLOAT64 = tl.constexpr(1)
REFERENCE = tl.constexpr(2)

UNIT32 = tl.constexpr(plan.UNIT32)
UNIT64 = tl.constexpr(plan.UNIT64)
LEAST_LENGTH = tl.constexpr(plan.LEAST_LENGTH)
GREATEST_LENGTH = tl.constexpr(plan.GREATEST_LENGTH)
LOOSEST = tl.constexpr(plan.LOOSEST)
SHORTEST_RESIDUAL = tl.constexpr(plan.SHORTEST_RESIDUAL)

# A row is scaled by a power of two to a length from 2^9 to 2^10: no number overflows float16, and
# those of a size that matters are not subnormal there.
_EXPONENT = tl.constexpr(9)


@triton.jit
def round_rows(
    rows,
    rounded,
    facts,
    row_stride,
    rounded_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round a row to float16, scaled; its length, step and rounding error go to ``facts``.

    One program a row. ``rows`` (n, DIM) of any of the four types; ``rounded`` float16; ``facts``
    float64 (n, 4), as `cpu_kernels.round_rows` writes them; the fourth column is left alone.
    """
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < DIM
    x = tl.load(rows + row * row_stride + feature, mask=inside, other=0.0)
    wide = x.to(tl.float64)
    length = tl.sqrt(tl.sum(wide * wide, 0))
    fits = (length >= LEAST_LENGTH) & (length <= GREATEST_LENGTH)
    # biased exponent of the length; 2^(9 - e) has the biased exponent 127 + 9 - (b - 127)
    biased = (tl.where(fits, length, 1.0).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
    scale = ((254 - biased + _EXPONENT) << 23).to(tl.float32, bitcast=True)
    step = ((biased - _EXPONENT) << 23).to(tl.float32, bitcast=True)
    scaled = tl.where(fits, wide * scale.to(tl.float64), 0.0)
    nearest = scaled.to(tl.float32).to(tl.float16)
    error = scaled - nearest.to(tl.float64)
    distance = tl.sqrt(tl.sum(error * error, 0)) * step.to(tl.float64)
    tl.store(rounded + row * rounded_stride + feature, nearest, mask=inside)
    tl.store(facts + 4 * row, length)
    tl.store(facts + 4 * row + 1, step.to(tl.float64))
    tl.store(facts + 4 * row + 2, 1.001 * distance + length * (4.0 * UNIT32 * UNIT32))


@triton.jit
def _pick(values, index, which):
    """``values[which]`` of a small vector in registers."""
    return tl.sum(tl.where(index == which, values, tl.zeros_like(values)), 0)


@triton.jit
def decide(
    rows,
    products,
    facts,
    centroids,
    codes_of_columns,
    half_norms,
    square_norms,
    grams,
    offsets,
    gram_offsets,
    layer_facts,
    codes,
    levels,
    row_stride,
    product_stride,
    DIM: tl.constexpr,
    LAYERS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_LAYERS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Codes int32 (n, LAYERS) of rows from their products; one program a row.

    The arithmetic of `cpu_kernels.decide`, where the arguments are described; ``layer_facts`` is
    float64 (LAYERS, 3): greatest length, step and spread of each layer.
    """
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK_DIM)
    inside = feature < DIM
    index = tl.arange(0, BLOCK_LAYERS)
    column = tl.arange(0, BLOCK_WIDTH)

    length = tl.load(facts + 4 * row)
    step = tl.load(facts + 4 * row + 1)
    rounding = tl.load(facts + 4 * row + 2)
    offset = length * 0.0
    if HAS_OFFSET:
        offset = tl.load(facts + 4 * row + 3)
    g = (length * 0.0 + (DIM + 16)) * UNIT64

    # the state before the first layer; see BOUNDS.md
    alive = (length >= LEAST_LENGTH) & (length <= GREATEST_LENGTH) & (offset <= 0.01 * length)
    safe = tl.where(alive, length, 1.0)
    if NORMALIZE:
        alpha = 1.0 / safe
        size = length * 0.0 + 1.0
        mass = length * 0.0 + 1.0
        drift = 2.1 * offset / safe + g
        error = drift
    else:
        alpha = length * 0.0 + 1.0
        size = length
        mass = length
        drift = offset
        error = offset
    weights = tl.zeros([BLOCK_LAYERS], tl.float64)
    norms = tl.zeros([BLOCK_LAYERS], tl.float64) + 1.0
    chosen = tl.zeros([BLOCK_LAYERS], tl.int32)
    level = tl.where(alive, FAST, REFERENCE)

    for layer in range(LAYERS):
        if alive:
            start = tl.load(offsets + layer)
            width = tl.load(offsets + layer + 1) - start
            longest = tl.load(layer_facts + 3 * layer)
            layer_step = tl.load(layer_facts + 3 * layer + 1)
            spread = tl.load(layer_facts + 3 * layer + 2)
            gram_start = tl.load(gram_offsets + layer)
            reach = size + longest
            slip = drift + mass * (2 * layer + 8) * UNIT64
            bound = 1.001 * (
                alpha * (rounding * longest + length * spread)
                + slip * longest
                + longest * (mass + longest) * (layer + 9) * UNIT32
            )
            exact_bound = 1.01 * (g * reach * reach + (2.0 * reach + error) * error)
            margin = 2.0 * bound + exact_bound
            factor = alpha * step * layer_step
            real = column < width

            scores = tl.load(half_norms + start + column, mask=real, other=float("inf"))
            inner = tl.load(products + row * product_stride + start + column, mask=real, other=0.0)
            scores -= tl.where(real, factor.to(tl.float32) * inner, 0.0)
            for earlier in range(layer):
                weight = _pick(weights, index, earlier).to(tl.float32)
                place = gram_start + _pick(chosen, index, earlier).to(tl.int64) * width
                gram = tl.load(grams + place + column, mask=real, other=0.0)
                scores += weight * gram
            least = tl.min(scores, 0)
            cut = (least.to(tl.float64) + margin * (4.0 * UNIT32 + 1.0)).to(tl.float32)
            useful = (margin < reach * longest) & (mass < GREATEST_LENGTH)
            hits = real & ((scores <= cut) | (useful == 0))
            count = tl.sum(hits.to(tl.int32), 0)
            best = tl.min(tl.where(hits, column, BLOCK_WIDTH), 0)

            # the length of what this layer leaves, if the products tell it well enough
            last = layer == LAYERS - 1
            norm = length * 0.0 + 1.0
            norm_slip = length * 0.0
            least_norm = norm
            known = last
            if NORMALIZE:
                score = tl.sum(tl.where(column == best, scores, 0.0), 0).to(tl.float64)
                # a score is half the square of the residual's length, less 1/2
                square = 1.0 + 2.0 * score
                unsure = 2.01 * bound
                enough = unsure <= square * LOOSEST
                share = tl.where(enough, unsure / tl.where(enough, square, 1.0), 0.0)
                norm = tl.where(enough, tl.sqrt(tl.where(enough, square, 1.0)), 1.0)
                norm_slip = share / (1.0 + tl.sqrt(1.0 - share))
                least_norm = norm * tl.sqrt(1.0 - share)
                known = last | (enough & (least_norm > SHORTEST_RESIDUAL))
            else:
                known = layer >= 0

            if (count > 1) | (known == 0):
                # from the residual itself, in float64
                level = level * 0 + FLOAT64
                x = tl.load(rows + row * row_stride + feature, mask=inside, other=0.0)
                residual = x.to(tl.float64)
                if NORMALIZE:
                    residual = residual * (1.0 / length)
                for earlier in range(layer):
                    place = _pick(chosen, index, earlier).to(tl.int64)
                    taken = tl.load(centroids + place * DIM + feature, mask=inside, other=0.0)
                    residual = residual - taken.to(tl.float64)
                    if NORMALIZE:
                        left = tl.sqrt(tl.sum(residual * residual, 0))
                        residual = residual * (1.0 / left)
                least64 = length * 0.0 + float("inf")
                second = least64
                best = best * 0
                remaining = count
                while remaining > 0:
                    k = tl.min(tl.where(hits, column, BLOCK_WIDTH), 0)
                    hits = hits & (column != k)
                    remaining -= 1
                    place = (start + k).to(tl.int64)
                    centroid = tl.load(centroids + place * DIM + feature, mask=inside, other=0.0)
                    difference = residual - centroid.to(tl.float64)
                    distance = tl.sum(difference * difference, 0)
                    closer = distance < least64
                    second = tl.where(closer, least64, tl.minimum(second, distance))
                    best = tl.where(closer, k, best)
                    least64 = tl.where(closer, distance, least64)
                alive = second - least64 > 4.0 * exact_bound
                if NORMALIZE:
                    norm = tl.sqrt(least64)
                    unsure = 1.01 * (error + g * norm)
                    least_norm = norm - unsure
                    alive = alive & (last | (least_norm > SHORTEST_RESIDUAL))
                    norm_slip = unsure / norm
                if alive == 0:
                    level = level * 0 + REFERENCE

            if alive:
                place = start + best
                chosen = tl.where(index == layer, place, chosen)
                tl.store(codes + row * LAYERS + layer, tl.load(codes_of_columns + place))
                weights = tl.where(index == layer, 1.0, weights)
                if NORMALIZE:
                    weights = weights / norm
                    alpha = alpha / norm
                    mass = (mass + longest) / norm
                    drift = drift / norm + norm_slip
                    error = (2.0 * error + norm * 3.0 * UNIT64) / least_norm + g
                else:
                    mass = mass + longest
                    error = error + (mass + error) * 2.0 * UNIT64
                    size = size + longest
    tl.store(levels + row, level)


@triton.jit
def finish(
    rows,
    levels,
    codebooks,
    offsets,
    codes_of_columns,
    constants,
    scratch,
    codes,
    counts,
    n_rows,
    row_stride,
    DIM: tl.constexpr,
    LAYERS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RESOLVE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Count the rows of each level, and run the reference arithmetic on those that need it.

    One program for ``ROWS`` rows. ``codebooks`` is float32 ``(DIM, N)``; ``scratch`` float64
    ``(programs, DIM)``; ``counts`` int64 (3,); ``n_rows`` int32 (1,): rows from there on are
    padding. ``constants`` float64 (1,) holds the least divisor, 1e-12. The kernel must be
    compiled without fusion of products and sums: the order and the roundings are the definition.
    """
    program = tl.program_id(0).to(tl.int64)
    n = tl.load(n_rows)
    mine = program * ROWS + tl.arange(0, ROWS)
    level = tl.load(levels + mine, mask=mine < n, other=-1)
    tl.atomic_add(counts, tl.sum((level == FAST).to(tl.int64), 0))
    tl.atomic_add(counts + 1, tl.sum((level == FLOAT64).to(tl.int64), 0))
    undecided = tl.sum((level == REFERENCE).to(tl.int64), 0)
    tl.atomic_add(counts + 2, undecided)
    if RESOLVE:
        feature = tl.arange(0, BLOCK_DIM)
        inside = feature < DIM
        column = tl.arange(0, BLOCK_WIDTH)
        residual = scratch + program * DIM
        least_divisor = tl.load(constants)
        total_columns = tl.load(offsets + LAYERS)
        waiting = level == REFERENCE
        while undecided > 0:
            row = tl.min(tl.where(waiting, mine, 9223372036854775807), 0)
            waiting = waiting & (mine != row)
            undecided -= 1
            x = tl.load(rows + row * row_stride + feature, mask=inside, other=0.0)
            tl.store(residual + feature, x.to(tl.float64), mask=inside)
            tl.debug_barrier()
            for layer in range(LAYERS):
                if NORMALIZE:
                    total = least_divisor * 0.0
                    for i in range(DIM):
                        value = tl.load(residual + i)
                        total = total + value * value
                    norm = tl.sqrt(total)
                    norm = tl.where(norm > least_divisor, norm, least_divisor)
                    tl.debug_barrier()
                    r = tl.load(residual + feature, mask=inside, other=0.0)
                    tl.store(residual + feature, r / norm, mask=inside)
                    tl.debug_barrier()
                start = tl.load(offsets + layer)
                width = tl.load(offsets + layer + 1) - start
                real = column < width
                distances = tl.zeros([BLOCK_WIDTH], tl.float64)
                for i in range(DIM):
                    value = tl.load(residual + i)
                    centroid = tl.load(
                        codebooks + i * total_columns.to(tl.int64) + start + column,
                        mask=real,
                        other=0.0,
                    )
                    difference = value - centroid.to(tl.float64)
                    distances = distances + difference * difference
                distances = tl.where(real & (distances == distances), distances, float("inf"))
                least = tl.min(distances, 0)
                best = tl.min(tl.where(real & (distances == least), column, BLOCK_WIDTH), 0)
                tl.store(codes + row * LAYERS + layer, tl.load(codes_of_columns + start + best))
                tl.debug_barrier()
                r = tl.load(residual + feature, mask=inside, other=0.0)
                taken = tl.load(
                    codebooks + feature * total_columns.to(tl.int64) + start + best,
                    mask=inside,
                    other=0.0,
                )
                tl.store(residual + feature, r - taken.to(tl.float64), mask=inside)
                tl.debug_barrier()
