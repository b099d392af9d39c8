"""One evaluation: texts and tasks, of a model alone or beside the dense one that it was made from."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import metadata
from ..calibration.interface import longest_input
from ..offload import execution_device
from .harness import load_tasks, run_tasks
from .perplexity import Perplexity, compare, perplexity
from .texts import Text, load_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEQLEN = 2048


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    baseline: PreTrainedModel | None = None,
    datasets: Sequence[str] = (),
    seqlen: int | None = None,
    num_windows: int | None = None,
    tasks: Sequence[str] = (),
    tasks_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    num_samples: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a model, alone or beside the dense one that it was made from.

    Args:
        model: A causal language model in eval mode.
        tokenizer: That of both models, see `check_same_tokenizer`.
        baseline: The dense model, in eval mode.
        datasets: Texts for the perplexity: `"wikitext2"`, `"c4"`, `"ptb"`, files and Hub datasets, see `load_text`.
        seqlen: Tokens per window of the texts (default: 2048, or the model's maximum if that is less).
        num_windows: Windows of each text, from the start (default: all; of C4, 256).
        tasks: Tasks of lm-eval, see `load_tasks`.
        tasks_dir: Folder with task files of your own.
        num_fewshot: Examples in the prompts of tasks (default: as each task says).
        num_samples: Samples of each task, from the start (default: all).
        batch_size: Windows or sequences per forward.
        progress: Show progress bars.

    Returns:
        Pure JSON, as `SparsityReport.evaluations` holds it: `"texts"` and `"tasks"` with a dict per text and per
        metric of a task, `"model"`, `"baseline"`, `"versions"`, `"seconds"` and `"date"`.

    Raises:
        ValueError: A text is too short, a task is unknown, an argument is out of range, or a model's logits are not
            finite.
        OSError: A text cannot be read.
        ImportError: There are tasks, and lm-eval is not installed.
    """
    started = time.perf_counter()
    datasets, tasks = ([given] if isinstance(given, str) else given for given in (datasets, tasks))
    if seqlen is None:
        seqlen = min(SEQLEN, longest_input(model) or SEQLEN)
    # What is wrong with a text or a task is said before anything is measured.
    texts = [load_text(source, tokenizer) for source in datasets]
    loaded = load_tasks(tasks, tasks_dir) if tasks else None
    results = [_on_text(model, baseline, text, seqlen, num_windows, batch_size, progress) for text in texts]
    found = run_tasks(loaded, model, tokenizer, baseline, num_fewshot, num_samples, batch_size) if loaded else []
    versions = metadata.versions() | ({"lm_eval": importlib.metadata.version("lm_eval")} if tasks else {})
    return {
        "model": _name(model),
        "baseline": None if baseline is None else _name(baseline),
        "dtype": str(model.dtype).removeprefix("torch."),
        "texts": results,
        "tasks": [{**asdict(result), "num_fewshot": num_fewshot} for result in found],
        "versions": versions,
        "seconds": time.perf_counter() - started,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None, what: str = "baseline"
) -> None:
    """See that two models are told the same by the same tokens.

    Args:
        tokenizer: That of the model.
        other: That of the other one, if it has any.
        what: What the other one is.

    Raises:
        ValueError: Their vocabularies differ.
    """
    if other is not None:
        own, theirs = tokenizer.get_vocab(), other.get_vocab()
        differing = len(own.items() ^ theirs.items())
        if differing:
            raise ValueError(
                f"The model and the {what} have other tokenizers: {len(own)} and {len(theirs)} tokens, {differing} of "
                f"them not shared. What is said of other tokens cannot be compared; the {what} must be the dense "
                "model that it was made from, or one with its tokenizer."
            )


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], num_tokens: int = 48
) -> list[str]:
    """What a model makes of each prompt, always choosing the likeliest token.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts to continue.
        num_tokens: At most so many tokens.

    Returns:
        The continuations, without the prompts.

    Raises:
        ValueError: A prompt has no tokens.
    """
    texts = []
    for prompt in prompts:
        if not tokenizer(prompt)["input_ids"]:
            raise ValueError(f"The prompt {prompt!r} has no tokens: give the beginning of a text.")
        inputs = tokenizer(prompt, return_tensors="pt").to(execution_device(model))
        tokens = model.generate(
            **inputs, max_new_tokens=num_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        texts.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def _on_text(
    model: PreTrainedModel,
    baseline: PreTrainedModel | None,
    text: Text,
    seqlen: int,
    num_windows: int | None,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    if num_windows is None and text.num_windows is not None:
        num_windows = max(min(text.num_windows, text.input_ids.numel() // seqlen), 1)
    arguments = (text.input_ids, seqlen, num_windows, batch_size, progress)
    compared = None if baseline is None else compare(model, baseline, *arguments)
    own = perplexity(model, *arguments) if compared is None else compared.model
    _check_finite(own, "model")
    found = {
        "dataset": text.name,
        "seqlen": seqlen,
        "num_windows": own.num_windows,
        "perplexity": own.value,
        "interval": own.interval,
        "baseline_perplexity": None,
    }
    if compared is None:
        return found | dict.fromkeys(
            ("ratio", "ratio_interval", "kl", "kl_interval", "top1_agreement", "top1_interval")
        )
    _check_finite(compared.baseline, "baseline")
    rest = {name: value for name, value in vars(compared).items() if name not in ("model", "baseline")}
    return found | {"baseline_perplexity": compared.baseline.value} | rest


def _check_finite(result: Perplexity, which: str) -> None:
    if not math.isfinite(result.value):
        raise ValueError(
            f"The perplexity of the {which} is {result.value}: its logits are not finite. The weights are damaged, or "
            "too large for float16: try --dtype float32."
        )


def _name(model: PreTrainedModel) -> str:
    """A name that can be published: of a local folder, without the folders that it is in."""
    name = str(model.name_or_path)
    return Path(name).resolve().name if Path(name).exists() else name
