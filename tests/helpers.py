"""Tiny random decoder-only models, a few hundred kB each, and batches of tokens to run them on."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
HIDDEN = 32

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Weights ten times larger than the usual 0.02, so that every layer matters to the next one.
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.1,
    **_SPECIAL,
)
_HEADS_OF_8 = dict(_COMMON, head_dim=8)
_GPT2_STYLE = dict(
    vocab_size=VOCABULARY,
    n_embd=HIDDEN,
    n_layer=2,
    n_head=4,
    n_positions=128,
    initializer_range=0.1,
    tie_word_embeddings=False,
    **_SPECIAL,
)
_MPT = dict(d_model=HIDDEN, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=128, vocab_size=VOCABULARY)
_BLOOM = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=2, n_head=4, initializer_range=0.1, tie_word_embeddings=True
)

# model_type -> what its configuration needs to be tiny. Sliding windows are shorter than the rows of `tiny_batches`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _HEADS_OF_8,
    "mistral": dict(_HEADS_OF_8, sliding_window=8),
    "qwen2": _COMMON,
    "qwen3": _HEADS_OF_8,
    "phi": dict(_COMMON, partial_rotary_factor=0.5),
    "phi3": dict(_COMMON, sliding_window=8),  # q, k, v and gate, up are one matrix each
    "gpt2": _GPT2_STYLE,  # Conv1D: weights are [in, out]
    "gptj": dict(_GPT2_STYLE, rotary_dim=8),  # attention and MLP share their input
    "opt": dict(_COMMON, ffn_dim=64, word_embed_proj_dim=HIDDEN, init_std=0.1),
    "bloom": _BLOOM,
    "mpt": _MPT,
    "gpt_neox": _COMMON,
    "falcon": dict(_COMMON, ffn_hidden_size=64),  # a subclass of nn.Linear
    "gemma3_text": dict(_HEADS_OF_8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "cohere": dict(_COMMON, logit_scale=1.0),
    "starcoder2": dict(_COMMON, sliding_window=8),
    "stablelm": _COMMON,
    "olmo2": _COMMON,  # norms after the matrices
    "jamba": dict(
        _COMMON,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=99,  # Mamba and attention blocks, no experts
        expert_layer_offset=98,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "falcon_h1": dict(  # Mamba-2 and attention side by side in each block
        _HEADS_OF_8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=16,
        mamba_n_groups=1,
    ),
    "lfm2": dict(  # short convolutions and attention
        _COMMON, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, block_ff_dim=64
    ),
    "zamba2": dict(  # one attention block with its own name in two places: tied weights
        _COMMON,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=4,
        mamba_headdim=16,
        num_mem_blocks=1,
        chunk_size=16,
        adapter_rank=8,
        attention_head_dim=16,
    ),
}


def tiny_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 causal language model in eval mode; the same seed gives the same bits.

    Args:
        architecture: a key of `ARCHITECTURES`.
        seed: of the weights; the global generator is left as it was.
        **overrides: further configuration fields.
    """
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def tiny_mixtral(**overrides: Any) -> PreTrainedModel:
    """A random fp32 mixture of four experts, two for each token."""
    options = {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **options), dtype=torch.float32)
    return model.eval()


def tiny_batches(
    num: int = 3, rows: int = 2, length: int = 24, seed: int = 1, padding: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Token dicts as a user would pass them: `input_ids` [rows, length] int64, and masks when padded.

    With `padding`, every second batch carries an `attention_mask` with padding at the right end of some of its rows.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(num):
        batch = {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)}
        if padding and index % 2 == 0:
            mask = torch.ones(rows, length, dtype=torch.int64)
            for row in range(1, rows):
                mask[row, length - 5 * row :] = 0
            batch["input_ids"] = batch["input_ids"].masked_fill(mask == 0, 0)
            batch["attention_mask"] = mask
        batches.append(batch)
    return batches
