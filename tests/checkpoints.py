"""Tiny model folders with a tokenizer, such as a user has on disk, and a text to calibrate on."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .helpers import tiny_model

# As the special tokens of `helpers`: ids 0, 1 and 2.
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, within the vocabulary of `helpers.tiny_model`."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_tiny(folder: Path, architecture: str = "llama", tokenizer: bool = True, **overrides) -> PreTrainedModel:
    """Write a tiny model to `folder`, with a tokenizer unless told otherwise, and return the model."""
    model = tiny_model(architecture, **overrides)
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return model


def write_text(path: Path) -> Path:
    """Write a text of a few thousand characters that does not repeat itself."""
    path.write_text("\n".join(f"Line {n}: {n * n} is the square of {n}, {n**3} its cube." for n in range(100)))
    return path


def write_gguf(path: Path, pre_tokenizer: str = "smollm") -> Path:
    """Write a Llama of two blocks as SmolLM2 comes: weights of 8 bits, its tokenizer's kind, one merge."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    matrices = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    matrices |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    shapes = {f"blk.{block}.{name}": shape for block in range(2) for name, shape in matrices.items()}
    generator, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    for name, shape in {"token_embd": (len(tokens), 64), **shapes}.items():
        values = generator.standard_normal(shape, dtype=np.float32) / 8
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm", *(f"blk.{block}.{norm}" for block in range(2) for norm in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
