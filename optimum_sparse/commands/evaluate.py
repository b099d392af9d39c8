"""`optimum-cli sparse evaluate`: how good a pruned model is, beside its dense original."""

from __future__ import annotations

import json
import logging
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..loading import RUNTIMES, load_model, local_path
from . import DTYPES, add_trust_option, check_file, device_called, user_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPTS = ("The capital of France is", "Water boils when", "To make a cup of tea, first")

DESCRIPTION = """\
Measure the perplexity of a pruned model as the SparseGPT and Wanda papers do, and run tasks of lm-eval. With its dense
original, both are measured on the same text: the ratio of the perplexities, the divergence of the predictions and how
often both find the same token likeliest are known far better than each perplexity.

A text is "wikitext2", "c4" or "ptb" as in the papers, the .raw file of WikiText, a .txt, .jsonl or .parquet file, or a
Hub dataset. A report in the folder of the model gets the figures.

examples:
  optimum-cli sparse evaluate ./pruned --baseline meta-llama/Llama-3.1-8B
  optimum-cli sparse evaluate ./pruned --baseline ./dense --dataset wikitext2 c4 my-text.txt --tasks wanda piqa
  optimum-cli sparse evaluate ./pruned --tasks my-task --tasks-dir ./tasks
"""


class EvaluateCommand(BaseOptimumCLICommand):
    """Measures the quality of a model."""

    COMMAND = CommandInfo(name="evaluate", help="Measure the quality of a pruned model, beside its dense original.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.usage = "%(prog)s MODEL [--baseline DENSE] [options]"
        parser.description = DESCRIPTION
        parser.add_argument("model", metavar="MODEL", help="folder or Hub id of the pruned model")
        parser.add_argument("--baseline", metavar="DENSE", help="folder, Hub id or .gguf file of the dense model")
        texts = parser.add_argument_group("texts")
        texts.add_argument(
            "--dataset", nargs="+", metavar="TEXT", help="texts for the perplexity (default without tasks: wikitext2)"
        )
        texts.add_argument(
            "--seqlen", type=int, help="tokens per window (default: 2048, or the model's maximum if that is less)"
        )
        texts.add_argument("--num-windows", type=int, help="windows of each text (default: all, of c4 256)")
        tasks = parser.add_argument_group("tasks")
        tasks.add_argument(
            "--tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-eval; 'wanda' are the paper's seven"
        )
        tasks.add_argument("--tasks-dir", type=Path, metavar="DIR", help="folder with task files of your own")
        tasks.add_argument("--num-fewshot", type=int, help="examples in a prompt (default: as the task says)")
        tasks.add_argument("--num-samples", type=int, help="evaluate only so many samples of a task")
        samples = parser.add_argument_group("samples")
        samples.add_argument(
            "--prompts", nargs="*", metavar="PROMPT", help="texts to continue (default with a baseline: three)"
        )
        running = parser.add_argument_group("running")
        running.add_argument("--batch-size", type=int, default=1, help="windows or sequences at once (default: 1)")
        running.add_argument(
            "--dtype", choices=DTYPES, default="auto", help="type of the weights (default: the checkpoint's)"
        )
        add_trust_option(running)
        running.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: the first GPU, if any)")
        running.add_argument(
            "--offload", action="store_true", help="on all GPUs, and what does not fit there on the CPU and on disk"
        )
        running.add_argument(
            "--runtime",
            choices=RUNTIMES,
            default="dense",
            help="sparse: a packed MODEL stays packed in memory, on the CPU (default: dense)",
        )
        output = parser.add_argument_group("output")
        output.add_argument("--json", metavar="FILE.json", type=Path, help="write the figures to a file")

    def run(self) -> None:
        """Measure, print, and write what was asked for."""
        with user_errors():
            evaluate_model(self.args)


