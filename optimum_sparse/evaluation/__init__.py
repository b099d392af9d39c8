"""How good a model is, by the field's protocols: perplexity, divergence from the dense model, tasks of lm-eval."""

from .harness import TaskResult, zero_shot
from .perplexity import Comparison, Perplexity, compare, perplexity
from .protocol import check_same_tokenizer, evaluate, generate
from .texts import Text, load_text, wikitext_tokens

__all__ = [
    "Comparison",
    "Perplexity",
    "TaskResult",
    "Text",
    "check_same_tokenizer",
    "compare",
    "evaluate",
    "generate",
    "load_text",
    "perplexity",
    "wikitext_tokens",
    "zero_shot",
]
