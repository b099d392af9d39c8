"""One tiny random model for each causal language model type of Transformers, and batches to run them on.

`python -m tests.architectures [model type ...]` builds them and prints what they hold.
"""

import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL_LM_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_ASSISTANT = "drafts for another model: its forward takes keys, values and hidden states of that one, not tokens"
# model type -> why there is no model of it here
MISSING: dict[str, str] = {
    "gemma3n": "its vision tower needs the packages timm and pillow; its text tower is gemma3n_text",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
}

VOCABULARY = 128
# Of random weights: several times the usual 0.02, so that every layer matters to the next one.
STD = 0.1

# largest value -> the fields of configurations that it holds for; a default that is smaller, or None, stays
_LIMITS = {
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group num_expert_group topk_group "
    "first_k_dense_replace num_dense_layers",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k zero_expert_num "
    "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads linear_num_heads "
    "heads_per_ngram no_rope_layer_interval",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts index_n_heads index_topk patch_size "
    "split_ngram_parts",
    8: "head_dim swa_head_dim dim_head d_head d_kv kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "rotary_dim attention_head_size index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim time_step_rank mamba_dt_rank "
    # shorter than the rows of `sweep_batches`
    "mamba_chunk_size chunk_size block_size sliding_window sliding_window_size attention_window_size window_size "
    "attention_chunk_size local_attention keep_window_size",
    16: "kv_lora_rank q_lora_rank o_lora_rank laurel_rank gated_norm_rank hidden_size_per_layer_input rel_extent "
    "image_size",
    # neither the hidden size nor half of it, so that the shapes of fused experts have no two sides equal
    24: "moe_intermediate_size expert_ffn_hidden_size",
    32: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width "
    "input_embedding_size",
    40: "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size "
    "shared_experts_intermediate_size",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff dff d_inner d_ff mlp_dim "
    "feed_forward_size dense_intermediate_size intermediate_size_mlp",
    VOCABULARY: "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input max_position_embeddings "
    "n_positions n_ctx max_seq_len model_max_length context_length max_source_positions max_target_positions",
}
_AT_MOST = {
    **{field: limit for limit, fields in _LIMITS.items() for field in fields.split()},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_ALWAYS = {"initializer_range": STD, "init_std": STD, "is_decoder": True}
# fields that list the kind of each layer
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")

_SLIDING_FIRST = ["sliding_attention", "full_attention"]
_SLIDING_LAST = ["full_attention", "sliding_attention"]
_DENSE_FIRST = ["dense", "sparse"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_LLAMA4 = {"interleave_moe_layer_step": 2, "num_experts_per_tok": 2}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "eos_token_id": 2,
}
# model type -> what the rules do not shrink, what they shrink to sizes that do not fit each other, and kinds of layers
# that the default does not have; a dict under the name of an inner configuration is for that one
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "decoder_config": {"hidden_size_global": 64},
        "global_config": dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=8),
    },
    "cohere2_moe": {"mlp_layer_types": _DENSE_FIRST},
    # the default has no rotary parameters for its own kind of layers
    "cohere_compass_text": {"layer_types": _SLIDING_FIRST, "rope_parameters": dict.fromkeys(_SLIDING_FIRST, _ROPE)},
    "cpmant": {"prompt_types": 4, "prompt_length": 4},
    # the model reads `rope_theta`, which the configuration of this version does not declare
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "o_groups": 2,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "doge": {"is_moe": True, "num_experts": 16},  # product keys: 4 x 4 experts
    "dots1": {
        "layer_types": _SLIDING_LAST,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {  # the class is its text tower; the other two are only checked
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_FIRST * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4": {
        "text_config": {"global_head_dim": 16, "attention_k_eq_v": True},
        "vision_config": {"position_embedding_size": 16},
        "audio_config": {"output_proj_dims": 32, "subsampling_conv_channels": [8, 8]},
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_FIRST * 2,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "gemma4_unified": {
        "text_config": {"global_head_dim": 16},
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
        "audio_config": {"audio_embed_dim": 32},
    },
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "got_ocr2": {"vision_config": {"output_channels": 16, "image_size": 64, "global_attn_indexes": [1]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {"intermediate_size": 32},  # square experts, as in the released models: shapes do not tell in from out
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "inkling_text": {"mlp_layer_types": _DENSE_FIRST},
    "jamba": {"attn_layer_offset": 1},
    "laguna": {"layer_types": _SLIDING_LAST},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mellum": {"layer_types": _SLIDING_LAST, "mlp_layer_types": _DENSE_FIRST},
    "minimax_m3_vl_text": {"mlp_layer_types": _DENSE_FIRST},
    "ministral": {"layer_types": _SLIDING_FIRST},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "musicgen": {"decoder": {"num_codebooks": 2}},
    "musicgen_melody": {"decoder": {"num_codebooks": 2}},
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 1},
    "phi4_multimodal": {
        "vision_config": {"image_size": 28},
        "audio_config": dict(
            num_blocks=2, ext_pw_out_channel=32, depthwise_separable_out_channel=32, nemo_conv_channels=8
        ),
    },
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,  # else the first forward chooses it for all that follow
        "hash_seed": 0,  # else each forward hashes anew
    },
    "rembert": {"output_embedding_size": 32},
    "roc_bert": dict(pronunciation_embed_dim=16, pronunciation_vocab_size=64, shape_embed_dim=16, shape_vocab_size=64),
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},  # its cache rounds sizes up to 64
    "xmod": {"default_language": "en_XX"},
    # two layers share one attention block
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "adapter_rank": 8,
    },
    "zaya": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "sliding_window": 8,
        "router_hidden_size": 16,
        "initializer_range": 0.3,  # with 0.1 its deep router sends all tokens to one expert
    },
}
# what the forward of these calls the states of an encoder
_ENCODER_STATES = {"mllama_text_model": "cross_attention_states", "whisper": "encoder_outputs"}


