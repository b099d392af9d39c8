"""The most likely tokens of a teacher, on disk, so that a second pass over the same text needs no teacher."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

# Parameters are told apart by their first values: enough for another training run to differ.
_FINGERPRINT_VALUES = 64


@dataclass(frozen=True)
class TopK:
    """The most likely next tokens according to the teacher, at each position.

    Attributes:
        log_probs: `[positions, k]` fp32.
        indices: `[positions, k]` int64.
    """

    log_probs: torch.Tensor
    indices: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, k: int, temperature: float) -> TopK:
        """From logits `[positions, vocabulary]`."""
        log_probs, indices = (logits.float() / temperature).log_softmax(dim=-1).topk(min(k, logits.shape[-1]))
        return cls(log_probs, indices)


class TopKCache:
    """A folder with one file for each text that the teacher has read.

    A file takes 8 bytes per kept token: 8 MB for 2,048 positions and k=512. What is found depends on the tokens, the
    teacher, k and the temperature, so one folder can serve several runs.

    Args:
        folder: Created if need be.
        k: Tokens kept at each position; the probability of all others is kept as one number.
    """

    def __init__(self, folder: str | os.PathLike[str], k: int = 512) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.k = k

    def keys(self, inputs: Mapping[str, torch.Tensor], teacher: str, temperature: float) -> list[str]:
        """The name of each row of a batch; padding does not count.

        Args:
            inputs: `input_ids` `[rows, tokens]`, and `attention_mask` or `position_ids` if there are any.
            teacher: Its `fingerprint`.
            temperature: Of the probabilities.
        """
        real = _real(inputs).cpu()
        names = [name for name in ("input_ids", "position_ids") if name in inputs]
        start = f"{teacher} {self.k} {temperature}".encode()
        return [
            hashlib.sha256(
                start
                + b"".join(inputs[name][row].cpu()[real[row]].to(torch.int64).numpy().tobytes() for name in names)
            ).hexdigest()
            for row in range(len(real))
        ]

    def load(self, key: str) -> TopK | None:
        """What was saved, one position for each real token of the row; `None` if nothing was."""
        from safetensors.torch import load_file

        path = self._path(key)
        if not path.is_file():
            return None
        tensors = load_file(path)
        return TopK(tensors["log_probs"], tensors["indices"].long())

    def save(self, key: str, top: TopK) -> None:
        """Write atomically: another process may be reading, or writing the same."""
        from safetensors.torch import save_file

        temporary = self.folder / f".{key}.{os.getpid()}"
        save_file({"log_probs": top.log_probs.cpu(), "indices": top.indices.int().cpu()}, temporary)
        os.replace(temporary, self._path(key))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def fingerprint(model: nn.Module) -> str:
    """A hash that tells one model from another."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.detach().flatten()[:_FINGERPRINT_VALUES].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + values)
    return digest.hexdigest()


def _real(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`[rows, tokens]` bool: what is not padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
