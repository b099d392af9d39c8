"""Experts that few tokens are routed to, against Gram matrices recomputed from the model's own tensors in float64."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimum_sparse import SparsePruner
from optimum_sparse.methods import METHODS
from optimum_sparse.patterns import parse_pattern
from optimum_sparse.solver import Solver
from optimum_sparse.statistics import GramStatistics
from tests.architectures import sweep_batches, sweep_model
from tests.beyond_text import HIDDEN, STD, Decoder, random_model, text, three

Batch = dict[str, torch.Tensor]
SEQUENTIAL = pytest.mark.parametrize("true_sequential", [True, False], ids=["by group", "by block"])
METHOD = pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
# No token goes to the last expert, and to the one before only those that it fits twice as well as usual.
NEVER = -1e4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A model with experts that Transformers does not know.


class FusedExperts(nn.Module):
    """`[experts, in, out]`, no gate; called with keywords."""

    def __init__(self, experts: int = 4, inner: int = 40) -> None:
        super().__init__()
        self.first = nn.Parameter(STD * torch.randn(experts, HIDDEN, inner))
        self.second = nn.Parameter(STD * torch.randn(experts, inner, HIDDEN))

    def forward(self, hidden: torch.Tensor, *, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        for expert in chosen.unique():
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            inner = F.gelu(hidden[token] @ self.first[expert])
            result.index_add_(0, token, inner @ self.second[expert] * weights[token, slot, None])
        return result


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4)
        self.experts = FusedExperts()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, 1)
        scores, chosen = self.router(flat).sigmoid().topk(2, dim=-1)
        return self.experts(flat, weights=scores, chosen=chosen).view_as(hidden)


class BiasedRouter(nn.Module):
    """A router of Mixtral with a bias."""

    def __init__(self, router: nn.Module, bias: torch.Tensor) -> None:
        super().__init__()
        self.router = router
        self.bias = nn.Buffer(bias)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = F.linear(hidden.reshape(-1, HIDDEN), self.router.weight) + self.bias
        weights, chosen = scores.softmax(-1).topk(2, dim=-1)
        return scores, weights / weights.sum(-1, keepdim=True), chosen


# What goes into each matrix of a layer: the rows of an expert, and those of its layer, float64.


@dataclass
class Rows:
    """The inputs of the matrices `names`: of an expert's own tokens, and of its layer, which has so many tokens."""

    names: list[str]
    own: torch.Tensor
    layer: torch.Tensor
    num_layer: int


Weights = Callable[[str, int], torch.Tensor]  # name of a parameter and number of an expert -> [out, in] float64
Arguments = list[dict[str, Any]]  # of each call of a module


def experts_of(
    weight: Weights,
    calls: Arguments,
    first: Sequence[str],
    second: str,
    activate: Callable[..., torch.Tensor],
    num: int,
) -> list[Rows]:
    """A module that is called with all tokens and the experts of each: it computes both matrices."""
    tokens = torch.cat([call["tokens"] for call in calls]).double()
    index = torch.cat([call["index"] for call in calls])
    found = []
    for expert in range(num):
        mine = (index == expert).any(dim=-1)
        inner = activate(expert, *(tokens @ weight(name, expert).T for name in first))
        found.append(Rows([f"{name}.{expert}" for name in first], tokens[mine], tokens, len(tokens)))
        found.append(Rows([f"{second}.{expert}"], inner[mine], inner, len(tokens)))
    return found


def parts_of(calls: Arguments, name: str) -> list[Rows]:
    """A module with a matrix for each expert, called with the tokens of one after the other; all are the layer's."""
    tokens = torch.cat([call["tokens"] for call in calls]).double()
    sizes = [call["index"] for call in calls]
    own = [[] for _ in sizes[0]]
    for call in calls:
        for rows, part in zip(own, call["tokens"].double().split(call["index"]), strict=True):
            rows.append(part)
    return [Rows([f"{name}.{e}"], torch.cat(rows), tokens, len(tokens)) for e, rows in enumerate(own)]


