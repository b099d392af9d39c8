"""The engine against its definition: rerun the model, pruned so far, from the embeddings for every group of matrices.

The oracle below knows nothing of greenlets, stops or blocks. It runs whole forwards with plain hooks, once for every
group, and shares with the package only the pruning methods themselves. All comparisons are to the bit.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet, settrace
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_sparse import SparseConfig, SparsePruner
from optimum_sparse.methods import METHODS
from optimum_sparse.patterns import parse_pattern
from tests.helpers import ARCHITECTURES, HIDDEN, tiny_batches, tiny_model

Batches = Sequence[dict[str, torch.Tensor]]
SEQUENTIAL = pytest.mark.parametrize("true_sequential", [True, False], ids=["by group", "by block"])


def config_for(true_sequential: bool = True, **options: Any) -> SparseConfig:
    # Blocks of 16 columns, so that tiny matrices have several.
    options = {"method": "sparsegpt", "sparsity": 0.5, "block_size": 16, **options}
    if options.get("pattern"):
        del options["sparsity"]
    return SparseConfig(batch_size=2, true_sequential=true_sequential, **options)


def prune(model: nn.Module, batches: Batches, config: SparseConfig) -> SparsePruner:
    pruner = SparsePruner(config, progress=False)
    assert pruner.prune(model, dataset=list(batches)) is model
    return pruner


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices are solved on one thread, and sums in another order have other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The oracle.


@contextmanager
def hooked(hooks: dict[nn.Module, Callable[[torch.Tensor], None]]) -> Iterator[None]:
    """While the body runs, call each module's hook with the tensor that goes into the module."""
    handles = []
    for module, hook in hooks.items():
        handles.append(module.register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        model(**batch, use_cache=False)


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """All but the output embeddings."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]


def groups_in_order(model: nn.Module, batches: Batches) -> tuple[list[list[nn.Module]], list[nn.Parameter]]:
    """Layers that receive the very same tensor together, in the order of their first use, and weights used repeatedly.

    What only later batches run comes right after what ran before it there.
    """
    order: list[list[nn.Module]] = []
    repeated: dict[nn.Parameter, None] = {}
    for batch in batches:
        # Each use of a layer in one forward, the tensor it was used on, and a copy of that tensor as it was then.
        uses: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        hooks = {
            module: lambda inputs, module=module, uses=uses: uses.append((module, inputs, inputs.clone()))
            for module in linear_layers(model)
        }
        with hooked(hooks):
            run(model, batch)
        counts = Counter(module.weight for module, _, _ in uses)
        repeated.update({weight: None for weight, count in counts.items() if count > 1})
        once = [use for use in uses if counts[use[0].weight] == 1]
        groups = [
            [module for module, other, copied in once if other is inputs and torch.equal(copied, contents)]
            for _, inputs, contents in once
        ]
        place = 0
        for group in groups:  # each comes up as often as it has members
            if group not in order:
                order.insert(place, group)
            place = max(place, order.index(group) + 1)
    return order, list(repeated)


def statistics_of(model: nn.Module, batches: Batches, users: list[list[nn.Module]], config: SparseConfig) -> list[Any]:
    """Rerun the whole model over all batches and collect what goes into the users of each weight, without padding."""
    statistics = [METHODS[config.method].statistics(in_features(modules[0])) for modules in users]
    for batch in batches:
        mask = batch.get("attention_mask")

        def add(inputs: torch.Tensor, sums: Any, mask: torch.Tensor | None = mask) -> None:
            tokens = inputs.detach().reshape(-1, inputs.shape[-1])
            sums.add(tokens if mask is None else tokens[mask.bool().reshape(-1)])

        hooks = {
            module: lambda inputs, sums=sums: add(inputs, sums)
            for modules, sums in zip(users, statistics, strict=True)
            for module in modules
        }
        with hooked(hooks):
            run(model, batch)
    return statistics


def in_features(module: nn.Module) -> int:
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]


def solve(group: list[nn.Module], statistics: Any, config: SparseConfig) -> None:
    """Solve matrices that share their inputs as one stack of rows, and write them."""
    weights = [module.weight.detach() for module in group]
    matrices = [w.T if isinstance(module, Conv1D) else w for w, module in zip(weights, group, strict=True)]
    rows = [len(matrix) for matrix in matrices]
    pattern = parse_pattern(config.sparsity, config.pattern)
    solution = METHODS[config.method].solve(torch.cat(matrices).float(), statistics, pattern, config, rows)
    for weight, part, module in zip(weights, solution.weight.split(rows), group, strict=True):
        weight.copy_(part.T if isinstance(module, Conv1D) else part)


def block_of(model: nn.Module, module: nn.Module) -> str:
    """The name up to the first number: `model.layers.3`."""
    name = next(name for name, other in model.named_modules() if other is module)
    return re.match(r"(.*?\.\d+)\.", name)[1]


def prune_by_reruns(model: nn.Module, batches: Batches, config: SparseConfig) -> None:
    """What the engine must compute, one whole pass over the data for every group of matrices."""
    groups, repeated = groups_in_order(model, batches)
    users = [[module for module in linear_layers(model) if module.weight is weight] for weight in repeated]
    for modules, statistics in zip(users, statistics_of(model, batches, users, config), strict=True):
        solve(modules[:1], statistics, config)
    if config.true_sequential:
        stages = [[group] for group in groups]
    else:
        blocks: dict[str, list[list[nn.Module]]] = {}
        for group in groups:
            blocks.setdefault(block_of(model, group[0]), []).append(group)
        stages = list(blocks.values())
    for stage in stages:
        firsts = [group[:1] for group in stage]
        for group, statistics in zip(stage, statistics_of(model, batches, firsts, config), strict=True):
            solve(group, statistics, config)


# Layers of which some forwards use the bare weight; tests/test_architectures.py has an oracle that sees it.
BARE = {"jamba": ("dt_proj",)}


# What is checked after every run.


@pytest.fixture(autouse=True)
def no_suspended_forwards() -> Iterator[None]:
    """Every greenlet that a test switches to has come to its end when the test has."""
    seen: set[greenlet] = set()
    settrace(lambda event, switch: seen.update(switch))
    yield
    settrace(None)
    assert all(g.dead for g in seen - {getcurrent()})


def assert_same_bits(model: nn.Module, expected: nn.Module) -> None:
    wanted = dict(expected.named_parameters())
    got = dict(model.named_parameters())
    assert got.keys() == wanted.keys()
    different = [name for name in got if not torch.equal(got[name], wanted[name])]
    assert not different


def assert_nothing_left_behind(model: nn.Module) -> None:
    """No hook and no changed mode; greenlets are looked after by a fixture."""
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks and not module._forward_hooks, name
        assert not module.training, name
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()
    assert all(parameter.requires_grad for parameter in model.parameters())


def assert_all_accounted_for(model: nn.Module, pruner: SparsePruner) -> None:
    """Each linear layer is either pruned to the last zero, or in the report with the reason why not."""
    pruned = {matrix.name for matrix in pruner.report.matrices}
    weights = {model.get_submodule(name).weight for name in pruned}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            assert (module.weight in weights) != (name in pruner.report.skipped), name
    for matrix in pruner.report.matrices:
        weight = model.get_submodule(matrix.name).weight
        assert matrix.zeros == int((weight == 0).sum()) == weight.numel() // 2


def check(model: nn.Module, batches: Batches, config: SparseConfig) -> SparsePruner:
    """Prune a model and a copy of it by reruns, and compare everything."""
    expected = copy.deepcopy(model)
    prune_by_reruns(expected, batches, config)
    pruner = prune(model, batches, config)
    assert_same_bits(model, expected)
    assert_nothing_left_behind(model)
    assert_all_accounted_for(model, pruner)
    return pruner


@SEQUENTIAL
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture, true_sequential):
    """All but weights that are used without their module's forward, which hooks on modules do not see."""
    model = tiny_model(architecture)
    ignore = ("lm_head", *BARE.get(architecture, ()))
    pruner = check(model, tiny_batches(), config_for(true_sequential, ignore=ignore))
    assert len(pruner.report.matrices) >= 8


@SEQUENTIAL
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options", [{"method": "wanda"}, {"pattern": "2:4"}, {"method": "sparsegpt-reference"}], ids=str
)
def test_methods_and_patterns(architecture, options, true_sequential):
    check(tiny_model(architecture), tiny_batches(), config_for(true_sequential, **options))


