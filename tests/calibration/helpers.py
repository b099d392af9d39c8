"""A tokenizer of one token per word, and windows as lists."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from optimum_sparse.calibration import Calibration, load_calibration
from optimum_sparse.config import SparseConfig
from tests.helpers import tiny_model

PAD, BOS, EOS = 0, 1, 2
DOCUMENTS = ["10 11 12", "13 14", "15 16 17 18"]
# The documents joined with EOS are 10 11 12 2 | 13 14 2 15 | 16 17 18: two windows of 4.
WINDOWS = [[10, 11, 12, EOS], [13, 14, EOS, 15]]
TEXT_ROWS = [{"id": index, "text": text, "url": "x"} for index, text in enumerate(DOCUMENTS)]


def word_tokenizer(template: str | None = None, eos: bool = True, sep: bool = False) -> PreTrainedTokenizerFast:
    """One token per word: the word "17" is token 17. `template` adds special tokens, as in "<s> $A </s>"."""
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    words = Tokenizer(WordLevel(special | {str(number): number for number in range(3, 1000)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    if template:
        words.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>" if eos else None, sep_token="</s>" if sep else None
    )


def words(numbers) -> str:
    return " ".join(map(str, numbers))


def load(dataset, tokenizer=None, model=None, **options) -> Calibration:
    return load_calibration(SparseConfig(**options), model or tiny_model(), tokenizer or word_tokenizer(), dataset)


def rows(calibration: Calibration) -> list[list[int]]:
    return [row for batch in calibration.batches for row in batch["input_ids"].tolist()]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path