def together(weight: Weights, calls: Arguments, activate: Callable[..., torch.Tensor]) -> list[Rows]:
    """As Llama-4: one product takes all experts, a token is zero where it is not routed to."""
    rows = [torch.cat([call["tokens"].double().view(4, -1, HIDDEN)[e] for call in calls]) for e in range(4)]
    inner = [activate(e, rows[e] @ weight("gate_up_proj", e).T) for e in range(4)]
    found = []
    for name, inputs in (("gate_up_proj", rows), ("down_proj", inner)):
        parts = [part[part.any(dim=1)] for part in inputs]
        found += [Rows([f"{name}.{e}"], parts[e], torch.cat(parts), len(inputs[e])) for e in range(4)]
    return found


@dataclass(frozen=True)
class Case:
    """A kind of experts.

    Attributes:
        build: Makes the model, with a router that prefers the first two experts.
        modules: Modules of experts, and the blocks around them.
        rows: From a module and the arguments of its calls to what goes into its matrices.
        transposed: Parameters that are stored `[in, out]`.
    """

    build: Callable[[], nn.Module]
    modules: dict[str, str]
    rows: Callable[[nn.Module, Weights, Arguments], list[Rows]]
    transposed: tuple[str, ...] = ()


def silu_gated(module: nn.Module) -> Callable[..., torch.Tensor]:
    def activate(expert: int, outputs: torch.Tensor) -> torch.Tensor:
        gate, up = outputs.chunk(2, dim=-1)
        return F.silu(gate) * up

    return activate


