"""How much of what pruning lost does training win back, and what does the mask cost?

    python tests/benchmarks/recovery.py --data DIR --folder recovery --json recovery.json
    python tests/benchmarks/recovery.py --data DIR --cost

The first prunes SmolLM2-135M-Instruct with SparseGPT, trains it on WikiText-2 train in several ways for the same
number of steps on the same tokens, and prints perplexities on WikiText-2 test and on C4, which none saw. The folder
keeps the pruned models and each row as soon as it is there: a second run with the same options goes on. The second
measures step time and memory of ordinary and masked LoRA side by side.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
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
TABLE = {"50%": list(TRAININGS), "2:4": ["masked LoRA", "masked LoRA, distilled"], "70%": ["masked LoRA"]}
# What the rows of one table must have in common.
SETTINGS = ("steps", "seqlen", "windows", "samples", "bf16")

Row = dict[str, Any]


def main() -> None:
    """Measure recovery or cost, and print a table."""
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("recovery"), help="to keep results in (default: recovery)")
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps of each training (default: 48)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a step (default: 512)")
    parser.add_argument("--windows", type=int, default=3, help="evaluation windows of 2,048 tokens (default: 3)")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 2,048 tokens (default: 16)")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    parser.add_argument("--only", nargs="+", choices=list(TABLE), default=list(TABLE), help="patterns")
    parser.add_argument(
        "--trainings", nargs="+", choices=list(TRAININGS), default=list(TRAININGS), help="ways to train"
    )
    parser.add_argument("--cost", action="store_true", help="measure step time and memory instead")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind for --cost (default: 5)")
    parser.add_argument("--worker", choices=["lora", "masked"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(memory_of(args.worker, args)))
    elif args.cost:
        write_json(args.json, {"machine": machine(args.threads), "cost": cost(args)})
    else:
        settings = {name: getattr(args, name) for name in SETTINGS}
        write_json(args.json, {"machine": machine(args.threads), "settings": settings, "recovery": recovery(args)})


def recovery(args: argparse.Namespace) -> list[Row]:
    """The rows of the table."""
    from optimum_sparse.loading import load_model

    dense, tokenizer = load_model(smollm2(), torch.float32)
    table = Table(args, evaluation_texts(args, tokenizer))
    training = training_rows(args, tokenizer)
    table.add("dense", "", lambda: dense)
    for pattern in args.only:
        pruned = functools.cache(functools.partial(pruned_model, pattern, dense, tokenizer, args))
        table.add(pattern, "pruned", pruned)
        for name in [name for name in TABLE[pattern] if name in args.trainings]:
            method, distilled = TRAININGS[name]
            teacher = dense if distilled else None
            trained = functools.cache(functools.partial(train, pruned, method, teacher, training, args))
            for label, finish in finished(name, method):
                table.add(pattern, label, functools.partial(finish, trained, pruned), pruned)
    return table.rows


class Table:
    """Rows of results: printed, and kept in a file from which a later run takes them."""

    def __init__(self, args: argparse.Namespace, texts: dict[str, torch.Tensor]) -> None:
        self.texts = texts
        self.settings = {name: getattr(args, name) for name in SETTINGS}
        self.file: Path = args.folder / "rows.json"
        self.rows: list[Row] = []
        args.folder.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            found = json.loads(self.file.read_text(encoding="utf-8"))
            if found["settings"] != self.settings:
                raise SystemExit(f"{self.file} holds rows with {found['settings']}: give another --folder.")
            self.rows = found["rows"]
            for row in self.rows:
                print_row(row)

    def add(
        self, pattern: str, training: str, build: Callable[[], Any], pruned: Callable[[], Any] | None = None
    ) -> None:
        """Build a model and evaluate it, unless its row is there; with `pruned`, make sure that it has those zeros."""
        from optimum_sparse.evaluation import perplexity
        from optimum_sparse.recovery import find_masks
        from optimum_sparse.recovery.masks import check_masks

        if self.find(pattern, training):
            return
        started = time.perf_counter(), time.process_time()
        model = build()
        seconds = {"seconds": time.perf_counter() - started[0], "cpu_seconds": time.process_time() - started[1]}
        if pruned and "dense" not in training:
            check_masks(model, find_masks(pruned()))
        values = {name: perplexity(model, ids, 2048, progress=False).value for name, ids in self.texts.items()}
        row = {"pattern": pattern, "training": training, **seconds, **values}
        if pruned:
            before, dense = self.find(pattern, "pruned"), self.find("dense", "")
            row["gap_closed"] = {n: (before[n] - value) / (before[n] - dense[n]) for n, value in values.items()}
        self.rows.append(row)
        print_row(row)
        self.file.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=2), encoding="utf-8")

    def find(self, pattern: str, training: str) -> Row:
        """The row with these names, empty if there is none."""
        return next((row for row in self.rows if (row["pattern"], row["training"]) == (pattern, training)), {})


def print_row(row: Row) -> None:
    """One line."""
    cells = [f"{name} {row[name]:7.2f}" for name in ("wikitext2", "c4")]
    cells += [f"{name} gap closed {part:6.1%}" for name, part in row.get("gap_closed", {}).items()]
    cells.append(f"{row['seconds']:6.0f} s, {row['cpu_seconds']:6.0f} CPU s")
    print(f"{row['pattern']:6} {row['training']:38} {'  '.join(cells)}", flush=True)


def pruned_model(pattern: str, dense: Any, tokenizer: Any, args: argparse.Namespace) -> Any:
    """The model pruned by SparseGPT, from the folder if it is there."""
    from transformers import AutoModelForCausalLM

    from optimum_sparse import SparsePruner

    folder = args.folder / f"pruned-{pattern.replace(':', '-').rstrip('%')}"
    if not folder.is_dir():
        how = {"pattern": pattern} if ":" in pattern else {"sparsity": int(pattern[:-1]) / 100}
        pruner = SparsePruner(method="sparsegpt", num_samples=args.samples, seqlen=2048, progress=False, **how)
        windows = calibration_windows(args.data, tokenizer, args.samples)
        pruned = pruner.prune(copy.deepcopy(dense), tokenizer, dataset=[{"input_ids": window} for window in windows])
        pruner.save(pruned, folder, tokenizer)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(pruned: Callable[[], Any], method: str, teacher: Any, rows: list[Any], args: argparse.Namespace) -> Any:
    """A trained copy of the pruned model."""
    from peft import HiraConfig, LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from optimum_sparse.recovery import DistillationTrainer, SparsityCallback, keep_sparsity, train_norms_only

    torch.manual_seed(0)
    model = copy.deepcopy(pruned())
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
            bf16=args.bf16,
            disable_tqdm=True,
        )
        kind, extra = (Trainer, {}) if teacher is None else (DistillationTrainer, {"teacher": copy.deepcopy(teacher)})
        callbacks = [SparsityCallback(model)] if method == "full" else []
        kind(model, options, train_dataset=rows, callbacks=callbacks, **extra).train()
    return model.eval()


def finished(name: str, method: str) -> list[tuple[str, Callable[..., Any]]]:
    """What is evaluated of a training, as a label and a function of what gives the trained and the pruned model.

    It is what can be saved; of ordinary LoRA, the dense model that it trains, and what is left when it is merged and
    the zeros are written again.
    """
    if method == "ordinary":
        return [
            (f"{name}, unmerged (dense)", lambda trained, pruned: trained()),
            (f"{name}, merged and masked again", merged_and_masked),
        ]
    if method in ("lora", "hira"):
        return [(name, lambda trained, pruned: trained().merge_and_unload())]
    return [(name, lambda trained, pruned: trained())]


@torch.no_grad()
def merged_and_masked(trained: Callable[[], Any], pruned: Callable[[], Any]) -> Any:
    """Ordinary LoRA merged, with the zeros of the pruned model."""
    from optimum_sparse.recovery import find_masks

    merged = trained().merge_and_unload()
    for key, mask in find_masks(pruned()).items():
        weight = merged.get_parameter(key)
        weight.mul_(mask.expand(weight.dtype))
    return merged


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
    """Of both kinds of LoRA: seconds of a step, alternating in this process, and memory, each in its own process."""
    steps = {kind: training_step(kind, args) for kind in ("lora", "masked")}
    seconds: dict[str, list[list[float]]] = {kind: [] for kind in steps}
    for _, kind in itertools.product(range(args.repeats + 1), steps):
        start = time.perf_counter(), time.process_time()
        steps[kind]()
        seconds[kind].append([time.perf_counter() - start[0], time.process_time() - start[1]])
        print(f"{kind:8} {seconds[kind][-1][0]:7.3f} s {seconds[kind][-1][1]:7.3f} CPU s", flush=True)
    command = [sys.executable, __file__, "--data", str(args.data), "--threads", str(args.threads)]
    command += ["--seqlen", str(args.seqlen), *(["--bf16"] if args.bf16 else []), "--worker"]
    found = {}
    for kind, measured in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*measured[1:], strict=True))  # the first allocates
        memory = subprocess.run([*command, kind], check=True, stdout=subprocess.PIPE).stdout
        found[kind] = {"seconds": wall, "cpu_seconds": cpu, **json.loads(memory)}
    pairs = zip(*(measured[1:] for measured in seconds.values()), strict=True)
    in_pairs = sorted(masked[1] / ordinary[1] for ordinary, masked in pairs)
    ratios = {name: found["masked"][name] / found["lora"][name] for name in found["lora"]}
    print(json.dumps({**found, "masked / lora": ratios, "cpu_seconds of each pair": in_pairs}, indent=2))
    return {"medians": found, "ratios": ratios, "pairs": in_pairs, "seqlen": args.seqlen, "bf16": args.bf16}


def memory_of(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Most memory that this process held in two steps, in GB, whole and without the model."""
    step = training_step(kind, args)
    loaded = resident_memory()
    step()
    step()
    return {"peak_gb": peak_memory() / 1e9, "above_the_model_gb": (peak_memory() - loaded) / 1e9}


def training_step(kind: str, args: argparse.Namespace) -> Callable[[], None]:
    """One step of training with LoRA, "lora" or "masked", on SmolLM2 with half of its weights zero."""
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
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=PROJECTIONS)).train()
    if kind == "masked":
        keep_sparsity(model, masks_of(model.get_base_model(), names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, model.config.vocab_size, (1, args.seqlen), generator=generator)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
