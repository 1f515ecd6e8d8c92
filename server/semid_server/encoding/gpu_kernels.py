"""The Triton kernels of the GPU path. Symbols and proofs: BOUNDS.md.

`round_rows` brings rows to float16, a library product follows, `prove` runs the chain of layers
with its certificate, `decide` takes what is not proved from the residual in float64, and
`finish` gives the rows that are still left to the reference arithmetic. None of them needs the
host in between. Each has a twin in `gpu_twins`.
"""

# Arguments of a kernel are pointers and numbers that Triton gives their types; those in capitals
# are compiled in. A kernel is one function, since what it calls would be inlined anyway.
# ruff: noqa: ANN001, ANN201, ANN202, C901, N803, PLR0912, PLR0915, PLR0917
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

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
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round a row to float16, scaled; its length, step and rounding error go to ``facts``.

    One program a row. ``rows`` (n, DIM) of any of the four types; ``rounded`` float16 (n, PADDED),
    zeros from DIM on; ``facts`` float64 (n, 4), as `cpu_kernels.round_rows` writes them; the
    fourth column is left alone.
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
    tl.store(rounded + row * PADDED + feature, nearest, mask=feature < PADDED)
    tl.store(facts + 4 * row, length)
    tl.store(facts + 4 * row + 1, step.to(tl.float64))
    tl.store(facts + 4 * row + 2, 1.001 * distance + length * (4.0 * UNIT32 * UNIT32))


@triton.jit
def _pick(values, index, which):
    """``values[which]`` of a small vector in registers."""
    return tl.sum(tl.where(index == which, values, tl.zeros_like(values)), 0)