@SEQUENTIAL
@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom", "gemma3_text"])
def test_padding_is_left_out(architecture, true_sequential):
    batches = tiny_batches(num=4, rows=2, padding=True)
    assert any((batch.get("attention_mask", torch.ones(1)) == 0).any() for batch in batches)
    pruner = check(tiny_model(architecture), batches, config_for(true_sequential))
    tokens = sum(int(batch.get("attention_mask", torch.ones(2, 24)).sum()) for batch in batches)
    assert {matrix.num_tokens for matrix in pruner.report.matrices} == {tokens}


@SEQUENTIAL
def test_batches_of_different_lengths(true_sequential):
    batches = [*tiny_batches(num=2, length=24), *tiny_batches(num=1, length=9), *tiny_batches(num=1, length=40)]
    check(tiny_model("gemma3_text"), batches, config_for(true_sequential))


def test_both_orders_differ():
    """Or the comparisons above could not tell them apart."""
    by_group, by_block = tiny_model(), tiny_model()
    prune(by_group, tiny_batches(), config_for(True))
    prune(by_block, tiny_batches(), config_for(False))
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(by_group.get_parameter(first), by_block.get_parameter(first))
    assert not torch.equal(by_group.get_parameter(last), by_block.get_parameter(last))


def test_bfloat16():
    check(tiny_model().bfloat16(), tiny_batches(), config_for())


