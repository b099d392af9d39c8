"""Models that write to what their matrices have been given are pruned as if they did not."""

from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from optimum_sparse import SparsePruner
from optimum_sparse.report import SparsityReport


class Block(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.norm, self.in_place = nn.LayerNorm(32), in_place
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = self.norm(x)
        gate = self.gate(inputs)
        others = inputs if self.in_place else inputs.clone()
        up = self.up(others.clamp_(min=0))
        added = self.down(torch.relu(gate) * up)
        return x.add_(added) if self.in_place else x + added


class Net(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList([Block(in_place) for _ in range(3)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def pruned(
    in_place: bool, inside: AbstractContextManager | None = None, **options: object
) -> tuple[dict[str, torch.Tensor], SparsityReport]:
    torch.manual_seed(0)
    model, batches = Net(in_place).eval(), [{"input_ids": torch.randint(64, (4, 32))} for _ in range(3)]
    pruner = SparsePruner(sparsity=0.6, batch_size=2, progress=False, **options)
    with inside or torch.no_grad():
        pruner.prune(model, dataset=batches)
    assert pruner.report is not None
    return model.state_dict(), pruner.report


OPTIONS = [
    {"method": "sparsegpt"},
    {"true_sequential": False},
    {"error_correction": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_bits(options: dict) -> None:
    (expected, report), (found, other) = (pruned(in_place, **options) for in_place in (False, True))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [entry.error for entry in other.matrices] == [entry.error for entry in report.matrices]
    assert other.correction == report.correction


@pytest.mark.parametrize(
    ("in_place", "options"), [*((True, options) for options in OPTIONS), (False, {"reconstruct": 1})], ids=str
)
def test_same_bits_in_inference_mode(in_place: bool, options: dict) -> None:
    modes = torch.no_grad(), torch.inference_mode()
    (expected, _), (found, _) = (pruned(in_place, mode, **options) for mode in modes)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_is_written_to_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match=r"Block cannot be trained.*leave out reconstruct"):
        pruned(True, reconstruct=1)


def test_weights_that_were_made_in_inference_mode() -> None:
    batches = [{"input_ids": torch.randint(64, (4, 32))}]
    models = []
    for mode in (torch.no_grad(), torch.inference_mode()):
        torch.manual_seed(0)
        with mode:
            models.append(Net(in_place=True).eval())
    for model in models:
        SparsePruner(method="sparsegpt", progress=False).prune(model, dataset=batches)
    expected, found = (model.state_dict() for model in models)
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())
    assert (found["blocks.2.up.weight"] == 0).float().mean() == 0.5
    for options in ({"reconstruct": 1}, {"allocation": "loss"}):
        with pytest.raises(ValueError, match=r"no gradients for the weights.*made in torch\.inference_mode"):
            SparsePruner(progress=False, **options).prune(models[1], dataset=batches)