@triton.jit
def prove(
    products,
    facts,
    codes_of_columns,
    half_norms,
    grams,
    offsets,
    gram_offsets,
    lengths,
    spreads,
    longest_of_layers,
    steps,
    codes,
    levels,
    waiting,
    n,
    product_stride,
    DIM: tl.constexpr,
    LAYERS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_LAYERS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Codes of the rows whose every layer the products prove; one program for ``ROWS`` rows.

    The chain of `decide` without its float64 part, and in float32 throughout: every thread computes
    the bounds of its rows. The arguments are those of `gpu.Tables`. The numbers of the rows that
    it does not prove are added to ``waiting`` int32 (1 + n), whose first entry counts them.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    index = tl.arange(0, BLOCK_LAYERS)[None, :]
    column = tl.arange(0, BLOCK_WIDTH)

    exact_length = tl.load(facts + 4 * row, mask=inside, other=1.0)
    step = tl.load(facts + 4 * row + 1, mask=inside, other=1.0).to(tl.float32)
    rounding = tl.load(facts + 4 * row + 2, mask=inside, other=0.0).to(tl.float32)
    in_range = (exact_length >= LEAST_LENGTH) & (exact_length <= GREATEST_LENGTH)
    length = tl.where(in_range, exact_length, 1.0).to(tl.float32)
    offset = length * 0.0
    if HAS_OFFSET:
        exact_offset = tl.load(facts + 4 * row + 3, mask=inside, other=0.0)
        in_range = in_range & (exact_offset <= 0.01 * exact_length)
        offset = tl.where(in_range, exact_offset, 0.0).to(tl.float32)
    proved = in_range
    one = length * 0.0 + 1.0
    g = one * (DIM + 16) * UNIT64
    if NORMALIZE:
        alpha = tl.div_rn(one, length)
        size = one
        mass = one
        drift = 2.1 * offset / length + g
        error = drift
    else:
        alpha = one
        size = length
        mass = length
        drift = offset
        error = offset
    weights = tl.zeros([ROWS, BLOCK_LAYERS], tl.float32)
    chosen = tl.zeros([ROWS, BLOCK_LAYERS], tl.int32)

    for layer in range(LAYERS):
        start = tl.load(offsets + layer)
        width = tl.load(offsets + layer + 1) - start
        longest = tl.load(longest_of_layers + layer).to(tl.float32)
        layer_step = tl.load(steps + layer).to(tl.float32)
        gram_start = tl.load(gram_offsets + layer)
        reach = size + longest
        exact_bound = 1.01 * (g * reach * reach + (2.0 * reach + error) * error)
        slope = 1.002 * (alpha * rounding + drift + (mass + longest) * (4 * layer + 24) * UNIT32)
        lift = 1.002 * alpha * length
        factor = alpha * (step * layer_step)
        real = (column < width)[None, :]
        entry = start + column

        # v_k -+ eps_k for all centroids of the layer
        half_norm = tl.load(half_norms + entry, mask=column < width, other=0.0)[None, :]
        centroid_length = tl.load(lengths + entry, mask=column < width, other=0.0)[None, :]
        spread = tl.load(spreads + entry, mask=column < width, other=0.0)[None, :]
        slack = slope[:, None] * centroid_length
        slack += lift[:, None] * spread
        inner = tl.load(
            products + row[:, None] * product_stride + entry[None, :],
            mask=inside[:, None] & real,
            other=0.0,
        )
        scores = half_norm - factor[:, None] * inner
        for earlier in range(layer):
            weight = tl.sum(tl.where(index == earlier, weights, 0.0), 1)
            taken = tl.sum(tl.where(index == earlier, chosen, 0), 1).to(tl.int64)
            gram = tl.load(
                grams + (gram_start + taken * width)[:, None] + column[None, :],
                mask=inside[:, None] & real,
                other=0.0,
            )
            scores += weight[:, None] * gram
        least = tl.min(tl.where(real, scores + slack, float("inf")), 1)
        cut = least + exact_bound
        hits = real & (scores - slack <= cut[:, None])
        best = tl.min(tl.where(hits, column[None, :], BLOCK_WIDTH - 1), 1)
        useful = (slope < GREATEST_LENGTH) & (mass < GREATEST_LENGTH)
        proved = proved & useful & (tl.sum(hits.to(tl.int32), 1) == 1)

        last = layer == LAYERS - 1
        norm = one
        slip = one
        least_norm = one
        if NORMALIZE:
            # the length of what this layer leaves, if the score tells it well enough
            won = column[None, :] == best[:, None]
            score = tl.sum(tl.where(won, scores, 0.0), 1)
            unsure = 2.01 * tl.sum(tl.where(won, slack, 0.0), 1)
            square = 1.0 + 2.0 * score
            enough = unsure <= square * LOOSEST
            square = tl.where(enough, square, 1.0)
            share = tl.where(enough, unsure, 0.0) / square
            norm = tl.sqrt_rn(square)
            slip = share / (1.0 + tl.sqrt_rn(1.0 - share)) + one * (4.0 * UNIT32)
            least_norm = norm * tl.sqrt_rn(1.0 - share) * 0.999
            proved = proved & (last | (enough & (least_norm > SHORTEST_RESIDUAL)))

        winner = start + best
        chosen = tl.where(index == layer, winner[:, None], chosen)
        tl.store(
            codes + row * LAYERS + layer,
            tl.load(codes_of_columns + winner, mask=inside, other=0),
            mask=inside,
        )
        weights = tl.where(index == layer, 1.0, weights)
        if NORMALIZE:
            weights = tl.div_rn(weights, tl.broadcast_to(norm[:, None], [ROWS, BLOCK_LAYERS]))
            alpha = tl.div_rn(alpha, norm)
            mass = (mass + longest) / norm
            drift = drift / norm + slip
            error = (2.0 * error + norm * 3.0 * UNIT64) / least_norm + g
        else:
            mass = mass + longest
            error = error + (mass + error) * 2.0 * UNIT64
            size = size + longest

    tl.store(levels + row, tl.where(in_range, FAST, REFERENCE), mask=inside)
    left = (inside & in_range & (proved == 0)).to(tl.int32)
    count = tl.sum(left, 0)
    if count > 0:
        place = tl.atomic_add(waiting, count) + tl.cumsum(left, 0)
        tl.store(waiting + place, row.to(tl.int32), mask=left > 0)


@triton.jit
def decide(
    rows,
    products,
    facts,
    centroids,
    codes_of_columns,
    half_norms,
    grams,
    offsets,
    gram_offsets,
    lengths,
    spreads,
    longest_of_layers,
    steps,
    codes,
    levels,
    waiting,
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
    """Codes int32 (n, LAYERS) of the rows that ``waiting`` names, from products and float64.

    The arithmetic of `cpu_kernels.decide`; the arguments are those of `gpu.Tables`. The programs
    share the rows among them, one at a time.
    """
    feature = tl.arange(0, BLOCK_DIM)
    inside = feature < DIM
    index = tl.arange(0, BLOCK_LAYERS)
    column = tl.arange(0, BLOCK_WIDTH)
    turn = tl.program_id(0)
    total = tl.load(waiting)
    while turn < total:
        row = tl.load(waiting + 1 + turn).to(tl.int64)
        turn += tl.num_programs(0)
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
        chosen = tl.zeros([BLOCK_LAYERS], tl.int32)
        level = tl.where(alive, FAST, REFERENCE)

        for layer in range(LAYERS):
            if alive:
                start = tl.load(offsets + layer)
                width = tl.load(offsets + layer + 1) - start
                longest = tl.load(longest_of_layers + layer)
                layer_step = tl.load(steps + layer)
                gram_start = tl.load(gram_offsets + layer)
                reach = size + longest
                exact_bound = 1.01 * (g * reach * reach + (2.0 * reach + error) * error)
                slope = 1.002 * (
                    alpha * rounding
                    + drift
                    + mass * (4 * layer + 8) * UNIT64
                    + (mass + longest) * (layer + 12) * UNIT32
                )
                lift = 1.002 * alpha * length
                factor = (alpha * step * layer_step).to(tl.float32)
                real = column < width
                entry = start + column

                # v_k -+ eps_k for all centroids of the layer
                half_norm = tl.load(half_norms + entry, mask=real, other=0.0)
                slack = slope.to(tl.float32) * tl.load(lengths + entry, mask=real, other=0.0)
                slack += lift.to(tl.float32) * tl.load(spreads + entry, mask=real, other=0.0)
                inner = tl.load(products + row * product_stride + entry, mask=real, other=0.0)
                scores = half_norm - factor * inner
                for earlier in range(layer):
                    weight = _pick(weights, index, earlier).to(tl.float32)
                    taken = gram_start + _pick(chosen, index, earlier).to(tl.int64) * width
                    scores += weight * tl.load(grams + taken + column, mask=real, other=0.0)
                least = tl.min(tl.where(real, scores + slack, float("inf")), 0)
                cut = (least.to(tl.float64) + exact_bound).to(tl.float32)
                useful = (slope < GREATEST_LENGTH) & (mass < GREATEST_LENGTH)
                hits = real & ((scores - slack <= cut) | (useful == 0))
                count = tl.sum(hits.to(tl.int32), 0)
                best = tl.min(tl.where(hits, column, BLOCK_WIDTH), 0)

                last = layer == LAYERS - 1
                known = useful & (count == 1)
                norm = length * 0.0 + 1.0
                slip = length * 0.0
                least_norm = norm
                if NORMALIZE:
                    # the length of what this layer leaves, if the score tells it well enough
                    score = tl.sum(tl.where(column == best, scores, 0.0), 0).to(tl.float64)
                    unsure = 2.01 * tl.sum(tl.where(column == best, slack, 0.0), 0).to(tl.float64)
                    square = 1.0 + 2.0 * score
                    enough = unsure <= square * LOOSEST
                    square = tl.where(enough, square, 1.0)
                    share = tl.where(enough, unsure, 0.0) / square
                    norm = tl.sqrt(square)
                    slip = share / (1.0 + tl.sqrt(1.0 - share))
                    least_norm = norm * tl.sqrt(1.0 - share)
                    known = known & (last | (enough & (least_norm > SHORTEST_RESIDUAL)))

                if known == 0:
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
                        centroid = tl.load(
                            centroids + place * DIM + feature, mask=inside, other=0.0
                        )
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
                        slip = unsure / norm
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
                        drift = drift / norm + slip
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
                    for first in range(0, DIM, 8):
                        for i in tl.static_range(8):
                            value = tl.load(residual + first + i, mask=first + i < DIM, other=0.0)
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
                for first in range(0, DIM, 8):
                    for i in tl.static_range(8):
                        here = first + i < DIM  # past the end, zero is added to a sum of squares
                        value = tl.load(residual + first + i, mask=here, other=0.0)
                        centroid = tl.load(
                            codebooks + (first + i) * total_columns.to(tl.int64) + start + column,
                            mask=real & here,
                            other=0.0,
                        )
                        difference = value - centroid.to(tl.float64)
                        distances = distances + difference * difference
                distances = tl.where(real & (distances < float("inf")), distances, float("inf"))
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