@pytest.mark.slow
@SEQUENTIAL
def test_real_weights(smollm2, true_sequential):
    """The first blocks of SmolLM2 in bfloat16, with the large activations that random weights do not have."""
    model = copy.deepcopy(smollm2[0])
    model.model.layers = model.model.layers[:3].eval()
    model.config.num_hidden_layers = 3
    check(model, tiny_batches(num=2, length=64), config_for(true_sequential, block_size=128))


# Paths through the model that are not a straight line.


class LongOnly(nn.Module):
    """An MLP that only sequences of at least `length` tokens go through."""

    def __init__(self, mlp: nn.Module, length: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.length = length

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden) if hidden.shape[1] >= self.length else torch.zeros_like(hidden)


class SingleRowOnly(LongOnly):
    """An MLP that only batches of one row go through."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden) if len(hidden) == 1 else torch.zeros_like(hidden)


class LastRowOnly(LongOnly):
    """An MLP for the last of several rows, as an expert that the others are not routed to."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        if len(hidden) > 1:
            output[-1:] = self.mlp(hidden[-1:])
        return output


def with_mlp(wrapper: type[nn.Module], *args: Any, layer: int = 0) -> nn.Module:
    model = tiny_model(num_hidden_layers=3)
    layers = model.model.layers
    layers[layer].mlp = wrapper(layers[layer].mlp, *args).eval()
    return model


@SEQUENTIAL
@pytest.mark.parametrize("lengths", [(24, 9, 24), (9, 24, 24), (9, 24, 9)], ids=str)
def test_a_path_that_some_batches_skip(lengths, true_sequential):
    """Whether or not the first batch, which the engine probes with, takes the path."""
    batches = [batch for seed, length in enumerate(lengths) for batch in tiny_batches(1, length=length, seed=seed)]
    model = with_mlp(LongOnly, 20)
    pruner = check(model, batches, config_for(true_sequential))
    tokens = {matrix.name: matrix.num_tokens for matrix in pruner.report.matrices}
    assert tokens["model.layers.0.mlp.mlp.up_proj"] == sum(2 * length for length in lengths if length >= 20)
    assert tokens["model.layers.1.mlp.up_proj"] == sum(2 * length for length in lengths)


@SEQUENTIAL
def test_a_layer_that_never_runs_is_named(true_sequential):
    model = tiny_model()
    model.model.layers[0].unused = nn.Linear(HIDDEN, HIDDEN).eval()
    dense = model.model.layers[0].unused.weight.clone()
    pruner = check(model, tiny_batches(), config_for(true_sequential))
    assert torch.equal(model.model.layers[0].unused.weight, dense)
    reason = pruner.report.skipped["model.layers.0.unused"]
    assert reason == "is not used in a matrix product on the calibration data"


@SEQUENTIAL
def test_a_layer_that_no_calibration_batch_runs_is_named(true_sequential):
    """Even if the short batch that the engine probes with does run it."""
    model = with_mlp(SingleRowOnly, 1)
    pruner = prune(model, tiny_batches(), config_for(true_sequential))
    assert not (model.model.layers[0].mlp.mlp.up_proj.weight == 0).any()
    assert_all_accounted_for(model, pruner)


@SEQUENTIAL
def test_a_path_that_the_probe_does_not_take(true_sequential):
    """It must not stay dense for the reason that it does not run: it does."""
    check(with_mlp(LastRowOnly, 1, layer=1), tiny_batches(), config_for(true_sequential))


