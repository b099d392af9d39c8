"""The model card of a pruned model, and its upload."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..metadata import expand_name
from ..report import PAGE_FILE, SparsityReport
from ..report.summary import Row, errors_of, quality, speeds

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

PLOT_FILE = "sparsity.png"

BODY = """\
# {title}

{base} pruned in one shot with the method `{method}` by `optimum-sparse`:
**{achieved} of the weights of {num_matrices} matrices are zero**{pattern_note}.
{loading}

```python
{imports}from transformers import {model_class}, {processor_class}

model = {model_class}.from_pretrained("{repo_id}", dtype="auto")
{processor} = {processor_class}.from_pretrained("{repo_id}")
{generate}```

{files}

## Quality

{quality}
{speed}
## What was pruned

{table}
{plot}
Everything else is as in the base model. The full record is `sparsity_config` in `config.json`; to check it against the
weights, run `optimum-cli sparse inspect {repo_id}`.

## How

{how}

## Limits

- Nothing was trained at pruning; whatever the base model lacks, this one lacks, too, and its licence and terms apply.
- {judged}
- What a benchmark of one language or task does not show may have suffered more than what it shows.
- Zeros alone make no model faster, and its dense files no smaller.
"""

SPEED = """
## Speed

With `sparsify_for_inference`, against the same model run dense, on {processor} with {threads} threads:

{table}
"""

PLOT = f"""
![{{what}} of each matrix, over the blocks]({PLOT_FILE})

[{PAGE_FILE}]({PAGE_FILE}) has more to look at: masks, errors over depth, time and memory.
"""

GENERATE = """
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""

NOT_MEASURED = "Not measured. `optimum-cli sparse evaluate` compares the model with the dense one."

# What the card says of files that are dense, and of those that are packed.
DENSE = {
    "loading": "The other weights are in their places, so that the model loads like any other:",
    "imports": "",
    "files": """\
The files are those of a dense model with zeros in them: they take the same disk space and memory, and run at the same
speed, as those of the dense model. A gain needs software that makes use of the zeros.""",
}
PACKED = {
    "loading": """\
The files hold the other weights only, packed without loss. With the package `optimum-sparse` installed and imported,
the model loads like any other:""",
    "imports": "import optimum_sparse  # or from_pretrained cannot read the packed files\n",
    "files": """\
The files are smaller than those of the dense model. Once loaded, it takes the same memory and runs at the same speed.
`optimum-cli sparse unpack` makes dense files of them, which load without `optimum-sparse`.""",
}


