"""`optimum-cli sparse prune`: the options of `SparseConfig` as command-line options."""

from __future__ import annotations

import os
import shlex
import shutil
from argparse import (
    SUPPRESS,
    ArgumentParser,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
    RawDescriptionHelpFormatter,
)
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..config import PRESETS, SparseConfig, preset_options
from ..loading import class_to_load, load_model, local_path, model_without_weights, read_json
from . import DTYPES, add_trust_option, check_file, check_output, device_called, folder_called, user_errors

if TYPE_CHECKING:
    import torch

    from ..report import SparsityReport

DESCRIPTION = """\
Prune a model that takes text in one shot and save it as an ordinary checkpoint with zeros in it, which loads
wherever the dense one does. It takes as much disk space and time per token as the dense model; `pack` makes its files
smaller.

examples:
  optimum-cli sparse prune HuggingFaceTB/SmolLM2-135M-Instruct pruned --sparsity 0.5
  optimum-cli sparse prune ./my-model pruned-2of4 --pattern 2:4 --dataset my-text.txt
  optimum-cli sparse prune model.gguf pruned --method wanda --dataset self --override 'k_proj=0' 'mlp.*=0.6'
"""

# Stands in a folder for offloaded weights that was made here, and may be deleted.
CLAIMED = ".optimum-sparse"
# Group of each field of SparseConfig; a field that stands nowhere belongs to the last group.
GROUPS = {
    "how much": ("sparsity", "pattern", "overrides", "allocation"),
    "what": ("targets", "ignore", "block_range"),
    "calibration": ("dataset", "num_samples", "seqlen", "batch_size", "pack_documents", "seed"),
    "experts": ("min_expert_tokens", "calibrate_all_experts"),
    "solver": ("method",),
}


