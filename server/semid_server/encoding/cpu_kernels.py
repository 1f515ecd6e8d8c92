"""The compiled loops of the CPU path. Symbols and proofs: BOUNDS.md.

A batch goes through three of them: `round_rows` (rows to int16), `product` (one exact integer
matrix product for all layers) and `decide` (the chain of layers with its certificate, and the
layers that it does not prove again from the residual in float64). Where the product is of float32,
`measure` takes the place of the first, and `multiply` that of the second for few rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from semid_server.encoding.compiled import compiled
from semid_server.encoding.plan import (
    GREATEST_LENGTH,
    LEAST_LENGTH,
    LOOSEST,
    SHORTEST_RESIDUAL,
    UNIT32,
    UNIT64,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

ROW_TILE = 6
"""Rows that the product works on at once; row buffers have a multiple of it."""

COLUMN_TILE = 64
"""Columns that it works on at once; the number of columns is padded to a multiple of it."""

LONGEST = 46200.0
LARGEST = 32700.0
"""Length of a rounded row or centroid, and size of its numbers, before rounding. Both
are below what lets an inner product overflow int32 (BOUNDS.md, "Rounding to integers")."""

_DEPTH = 512
"""Pairs of features a pass of the product works on: the columns of a tile stay in the cache."""

FAST, FLOAT64, REFERENCE = 0, 1, 2
"""Where a row was decided; the last is left to the caller."""


class Tables(NamedTuple):
    """`Plan` as arrays, and the precision of the product that goes with it.

    Attributes
    ----------
    normalize : bool
    offsets : int64 (L + 1,)
    centroids : float32 (N, E)
    codes : int64 (N,)
    half_norms : float32 (N,), half of the next
    square_norms : float64 (N,)
    lengths : float32 (N,), of the centroids
    longest : float64 (L,), ``M_l``
    grams : float32, the tables one after another
    gram_offsets : int64 (L,), where each begins
    steps : float32 (N,): what one in the product stands for, apart from the row's own step
    spreads : float32 (N,): ``kappa_k``, error of the product for a row of length 1
    """

    normalize: bool
    offsets: Array
    centroids: Array
    codes: Array
    half_norms: Array
    square_norms: Array
    lengths: Array
    longest: Array
    grams: Array
    gram_offsets: Array
    steps: Array
    spreads: Array


# Any order of summation is within the bounds, so that LLVM may vectorise sums; no loop here sees
# a NaN (rows are finite, and lengths out of range are left out first).
_any_order = compiled(nogil=True, fastmath={"reassoc", "contract", "nsz", "nnan"})


@_any_order
def round_rows(rows: Array, rounded: Array, facts: Array) -> None:
    """Round ``rows`` (n, D), float32 or float64, to int16 in ``rounded`` (>= n, >= D).

    ``facts`` float64 (n, 4) gets the length of each row, its step (what one in ``rounded`` stands
    for) and a bound on the distance between the row and what was rounded to; its fourth column
    stays as it is, and so do columns from D on. Rows of a length out of range become 0.
    """
    n, dim = rows.shape
    slack = 1.0 + 2.0 * dim * UNIT32
    for row in range(n):
        x = rows[row]
        out = rounded[row]
        squares = fourths = 0.0
        for i in range(dim):
            square = np.float64(x[i]) ** 2
            squares += square
            fourths += square * square
        norm = math.sqrt(squares)
        facts[row, 0] = norm
        if not LEAST_LENGTH <= norm <= GREATEST_LENGTH:
            facts[row, 1] = facts[row, 2] = 0.0
            for i in range(dim):
                out[i] = 0
            continue
        # no number is larger than the fourth root; a maximum would not be vectorised
        step = max(norm / LONGEST, math.sqrt(math.sqrt(fourths)) / LARGEST)
        inverse = x.dtype.type(1.0 / step)
        errors = x.dtype.type(0.0)
        for i in range(dim):
            scaled = x[i] * inverse
            # cutting off a positive number rounds to nearest, but for ties and the last bit,
            # which are of no importance: the error is measured
            shifted = np.int32(scaled + x.dtype.type(32768.5))
            nearest = x.dtype.type(shifted) - x.dtype.type(32768.0)
            out[i] = np.int16(nearest)
            error = scaled - nearest
            errors += error * error
        facts[row, 1] = step
        facts[row, 2] = step * math.sqrt(np.float64(errors)) * slack + 4.0 * UNIT32 * norm


@_any_order
def measure(rows: Array, facts: Array) -> None:
    """Facts of ``rows`` as `round_rows` gives them, for rows that are rounded to float32."""
    n, dim = rows.shape
    for row in range(n):
        total = 0.0
        for i in range(dim):
            value = np.float64(rows[row, i])
            total += value * value
        norm = math.sqrt(total)
        facts[row, 0] = norm
        facts[row, 1] = 1.0
        facts[row, 2] = 1.01 * UNIT32 * norm


@compiled(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def multiply(rows: Array, columns: Array, products: Array) -> None:
    """Write the inner products of ``rows`` (n, D) and ``columns`` float32 (D, N) to ``products``.

    They are float32 (n, N), as are the factors: rows of float64 are rounded. One thread makes them,
    and four features at a time, whose columns are in the cache for all rows: libraries have more to
    prepare, and only from some 16 rows on is that worth it.
    """
    n, dim = rows.shape
    width = columns.shape[1]
    products[:] = 0.0
    whole = dim - dim % 4
    for i in range(0, whole, 4):
        first, second, third, fourth = columns[i], columns[i + 1], columns[i + 2], columns[i + 3]
        for row in range(n):
            a = np.float32(rows[row, i])
            b = np.float32(rows[row, i + 1])
            c = np.float32(rows[row, i + 2])
            d = np.float32(rows[row, i + 3])
            sums = products[row]
            for k in range(width):
                sums[k] += a * first[k] + b * second[k] + c * third[k] + d * fourth[k]
    for i in range(whole, dim):
        column = columns[i]
        for row in range(n):
            a = np.float32(rows[row, i])
            sums = products[row]
            for k in range(width):
                sums[k] += a * column[k]


@intrinsic
def _multiply_tile(typingctx, a, a_stride, b, pairs, c, c_stride):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001, PLR0917 - numba's protocol
    """Add to a tile of ``c``, 6 x 64 int32, the inner products of int16 pairs.

    ``a``, ``b`` and ``c`` are addresses: of the first of 6 rows of pairs, ``a_stride`` bytes apart;
    of ``pairs`` x 64 pairs; of the first of 6 rows of int32, ``c_stride`` bytes apart. One
    instruction (VPDPWSSD) multiplies 32 pairs of int16 and adds them up, exactly.
    """
    signature = types.void(*[types.int64] * 6)
    i16, i32, i64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
    sums, halves = ir.VectorType(i32, 16), ir.VectorType(i16, 32)
    vectors = COLUMN_TILE // 16

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001 - numba's protocol
        a, a_stride, b, pairs, c, c_stride = arguments
        dot = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call] # numba's own
            builder.module,
            ir.FunctionType(sums, [sums, halves, halves]),
            "llvm.x86.avx512.vpdpwssd.512",
        )

        def at(address: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
            return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

        def times(value: ir.Value, factor: int) -> ir.Value:
            return builder.mul(value, i64(factor))

        rows_of_c = [builder.add(c, times(c_stride, row)) for row in range(ROW_TILE)]
        tiles = [[at(row, i64(64 * j), sums) for j in range(vectors)] for row in rows_of_c]
        first = [[builder.load(tile, align=4) for tile in row] for row in tiles]
        rows_of_a = [builder.add(a, times(a_stride, row)) for row in range(ROW_TILE)]

        before = builder.block
        loop = builder.append_basic_block("pairs")
        after = builder.append_basic_block("store")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(i64)
        index.add_incoming(i64(0), before)
        total = [[builder.phi(sums) for _ in row] for row in tiles]
        columns = builder.add(b, times(index, 4 * COLUMN_TILE))
        loaded = [
            builder.bitcast(builder.load(at(columns, i64(64 * j), sums), align=64), halves)
            for j in range(vectors)
        ]
        result = []
        for row, sums_of_row in zip(rows_of_a, total, strict=True):
            pair = builder.load(at(row, times(index, 4), i32), align=4)
            spread = builder.insert_element(ir.Constant(sums, ir.Undefined), pair, i32(0))
            spread = builder.shuffle_vector(
                spread, ir.Constant(sums, ir.Undefined), ir.Constant(sums, [0] * 16)
            )
            spread = builder.bitcast(spread, halves)
            result.append(
                [
                    builder.call(dot, [value, spread, column])
                    for value, column in zip(sums_of_row, loaded, strict=True)
                ]
            )
        following = builder.add(index, i64(1))
        index.add_incoming(following, loop)
        for row, (phis, start) in enumerate(zip(total, first, strict=True)):
            for j, phi in enumerate(phis):
                phi.add_incoming(start[j], before)
                phi.add_incoming(result[row][j], loop)
        builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)
        builder.position_at_end(after)
        for row, values in zip(tiles, result, strict=True):
            for tile, value in zip(row, values, strict=True):
                builder.store(value, tile, align=4)
        return context.get_dummy_value()

    return signature, codegen


@compiled(nogil=True)
def product(
    rounded: Array,
    packed: Array,
    out: Array,
) -> None:
    """Inner products int32 ``out`` (n, N) of the rows of ``rounded`` and all columns.

    ``rounded`` is int16 ``(n, >= 2 P)``, ``n`` a multiple of `ROW_TILE`; ``packed`` int32
    ``(N / 64, P, 64)``, 64-byte aligned: two int16 of one column lie together. Needs AVX512-VNNI.
    """
    n = len(rounded)
    tiles, pairs, _ = packed.shape
    out[:] = 0
    for start in range(0, pairs, _DEPTH):
        depth = min(_DEPTH, pairs - start)
        for tile in range(tiles):
            for row in range(0, n, ROW_TILE):
                _multiply_tile(  # type: ignore[call-arg] # the typing context is numba's own
                    np.int64(rounded[row:].ctypes.data) + 4 * start,
                    rounded.strides[0],
                    np.int64(packed[tile, start:].ctypes.data),
                    depth,
                    np.int64(out[row:].ctypes.data) + 4 * COLUMN_TILE * tile,
                    out.strides[0],
                )


@_any_order
def _distance(residual: Array, centroid: Array) -> float:
    """``||residual - centroid||^2`` in float64, in any order."""
    total = 0.0
    for i in range(len(residual)):
        difference = residual[i] - np.float64(centroid[i])
        total += difference * difference
    return total


@intrinsic
def _key(typingctx, number):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001 - numba's protocol
    """Integer int32 that orders as a float32 does: the least of integers is found by vectors."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001 - numba's protocol
        i32 = ir.IntType(32)
        bits = builder.bitcast(arguments[0], i32)
        sign = builder.ashr(bits, i32(31))
        return builder.xor(bits, builder.and_(sign, i32(0x7FFFFFFF)))

    return types.int32(types.float32), codegen


