"""Draw docs/figures/*.svg: `python docs/scripts/figures.py [--out FOLDER]`, with matplotlib (the extra `docs`).

Nothing in the figures is drawn by hand: masks, errors and the order of events come from the package itself. The
functions that compute are apart from those that draw, so that the tests check what docs/concepts.md says about them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_sparse import SparseConfig
from optimum_sparse.lockstep import Lockstep
from optimum_sparse.matrices import find_blocks, find_matrices, find_weights
from optimum_sparse.methods import METHODS
from optimum_sparse.patterns import NM, Pattern, Unstructured, keep_mask
from optimum_sparse.statistics import GramStatistics
from optimum_sparse.trace import trace
from optimum_sparse.uses import Use, WeightUses

TARGET = Path(__file__).parents[1] / "figures"

# Told apart also by those who do not see all colours (Okabe and Ito).
BLACK, BLUE, ORANGE, GREEN, GREY = "#222222", "#0072b2", "#d55e00", "#009e73", "#dddddd"
COLOURS = {"magnitude": ORANGE, "wanda": BLUE, "sparsegpt": GREEN}
NAMES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
PATTERNS: dict[str, tuple[Pattern, str]] = {
    "50 %, the whole matrix competes": (Unstructured(0.5), "layer"),
    "50 %, each output by itself": (Unstructured(0.5), "output"),
    "2:4, half of each four": (NM(2, 4), "layer"),
    "1:4, one of each four (75 % zeros)": (NM(1, 4), "layer"),
}
SPARSITIES = [s / 20 for s in range(2, 19)]


def masks() -> dict[str, torch.Tensor]:
    """What each pattern keeps of the same 8 x 16 weights."""
    weights = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    weights *= torch.linspace(0.5, 1.5, 8)[:, None]  # outputs of different size, as in a model
    return {title: keep_mask(weights.abs(), pattern, group) for title, (pattern, group) in PATTERNS.items()}


def solve(method: str, weight: torch.Tensor, statistics: GramStatistics, pattern: Pattern) -> torch.Tensor:
    """The weight after a method."""
    return METHODS[method].solve(weight, statistics, pattern, SparseConfig(method=method)).weight


def relative_error(weight: torch.Tensor, pruned: torch.Tensor, statistics: GramStatistics) -> float:
    """Squared norm of the change of the outputs relative to that of the outputs."""
    lost, energy = statistics.output_energy(weight - pruned), statistics.output_energy(weight)
    return float(lost.sum() / energy.sum())


def two_weights() -> tuple[torch.Tensor, GramStatistics, dict[str, torch.Tensor]]:
    """An output of two inputs, of which the second is twice as large and correlated with the first.

    Returns:
        The weight `[1, 2]`, the statistics of the inputs, and the weight after each method has dropped one of the two.
    """
    gram = torch.tensor([[1.0, 1.2], [1.2, 4.0]])
    statistics = GramStatistics(2)
    statistics.add(torch.linalg.cholesky(gram).T)  # two tokens with this Gram matrix
    weight = torch.tensor([[1.0, 0.8]])
    return weight, statistics, {method: solve(method, weight, statistics, Unstructured(0.5)) for method in NAMES}


def synthetic_layer() -> tuple[torch.Tensor, GramStatistics]:
    """A random layer of 256 x 256 whose inputs are correlated, some of them several times larger than others."""
    generator = torch.Generator().manual_seed(0)
    size, tokens = 256, 4096
    decay = 1 / torch.arange(1, size + 1) ** 0.75
    mix = decay[:, None] * torch.randn(size, size, generator=generator)
    scale = (0.5 * torch.randn(size, generator=generator)).exp()
    statistics = GramStatistics(size)
    statistics.add(torch.randn(tokens, size, generator=generator) @ mix * scale)
    return torch.randn(size, size, generator=generator), statistics


def layer_errors() -> tuple[dict[str, list[float]], dict[str, float]]:
    """Relative output errors on the synthetic layer, at each of `SPARSITIES` and at 2:4."""
    weight, statistics = synthetic_layer()

    def error(method: str, pattern: Pattern) -> float:
        return relative_error(weight, solve(method, weight, statistics, pattern), statistics)

    unstructured = {method: [error(method, Unstructured(s)) for s in SPARSITIES] for method in NAMES}
    return unstructured, {method: error(method, NM(2, 4)) for method in NAMES}


def events(num_batches: int = 3) -> list[tuple[int | None, str]]:
    """What happens, in order, while a tiny Llama is pruned in lockstep.

    Returns:
        `(batch, stop)` when a batch arrives at a stop, `(None, stop)` when the matrices of the stop are solved.
    """
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    batches = torch.arange(8 * num_batches).view(num_batches, 1, 8)
    weights = {weight.parameter: weight.value for weight in find_weights(model)}
    happened: list[tuple[int | None, str]] = []
    with torch.no_grad():
        seen = trace(model, batches[:1], model, weights, find_blocks(model))
        matrices, _ = find_matrices(model, SparseConfig(), seen)
        short = {matrix.view: matrix.name.split(".")[-1].removesuffix("_proj") for matrix in matrices}
        stops = {stop: "\n".join(short[view] for view in stop) for stop in seen.stops(short)}
        starts = {stop[0]: stop for stop in stops}

        def forward(batch: int) -> None:
            def arrive(use: Use) -> None:
                if use.view in starts:
                    stop = starts[use.view]
                    happened.append((batch, stops[stop]))
                    lockstep.park(stop, use)

            with WeightUses(weights, arrive):
                model(batches[batch])

        with Lockstep(forward, num_batches, stops) as lockstep:
            for stop, _ in lockstep:
                happened.append((None, stops[stop]))
    return happened


def draw_patterns(plt: Any) -> Any:
    """Which weights the patterns keep."""
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 4.4))
    for axis, (title, mask) in zip(axes.flat, masks().items(), strict=True):
        rows, columns = mask.shape
        kept = [(j, i) for i in range(rows) for j in range(columns) if mask[i, j]]
        axis.broken_barh([(0, columns)], (0, rows), facecolor="white")
        for i in range(rows):
            axis.broken_barh([(j + 0.06, 0.88) for j, k in kept if k == i], (i + 0.06, 0.88), facecolor=BLUE)
        axis.set(xlim=(0, columns), ylim=(rows, 0), xticks=range(0, columns + 1, 4), yticks=[], aspect="equal")
        axis.set_xticks(range(columns), minor=True)
        axis.grid(axis="x", which="major", color=BLACK, linewidth=0.8)
        axis.set_title(title, fontsize=9)
    axes[1, 0].set(xlabel="inputs", ylabel="outputs")
    return figure


def draw_two_weights(plt: Any) -> Any:
    """The error as a landscape over two weights, and where each method ends up."""
    weight, statistics, pruned = two_weights()
    figure, axis = plt.subplots(figsize=(5.6, 4.2))
    first, second = torch.meshgrid(torch.linspace(-0.62, 1.55, 120), torch.linspace(-0.25, 1.45, 100), indexing="xy")
    grid = torch.stack([first.flatten(), second.flatten()], dim=1)
    energy = statistics.output_energy(weight)
    landscape = (statistics.output_energy(grid - weight) / energy).view(first.shape)
    levels = [relative_error(weight, v, statistics) for v in pruned.values()]
    lines = axis.contour(first, second, landscape, levels=sorted(levels), colors="#999999", linewidths=0.9)
    axis.clabel(lines, fmt=lambda level: f"{level:.0%}", fontsize=8)
    axis.axhline(0, color=BLACK, linewidth=0.8)
    axis.axvline(0, color=BLACK, linewidth=0.8)
    axis.plot(*weight[0], "o", color=BLACK)
    axis.annotate("dense", weight[0].tolist(), xytext=(6, 6), textcoords="offset points")
    offsets = {"magnitude": (-4, -16), "wanda": (-8, -3), "sparsegpt": (-8, 2)}
    for method, point in pruned.items():
        where = point[0].tolist()
        arrow = {"arrowstyle": "->", "color": COLOURS[method], "linewidth": 1.2}
        axis.annotate("", where, xytext=weight[0].tolist(), arrowprops=arrow)
        axis.plot(*where, "o", color=COLOURS[method])
        side = "center" if method == "magnitude" else "right"
        axis.annotate(
            NAMES[method],
            where,
            xytext=offsets[method],
            textcoords="offset points",
            ha=side,
            color=COLOURS[method],
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axis.set(xlim=(-0.62, 1.55), ylim=(-0.25, 1.45), xlabel="weight of input 1", ylabel="weight of input 2 (larger)")
    return figure


def draw_errors(plt: Any) -> Any:
    """Relative output error against sparsity."""
    unstructured, two_of_four = layer_errors()
    figure, axis = plt.subplots(figsize=(5.6, 3.8))
    for method, values in unstructured.items():
        axis.plot(SPARSITIES, values, color=COLOURS[method], label=NAMES[method])
        axis.plot(0.5, two_of_four[method], "D", color=COLOURS[method], markersize=5)
    axis.plot([], [], "D", color="#777777", markersize=5, label="the same at 2:4")
    axis.set(yscale="log", xlabel="fraction of weights set to zero", ylabel="relative error of the outputs")
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.grid(color=GREY, linewidth=0.6)
    axis.legend(frameon=False)
    return figure


def draw_lockstep(plt: Any) -> Any:
    """Who runs when."""
    happened = events()
    shown = happened[: next(i for i, (batch, _) in enumerate(happened) if i and happened[i - 1] == (None, "down"))]
    lanes = sorted({batch for batch, _ in shown if batch is not None})
    figure, axis = plt.subplots(figsize=(8, 2.6))
    for time, (batch, stop) in enumerate(shown):
        if batch is None:
            axis.broken_barh([(time, 1)], (-1.6, 1.2), facecolor=ORANGE)
            axis.text(time + 0.5, -1.0, stop, ha="center", va="center", fontsize=8, color="white")
        else:
            axis.broken_barh([(time, 1)], (batch, 0.8), facecolor=BLUE)
    for lane in lanes:
        axis.axhline(lane + 0.4, color=BLUE, linewidth=1, linestyle=":", zorder=0)
    labels = ["solve and write", *(f"batch {lane + 1}" for lane in lanes)]
    axis.set_yticks([-1.0, *(lane + 0.4 for lane in lanes)], labels)
    axis.set(xlim=(0, len(shown)), ylim=(len(lanes), -1.8), xticks=[], xlabel="time: one thing happens at a time")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(left=False)
    return figure


FIGURES = {
    "patterns": draw_patterns,
    "two-weights": draw_two_weights,
    "errors": draw_errors,
    "lockstep": draw_lockstep,
}


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TARGET, help="folder to write to (default: docs/figures)")
    parser.add_argument("--format", default="svg", help="svg, png, ... (default: svg)")
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    # A white ground is readable on a dark page too; text stays text; the same input gives the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "optimum_sparse", "font.size": 9})
    from matplotlib import pyplot as plt

    args.out.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if args.format == "svg" else None
    for name, draw in FIGURES.items():
        figure = draw(plt)
        figure.tight_layout()
        figure.savefig(args.out / f"{name}.{args.format}", metadata=metadata, dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main()
