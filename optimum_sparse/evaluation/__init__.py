"""How good a model is, by the field's protocols: perplexity, divergence from the dense model, tasks of lm-eval."""

from .harness import TaskResult, load_tasks, run_tasks
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
    "load_tasks",
    "load_text",
    "perplexity",
    "run_tasks",
    "wikitext_tokens",
]
