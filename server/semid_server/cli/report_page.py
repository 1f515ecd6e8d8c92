"""A report as one page of plots: HTML and SVG, nothing else to load."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from semid_server.checkpoint import Checkpoint
    from semid_server.training.report import Report

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 420, 220, 52, 36, 12
_COLOURS = ("#2a6fbb", "#d9822b", "#3c8f5a", "#8a4fa3")

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 58rem; padding: 0 1rem; }
figure { display: inline-block; margin: 0 1rem 1.5rem 0; vertical-align: top; }
figcaption { font-weight: 600; margin-bottom: .3rem; max-width: 26rem; }
.legend { font-size: 12px; margin: 0 0 .2rem; }
.legend span { margin-right: 1.2em; white-space: nowrap; }
.legend i { border-radius: 50%; display: inline-block; height: .65em; width: .65em; }
.legend i { margin-right: .35em; }
svg text { fill: currentColor; }
svg .axis { stroke: currentColor; stroke-opacity: .4; }
table { border-collapse: collapse; margin: 0 0 1.5rem; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
.warning { border-left: 4px solid #c0392b; padding: .2rem .8rem; }
"""


def page_of(checkpoint: Checkpoint, embeddings: str, measured: Report) -> str:
    """Write the page: figures first, then how codes are used, errors, neighbours and groups."""
    depths = [str(one.depth) for one in measured.depths]
    errors = {"sum": [one.sum_error for one in measured.depths]}
    if measured.depths[0].calibrated_error is not None:
        errors["calibrated"] = [one.calibrated_error or 0.0 for one in measured.depths]
    errors["least possible"] = [one.least_error for one in measured.depths]
    neighbours = {
        f"{measured.neighbours} nearest": [one.neighbour_recall for one in measured.depths],
        "any two items": [one.chance for one in measured.depths],
    }
    sizes = sorted(measured.group_sizes)
    items = [size * measured.group_sizes[size] / measured.n_items for size in sizes]
    figures = [
        _figure(
            "Error left by the first codes, share of the variance", _lines(depths, errors, "codes")
        ),
        _figure("Items that share the first codes", _lines(depths, neighbours, "codes")),
        _figure(
            "Items by how many share their ID",
            _bars([str(size) for size in sizes], items, "items with the same ID"),
        ),
    ]
    for layer, use in enumerate(measured.layers):
        shares = sorted((count / measured.n_items for count in use.counts), reverse=True)
        figures.append(
            _figure(
                f"Layer {layer}: items of each code, the most frequent first "
                f"(perplexity {use.perplexity:.0f} of {len(use.counts)}, {use.dead} dead)",
                _bars(None, shares, "codes"),
            )
        )
    warnings = "".join(
        f'<p class="warning">{escape(warning)}</p>' for warning in checkpoint.warnings
    )
    widths = " x ".join(map(str, checkpoint.spec.codebook_widths))
    rows = {
        "Items": f"{measured.n_items:,}",
        "with an ID of their own": f"{measured.unique_items:,} "
        f"({measured.unique_items / measured.n_items:.2%})",
        "Distinct IDs": f"{measured.distinct_ids:,}",
        "Largest group": f"{measured.largest_group:,}",
        "Model": f"{checkpoint.spec.kind}, {widths}",
        "Fingerprint": checkpoint.fingerprint,
    }
    table = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items()
    )
    title = f"{escape(checkpoint.name)} on {escape(embeddings)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{warnings}"
        f"<table>{table}</table>\n{''.join(figures)}</body></html>\n"
    )


def _figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>\n"


def _frame(top: float, x_label: str, inside: str) -> str:
    """Axes from 0 to ``top``, a share, around what is drawn."""
    base, right = _HEIGHT - _BOTTOM, _WIDTH - 8
    ticks = "".join(
        f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * top * part:g} %</text>'
        for part in (0, 0.5, 1)
        for y in [base - part * (base - _TOP)]
    )
    middle = (_LEFT + right) / 2
    label = f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-size="11" role="img">'
        f"{ticks}{inside}{label}</svg>"
    )


def _round_up(share: float) -> float:
    """The next of 1, 2, 4, 6, 8 and 10 times a power of ten: the half of it is as short."""
    if share <= 0:
        return 1.0
    power = math.floor(math.log10(share))
    first = next(step for step in (1, 2, 4, 6, 8, 10) if share <= step * 10.0**power * (1 + 1e-9))
    return float(f"{first}e{power}")


def _x(index: float, count: int) -> float:
    return _LEFT + (index + 0.5) * (_WIDTH - 8 - _LEFT) / count


def _y(value: float, top: float) -> float:
    base = _HEIGHT - _BOTTOM
    return base - value / top * (base - _TOP)


def _names(names: Sequence[str]) -> str:
    every = -(-len(names) // 12)
    return "".join(
        f'<text x="{_x(index, len(names)):.1f}" y="{_HEIGHT - 21}" text-anchor="middle">'
        f"{escape(name)}</text>"
        for index, name in enumerate(names)
        if index % every == 0
    )


def _lines(names: Sequence[str], series: dict[str, list[float]], x_label: str) -> str:
    top = _round_up(max(max(values) for values in series.values()))
    drawn, legend = [_names(names)], []
    for number, (name, values) in enumerate(series.items()):
        colour = _COLOURS[number]
        points = [(_x(i, len(names)), _y(value, top)) for i, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
            f"<title>{escape(name)}: {value:.4g}</title></circle>"
            for (x, y), value in zip(points, values, strict=True)
        ]
        legend.append(f'<span><i style="background:{colour}"></i>{escape(name)}</span>')
    # above the plot: within it, it would cover one line or another
    return f'<p class="legend">{"".join(legend)}</p>' + _frame(top, x_label, "".join(drawn))


def _bars(names: Sequence[str] | None, values: Sequence[float], x_label: str) -> str:
    top = _round_up(max(values))
    width = (_WIDTH - 8 - _LEFT) / len(values) * (0.8 if names else 1)
    bars = "".join(
        f'<rect x="{_x(i, len(values)) - width / 2:.2f}" y="{_y(value, top):.2f}" '
        f'width="{width:.2f}" height="{max(0.0, _y(0, top) - _y(value, top)):.2f}" '
        f'fill="{_COLOURS[0]}"><title>{value:.3%}</title></rect>'
        for i, value in enumerate(values)
    )
    return _frame(top, x_label, bars + (_names(names) if names else ""))
