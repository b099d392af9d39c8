"""By how much the loss of a model is expected to rise with what is pruned, from the curvature of the loss.

To second order, the divergence of a pruned model from the dense one is half the sum of F_ij W_ij^2 over the weights
W_ij that become zero, if these do not interact ("Optimal Brain Damage", LeCun et al., 1990). F, the diagonal of the
Fisher information, is the mean square of the gradients of the loss for next tokens that the model itself draws ("The
LLM Surgeon", van der Ouderaa et al., ICLR 2024): a forward and a backward of a few windows give it for all weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .allocation import SAMPLE
from .calibration.batches import num_rows, shortened, usable
from .matrices import PrunableMatrix
from .padding import tokens_out
from .patterns import keep_mask
from .statistics import Statistics

# So many windows, of so many tokens at most.
WINDOWS, LENGTH = 4, 256


def allocation_forwards(allocation: str | None, tokens: int) -> float:
    """What it takes to allocate, in forwards of all of so many calibration tokens."""
    # "loss" is two forwards, and a backward that costs as much as two, of some tokens; the others are one of all.
    return 4 * min(1.0, WINDOWS * LENGTH / tokens) if allocation == "loss" else float(allocation is not None)


def excerpt(batches: Sequence[Mapping[str, Any]], processes: int = 1) -> list[dict[str, Any]]:
    """The starts of the first batches of tokens, and batches of other things as they are.

    They have as many windows as it takes for all processes to have `WINDOWS`, or more to fill a batch.
    """
    taken: list[dict[str, Any]] = []
    rows = 0
    for batch in batches:
        if rows * processes >= WINDOWS:
            break
        taken.append(shortened(batch, LENGTH))
        rows += num_rows(batch)
    return taken


def expected_rises(
    run: Callable[[Mapping[str, Any]], Any],
    batches: Sequence[Mapping[str, Any]],
    matrices: Sequence[PrunableMatrix],
    statistics: Sequence[Statistics | None],
    group: str,
    seeds: Sequence[int],
    decoder: bool = False,
) -> list[float]:
    """What is expected to be added to the loss if a matrix alone is pruned, by |W_ij| * ||X_j|| and without an update.

    Gradients are in memory for one parameter at a time; those that parameters had before are left alone.

    Args:
        run: Runs the model on a batch, and gives its output, which has `logits`, `[rows, ..., classes]`.
        batches: Those to take gradients on, each by itself.
        matrices: The matrices, with the weights of the dense model, and the patterns that they are pruned to.
        statistics: Of the inputs of each; `None` for one that did not run.
        group: As for `keep_mask`.
        seeds: For each batch, that of the classes that are drawn.
        decoder: Whether the logits are those of a decoder with an encoder before it.

    Returns:
        For each matrix the rise of the loss in nats, summed over the batches; 0 if no gradient comes to it.

    Raises:
        ValueError: The model puts out no logits, or gradients are not finite.
    """
    rises = [0.0] * len(matrices)
    of_parameter: dict[nn.Parameter, list[int]] = {}
    for index, (matrix, inputs) in enumerate(zip(matrices, statistics, strict=True)):
        if inputs is not None and inputs.num_tokens:
            of_parameter.setdefault(matrix.parameter, []).append(index)

    def take(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for index in of_parameter[parameter]:
            matrix, inputs = matrices[index], statistics[index]
            assert inputs is not None
            step = max(1, matrix.numel // SAMPLE)
            weight = matrix.read()[::step].float()
            scores = weight.square().mul_(inputs.squared_norms).nan_to_num_(nan=0, posinf=0)
            lost = weight * matrix.view.of(gradient.contiguous())[::step]
            lost.masked_fill_(keep_mask(scores, matrix.pattern, group), 0)
            rises[index] += lost.square().sum(dtype=torch.float64).item() / 2 * (matrix.shape[0] / len(weight))

    if not of_parameter:
        return rises
    with _gradients(list(of_parameter), take) as parameters:
        for batch, seed in zip(batches, seeds, strict=True):
            output = run(usable(batch))
            logits = getattr(output, "logits", None)
            if not isinstance(logits, torch.Tensor):
                raise ValueError(
                    f"allocation='loss' needs a model that puts out logits, got {type(output).__name__}: load it with "
                    "the head that it was trained with, or choose allocation='error'."
                )
            _loss_of_draws(logits, tokens_out(batch, decoder), seed).backward(inputs=parameters)
    if bad := [matrix.name for matrix, rise in zip(matrices, rises, strict=True) if not math.isfinite(rise)]:
        raise ValueError(
            f"allocation='loss' needs finite gradients; those of {len(bad)} matrices are not, {bad[0]} among them: "
            "there is NaN or infinity in the weights, or float16 overflows. Load the model in bfloat16 or float32, or "
            "choose allocation='error'."
        )
    return rises


def _loss_of_draws(logits: torch.Tensor, mask: torch.Tensor | None, seed: int) -> torch.Tensor:
    """The loss for classes that are drawn from the logits, in nats, summed over all but padding."""
    scores = logits.flatten(end_dim=-2).float().log_softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(len(scores), 1, generator=generator, dtype=scores.dtype).to(scores.device)
    drawn = torch.searchsorted(scores.detach().exp().cumsum(-1), numbers).clamp(max=scores.shape[-1] - 1)
    losses = -scores.gather(-1, drawn)[:, 0]
    if mask is not None and mask.shape == logits.shape[:-1]:
        losses = losses[mask.flatten().bool().to(losses.device)]
    return losses.sum()


@contextmanager
def _gradients(
    parameters: Sequence[nn.Parameter], take: Callable[[nn.Parameter], None]
) -> Iterator[Sequence[nn.Parameter]]:
    """Parameters that require gradients, each of which is handed over with its own as soon as that is there."""
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    handles: list[Any] = []
    try:
        for parameter in parameters:
            parameter.grad = None
            handles.append(parameter.requires_grad_().register_post_accumulate_grad_hook(take))
        with torch.inference_mode(False), torch.enable_grad():
            yield parameters
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (required, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(required).grad = gradient