def clamped(module: nn.Module) -> Callable[..., torch.Tensor]:
    """Of GPT-OSS: gate and up interleaved, with biases."""

    def activate(expert: int, outputs: torch.Tensor) -> torch.Tensor:
        outputs = outputs + module.gate_up_proj_bias[expert].detach().double()
        gate, up = outputs[:, ::2].clamp(max=7.0), outputs[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    return activate


BIAS = torch.tensor([0.0, 0.0, -1.0, NEVER])


def bias_for(model: nn.Module, router: str, weight: torch.Tensor) -> torch.Tensor:
    """A bias in units of how much the scores vary."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(router).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batches_of(model)[0])
    handle.remove()
    return BIAS * 1.8 * F.linear(seen[0].reshape(-1, HIDDEN), weight).std().item()


def batches_of(model: nn.Module) -> list[Batch]:
    return three(text) if isinstance(model, Decoder) else sweep_batches(model)


def mixtral() -> nn.Module:
    model = sweep_model("mixtral")
    for index, layer in enumerate(model.model.layers):
        gate = layer.mlp.gate
        layer.mlp.gate = BiasedRouter(gate, bias_for(model, f"model.layers.{index}.mlp.gate", gate.weight)).eval()
    return model


def with_bias(model_type: str, routers: Sequence[str], linear: str = "") -> nn.Module:
    """A model with routers that are linear layers, or have a bias anyway."""
    model = sweep_model(model_type)
    for router in routers:
        layer = model.get_submodule(router + linear)
        layer.bias = nn.Parameter(bias_for(model, router, layer.weight.detach()))
    return model


def with_correction(model_type: str, routers: Sequence[str], few: float) -> nn.Module:
    """A model that adds a bias to scores between 0 and 1 when it chooses; the rest of the experts are identities."""
    model = sweep_model(model_type)
    for router in routers:
        correction = model.get_submodule(router).e_score_correction_bias
        correction.zero_()
        correction[2], correction[3] = few, NEVER
    return model


def hand_written() -> nn.Module:
    model = random_model(lambda: Decoder(MixtureOfExperts))
    for index, block in enumerate(model.stack):
        router = block.feed_forward.router
        router.bias = nn.Parameter(bias_for(model, f"stack.{index}.feed_forward.router", router.weight.detach()))
    return model


def layers(pattern: str, block: str = "model.layers.{}", which: Sequence[int] = (0, 1)) -> dict[str, str]:
    return {f"{block.format(index)}.{pattern}": block.format(index) for index in which}


def fused(activation: Callable[[nn.Module], Callable[..., torch.Tensor]]) -> Any:
    return lambda module, weight, calls: experts_of(
        weight, calls, ["gate_up_proj"], "down_proj", activation(module), 4
    )


CASES = {
    "mixtral": Case(mixtral, layers("mlp.experts"), fused(silu_gated)),
    "gpt_oss": Case(
        lambda: with_bias("gpt_oss", list(layers("mlp.router"))),
        layers("mlp.experts"),
        fused(clamped),
        ("gate_up_proj", "down_proj"),
    ),
    "longcat_flash": Case(
        lambda: with_correction("longcat_flash", list(layers("mlp.router")), -0.12),
        layers("mlp.experts"),
        fused(silu_gated),
    ),
    "nemotron_h": Case(
        lambda: with_correction("nemotron_h", ["model.layers.1.mixer.gate"], -0.3),
        layers("mixer.experts", which=[1]),
        lambda module, weight, calls: experts_of(
            weight, calls, ["up_proj"], "down_proj", lambda _, outputs: F.relu(outputs).square(), 4
        ),
    ),
    "dbrx": Case(
        lambda: with_bias("dbrx", list(layers("ffn.router", "transformer.blocks.{}")), ".layer"),
        layers("ffn.experts", "transformer.blocks.{}"),
        lambda module, weight, calls: experts_of(
            weight, calls, ["mlp.w1", "mlp.v1"], "mlp.w2", lambda _, gate, up: F.silu(gate) * up, 4
        ),
        ("mlp.w2",),
    ),
    "jetmoe": Case(
        lambda: with_bias("jetmoe", list(layers("mlp.router")), ".layer"),
        {
            **layers("mlp.input_linear"),
            **layers("mlp.output_linear"),
            **layers("self_attention.experts.input_linear"),
            **layers("self_attention.experts.output_linear"),
        },
        lambda module, weight, calls: parts_of(calls, "weight"),
    ),
    "llama4": Case(
        lambda: with_bias("llama4_text", ["model.layers.1.feed_forward.router"]),
        layers("feed_forward.experts", which=[1]),
        lambda module, weight, calls: together(weight, calls, silu_gated(module)),
        ("gate_up_proj", "down_proj"),
    ),
    "hand-written": Case(
        hand_written,
        layers("feed_forward.experts", "stack.{}"),
        lambda module, weight, calls: experts_of(
            weight, calls, ["first"], "second", lambda _, outputs: F.gelu(outputs), 4
        ),
        ("first", "second"),
    ),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# The models, pruned and looked at.


def calls_of(model: nn.Module, module: str) -> Arguments:
    """The tokens and the experts that a module is called with on all batches."""
    calls: Arguments = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        index = [v for v in values if isinstance(v, list) or (v.dtype == torch.int64 and v.ndim == 2)]
        calls.append({"tokens": values[0].reshape(-1, values[0].shape[-1]), "index": index[0] if index else None})

    handle = model.get_submodule(module).register_forward_pre_hook(note, with_kwargs=True)
    if not isinstance(model, Decoder):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for batch in batches_of(model):
            model(**batch)
    handle.remove()
    return calls


def short(module: str, name: str) -> str:
    """The name of a matrix: that of the module if its parameter is called `weight`."""
    return f"{module}.{name}".replace(".weight.", ".")


def matrix(model: nn.Module, case: Case, module: str, name: str, expert: int) -> torch.Tensor:
    """`[out, in]` of an expert; in parameters of two dimensions the experts stand one below the other."""
    parameter = model.get_parameter(f"{module}.{name}").detach()
    value = parameter[expert] if parameter.ndim == 3 else parameter.chunk(4)[expert]
    return value.T if name in case.transposed else value


def rows_of(case: Case, model: nn.Module, dense: nn.Module, true_sequential: bool) -> list[Rows]:
    """What goes into all matrices of experts, in the state in which the model was when they were pruned."""
    found = []
    for module, block in case.modules.items():
        state = copy.deepcopy(model)
        if not true_sequential:  # the inputs of a block before any matrix of it is pruned
            state.get_submodule(block).load_state_dict(dense.get_submodule(block).state_dict())

        def weight(name: str, expert: int, state: nn.Module = state, module: str = module) -> torch.Tensor:
            return matrix(state, case, module, name, expert).double()

        for rows in case.rows(state.get_submodule(module), weight, calls_of(state, module)):
            found.append(Rows([short(module, name) for name in rows.names], rows.own, rows.layer, rows.num_layer))
    return found


Seen = dict[str, tuple[int, torch.Tensor]]


@pytest.fixture
def seen(monkeypatch) -> Seen:
    """The statistics that each matrix was pruned on: number of tokens, and sums `[in]` or `[in, in]`."""
    found: Seen = {}
    solve_for_real = Solver.solve

    def solve(self: Solver, group: Any, statistics: Any, *args: Any) -> Any:
        for one in group:
            assert one.name not in found
            sums = statistics.gram if hasattr(statistics, "gram") else statistics.squared_norms
            found[one.name] = statistics.num_tokens, sums.clone()
        return solve_for_real(self, group, statistics, *args)

    monkeypatch.setattr(Solver, "solve", solve)
    return found


def prune(model: nn.Module, **options: Any) -> SparsePruner:
    pruner = SparsePruner(progress=False, batch_size=2, block_size=16, sparsity=0.5, **options)
    pruner.prune(model, dataset=batches_of(model))
    return pruner


def share_of(rows: Rows, enough: int) -> float:
    return max(0.0, 1 - len(rows.own) / enough) if len(rows.own) < rows.num_layer else 0.0


def blend(rows: Rows, share: float) -> torch.Tensor:
    """The Gram matrix of an expert, as if it had so many tokens of the blend as it has of its own, at least one."""
    own, layer = rows.own.T @ rows.own, rows.layer.T @ rows.layer / len(rows.layer)
    return (1 - share) * own + share * max(len(rows.own), 1) * layer


def assert_close(sums: torch.Tensor, gram: torch.Tensor) -> None:
    expected = gram.diagonal() if sums.ndim == 1 else gram
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def all_matrices(case: Case, model: nn.Module) -> dict[str, torch.Tensor]:
    """`[out, in]` of each expert, by the name that the report has for it."""
    found = {}
    for module in case.modules:
        owner = model.get_submodule(module)
        for name, parameter in owner.named_parameters():
            if parameter.ndim == 3 or name.startswith("mlp."):
                for expert in range(4):
                    found[short(module, f"{name}.{expert}")] = matrix(model, case, module, name, expert)
    return found


@ALL
@METHOD
@SEQUENTIAL
def test_few_tokens(case, method, true_sequential, seen):
    """Shrinkage towards the layer, the less the more tokens there are; the report says how much."""
    dense = case.build()
    model = copy.deepcopy(dense)
    pruner = prune(model, method=method, true_sequential=true_sequential)
    entries = {entry.name: entry for entry in pruner.report.matrices}
    weights, before = all_matrices(case, model), all_matrices(case, dense)
    shares = []
    for rows in rows_of(case, model, dense, true_sequential):
        enough = 64 if method == "wanda" else rows.own.shape[1]
        share = share_of(rows, enough)
        shares.append(share)
        gram = blend(rows, share)
        for name in rows.names:
            assert entries[name].num_tokens == len(rows.own), name
            assert entries[name].layer_share == pytest.approx(share), name
            assert seen[name][0] == len(rows.own)
            assert_close(seen[name][1], gram)
            weight = weights.pop(name)
            assert ((weight == 0).sum(dim=1) * 2 == weight.shape[1]).all() or method == "sparsegpt"
            assert int((weight == 0).sum()) * 2 == weight.numel() == 2 * entries[name].zeros
            if method == "wanda":
                scores = before[name].double().abs() * gram.diagonal().sqrt()
                lowest = scores.argsort(dim=1)[:, : weight.shape[1] // 2]
                assert torch.equal(weight, before[name].scatter(1, lowest, 0)), name
    # All there is: experts with enough tokens, with too few, and with none.
    assert {0.0, 1.0} < set(shares)
    assert not weights


@pytest.mark.parametrize(
    "case", [CASES["mixtral"], CASES["gpt_oss"], CASES["dbrx"]], ids=["mixtral", "gpt_oss", "dbrx"]
)
@SEQUENTIAL
def test_sparsegpt_on_the_blend(case, true_sequential, seen):
    """The weights are those that the float64 blend leads to."""
    dense = case.build()
    model = copy.deepcopy(dense)
    config = prune(model, method="sparsegpt", true_sequential=true_sequential).config
    weights, before = all_matrices(case, model), all_matrices(case, dense)
    for rows in rows_of(case, model, dense, true_sequential):
        statistics = GramStatistics(rows.own.shape[1])
        statistics.num_tokens = len(rows.own)
        statistics._sums = blend(rows, share_of(rows, rows.own.shape[1])).float()
        for name in rows.names:
            solution = METHODS["sparsegpt"].solve(before[name].float(), statistics, parse_pattern(0.5, None), config)
            same = (weights[name] == 0) == (solution.weight == 0)
            assert same.float().mean() > 0.99  # sums in another order may turn a close decision
            torch.testing.assert_close(weights[name][same], solution.weight[same], rtol=1e-2, atol=1e-3)


@ALL
@METHOD
@SEQUENTIAL
def test_all_tokens_for_all_experts(case, method, true_sequential, seen):
    dense = case.build()
    model = copy.deepcopy(dense)
    pruner = prune(model, method=method, true_sequential=true_sequential, calibrate_all_experts=True)
    entries = {entry.name: entry for entry in pruner.report.matrices}
    for rows in rows_of(case, model, dense, true_sequential):
        for name in rows.names:
            assert entries[name].layer_share == 1.0
            assert seen[name][0] == entries[name].num_tokens
            sums = seen[name][1] * len(rows.layer) / max(seen[name][0], 1)
            assert_close(sums, rows.layer.T @ rows.layer)


@ALL
@SEQUENTIAL
def test_one_token_is_enough_if_asked(case, true_sequential, seen):
    """Then no token of other experts takes part, but for an expert that has none of its own."""
    dense = case.build()
    model = copy.deepcopy(dense)
    pruner = prune(model, method="wanda", true_sequential=true_sequential, min_expert_tokens=1)
    entries = {entry.name: entry for entry in pruner.report.matrices}
    for rows in rows_of(case, model, dense, true_sequential):
        for name in rows.names:
            assert entries[name].layer_share == (0.0 if len(rows.own) else 1.0)
            alone = rows.own if len(rows.own) else rows.layer / len(rows.layer) ** 0.5
            assert_close(seen[name][1], alone.T @ alone)


@SEQUENTIAL
@pytest.mark.parametrize("name", ["mixtral", "jetmoe", "llama4"])
def test_other_experts_are_not_disturbed(name, true_sequential):
    """Everything but the experts themselves is as it was, and models run as before."""
    case = CASES[name]
    model, dense = case.build(), case.build()
    pruner = prune(model, method="wanda", true_sequential=true_sequential, targets=["*experts*", "*put_linear*"])
    touched = {entry.name.rpartition(".")[0] for entry in pruner.report.matrices}
    assert touched == {short(m, n).rpartition(".")[0] for m in case.modules for n in names_of(case, model, m)}
    for (parameter, after), (_, before) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        assert (parameter.removesuffix(".weight") in touched) != torch.equal(after, before), parameter
    for (buffer, after), (_, before) in zip(model.named_buffers(), dense.named_buffers(), strict=True):
        assert torch.equal(after, before), buffer
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def names_of(case: Case, model: nn.Module, module: str) -> list[str]:
    parameters = model.get_submodule(module).named_parameters()
    return [f"{name}.0" for name, value in parameters if value.ndim == 3 or name.startswith("mlp.")]


@SEQUENTIAL
def test_experts_that_do_nothing_with_their_tokens_are_named(true_sequential):
    """LongCat-Flash has identities among its experts, and weights for them that no token is multiplied with."""
    model, dense = CASES["longcat_flash"].build(), CASES["longcat_flash"].build()
    pruner = prune(model, method="wanda", true_sequential=true_sequential)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        for identity in (4, 5):
            assert "run" in pruner.report.skipped[f"{name}.{identity}"]
            assert torch.equal(model.get_parameter(name)[identity], dense.get_parameter(name)[identity])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "jetmoe", "llama4", "hand-written"])
@METHOD
def test_chunks_give_the_same_bits(name, method, monkeypatch):
    """By block, the statistics of all experts need not fit in memory: the block is run once for each chunk of them."""
    runs, weights = [], []
    for memory in (
        2**30,
        2 * 12000,
    ):  # statistics may take half of it, a Gram matrix of 32 inputs takes 8192 bytes
        monkeypatch.setattr("optimum_sparse.stages.Stages._room", lambda stages, device, memory=memory: memory)
        model = CASES[name].build()
        count = [0]
        block = next(iter(CASES[name].modules.values()))
        model.get_submodule(block).register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        prune(model, method=method, true_sequential=False)
        runs.append(count[0])
        weights.append(dict(model.named_parameters()))
    assert runs[1] > runs[0] or method == "wanda"
    for parameter, value in weights[0].items():
        assert torch.equal(value, weights[1][parameter]), parameter
