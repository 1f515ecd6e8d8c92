"""`semid verify`: check a file of semantic IDs against the embeddings that they are of."""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import click
import numpy as np
from tqdm import tqdm

from semid_client.cli._convert import json_option, source_options
from semid_client.cli._engines import check_engine, engine_options, open_engine
from semid_client.cli._options import option
from semid_client.cli.decode import codes_of, extra_digit_option
from semid_client.files import Convention, FileError, extra_digits, open_rows
from semid_client.files.finite import not_finite
from semid_client.files.ids import READ_ROWS, Ids
from semid_client.files.outputs import json_id, kept
from semid_client.files.places import place
from semid_client.files.rows import STDIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from semid_client.files import Engine, Source

ENV = "SEMID_VERIFY"

WINDOWS: Final = 64
"""Places of a file that a sample is taken from."""

SHOWN: Final = 8
"""Differences of a kind that are shown."""

CONVENTIONS: Final = get_args(Convention)


@click.command(short_help="Check semantic IDs against their embeddings.")
@click.argument("output", metavar="OUT")
@click.argument("source", metavar="IN")
@engine_options
@json_option(ENV)
@source_options(ENV)
@extra_digit_option(ENV)
@option(
    "--all",
    "everything",
    env=ENV,
    is_flag=True,
    help="Check every row, not a sample.",
)
@option(
    "--rows",
    env=ENV,
    type=click.IntRange(1),
    default=10_000,
    show_default=True,
    help=f"Rows to check, from {WINDOWS} places chosen at random.",
)
def verify(
    output: str,
    source: str,
    *,
    rows: int,
    everything: bool,
    extra_digit: bool | None,
    column: str | None,
    id_column: str | None,
    as_json: bool,
    **engine_flags: Any,
) -> None:
    """Encode rows of IN again and compare them with OUT, as `semid encode` made it of IN.

    The fingerprint that OUT records, its ids and its extra digits are checked too, of all rows. A
    difference gives status 1.
    """
    check_engine(**engine_flags)
    if STDIN in (source, output):
        raise click.UsageError("Files are read at several places: none can be standard input.")
    with (
        closing(open_rows(source, "embeddings", column=column, id_column=id_column)) as embeddings,
        closing(open_rows(output, "codes")) as codes,
        closing(open_engine(**engine_flags, blocks=1)) as engine,
    ):
        n_codes = codes_of(codes, engine, extra_digit=extra_digit)
        if not embeddings.takes_width(engine.info.input_dim):
            raise FileError(
                source,
                f"has rows of {embeddings.width} numbers, but model {engine.info.name!r} "
                f"{engine.where} takes embeddings of {engine.info.input_dim}",
            )
        if n_codes != engine.info.n_layers:
            digit = " and an extra digit" if codes.width > n_codes else ""
            raise FileError(
                output,
                f"has rows of {n_codes} codes{digit}, but model {engine.info.name!r} "
                f"{engine.where} has {engine.info.n_layers} layers: encoding gives a code of each",
            )
        check = _Check(embeddings, codes, engine, n_codes, _left_out(codes, embeddings))
        check.codes_again(everything=everything, rows=rows)
        check.ids_again()
        if codes.width > n_codes:
            check.digits_again()
    if as_json:
        click.echo(json.dumps(check.summary(output), indent=2))
    else:
        check.tell(output)
    if check.differs:
        raise SystemExit(1)


@dataclass(slots=True)
class _Found:
    """Differences of one kind: how many, and the first of them, ready to be shown."""

    count: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)

    def add(self, differ: NDArray[np.bool_], rows: NDArray[np.int64], **columns: Any) -> None:
        """Count differences between ``columns`` (n, ...) of ``rows`` (n,), and keep some."""
        places = np.flatnonzero(differ)
        self.count += len(places)
        for i in places[: SHOWN - len(self.first)].tolist():
            shown = {name: column[i] for name, column in columns.items()}
            plain = {
                name: value.tolist() if isinstance(value, np.ndarray | np.generic) else value
                for name, value in shown.items()
            }
            self.first.append({"row": int(rows[i]), **plain})


