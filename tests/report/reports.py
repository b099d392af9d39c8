"""Reports for tests: with everything in it, and as large as they get; nothing in them was measured."""

from dataclasses import dataclass
from typing import Any

import torch

from optimum_sparse.report import MatrixReport, SparsityReport, take_pictures

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"alert(1)\">$x$ &amp; '\""

EVALUATION = {
    "model": "pruned",
    "baseline": "dense",
    "texts": [
        {
            "dataset": "wikitext2",
            "seqlen": 2048,
            "num_windows": 20,
            "perplexity": 12.5,
            "interval": [12.0, 13.0],
            "baseline_perplexity": 10.0,
            "ratio": 1.25,
            "ratio_interval": [1.2, 1.3],
            "kl": 0.125,
            "kl_interval": [0.12, 0.13],
            "top1_agreement": 0.75,
            "top1_interval": [0.74, 0.76],
        }
    ],
    "tasks": [
        {
            "task": "piqa",
            "version": "1",
            "metric": "acc_norm",
            "num_samples": 400,
            "value": 0.61,
            "stderr": 0.02,
            "baseline_value": 0.68,
            "difference": -0.07,
            "difference_interval": [-0.11, -0.03],
        }
    ],
    "versions": {"lm_eval": "0.4.9"},
    "seconds": 60.0,
    "date": "2026-11-25",
}

BENCH = {
    "model": "pruned",
    "machine": {"platform": "Linux", "processor": "a processor", "kernel": "avx2", "threads": 2, "torch": "2.13.0"},
    "prompt_tokens": 128,
    "new_tokens": 32,
    "checkpoint_bytes": 140_000_000,
    "load_seconds": {"dense": 1.0, "sparse": 2.0},
    "resident_bytes": {"dense": 300_000_000, "sparse": 180_000_000},
    "batches": [
        {"batch_size": 1, "dense": {"prefill": 400.0, "decode": 20.0}, "sparse": {"prefill": 380.0, "decode": 31.0}}
    ],
}


@dataclass
class Weight:
    """A named weight, as a picture is taken of."""

    name: str
    pattern: object
    weight: torch.Tensor

    def read(self) -> torch.Tensor:
        return self.weight


def two_of_four(rows: int = 64, columns: int = 128) -> torch.Tensor:
    """A weight with the pattern 2:4."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight * torch.tensor([1, 0, 0, 1]).repeat(columns // 4)


def entry(name: str, block: str, zeros: int = 16, error: float | None = 0.01, **options: Any) -> MatrixReport:
    values: dict[str, Any] = dict(
        shape=(4, 8),
        pattern="2:4",
        numel=32,
        num_tokens=10,
        layer_share=0.0,
        damping=None,
        residual=None,
        seconds=1.5,
    )
    return MatrixReport(name=name, block=block, zeros=zeros, error=error, **{**values, **options})


def full_report(blocks: int = 3, model: str = "some/base") -> SparsityReport:
    """A report with something in every field."""
    names = ("attn.q", "attn.o", "mlp.up", "mlp.down")
    pictured = [Weight("h.1.attn.q", "2:4", two_of_four()), Weight("h.1.mlp.up", "0.5", two_of_four(16, 24))]
    return SparsityReport(
        config={"method": "sparsegpt", "pattern": "2:4", "sparsity": 0.5, "seqlen": 64},
        calibration={"dataset": "c4", "num_samples": 4},
        matrices=[
            entry(f"h.{block}.{name}", f"h.{block}", error=0.01 * (1 + index + block))
            for block in range(blocks)
            for index, name in enumerate(names)
        ],
        skipped={"lm_head": "matches ignore", "h.0.gate": "routes tokens", "h.1.gate": "routes tokens"},
        seconds={"forward": 3.0, "solve": 5.0, "total": 10.0},
        peak_memory=3 * 10**9,
        notes=["calibrated on 4 samples instead of 8"],
        model=model,
        memory={"held before": 10**9, "statistics": 10**8},
        depth_error={f"h.{block}": 0.01 * (block + 1) for block in range(blocks)},
        reconstruction={f"h.{block}": {"before": 0.04, "after": 0.03, "epochs": 2} for block in range(blocks)},
        correction={f"h.{block}": {"before": 0.05, "after": 0.04, "correction": 0.5} for block in range(blocks)},
        sizes={"dense": 250_000_000, "saved": 140_000_000},
        pictures=take_pictures(pictured),
        evaluations=[EVALUATION],
        recovery={"method": "lora", "perplexity_before": 12.5, "perplexity_after": 11.0, "versions": {"peft": "0.21"}},
        bench=BENCH,
        generations=[{"prompt": "The capital of France is", "dense": " Paris.", "pruned": " a city."}],
        command="optimum-cli sparse prune some/base OUT --pattern 2:4",
        versions={"optimum_sparse": "0.1.0", "torch": "2.13.0"},
    )


def hostile_report() -> SparsityReport:
    """A report in which every name and every text would be a script on a page that believed it."""
    report = full_report(model=HOSTILE)
    report.config["dataset"] = report.calibration["dataset"] = report.command = HOSTILE
    blocks = [f"{HOSTILE}.{index}" for index in (0, 1)]
    report.matrices = [entry(f"{block}.{HOSTILE}", block, notes=(HOSTILE,)) for block in blocks]
    report.skipped, report.notes = {HOSTILE: HOSTILE}, [HOSTILE]
    report.seconds, report.memory, report.versions = {HOSTILE: 1.0}, {HOSTILE: 10}, {HOSTILE: HOSTILE}
    report.depth_error = {HOSTILE: 0.1}
    report.pictures = take_pictures([Weight(HOSTILE, "2:4", two_of_four())])
    report.generations = [dict.fromkeys(("prompt", "dense", "pruned"), HOSTILE)]
    report.recovery = {HOSTILE: HOSTILE}
    text = {**EVALUATION["texts"][0], "dataset": HOSTILE}
    report.evaluations = [{**EVALUATION, "texts": [text], "tasks": [{**EVALUATION["tasks"][0], "task": HOSTILE}]}]
    return report