@SEQUENTIAL
def test_a_block_that_runs_twice(true_sequential):
    """Its statistics are those of the dense model, from both of its uses."""
    model = tiny_model(num_hidden_layers=3)
    model.model.layers[2] = model.model.layers[0]
    batches = tiny_batches()
    pruner = check(model, batches, config_for(true_sequential))
    tokens = {matrix.name: matrix.num_tokens for matrix in pruner.report.matrices}
    once = sum(batch["input_ids"].numel() for batch in batches)
    assert tokens["model.layers.0.mlp.up_proj"] == 2 * once
    assert tokens["model.layers.1.mlp.up_proj"] == once


class Twice(nn.Module):
    """An MLP applied two times in a row."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.mlp(hidden))


@SEQUENTIAL
def test_a_layer_that_runs_twice_inside_a_block(true_sequential):
    check(with_mlp(Twice, layer=1), tiny_batches(), config_for(true_sequential))


@SEQUENTIAL
def test_tied_matrices_of_which_only_the_second_runs(true_sequential):
    model = tiny_model()
    first, second = model.model.layers
    first.unused = nn.Linear(HIDDEN, 64, bias=False).eval()
    first.unused.weight = second.mlp.up_proj.weight
    check(model, tiny_batches(), config_for(true_sequential))


class OverwritesBetween(nn.Module):
    """An MLP that overwrites its input after its first matrix has used it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate = self.mlp.act_fn(self.mlp.gate_proj(hidden))
        hidden.add_(0.5)
        return self.mlp.down_proj(gate * self.mlp.up_proj(hidden))


@SEQUENTIAL
def test_a_tensor_that_is_overwritten_is_another_input(true_sequential):
    check(with_mlp(OverwritesBetween, layer=1), tiny_batches(), config_for(true_sequential))


class OverwritesArgument(nn.Module):
    """A norm that changes the hidden states which its block was called with."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden.add_(0.5))


@SEQUENTIAL
def test_a_block_that_overwrites_its_argument(true_sequential):
    """Whoever runs it twice on the same argument gets something else the second time."""
    model = tiny_model(num_hidden_layers=3)
    for layer in model.model.layers:
        layer.input_layernorm = OverwritesArgument(layer.input_layernorm).eval()
    check(model, tiny_batches(), config_for(true_sequential))


# Modes that belong to the model's own forward.


class Autocast(nn.Module):
    """An MLP in bfloat16 inside an fp32 model."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.mlp(hidden).float()


class InferenceMode(Autocast):
    """An MLP in inference mode."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            hidden = self.mlp(hidden)
        return hidden.clone()


class WithGrad(Autocast):
    """An MLP that turns gradients on, whatever its caller said."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return self.mlp(hidden).detach()


@SEQUENTIAL
@pytest.mark.parametrize("wrapper", [Autocast, InferenceMode, WithGrad])
def test_modes_inside_the_model(wrapper, true_sequential):
    check(with_mlp(wrapper, layer=1), tiny_batches(), config_for(true_sequential))


