"""PNGs of what was measured: ratio to each rival, distance to the limit, scaling. ``python -m benchmarks.plots ROWS.json DIR`` draws a file of ``fastadapt bench --json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Rows = Sequence[dict[str, Any]]


def _sizes(axis: Any, name: str, sizes: Sequence[int]) -> None:
    """A logarithmic axis that names the sizes that were measured."""
    ticks = sorted(set(sizes))
    axis.set(xlabel=name, xscale="log")
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.set_xticks([], minor=True)


def _curves(rows: Rows, value: str, label: Callable[[dict[str, Any]], str], title: str, name: str, line: float, path: Path) -> Path:
    """One axis an op: ``value`` against rows, a curve a label, with the quartiles where it is the ratio."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    across = min(3, len(ops))
    down = -(-len(ops) // across)
    figure, axes = plt.subplots(down, across, figsize=(6 * across, 4.5 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(ops) :]:
        axis.remove()
    for op, axis in zip(ops, axes.flat, strict=False):
        curves: dict[str, Rows] = {}
        for row in rows:
            if row["op"] == op:
                curves.setdefault(label(row), []).append(row)  # type: ignore[attr-defined]
        for text, points in curves.items():
            points = sorted(points, key=lambda row: row["rows"])
            x, y = [row["rows"] for row in points], [row[value] for row in points]
            (drawn,) = axis.plot(x, y, marker="o", markersize=3, linewidth=1, label=text)
            if value == "ratio_median":
                axis.fill_between(x, [row["ratio_low"] for row in points], [row["ratio_high"] for row in points], color=drawn.get_color(), alpha=0.15)
        axis.axhline(line, color="black", linewidth=0.8, linestyle="--")
        axis.set(title=op, ylabel=name, **({"yscale": "log"} if value == "ratio_median" else {"ylim": (0, None)}))
        _sizes(axis, "rows", [row["rows"] for row in rows if row["op"] == op])
        axis.legend(fontsize=5, ncols=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _scaling(rows: Rows, path: Path) -> Path:
    """Time and memory against each size, on log axes: a straight line of slope 1 is linear."""
    against = list(dict.fromkeys(row["against"] for row in rows))
    figure, axes = plt.subplots(2, len(against), figsize=(4.5 * len(against), 8), squeeze=False, layout="constrained")
    for column, size in enumerate(against):
        for axis, key, name in ((axes[0][column], "milliseconds", "ms a step"), (axes[1][column], "peak_bytes", "peak bytes of a step")):
            for row in rows:
                if row["against"] == size:
                    exponent = row["time_exponent"] if key == "milliseconds" else row["memory_exponent"]
                    axis.plot(row["sizes"], row[key], marker="o", markersize=3, label=f"{row['what']}: exponent {exponent:.2f}")
            axis.set(ylabel=name, yscale="log")
            _sizes(axis, size, [n for row in rows if row["against"] == size for n in row["sizes"]])
            axis.legend(fontsize=6)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draws what the rows of all suites have to show; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    timings = [row for row in rows if row.get("ratio_median") is not None]
    ops = [row for row in timings if row["limit_fraction"] is not None]
    paths = []

    def sizes(row: dict[str, Any]) -> str:
        return f"{row['dtype']} d={row['width']} r={row['rank']} {row['threads']} threads"

    for direction in dict.fromkeys(row["direction"] for row in ops):
        chosen, stem = [row for row in ops if row["direction"] == direction], direction.replace("+", "_")
        for rival in dict.fromkeys(row["rival"] for row in chosen):
            of_rival = [row for row in chosen if row["rival"] == rival]
            title = f"{direction}: time of {rival} / time of fastadapt (above 1: fastadapt is faster), {chosen[0]['device']}"
            paths.append(_curves(of_rival, "ratio_median", sizes, title, "ratio", 1.0, folder / f"ratio_{rival}_{stem}.png"))
        title = f"{direction}: time of the limit / time of fastadapt, {chosen[0]['device']}"
        one_rival = [row for row in chosen if row["rival"] == chosen[0]["rival"]]
        paths.append(_curves(one_rival, "limit_fraction", sizes, title, "fraction of the limit", 0.8, folder / f"limit_{stem}.png"))
    if models := [row for row in timings if row["limit_fraction"] is None]:
        for row in models:  # one axis a direction, a bar's place for each model
            row["label"] = f"{row['op']} vs {row['rival']}"
        directions = list(dict.fromkeys(row["direction"] for row in models))
        figure, axes = plt.subplots(1, len(directions), figsize=(9 * len(directions), 1 + 0.25 * len(models)), squeeze=False, layout="constrained")
        for axis, direction in zip(axes.flat, directions, strict=True):
            bars = [row for row in models if row["direction"] == direction]
            spread = [[row["ratio_median"] - row["ratio_low"] for row in bars], [row["ratio_high"] - row["ratio_median"] for row in bars]]
            axis.barh([f"{row['label']}, {row['threads']} threads" for row in bars], [row["ratio_median"] for row in bars], xerr=spread, height=0.6)
            axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
            axis.set(title=f"{direction}: rival's time / fastadapt's")
            axis.invert_yaxis()
        figure.savefig(folder / "models.png", dpi=90)
        plt.close(figure)
        paths.append(folder / "models.png")
    if scaling := [row for row in rows if row.get("suite") == "scaling"]:
        paths.append(_scaling(scaling, folder / "scaling.png"))
    return paths


if __name__ == "__main__":
    source, target = sys.argv[1:]
    print(*draw(json.loads(Path(source).read_text()), Path(target)), sep="\n")
