"""The probe: order, shared inputs, repeated uses, routers and copies, on modules that do one thing each."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from optimum_sparse.matrices import find_blocks, find_weights
from optimum_sparse.trace import Trace, trace
from optimum_sparse.uses import View, WeightUses
from tests.architectures import sweep_batches, sweep_model
from tests.beyond_text import Decoder, Experts, random_model
from tests.helpers import tiny_batches, tiny_model

DIM, INNER, EXPERTS, ROWS = 8, 12, 4, 6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trace_of(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None) -> Trace:
    parameters = {weight.parameter: weight.value for weight in find_weights(model)}
    with torch.no_grad():
        return trace(forward or model, batches, model, parameters, find_blocks(model))


def trace_of_text(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]) -> Trace:
    model.set_experts_implementation("eager")
    return trace_of(model, batches, lambda batch: model(**batch, use_cache=False))


def short(member: View | str) -> str:
    """`name.part`, or the name of a module; `.weight` is left out."""
    return member if isinstance(member, str) else f"{member.parameter.removesuffix('.weight')}.{member.part}"


def shorts(members: Iterable[View | str]) -> list[str]:
    return [short(member) for member in members]


def layers(*names: str, **sizes: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(DIM, sizes.get(name, DIM), bias=False) for name in names})


class Does(nn.Module):
    """A module that does what a function says with its layers."""

    def __init__(self, function: Callable[..., torch.Tensor], **modules: Any) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, inputs: Any) -> torch.Tensor:
        return self.function(self, inputs)


def linears(*names: str, **sizes: int) -> dict[str, nn.Module]:
    return dict(layers(*names, **sizes).items())


# Order, and which of the weights share their inputs.


def test_order_and_shared_inputs_of_a_decoder():
    model = tiny_model()
    seen = trace_of_text(model, tiny_batches())
    attention, mlp = "model.layers.{}.self_attn.{}_proj.0", "model.layers.{}.mlp.{}_proj.0"
    expected: list[list[str]] = []
    for layer in range(2):
        expected.append([attention.format(layer, part) for part in "qkv"])
        expected.append([attention.format(layer, "o")])
        expected.append([mlp.format(layer, part) for part in ("gate", "up")])
        expected.append([mlp.format(layer, "down")])
    expected.append(["lm_head.0"])
    assert [shorts(stop) for stop in seen.stops(list(seen.inputs))] == expected
    assert shorts(seen.order) == [name for group in expected for name in group]
    assert not seen.repeated and not seen.routers and not seen.copied
    blocks = {short(view): block for view, block in seen.blocks.items()}
    assert blocks["model.layers.0.mlp.down_proj.0"] == "model.layers.0"
    assert blocks["model.layers.1.self_attn.q_proj.0"] == "model.layers.1"
    assert blocks["lm_head.0"] is None


def parallel(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """As in GPT-J, where attention and MLP have one input."""
    mixed = module.output(module.query(inputs) * module.key(inputs))
    return mixed + module.down(module.up(inputs))


@pytest.mark.parametrize(
    ("chosen", "stops"),
    [
        (["query", "key", "output", "up", "down"], [["query", "key", "up"], ["output"], ["down"]]),
        (["key", "output", "up"], [["key", "up"], ["output"]]),
        (["output", "up", "down"], [["output"], ["up"], ["down"]]),
        (["down"], [["down"]]),
        ([], []),
    ],
)
def test_a_stop_is_where_its_first_chosen_member_is_used(chosen, stops):
    model = Does(parallel, **linears("query", "key", "output", "up", "down"))
    seen = trace_of(model, [random(ROWS, DIM)])
    views = [view for view in seen.order if short(view).partition(".")[0] in chosen]
    assert [[short(view).partition(".")[0] for view in stop] for stop in seen.stops(views)] == stops


def inputs_of(function: Callable[..., torch.Tensor]) -> list[int]:
    """Numbers of the inputs of the layers `a` and `b`."""
    seen = trace_of(Does(function, **linears("a", "b")), [random(2, ROWS, DIM)])
    numbers = {short(view): number for view, number in seen.inputs.items()}
    return [numbers["a.0"], numbers["b.0"]]


def overwritten(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    first = module.a(inputs)
    return first + module.b(inputs.add_(1))


SAME = {
    "the same tensor": lambda m, x: m.a(x) + m.b(x),
    "a view of all of it": lambda m, x: m.a(x) + m.b(x.view_as(x)),
    "dropout that is off": lambda m, x: m.a(x) + m.b(F.dropout(x, training=False)),
}
OTHER = {
    "another tensor": lambda m, x: m.a(x) + m.b(x + 0),
    "a part of it": lambda m, x: m.a(x)[1:] + m.b(x[1:]),
    "overwritten in between": overwritten,
    "one after the other": lambda m, x: m.b(m.a(x)),
    "memory that was freed": lambda m, x: sum((m.a(x + 0), m.b(x + 1))),
    "no rows": lambda m, x: m.a(x[:0]) + m.b(x[:0]),
}


@pytest.mark.parametrize("function", SAME.values(), ids=SAME)
def test_the_same_inputs(function):
    first, second = inputs_of(function)
    assert first == second


@pytest.mark.parametrize("function", OTHER.values(), ids=OTHER)
def test_other_inputs(function):
    first, second = inputs_of(function)
    assert first != second


def test_repeated_uses_have_no_stop():
    model = Does(lambda m, x: m.once(m.twice(m.twice(x))), **linears("once", "twice"))
    seen = trace_of(model, [random(ROWS, DIM)])
    assert shorts(seen.repeated) == ["twice.0"]
    assert shorts(seen.order) == ["twice.0", "once.0"]
    assert [shorts(stop) for stop in seen.stops(list(seen.inputs))] == [["once.0"]]


def test_repeated_in_any_of_the_forwards_is_repeated():
    def depends(module: Any, inputs: torch.Tensor) -> torch.Tensor:
        for _ in range(len(inputs)):
            inputs = module.layer(inputs)
        return inputs if len(inputs) == 1 else module.late(inputs)

    batches = [random(1, DIM), random(2, DIM)]
    seen = trace_of(Does(depends, **linears("layer", "late")), batches)
    assert shorts(seen.repeated) == ["layer.0"]


# Several forwards.


def route(module: Any, path: str) -> torch.Tensor:
    """Runs the layers that `path` names."""
    hidden = random(ROWS, DIM)
    for name in path:
        hidden = hidden + module.steps[name](hidden)
    return hidden


@pytest.mark.parametrize(
    ("paths", "order"),
    [
        (["ac", "abc"], "abc"),  # in its place, not at the end
        (["ac", "bc"], "bac"),  # behind nothing that is known
        (["abd", "acd"], "acbd"),
        (["ad", "abd", "bcd"], "abcd"),
        (["ab", "cd"], "cdab"),
        (["b", "ab", "abc", "d"], "dabc"),
    ],
)
def test_forwards_that_take_different_paths(paths, order):
    """What a later forward shows comes right behind what came before it there."""
    model = Does(route, steps=layers(*"abcd"))
    seen = trace_of(model, paths)
    assert shorts(seen.order) == [f"steps.{name}.0" for name in order]
    for path in paths:
        # Whichever path a batch takes, its stops come in order.
        places = [shorts(seen.order).index(f"steps.{name}.0") for name in path]
        assert places == sorted(places)
    assert len(set(seen.inputs.values())) == len(order)


def test_no_more_forwards_than_it_takes_to_see_everything():
    taken: list[str] = []

    def paths() -> Iterable[str]:
        for path in ("ab", "b", "abc", "a", "abcd", "dcba", "a"):
            taken.append(path)
            yield path

    seen = trace_of(Does(route, steps=layers(*"abcd")), paths())
    assert taken == ["ab", "b", "abc", "a", "abcd"]
    assert shorts(seen.order) == [f"steps.{name}.0" for name in "abcd"]


def test_inputs_that_only_a_later_forward_shows():
    """Weights that are alike in the second forward share a stop, and are told from those of the first."""

    def gated(module: Any, length: int) -> torch.Tensor:
        hidden = module.first(random(length, DIM))
        return module.up(hidden) * module.gate(hidden) if length > 1 else hidden

    seen = trace_of(Does(gated, **linears("first", "up", "gate")), [1, 2])
    assert [shorts(stop) for stop in seen.stops(list(seen.inputs))] == [["first.0"], ["up.0", "gate.0"]]


# Experts that no token is routed to.


class MatrixByMatrix(Experts):
    """All experts that are hit through the first matrices, then all of them through the last one."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, 1)
        chosen = F.linear(flat, self.router).argmax(dim=-1)
        inner: dict[int, torch.Tensor] = {}
        for expert in chosen.unique().tolist():
            inner[expert] = F.linear(flat[chosen == expert], self.w1[expert])
        result = torch.zeros_like(flat)
        for expert, mine in inner.items():
            result[chosen == expert] = F.linear(mine, self.w2[expert])
        return result.view_as(hidden)


