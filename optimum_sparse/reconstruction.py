"""Block reconstruction: the kept weights of a pruned block are trained to do what the dense block did.

Methods that prune matrix by matrix keep what each matrix puts out. What counts is what the block puts out, behind its
nonlinearities; that can be trained on the same few calibration windows ("Free Lunch", arXiv 2510.14444).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .muon import Muon

# Root mean square of a step, relative to that of a parameter: models differ in how large their weights are. It falls
# to a tenth along a cosine. Matrices are trained by Muon: on a block of SmolLM2, two epochs of it took 14 % from the
# error, and two of Adam 8 %. Vectors are trained by Adam.
MATRIX_RATE, VECTOR_RATE = 7e-3, 5e-3
BETAS = (0.9, 0.95)
# Of so many batches one is held out, to see when to stop.
HELD_OUT = 8
# Training stops after so many epochs without a better result on them.
PATIENCE = 2

# Calls a function with the arguments that a batch calls the block with, as its forward would.
CallBlock = Callable[[int, Callable[..., Any]], Any]


@dataclass(frozen=True)
class Reconstruction:
    """What came of the training of a block.

    Attributes:
        before: Error of its outputs on the batches held out, see `relative_error`.
        after: The same with the weights that it has now.
        epochs: The epoch that these are from; 0 if training never made it better, and nothing was changed.
    """

    before: float
    after: float
    epochs: int


def reconstruct(
    block: nn.Module,
    names: Collection[str],
    targets: Mapping[int, torch.Tensor],
    call: CallBlock,
    epochs: int,
    tokens: Callable[[int, torch.Tensor], torch.Tensor | None] = lambda batch, output: None,
) -> Reconstruction:
    """Train parameters of a block so that its outputs come close to targets, on the batches of the targets.

    Training works on fp32 copies; the block computes with them in the dtype of the model. What is zero in a matrix
    stays zero, and of all epochs the weights of the one with the least error on the held-out batches are kept.

    Args:
        block: The pruned block; its parameters are changed in place.
        names: The parameters to train, by their names in the block.
        targets: For each batch, what the dense block put out on the same inputs, `[..., tokens, features]`.
        call: Calls a function as the forward of a batch calls the block.
        epochs: How often each batch is seen, at most.
        tokens: Given a batch and its target, which rows of it are tokens and count; `None` for all of them.
    """
    trainer = _Trainer(block, names, call, tokens)
    batches = list(targets)
    held_out = batches[:: min(HELD_OUT, len(batches))]
    trained = [batch for batch in batches if batch not in held_out] or batches
    before = best = trainer.error(held_out, targets)
    values, best_epoch = trainer.values(), 0
    optimizers = trainer.optimizers()
    schedules = [_cosine(optimizer, epochs * len(trained)) for optimizer in optimizers]
    for epoch in range(1, epochs + 1):
        for batch in trained:
            trainer.backward(batch, targets[batch])
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
        error = trainer.error(held_out, targets)
        if error < best:
            best, best_epoch, values = error, epoch, trainer.values()
        elif not epoch - best_epoch < PATIENCE:
            break
    if best_epoch:
        trainer.write(values)
    return Reconstruction(before, best, best_epoch)


def relative_error(output: torch.Tensor, target: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of the squared norm of the difference relative to that of the target.

    Relative for each token: a few have hidden states a hundred times as large as those of the others.

    Args:
        output: What a block puts out, `[..., features]`.
        target: What it should.
        keep: Which tokens count, `[tokens]` bool; `None` for all of them.
    """
    target = target.float()
    tiny = torch.finfo(torch.float32).tiny
    errors = (output.float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=tiny)
    return (errors if keep is None else errors.flatten()[keep]).mean()


def hidden_states(output: Any) -> torch.Tensor:
    """What a block puts out, with or without other things beside it."""
    return output[0] if isinstance(output, tuple) else output


def _cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """From the whole learning rate to a tenth of it."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2
    )


class _Trainer:
    """The parameters of a block that are trained, as fp32 copies."""

    def __init__(
        self,
        block: nn.Module,
        names: Collection[str],
        call: CallBlock,
        tokens: Callable[[int, torch.Tensor], torch.Tensor | None],
    ) -> None:
        self._block, self._call, self._tokens = block, call, tokens
        self._parameters = {name: block.get_parameter(name) for name in names}
        self._kept = {name: value != 0 for name, value in self._parameters.items() if value.dim() > 1}
        self.masters = {
            name: value.detach().float().clone().requires_grad_() for name, value in self._parameters.items()
        }

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of all parameters, each with its learning rate; one that is all zero takes the mean of the others."""
        scales = {name: master.detach().square().mean().sqrt().item() for name, master in self.masters.items()}
        mean = sum(scales.values()) / max(1, sum(scale > 0 for scale in scales.values()))
        matrices, vectors = [], []
        for name, master in self.masters.items():
            scale = scales[name] or mean
            if name in self._kept:
                matrices.append({"params": [master], "lr": MATRIX_RATE * scale, "kept": self._kept[name]})
            else:
                vectors.append({"params": [master], "lr": VECTOR_RATE * scale})
        found: list[torch.optim.Optimizer] = [Muon(matrices)] if matrices else []
        return found + ([torch.optim.Adam(vectors, betas=BETAS)] if vectors else [])

    def backward(self, batch: int, target: torch.Tensor) -> None:
        """Gradients of the error on a batch, zero for what was pruned."""
        # Half precision has no gradients as small as those of a mean over tokens, relative to their norms.
        size = target.float().square().sum().item()
        scale = 2.0 ** math.frexp(size)[1] if 0 < size < math.inf else 1.0
        with torch.enable_grad():
            error = self._error(batch, target) * scale
        # Not `backward`, which would also give gradients to the parameters of the block that are not trained.
        try:
            gradients = torch.autograd.grad(error, list(self.masters.values()), allow_unused=True)
        except RuntimeError as problem:
            if "inplace" not in str(problem):
                raise
            raise ValueError(
                f"{type(self._block).__name__} cannot be trained, since it writes to activations that gradients are "
                "computed from: leave out reconstruct."
            ) from problem
        for (name, master), gradient in zip(self.masters.items(), gradients, strict=True):
            kept = self._kept.get(name)
            master.grad = gradient if gradient is None or kept is None else gradient * kept
            if gradient is not None:
                master.grad /= scale

    @torch.no_grad()
    def error(self, batches: Sequence[int], targets: Mapping[int, torch.Tensor]) -> float:
        """Mean error on some batches."""
        return sum(self._error(batch, targets[batch]).item() for batch in batches) / len(batches)

    def _error(self, batch: int, target: torch.Tensor) -> torch.Tensor:
        weights = {name: self.masters[name].to(value.dtype) for name, value in self._parameters.items()}
        with_grad = torch.is_grad_enabled()  # which the forward of the batch has turned off
        keep = self._tokens(batch, target)

        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.set_grad_enabled(with_grad):
                output = hidden_states(functional_call(self._block, weights, args, kwargs))
                return relative_error(output, target, keep)

        return self._call(batch, run)

    def values(self) -> dict[str, torch.Tensor]:
        """The parameters as they are now, in the dtype of the model."""
        return {name: master.detach().to(self._parameters[name].dtype) for name, master in self.masters.items()}

    @torch.no_grad()
    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give the parameters of the block these values."""
        for name, value in values.items():
            parameter, kept = self._parameters[name], self._kept.get(name)
            if kept is not None:
                # What is too small for half precision stays as it was: a zero more would be one too many.
                value = value.where(kept & (value != 0), parameter)
            parameter.copy_(value)
