"""What calibration inputs leave behind: sums over all tokens of column norms or of the Gram matrix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Self

import torch

from .distributed import Processes
from .precision import exact_in_half, full_precision, half_products, sum_dtype

# Columns per panel of the Gram matrix: only panels on and above the diagonal are computed, which halves the work,
# and 256 columns are wide enough for the matrix product to run at full speed.
PANEL = 256
# On a GPU, products of that width do not reach full speed; a multiple, so that the blocks on the diagonal stay whole.
PANEL_GPU = 1024
# Tokens whose squares are added up at once on a CPU.
TOKENS = 64


class Statistics(ABC):
    """Sums over the inputs of a layer, of what is computed in fp32 for those of each batch.

    Args:
        in_features: Width of the inputs.
        device: Where the sums are kept.
        equal_tokens: Whether inputs are scaled so that all tokens have the same norm.

    Attributes:
        num_tokens: How many tokens were added.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", equal_tokens: bool = False) -> None:
        self.num_tokens = 0
        self._equal_tokens = equal_tokens
        self._sums = torch.zeros(self.shape(in_features), dtype=sum_dtype(torch.device(device)), device=device)

    @staticmethod
    @abstractmethod
    def shape(in_features: int) -> tuple[int, ...]:
        """Shape of the sums."""

    @classmethod
    def num_bytes(cls, in_features: int, dtype: torch.dtype = torch.float32) -> int:
        """What they take in memory: in `sum_dtype` while inputs are added, in fp32 afterwards."""
        return dtype.itemsize * math.prod(cls.shape(in_features))

    @staticmethod
    @abstractmethod
    def enough_tokens(in_features: int) -> int:
        """How many tokens are enough for an expert to be pruned on its own statistics alone."""

    @abstractmethod
    def add(self, inputs: torch.Tensor) -> None:
        """Add the inputs of a layer, `[tokens, in_features]` of any float dtype."""

    def _scaled(self, inputs: torch.Tensor, by: torch.Tensor | None = None) -> torch.Tensor:
        """Inputs, each token divided by its root mean square, or by that which it has in others; fp32 if so."""
        if not self._equal_tokens:
            return inputs
        floats = inputs.float()
        norms = torch.linalg.vector_norm(floats if by is None else by.float(), dim=1, keepdim=True)
        least = torch.finfo(norms.dtype).tiny ** 0.5  # the squares of smaller numbers are zero
        scale = (norms / inputs.shape[1] ** 0.5).clamp(min=least).reciprocal_()
        scale.masked_fill_(norms.isinf(), math.nan)  # an overflow is not to look like a zero
        return floats * scale if floats is inputs else floats.mul_(scale)

    @property
    @abstractmethod
    def squared_norms(self) -> torch.Tensor:
        """`[in_features]` fp32: squared norm of each input feature."""

    @abstractmethod
    def output_energy(self, weight: torch.Tensor) -> torch.Tensor:
        """Squared norm of each output over the calibration tokens, `[rows]`.

        Args:
            weight: `[rows, in_features]` fp32.
        """

    def add_up(self, processes: Processes) -> None:
        """Make them those of the tokens of all processes, to which nothing is added any more."""
        processes.sum_(self._sums)
        self._sums = self._sums.float()
        (self.num_tokens,) = processes.totals(self.num_tokens)

    def blended(self, layer: Self, share: float) -> Self:
        """The statistics of an expert with few tokens, shrunk towards those of its whole layer.

        Args:
            layer: Those of all tokens of the layer.
            share: What the layer's mean over tokens has of the result, in [0, 1].

        Returns:
            Statistics with the `num_tokens` of the expert, scaled as sums over so many tokens (at least one).
        """
        result = type(self)(self._sums.shape[-1], self._sums.device, self._equal_tokens)
        result.num_tokens = self.num_tokens
        scale = share * max(self.num_tokens, 1) / max(layer.num_tokens, 1)
        result._sums = (1 - share) * self._sums + scale * layer._sums
        return result


class NormStatistics(Statistics):
    """Sum of squares of each input feature over all tokens (all that Wanda needs)."""

    @staticmethod
    def shape(in_features: int) -> tuple[int, ...]:
        """As in `Statistics`."""
        return (in_features,)

    @staticmethod
    def enough_tokens(in_features: int) -> int:
        """As in `Statistics`: with 64 tokens a norm of independent features is known to about a tenth."""
        return 64

    def add(self, inputs: torch.Tensor) -> None:
        """As in `Statistics`."""
        self.num_tokens += inputs.shape[0]
        if inputs.is_cuda:
            self._sums += torch.linalg.vector_norm(self._scaled(inputs), dim=0, dtype=torch.float32).square_()
            return
        # A CPU takes up to twenty times as long for that norm as for squares that stay in the cache.
        for part in inputs.split(TOKENS):
            self._sums += self._scaled(part).float().square().sum(dim=0)

    @property
    def squared_norms(self) -> torch.Tensor:
        """As in `Statistics`."""
        return self._sums.float()

    def output_energy(self, weight: torch.Tensor) -> torch.Tensor:
        """As in `Statistics`, but as if the input features were uncorrelated."""
        return weight.square() @ self.squared_norms