@dataclass(slots=True)
class _Check:
    """A file of codes beside the embeddings they are said to be of.

    ``left_out`` are the rows of the embeddings that have no codes, ascending.
    """

    embeddings: Source
    codes: Source
    engine: Engine
    n_codes: int
    left_out: NDArray[np.int64]
    checked: int = 0
    convention: str | None = None
    wrong_codes: _Found = field(default_factory=_Found)
    wrong_digits: _Found = field(default_factory=_Found)
    wrong_ids: _Found = field(default_factory=_Found)

    @property
    def n(self) -> int:
        """Rows of the embeddings."""
        return self.embeddings.n_rows or 0

    @property
    def differs(self) -> bool:
        """Whether anything does."""
        return bool(self.wrong_codes.count or self.wrong_digits.count or self.wrong_ids.count)

    def codes_again(self, *, everything: bool, rows: int) -> None:
        """Encode rows again, and compare."""
        source = self.embeddings
        n_bytes = self.engine.block_bytes * self.engine.threads  # nothing else keeps those busy
        block = max(1, n_bytes // (source.width * source.dtype.itemsize))
        spans = list(_all_spans(self.n, block) if everything else _sample(self.n, rows, block))
        inputs, outputs = _Cursor(source, block), _Cursor(self.codes, block)
        with _bar("codes", sum(stop - start for start, stop in spans)) as bar:
            for start, stop in spans:
                self._span_again(inputs, outputs, start, stop)
                bar.update(stop - start)

    def _span_again(self, inputs: _Cursor, outputs: _Cursor, start: int, stop: int) -> None:
        given, bad = inputs.read(start, stop)
        rows = np.arange(start, stop)
        good = ~np.isin(rows, list(bad))
        computed = np.zeros((len(rows), self.n_codes), self.engine.info.code_dtype)
        if good.any():
            computed[good] = self.engine.encode(given[good])
        # Rows left out of the codes have no place there, and the others have moved up.
        first, last = np.searchsorted(self.left_out, [start, stop])
        there = np.ones(len(rows), np.bool_)
        there[self.left_out[first:last] - start] = False
        held, null = np.zeros((len(rows), self.n_codes), self.codes.dtype), ~there
        if there.any():
            found, empty = outputs.read(start - int(first), stop - int(last))
            held[there] = found[:, : self.n_codes]
            null[there] = np.isin(np.arange(start - first, stop - last), list(empty))
        # A bad row has no codes: whatever is written there is of no embedding.
        differ = (null == good) | (good & (held != computed).any(axis=1))
        self.checked += int((good | ~null).sum())
        if differ.any():
            self.wrong_codes.add(
                differ,
                rows,
                written=_where(~null, held),
                computed=_where(good, computed),
                problem=[bad.get(row) for row in rows.tolist()],
            )

    def ids_again(self) -> None:
        """Compare all ids, where the codes have them."""
        if self.codes.id_type is None:
            return
        given, written = Ids(self.embeddings), Ids(self.codes)
        with _bar("ids", self.n) as bar:
            for start in range(0, self.n, READ_ROWS):
                n = min(READ_ROWS, self.n - start)
                out = self.left_out[slice(*np.searchsorted(self.left_out, [start, start + n]))]
                valid = np.ones(n, np.bool_)
                valid[out - start] = False
                expected = kept(given.take(start, n), valid)
                rows = start + np.flatnonzero(valid)
                found = written.take(start, len(rows))
                if not _equal(expected, found):
                    pair = _plain(expected), _plain(found)
                    differ = np.array([a != b for a, b in zip(*pair, strict=True)], np.bool_)
                    self.wrong_ids.add(differ, rows, written=pair[1], given=pair[0])
                bar.update(n)

    def digits_again(self) -> None:
        """Number all items again, by the convention that is recorded or else by the likelier."""
        recorded = self.codes.metadata.get("semid.unique")
        found = {}
        for convention in [recorded] if recorded in CONVENTIONS else CONVENTIONS:
            found[convention] = self._digits_by(convention)
        self.convention = min(found, key=lambda convention: found[convention].count)
        self.wrong_digits = found[self.convention]

    def _digits_by(self, convention: Any) -> _Found:
        wrong, n = _Found(), self.codes.n_rows or 0
        with tempfile.TemporaryDirectory(prefix="semid-") as folder:
            pieces = ((at[valid], some[valid]) for at, some, _, valid in self._written())
            digits = extra_digits(pieces, n, convention, Path(folder))
            with _bar(f"digits, {convention}", n) as bar:
                for at, _, written, valid in self._written():
                    computed = digits[int(at[0]) : int(at[-1]) + 1]
                    differ = (written != computed) & valid
                    wrong.add(differ, at, written=written, computed=computed)
                    bar.update(len(at))
        return wrong

    def _written(self) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Indices of some rows of the codes, codes, digits, and which are not null."""
        info = self.engine.info
        widths = np.array([layer.codebook_width for layer in info.layers[: self.n_codes]])
        for block in self.codes.blocks(0, READ_ROWS):
            codes, digits = block.rows[:, : self.n_codes], block.rows[:, self.n_codes]
            far = np.argwhere((codes < 0) | (codes >= widths))
            if len(far):
                row, layer = far[0].tolist()
                raise FileError(
                    self.codes.path,
                    f"row {block.start + row}: code {codes[row, layer]} of layer {layer} is out of "
                    f"range; model {info.name!r} has {widths[layer]} centroids there",
                )
            at = np.arange(block.start, block.start + len(codes))
            valid = ~np.isin(at, list(block.bad))
            yield at, codes.astype(info.code_dtype), digits, valid

    def summary(self, output: str) -> dict[str, Any]:
        """All that was found, for programs."""
        return {
            "output": output,
            "fingerprint": self.engine.info.fingerprint,
            "fingerprint_recorded": "semid.fingerprint" in self.codes.metadata,
            "rows": self.n,
            "rows_checked": self.checked,
            "rows_different": self.wrong_codes.count,
            "first_different": self.wrong_codes.first,
            "ids_checked": self.codes.id_type is not None,
            "ids_different": self.wrong_ids.count,
            "first_ids_different": self.wrong_ids.first,
            "unique": self.convention,
            "digits_different": self.wrong_digits.count,
            "first_digits_different": self.wrong_digits.first,
        }

    def tell(self, output: str) -> None:
        """Print what was found."""
        for item in self.wrong_codes.first:
            given = (
                f"the model gives {item['computed']}"
                if item["problem"] is None
                else f"but that row of {self.embeddings.path} has none: {item['problem']}"
            )
            written = "no codes" if item["written"] is None else item["written"]
            click.echo(f"row {item['row']}: {output} has {written}, {given}")
        for item in self.wrong_ids.first:
            click.echo(
                f"row {item['row']}: {output} has id {item['written']!r}, {self.embeddings.path} "
                f"has {item['given']!r}"
            )
        for item in self.wrong_digits.first:
            click.echo(
                f"row {item['row']} of {output} has extra digit {item['written']}, by "
                f"{self.convention} it is {item['computed']}"
            )
        told = [f"{self.checked:,} of {self.n:,} rows checked, {self.wrong_codes.count:,} differ"]
        if self.codes.id_type is not None:
            told.append(f"{self.wrong_ids.count:,} ids differ")
        if self.convention is not None:
            told.append(f"{self.wrong_digits.count:,} extra digits differ ({self.convention})")
        recorded = "semid.fingerprint" in self.codes.metadata
        click.echo(
            f"{output}: {', '.join(told)}; fingerprint {self.engine.info.fingerprint}"
            + ("" if recorded else ", which the file does not record")
        )


def _bar(what: str, total: int) -> Any:
    return tqdm(desc=what, total=total, unit="row", unit_scale=True, disable=None, leave=False)


def _where(there: NDArray[np.bool_], rows: NDArray[Any]) -> list[Any]:
    """Rows, but None for those that are not there."""
    return [row if here else None for row, here in zip(rows, there.tolist(), strict=True)]


def _equal(expected: Any, found: Any) -> bool:
    """Whether ids are the same, where that can be seen without looking at each."""
    if isinstance(expected, np.ndarray):
        return bool(found.type.equals("int64") and found.null_count == 0) and np.array_equal(
            expected, found.to_numpy(zero_copy_only=False)
        )
    return bool(found.type == expected.type and found.equals(expected))


def _plain(ids: Any) -> list[Any]:
    """Ids as lines of JSON have them, so that they can be compared between any two formats."""
    listed = ids.tolist() if isinstance(ids, np.ndarray) else ids.to_pylist()
    return [json.loads(json_id(id_)) for id_ in listed]


class _Cursor:
    """A place in a source, from which to read on or to go elsewhere."""

    def __init__(self, source: Source, block: int) -> None:
        self._source, self._block = source, block
        self._at = -1  # of the first row that is held
        self._blocks: Iterator[Any] = iter(())
        self._held: NDArray[Any] = np.empty((0, source.width), source.dtype)
        self._bad: dict[int, str] = {}

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], dict[int, str]]:
        """Rows of a span; those that hold no numbers, by index in the source."""
        end = self._at + len(self._held)
        if not self._at <= start <= end and not (
            0 <= self._at <= end <= start and self._source.reads_on(end, start)
        ):
            # What is read through anyway is read in large blocks.
            n_rows = self._block if self._source.reads_on(start, start) else stop - start
            self._blocks = self._source.blocks(start, n_rows)
            self._at, self._held = start, self._held[:0]
        self._forget(start)
        while self._at + len(self._held) < stop:
            block = next(self._blocks)
            self._held = np.concatenate([self._held, block.rows])
            self._bad |= block.bad | not_finite(block.rows, block.start)
            self._forget(start)
        rows = self._held[: stop - start]
        return rows, {row: problem for row, problem in self._bad.items() if start <= row < stop}

    def _forget(self, start: int) -> None:
        """Let go of what is before row ``start``."""
        passed = min(len(self._held), start - self._at)
        self._held, self._at = self._held[passed:], self._at + passed
        self._bad = {row: problem for row, problem in self._bad.items() if row >= self._at}


def _left_out(codes: Source, embeddings: Source) -> NDArray[np.int64]:
    """Rows of the embeddings that have no row in the output, ascending."""
    if codes.n_rows == embeddings.n_rows:
        return np.empty(0, np.int64)
    listed = place(f"{codes.path}.bad-rows.jsonl")
    rows = []
    if listed.exists():
        with listed.open() as lines:
            rows = [json.loads(line)["row"] for line in lines]
    if (codes.n_rows or 0) + len(rows) != embeddings.n_rows:
        raise FileError(
            codes.path,
            f"has {codes.n_rows} rows, and {listed.name} lists {len(rows)} left out, but "
            f"{embeddings.path} has {embeddings.n_rows}: they do not belong together",
        )
    return np.array(rows, np.int64)


def _all_spans(n: int, block: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n, block):
        yield start, min(start + block, n)


def _sample(n: int, rows: int, block: int) -> Iterator[tuple[int, int]]:
    """Spans of about ``rows`` rows in all, ascending, at places chosen at random."""
    length = min(block, max(1, -(-min(rows, n) // WINDOWS)))
    places = math.ceil(n / length)
    chosen = np.random.default_rng().permutation(places)[: -(-rows // length)]
    for i in np.sort(chosen).tolist():
        yield i * length, min((i + 1) * length, n)