class Recorder(nn.Module):
    """An MLP that notes the modes it runs in, before and after its matrices."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.seen: list[dict[str, bool]] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen.append(modes())
        hidden = self.mlp(hidden)
        self.seen.append(modes())
        return hidden


def modes() -> dict[str, bool]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@SEQUENTIAL
@pytest.mark.parametrize("wrapper", [Autocast, InferenceMode, WithGrad])
def test_modes_of_one_batch_do_not_reach_the_others(wrapper, true_sequential):
    """Batches take turns while they are inside of the mode, which only the second of four layers sets."""
    model = tiny_model(num_hidden_layers=4)
    recorders = [Recorder(layer.mlp) for layer in model.model.layers]
    for index, layer in enumerate(model.model.layers):
        layer.mlp = (wrapper(recorders[index]) if index == 1 else recorders[index]).eval()
    run(model, tiny_batches()[0])
    plain = [recorder.seen.copy() for recorder in recorders]
    assert plain[1] != plain[0] == plain[2]
    prune(model, tiny_batches(num=4), config_for(true_sequential))
    for recorder, expected in zip(recorders, plain, strict=True):
        assert len(recorder.seen) > 6
        assert all(seen in expected for seen in recorder.seen)


def everything_in_bfloat16(model: nn.Module) -> None:
    """Put the whole decoder under autocast, so that all stops are inside of it."""
    forward = model.model.forward

    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(*args, **kwargs)

    model.model.forward = autocast_forward


@SEQUENTIAL
def test_whole_model_under_autocast(true_sequential):
    model, expected = tiny_model(), tiny_model()
    batches, config = tiny_batches(), config_for(true_sequential)
    everything_in_bfloat16(model)
    everything_in_bfloat16(expected)
    prune(model, batches, config)
    prune_by_reruns(expected, batches, config)
    assert_same_bits(model, expected)
    assert_nothing_left_behind(model)
    without = tiny_model()
    prune(without, batches, config)
    assert not torch.equal(without.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_settings_are_as_before():
    model = tiny_model()
    model.config.use_cache = True
    prune(model, tiny_batches(), config_for())
    assert model.config.use_cache is True
    assert_nothing_left_behind(model)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@SEQUENTIAL
def test_modes_of_the_caller(mode, true_sequential):
    """They are as before afterwards, and do not reach the solver, which works in fp32."""
    model, expected = tiny_model(), tiny_model()
    batches, config = tiny_batches(), config_for(true_sequential)
    before = modes()
    with mode():
        inside = modes()
        prune(model, batches, config)
        assert modes() == inside
    assert modes() == before
    if inside["autocast"]:  # the forwards of the oracle must be under autocast as well
        everything_in_bfloat16(expected)
    prune_by_reruns(expected, batches, config)
    assert_same_bits(model, expected)
    assert_nothing_left_behind(model)


# Errors and interruptions.


class Failure(Exception):
    """Not an exception that anything but the test knows."""


class FailsAtCall(nn.Module):
    """An MLP that raises `error` in its n-th call, deep in the forward."""

    def __init__(self, mlp: nn.Module, call: int, error: BaseException) -> None:
        super().__init__()
        self.mlp = mlp
        self.call = call
        self.error = error

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.mlp(hidden)
        self.call -= 1
        if self.call == 0:
            raise self.error
        return hidden


def assert_usable(model: nn.Module, dense: dict[str, torch.Tensor]) -> int:
    """Each matrix is either as it was or exactly half zero, and the model runs; returns how many are pruned."""
    pruned = 0
    for name, value in model.state_dict().items():
        if not torch.equal(value, dense[name]):
            assert int((value == 0).sum()) == value.numel() // 2, name
            pruned += 1
    with torch.no_grad():
        logits = model(**tiny_batches(1)[0]).logits
    assert logits.isfinite().all()
    return pruned


@SEQUENTIAL
@pytest.mark.parametrize("call", [1, 4, 7])
@pytest.mark.parametrize("error", [Failure("as it is"), KeyboardInterrupt(), ValueError("from the model")], ids=repr)
def test_errors_in_the_model_surface_unchanged(error, call, true_sequential):
    """In the probe, in the middle of the lockstep, and after blocks were pruned."""
    model = with_mlp(FailsAtCall, call, error, layer=1)
    dense = copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)) as caught:
        prune(model, tiny_batches(5), config_for(true_sequential))
    assert caught.value is error
    assert_nothing_left_behind(model)
    assert (assert_usable(model, dense) == 0) == (call == 1)


@SEQUENTIAL
def test_interruption_from_a_hook(true_sequential):
    """As Ctrl-C does, between two matrices of the second block; the user's own hook stays."""
    model = tiny_model()
    dense = copy.deepcopy(model.state_dict())
    calls = []

    def interrupt(module: nn.Module, args: Any) -> None:
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(model, tiny_batches(5), config_for(true_sequential))
    assert list(model.model.layers[1].mlp._forward_pre_hooks.values()) == [interrupt]
    handle.remove()
    assert_nothing_left_behind(model)
    pruned = assert_usable(model, dense)
    assert 0 < pruned < 14
    # And it can be pruned once more, to the end.
    pruner = prune(model, tiny_batches(), config_for(true_sequential))
    assert_all_accounted_for(model, pruner)


@SEQUENTIAL
def test_errors_of_the_method_close_all_forwards(monkeypatch, true_sequential):
    """Raised outside of the model, while all batches are parked."""
    model = tiny_model()
    dense = copy.deepcopy(model.state_dict())
    solve_for_real, calls = METHODS["sparsegpt"].solve, []

    def fail_late(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 6:
            raise Failure("as it is")
        return solve_for_real(*args, **kwargs)

    monkeypatch.setitem(METHODS, "sparsegpt", replace(METHODS["sparsegpt"], solve=fail_late))
    with pytest.raises(Failure, match="as it is"):
        prune(model, tiny_batches(), config_for(true_sequential))
    assert_nothing_left_behind(model)
    assert 0 < assert_usable(model, dense) < 14


def test_errors_inside_autocast_restore_the_caller():
    model = with_mlp(FailsAtCall, 7, Failure(), layer=1)
    model.model.layers[1].mlp = Autocast(model.model.layers[1].mlp).eval()
    with pytest.raises(Failure):
        prune(model, tiny_batches(5), config_for())
    assert_nothing_left_behind(model)
