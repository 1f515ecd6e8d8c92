"""`semid report`: how good the IDs of a checkpoint are on a set of embeddings."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from semid_server.checkpoint import Overrides, load_checkpoint
from semid_server.cli import errors_as_sentences, write_whole
from semid_server.cli.report_page import page_of
from semid_server.cli.training_options import (
    WatchedRows,
    column_option,
    option,
    refuse_if_taken,
    rows_for,
    threads_option,
)
from semid_server.encoding import make_encoder
from semid_server.errors import ConfigurationError
from semid_server.training.report import report as measure

if TYPE_CHECKING:
    from semid_server.checkpoint import Checkpoint
    from semid_server.training.report import Report

_option = partial(option, "report")


@click.command(short_help="Collisions, use of codes, errors and neighbours of a model's IDs.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("embeddings", type=click.Path(path_type=Path))
@_option(
    "--html",
    default=None,
    type=click.Path(path_type=Path),
    help="Also write a page of plots, one file that needs no other.",
)
@_option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object, for programs, in place of the tables.",
)
@_option(
    "--neighbours",
    type=click.IntRange(min=1),
    default=10,
    help="Nearest items whose codes are compared with an item's own.",
)
@_option(
    "--queries",
    type=click.IntRange(min=1),
    default=1000,
    help="Items, drawn at random, whose neighbours are looked for. More is slower and steadier.",
)
@column_option("report")
@threads_option("report")
@_option("--force", is_flag=True, help="Replace the file at HTML.")
@errors_as_sentences()
def report(
    *,
    checkpoint: Path,
    embeddings: Path,
    html: Path | None,
    as_json: bool,
    neighbours: int,
    queries: int,
    column: str | None,
    threads: int | None,
    force: bool,
) -> None:
    """Encode EMBEDDINGS, an .npy or .parquet file, with CHECKPOINT, and say how good the IDs are.

    A model whose codes mean nothing (layers never initialised, shared or collapsed) is named as
    such, and measured all the same.
    """
    if html is not None:
        refuse_if_taken(html, force=force)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_checkpoint(checkpoint, overrides=Overrides(allow_degenerate=True))
    rows = rows_for(loaded, embeddings, column)
    if rows.n_rows < 2:  # noqa: PLR2004 - a pair
        raise ConfigurationError(f"{embeddings} has {rows.n_rows} row; a report compares items")
    encoder = make_encoder(loaded.model, loaded.spec, device=torch.device("cpu"), threads=threads)
    watched = WatchedRows(rows, "reading")
    measured = measure(
        loaded.model,
        watched,
        encoder.encode,
        calibration=loaded.calibration,
        neighbours=neighbours,
        queries=queries,
    )
    watched.close()
    if html is not None:
        write_whole(html, page_of(loaded, embeddings.name, measured).encode())
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(
        json.dumps(_as_json(loaded, measured), indent=2) if as_json else _as_text(loaded, measured)
    )


def _as_json(checkpoint: Checkpoint, measured: Report) -> dict[str, Any]:
    return {
        "fingerprint": checkpoint.fingerprint,
        "warnings": list(checkpoint.warnings),
        "items": measured.n_items,
        "unique_items": measured.unique_items,
        "colliding_share": measured.colliding_share,
        "distinct_ids": measured.distinct_ids,
        "largest_group": measured.largest_group,
        "layers": [
            {
                "codebook_width": len(use.counts),
                "coverage": use.coverage,
                "dead": use.dead,
                "entropy_bits": use.entropy,
                "perplexity": use.perplexity,
                "largest_code": max(use.counts),
            }
            for use in measured.layers
        ],
        "depths": [
            {
                "depth": one.depth,
                "sum_error": one.sum_error,
                "calibrated_error": one.calibrated_error,
                "least_error": one.least_error,
                "neighbour_recall": one.neighbour_recall,
                "chance": one.chance,
            }
            for one in measured.depths
        ],
        "neighbours": measured.neighbours,
    }


def _as_text(checkpoint: Checkpoint, measured: Report) -> str:
    widths = " x ".join(map(str, checkpoint.spec.codebook_widths))
    share = measured.unique_items / measured.n_items
    model = f"{checkpoint.path}: {checkpoint.spec.kind}, {widths} centroids"
    items = f"{measured.n_items:,} items: {measured.unique_items:,} ({share:.2%}) have an ID of"
    ids = f"{measured.distinct_ids:,} distinct IDs, the largest group of items with one ID"
    lines = [
        model,
        f"{items} their own; {ids}: {measured.largest_group:,}",
        "",
        "layer  codes used  dead  perplexity  entropy (bits)  items with the most frequent",
    ]
    lines += [
        f"{index:5}  {use.coverage:10.1%}  {use.dead:4}  {use.perplexity:10.1f}  "
        f"{use.entropy:14.3f}  {max(use.counts) / measured.n_items:28.2%}"
        for index, use in enumerate(measured.layers)
    ]
    nearest = f"{measured.neighbours} nearest items"
    lines += [
        "",
        "Error left by the first codes, as a share of the variance of the embeddings; least: that",
        "of the mean of all items with the same codes. Neighbours: how many of an item's",
        f"{nearest} have the same codes; any two: how many pairs of items do.",
        "",
        "codes     sum  calibrated   least  neighbours  any two",
    ]
    lines += [
        f"{one.depth:5}  {one.sum_error:6.4f}  "
        f"{'-' if one.calibrated_error is None else format(one.calibrated_error, '.4f'):>10}  "
        f"{one.least_error:6.4f}  {one.neighbour_recall:10.2%}  {one.chance:7.3%}"
        for one in measured.depths
    ]
    return "\n".join(lines)
