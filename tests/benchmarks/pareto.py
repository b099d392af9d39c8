"""What each second of pruning buys: a table and a plot of what `quality.py` has measured.

Rows of the same name are runs with other calibration windows: their mean is shown, and the standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

SURFACE, INK = "#ffffff", "#1a1a1a"
FRONT, OTHERS = "#0f6fde", "#8a8a8a"


def main() -> None:
    """Print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files of `quality.py --json`")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw perplexity against time")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in args.results:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            runs[row["name"]].append(row)
    texts = list(dict.fromkeys(text for rows in runs.values() for row in rows for text in row["perplexity"]))
    print("| " + " | ".join(["", *texts, "processor seconds", "runs"]) + " |")
    print("|---|" + "---:|" * (len(texts) + 2))
    for name, rows in runs.items():
        cells = [spread([row["perplexity"][text] for row in rows]) for text in texts]
        cells += [f"{seconds(rows):.0f}", str(len(rows))]
        print("| " + " | ".join([name, *cells]) + " |")
    if args.plot is not None:
        draw({name: rows for name, rows in runs.items() if name != "dense"}, args.plot)


def spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    mean = f"{statistics.mean(values):,.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def seconds(rows: list[dict[str, Any]]) -> float:
    """Processor seconds of pruning, on average."""
    return statistics.mean(row["processor_seconds"] for row in rows)


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Those that nothing beats in both, by rising time.

    Args:
        points: Time and perplexity by name.
    """
    best: list[str] = []
    for name in sorted(points, key=points.__getitem__):
        if not best or points[name][1] < points[best[-1]][1]:
            best.append(name)
    return best


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Perplexity on WikiText-2 against processor seconds, a panel for each target."""
    targets: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for name, rows in runs.items():
        method, _, target = name.rpartition(" ")
        value = statistics.mean(row["perplexity"]["wikitext2"] for row in rows)
        targets[target][method] = (seconds(rows), value)
    figure = Figure(figsize=(4 * len(targets), 3.6), facecolor=SURFACE, layout="constrained")
    for axes, (target, points) in zip(
        figure.subplots(1, len(targets), squeeze=False)[0], targets.items(), strict=True
    ):
        best = front(points)
        axes.plot(*zip(*(points[name] for name in best), strict=True), color=FRONT, lw=1.5, zorder=1)
        for number, (name, (x, y)) in enumerate(sorted(points.items(), key=lambda point: point[1])):
            color = FRONT if name in best else OTHERS
            axes.plot(x, y, "o", ms=6, color=color, mec=SURFACE, mew=1, zorder=2)
            place = (0, 7 if number % 2 else -14)  # neighbours do not write over each other
            axes.annotate(name, (x, y), place, textcoords="offset points", ha="center", fontsize=8, color=INK)
        axes.set(xscale="log", yscale="log", title=target if ":" in target else f"{target} % zeros")
        axes.set(xlabel="processor seconds", ylabel="perplexity")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        axes.margins(0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
