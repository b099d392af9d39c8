"""How much of the errors of the blocks before a block should make up for, and how damped: SmolLM2-135M-Instruct.

The preset `fast` on three sets of 16 windows of 2,048 tokens of WikiText-2 raw validation: the first, and two that
seeds draw. Perplexity over the first 20 windows of test and, if the folder has it, of C4; the JSON also has the errors
of each block on held-out windows, with and without correction, and which of them the pruner took.
"""

from __future__ import annotations

from itertools import product
from unittest.mock import patch

import torch
from common import SEQLEN, add_only, arguments, machine, select, smollm2, write_json
from parity import CALIBRATION_WINDOWS, EVALUATION_WINDOWS
from quality import TARGETS, calibration, evaluation_texts, measure, print_header

from optimum_sparse.config import PRESETS
from optimum_sparse.loading import load_model
from optimum_sparse.methods import correction

SEEDS = (None, 1, 2)
STRENGTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
DAMPINGS = (0.01, correction.DAMPING, 0.2, 1.0)


def main() -> None:
    """Measure the rows asked for, print them as they come, write JSON."""
    parser = arguments(__doc__)
    add_only(parser)
    parser.add_argument("--preset", choices=PRESETS, default="fast")
    parser.add_argument("--target", choices=TARGETS, default="50", help="how many zeros")
    parser.add_argument("--dtype", default="bfloat16", help="of the model; float32 where bfloat16 is slow")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(smollm2(), args.dtype)
    texts = evaluation_texts(args.data, tokenizer)
    settings = [(None, correction.DAMPING), *product(STRENGTHS, DAMPINGS)]
    rows = {row_name(seed, *setting): (seed, *setting) for seed, setting in product(SEEDS, settings)}
    print_header(texts)
    results = []
    for name in select(rows, args.only):
        seed, strength, damping = rows[name]
        windows = calibration(args.data, tokenizer, CALIBRATION_WINDOWS, seed)
        options = {"preset": args.preset, "error_correction": strength, **TARGETS[args.target]}
        with patch.object(correction, "DAMPING", damping):
            results.append({**measure(name, options, model, windows, texts), "damping": damping, "seed": seed})
    protocol = {"evaluation_windows": EVALUATION_WINDOWS, "seqlen": SEQLEN, "dtype": args.dtype}
    write_json(args.json, {"machine": machine(args.threads), "settings": protocol, "rows": results})


def row_name(seed: int | None, strength: float | None, damping: float) -> str:
    """Windows, strength and damping."""
    windows = "first" if seed is None else f"seed {seed}"
    return f"{windows}, none" if strength is None else f"{windows}, {strength:g}, {damping:g}"


if __name__ == "__main__":
    main()
