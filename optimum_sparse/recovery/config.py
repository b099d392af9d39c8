"""`RecoveryConfig`: how a pruned model is trained; the one place where the options and their errors are written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

METHODS = ("lora", "full", "norms")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How a pruned model is trained.

    Raises:
        ValueError: A value is out of range.
    """

    method: str = _option(
        "lora", "what is trained: lora (masked), full (all weights that were not pruned) or norms (and biases)"
    )
    rank: int = _option(16, "rank of LoRA")
    lora_alpha: int = _option(32, "scale of LoRA: its update is multiplied by lora_alpha / rank")
    learning_rate: float | None = _option(None, "peak learning rate (default: lora 1e-3, full 5e-5, norms 1e-3)")
    max_steps: int = _option(200, "optimizer steps")
    batch_size: int = _option(1, "texts per forward")
    gradient_accumulation: int = _option(8, "forwards per optimizer step")
    seqlen: int | None = _option(
        None,
        "tokens per text; longer ones are cut, plain text is joined and cut into pieces (default: 1024, or the "
        "model's maximum if that is less)",
    )
    num_samples: int | None = _option(None, "how many rows of the dataset are read (default: all)")
    eval_samples: int = _option(16, "texts held out for the evaluation before and after")
    kl_weight: float = _option(1.0, "with a teacher: its share of the loss; the rest is cross-entropy")
    temperature: float = _option(1.0, "with a teacher: softens both distributions")
    save_steps: int = _option(50, "optimizer steps between two checkpoints, from which an interrupted run resumes")
    seed: int = _option(0, "of the order of the data and of the adapters")

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        for name in (
            "rank",
            "lora_alpha",
            "max_steps",
            "batch_size",
            "gradient_accumulation",
            "eval_samples",
            "save_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.seqlen is not None and self.seqlen < 2:
            raise ValueError(
                f"seqlen must be at least 2, got {self.seqlen}: the first token of a text is not predicted."
            )
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and less than 2^32, got {self.seed}.")
        if not 0 <= self.kl_weight <= 1:
            raise ValueError(f"kl_weight must be between 0 and 1, got {self.kl_weight}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that was given, or that of the method."""
        return self.learning_rate or {"lora": 1e-3, "full": 5e-5, "norms": 1e-3}[self.method]

    def to_dict(self) -> dict[str, Any]:
        """As pure JSON."""
        return asdict(self)
