"""Tiny model folders with a tokenizer, such as a user has on disk, and a text to calibrate on."""

from pathlib import Path

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