class GramStatistics(Statistics):
    """The Gram matrix X^T X of a layer's inputs, summed over all tokens, without scaling unless `equal_tokens`.

    Half-precision inputs have exact products in fp32, which scaling them first destroys.
    """

    @staticmethod
    def shape(in_features: int) -> tuple[int, ...]:
        """As in `Statistics`."""
        return (in_features, in_features)

    @staticmethod
    def enough_tokens(in_features: int) -> int:
        """As in `Statistics`: with fewer tokens than features the Gram matrix is singular."""
        return in_features

    def add(self, inputs: torch.Tensor) -> None:
        """As in `Statistics`."""
        self.num_tokens += inputs.shape[0]
        vars(self).pop("gram", None)
        scaled = self._scaled(inputs)
        half = exact_in_half(inputs)
        on_gpu = half and inputs.is_cuda
        inputs, width = (scaled.to(inputs.dtype), PANEL_GPU) if on_gpu else (scaled.float(), PANEL)
        multiply = half_products if half else torch.mm
        # Autocast, for the model's sake, would round the factors.
        with full_precision(), torch.autocast(inputs.device.type, enabled=False):
            for start in range(0, inputs.shape[1], width):
                panel, others = inputs[:, start : start + width].T, inputs[:, start:]
                self._sums[start : start + width, start:] += multiply(panel, others)

    def add_up(self, processes: Processes) -> None:
        """As in `Statistics`."""
        super().add_up(processes)
        vars(self).pop("gram", None)

    @cached_property
    def gram(self) -> torch.Tensor:
        """`[in_features, in_features]` fp32, symmetric to the bit."""
        upper = self._sums.float().triu()
        return upper + upper.triu(1).T

    def upper_columns(self, start: int, stop: int) -> torch.Tensor:
        """Columns of the Gram matrix down to the diagonal, `[stop, stop - start]` fp32.

        Of the block on the diagonal, what is below the diagonal may be missing.
        """
        return self._sums[:stop, start:stop].float()

    @property
    def squared_norms(self) -> torch.Tensor:
        """As in `Statistics`."""
        return self._sums.diagonal().float()

    def output_energy(self, weight: torch.Tensor) -> torch.Tensor:
        """As in `Statistics`, without a copy of the Gram matrix."""
        # Panels as in `add`, so that the blocks on the diagonal are whole.
        energy = weight.new_zeros(len(weight))
        for start in range(0, weight.shape[1], PANEL):
            columns, mine = self.upper_columns(start, start + PANEL), weight[:, start : start + PANEL]
            above, block = columns[:start], columns[start:]
            outputs = 2 * (weight[:, :start] @ above) + mine @ block
            energy += (outputs * mine).sum(dim=1)
        return energy


class PairedStatistics(GramStatistics):
    """The Gram matrix, and how the inputs of a layer deviate from those that it has in the dense model.

    Attributes:
        num_paired: Of how many of the tokens it was seen what they are in the dense model.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", equal_tokens: bool = False) -> None:
        super().__init__(in_features, device, equal_tokens)
        self.num_paired = 0
        self._deviation = torch.zeros_like(self._sums)

    @classmethod
    def num_bytes(cls, in_features: int, dtype: torch.dtype = torch.float32) -> int:
        """As in `Statistics`."""
        return 2 * super().num_bytes(in_features, dtype)

    def add_deviation(self, inputs: torch.Tensor, dense: torch.Tensor) -> None:
        """Add what inputs that `add` has seen are in the dense model, both `[tokens, in_features]`."""
        self.num_paired += inputs.shape[0]
        dense, inputs = self._scaled(dense.float(), inputs), self._scaled(inputs.float())
        with full_precision(), torch.autocast(inputs.device.type, enabled=False):
            self._deviation += (dense - inputs).T @ inputs

    @property
    def deviation(self) -> torch.Tensor:
        """`(X_dense - X)^T X`, `[in_features, in_features]` fp32, as if all tokens were as those paired."""
        return (self._deviation * (self.num_tokens / max(self.num_paired, 1))).float()

    def add_up(self, processes: Processes) -> None:
        """As in `Statistics`."""
        super().add_up(processes)
        processes.sum_(self._deviation)
        self._deviation = self._deviation.float()
        (self.num_paired,) = processes.totals(self.num_paired)
