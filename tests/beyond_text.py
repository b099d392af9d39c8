"""Tiny random models that are no causal language models of Transformers, with batches that their forward accepts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCABULARY = 128
HIDDEN = 32
ROWS = 2
LENGTH = 24
PIXELS = 16
MELS, FRAMES = 8, 40
IMAGE_TOKEN = VOCABULARY - 1
# Several times larger than the usual 0.02, so that every layer matters to the next one.
STD = 0.1

Batch = dict[str, Any]
_SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_ENCODER = dict(
    hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=STD
)
_SEQ2SEQ = dict(
    vocab_size=VOCABULARY,
    d_model=HIDDEN,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    init_std=STD,
    decoder_start_token_id=2,
    **_SPECIAL,
)


def random_model(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """What `build` returns, in eval mode; the same seed gives the same bits, and the global generator is left alone.

    Matrices that a model leaves at zero, or at whatever the memory held, are filled: they would tell nothing.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():
            if parameter.ndim >= 2 and not (parameter.isfinite().all() and parameter.any()):
                parameter.normal_(0, STD)
    return model.eval()


def tokens(generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    """`[ROWS, length]` int64, none of them special or that of an image."""
    return torch.randint(3, IMAGE_TOKEN, (ROWS, length), generator=generator)


def three(make: Callable[[torch.Generator], Batch], seed: int = 1) -> list[Batch]:
    """Three batches, all different."""
    generator = torch.Generator().manual_seed(seed)
    return [make(generator) for _ in range(3)]


def padded(batch: Batch) -> Batch:
    """The batch with the end of its second row replaced by padding, and a mask that says so."""
    ids = batch["input_ids"].clone()
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0
    return batch | {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def text(generator: torch.Generator) -> Batch:
    return {"input_ids": tokens(generator)}


# Encoders and decoders of text


def t5_model() -> nn.Module:
    return random_model(
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY,
                d_model=HIDDEN,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
                **_SPECIAL,
            )
        )
    )


def t5_batch(generator: torch.Generator) -> Batch:
    """The decoder reads another text, of another length."""
    return {"input_ids": tokens(generator), "decoder_input_ids": tokens(generator, 16)}


def bart_model() -> nn.Module:
    return random_model(lambda: BartForConditionalGeneration(BartConfig(max_position_embeddings=64, **_SEQ2SEQ)))


def bert_model() -> nn.Module:
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **_ENCODER, **_SPECIAL)
    return random_model(lambda: BertForMaskedLM(config))


# Sound and images


def whisper_model() -> nn.Module:
    config = WhisperConfig(num_mel_bins=MELS, max_source_positions=FRAMES // 2, max_target_positions=32, **_SEQ2SEQ)
    return random_model(lambda: WhisperForConditionalGeneration(config))


def whisper_batch(generator: torch.Generator) -> Batch:
    features = torch.randn(ROWS, MELS, FRAMES, generator=generator)
    return {"input_features": features, "decoder_input_ids": tokens(generator, 12)}


def vit_model() -> nn.Module:
    config = ViTConfig(image_size=PIXELS, patch_size=4, num_labels=8, **_ENCODER)
    return random_model(lambda: ViTForImageClassification(config))


def convnext_model() -> nn.Module:
    config = ConvNextConfig(
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 2, 1],
        num_labels=8,
        initializer_range=STD,
        layer_scale_init_value=0.5,  # 1e-6 by default, at which no layer would matter
    )
    return random_model(lambda: ConvNextForImageClassification(config))


def images(generator: torch.Generator, size: int = PIXELS) -> Batch:
    return {"pixel_values": torch.randn(ROWS, 3, size, size, generator=generator)}


# Images and text


def llava_model() -> nn.Module:
    vision = CLIPVisionConfig(image_size=PIXELS, patch_size=PIXELS // 2, **_ENCODER)
    language = LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, **_ENCODER, **_SPECIAL
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_layer=-1,  # of the default -2, the last layer of the tower would not matter
    )
    return random_model(lambda: LlavaForConditionalGeneration(config))


def llava_batch(generator: torch.Generator) -> Batch:
    """Each row has one image of 2 x 2 patches after its first token."""
    ids = tokens(generator)
    ids[:, 1:5] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images(generator)}


# Models that Transformers does not know