def sweep_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 causal language model in eval mode; the same seed gives the same bits.

    The global generator is left as it was. Parameters that a model leaves at zero, near zero, or at whatever the
    memory held are made random too: zeros would hide what comes before them, and tell nothing when they are pruned.

    Args:
        model_type: one of `CAUSAL_LM_TYPES`, and not of `MISSING`.
        seed: of the weights.
    """
    config = _shrunk(AutoConfig.for_model(model_type), _SPECIAL.get(model_type, {}))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if hasattr(config, "decoder"):  # MusicGen: the class in the mapping is the decoder alone
            model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
            model = model_class._from_config(config.decoder, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if not parameter.isfinite().all() or parameter.abs().max() < STD:
                parameter.normal_(0, STD)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # experts of each token [vocabulary, 2]; all zero as the model makes it
                buffer.copy_(torch.rand(len(buffer), config.n_routed_experts).topk(buffer.shape[1]).indices)
    return model.eval()


def sweep_batches(
    model: PreTrainedModel, num: int = 3, rows: int = 2, length: int = 24, seed: int = 1, encoder: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Batches that the forward of a sweep model accepts: `input_ids` [rows, length] int64.

    With `encoder`, decoders with cross-attention also get the states of an encoder, [rows, 10, hidden] fp32; without
    them that attention does not run. A row of MusicGen is one of two codebooks of a sample, so that `rows` is even.
    """
    generator = torch.Generator().manual_seed(seed)
    has_cross_attention = any(name.endswith(("encoder_attn", "cross_attn")) for name, _ in model.named_modules())
    states = _ENCODER_STATES.get(model.config.model_type, "encoder_hidden_states")
    samples = rows // getattr(model.config, "num_codebooks", 1)
    batches = []
    for _ in range(num):
        batch = {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)}
        if encoder and has_cross_attention:
            batch[states] = torch.randn(samples, 10, model.config.hidden_size, generator=generator)
        batches.append(batch)
    return batches


def _shrunk(config: PreTrainedConfig, special: dict[str, Any]) -> PreTrainedConfig:
    """The default configuration of a type, and those inside it, with all sizes shrunk."""
    values = vars(config)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name in config.sub_configs:  # None: optional, and left out by default
            fields[name] = _shrunk(value or config.sub_configs[name](), special.get(name, {}))
        elif name in _ALWAYS:
            fields[name] = _ALWAYS[name]
        elif name in _AT_MOST and isinstance(value, int):
            fields[name] = min(value, _AT_MOST[name])
        elif name in ("head_dim", "num_key_value_heads"):  # None: left to the model, which not every one expects
            fields[name] = _AT_MOST[name]
    heads = values.get("num_attention_heads")
    if heads and heads == values.get("num_key_value_heads"):  # no grouped queries; latent attention insists on it
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields |= _layer_kinds(values)
    fields |= {name: value for name, value in special.items() if name not in config.sub_configs}
    return type(config)(**fields)


def _layer_kinds(values: dict[str, Any]) -> dict[str, Any]:
    """As many layers as there are kinds of them, and at least two: one of each kind, in order of appearance."""
    kinds = {name: list(dict.fromkeys(values[name])) for name in _KINDS if values.get(name)}
    if not kinds:
        return {}
    count = max(2, *map(len, kinds.values()))
    return {"num_hidden_layers": count} | {name: (found * count)[:count] for name, found in kinds.items()}


def _check(model_types: list[str]) -> None:
    """Build models, run each one twice, and print a line about each."""
    begin = time.perf_counter()
    for model_type in model_types:
        start = time.perf_counter()
        model = sweep_model(model_type)
        batch = sweep_batches(model, num=1)[0]
        with torch.no_grad():
            first, second = (model(**batch, use_cache=False).logits for _ in range(2))
        parameters = list(model.parameters())
        print(
            f"{model_type:24}{sum(map(torch.numel, parameters)):8} parameters {time.perf_counter() - start:5.2f} s"
            f"{sum(isinstance(module, torch.nn.Linear) for module in model.modules()):4} Linear"
            f"{sum(parameter.ndim >= 3 for parameter in parameters):4} of 3 or more dimensions"
            f"  {'finite' if first.isfinite().all() else 'NOT FINITE'}"
            f", {'deterministic' if first.equal(second) else 'NOT DETERMINISTIC'}"
        )
    for model_type, reason in MISSING.items():
        print(f"{model_type:24} missing: {reason}")
    print(f"{len(model_types)} of {len(CAUSAL_LM_TYPES)} types, {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    _check(sys.argv[1:] or [name for name in CAUSAL_LM_TYPES if name not in MISSING])
