"""Training a pruned model to predict what its dense teacher predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer

from .teacher_cache import TopK, TopKCache, _real, fingerprint

# Positions whose probabilities are in memory at once, in fp32, for student and teacher.
CHUNK = 256


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss is the distance to a teacher.

        trainer = DistillationTrainer(model, args, train_dataset=data, teacher=dense)

    The loss of a token is `(1 - kl_weight) · CE + kl_weight · T² · KL(teacher ‖ student)`, where both distributions
    have temperature T in the KL. Of the hidden states, `square_head_weight` times the mean over layers of
    `‖s - t‖² / ‖t‖²` is added. Tokens whose label is -100 do not count. Evaluation gives the ordinary cross-entropy.
    Works with `keep_sparsity`, and with `callbacks=[SparsityCallback(model)]`.

    Args:
        *args: As for `Trainer`.
        teacher: The dense model, with the same vocabulary. It is put in evaluation mode on the training device.
        kl_weight: Between 0 (cross-entropy only) and 1 (teacher only).
        temperature: Softens both distributions; above 0.
        square_head_weight: Of the hidden states; needs a teacher of the same depth and width.
        cache: Keep the teacher's most likely tokens on disk, and use them instead of the teacher where they are there.
            The other tokens then count as one.
        offload_teacher: Keep the teacher on the CPU and bring it to the device for its forwards only.
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: The teacher does not fit the model, or a weight is out of range.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        kl_weight: float = 1.0,
        temperature: float = 1.0,
        square_head_weight: float = 0.0,
        cache: TopKCache | None = None,
        offload_teacher: bool = False,
        **kwargs: Any,
    ) -> None:
        if not 0 <= kl_weight <= 1:
            raise ValueError(f"kl_weight must be between 0 and 1, got {kl_weight}.")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        if square_head_weight < 0:
            raise ValueError(f"square_head_weight must not be negative, got {square_head_weight}.")
        if square_head_weight and cache is not None:
            raise ValueError("The cache holds no hidden states: use either cache or square_head_weight.")
        super().__init__(*args, **kwargs)
        check_teacher(self.model, teacher, hidden_states=square_head_weight > 0)
        self.teacher = teacher.eval().requires_grad_(False)
        self.offload_teacher = offload_teacher
        self.teacher.to("cpu" if offload_teacher else self.args.device)
        self.kl_weight, self.temperature, self.square_head_weight = kl_weight, temperature, square_head_weight
        self.cache = cache
        self._fingerprint = fingerprint(teacher) if cache is not None else ""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The distance to the teacher in training, the cross-entropy in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            raise ValueError(
                f"Distillation needs labels, which say what tokens count; a batch has {', '.join(inputs)}."
            )
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        counted = labels != -100
        square_head = self.square_head_weight > 0
        outputs = model(**inputs, **({"output_hidden_states": True} if square_head else {}))
        predictions, labels = outputs.logits[:, :-1][counted], labels[counted]
        targets, hidden_states = self._teach(inputs, counted)
        loss = _token_losses(predictions, labels, targets, self.kl_weight, self.temperature)
        num_items = max(int(counted.sum()), 1) if num_items_in_batch is None else num_items_in_batch
        if square_head:
            distance = square_head_loss(outputs.hidden_states, hidden_states, _real(inputs))
            loss = loss + self.square_head_weight * distance * len(labels)
        loss = loss / num_items
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The tokens of all processes were counted, whose gradients are going to be averaged.
            loss = loss * (self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu)
        return (loss, outputs) if return_outputs else loss

    def _teach(self, inputs: Mapping[str, Any], counted: torch.Tensor) -> tuple[torch.Tensor | TopK, Any]:
        """The teacher's logits at the counted positions, or its most likely tokens, and its hidden states."""
        if self.kl_weight == 0 and self.square_head_weight == 0:
            return torch.empty(0, device=counted.device), None
        if self.cache is None:
            outputs = self._run_teacher(inputs)
            return outputs.logits[:, :-1][counted], outputs.hidden_states
        real = _real(inputs)
        if not real[:, 0].all():
            raise ValueError(
                "What a teacher says is cached by text, whose first token must be at the first position: pad batches "
                "on the right, or leave out cache."
            )
        keys = self.cache.keys(inputs, self._fingerprint, self.temperature)
        rows = [row for key in keys if (row := self.cache.load(key)) is not None]
        if len(rows) < len(keys):
            logits = self._run_teacher(inputs).logits
            rows = [TopK.of(logits[r][real[r]], self.cache.k, self.temperature) for r in range(len(keys))]
            for key, row in zip(keys, rows, strict=True):
                self.cache.save(key, row)
        # Of the real tokens, those that predict one that counts; the last token of a row predicts none.
        chosen = [functional.pad(c, (0, 1))[r] for c, r in zip(counted, real, strict=True)]
        log_probs = torch.cat([row.log_probs.to(c.device)[c] for row, c in zip(rows, chosen, strict=True)])
        indices = torch.cat([row.indices.to(c.device)[c] for row, c in zip(rows, chosen, strict=True)])
        return TopK(log_probs, indices), None

    @torch.no_grad()
    def _run_teacher(self, inputs: Mapping[str, Any]) -> Any:
        if self.offload_teacher:
            self.teacher.to(self.args.device)
        outputs = self.teacher(**inputs, use_cache=False, output_hidden_states=self.square_head_weight > 0)
        if self.offload_teacher:
            self.teacher.to("cpu")
        return outputs


