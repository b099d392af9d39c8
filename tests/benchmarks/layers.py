"""Errors of ADMM and of SparseGPT, matrix by matrix: SmolLM2-135M-Instruct at 50 %, 2:4 and 70 %.

A run of SparseGPT on 16 windows of 2,048 tokens of WikiText-2 raw validation, in which each matrix is also solved by
ADMM, from the same weight and the same statistics. Ends with status 1 if ADMM has the larger error on any of them.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from common import add_only, arguments, calibration_windows, machine, select, smollm2, write_json
from parity import CALIBRATION_WINDOWS
from quality import TARGETS

from optimum_sparse import SparseConfig, SparsePruner
from optimum_sparse.loading import load_model
from optimum_sparse.methods import METHODS, Solution
from optimum_sparse.methods.rescale import rescale
from optimum_sparse.patterns import Pattern
from optimum_sparse.statistics import GramStatistics

COMPARED = {name: METHODS[name] for name in ("admm", "sparsegpt")}


def main() -> None:
    """Measure the rows asked for, print them as they come, write JSON."""
    parser = arguments(__doc__)
    add_only(parser)
    parser.add_argument(
        "--equal-tokens",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="whether all tokens count alike, as they do for ADMM by default (default: as for SparseGPT, not)",
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the model; float32 where bfloat16 is slow")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(smollm2(), args.dtype)
    windows = calibration_windows(args.data, tokenizer, CALIBRATION_WINDOWS)
    print(f"{'':<6} {'matrices':>8} {'sparsegpt, %':>13} {'admm, %':>8} {'admm / sparsegpt':>17} {'largest':>8}")
    rows = [measure(target, model, windows, args.equal_tokens) for target in select(TARGETS, args.only)]
    settings = {"equal_tokens": args.equal_tokens, "dtype": args.dtype, "calibration_windows": len(windows)}
    write_json(args.json, {"machine": machine(args.threads), "settings": settings, "rows": rows})
    if any(row["ratio"] > 1 for target in rows for row in target["matrices"]):
        raise SystemExit("ADMM is worse than SparseGPT on some matrix.")


def measure(target: str, dense: Any, windows: torch.Tensor, equal_tokens: bool) -> dict[str, Any]:
    """Prune a copy of the dense model, print the line of the table and return what it is of."""
    errors: dict[str, list[float]] = {name: [] for name in COMPARED}

    def solve(
        weight: torch.Tensor, statistics: GramStatistics, pattern: Pattern, config: SparseConfig, rows: Sequence[int]
    ) -> Solution:
        energy = statistics.output_energy(weight)
        for name, method in COMPARED.items():
            solution = method.solve(weight.clone(), statistics, pattern, replace(config, method=name), rows)
            if method.rescale:
                solution = rescale(solution, energy, statistics)
            lost = statistics.output_energy(weight - solution.weight)
            parts = zip(lost.split(list(rows)), energy.split(list(rows)), strict=True)
            errors[name] += [(part.sum() / whole.sum()).item() for part, whole in parts]
        return solution  # the last, SparseGPT's: the run goes on as one of its own

    options = {"method": "sparsegpt", "equal_tokens": equal_tokens, **TARGETS[target]}
    pruner = SparsePruner(num_samples=len(windows), progress=sys.stderr.isatty(), **options)
    with patch.dict(METHODS, {"sparsegpt": replace(METHODS["sparsegpt"], solve=solve)}):
        pruner.prune(copy.deepcopy(dense), dataset={"input_ids": windows})
    matrices = [
        {"name": matrix.name, "sparsegpt": theirs, "admm": ours, "ratio": ours / theirs}
        for matrix, theirs, ours in zip(pruner.report.matrices, errors["sparsegpt"], errors["admm"], strict=True)
    ]
    count, largest = len(matrices), max(matrices, key=lambda row: row["ratio"])
    means = {key: sum(row[key] for row in matrices) / count for key in ("sparsegpt", "admm", "ratio")}
    print(
        f"{target:<6} {count:>8} {100 * means['sparsegpt']:>13.3f} {100 * means['admm']:>8.3f} "
        f"{means['ratio']:>17.3f} {largest['ratio']:>8.3f} {largest['name']}",
        flush=True,
    )
    return {"target": target, **{f"mean_{key}": value for key, value in means.items()}, "matrices": matrices}


if __name__ == "__main__":
    main()