def hand_written(experts: type[nn.Module]) -> nn.Module:
    return random_model(lambda: Decoder(experts))


def parts_with_tokens(model: nn.Module, ids: torch.Tensor) -> set[View]:
    found: set[View] = set()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
    with torch.no_grad(), WeightUses(parameters, lambda use: found.add(use.view) if use.inputs.numel() else None):
        model(input_ids=ids)
    return found


def groups_of(seen: Trace) -> list[list[str]]:
    return [[stop] if isinstance(stop, str) else shorts(stop) for stop in seen.stops(list(seen.inputs))]


# name -> a model, and how many tokens some of its experts, but not all of them, get something of
WITH_EXPERTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "one by one": (lambda: hand_written(Experts), 2),
    "matrix by matrix": (lambda: hand_written(MatrixByMatrix), 6),
    **{
        model_type: (lambda model_type=model_type: sweep_model(model_type), 2)
        for model_type in ("mixtral", "gpt_oss", "dbrx", "nemotron_h", "longcat_flash", "jetmoe", "qwen3_next")
    },
}


@pytest.mark.parametrize(("build", "tokens"), WITH_EXPERTS.values(), ids=WITH_EXPERTS)
def test_experts_that_were_not_used_stand_where_they_would_run(build, tokens):
    """A few tokens show the same order and the same groups as a batch in which every expert has some."""
    model = build()
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("eager")
    options = {"use_cache": False} if isinstance(model, PreTrainedModel) else {}

    def forward(ids: torch.Tensor) -> Any:
        return model(input_ids=ids, **options)

    ids = torch.randint(3, 120, (8, 24), generator=torch.Generator().manual_seed(1))
    few = ids[:1, :tokens]
    full, seen = trace_of(model, [ids], forward), trace_of(model, [few], forward)
    assert parts_with_tokens(model, few) < parts_with_tokens(model, ids)
    assert shorts(seen.order) == shorts(full.order)
    assert groups_of(seen) == groups_of(full)
    assert seen.blocks == full.blocks and seen.routers == full.routers