@intrinsic
def _number(typingctx, key):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001 - numba's protocol
    """Float32 that `_key` made this integer of."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001 - numba's protocol
        i32 = ir.IntType(32)
        sign = builder.ashr(arguments[0], i32(31))
        bits = builder.xor(arguments[0], builder.and_(sign, i32(0x7FFFFFFF)))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), codegen


# Whole arrays and unsigned places in them, rather than slices: a slice counts references, which
# took as long as the arithmetic of 256 columns, and a place that may be negative is checked.
@_any_order
def _lowest_scores(  # noqa: PLR0917 - numba takes no keywords
    products: Array, row: int, factor: float, slope: float, lift: float, layer: int,
    chosen: Array, weights: Array, tables: Tables, lows: Array,
) -> float:  # fmt: skip
    """Set ``lows`` to ``v_k - eps_k`` for a layer's centroids; return the least ``v_k + eps_k``.

    ``v_k = ||c_k||^2 / 2 - <u_l, c_k>`` in float32 and ``eps_k = slope ||c_k|| + lift kappa_k``.
    """
    here, start = np.uint64(row), np.uint64(tables.offsets[layer])
    width = np.uint64(tables.offsets[layer + 1]) - start
    half_norms, lengths, grams = tables.half_norms, tables.lengths, tables.grams
    spreads, steps = tables.spreads, tables.steps
    factor32, slope32, lift32 = np.float32(factor), np.float32(slope), np.float32(lift)
    for k in range(width):
        inner = np.float32(products[here, start + k])
        lows[k] = half_norms[start + k] - factor32 * steps[start + k] * inner
    for earlier in range(layer):
        weight = np.float32(weights[earlier])
        place = np.uint64(tables.gram_offsets[layer]) + np.uint64(chosen[earlier]) * width
        for k in range(width):
            lows[k] += weight * grams[place + k]
    least = np.int32(2**31 - 1)
    for k in range(width):
        slack = slope32 * lengths[start + k] + lift32 * spreads[start + k]
        key: Any = _key(np.float32(lows[k] + slack))  # type: ignore[call-arg] # numba's own is left out
        least = key if key < least else least  # noqa: FURB136 - this is vectorised
        lows[k] -= slack
    return _number(least)  # type: ignore[call-arg] # as above


@_any_order
def _within(scores: Array, width: int, cut: float) -> tuple[int, int]:
    """How many of the first ``width`` scores are at most ``cut``, and the sum of their indices."""
    count = index = np.int32(0)
    cut32 = np.float32(cut)
    for k in range(np.uint64(width)):
        hit = np.int32(scores[k] <= cut32)
        count += hit
        index += hit * np.int32(k)
    return count, index  # type: ignore[return-value] # int32 is compiled as an int


@_any_order
def _start(row: Array, factor: float, residual: Array) -> None:
    for i in range(len(residual)):
        residual[i] = np.float64(row[i]) * factor


@_any_order
def _subtract(
    residual: Array,
    centroid: Array,
    normalize: bool,  # noqa: FBT001 - numba has no keyword-only arguments
) -> float:
    """Take the centroid off, and bring what is left to length 1 if asked; return that length."""
    total = 0.0
    for i in range(len(residual)):
        residual[i] -= np.float64(centroid[i])
        total += residual[i] * residual[i]
    norm = math.sqrt(total)
    if normalize and norm > 0.0:
        inverse = 1.0 / norm
        for i in range(len(residual)):
            residual[i] *= inverse
    return norm


@compiled(nogil=True)
def _nearest(
    residual: Array, start: int, candidates: Array, tables: Tables
) -> tuple[int, float, float]:
    """Nearest of the candidates in float64, its squared distance, and that of the next."""
    least, second, best = np.inf, np.inf, 0
    for k in candidates:
        distance = _distance(residual, tables.centroids[start + k])
        if distance < least:
            least, second, best = distance, least, k
        elif distance < second:
            second = distance
    return best, least, second


@compiled(nogil=True)
def decide(  # noqa: C901, PLR0912, PLR0915, PLR0917 - one loop nest, as compiled; numba takes no keywords
    rows: Array, products: Array, facts: Array, tables: Tables, codes: Array, levels: Array
) -> None:  # fmt: skip
    """Codes of rows from their products, each proved to be the reference's.

    ``rows`` (n, E) are float32 or float64; ``products`` (>= n, >= N) int32 or float32; ``facts``
    float64 (n, 4): length, step and rounding error of each row as from `round_rows`, and how far
    the row may be from the exact one (`Network.fast`). ``codes`` int64 (n, L) and ``levels`` uint8
    (n,) are written; codes of a row at level `REFERENCE` are not to be used.
    """
    n_layers = len(tables.longest)
    g = (rows.shape[1] + 16) * UNIT64
    widest = np.max(tables.offsets[1:] - tables.offsets[:-1])
    lows = np.empty(widest, np.float32)
    candidates = np.empty(widest, np.int64)
    residual = np.empty(rows.shape[1])
    chosen = np.empty(n_layers, np.int64)  # columns, over all layers
    weights = np.empty(n_layers)  # beta_i

    for row in range(len(rows)):
        length, step, rounding, offset = facts[row]
        if not (LEAST_LENGTH <= length <= GREATEST_LENGTH and offset <= 0.01 * length):
            levels[row] = REFERENCE
            continue
        # the state before the first layer: alpha, ||u||, A, a, E
        if tables.normalize:
            alpha, size, mass = 1.0 / length, 1.0, 1.0
            drift = error = 2.1 * offset / length + g
        else:
            alpha, size, mass = 1.0, length, length
            drift = error = offset
        level = FAST
        depth = -1  # `residual` holds that of layer `depth`
        for layer in range(n_layers):
            start = tables.offsets[layer]
            width = tables.offsets[layer + 1] - start
            longest = tables.longest[layer]
            reach = size + longest
            exact_bound = 1.01 * (g * reach * reach + (2.0 * reach + error) * error)
            slope = 1.002 * (
                alpha * rounding
                + drift
                + (4 * layer + 8) * UNIT64 * mass
                + (layer + 12) * UNIT32 * (mass + longest)
            )
            lift = 1.002 * alpha * length
            last = layer == n_layers - 1

            count, best, known = width, 0, False
            norm = slip = least_norm = 0.0
            if slope < GREATEST_LENGTH and mass < GREATEST_LENGTH:
                least = _lowest_scores(
                    products,
                    row,
                    alpha * step,
                    slope,
                    lift,
                    layer,
                    chosen,
                    weights,
                    tables,
                    lows,
                )
                cut = least + exact_bound
                count, best = _within(lows, width, cut)
                if count > 1:
                    count = 0
                    for k in range(width):
                        if lows[k] <= np.float32(cut):
                            candidates[count] = k
                            count += 1
                else:
                    # the length of what this layer leaves, if the score tells it well enough
                    column = start + best
                    slack = slope * tables.lengths[column] + lift * tables.spreads[column]
                    square = 1.0 + 2.0 * (np.float64(lows[best]) + slack)
                    known = last or not tables.normalize
                    if not known and 2.01 * slack <= LOOSEST * square:
                        share = 2.01 * slack / square
                        norm = math.sqrt(square)
                        slip = share / (1.0 + math.sqrt(1.0 - share))
                        least_norm = norm * math.sqrt(1.0 - share)
                        known = least_norm > SHORTEST_RESIDUAL
            else:
                for k in range(width):
                    candidates[k] = k

            if not known:
                # from the residual itself
                level = FLOAT64
                if depth < 0:
                    _start(rows[row], 1.0 / length if tables.normalize else 1.0, residual)
                    depth = 0
                while depth < layer:
                    _subtract(residual, tables.centroids[chosen[depth]], tables.normalize)
                    depth += 1
                if count == 1:
                    candidates[0] = best
                best, least64, second = _nearest(residual, start, candidates[:count], tables)
                norm = math.sqrt(least64)
                unsure = 1.01 * (error + g * norm)
                least_norm = norm - unsure
                separate = second - least64 > 4.0 * exact_bound
                if not (
                    separate and (last or not tables.normalize or least_norm > SHORTEST_RESIDUAL)
                ):
                    level = REFERENCE
                    break
                slip = unsure / norm if norm > 0.0 else 0.0

            column = start + best
            chosen[layer] = column
            codes[row, layer] = tables.codes[column]
            if last:
                break
            weights[layer] = 1.0
            if tables.normalize:
                for i in range(layer + 1):
                    weights[i] /= norm
                alpha /= norm
                mass = (mass + longest) / norm
                drift = drift / norm + slip
                error = (2.0 * error + 3.0 * UNIT64 * norm) / least_norm + g
            else:
                mass += longest
                size += longest
                error += 2.0 * UNIT64 * (mass + error)
        levels[row] = level
