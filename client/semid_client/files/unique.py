"""The extra digit: a number after the codes that tells items with the same codes apart.

Two conventions are in use. In items' order, a group of m items with the same codes gets

    tiger   0 .. m-1
    grid    1 .. m, and 0 if m is 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from semid_client.files.places import reserve

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    Keys = NDArray[Any]
    Rows = NDArray[np.int64]

Convention = Literal["grid", "tiger"]

PART_ROWS: Final = 1 << 22
"""Rows that are sorted at once: about 250 MB."""

WINDOW_ROWS: Final = 1 << 22
"""Digits that are mapped at once."""


class Digits:
    """Digits of ``n_rows`` rows in a file of uint32, read and written through small windows."""

    def __init__(self, path: Path, n_rows: int) -> None:
        self.path, self.n_rows, self.largest = path, n_rows, 0
        reserve(path, 4 * n_rows)

    def __getitem__(self, rows: slice) -> NDArray[np.uint32]:
        """Digits of a slice of rows."""
        start, stop, _ = rows.indices(self.n_rows)
        return np.fromfile(self.path, np.uint32, max(0, stop - start), offset=4 * start)

    def put(self, rows: Rows, digits: NDArray[Any]) -> None:
        """Set the digits of ``rows``, which ascend."""
        if not len(rows):
            return
        self.largest = max(self.largest, int(digits.max()))
        for window in range(int(rows[0]) // WINDOW_ROWS, int(rows[-1]) // WINDOW_ROWS + 1):
            start = window * WINDOW_ROWS
            here = slice(*np.searchsorted(rows, [start, start + WINDOW_ROWS]))
            length = min(WINDOW_ROWS, self.n_rows - start)
            mapped = np.memmap(self.path, np.uint32, "r+", 4 * start, (length,))
            mapped[rows[here] - start] = digits[here]


def extra_digits(
    blocks: Iterable[tuple[Rows, NDArray[Any]]],
    n_rows: int,
    convention: Convention,
    folder: Path,
    *,
    part_rows: int = PART_ROWS,
) -> Digits:
    """Extra digits of a whole file, in one pass over its codes and in bounded memory.

    Rows are dealt out to parts, in files, so that equal codes are in the same part; each part is
    sorted, piece by piece if a few IDs make it large.

    Parameters
    ----------
    blocks : iterable of (rows, codes)
        Ascending indices (m,) and unsigned codes (m, L) of that many rows; all rows, but for
        those that have no codes, whose digit is 0.
    n_rows : int
        Of the file.
    convention : "grid" or "tiger"
        See above.
    folder : Path
        Where the digits go, and what does not fit in memory.
    part_rows : int
        Rows to sort at once.
    """
    digits = Digits(folder / "digits", n_rows)
    n_parts = -(-n_rows // part_rows)
    if n_parts <= 1:
        pieces = [(rows, _keys(codes)) for rows, codes in blocks]
        if pieces:
            part = _Part(digits, convention)
            part.add(*(np.concatenate(column) for column in zip(*pieces, strict=True)))
            part.finish()
        return digits
    paths = [folder / f"part-{i}" for i in range(n_parts)]
    record = _deal(blocks, paths)
    for path in paths:
        part = _Part(digits, convention)
        for start in range(0, path.stat().st_size, part_rows * record.itemsize):
            some = np.fromfile(path, record, part_rows, offset=start)
            part.add(some["row"], np.ascontiguousarray(some["key"]))
        part.finish()
        path.unlink()
    return digits


@dataclass(frozen=True, slots=True)
class _Seen:
    """IDs met so far: each key, ascending, how often, and the row where it came first."""

    keys: Keys
    counts: NDArray[np.int64]
    first: Rows


class _Part:
    """Digits of the rows of one part, given piece by piece in ascending order."""

    def __init__(self, digits: Digits, convention: Convention) -> None:
        self._digits, self._convention = digits, convention
        self._seen: _Seen | None = None

    def add(self, rows: Rows, keys: Keys) -> None:
        """Number these rows within their groups; the first of a group as if it were alone."""
        if not len(rows):
            return
        order, keys = _sorted(keys)
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        sizes = np.diff(np.append(starts, len(keys)))
        here = _Seen(keys[starts], sizes, rows[order[starts]])
        before = np.zeros(len(starts), np.int64)
        if self._seen is None:
            self._seen = here
        else:
            before = self._merge(self._seen, here)
        rank = np.arange(len(keys)) - np.repeat(starts - before, sizes)
        if self._convention == "grid":
            rank += rank > 0
        digit = np.empty(len(rows), np.uint32)
        digit[order] = rank
        self._digits.put(rows, digit)

    def _merge(self, seen: _Seen, here: _Seen) -> NDArray[np.int64]:
        """Count ``here`` into what was seen; return how often each of its keys was before."""
        at = np.minimum(np.searchsorted(seen.keys, here.keys), len(seen.keys) - 1)
        known = seen.keys[at] == here.keys
        before = np.where(known, seen.counts[at], 0)
        seen.counts[at[known]] += here.counts[known]
        new = np.searchsorted(seen.keys, here.keys[~known])
        self._seen = _Seen(
            np.insert(seen.keys, new, here.keys[~known]),
            np.insert(seen.counts, new, here.counts[~known]),
            np.insert(seen.first, new, here.first[~known]),
        )
        return before

    def finish(self) -> None:
        """Give the first of each group of several its digit."""
        if self._seen is not None and self._convention == "grid":
            first = np.sort(self._seen.first[self._seen.counts > 1])
            self._digits.put(first, np.ones(len(first), np.uint32))
        self._seen = None


def _keys(codes: NDArray[Any]) -> Keys:
    """One value for each row, equal where all codes are: uint64, or bytes where that is short."""
    n_bytes = codes.shape[1] * codes.itemsize  # told, for of no rows it cannot be inferred
    width = -(-n_bytes // 8) * 8
    padded = np.zeros((len(codes), width), np.uint8)
    padded[:, :n_bytes] = np.ascontiguousarray(codes).view(np.uint8).reshape(len(codes), n_bytes)
    return padded.view("<u8" if width == 8 else f"V{width}")[:, 0]  # noqa: PLR2004 -- one word


def _sorted(keys: Keys) -> tuple[NDArray[np.int64], Keys]:
    """Stable order of the keys, and the keys in that order."""
    bits = max(1, (len(keys) - 1).bit_length())
    if keys.dtype.kind == "u" and int(keys.max()).bit_length() + bits <= 64:  # noqa: PLR2004 -- a word
        # Key and place in one word: plain sorting is several times faster than sorting indices.
        both = np.sort(keys << np.uint64(bits) | np.arange(len(keys), dtype=np.uint64))
        order = (both & np.uint64((1 << bits) - 1)).astype(np.int64)
        return order, both >> np.uint64(bits)
    order = np.argsort(keys, kind="stable")
    return order, keys[order]


def _deal(blocks: Iterable[tuple[Rows, NDArray[Any]]], paths: list[Path]) -> np.dtype[Any]:
    """Write each row and its key to the file that its key belongs to."""
    record = np.dtype([("row", np.int64), ("key", np.uint64)])
    files = [path.open("wb") for path in paths]
    try:
        for rows, codes in blocks:
            keys = _keys(codes)
            record = np.dtype([("row", np.int64), ("key", keys.dtype)])
            records = np.empty(len(rows), record)
            records["row"], records["key"] = rows, keys
            part = _part_of(keys, len(files))
            order = np.argsort(part, kind="stable")
            ends = np.searchsorted(part[order], np.arange(1, len(files)))
            for file, some in zip(files, np.split(records[order], ends), strict=True):
                file.write(some.data)
    finally:
        for file in files:
            file.close()
    return record


def _part_of(keys: Keys, n_parts: int) -> NDArray[np.int64]:
    """Spread keys evenly, by Fibonacci hashing of their words (Knuth, TAOCP 3, 6.4)."""
    mixed = np.zeros(len(keys), np.uint64)
    words = np.ascontiguousarray(keys).view("<u8").reshape(len(keys), keys.itemsize // 8)
    for word in words.T:
        mixed = (mixed ^ word) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
    return (mixed % np.uint64(n_parts)).astype(np.int64)
