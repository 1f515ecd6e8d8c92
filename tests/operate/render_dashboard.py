"""Draw the dashboard from real data, to be looked at.

    python tests/operate/render_dashboard.py PAGE.png [SECONDS]

Runs the fleet and the Prometheus of the tests for so long (90 s), asks for each panel's data as
Grafana would, and draws the panels where the dashboard has them.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import live
import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.dates import SECONDLY, AutoDateLocator, DateFormatter
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, FAINT = "#222222", "#888888"
UNIT_HEIGHT, WIDTH = 0.42, 22.0
WINDOW = "4s"
STEP = 1
"""Seconds from point to point."""
BINARY = {"bytes": "", "binBps": "/s"}
BINARY_NAMES = {1024**power: name for power, name in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))}
SYMBOLS = 14
"""Of a legend beside one another, in a column of the dashboard's grid."""


def binary_scale(value: float) -> int:
    """Return the largest of 1, KiB, MiB, ... that is no more than a number of bytes."""
    return 1024 ** min(4, int(math.log(value, 1024))) if value >= 1 else 1


def shown(value: float, unit: str, scale: int | None = None) -> str:
    """A number as Grafana writes it in a unit; bytes in their own, or in `scale` bytes."""
    if not math.isfinite(value):
        return "no data"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        size, name = next(
            ((size, name) for size, name in ((1, "s"), (1e-3, "ms")) if value >= size),
            (1e-6, "us"),
        )
        return f"{value / size:.3g} {name}" if value else "0 s"
    if unit in BINARY:
        scale = scale or binary_scale(value)
        name = BINARY_NAMES[scale]
        return f"{value / scale:.4g} {name}{BINARY[unit]}"
    words = {"reqps": " req/s", "ops": " ops/s"}
    number = f"{value / 1000:.3g} K" if value >= 10_000 else f"{value:.4g}"
    return number + words.get(unit, unit.removeprefix("suffix:") if ":" in unit else "")


class BinaryLocator(MaxNLocator):
    """A few ticks at round numbers of KiB, MiB, ..., as Grafana has them."""

    def tick_values(self, vmin: float, vmax: float):
        scale = binary_scale(vmax)
        return super().tick_values(vmin / scale, vmax / scale) * scale


def write_ticks(axes, panel) -> None:
    """Put ticks where Grafana has them, and write them in the panel's unit."""
    defaults = panel["fieldConfig"]["defaults"]
    unit = defaults["unit"]
    if unit in BINARY:
        axes.yaxis.set_major_locator(BinaryLocator(6))
    elif defaults.get("decimals") == 0:
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    low, high = axes.get_ylim()
    scale = binary_scale(high)  # one for all of an axis
    written = FuncFormatter(lambda value, _: shown(value, unit, scale))
    axes.yaxis.set_major_formatter(written)
    if axes.get_yscale() == "log":
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(written if high < 100 * low else NullFormatter())
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
    moments = AutoDateLocator(minticks=2, maxticks=6 if panel["gridPos"]["w"] > 5 else 4)
    moments.intervald[SECONDLY].append(60)  # so that a few do for a minute and a half
    axes.xaxis.set_major_locator(moments)
    axes.tick_params(which="both", labelsize=7, colors=INK)


def legend(target, labels) -> str:
    text = target["legendFormat"]
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value if len(value) < 20 else f"{value[:10]}...")
    return text


def legend_columns(names: list[str], width: int) -> int:
    """Return how many names fit beside one another under a panel, each after a short line."""
    widest = max(map(len, names)) + 8
    return max(1, min(len(names), int(SYMBOLS * width / widest)))


def draw_stat(axes, panel, prometheus) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    expression = live.filled(panel["targets"][0]["expr"], rate_interval=WINDOW, operation="encode")
    value = (prometheus.values(expression) or [math.nan])[0]
    color = INK
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            color = {"text": INK, "green": "#2a8a3e", "red": "#c4162a"}[step["color"]]
    axes.axis("off")
    axes.text(
        *(0.5, 0.4, shown(value, defaults["unit"])),
        ha="center",
        va="center",
        fontsize=17,
        color=color,
    )


