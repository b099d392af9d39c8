"""Plots as SVG for a page, in the page's own colours and fonts; drawn by Matplotlib."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .record import SparsityReport
from .summary import by_place, errors_of, sparsity_of

# Colours that stand for variables of the page's style sheet, which has them in light and in dark.
NAMES = ("ink", "muted", "rule", "surface", "accent", "second", *(f"heat{level}" for level in range(9)))
COLOURS = {name: f"#fe{index:02x}01" for index, name in enumerate(NAMES)}
STEPS = 9
XLINK = "http://www.w3.org/1999/xlink"
# Names come from models: a $ in them is no formula. Fonts are the page's.
STYLE = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 10}


@matplotlib.rc_context(STYLE)
def heatmap(
    values: Mapping[tuple[str, str], float], tips: Mapping[tuple[str, str], str], label: str, low: float, high: float
) -> str:
    """A cell for each (column, row) of `values`, in the order in which columns and rows first appear.

    Args:
        values: What the colours show.
        tips: What a cell says when one points at it.
        label: What the whole shows, for those who cannot see it.
        low: Value of the palest colour.
        high: Value of the strongest colour.
    """
    columns = list(dict.fromkeys(column for column, _ in values))
    rows = list(dict.fromkeys(row for _, row in values))
    figure, axes = _figure(width=9.6, height=0.9 + 0.3 * len(rows))
    texts: list[str] = []
    for (column, row), value in values.items():
        level = 0 if high <= low else round((STEPS - 1) * min(max((value - low) / (high - low), 0.0), 1.0))
        corner = (columns.index(column) + 0.04, rows.index(row) + 0.06)
        axes.add_patch(
            Rectangle(corner, 0.92, 0.88, facecolor=COLOURS[f"heat{level}"], linewidth=0, gid=f"tip-{len(texts)}")
        )
        texts.append(tips[column, row])
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [_end(row) for row in rows])
    step = -(-len(columns) // 32)
    shown = range(0, len(columns), step)
    axes.set_xticks([i + 0.5 for i in shown], [_number_of(columns[i]) for i in shown])
    axes.set_xlabel("block")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return _svg(figure, label, texts)


@matplotlib.rc_context(STYLE)
def curves(series: Mapping[str, Sequence[tuple[str, float]]], label: str, ylabel: str) -> str:
    """Lines over the blocks, in percent.

    Args:
        series: For each line its name, and (block, fraction) in order.
        label: What the whole shows, for those who cannot see it.
        ylabel: What the values are.
    """
    figure, axes = _figure(width=9.6, height=3.2)
    blocks = list(dict.fromkeys(block for line in series.values() for block, _ in line))
    texts: list[str] = []
    styles = (("accent", "-", "o"), ("second", "--", "s"))
    for (name, line), (colour, dashes, marker) in zip(series.items(), styles, strict=False):
        places = [blocks.index(block) for block, _ in line]
        heights = [100 * value for _, value in line]
        axes.plot(places, heights, color=COLOURS[colour], linestyle=dashes, linewidth=1.8, label=name)
        for place, height, (block, _) in zip(places, heights, line, strict=True):
            axes.plot(place, height, color=COLOURS[colour], marker=marker, markersize=4, gid=f"tip-{len(texts)}")
            texts.append(f"{block}: {name} {height:.3g} %")
    step = -(-len(blocks) // 32)
    axes.set_xticks(range(0, len(blocks), step), [_number_of(block) for block in blocks[::step]])
    axes.set_xlabel("block")
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.8)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=COLOURS["ink"])
    return _svg(figure, label, texts)


@matplotlib.rc_context(STYLE)
def bars(values: Mapping[str, float], shown: Mapping[str, str], label: str) -> str:
    """Horizontal bars, each with its value written beside it."""
    figure, axes = _figure(width=4.8, height=0.3 + 0.32 * len(values))
    places = range(len(values))
    drawn = axes.barh(places, list(values.values()), 0.62, color=COLOURS["accent"])
    axes.bar_label(drawn, [shown[name] for name in values], padding=5, color=COLOURS["ink"])
    axes.set_yticks(places, [_end(name) for name in values])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(values.values()) or 1)
    axes.set_xticks([])
    axes.spines[["bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return _svg(figure, label, [])


@matplotlib.rc_context(STYLE)
def scatter(points: Mapping[str, tuple[float, float]], best: Sequence[str], label: str, axis: tuple[str, str]) -> str:
    """Named points, and a line through those that no other beats in both directions.

    Args:
        points: Name -> (x, y).
        best: Names of the points on the line, in order.
        label: What the whole shows, for those who cannot see it.
        axis: Names of x and y.
    """
    figure, axes = _figure(width=6.4, height=4.0)
    axes.step(
        [points[name][0] for name in best], [points[name][1] for name in best], where="post", color=COLOURS["second"]
    )
    texts: list[str] = []
    for name, (x, y) in points.items():
        marker = "o" if name in best else "X"
        axes.plot(x, y, marker=marker, markersize=8, color=COLOURS["accent"], gid=f"tip-{len(texts)}")
        axes.annotate(
            _begin(name), (x, y), xytext=(0, 9), textcoords="offset points", ha="center", color=COLOURS["ink"]
        )
        texts.append(f"{name}: {x:.4g} {axis[0]}, {y:.4g} {axis[1]}")
    axes.margins(0.2, 0.22)
    axes.set_xlabel(axis[0])
    axes.set_ylabel(axis[1])
    axes.grid(color=COLOURS["rule"], linewidth=0.8)
    return _svg(figure, label, texts)


@matplotlib.rc_context({**STYLE, "savefig.dpi": 120})
def overview(report: SparsityReport) -> bytes:
    """The error of each kind of matrix over the blocks as PNG, for where SVG is not shown; zeros if there is none."""
    places = by_place(report.matrices)
    found = {place: errors_of(members) for place, members in places.items()}
    values = {place: 100 * math.fsum(errors) / len(errors) for place, errors in found.items() if errors}
    name = "error of the outputs, %" if values else "zeros, %"
    values = values or {place: 100 * sparsity_of(members) for place, members in places.items()}
    columns, rows = (list(dict.fromkeys(place[i] for place in values)) for i in (0, 1))
    grid = [[values.get((column, row), math.nan) for column in columns] for row in rows]
    figure = Figure(figsize=(9, 1.3 + 0.3 * len(rows)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label=name)
    axes.set_yticks(range(len(rows)), [_end(row) for row in rows])
    step = -(-len(columns) // 24)
    axes.set_xticks(range(0, len(columns), step), [_number_of(column) for column in columns[::step]])
    axes.set_xlabel("block")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(COLOURS["rule"])
    axes.tick_params(colors=COLOURS["muted"], labelcolor=COLOURS["muted"])
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(COLOURS["muted"])
    return figure, axes


def _svg(figure: Figure, label: str, tips: Sequence[str]) -> str:
    """The figure as an element of a page."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # the same bytes for the same report
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', _opening(figure, label), text, count=1)
    text = re.sub(r'<g id="tip-(\d+)">', lambda m: f"<g><title>{html.escape(tips[int(m[1])])}</title>", text)
    # The other names of parts would stand on the page as often as there are plots.
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return re.sub(r">\s+<", "><", text).strip()


def _opening(figure: Figure, label: str) -> str:
    name, width = html.escape(label).replace("\\", r"\\"), 72 * figure.get_figwidth()
    # Text never gets too small to read: on a phone one scrolls.
    limits = f"min-width: {0.8 * width:.0f}px; max-width: {1.5 * width:.0f}px"
    return rf'<svg viewBox="\1" style="{limits}" role="img" aria-label="{name}" xmlns:xlink="{XLINK}">'


def _number_of(block: str) -> str:
    """What tells a block from the others: its number if it has one."""
    numbers = re.findall(r"(?<![^.])\d+(?![^.])", block)
    return numbers[-1] if numbers else _begin(block, 8)


def _begin(name: str, length: int = 28) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _end(name: str, length: int = 28) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"
