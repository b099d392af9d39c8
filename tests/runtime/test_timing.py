"""Measurements: the order, the median, and that every layer runs."""

import pytest
import torch
from torch import nn

from optimum_sparse.runtime import timing


def test_times_are_medians_of_one_layer_measured_in_turn(monkeypatch: pytest.MonkeyPatch):
    ways = {"one": [nn.Identity()], "two": [nn.Identity(), nn.Identity()]}
    order, x = [], torch.ones(3, 4)

    def seconds(layers: list[nn.Module], inputs: torch.Tensor) -> float:
        assert inputs is x
        order.append(len(layers))
        return 1e-6 * (len(order) if len(layers) == 1 else 1000)  # one: 1, 4, 5, 8, 9, ...

    monkeypatch.setattr(timing, "_seconds", seconds)
    monkeypatch.setattr(timing, "SECONDS", 0)
    times = timing.microseconds(ways, x, cuda_graphs=False)
    assert order == [1, 2, 2, 1] * 3 + [1, 2]  # seven rounds
    assert times == {"one": pytest.approx(8), "two": pytest.approx(500)}


def test_measurement_runs_every_layer():
    calls = []

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(torch.is_inference_mode_enabled())
            return x

    assert timing.microseconds({"torch": [Layer(), Layer()]}, torch.ones(1, 4), False)["torch"] > 0
    assert len(calls) >= 2 * timing.LEAST_ROUNDS and all(calls)