def model_card(
    metadata: Mapping[str, Any],
    report: SparsityReport | None = None,
    repo_id: str = "",
    model_class: str = "AutoModelForCausalLM",
    packed: bool = False,
) -> ModelCard:
    """Describe a pruned model for people and for the Hub's search.

    Args:
        metadata: Its `config.sparsity_config`.
        report: Adds the error of each kind of matrix, what was measured, and a plot, for `save_card` to write.
        repo_id: Where it will stand; only used in the text.
        model_class: The class of Transformers to load it with.
        packed: Whether its files are packed.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base, method, pattern = metadata["base_model"], metadata["method"], metadata["pattern"]
    on_hub = base is not None and ("/" in base or metadata["base_revision"] is not None)
    uniform = pattern is not None and all(entry["pattern"] == pattern for entry in metadata["matrices"].values())
    repo_id = repo_id or "path/to/this/model"
    causal = model_class == "AutoModelForCausalLM"
    results = eval_results(report)
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation" if causal else None,
        tags=["optimum-sparse", "sparse", "pruned", method, *([pattern] if pattern else [])],
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    measured = quality(report.evaluations[-1] if report and report.evaluations else None)
    body = BODY.format(
        **(PACKED if packed else DENSE),
        title=repo_id.split("/")[-1],
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else (f"`{base}`" if base else "A model"),
        method=method,
        achieved=f"{metadata['achieved_sparsity']:.2%}",
        num_matrices=sum(len(expand_name(name)) for name in metadata["matrices"]),
        pattern_note=f", in the pattern {pattern} (N non-zero of every M consecutive inputs)" if uniform else "",
        repo_id=repo_id,
        model_class=model_class,
        processor_class="AutoTokenizer" if causal else "AutoProcessor",
        processor="tokenizer" if causal else "processor",
        generate=GENERATE if causal else "",
        quality=_markdown(("", "dense", "pruned", "change"), measured) or NOT_MEASURED,
        table=_table(metadata["matrices"], report),
        plot=_plot(report),
        speed=_speed(report),
        judged=(
            "The figures above are of the data and the settings beside them, and of no other."
            if measured
            else "How much quality was lost was not measured; it always is some."
        ),
        how="\n".join(f"- {name}: {value}" for name, value in _how(metadata)),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def eval_results(report: SparsityReport | None) -> list[EvalResult]:
    """The latest evaluation in the form in which the Hub shows results."""
    from huggingface_hub import EvalResult

    if report is None or not report.evaluations:
        return []
    last = report.evaluations[-1]
    task: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text generation"}
    texts = [
        EvalResult(
            **task,
            dataset_type=text["dataset"],
            dataset_name=f"{text['dataset']}, {text['num_windows']} windows of {text['seqlen']} tokens",
            dataset_args={"seqlen": text["seqlen"], "num_windows": text["num_windows"]},
            metric_type="perplexity",
            metric_name="perplexity",
            metric_value=text["perplexity"],
        )
        for text in last["texts"]
    ]
    return texts + [
        EvalResult(
            **task,
            dataset_type=one["task"],
            dataset_name=f"{one['task']}, {one['num_samples']} samples",
            dataset_args={"version": one["version"], "num_samples": one["num_samples"]},
            metric_type=one["metric"],
            metric_name=one["metric"],
            metric_value=one["value"],
        )
        for one in last["tasks"]
    ]


def save_card(card: ModelCard, folder: str | Path, report: SparsityReport | None = None) -> None:
    """Write a card into a folder as README.md, with the plot and the page that it refers to.

    Args:
        card: From `model_card`.
        folder: An existing folder.
        report: What the card was made with.

    Raises:
        OSError: A file cannot be written.
    """
    card.save(Path(folder, "README.md"))
    if report is not None and report.matrices:
        from ..report.plots import overview

        Path(folder, PLOT_FILE).write_bytes(overview(report))
        report.to_html(Path(folder, PAGE_FILE))


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a folder to a model repository on the Hub in one commit.

    Args:
        folder: What to upload, all of it.
        repo_id: `"user/name"`, or a name for a repository of one's own; created if it does not exist.
        private: Whether a new repository is private; the default is the user's setting.
        token: Access token, instead of the one logged in with.
        commit_message: Message of the commit.

    Returns:
        URL of the commit.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The Hub refused; an `OSError` with the Hub's reason.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    message = commit_message or "Upload a model pruned with optimum-sparse"
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url


def _markdown(head: tuple[str, ...], rows: list[Row]) -> str:
    """A table, empty if it has no rows."""
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in (row.what, row.dense, row.pruned, row.change)) + " |"
        for row in rows
    ]
    return "\n".join([f"| {' | '.join(head)} |", "|---|---|---|---|", *lines]) if rows else ""


def _speed(report: SparsityReport | None) -> str:
    if report is None or report.bench is None:
        return ""
    table = _markdown(("", "dense", "sparse", "change"), speeds(report.bench))
    return SPEED.format(table=table, **{name: report.bench["machine"][name] for name in ("processor", "threads")})


def _plot(report: SparsityReport | None) -> str:
    if report is None or not report.matrices:
        return ""
    return PLOT.format(what="Output error" if errors_of(report.matrices) else "Zeros")


def _table(matrices: Mapping[str, Mapping[str, Any]], report: SparsityReport | None) -> str:
    errors = {matrix.name: matrix.error for matrix in report.matrices} if report is not None else {}
    lines = ["| matrices | weights | zeros | pattern | output error |", "|---|---:|---:|---|---:|"]
    for folded, entry in matrices.items():
        known = [error for name in expand_name(folded) if (error := errors.get(name)) is not None]
        mean = f"{math.fsum(known) / len(known):.2%}" if known else ""
        zeros = f"{entry['zeros'] / entry['numel']:.2%}"
        lines.append(f"| `{folded}` | {entry['numel']:,} | {zeros} | {entry['pattern'] or 'unstructured'} | {mean} |")
    if any(error is not None for error in errors.values()):
        lines += [
            "",
            "Output error: squared change of the outputs on the calibration data, relative to the outputs; mean.",
        ]
    return "\n".join(lines)


def _how(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines of the list of settings, those that apply."""
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    settings = [("method", metadata["method"]), ("sparsity asked for", f"{metadata['sparsity']:.2%}")]
    if metadata["base_revision"]:
        settings.append(("revision of the base model", f"`{metadata['base_revision']}`"))
    if metadata["dataset"]:
        amount = f"{metadata['num_samples']} samples"
        if metadata["num_tokens"] is not None:  # images and sound have none
            amount = f"{metadata['num_samples']} windows, {metadata['num_tokens']} tokens in all"
        settings.append(("calibration data", f"{metadata['dataset']}, {amount}, seed {metadata['seed']}"))
    else:
        settings.append(("calibration data", "none"))
    return [*settings, ("versions", versions)]
