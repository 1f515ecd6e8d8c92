"""`semid verify`: check a file of semantic IDs against the embeddings that they are of."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np
from tqdm import tqdm

from semid_client.cli._convert import json_option, source_options
from semid_client.cli._engines import check_engine, engine_options, open_engine
from semid_client.cli._options import option
from semid_client.cli.decode import codes_of, extra_digit_option
from semid_client.files import FileError, open_rows
from semid_client.files.pipeline import not_finite
from semid_client.files.rows import STDIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from semid_client.files import Source

ENV = "SEMID_VERIFY"

WINDOWS: Final = 64
"""Places of a file that a sample is taken from."""

SHOWN: Final = 8
"""Differences that are shown."""


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

    The fingerprint that OUT records is checked too. A difference gives status 1.
    """
    check_engine(**engine_flags)
    if source == STDIN:
        raise click.UsageError("IN is read at several places: it cannot be standard input.")
    with (
        closing(open_rows(source, "embeddings", column=column, id_column=id_column)) as embeddings,
        closing(open_rows(output, "codes")) as codes,
        closing(open_engine(**engine_flags)) as engine,
    ):
        n_codes = codes_of(codes, engine, extra_digit=extra_digit)
        if embeddings.width != engine.info.input_dim:
            raise FileError(
                source,
                f"has rows of {embeddings.width} numbers, but model {engine.info.name!r} "
                f"{engine.where} takes embeddings of {engine.info.input_dim}",
            )
        left_out = _left_out(codes, embeddings)
        n = embeddings.n_rows or 0
        block = max(1, engine.block_bytes // (embeddings.width * embeddings.dtype.itemsize))
        spans = list(_all_spans(n, block) if everything else _sample(n, rows, block))
        inputs, outputs = _Cursor(embeddings), _Cursor(codes)
        checked, wrong = 0, list[tuple[int, list[int], list[int]]]()
        with tqdm(
            total=sum(stop - start for start, stop in spans), unit="row", disable=None
        ) as bar:
            for start, stop in spans:
                given, bad = inputs.read(start, stop)
                good = np.array([i for i in range(start, stop) if i not in bad], np.int64)
                where = good - np.searchsorted(left_out, good)
                if not len(good):
                    continue
                held, null = outputs.read(int(where[0]), int(where[-1]) + 1)
                held = held[where - where[0], :n_codes]
                found = engine.encode(given[good - start])[:, :n_codes]
                differ = (found != held).any(axis=1) | np.isin(where, list(null))
                checked += len(good)
                wrong += [
                    (int(good[i]), held[i].tolist(), found[i].tolist())
                    for i in np.flatnonzero(differ)
                ]
                bar.update(stop - start)
        recorded = "semid.fingerprint" in codes.metadata
        if as_json:
            summary = {
                "output": output,
                "fingerprint": engine.info.fingerprint,
                "fingerprint_recorded": recorded,
                "rows": n,
                "rows_checked": checked,
                "rows_different": len(wrong),
                "first_different": [
                    {"row": row, "written": written, "computed": computed}
                    for row, written, computed in wrong[:SHOWN]
                ],
            }
            click.echo(json.dumps(summary, indent=2))
        else:
            for row, written, computed in wrong[:SHOWN]:
                click.echo(f"row {row}: {output} has {written}, the model gives {computed}")
            click.echo(
                f"{output}: {checked:,} of {n:,} rows checked, {len(wrong):,} differ; fingerprint "
                f"{engine.info.fingerprint}"
                + ("" if recorded else ", which the file does not record")
            )
    if wrong:
        raise SystemExit(1)


class _Cursor:
    """A place in a source, from which to read on or to go elsewhere."""

    def __init__(self, source: Source) -> None:
        self._source, self._at = source, -1
        self._blocks: Iterator[Any] = iter(())
        self._held: NDArray[Any] = np.empty((0, source.width), source.dtype)
        self._bad: dict[int, str] = {}

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], dict[int, str]]:
        """Rows of a span; those that hold no numbers, by index in the source."""
        if start != self._at:
            self._blocks = self._source.blocks(start, stop - start)
            self._held, self._bad = self._held[:0], {}
        while len(self._held) < stop - start:
            block = next(self._blocks)
            self._held = np.concatenate([self._held, block.rows])
            self._bad |= block.bad | not_finite(block)
        rows, self._held = self._held[: stop - start], self._held[stop - start :]
        bad = {row: problem for row, problem in self._bad.items() if row < stop}
        self._bad = {row: problem for row, problem in self._bad.items() if row >= stop}
        self._at = stop
        return rows, bad


def _left_out(codes: Source, embeddings: Source) -> NDArray[np.int64]:
    """Rows of the embeddings that have no row in the output, ascending."""
    if codes.n_rows == embeddings.n_rows:
        return np.empty(0, np.int64)
    listed = Path(f"{codes.path}.bad-rows.jsonl")
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
    for place in np.sort(chosen).tolist():
        yield place * length, min((place + 1) * length, n)