class PruneCommand(BaseOptimumCLICommand):
    """Prunes a model and saves it."""

    COMMAND = CommandInfo(name="prune", help="Prune a model in one shot and save it.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.formatter_class = RawDescriptionHelpFormatter
        # Positionals first: after an option that takes several values they would be taken for more of them.
        parser.usage = "%(prog)s MODEL OUT [options]"
        parser.description = DESCRIPTION
        parser.add_argument("model", metavar="MODEL", help="Hub id, folder, or .gguf file of the dense model")
        parser.add_argument("output", metavar="OUT", type=folder_called, help="folder to save the pruned model in")

        add_config_options(parser)
        run = parser.add_argument_group("running")
        run.add_argument(
            "--dtype", choices=DTYPES, default="auto", help="type of the weights (default: the checkpoint's)"
        )
        add_trust_option(run)
        run.add_argument(
            "--device", default="auto", help="where to run: cpu, cuda, cuda:1, ... (default: cuda if there is one)"
        )
        run.add_argument(
            "--resume",
            action="store_true",
            help="keep finished blocks in the folder OUT.progress, and take over those that an interrupted run of the "
            "same command has left there",
        )
        run.add_argument(
            "--max-memory",
            metavar="SIZE",
            help="what may be held at once, as in 4GiB, by the process or on the GPU; a model that is larger stays on "
            "disk and comes in block by block (default: the model has to fit)",
        )
        run.add_argument(
            "--activation-device",
            choices=("cpu", "disk"),
            help="where the activations of calibration windows wait (default: where they are computed)",
        )
        output = parser.add_argument_group("output")
        output.add_argument("--report", metavar="FILE.json", help="write what was done to each matrix to a file")
        output.add_argument(
            "--html",
            action=BooleanOptionalAction,
            default=True,
            help="write what was done as a page to look at, too: OUT/sparsity_report.html (default: yes)",
        )
        output.add_argument("--push-to-hub", metavar="REPO_ID", help="upload the result too, with a model card")

    def run(self) -> None:
        """Prune, save, and upload if asked."""
        with user_errors():
            prune(self.args)


def add_config_options(parser: ArgumentParser) -> None:
    """Declare the fields of `SparseConfig` as options, and `--config`."""
    listed = {name for names in GROUPS.values() for name in names}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for field in fields(SparseConfig):
            if field.name in names or (title == "solver" and field.name not in listed):
                _add_option(group, field)
    parser.add_argument(
        "--config", metavar="FILE.json", help="read these options from a file; those given here win over it"
    )
    parser.add_argument("--preset", choices=PRESETS, help="ready-made options; those given here win over it")


def prune(args: Namespace) -> None:
    """Do what the command line asks; everything that can be checked early is checked before the long work.

    Raises:
        ValueError: An option is wrong.
        OSError: A file cannot be read or written, or the Hub cannot be reached.
    """
    config = build_config(args)
    output = args.output
    check_output(output, local_path(args.model), "MODEL")
    check_file(args.report, "--report")
    if args.push_to_hub:
        _check_hub_access(args.push_to_hub)

    from ..distributed import Processes
    from ..estimate import parse_size
    from ..pruner import SparsePruner
    from ..resume import remove_progress

    processes = Processes()
    device = device_called(args.device, processes.device)
    beside = Path(os.path.abspath(output))  # OUT may be "."
    offload = beside.with_name(f"{beside.name}.offload")
    limit = None if args.max_memory is None else parse_size(args.max_memory)
    device_map = None if limit is None else _device_map(args, config, device, limit)
    if device_map:
        with processes.main_first():
            _claim(offload)
    pruner = SparsePruner(config)
    progress = beside.with_name(f"{beside.name}.progress") if args.resume else None
    try:
        model, tokenizer = load_model(
            args.model, args.dtype, device_map, offload, trust_remote_code=args.trust_remote_code
        )
        pruner.prune(
            model if device_map else model.to(device),
            tokenizer,
            resume_from=progress,
            activation_device=args.activation_device,
            max_memory=limit,
        )
        assert pruner.report is not None
        pruner.report.command = command_line(args, config, pruner.report.config["dataset"])
        processes.wait()
        # Saving takes a few times the size of a file.
        pruner.save(model, output, tokenizer, max_shard_size="5GB" if limit is None else min(5 * 10**9, limit // 8))
        if processes.is_main:
            _write_reports(pruner.report, output if args.html else None, args.report)
            name = class_to_load(type(model).__name__)
            print(f"Saved to {output}. Load it with {name}.from_pretrained({str(output)!r}).")
        # While the files that offloaded weights are read from are still there.
        url = pruner.push_to_hub(model, args.push_to_hub, tokenizer=tokenizer) if args.push_to_hub else ""
    finally:
        if device_map and processes.is_main:
            shutil.rmtree(offload, ignore_errors=True)
    if url:
        print(f"Uploaded to {url}")
    if progress is not None and processes.is_main:
        remove_progress(progress)
    processes.end()


def _claim(folder: Path) -> None:
    """Make a folder for offloaded weights, or take over that of a run that was killed.

    Raises:
        ValueError: There is something else.
    """
    if folder.exists() and not (folder / CLAIMED).is_file():
        raise ValueError(f"{folder} is in the way of weights that are offloaded: move it, or give another OUT.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CLAIMED).touch()


def _write_reports(report: SparsityReport, folder: Path | None, file: str | None) -> None:
    """Write what was done as a page into a folder and as JSON to a file."""
    from ..report import PAGE_FILE
    from ..saving import replace_file

    if folder:
        with replace_file(folder / PAGE_FILE) as page:
            report.to_html(page)
        print(f"To look at: {folder / PAGE_FILE}")
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        report.to_json(file)
        print(f"Report: {file}")


def _device_map(args: Namespace, config: SparseConfig, device: torch.device, limit: int) -> dict[str, Any] | None:
    """Where the weights go: `None` if they fit besides everything else.

    Raises:
        ValueError: The run does not fit even if they are offloaded.
    """
    import torch

    from ..dry_run import offloading_map, outline, place
    from ..estimate import available_memory, held_memory

    model = outline(lambda: model_without_weights(args.model, args.dtype, args.trust_remote_code), config)
    offloaded, _ = place(model, config, held_memory(device), limit, on_cpu=device.type == "cpu")
    if not offloaded:
        return None
    fits = device.type != "cpu" and model.weights < available_memory(torch.device("cpu")) // 2
    return offloading_map(model, device, "cpu" if fits else "disk")


def build_config(args: Namespace) -> SparseConfig:
    """The configuration of a command line: the file of `--config`, overruled by `--preset` and by what was given."""
    given = {field.name: getattr(args, field.name) for field in fields(SparseConfig) if hasattr(args, field.name)}
    from_file = read_json(Path(args.config)) if args.config else {}
    # A sparsity and a pattern determine each other: the one that was given replaces both of the file.
    if "sparsity" in given or "pattern" in given:
        from_file = {name: value for name, value in from_file.items() if name not in ("sparsity", "pattern")}
    pattern = given.get("pattern", from_file.get("pattern"))
    preset = preset_options(args.preset, pattern) if args.preset else {}
    return SparseConfig.from_dict({**from_file, **preset, **given})


def command_line(args: Namespace, config: SparseConfig, dataset: str) -> str:
    """The command that does the same again, without the folders of this machine, which are nobody's business.

    Args:
        args: As parsed.
        config: What `build_config` made of them.
        dataset: A name of the calibration data that can be published.
    """
    model, output = (Path(path).resolve().name if os.path.exists(path) else path for path in (args.model, args.output))
    words = ["optimum-cli", "sparse", "prune", model, Path(output).resolve().name]
    default = SparseConfig()
    for field in fields(SparseConfig):
        value = dataset if field.name == "dataset" else getattr(config, field.name)
        if value != getattr(default, field.name):
            words += _words(field.name, value)
    for name in ("dtype", "device", "max_memory", "activation_device"):
        if getattr(args, name) not in ("auto", None):
            words += _words(name, getattr(args, name))
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    """An option and its value on a command line."""
    flag = f"--{name.replace('_', '-')}"
    if name == "overrides":
        return ["--override", *(f"{o['match']}={o['pattern'] if 'pattern' in o else o['sparsity']}" for o in value)]
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]


def parse_override(text: str) -> dict[str, Any]:
    """Read `MATCH=0.6` or `MATCH=2:4` as an entry of `SparseConfig.overrides`."""
    match, equals, value = text.rpartition("=")
    if not equals or not match:
        raise ArgumentTypeError(f"{text!r} is not like 'mlp.*=0.6' or 'k_proj=2:4'")
    if ":" in value:
        return {"match": match, "pattern": value}
    try:
        return {"match": match, "sparsity": float(value)}
    except ValueError as error:
        raise ArgumentTypeError(
            f"{value!r} in {text!r} is neither a sparsity like 0.6 nor a pattern like 2:4"
        ) from error


def _add_option(group: Any, field: Field) -> None:
    hint = get_type_hints(SparseConfig)[field.name]
    help_text = field.metadata["help"]
    if "(default" not in help_text:
        help_text += f" (default: {_shown(field.default)})"
    flag, options = f"--{field.name.replace('_', '-')}", _kind_of_option(hint)
    if field.name == "overrides":
        flag, options = "--override", {"nargs": "+", "action": "extend", "type": parse_override}
    metavar = field.metadata["metavar"]
    if metavar:
        options["metavar"] = tuple(metavar.split()) if options.get("nargs") == 2 else metavar
    group.add_argument(flag, dest=field.name, default=SUPPRESS, help=help_text.replace("%", "%%"), **options)


def _kind_of_option(hint: Any) -> dict[str, Any]:
    """The argparse options that read a value of the type `hint` of a field."""
    # Of `int | None` or `str | list[str]` the first is what fits on a command line.
    members = get_args(hint)
    if bool in (hint, *members):
        return {"action": BooleanOptionalAction}
    if hint == tuple[str, ...]:
        return {"nargs": "+", "action": "extend", "metavar": "NAME"}
    if tuple[int, int] in members:
        return {"nargs": 2, "type": int}
    return {"type": members[0] if members else hint}


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return " ".join(default) or "none"
    return str(default)


def _check_hub_access(repo_id: str) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if get_token() is None:
        raise ValueError("--push-to-hub needs a Hub access token: log in with `hf auth login`, or set HF_TOKEN.")
