"""What calibration inputs leave behind: column norms or the Gram matrix, accumulated in fp32."""

from __future__ import annotations

import torch

# Columns per panel of the Gram matrix: only panels on and above the diagonal are computed, which halves the work,
# and 256 columns are wide enough for the matrix product to run at full speed.
PANEL = 256


class NormStatistics:
    """Sum of squares of each input feature over all tokens (all that Wanda needs).

    Args:
        in_features: Width of the inputs.
        device: Where the sums are kept.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.num_tokens = 0
        self._squared_norms = torch.zeros(in_features, dtype=torch.float32, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Add the inputs of a layer, `[tokens, in_features]` of any float dtype."""
        self.num_tokens += inputs.shape[0]
        self._squared_norms += torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32).square_()

    @property
    def squared_norms(self) -> torch.Tensor:
        """`[in_features]` fp32: squared norm of each input feature."""
        return self._squared_norms

    def output_energy(self, weight: torch.Tensor) -> torch.Tensor:
        """Squared norm of each output, `[rows]`, as if the input features were uncorrelated.

        Args:
            weight: `[rows, in_features]` fp32.
        """
        return weight.square() @ self.squared_norms


class GramStatistics:
    """The Gram matrix X^T X of a layer's inputs, summed over all tokens without scaling.

    Half-precision inputs have exact products in fp32, which scaling them first would destroy.

    Args:
        in_features: Width of the inputs.
        device: Where the sums are kept.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.num_tokens = 0
        self._upper = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._gram: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Add the inputs of a layer, `[tokens, in_features]` of any float dtype."""
        self.num_tokens += inputs.shape[0]
        self._gram = None
        inputs = inputs.float()
        for start in range(0, inputs.shape[1], PANEL):
            panel = inputs[:, start : start + PANEL]
            self._upper[start : start + PANEL, start:].addmm_(panel.T, inputs[:, start:])

    @property
    def gram(self) -> torch.Tensor:
        """`[in_features, in_features]` fp32, symmetric to the bit."""
        if self._gram is None:
            upper = self._upper.triu()
            self._gram = upper + upper.triu(1).T
        return self._gram

    @property
    def squared_norms(self) -> torch.Tensor:
        """`[in_features]` fp32: squared norm of each input feature."""
        return self._upper.diagonal()

    def output_energy(self, weight: torch.Tensor) -> torch.Tensor:
        """Squared norm of each output over the calibration tokens, `[rows]`.

        Args:
            weight: `[rows, in_features]` fp32.
        """
        return ((weight @ self.gram) * weight).sum(dim=1)


Statistics = NormStatistics | GramStatistics
