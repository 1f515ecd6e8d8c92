"""The Triton kernels of the GPU path. Symbols and proofs: BOUNDS.md.

`round_rows` brings rows to float16, a library product follows, `prove` runs the chain of layers
with its certificate, `decide` takes what is not proved from the residual in float64, and
`finish` gives the rows that are still left to the reference arithmetic. None of them needs the
host in between. Each has a twin in `gpu_twins`.
"""

# Arguments of a kernel are pointers and numbers that Triton gives their types; those in capitals
# are compiled in. A kernel is one function, since what it calls would be inlined anyway.
# ruff: noqa: ANN001, ANN201, ANN202, C901, N803, PLR0912, PLR0915, PLR0917
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

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

ADDRESSES = tl.constexpr(16)
"""Rows begin at multiples of it, so that 16 bytes are read at once."""

# So many numbers, each less than twice as large, add up in int32.
_WIDEST_INT32 = tl.constexpr(1 << 14)

# 1 - sqrt(1 - z) <= 0.5133 z for 0 <= z <= LOOSEST = 0.1: it is convex, and smaller at both ends.
_ROOT = tl.constexpr(0.5133)


@triton.jit
def _row_of(call, row, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """Where a row of ``WIDTH`` numbers begins; ``call`` is that of `gpu.Rows`.

    So a graph that was recorded once runs on rows that lie anywhere.
    """
    first = tl.load(call).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(first, ADDRESSES) + row * WIDTH


@triton.jit
def widen(call, wide, DTYPE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows as float64 (n, DIM), zeros where there is padding; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < DIM
    real = inside & (row < tl.load(call + 1))
    x = tl.load(_row_of(call, row, DTYPE, DIM) + feature, mask=real, other=0.0)
    tl.store(wide + row * DIM + feature, x.to(tl.float64), mask=inside)


@triton.jit
def round_rows(
    call,
    rounded,
    facts,
    DTYPE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round a row to float16, scaled; its length, step and rounding error go to ``facts``.

    One program a row, of ``DTYPE``, any of the four types; padding is taken for zeros.
    ``rounded`` float16 (n, PADDED), zeros from DIM on; ``facts`` float64 (n, 4), as
    `cpu_kernels.round_rows` writes them; the fourth column is left alone.
    """
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = (feature < DIM) & (row < tl.load(call + 1))
    x = tl.load(_row_of(call, row, DTYPE, DIM) + feature, mask=inside, other=0.0)
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
    call,
    products,
    facts,
    codes_of_columns,
    half_norms,
    margins,
    rates,
    grams,
    offsets,
    gram_offsets,
    longest_of_layers,
    steps,
    codes,
    levels,
    progress,
    waiting,
    undecided,
    product_stride,
    DIM: tl.constexpr,
    LAYERS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Codes of the rows whose every layer the products prove; one program a row.

    The chain of `decide` without its float64 part, and in float32 throughout: every thread computes
    the bounds of its row. The arguments are those of `gpu.Tables`. Numbers of rows that it does
    not prove are added to ``waiting`` int32 (n,), of those out of range to ``undecided``; how many
    there are is counted in ``progress`` int32 (3,), first and second entry. Padding is left alone.
    """
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(call + 1):
        return
    column = tl.arange(0, BLOCK_WIDTH)
    # the sum of these over the hits is below twice the width if there is one hit, and names it
    number = column + BLOCK_WIDTH
    if BLOCK_WIDTH > _WIDEST_INT32:
        number = number.to(tl.int64)

    exact_length = tl.load(facts + 4 * row)
    step = tl.load(facts + 4 * row + 1).to(tl.float32)
    rounding = tl.load(facts + 4 * row + 2).to(tl.float32)
    in_range = (exact_length >= LEAST_LENGTH) & (exact_length <= GREATEST_LENGTH)
    length = tl.where(in_range, exact_length, 1.0).to(tl.float32)
    offset = length * 0.0
    if HAS_OFFSET:
        exact_offset = tl.load(facts + 4 * row + 3)
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
    # what the layers so far left: beta, and the column that each took
    weights = ()
    chosen = ()
    for _ in tl.static_range(LAYERS):
        weights = weights + (one * 0.0,)  # noqa: RUF005 - Triton unpacks none
        chosen = chosen + (row * 0,)  # noqa: RUF005 - Triton unpacks none

    for layer in range(LAYERS):
        start = tl.multiple_of(tl.load(offsets + layer), ALIGNMENT)
        width = tl.multiple_of(tl.load(offsets + layer + 1), ALIGNMENT) - start
        longest = tl.load(longest_of_layers + layer).to(tl.float32)
        layer_step = tl.load(steps + layer).to(tl.float32)
        rate = tl.load(rates + layer).to(tl.float32)
        gram_start = tl.multiple_of(tl.load(gram_offsets + layer), ALIGNMENT)
        reach = size + longest
        exact_bound = 1.01 * (g * reach * reach + (2.0 * reach + error) * error)
        slope = 1.002 * (
            alpha * (rounding + length * rate)
            + drift
            + (mass + longest) * ((4 * layer + 24) * UNIT32)
        )
        factor = alpha * (step * layer_step)
        real = column < width
        entry = start + column

        # v_k -+ eps_k for all centroids of the layer
        inner = tl.load(products + row * product_stride + entry, mask=real, other=0.0)
        scores = tl.load(half_norms + entry, mask=real, other=0.0) - factor * inner
        slack = slope * tl.load(margins + entry, mask=real, other=0.0)
        for earlier in tl.static_range(LAYERS - 1):
            if earlier < layer:
                taken = gram_start + chosen[earlier] * width
                gram = tl.load(grams + taken + column, mask=real, other=0.0)
                scores += weights[earlier] * gram
        least = tl.min(tl.where(real, scores + slack, float("inf")), 0)
        hits = real & (scores - slack <= least + exact_bound)
        found = tl.sum(tl.where(hits, number, 0), 0)
        single = (found >= BLOCK_WIDTH) & (found < 2 * BLOCK_WIDTH)
        best = tl.where(single, found - BLOCK_WIDTH, 0).to(tl.int32)
        useful = (slope < GREATEST_LENGTH) & (mass < GREATEST_LENGTH)
        proved = proved & useful & single
        winner = start + best
        tl.store(codes + row * LAYERS + layer, tl.load(codes_of_columns + winner))

        inverse = one
        if NORMALIZE:
            # the length of what this layer leaves, if the score tells it well enough
            score = tl.load(half_norms + winner)
            score -= factor * tl.load(products + row * product_stride + winner)
            for earlier in tl.static_range(LAYERS - 1):
                if earlier < layer:
                    taken = gram_start + chosen[earlier] * width
                    score += weights[earlier] * tl.load(grams + taken + best)
            unsure = 2.01 * slope * tl.load(margins + winner)
            square = 1.0 + 2.0 * score
            enough = (unsure <= square * LOOSEST) & (
                square > 2.0 * SHORTEST_RESIDUAL * SHORTEST_RESIDUAL
            )
            last = layer == LAYERS - 1
            proved = proved & (last | enough)
            square = tl.where(enough, square, 1.0)
            share = tl.where(enough, unsure, 0.0) / square
            inverse = tl.rsqrt(square)
            alpha = alpha * inverse
            mass = (mass + longest) * inverse
            drift = drift * inverse + _ROOT * share + 8.0 * UNIT32
            error = 2.12 * inverse * error + (g + 3.4 * UNIT64)
        else:
            mass = mass + longest
            error = error + (mass + error) * 2.0 * UNIT64
            size = size + longest
        next_weights = ()
        next_chosen = ()
        for earlier in tl.static_range(LAYERS):
            is_new = layer == earlier
            weight = tl.where(is_new, inverse, weights[earlier] * inverse)
            next_weights = next_weights + (weight,)  # noqa: RUF005 - Triton unpacks none
            took = tl.where(is_new, winner.to(tl.int64), chosen[earlier])
            next_chosen = next_chosen + (took,)  # noqa: RUF005 - Triton unpacks none
        weights = next_weights
        chosen = next_chosen

    tl.store(levels + row, tl.where(in_range, FAST, REFERENCE))
    if in_range == 0:
        tl.store(undecided + tl.atomic_add(progress + 1, 1), row.to(tl.int32))
    elif proved == 0:
        tl.store(waiting + tl.atomic_add(progress, 1), row.to(tl.int32))


@triton.jit
def decide(
    call,
    products,
    facts,
    centroids,
    codes_of_columns,
    half_norms,
    margins,
    rates,
    grams,
    offsets,
    gram_offsets,
    longest_of_layers,
    steps,
    codes,
    levels,
    progress,
    waiting,
    undecided,
    product_stride,
    DTYPE: tl.constexpr,
    DIM: tl.constexpr,
    LAYERS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_LAYERS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Codes (n, LAYERS) of the rows that ``waiting`` names, from products and float64.

    The arithmetic of `cpu_kernels.decide`; the arguments are those of `gpu.Tables`, and those of
    `round_rows` and `prove`. The programs share the rows among them, one at a time. Rows that it
    leaves to the reference are added to ``undecided``; ``progress[2]`` counts those that float64
    decided.
    """
    feature = tl.arange(0, BLOCK_DIM)
    inside = feature < DIM
    index = tl.arange(0, BLOCK_LAYERS)
    column = tl.arange(0, BLOCK_WIDTH)
    turn = tl.program_id(0)
    total = tl.load(progress)
    by_float64 = 0
    while turn < total:
        row = tl.load(waiting + turn).to(tl.int64)
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
                start = tl.multiple_of(tl.load(offsets + layer), ALIGNMENT)
                width = tl.multiple_of(tl.load(offsets + layer + 1), ALIGNMENT) - start
                longest = tl.load(longest_of_layers + layer)
                layer_step = tl.load(steps + layer)
                rate = tl.load(rates + layer)
                gram_start = tl.multiple_of(tl.load(gram_offsets + layer), ALIGNMENT)
                reach = size + longest
                exact_bound = 1.01 * (g * reach * reach + (2.0 * reach + error) * error)
                slope = 1.002 * (
                    alpha * (rounding + length * rate)
                    + drift
                    + mass * (4 * layer + 8) * UNIT64
                    + (mass + longest) * (layer + 12) * UNIT32
                )
                factor = (alpha * step * layer_step).to(tl.float32)
                real = column < width
                entry = start + column

                # v_k -+ eps_k for all centroids of the layer
                half_norm = tl.load(half_norms + entry, mask=real, other=0.0)
                slack = slope.to(tl.float32) * tl.load(margins + entry, mask=real, other=0.0)
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
                    first = _row_of(call, row, DTYPE, DIM)
                    x = tl.load(first + feature, mask=inside, other=0.0)
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
        by_float64 += (level == FLOAT64).to(tl.int32)
        if level == REFERENCE:
            tl.store(undecided + tl.atomic_add(progress + 1, 1), row.to(tl.int32))
    if by_float64 > 0:
        tl.atomic_add(progress + 2, by_float64)


@triton.jit
def finish(
    call,
    progress,
    undecided,
    codebooks,
    offsets,
    codes_of_columns,
    constants,
    scratch,
    codes,
    counts,
    DTYPE: tl.constexpr,
    DIM: tl.constexpr,
    LAYERS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RESOLVE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Count the rows of each level, and run the reference arithmetic on those that need it.

    The programs share the rows that ``undecided`` names, one at a time. ``codebooks`` is float32
    ``(DIM, N)``; ``scratch`` float64 ``(programs, DIM)``; ``counts`` int64 (3,). ``constants``
    float64 (1,) holds the least divisor, 1e-12. The kernel must be compiled without fusion of
    products and sums: the order and the roundings are the definition.
    """
    program = tl.program_id(0).to(tl.int64)
    n_left = tl.load(progress + 1)
    if program == 0:
        by_float64 = tl.load(progress + 2).to(tl.int64)
        beyond = n_left.to(tl.int64)
        tl.atomic_add(counts, tl.load(call + 1) - by_float64 - beyond)
        tl.atomic_add(counts + 1, by_float64)
        tl.atomic_add(counts + 2, beyond)
    if RESOLVE:
        feature = tl.arange(0, BLOCK_DIM)
        inside = feature < DIM
        column = tl.arange(0, BLOCK_WIDTH)
        residual = scratch + program * DIM
        least_divisor = tl.load(constants)
        total_columns = tl.load(offsets + LAYERS)
        turn = tl.program_id(0)
        while turn < n_left:
            row = tl.load(undecided + turn).to(tl.int64)
            turn += tl.num_programs(0)
            first_of_row = _row_of(call, row, DTYPE, DIM)
            x = tl.load(first_of_row + feature, mask=inside, other=0.0)
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
