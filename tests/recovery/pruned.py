"""Tiny pruned models, made without the package's own pruning."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.helpers import tiny_model

# Fused experts, in the two layouts that transformers has.
_EXPERTS = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.1,
    max_position_embeddings=128,
    pad_token_id=0,
)


def expert_model(architecture: str, **overrides) -> PreTrainedModel:
    """A tiny mixture of experts: "mixtral" `[experts, out, in]` or "gpt_oss" `[experts, in, out]`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, **(_EXPERTS | overrides)), dtype=torch.float32
        )
    model.set_experts_implementation("eager")
    return model.eval()


def pruned_model(architecture: str = "llama", sparsity: float = 0.5, seed: int = 0, **overrides) -> PreTrainedModel:
    """A tiny model with random zeros in its linear layers and fused experts, and the record that belongs to them."""
    experts = architecture in ("mixtral", "gpt_oss")
    model = expert_model(architecture, **overrides) if experts else tiny_model(architecture, seed=seed, **overrides)
    matrices = {}
    generator = torch.Generator().manual_seed(seed + 100)

    def prune(name: str, weight: torch.Tensor, transposed: bool) -> None:
        zeros = int(sparsity * weight.numel())
        chosen = torch.randperm(weight.numel(), generator=generator)[:zeros]
        weight.view(-1)[chosen] = 0
        matrices[name] = {
            "zeros": int((weight == 0).sum()),
            "numel": weight.numel(),
            "pattern": None,
            "shape": list(weight.T.shape if transposed else weight.shape),
            "transposed": transposed,
        }

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head":
                prune(name, module.weight, isinstance(module, Conv1D))
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    for expert in range(len(parameter)):
                        prune(f"{name}.{parameter_name}.{expert}", parameter[expert], architecture == "gpt_oss")
    zeros, numel = (sum(entry[key] for entry in matrices.values()) for key in ("zeros", "numel"))
    model.config.sparsity_config = {
        "method": "random",
        "pattern": None,
        "sparsity": sparsity,
        "achieved_sparsity": round(zeros / numel, 6),
        "base_model": None,
        "base_revision": None,
        "dataset": None,
        "num_samples": None,
        "num_tokens": None,
        "seed": seed,
        "versions": {},
        "matrices": matrices,
    }
    return model


def zero_positions(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where each parameter of two or more dimensions is zero."""
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.ndim >= 2}


def assert_zeros_kept(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Every weight that was zero is zero now; parameters are compared by name."""
    parameters = dict(model.named_parameters())
    assert before
    for name, zeros in before.items():
        assert (parameters[name][zeros] == 0).all(), f"{name} has lost zeros"
