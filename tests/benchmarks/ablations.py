"""What each choice is worth: the ablations of the SparseGPT and Wanda papers and ours, on SmolLM2-135M-Instruct.

- `metric`: the score of a weight, what it competes with, and whether the weights that stay are updated;
- `samples`: calibration windows, 1 to 256 (of C4: validation has fewer);
- `damping`: of the Hessian;
- `seqlen`: tokens per window, 128 to 2,048, the same number of tokens in all;
- `source`: validation text, C4, text that the model itself generates;
- `tokens`: whether all tokens count alike;
- `rescale`: whether outputs are made as large as before;
- `iterations`: of ADMM;
- `allocation`: of the zeros to the matrices;
- `quantization`: of the weights that stay.

Perplexity over the first windows of WikiText-2 raw test and, if the folder has it, of C4 behind what calibrates.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from common import SEQLEN, add_only, arguments, calibration_windows, machine, select, smollm2, write_json
from parity import CALIBRATION_WINDOWS, EVALUATION_WINDOWS
from quality import evaluation_texts, measure, print_header

from optimum_sparse.calibration.generation import first_tokens, generate_windows
from optimum_sparse.config import ALLOCATIONS
from optimum_sparse.loading import load_model

# Windows of C4 that may calibrate; the text behind them evaluates.
C4_WINDOWS = 200
KINDS = (
    "metric",
    "samples",
    "damping",
    "seqlen",
    "source",
    "tokens",
    "rescale",
    "iterations",
    "allocation",
    "quantization",
)

# Name, options of `SparseConfig`, and calibration windows.
Rows = Iterator[tuple[str, dict[str, Any], torch.Tensor]]


def main() -> None:
    """Measure the rows of one ablation, print them as they come, write JSON."""
    parser = arguments(__doc__)
    parser.add_argument("kind", choices=KINDS, help="what is varied")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--evaluation-windows", type=int, default=EVALUATION_WINDOWS, help="of each text")
    add_only(parser)
    parser.add_argument("--dtype", default="bfloat16", help="of the model; float32 where bfloat16 is slow")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(smollm2(), args.dtype)
    texts = evaluation_texts(args.data, tokenizer)
    windows = calibration_windows(args.data, tokenizer, CALIBRATION_WINDOWS)
    others = None
    if "c4" in texts:
        others, texts["c4"] = texts["c4"][: C4_WINDOWS * SEQLEN].view(-1, SEQLEN), texts["c4"][C4_WINDOWS * SEQLEN :]
    made = {
        "metric": lambda: metric(windows),
        "samples": lambda: samples(windows if others is None else others),
        "damping": lambda: damping(windows),
        "seqlen": lambda: seqlen(windows),
        "source": lambda: source(windows, others, model),
        "tokens": lambda: equal_tokens(windows),
        "rescale": lambda: rescale(windows),
        "iterations": lambda: iterations(windows),
        "allocation": lambda: allocation(windows),
        "quantization": lambda: quantization(windows),
    }[args.kind]()
    rows = {name: (options, text) for name, options, text in made}
    chosen = select(rows, args.only)
    print_header(texts)
    results = [measure("dense", {}, model, windows, texts, args.evaluation_windows)]
    for name in chosen:
        options, text = rows[name]
        options = {"sparsity": args.sparsity, **options}
        results.append(measure(name, options, model, text, texts, args.evaluation_windows))
    settings = {"evaluation_windows": args.evaluation_windows, "seqlen": SEQLEN, "dtype": args.dtype}
    found = {"machine": machine(args.threads), "settings": settings, "ablation": args.kind, "rows": results}
    write_json(args.json, found)


def metric(windows: torch.Tensor) -> Rows:
    """Score, comparison group and update, as in Table 7 of the Wanda paper."""
    for score, update, group in product(("magnitude", "wanda"), ("", "-update"), ("layer", "output")):
        yield f"{score}{update} {group}", {"method": f"{score}{update}", "comparison_group": group}, windows
    for size in (1, 128, 4096):
        yield f"sparsegpt, {size} columns", {"method": "sparsegpt", "block_size": size}, windows


def samples(windows: torch.Tensor) -> Rows:
    """Number of windows."""
    for method, power in product(("wanda", "sparsegpt", "admm"), range(0, 9)):
        number = min(2**power, len(windows))
        yield f"{method} {number}", {"method": method}, windows[:number]


def damping(windows: torch.Tensor) -> Rows:
    """Damping of the Hessian, as a fraction of its mean diagonal."""
    for method, value in product(("sparsegpt", "admm"), (0.0001, 0.001, 0.01, 0.1, 1.0)):
        yield f"{method} {value:g}", {"method": method, "dampening_frac": value}, windows


def seqlen(windows: torch.Tensor) -> Rows:
    """Tokens per window, of the same text."""
    for method, length in product(("wanda", "sparsegpt"), (128, 512, 2048)):
        yield f"{method} {length}", {"method": method}, windows.reshape(-1, length)


def source(windows: torch.Tensor, others: torch.Tensor | None, model: Any) -> Rows:
    """Where the text comes from."""
    sources = {"validation": windows} | ({} if others is None else {"c4": others[:CALIBRATION_WINDOWS]})
    generator = torch.Generator().manual_seed(0)
    sources["self"] = generate_windows(model, first_tokens(model, CALIBRATION_WINDOWS, generator), SEQLEN, seed=0)
    for method, (name, text) in product(("wanda", "sparsegpt"), sources.items()):
        yield f"{method} {name}", {"method": method}, text


def equal_tokens(windows: torch.Tensor) -> Rows:
    """Tokens as large as they are, or all alike."""
    for method, equal in product(("wanda", "sparsegpt", "admm"), (False, True)):
        name = f"{method}, {'all alike' if equal else 'as they are'}"
        yield name, {"method": method, "equal_tokens": equal}, windows


def rescale(windows: torch.Tensor) -> Rows:
    """Outputs as small as they become, or as large as before."""
    for method, scaled in product(("wanda", "sparsegpt", "admm"), (False, True)):
        yield f"{method}, {'as large' if scaled else 'as they are'}", {"method": method, "rescale": scaled}, windows


def iterations(windows: torch.Tensor) -> Rows:
    """How often weights and mask take turns."""
    for number in (4, 8, 16, 24, 48):
        yield f"admm {number}", {"method": "admm", "iterations": number}, windows


def allocation(windows: torch.Tensor) -> Rows:
    """How zeros are shared out."""
    for name in (None, *ALLOCATIONS):
        yield f"admm, {name or 'all alike'}", {"method": "admm", "allocation": name}, windows


def quantization(windows: torch.Tensor) -> Rows:
    """Weights that stay, on a grid or as they are."""
    for method, bits in product(("wanda", "sparsegpt", "admm"), (None, "int8", "int4", "int3")):
        yield f"{method}, {bits or 'as they are'}", {"method": method, "quantization": bits}, windows


if __name__ == "__main__":
    main()
