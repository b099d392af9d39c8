"""Perplexity and time of the methods at 50 %, 2:4 and 70 %, on the text of calibration and on other text.

SmolLM2-135M-Instruct; calibration on 16 windows of 2,048 tokens of WikiText-2 raw validation, perplexity
over the first 20 of test and, if the folder has it, of C4.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import SEQLEN, add_only, arguments, calibration_windows, machine, select, smollm2, wikitext, write_json
from parity import CALIBRATION_WINDOWS, EVALUATION_WINDOWS

from optimum_sparse import SparsePruner
from optimum_sparse.config import METHOD_NAMES, PRESETS
from optimum_sparse.evaluation import perplexity, wikitext_tokens
from optimum_sparse.loading import load_model

TARGETS: dict[str, dict[str, Any]] = {"50": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}, "70": {"sparsity": 0.7}}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHOD_NAMES if name != "sparsegpt-reference"},
    "wanda+swaps": {"method": "wanda", "refine": "swaps"},
    "wanda+cg": {"method": "wanda", "refine": "cg"},
    "sparsegpt+swaps": {"method": "sparsegpt", "refine": "swaps"},
    "sparsegpt+cg": {"method": "sparsegpt", "refine": "cg"},
    **{name: {"preset": name} for name in PRESETS},
}


def main() -> None:
    """Measure the rows asked for, print them as they come, write JSON."""
    parser = arguments(__doc__)
    add_only(parser)
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=JSON", help="of SparseConfig, for all rows; repeatable"
    )
    parser.add_argument(
        "--seed", type=int, help="draw the calibration windows with this seed (default: the first ones)"
    )
    parser.add_argument(
        "--samples", type=int, default=CALIBRATION_WINDOWS, help="windows to calibrate on (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the model; float32 where bfloat16 is slow")
    args = parser.parse_args()
    options = {name: json.loads(value) for name, value in (option.split("=", 1) for option in args.option)}
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(smollm2(), args.dtype)
    windows = calibration(args.data, tokenizer, args.samples, args.seed)
    texts = evaluation_texts(args.data, tokenizer)
    print_header(texts)
    rows: dict[str, dict[str, Any]] = {"dense": {}}
    rows.update({f"{v} {t}": {**VARIANTS[v], **TARGETS[t], **options} for v in VARIANTS for t in TARGETS})
    results = [measure(row, rows[row], model, windows, texts) for row in select(rows, args.only)]
    settings = {
        "calibration_windows": len(windows),
        "calibration_seed": args.seed,
        "evaluation_windows": EVALUATION_WINDOWS,
        "seqlen": SEQLEN,
        "dtype": args.dtype,
    }
    write_json(args.json, {"machine": machine(args.threads), "settings": settings, "rows": results})


def calibration(data: Path, tokenizer: Any, number: int, seed: int | None) -> torch.Tensor:
    """The first windows of WikiText-2 raw validation, or some that a seed draws, `[windows, SEQLEN]`."""
    first = calibration_windows(data, tokenizer, number)
    if seed is None:
        return first
    tokens = wikitext_tokens(wikitext(data, "valid"), tokenizer)
    every = tokens[: len(tokens) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:number]]


def evaluation_texts(data: Path, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Tokens of WikiText-2 raw test and, if it is there, of C4."""
    texts = {"wikitext2": wikitext_tokens(wikitext(data, "test"), tokenizer)}
    if (documents := c4(data)) is not None:
        texts["c4"] = tokenizer("\n\n".join(documents), return_tensors="pt").input_ids[0]
    return texts


def print_header(texts: Iterable[str]) -> None:
    """The head of the table."""
    print(
        f"{'':<24}" + "".join(f" {name:>10}" for name in texts) + f" {'seconds':>8} {'of CPU':>8}  phases", flush=True
    )


def c4(data: Path) -> list[str] | None:
    """Documents of C4 from the first file in `data`/c4, if there is one: text that no row is calibrated on."""
    files = sorted((data / "c4").glob("*.jsonl"))
    if not files:
        return None
    return [json.loads(line)["text"] for line in files[0].read_text(encoding="utf-8").splitlines()]


def measure(
    name: str,
    options: dict[str, Any],
    dense: Any,
    windows: torch.Tensor,
    texts: dict[str, torch.Tensor],
    evaluation_windows: int = EVALUATION_WINDOWS,
) -> dict[str, Any]:
    """Prune a copy of the dense model, evaluate it on all texts, print the line of the table and return it."""
    model, phases, seconds, processor = copy.deepcopy(dense), {}, 0.0, 0.0
    correction: dict[str, dict[str, float]] = {}
    progress = sys.stderr.isatty()
    if options:
        number, length = windows.shape
        size = max(1, SEQLEN // length)
        pruner = SparsePruner(num_samples=number, seqlen=length, batch_size=size, progress=progress, **options)
        start, used = time.perf_counter(), time.process_time()
        pruner.prune(model, dataset={"input_ids": windows})
        seconds, processor = time.perf_counter() - start, time.process_time() - used
        phases, correction = pruner.report.seconds, pruner.report.correction
    values = {
        text: perplexity(model, tokens, SEQLEN, evaluation_windows, progress=progress).value
        for text, tokens in texts.items()
    }
    print(
        f"{name:<24}"
        + "".join(f" {value:10.2f}" for value in values.values())
        + f" {seconds:8.1f} {processor:8.1f}  "
        + ", ".join(f"{phase} {spent:.1f}" for phase, spent in phases.items()),
        flush=True,
    )
    times = {"seconds": seconds, "processor_seconds": processor, "phases": phases}
    return {"name": name, "options": options, "perplexity": values, **times, "correction": correction}


if __name__ == "__main__":
    main()