def evaluate_model(args: Namespace) -> None:
    """Do what the command line asks.

    Raises:
        ValueError: An option is wrong, or model, baseline and data do not go together.
        OSError: A file cannot be read or written, or the Hub cannot be reached.
        ImportError: There are tasks, and lm-eval is not installed.
    """
    if args.tasks_dir is not None and not args.tasks_dir.is_dir():
        raise ValueError(f"--tasks-dir {args.tasks_dir} is no folder: name one with .yaml files of tasks.")
    if args.offload and args.device != "auto":
        raise ValueError(f"--offload uses all devices: leave out --device {args.device}.")
    if args.runtime == "sparse" and (args.offload or args.device not in ("auto", "cpu")):
        raise ValueError(
            "--runtime sparse is for a whole model on the CPU: leave out --offload, and --device or give --device cpu."
        )
    check_file(args.json, "--json")
    if args.prompts and not all(prompt.strip() for prompt in args.prompts):
        raise ValueError("--prompts has an empty one: give texts to continue, or leave the option without any.")
    from ..evaluation import check_same_tokenizer, evaluate, generate
    from ..report import REPORT_FILE, read_report, write_report
    from ..report.summary import quality

    source = local_path(args.model)
    report = None if source is None else read_report(source)
    with tempfile.TemporaryDirectory(prefix="optimum-sparse-offload-") as folder:
        model, tokenizer = _load(args, args.model, Path(folder, "model"), args.runtime)
        if tokenizer is None:
            raise ValueError(f"{args.model} has no tokenizer: save that of the dense model along with it.")
        baseline = None
        if args.baseline:
            baseline, other = _load(args, args.baseline, Path(folder, "baseline"))
            check_same_tokenizer(tokenizer, other)
            if getattr(baseline.config, "sparsity_config", None) is not None:
                logger.warning("The baseline %s has been pruned, too: it is not dense.", args.baseline)
        datasets = args.dataset if args.dataset is not None else [] if args.tasks else ["wikitext2"]
        found = evaluate(
            model,
            tokenizer,
            baseline,
            datasets,
            args.seqlen,
            args.num_windows,
            args.tasks,
            args.tasks_dir,
            args.num_fewshot,
            args.num_samples,
            args.batch_size,
        )
        prompts = args.prompts if args.prompts is not None else PROMPTS if baseline else ()
        pruned = generate(model, tokenizer, prompts)
        dense = generate(baseline, tokenizer, prompts) if baseline else [""] * len(pruned)
    generations = [
        {"prompt": prompt, "dense": a, "pruned": b} for prompt, a, b in zip(prompts, dense, pruned, strict=True)
    ]
    for row in quality(found):
        beside = f"   dense {row.dense}" if row.dense else ""
        print(f"{row.what}\n    {row.pruned}{beside}{f'   {row.change}' if row.change else ''}")
    for sample in generations:
        print(f"\n{sample['prompt']} …")
        for which in ("dense", "pruned") if baseline else ("pruned",):
            print(f"    {which}: {' '.join(sample[which].split())}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**found, "generations": generations}, indent=2, ensure_ascii=False)
        args.json.write_text(text + "\n", encoding="utf-8")
    if report is not None and source is not None:
        report.evaluations.append(found)
        report.generations = generations or report.generations
        write_report(report, source)
        print(f"\nAdded to {source / REPORT_FILE}.")


def _load(
    args: Namespace, name: str, folder: Path, runtime: str = "dense"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model where the options want it, quantised or not."""
    load = partial(load_model, name, args.dtype, quantized=True, trust_remote_code=args.trust_remote_code)
    if runtime == "sparse":
        from ..integrations.packed import PackedConfig

        return load(quantization_config=PackedConfig(runtime=runtime))
    if args.offload:
        folder.mkdir()
        return load(device_map="auto", offload_folder=folder)
    device = device_called("cpu" if args.runtime == "sparse" else args.device)
    model, tokenizer = load()
    # What transformers has quantised it has also put where it computes.
    return model if getattr(model, "is_quantized", False) else model.to(device), tokenizer