class Attention(nn.Module):
    """Causal self-attention of 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.output = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        parts = self.query_key_value(hidden).unflatten(-1, (3, 4, HIDDEN // 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 64, bias=False)
        self.up = nn.Linear(HIDDEN, 64, bias=False)
        self.down = nn.Linear(64, HIDDEN, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class Experts(nn.Module):
    """Four gated feed-forward networks, of which a router chooses two for each token; all weights bare parameters."""

    def __init__(self, experts: int = 4, inner: int = 24) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, HIDDEN))
        self.w1 = nn.Parameter(STD * torch.randn(experts, inner, HIDDEN))
        self.w3 = nn.Parameter(STD * torch.randn(experts, inner, HIDDEN))
        self.w2 = nn.Parameter(STD * torch.randn(experts, HIDDEN, inner))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, 1)
        scores, chosen = F.linear(flat, self.router).topk(2, dim=-1)
        scores = scores.softmax(-1)
        result = torch.zeros_like(flat)
        for expert in range(len(self.w1)):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            mine = flat[token]
            inner = F.silu(F.linear(mine, self.w1[expert])) * F.linear(mine, self.w3[expert])
            result.index_add_(0, token, F.linear(inner, self.w2[expert]) * scores[token, slot, None])
        return result.view_as(hidden)


class DecoderBlock(nn.Module):
    def __init__(self, feed_forward: Callable[[], nn.Module] = FeedForward) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(HIDDEN), Attention()
        self.norm2, self.feed_forward = nn.LayerNorm(HIDDEN), feed_forward()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.feed_forward(self.norm2(hidden))


class MemoryBlock(nn.Module):
    """Mixes tokens by a running mean instead of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.write = nn.Linear(HIDDEN, 48)
        self.forget = nn.Linear(HIDDEN, 48)
        self.read = nn.Linear(48, HIDDEN)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        steps = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype, device=hidden.device)
        mean = self.write(normed).cumsum(1) / steps[:, None]
        return hidden + self.read(mean * self.forget(normed).sigmoid())


class Decoder(nn.Module):
    """A decoder that is a plain `nn.Module`: no configuration, no base class, logits as its only output."""

    def __init__(self, feed_forward: Callable[[], nn.Module] = FeedForward, loops: int = 1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.stack = nn.ModuleList(DecoderBlock(feed_forward) for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.loops = loops

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(input_ids)
        for _ in range(self.loops):
            for block in self.stack:
                hidden = block(hidden)
        return self.lm_head(self.norm(hidden))


class Interleaved(nn.Module):
    """Two stacks of different blocks that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.thinking = nn.ModuleList(DecoderBlock() for _ in range(3))
        self.remembering = nn.ModuleList(MemoryBlock() for _ in range(3))
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(input_ids)
        for thinking, remembering in zip(self.thinking, self.remembering, strict=True):
            hidden = remembering(thinking(hidden))
        return self.lm_head(hidden)


# name -> a model of its own and batches for it
TRANSFORMERS_MODELS: dict[str, Callable[[], tuple[nn.Module, list[Batch]]]] = {
    "t5": lambda: (t5_model(), three(t5_batch)),
    "t5_padded": lambda: (t5_model(), [padded(batch) for batch in three(t5_batch)]),
    "bart": lambda: (bart_model(), three(text)),  # makes the inputs of its decoder itself
    "bert": lambda: (bert_model(), three(text)),
    "bert_padded": lambda: (bert_model(), [padded(batch) for batch in three(text)]),
    "whisper": lambda: (whisper_model(), three(whisper_batch)),
    "vit": lambda: (vit_model(), three(images)),
    "convnext": lambda: (convnext_model(), three(lambda generator: images(generator, 32))),
    "llava": lambda: (llava_model(), three(llava_batch)),
    "llava_padded": lambda: (llava_model(), [padded(batch) for batch in three(llava_batch)]),
    "llava_mixed": lambda: (llava_model(), [*three(text)[:1], *three(llava_batch)]),  # the tower is not always run
}
HAND_WRITTEN_MODELS: dict[str, Callable[[], tuple[nn.Module, list[Batch]]]] = {
    "plain": lambda: (random_model(Decoder), three(text)),
    "interleaved": lambda: (random_model(Interleaved), three(text)),
    "looped": lambda: (random_model(lambda: Decoder(loops=2)), three(text)),
    "experts": lambda: (random_model(lambda: Decoder(Experts)), three(text)),
}
MODELS = TRANSFORMERS_MODELS | HAND_WRITTEN_MODELS
