"""The model card of a pruned model, and its upload."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..metadata import expand_name

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from ..report import SparsityReport

BODY = """\
# {title}

{base} pruned in one shot with the method `{method}` by `optimum-sparse`:
**{achieved} of the weights of {num_matrices} matrices are zero**{pattern_note}.
{loading}

```python
{imports}from transformers import {model_class}, {processor_class}

model = {model_class}.from_pretrained("{repo_id}", dtype="auto")
{processor} = {processor_class}.from_pretrained("{repo_id}")
```

{files}

## What was pruned

{table}

Everything else is as in the base model. The full record is `sparsity_config` in `config.json`; to check it against the
weights, run `optimum-cli sparse inspect {repo_id}`.

## How

{how}
"""

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
        report: Adds the error of each kind of matrix, if it was pruned just now.
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
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation" if causal else None,
        tags=["optimum-sparse", "sparse", "pruned", method, *([pattern] if pattern else [])],
    )
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
        table=_table(metadata["matrices"], report),
        how="\n".join(f"- {name}: {value}" for name, value in _how(metadata)),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


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
