"""Block reconstruction, against its optimizers written out, and in runs of every kind."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_sparse import SparseConfig, SparsePruner, muon, reconstruction
from optimum_sparse.commands.inspect import inspect
from optimum_sparse.muon import MOMENTUM
from optimum_sparse.reconstruction import BETAS, MATRIX_RATE, VECTOR_RATE, reconstruct, relative_error

from .helpers import tiny_batches, tiny_mixtral, tiny_model
from .test_muon import by_singular_values

EPOCHS = 4


class Block(nn.Module):
    """A norm, two matrices and what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.frozen = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + self.down(self.up(self.norm(x)).relu()) + self.frozen(x), "something else"


NAMES = ["norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight"]


def problem(num_batches: int = 9) -> tuple[Block, list[torch.Tensor], dict[int, torch.Tensor]]:
    """A pruned block, its inputs, and what it put out before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block()
        inputs = [torch.randn(2, 5, 12) for _ in range(num_batches)]
        with torch.no_grad():
            targets = {index: block(x)[0] for index, x in enumerate(inputs)}
            for matrix in (block.up.weight, block.down.weight):
                matrix *= torch.rand_like(matrix) < 0.5
    return block, inputs, targets


def train(block: Block, inputs: list[torch.Tensor], targets: dict[int, torch.Tensor], epochs: int = EPOCHS):
    with torch.no_grad():  # as in a run
        return reconstruct(block, NAMES, targets, lambda batch, function: function(inputs[batch]), epochs)


def by_hand(block: Block, inputs: list[torch.Tensor], targets: dict[int, torch.Tensor]) -> tuple[list[float], list]:
    """Errors on the held-out batches before and after each epoch, and the weights after each, in float64."""
    block = copy.deepcopy(block).double()
    parameters = {name: block.get_parameter(name) for name in NAMES}
    masks = {name: (value != 0) if value.dim() > 1 else torch.ones_like(value) for name, value in parameters.items()}
    scales = {name: value.detach().square().mean().sqrt().item() for name, value in parameters.items()}
    mean_scale = sum(scales.values()) / 4
    assert [name for name in NAMES if scales[name] == 0] == ["norm.bias"]
    moments = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in parameters.items()}
    held_out = range(0, len(inputs), 8)
    trained = [index for index in range(len(inputs)) if index not in held_out]

    def error(index: int) -> torch.Tensor:
        output, target = block(inputs[index].double())[0], targets[index].double()
        tokens = zip(output.flatten(0, 1), target.flatten(0, 1), strict=True)
        return torch.stack([(a - b).square().sum() / b.square().sum() for a, b in tokens]).mean()

    def held_out_error() -> float:
        return sum(error(index).item() for index in held_out) / len(held_out)

    errors, weights, step = [held_out_error()], [], 0
    total = EPOCHS * len(trained)
    for _ in range(EPOCHS):
        for index in trained:
            block.zero_grad()
            error(index).backward()
            cosine = (1 + torch.cos(torch.tensor(torch.pi * step / total, dtype=torch.float64))) / 2
            falling = 0.1 + 0.9 * cosine
            step += 1
            with torch.no_grad():
                for name, value in parameters.items():
                    gradient, (first, second) = value.grad * masks[name], moments[name]
                    scale = falling * (scales[name] or mean_scale)
                    if value.dim() > 1:
                        first.mul_(MOMENTUM).add_((1 - MOMENTUM) * gradient)
                        direction = by_singular_values(MOMENTUM * first + (1 - MOMENTUM) * gradient) * masks[name]
                        value -= MATRIX_RATE * scale * max(value.shape) ** 0.5 * direction
                        continue
                    first.mul_(BETAS[0]).add_((1 - BETAS[0]) * gradient)
                    second.mul_(BETAS[1]).add_((1 - BETAS[1]) * gradient**2)
                    mean, square = first / (1 - BETAS[0] ** step), second / (1 - BETAS[1] ** step)
                    value -= VECTOR_RATE * scale * mean / (square.sqrt() + 1e-8)
        errors.append(held_out_error())
        weights.append({name: value.detach().clone() for name, value in parameters.items()})
    return errors, weights


def test_steps_written_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(muon, "product_dtype", lambda device: torch.float32)
    block, inputs, targets = problem()
    errors, weights = by_hand(block, inputs, targets)
    before = copy.deepcopy(block)
    found = train(block, inputs, targets)
    assert found.before == pytest.approx(errors[0], rel=1e-4)
    assert found.epochs == min(range(EPOCHS + 1), key=errors.__getitem__) > 0
    assert found.after == pytest.approx(min(errors), rel=1e-3) and found.after < found.before
    for name, expected in weights[found.epochs - 1].items():
        value = block.get_parameter(name)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5)
        assert not torch.equal(value, before.get_parameter(name))
        if value.dim() > 1:
            assert torch.equal(value == 0, before.get_parameter(name) == 0)
    assert torch.equal(block.frozen.weight, before.frozen.weight)
    assert all(parameter.grad is None for parameter in block.parameters())  # nothing is left behind


def test_what_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reconstruction, "MATRIX_RATE", 100.0)
    block, inputs, targets = problem()
    before = copy.deepcopy(block.state_dict())
    calls = []
    with torch.no_grad():
        found = reconstruct(
            block, NAMES, targets, lambda batch, function: (calls.append(batch), function(inputs[batch]))[1], 50
        )
    assert found.epochs == 0 and found.after == found.before
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert len(calls) == 2 + 2 * (7 + 2)  # two epochs without a gain are enough


def test_one_batch_is_trained_and_judged_on():
    block, inputs, targets = problem(num_batches=1)
    assert train(block, inputs, targets).after < train(*problem(num_batches=1), epochs=1).before


def test_gradients_do_not_vanish_in_float16():
    """They are means over many tokens, relative to large norms, which half precision cannot hold."""
    generator = torch.Generator().manual_seed(0)
    block = nn.Linear(64, 64, bias=False)
    nn.init.normal_(block.weight, std=8.0, generator=generator)
    inputs = {0: torch.randn(4096, 64, generator=generator)}
    targets = {0: (inputs[0] @ block.weight.T.detach() * 1.05)}
    found = {}
    for dtype in (torch.float32, torch.float16):
        layer = copy.deepcopy(block).to(dtype)
        call = lambda batch, function, dtype=dtype: function(inputs[batch].to(dtype))  # noqa: E731
        found[dtype] = reconstruct(layer, ["weight"], {0: targets[0].to(dtype)}, call, 3)
    assert found[torch.float32].epochs and found[torch.float16].epochs == found[torch.float32].epochs
    assert found[torch.float16].after == pytest.approx(found[torch.float32].after, rel=0.02)


def test_relative_error_of_some_tokens():
    output, target = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    keep = torch.tensor([True, False, True, False, False, True])
    expected = relative_error(output.flatten(0, 1)[keep], target.flatten(0, 1)[keep])
    assert relative_error(output, target, keep) == expected


def test_relative_error_is_that_of_each_token():
    target = torch.tensor([[[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]]])
    output = target + torch.tensor([[[0.5, 0.0], [0.0, 50.0], [0.0, 0.0]]])
    assert relative_error(output, target).item() == pytest.approx((0.01 + 0.01 + 0) / 3)


def pruned(model, folder: Path | None = None, epochs: int | None = 2, **options):
    arguments = {name: options.pop(name) for name in ("activation_device", "resume_from") if name in options}
    settings = {"reconstruct": epochs, "batch_size": 2, **options}
    settings |= {} if "pattern" in options else {"sparsity": 0.6}
    if epochs is None:
        settings["true_sequential"] = False
    pruner = SparsePruner(progress=False, **settings)
    pruner.prune(model, dataset=tiny_batches(8), **arguments)
    if folder is not None:
        pruner.save(model, folder)
    return pruner


def distance(model, dense) -> float:
    batch = tiny_batches(1, seed=9)[0]
    with torch.no_grad():
        return float((model(**batch).logits - dense(**batch).logits).square().mean())


@pytest.mark.parametrize("options", [{"method": "sparsegpt"}, {"method": "wanda", "pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_models_come_closer_to_the_dense_one(tmp_path: Path, kind: str, options: dict):
    def model():
        return tiny_mixtral() if kind == "mixtral" else tiny_model(kind)

    dense, trained, plain = model(), model(), model()
    report = pruned(trained, tmp_path, epochs=4, **options).report
    assert report.sparsity == pruned(plain, epochs=None, **options).report.sparsity
    assert list(report.reconstruction) == [entry.block for entry in report.matrices][:: len(report.matrices) // 2]
    assert all(found["after"] < found["before"] for found in report.reconstruction.values())
    assert distance(trained, dense) < distance(plain, dense)
    assert inspect(str(tmp_path))["metadata_is_true"]
    # Norms were trained, too; embeddings and heads were not.
    changed = {n for n, p in trained.named_parameters() if not torch.equal(p, dense.get_parameter(n))}
    assert any("norm" in name or "ln_" in name for name in changed)
    assert not any("embed" in name or "wte" in name or "lm_head" in name for name in changed)


def assert_same(*folders: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_waiting_elsewhere_changes_nothing(tmp_path: Path):
    pruned(tiny_model(), tmp_path / "expected")
    pruned(tiny_model(), tmp_path / "spilled", activation_device="disk")
    tiny_model().save_pretrained(tmp_path / "dense")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    pruned(offloaded, tmp_path / "offloaded")
    assert_same(tmp_path / "expected", tmp_path / "spilled")
    assert_same(tmp_path / "expected", tmp_path / "offloaded")


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = pruned(tiny_model(num_hidden_layers=3), tmp_path / "expected")
    progress, done = tmp_path / "progress", []

    def interrupted(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return reconstruct(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("optimum_sparse.blocks.reconstruct", interrupted)
        pruned(tiny_model(num_hidden_layers=3), resume_from=progress)
    monkeypatch.setattr(
        "optimum_sparse.blocks.reconstruct", lambda *arguments: (done.append(arguments), reconstruct(*arguments))[1]
    )
    resumed = pruned(tiny_model(num_hidden_layers=3), tmp_path / "resumed", resume_from=progress)
    assert len(done) == 3  # each block once
    assert resumed.report.reconstruction == expected.report.reconstruction
    assert_same(tmp_path / "expected", tmp_path / "resumed")


def test_half_precision_keeps_every_weight_that_was_kept(tmp_path: Path):
    model, plain = tiny_model().half(), tiny_model().half()
    trained = pruned(model, tmp_path).report
    assert [entry.zeros for entry in trained.matrices] == [e.zeros for e in pruned(plain, epochs=None).report.matrices]
    assert inspect(str(tmp_path))["metadata_is_true"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruct": 0}, "reconstruct must be at least 1, got 0"),
        ({"reconstruct": 5, "true_sequential": True}, "true_sequential=True, which prunes layer by layer"),
        ({"reconstruct": 5, "method": "magnitude"}, "sees no data"),
        ({"reconstruct": 5, "quantization": "int4"}, "training leaves the grid"),
    ],
)
def test_what_does_not_go_together(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SparseConfig(**options)


def test_it_goes_block_by_block():
    config = SparseConfig(reconstruct=5)
    assert config.true_sequential is False and SparseConfig.from_dict(config.to_dict()) == config


def test_blocks_with_nothing_to_prune_are_not_said_to_be_untrained():
    """Of an offloaded model, batches stop at all blocks."""
    model = tiny_model("llama", num_hidden_layers=3)
    cpu_offload(model, execution_device=torch.device("cpu"))
    pruner = SparsePruner(method="wanda", reconstruct=1, block_range=(1, 2), batch_size=2, progress=False)
    pruner.prune(model, dataset=tiny_batches(2))
    assert list(pruner.report.reconstruction) == ["model.layers.1"]
    assert not any("not trained" in note for note in pruner.report.notes)
