"""How much of what pruning lost does training win back, and what does the mask cost?

    python tests/benchmarks/recovery.py --data DIR --json recovery.json
    python tests/benchmarks/recovery.py --data DIR --cost

The first prunes SmolLM2-135M-Instruct with SparseGPT, trains it on WikiText-2 train in several ways for the same
number of steps on the same tokens, and prints perplexities on WikiText-2 test and on C4, which none saw. The second
measures step time and memory of ordinary and masked LoRA, alternating in processes of their own.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from common import (
    arguments,
    calibration_windows,
    machine,
    peak_memory,
    resident_memory,
    smollm2,
    wikitext,
    write_json,
)

RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATES = {"lora": 1e-3, "hira": 5e-3, "full": 1e-4, "norms": 3e-3}

# Name in the table -> (what is trained, whether the teacher's logits are the target).
TRAININGS = {
    "masked LoRA": ("lora", False),
    "masked LoRA, distilled": ("lora", True),
    "ordinary LoRA": ("ordinary", False),
    "full": ("full", False),
    "norms": ("norms", False),
    "HiRA": ("hira", False),
}
# The trainings for each pattern: all of them for the first only.
TABLE = {"50%": list(TRAININGS), "2:4": ["masked LoRA", "masked LoRA, distilled"]}


def main() -> None:
    """Measure recovery or cost, and print a table."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps of each training (default: 48)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a step (default: 512)")
    parser.add_argument("--windows", type=int, default=3, help="evaluation windows of 2,048 tokens (default: 3)")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 2,048 tokens (default: 16)")
    parser.add_argument("--only", nargs="+", choices=list(TABLE), default=list(TABLE), help="patterns")
    parser.add_argument("--cost", action="store_true", help="measure step time and memory instead")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind for --cost (default: 3)")
    parser.add_argument("--worker", choices=["lora", "masked"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(cost_of(args.worker, args.seqlen)))
    elif args.cost:
        write_json(args.json, {"machine": machine(args.threads), "cost": cost(args)})
    else:
        write_json(args.json, {"machine": machine(args.threads), "recovery": recovery(args)})


def recovery(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the table."""
    from optimum_sparse import SparsePruner
    from optimum_sparse.loading import load_model

    dense, tokenizer = load_model(smollm2(), torch.float32)
    texts = evaluation_texts(args, tokenizer)
    training = training_rows(args, tokenizer)
    rows: list[dict[str, Any]] = []
    reference = report(rows, "dense", "", dense, texts, 0)
    calibration = calibration_windows(args.data, tokenizer, args.samples)
    for pattern in args.only:
        how = {"pattern": pattern} if ":" in pattern else {"sparsity": int(pattern[:-1]) / 100}
        pruned = copy.deepcopy(dense)
        started = time.perf_counter()
        SparsePruner(method="sparsegpt", num_samples=args.samples, seqlen=2048, progress=False, **how).prune(
            pruned, tokenizer, dataset=[{"input_ids": window} for window in calibration]
        )
        before = report(rows, pattern, "pruned", pruned, texts, time.perf_counter() - started)
        for name in TABLE[pattern]:
            method, distilled = TRAININGS[name]
            started = time.perf_counter()
            trained = train(pruned, method, dense if distilled else None, training, args)
            for label, model in finished(name, method, trained, pruned):
                seconds = time.perf_counter() - started
                report(rows, pattern, label, model, texts, seconds, reference, before, pruned)
    return rows


def train(pruned: Any, method: str, teacher: Any, rows: list[Any], args: argparse.Namespace) -> Any:
    """A trained copy of the pruned model."""
    from peft import HiraConfig, LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from optimum_sparse.recovery import DistillationTrainer, SparsityCallback, keep_sparsity, train_norms_only

    torch.manual_seed(0)
    model = copy.deepcopy(pruned)
    if method in ("lora", "ordinary"):
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS))
    if method == "lora":
        keep_sparsity(model)
    elif method == "hira":
        model = get_peft_model(model, HiraConfig(r=RANK, target_modules=PROJECTIONS))
    elif method == "norms":
        train_norms_only(model)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=1,
            learning_rate=LEARNING_RATES["lora" if method == "ordinary" else method],
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 20),
            weight_decay=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        kind, extra = (Trainer, {}) if teacher is None else (DistillationTrainer, {"teacher": copy.deepcopy(teacher)})
        callbacks = [SparsityCallback(model)] if method == "full" else []
        kind(model, options, train_dataset=rows, callbacks=callbacks, **extra).train()
    return model.eval()


def finished(name: str, method: str, trained: Any, pruned: Any) -> Iterator[tuple[str, Any]]:
    """The models to evaluate: what can be saved, and for ordinary LoRA what it is without and with its zeros."""
    from optimum_sparse.recovery import find_masks

    if method == "ordinary":
        yield f"{name}, unmerged (dense)", trained
        merged = trained.merge_and_unload()
        with torch.no_grad():
            for key, mask in find_masks(pruned).items():
                weight = merged.get_parameter(key)
                weight.mul_(mask.expand(weight.dtype))
        yield f"{name}, merged and masked again", merged
    else:
        yield name, trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained


def report(
    rows: list[dict[str, Any]],
    pattern: str,
    training: str,
    model: Any,
    texts: dict[str, torch.Tensor],
    seconds: float,
    dense: dict[str, float] | None = None,
    pruned: dict[str, float] | None = None,
    same_zeros: Any = None,
) -> dict[str, float]:
    """Evaluate a model, print its row, and make sure that it has the zeros it should have."""
    from optimum_sparse.evaluation import perplexity
    from optimum_sparse.recovery import find_masks
    from optimum_sparse.recovery.masks import check_masks

    if same_zeros is not None and "dense" not in training:
        check_masks(model, find_masks(same_zeros))
    values = {name: perplexity(model, ids, 2048, progress=False).value for name, ids in texts.items()}
    row = {"pattern": pattern, "training": training, "seconds": seconds, **values}
    cells = [f"{name} {value:7.2f}" for name, value in values.items()]
    if dense and pruned:
        closed = {name: (pruned[name] - value) / (pruned[name] - dense[name]) for name, value in values.items()}
        row["gap_closed"] = closed
        cells += [f"{name} gap closed {part:6.1%}" for name, part in closed.items()]
    print(f"{pattern:6} {training:42} {'  '.join(cells)}  {seconds:6.0f} s", flush=True)
    rows.append(row)
    return values


def evaluation_texts(args: argparse.Namespace, tokenizer: Any) -> dict[str, torch.Tensor]:
    """The first windows of WikiText-2 test, and of the last documents of the C4 excerpt."""
    from optimum_sparse.evaluation import wikitext_tokens

    test = wikitext_tokens(wikitext(args.data, "test"), tokenizer)
    with open(args.data / "c4" / "c4_train_shard0_first1000.jsonl", encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file][-200:]
    c4 = torch.tensor(tokenizer("\n\n".join(documents), verbose=False)["input_ids"])
    return {name: ids[: args.windows * 2048] for name, ids in (("wikitext2", test), ("c4", c4))}


def training_rows(args: argparse.Namespace, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """As many pieces of WikiText-2 train as there are steps, from all over the excerpt."""
    from optimum_sparse.evaluation import wikitext_tokens

    tokens = wikitext_tokens(args.data / "wikitext2" / "wiki.train.first1M.raw", tokenizer)
    pieces = tokens[: len(tokens) // args.seqlen * args.seqlen].view(-1, args.seqlen)
    if len(pieces) < args.steps:
        raise SystemExit(f"--steps must be at most {len(pieces)} with --seqlen {args.seqlen}, got {args.steps}.")
    chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[: args.steps]
    return [{"input_ids": piece, "labels": piece} for piece in pieces[chosen]]


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """Step time and memory of both kinds of LoRA, in processes that alternate."""
    command = [sys.executable, __file__, "--data", str(args.data), "--threads", str(args.threads)]
    command += ["--seqlen", str(args.seqlen), "--worker"]
    runs: dict[str, list[dict[str, Any]]] = {"lora": [], "masked": []}
    for _, kind in itertools.product(range(args.repeats), runs):
        runs[kind].append(json.loads(subprocess.run([*command, kind], check=True, stdout=subprocess.PIPE).stdout))
        print(f"{kind:8}", {name: round(value, 3) for name, value in runs[kind][-1].items()}, flush=True)
    medians = {
        kind: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for kind, found in runs.items()
    }
    ratios = {name: medians["masked"][name] / medians["lora"][name] for name in medians["lora"]}
    print("masked / ordinary:", {name: round(value, 3) for name, value in ratios.items()})
    return {"runs": runs, "ratios": ratios}


def cost_of(kind: str, seqlen: int) -> dict[str, float]:
    """Median seconds of a training step, by the clock and of all threads together, and memory in GB."""
    from peft import LoraConfig, get_peft_model

    from optimum_sparse.loading import load_model
    from optimum_sparse.recovery import keep_sparsity, masks_of

    model = load_model(smollm2(), torch.float32)[0]
    names = [name for name, module in model.named_modules() if name.endswith(tuple(PROJECTIONS))]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight.mul_(torch.rand(weight.shape, generator=generator) < 0.5)
    loaded = resident_memory()
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=PROJECTIONS)).train()
    if kind == "masked":
        keep_sparsity(model, masks_of(model.get_base_model(), names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, model.config.vocab_size, (1, seqlen), generator=generator)
    wall, cpu = [], []
    for _ in range(6):
        start = time.perf_counter(), time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {
        "seconds": statistics.median(wall[1:]),  # the first step allocates
        "cpu_seconds": statistics.median(cpu[1:]),
        "peak_gb": peak_memory() / 1e9,
        "above_the_model_gb": (peak_memory() - loaded) / 1e9,
    }


if __name__ == "__main__":
    main()