def test_experts_of_a_parameter_that_is_not_used_at_all_are_not_made_up():
    model = hand_written(Experts)
    model.stack[1].feed_forward = nn.Identity()
    model.stack[1].unused = Experts()
    seen = trace_of(model, [torch.arange(3, 9)[None]])
    assert not [view for view in seen.inputs if view.parameter.startswith("stack.1.unused")]
    assert len([view for view in seen.inputs if view.parameter.startswith("stack.0.feed_forward.w1")]) == 4


def test_modules_of_experts_are_stops_of_their_own():
    """Those that are told who takes which token; they come before their matrices."""
    model = sweep_model("mixtral")
    seen = trace_of_text(model, sweep_batches(model, num=1))
    modules = [member for member in seen.order if isinstance(member, str)]
    assert modules == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for module in modules:
        place = seen.order.index(module)
        inside = [i for i, member in enumerate(seen.order) if isinstance(member, View) and module in member.parameter]
        assert min(inside) == place + 1


# Routers.


def weighted(scores: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Something that is computed from the best scores."""
    return scores.sum() * inputs


def by_bias(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """As DeepSeek-V3: a bias decides who is chosen, but has no part in the weights."""
    scores = module.gate(inputs).float().softmax(-1).sigmoid()
    chosen = (scores + torch.linspace(0, 1, EXPERTS)).topk(2, dim=-1).indices
    return weighted(scores.gather(1, chosen), inputs)


def by_groups(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Only experts of the best group take part."""
    scores = module.gate(inputs).sigmoid()
    group = scores.view(-1, 2, EXPERTS // 2).topk(1, dim=-1).values.sum(-1).argmax(-1)
    mask = F.one_hot(group, 2).repeat_interleave(EXPERTS // 2, dim=-1) == 0
    return weighted(torch.topk(scores.masked_fill(mask, 0), 2).values, inputs)


def by_product_keys(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The outputs are the scores of the rows and of the columns of a table of experts."""
    rows, columns = module.gate(inputs).view(-1, 2, EXPERTS // 2).topk(1, dim=-1).values.unbind(1)
    return weighted(rows + columns, inputs)


def some_always(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The last expert takes all tokens; only the others compete."""
    scores = module.gate(inputs).sigmoid()
    return weighted(scores[..., :-1].topk(2, dim=-1).values, inputs) + scores[..., -1:]


def in_place(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    scores = module.gate(inputs)
    scores -= scores.mean(-1, keepdim=True)
    return weighted(scores.topk(2).values, inputs)


def looked_up(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The experts of a token are fixed, only their weights are computed."""
    fixed = torch.arange(len(inputs))[:, None] % EXPERTS
    scores = module.gate(inputs).gather(1, fixed)
    return scores * torch.stack([F.linear(inputs, expert) for expert in module.experts]).sum(0)


GATE = linears("gate", gate=EXPERTS)
ROUTERS: dict[str, Callable[..., torch.Tensor]] = {
    "topk": lambda m, x: weighted(m.gate(x).topk(2)[0], x),
    "torch.topk with keywords": lambda m, x: weighted(torch.topk(m.gate(x), k=2, dim=-1)[0], x),
    "topk of dim 1": lambda m, x: weighted(m.gate(x).topk(2, 1)[0], x),
    "topk of softmax": lambda m, x: weighted(m.gate(x).softmax(-1, dtype=torch.float64).topk(2).values, x),
    "max": lambda m, x: weighted(m.gate(x).softmax(-1).max(-1).values, x),
    "max with a keyword": lambda m, x: weighted(torch.max(m.gate(x), dim=1).values, x),
    "argmax": lambda m, x: weighted(F.one_hot(m.gate(x).argmax(dim=-1), EXPERTS), x),
    "sort": lambda m, x: weighted(m.gate(x).sort(descending=True).values[..., :2], x),
    "argsort": lambda m, x: weighted(m.gate(x).argsort(-1)[..., :2], x),
    "kthvalue": lambda m, x: weighted(m.gate(x).kthvalue(2).values, x),
    "a bias for the choice": by_bias,
    "groups": by_groups,
    "product keys": by_product_keys,
    "some experts always": some_always,
    "in place": in_place,
    "three dimensions": lambda m, x: weighted(m.gate(x[None]).view(-1, EXPERTS).topk(2).values, x),
    "noise": lambda m, x: weighted((m.gate(x) * 0.5 + torch.ones(EXPERTS)).topk(2).values, x),
    "clamped": lambda m, x: weighted(m.gate(x).clamp(-1, 1).log_softmax(-1).exp().topk(2).values, x),
}


@pytest.mark.parametrize("function", ROUTERS.values(), ids=ROUTERS)
def test_what_is_ranked_is_a_router(function):
    seen = trace_of(
        Does(lambda m, x: m.after(function(m, m.before(x))), **linears("before", "after"), **GATE), [random(ROWS, DIM)]
    )
    assert shorts(seen.routers) == ["gate.0"]


def test_a_gather_by_a_table_ranks_as_many_outputs_as_there_are_experts():
    experts = nn.Parameter(random(EXPERTS, DIM, DIM))
    seen = trace_of(Does(looked_up, **GATE, experts=experts), [random(ROWS, DIM)])
    assert shorts(seen.routers) == ["gate.0"]


def thinned(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """A wide layer of which only the largest activations are kept."""
    inner = module.wide(inputs)
    return module.narrow(inner * (inner >= inner.kthvalue(INNER - 4, dim=-1, keepdim=True).values))


def ranked_stream(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """A head over the residual stream: what was added to it is not what is ranked."""
    hidden = inputs + module.narrow(inputs.repeat(1, 2)[:, :INNER])
    return hidden.topk(2, dim=-1).values


def relative_positions(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """As DeBERTa: scores of all distances, of which each pair of tokens picks its own."""
    distances = (torch.arange(ROWS)[:, None] - torch.arange(ROWS)).clamp(0, 4)
    return module.position(inputs).gather(-1, distances)


def over_time(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """As the stabilizer of an xLSTM: the largest of all steps, not of all outputs."""
    gates = module.position(inputs)
    return gates.T.max(dim=-1).values + gates.max(dim=0).values


def attended(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Keys and queries are narrow, and their products are ranked."""
    return (module.position(inputs) @ module.position(inputs + 1).T).topk(2, dim=-1).values


NO_ROUTERS: dict[str, tuple[Callable[..., torch.Tensor], dict[str, nn.Module]]] = {
    "a wide layer that is thinned out": (
        thinned,
        {"wide": nn.Linear(DIM, INNER), "narrow": nn.Linear(INNER, DIM)},
    ),
    "the residual stream": (ranked_stream, {"narrow": nn.Linear(INNER, DIM)}),
    "relative positions": (relative_positions, linears("position", position=5)),
    "a maximum over time": (over_time, linears("position", position=5)),
    "products of outputs": (attended, linears("position", position=5)),
    "a maximum of everything": (lambda m, x: x / m.position(x).max(), linears("position", position=5)),
    "a sum": (lambda m, x: m.position(x).sum(-1).topk(2).values, linears("position", position=5)),
}


@pytest.mark.parametrize(("function", "modules"), NO_ROUTERS.values(), ids=NO_ROUTERS)
def test_what_is_no_router(function, modules):
    seen = trace_of(Does(function, **modules), [random(ROWS, DIM)])
    assert not seen.routers
    assert {view.parameter.partition(".")[0] for view in seen.inputs} == modules.keys()


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("mixtral", "mlp.gate"),
        ("gpt_oss", "mlp.router"),
        ("jetmoe", "router.layer"),
        ("llama4_text", "feed_forward.router"),
        ("longcat_flash", "mlp.router.classifier"),
        ("dbrx", "ffn.router.layer"),
        ("deepseek_v3", "mlp.gate"),
        ("deepseek_v4", "mlp.gate"),  # of some layers a table says which experts a token is routed to
        ("doge", "mlp.router_gate"),
        ("inkling_text", "mlp.gate"),
        ("hunyuan_v1_moe", "mlp.gate.wg"),
        ("zaya", "mlp.gate"),  # several layers, of which the last is ranked
        ("llama", None),
        ("xlstm", None),
        ("gemma3n_text", None),  # its feed-forward networks keep the largest activations
        ("recurrent_gemma", None),
    ],
)
def test_routers_of_models(model_type, name):
    """All of those that their names give away, and no others."""
    model = sweep_model(model_type)
    expected = {n for n, p in model.named_parameters() if name and p.ndim == 2 and f"{name}." in n}
    assert bool(expected) == bool(name)
    seen = trace_of_text(model, sweep_batches(model))
    assert {view.parameter for view in seen.routers} == expected


# Copies, whose inputs cannot be seen.


def gathered(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Each token brings a copy of its expert."""
    return torch.bmm(inputs[:, None], module.experts[torch.arange(len(inputs)) % EXPERTS].mT)


COPIES: dict[str, Callable[..., torch.Tensor]] = {
    "gathered": gathered,
    "index_select": lambda m, x: torch.bmm(x[:EXPERTS, None], m.experts.index_select(0, torch.arange(EXPERTS)).mT),
    "cast": lambda m, x: x.double() @ m.experts.double()[0].mT,
    "cast, then taken apart": lambda m, x: sum(F.linear(x.bfloat16(), w) for w in m.experts.bfloat16().unbind()),
    "scaled": lambda m, x: F.linear(x, m.experts[0] * 0.5),
    "normalized": lambda m, x: F.linear(x, m.experts[0] / m.experts[0].norm(dim=-1, keepdim=True)),
    "contiguous": lambda m, x: x @ m.experts[1].T.contiguous(),
    "einsum over a gather": lambda m, x: torch.einsum("ti,toi->to", x[:2], m.experts[torch.tensor([0, 3])]),
}


@pytest.mark.parametrize("function", COPIES.values(), ids=COPIES)
def test_copies_of_parameters_are_named(function):
    model = Does(
        lambda m, x: function(m, m.before(x)), **linears("before"), experts=nn.Parameter(random(EXPERTS, DIM, DIM))
    )
    seen = trace_of(model, [random(ROWS, DIM)])
    assert seen.copied == {"experts"}
    assert shorts(seen.order) == ["before.0"]


def test_what_is_made_of_activations_is_no_copy():
    def forward(module: Any, inputs: torch.Tensor) -> torch.Tensor:
        hidden = module.before(inputs) * module.scale[0]
        hidden = hidden + module.table[torch.arange(len(inputs))]
        return hidden @ hidden.T

    parameters = dict(scale=nn.Parameter(random(2, DIM)), table=nn.Parameter(random(ROWS, DIM)))
    seen = trace_of(Does(forward, **linears("before"), **parameters), [random(ROWS, DIM)])
    assert not seen.copied


def test_nothing_is_left_behind_on_the_model():
    model = tiny_model()
    trace_of_text(model, tiny_batches())
    with pytest.raises(ValueError, match="as it is"):
        trace_of(model, [None], lambda _: (_ for _ in ()).throw(ValueError("as it is")))
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_the_probe_lets_go_of_what_it_has_seen() -> None:
    """Or it would take the more memory the more blocks there are."""
    model, seen = tiny_model("llama", num_hidden_layers=3), []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: seen.append(weakref.ref(args[0].untyped_storage()))
    )
    model.model.layers[2].register_forward_pre_hook(lambda *args: seen.append(seen[0]()))
    trace_of_text(model, tiny_batches(1))
    assert seen[1] is None


def test_what_is_never_in_a_product_is_not_waited_for():
    """Weights of convolutions, and tables such as those of state spaces."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(DIM, DIM)
            self.table = nn.Parameter(torch.ones(DIM, 3))
            self.conv = nn.Conv1d(DIM, DIM, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv((self.inner(x) * self.table.sum(1)).T)

    seen: list[int] = []

    def batches() -> Iterable[torch.Tensor]:
        for index in range(5):
            seen.append(index)
            yield random(ROWS, DIM)

    model = Mixer()
    parameters = {w.parameter: w.value for w in find_weights(model) if not w.is_convolution}
    assert parameters.keys() == {"inner.weight", "table"}
    with torch.no_grad():
        trace(model, batches(), model, parameters, [])
    assert seen == [0]
