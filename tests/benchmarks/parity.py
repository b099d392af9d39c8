"""Perplexities of the methods beside those of the papers' own code on the same model, windows and text.

SmolLM2-135M-Instruct in bfloat16; calibration on the first 16 windows of 2,048 tokens of WikiText-2 raw validation,
perplexity over the first 20 of test. Ends with status 1 if a figure is out of its bounds.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from common import SEQLEN, add_only, arguments, calibration_windows, machine, select, smollm2, wikitext, write_json

from optimum_sparse import SparseConfig, SparsePruner
from optimum_sparse.evaluation import perplexity, wikitext_tokens
from optimum_sparse.loading import load_model
from optimum_sparse.matrices import find_matrices
from optimum_sparse.patterns import NM

CALIBRATION_WINDOWS = 16
EVALUATION_WINDOWS = 20
TOLERANCE = 0.015


@dataclass(frozen=True)
class Row:
    """A figure to reproduce.

    Attributes:
        name: What `--only` selects.
        reference: Perplexity with the authors' solver, in their order: two forwards per block.
        options: Of `SparseConfig`; empty is the dense model.
        may_be_better: Only a worse figure is a failure.
        published_rule: Prune by magnitude as the papers' code does, which also drops all weights that tie with the
            last one (unstructured), or leaves ties to `topk` (N:M), instead of an exact number of them.
        batch_sizes: Windows per forward. With several, the model is pruned once for each, and the figure is the mean:
            the batch size only changes how bfloat16 is rounded, which moves some figures by more than `TOLERANCE`.
    """

    name: str
    reference: float
    options: dict[str, Any] = field(default_factory=dict)
    may_be_better: bool = False
    published_rule: bool = False
    batch_sizes: tuple[int, ...] = (1,)

    def within(self, ratio: float) -> bool:
        """Whether measured / reference is in its bounds; a perplexity that is not a number is not."""
        return ratio <= 1 + TOLERANCE and (self.may_be_better or ratio >= 1 - TOLERANCE)


def _rows() -> list[Row]:
    rows = [Row("dense", 20.97)]
    for name, target, magnitude, wanda, sparsegpt in (
        ("50", {"sparsity": 0.5}, 561.7, 43.86, 36.77),
        ("2:4", {"pattern": "2:4"}, 1896.0, 144.6, 62.24),
    ):
        options = {"method": "magnitude", **target}
        rows.append(Row(f"magnitude {name} published rule", magnitude, options, published_rule=True))
        rows.append(Row(f"magnitude {name}", magnitude, options, may_be_better=True))
        for method, reference in (("wanda", wanda), ("sparsegpt", sparsegpt)):
            options = {"method": method, **target}
            rows.append(Row(f"{method} {name} by block", reference, {**options, "true_sequential": False}))
            sizes = (1, 2, 4, 8, 16) if (method, name) == ("wanda", "2:4") else (1,)
            options = {**options, "true_sequential": True}
            rows.append(Row(f"{method} {name} sequential", reference, options, True, batch_sizes=sizes))
    reference = {"method": "sparsegpt-reference", "sparsity": 0.5, "true_sequential": False}
    rows.append(Row("sparsegpt-reference 50 by block", 36.77, reference))
    return rows


ROWS = _rows()


def main() -> None:
    """Measure the rows asked for, print them as they come, write JSON."""
    parser = arguments(__doc__)
    add_only(parser)
    parser.add_argument(
        "--skip", type=int, default=0, metavar="N", help="calibrate on the 16 windows after the first N (default: 0)"
    )
    args = parser.parse_args()
    named = {row.name: row for row in ROWS}
    rows = [named[name] for name in select(named, args.only)]
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(smollm2())
    windows = calibration_windows(args.data, tokenizer, args.skip + CALIBRATION_WINDOWS)[args.skip :]
    text = wikitext_tokens(wikitext(args.data, "test"), tokenizer)

    print(f"{'':<32} {'measured':>9} {'reference':>9} {'ratio':>7}  {'within':<6} {'prune s':>8} {'eval s':>7}")
    results = [measure(row, model, windows, text) for row in rows]
    settings = {
        "calibration_windows": CALIBRATION_WINDOWS,
        "skipped_windows": args.skip,
        "seqlen": SEQLEN,
        "evaluation_windows": EVALUATION_WINDOWS,
        "tolerance": TOLERANCE,
    }
    write_json(args.json, {"machine": machine(args.threads), "settings": settings, "rows": results})
    failures = [result["name"] for result in results if not result["within"]]
    if failures:
        sys.exit(f"out of bounds: {', '.join(failures)}")


def measure(row: Row, dense: Any, windows: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
    """Prune copies of the dense model, evaluate them, print the line of the table and return it."""
    runs = [measure_once(row, size, dense, windows, text) for size in row.batch_sizes]
    measured = statistics.fmean(run["perplexity"] for run in runs)
    ratio = measured / row.reference
    within = row.within(ratio)
    each = ", ".join(f"{run['perplexity']:.2f}" for run in runs) if len(runs) > 1 else ""
    pruning, evaluating = (sum(run[f"{phase}_seconds"] for run in runs) for phase in ("prune", "evaluation"))
    print(
        f"{row.name:<32} {measured:9.2f} {row.reference:9.2f} {ratio:7.4f}  {'yes' if within else 'NO':<6} "
        f"{pruning:8.1f} {evaluating:7.1f}  {each}",
        flush=True,
    )
    return {**asdict(row), "measured": measured, "ratio": ratio, "within": within, "runs": runs}


def measure_once(row: Row, batch_size: int, dense: Any, windows: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
    """Prune a copy of the dense model, and evaluate it."""
    model, pruner = copy.deepcopy(dense), None
    start = time.perf_counter()
    if row.published_rule:
        drop_small_weights(model, SparseConfig(**row.options))
    elif row.options:
        pruner = SparsePruner(
            num_samples=len(windows), seqlen=SEQLEN, batch_size=batch_size, progress=sys.stderr.isatty(), **row.options
        )
        pruner.prune(model, dataset={"input_ids": windows})
    pruned = time.perf_counter()
    measured = perplexity(model, text, SEQLEN, EVALUATION_WINDOWS, progress=sys.stderr.isatty()).value
    return {
        "batch_size": batch_size,
        "perplexity": measured,
        "sparsity": sparsity(model),
        "prune_seconds": pruned - start,
        "evaluation_seconds": time.perf_counter() - pruned,
        "phases": {} if pruner is None else pruner.report.seconds,
    }


def drop_small_weights(model: Any, config: SparseConfig) -> None:
    """Magnitude pruning by the rule of the papers' code; see `Row.published_rule`."""
    for matrix in find_matrices(model, config)[0]:
        weight = matrix.read()
        size = weight.abs()
        if isinstance(matrix.pattern, NM):
            groups = size.float().view(-1, matrix.pattern.m)
            smallest = groups.topk(matrix.pattern.m - matrix.pattern.n, largest=False).indices
            small = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, smallest, True).view_as(weight)
        else:
            small = size <= size.flatten().sort().values[int(weight.numel() * matrix.pattern.sparsity)]
        weight[small] = 0


def sparsity(model: Any) -> float:
    """Fraction of zeros in the matrices of the decoder."""
    weights = [matrix.read() for matrix in find_matrices(model, SparseConfig())[0]]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


if __name__ == "__main__":
    main()