def draw_series(axes, times, series, *, stacked: bool) -> None:
    """Draw each series of (name, values), broken where it has none."""
    if stacked:
        axes.stackplot(
            times,
            [np.nan_to_num(values) for _, values in series],
            labels=[name for name, _ in series],
            colors=[f"C{number}" for number in range(len(series))],
            alpha=0.6,
        )
        return
    for number, (name, values) in enumerate(series):
        # Those behind are wider, so that one under another shows; none ends at the frame.
        width = 1 + 1.5 * (len(series) - 1 - number) / len(series)
        style = {"color": f"C{number}", "clip_on": False, "zorder": 3}
        axes.plot(times, values, label=name, linewidth=width, **style)
        # A point between two gaps has no line.
        there = np.isfinite(np.pad(values, 1, constant_values=np.nan))
        alone = there[1:-1] & ~there[:-2] & ~there[2:]
        axes.plot(times, np.where(alone, values, np.nan), ".", markersize=3, **style)


def draw_lines(axes, panel, prometheus, begin: float, end: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults["custom"]
    log = custom.get("scaleDistribution", {}).get("type") == "log"
    stamps = np.arange(begin, end, STEP)
    series = []
    for target in panel["targets"]:
        query = live.filled(target["expr"], rate_interval=WINDOW, operation="encode")
        found = prometheus.get(
            "query_range", query=query, start=stamps[0], end=stamps[-1], step=STEP
        )
        for one in found["result"]:
            values = np.full(len(stamps), np.nan)
            for stamp, value in one["values"]:
                values[round((stamp - begin) / STEP)] = float(value)
            values[~np.isfinite(values) | (log & (values <= 0))] = np.nan
            series.append((legend(target, one["metric"]), values))
    times = [datetime.fromtimestamp(stamp) for stamp in stamps]  # noqa: DTZ006 - the reader's
    draw_series(axes, times, series, stacked=bool(custom.get("stacking")))
    for step in defaults.get("thresholds", {}).get("steps", ()):
        if step["value"] is not None:
            axes.axhline(step["value"], color="#c4162a", linewidth=0.8)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(top=max(1.05 * axes.get_ylim()[1], custom.get("axisSoftMax", -math.inf)))
    axes.set_ylim(bottom=defaults.get("min"), top=defaults.get("max"))
    write_ticks(axes, panel)
    axes.grid(color="#dddddd", linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if series:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.1),
            ncols=legend_columns([name for name, _ in series], panel["gridPos"]["w"]),
            fontsize=7,
            frameon=False,
        )
    else:
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes, color="#c4162a")


def draw_table(axes, panel, prometheus) -> None:
    query = live.filled(panel["targets"][0]["expr"], rate_interval=WINDOW, operation="encode")
    order = panel["transformations"][0]["options"]["indexByName"]
    names = sorted(order, key=order.get)
    rows = [
        [one["metric"].get(name, "") for name in names]
        for one in prometheus.get("query", query=query)["result"]
    ]
    short = [[cell if len(cell) < 18 else f"{cell[:10]}..." for cell in row] for row in rows]
    axes.axis("off")
    table = axes.table(short, colLabels=names, loc="upper center", cellLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(8)


def draw(dashboard, prometheus, begin: float, end: float, page: Path) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    rows = max(place["y"] + place["h"] for place in places)
    figure = plt.figure(figsize=(WIDTH, UNIT_HEIGHT * rows), facecolor="white")
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        left, top = place["x"] / 24, 1 - place["y"] / rows
        if panel["type"] == "row":
            title = panel["title"].replace("$operation", "encode")
            figure.text(0.01, top - 0.7 / rows, title, fontsize=12, weight="bold", color=INK)
            continue
        legends = 2.4 if panel["type"] == "timeseries" else 0.3
        axes = figure.add_axes(
            (
                left + 0.035,
                top - (place["h"] - legends) / rows,
                place["w"] / 24 - 0.045,
                (place["h"] - legends - 1.1) / rows,
            )
        )
        axes.set_title(
            panel["title"].replace("$operation", "encode"), loc="left", fontsize=9, color=INK
        )
        if panel["type"] == "stat":
            draw_stat(axes, panel, prometheus)
        elif panel["type"] == "table":
            draw_table(axes, panel, prometheus)
        else:
            draw_lines(axes, panel, prometheus, begin, end)
    figure.savefig(page, dpi=80)


def main() -> None:
    page = Path(sys.argv[1])
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 90.0
    mpl.use("agg")
    dashboard = json.loads((live.DOCKER / "grafana/semid.json").read_text())
    with (
        tempfile.TemporaryDirectory() as folder,
        live.watched_fleet(Path(folder)) as (prometheus, _),
    ):
        begin = time.time()
        print(f"load for {seconds:g} s", flush=True)
        time.sleep(seconds)
        draw(dashboard, prometheus, begin, time.time(), page)
    print(page)


if __name__ == "__main__":
    main()