def check_teacher(student: Any, teacher: PreTrainedModel, hidden_states: bool = False) -> None:
    """Make sure that a student can learn from a teacher.

    Raises:
        ValueError: Their vocabularies differ, or depth or width if hidden states are compared.
    """
    ours, theirs = (model.config.get_text_config() for model in (student, teacher))
    names = ["vocab_size", *(("num_hidden_layers", "hidden_size") if hidden_states else ())]
    for name in names:
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"The teacher does not fit the model: its {name} is {getattr(theirs, name)}, that of the model is "
                f"{getattr(ours, name)}. The best teacher is the dense model before pruning."
            )


def kl_divergence(logits: torch.Tensor, targets: torch.Tensor | TopK, temperature: float) -> torch.Tensor:
    """Sum over positions of KL(teacher ‖ student), a scalar.

    Args:
        logits: Of the student, `[positions, vocabulary]`.
        targets: The teacher's logits of the same shape, or its most likely tokens at this temperature; all others then
            count as one.
        temperature: Of both distributions.
    """
    student = (logits.float() / temperature).log_softmax(dim=-1)
    if not isinstance(targets, TopK):
        teacher = (targets.float() / temperature).log_softmax(dim=-1)
        return functional.kl_div(student, teacher, reduction="sum", log_target=True)
    student, teacher = (_with_rest(part) for part in (student.gather(-1, targets.indices), targets.log_probs))
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


def square_head_loss(
    student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...], real: torch.Tensor
) -> torch.Tensor:
    """Mean over layers of `‖s - t‖² / ‖t‖²`, of the hidden states `[rows, tokens, width]` where `real`."""
    layers = [
        (s[real].float() - t[real].float()).square().sum() / t[real].float().square().sum()
        for s, t in zip(student[1:], teacher[1:], strict=True)  # the first are the embeddings
    ]
    return torch.stack(layers).mean()


def _token_losses(
    predictions: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor | TopK, weight: float, temperature: float
) -> torch.Tensor:
    """Sum of the losses of all tokens; their probabilities are computed in chunks, and again in backward."""

    def chunk_loss(logits: torch.Tensor, labels: torch.Tensor, *target: torch.Tensor) -> torch.Tensor:
        loss = logits.new_zeros((), dtype=torch.float32)
        if weight < 1:
            loss = loss + (1 - weight) * functional.cross_entropy(logits.float(), labels, reduction="sum")
        if weight > 0:
            aim = TopK(*target) if len(target) == 2 else target[0]
            loss = loss + weight * temperature**2 * kl_divergence(logits, aim, temperature)
        return loss

    parts = [predictions.split(CHUNK), labels.split(CHUNK)]
    if weight > 0:
        tensors = (targets.log_probs, targets.indices) if isinstance(targets, TopK) else (targets,)
        parts += [tensor.split(CHUNK) for tensor in tensors]
    losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in zip(*parts, strict=True)]
    return torch.stack(losses).sum()


def _with_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Append the logarithm of the probability that is left, `[positions, k + 1]`."""
    # Rounding can leave less than nothing; 1e-7 is what fp32 resolves of a sum of 1.
    rest = (1 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp_min(1e-7).log()
    return torch.cat([log_probs, rest], dim=-1)
