"""`SparsePruner`: prunes a model, saves and publishes it."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import metadata
from .calibration import load_calibration
from .checkpoint import convert
from .config import SparseConfig
from .depth import DepthError
from .distributed import Processes
from .estimate import parse_size, peak_memory
from .loading import class_to_load
from .matrices import find_blocks, find_matrices
from .methods import statistics_for
from .offload import offloaded_places, savable, tie_offloaded
from .progress import Progress
from .quantization import Grid, write_grids
from .report import PAGE_FILE, SparsityReport, take_pictures, weight_bytes, write_report
from .resume import check_progress_folder
from .run import PruningRun
from .runtime.grids import find_grids
from .runtime.linear import DenseLinear, SparseLinear
from .runtime.semi_structured import SemiStructuredLinear
from .saving import GRIDS_FILE, check_target, replace_folder
from .spill import ACTIVATION_DEVICES
from .statistics import Statistics

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

# In the card of a model that was pruned with this package.
CARD_TAG = "\n- optimum-sparse\n"


class SparsePruner:
    """Prunes a model in one shot, in place.

        pruner = SparsePruner(method="sparsegpt", pattern="2:4")
        pruner.prune(model, tokenizer)
        pruner.save(model, "llama-2of4", tokenizer)

    Args:
        config: How to prune.
        progress: Show what to expect, a progress bar and a summary on stderr.
        **options: Fields of `SparseConfig`, instead of `config`.

    Attributes:
        config: The `SparseConfig`.
        report: The `SparsityReport` of the last `prune`, `None` before.
        grids: What it rounded the weights to, by the names of the matrices, if the configuration quantises.

    Raises:
        ValueError: An option is unknown or out of range.
        TypeError: `config` is not a `SparseConfig`, or options were given besides it.
    """

    def __init__(self, config: SparseConfig | None = None, *, progress: bool = True, **options: Any) -> None:
        if config is None:
            config = SparseConfig.from_dict(options)
        elif not isinstance(config, SparseConfig):
            raise TypeError(
                f"config must be a SparseConfig, got {config!r}: use SparsePruner.from_dict for a mapping."
            )
        elif options:
            raise TypeError(f"Give either config or options, not both: got config and {', '.join(options)}.")
        self.config = config
        self.progress = progress
        self.report: SparsityReport | None = None
        self.grids: dict[str, Grid] = {}

    def prune(
        self,
        model: Model,
        tokenizer: Any = None,
        dataset: Any = None,
        *,
        resume_from: str | Path | None = None,
        activation_device: str | None = None,
        max_memory: int | str | None = None,
    ) -> Model:
        """Prune `model` in place.

        If it is interrupted, the layers pruned so far stay pruned, the others stay dense, and the model is usable.

        Weights that Accelerate offloads (`device_map`, `cpu_offload`, `disk_offload`) come in for one block at a time.
        Pruned ones go back to memory, or to new files in the offload folder; the source is never written to.

        Of several processes, started by `accelerate launch` or `torchrun`, each calls this with the whole model and
        the same arguments. They share out the calibration data and the rows to solve, and all have the result.

        Args:
            model: A model in evaluation mode, of Transformers or any other `nn.Module`.
            tokenizer: Its tokenizer, needed if the calibration data is text; or its processor.
            dataset: Calibration data to use instead of `config.dataset`: also a list of token dicts, a
                `datasets.Dataset`, or a `DataLoader` of model inputs.
            resume_from: A folder where each finished block is kept. If it has those of the same run that did not come
                to its end, they are taken over, and the result has the same bits as if nothing had happened. A model
                that is offloaded to disk reads its pruned weights from there: keep the folder until it is saved.
            activation_device: Where the activations of the calibration batches wait: `"cpu"`, `"disk"` (files in
                `resume_from`, or where the system has its temporary files). By default they wait where they are
                computed, if there is room.
            max_memory: What may be held on the device that computes, in bytes or as in `"4GiB"`, by the process on a
                CPU, by torch on a GPU (default: all that is free). A run that needs more is refused before it starts.

        Returns:
            The model. If it is one of Transformers, `config.sparsity_config` is set.

        Raises:
            ValueError: The model, the configuration or the data cannot be used; the message says what to do.
            TypeError: `model` is no module, or the data are of an unsupported type.
            OSError: A file of the data cannot be read, or `resume_from` cannot be written.
        """
        _check_model(model)
        if tokenizer is not None and not callable(tokenizer):
            raise TypeError(
                f"tokenizer must be a loaded tokenizer or processor, got {tokenizer!r}: load it with "
                "AutoTokenizer.from_pretrained, and pass calibration data as dataset=."
            )
        if activation_device not in (None, *ACTIVATION_DEVICES):
            raise ValueError(
                f"activation_device must be one of {', '.join(ACTIVATION_DEVICES)} or None, got {activation_device!r}."
            )
        limit = None if max_memory is None else parse_size(max_memory)
        folder = None if resume_from is None else Path(resume_from)
        if folder is not None:
            check_progress_folder(folder)
        tie_offloaded(model)
        find_matrices(model, self.config)  # what is wrong whatever the data is said before they are loaded
        report = self.report = SparsityReport(config=self.config.to_dict())
        before = metadata.earlier_record(model)
        if before is not None:
            how = f"by {before['method']}, to {before['achieved_sparsity']:.2%} zeros"
            report.notes.append(
                f"the model had been pruned before ({how}): its zeros count, and errors are relative to it"
            )
        started = time.perf_counter()
        processes = Processes()
        shown = self.progress and processes.is_main
        with (
            torch.inference_mode(_made_in_inference_mode(model, self.config)),
            torch.no_grad(),
            _one_expert_at_a_time(model),
            Progress(shown, self.config) as progress,
        ):
            if dataset is None and statistics_for(self.config) is None:
                batches = [_dummy_batch(model)]
            else:
                calibration = load_calibration(self.config, model, tokenizer, dataset, shown)
                report.calibration, batches = calibration.record, calibration.batches
                # A report is published with the model: no texts and no paths of this machine.
                report.config["dataset"] = calibration.record["dataset"]
                if (found := calibration.record["num_samples"]) < self.config.num_samples:
                    report.notes.append(f"calibrated on {found} samples instead of {self.config.num_samples}")
                report.seconds["calibration data"] = time.perf_counter() - started
            run = PruningRun(
                model, self.config, report, progress, processes, batches, activation_device, folder, limit
            )
            # Of a model that is offloaded, one more forward would read all of it once more.
            depth = DepthError(model, [] if offloaded_places(model) else find_blocks(model))
            with depth.watching():
                matrices = run.prune()
            report.notes += _few_tokens(report, statistics_for(self.config))
            self.grids = run.grids
            report.config["true_sequential"] = run.config.true_sequential
            report.seconds["total"] = time.perf_counter() - started
            report.peak_memory = peak_memory()
            report.memory = {} if run.plan is None else {what: size for what, size in run.plan.memory.items() if size}
            report.depth_error = depth.measure() if report.calibration else {}
            report.pictures = take_pictures(matrices)
            given = dataset is not None or not isinstance(self.config.dataset, str)
            report.command = _code(report.config, given)
            report.versions = metadata.versions()
            if isinstance(model, PreTrainedModel):
                model.config.sparsity_config = metadata.sparsity_config(
                    model, run.config, matrices, report.calibration
                )
                if before is not None:
                    record = model.config.sparsity_config
                    model.config.sparsity_config = metadata.carried_over(model, record, before)
                report.model = model.config.sparsity_config["base_model"]
            progress.say(report.table())
        return model

    def save(
        self,
        model: PreTrainedModel,
        directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_shard_size: int | str = "5GB",
        compressed: bool = False,
    ) -> None:
        """Write a plain dense checkpoint, with zeros, that loads everywhere, or a packed one, without them.

        `sparsity_config` is recomputed from the weights as they are now. The files replace older ones only when all
        of them are complete. Of several processes the main one writes, and the others do not wait for it.

        Args:
            model: The pruned model.
            directory: Where to; other files in it are left alone.
            tokenizer: Written along if given.
            max_shard_size: Largest size of a weight file, if it were dense.
            compressed: Pack the matrices without loss, to about half of their size at 50 % zeros; while that is done,
                the dense files are on the disk, too. Loading then needs `import optimum_sparse` first.

        Raises:
            ValueError: The model was not pruned, or has too few zeros for `compressed`, or `directory` holds the files
                that its weights are offloaded to.
            OSError: Writing failed; what was in `directory` is unchanged.
        """
        if not Processes().is_main:
            return
        check_target(model, directory)
        record = self._metadata(model)
        grids = self.grids
        if not grids.keys() >= set(metadata.quantized_names(record)):  # some were quantised before
            grids = {**find_grids(model, None)[0], **grids}
        model.config.sparsity_config = metadata.recount(model, record, grids)
        with replace_folder(directory) as folder, savable(model):
            if compressed:
                with tempfile.TemporaryDirectory(dir=folder) as dense:
                    model.save_pretrained(dense, max_shard_size=max_shard_size)
                    convert(Path(dense), folder, pack=True)
            else:
                model.save_pretrained(folder, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if names := metadata.quantized_names(model.config.sparsity_config):
                write_grids(folder / GRIDS_FILE, {name: grids[name] for name in names})
            if self.report is not None:
                packed = [layer.weight for layer in model.modules() if isinstance(layer, SparseLinear)]
                self.report.sizes = {
                    "dense": sum(weight.nbytes for weight in [*model.parameters(), *packed]),
                    "saved": weight_bytes(folder),
                }
                write_report(self.report, folder, page=Path(directory, PAGE_FILE).is_file())
        card = Path(directory, "README.md")
        if card.is_file() and CARD_TAG in card.read_text(encoding="utf-8", errors="replace"):
            logger.warning("%s is left alone, and tells of the model that was there before: edit or delete it.", card)

    def push_to_hub(
        self,
        model: PreTrainedModel,
        repo_id: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        compressed: bool = False,
    ) -> str:
        """Upload weights, tokenizer, report and model card in one commit, from the main process if there are several.

        Args:
            model: The pruned model.
            repo_id: `"user/name"`; created if it does not exist.
            tokenizer: Uploaded along if given.
            private: Whether a new repository is private.
            token: Hub token, instead of the one logged in with.
            commit_message: Message of the commit.
            compressed: As of `save`.

        Returns:
            URL of the commit; empty in the other processes.
        """
        from .integrations.hub import model_card, push_folder, save_card

        if not Processes().is_main:
            return ""
        with tempfile.TemporaryDirectory() as folder:
            self.save(model, folder, tokenizer, compressed=compressed)
            name = class_to_load(type(model).__name__)
            card = model_card(model.config.sparsity_config, self.report, repo_id, name, compressed)
            save_card(card, folder, self.report)
            return push_folder(folder, repo_id, private=private, token=token, commit_message=commit_message)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as pure JSON."""
        return self.config.to_dict()

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SparsePruner:
        """A pruner from what `to_dict` gave.

        Raises:
            ValueError: As `SparseConfig.from_dict`.
        """
        return cls(SparseConfig.from_dict(options))

    def _metadata(self, model: PreTrainedModel) -> dict[str, Any]:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"{type(model).__name__} is none of Transformers, so there is no config.json to save with it: save "
                "its weights yourself, e.g. safetensors.torch.save_file(model.state_dict(), path)."
            )
        record = getattr(model.config, "sparsity_config", None)
        if record is None:
            raise ValueError(
                f"This {type(model).__name__} has no config.sparsity_config: prune it first, or save a dense model "
                "with its own save_pretrained."
            )
        return record


def _made_in_inference_mode(model: nn.Module, config: SparseConfig) -> bool:
    """Whether weights can be changed in inference mode only, outside of which all else is better done."""
    made_there = any(parameter.is_inference() for parameter in model.parameters())
    options = {"reconstruct": config.reconstruct, "allocation='loss'": config.allocation == "loss"}
    if made_there and any(options.values()):
        raise ValueError(
            f"{' and '.join(name for name, given in options.items() if given)}: there are no gradients for the "
            "weights of this model, which were made in torch.inference_mode(). Load it outside of it."
        )
    return made_there


@contextmanager
def _one_expert_at_a_time(model: nn.Module) -> Iterator[None]:
    """The way to run experts in which the tokens of each can be seen, instead of fused kernels."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    implementation = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(implementation)


def _code(options: Mapping[str, Any], given: bool) -> str:
    """The Python code that prunes with these options of `SparseConfig`, and with data given to `prune` or not."""
    default = SparseConfig().to_dict()
    texts = [
        f"{name}={value!r}"
        for name, value in options.items()
        if value != default[name] and not (given and name == "dataset")
    ]
    return (
        "from optimum_sparse import SparsePruner\n\n"
        f"pruner = SparsePruner({', '.join(texts)})\n"
        f"pruner.prune(model, tokenizer{', dataset' if given else ''})"
    )


def _few_tokens(report: SparsityReport, kind: type[Statistics] | None) -> list[str]:
    """What to say if weights were fitted to so little text that their errors on it say nothing."""
    tokens = (report.calibration or {}).get("num_tokens")
    width = max((entry.shape[1] for entry in report.matrices), default=0)
    if tokens is None or kind is None or tokens >= kind.enough_tokens(width):
        return []
    return [
        f"calibrated on {tokens} tokens, where matrices have up to {width} inputs: errors are small because there is "
        "little text to be wrong on, and those on other text are larger; take several times as many tokens"
    ]


def _dummy_batch(model: nn.Module) -> dict[str, Any]:
    """A few tokens that show how the model works."""
    if isinstance(model, PreTrainedModel):
        return dict(model.dummy_inputs)
    return {"input_ids": torch.arange(5)[None]}


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a loaded model, got {model!r}: call AutoModelForCausalLM.from_pretrained first."
        )
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError(
            "The model is compiled, or a module of it, so its layers cannot be watched: prune it before torch.compile."
        )
    # PEFT can also have put them into a part of the model.
    adapters: Any = next(filter(None, (getattr(module, "peft_config", None) for module in model.modules())), None)
    if adapters:
        raise ValueError(
            f"The model carries adapters ({', '.join(adapters)}): prune the model without them, or "
            "merge them first with merge_and_unload()."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = getattr(quantizer.quantization_config, "quant_method", None)
        method = getattr(method, "value", method)
        if method != "gguf":
            raise ValueError(f"The model is quantized with {method}: prune the unquantized model, then quantize it.")
        # Its weights are plain tensors already; without the quantizer it can be saved.
        quantizer.remove_quantization_config(model)
    kinds = (SparseLinear, DenseLinear, SemiStructuredLinear)
    replaced = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if replaced:
        raise ValueError(
            f"{len(replaced)} layers are for inference, among them {replaced[0]}, and cannot be pruned: load the "
            "model without runtime='sparse', and prune it before sparsify_for_inference."
        )
    if model.training:
        raise ValueError("The model is in training mode, so dropout would disturb the statistics: call model.eval().")
    offloaded = offloaded_places(model)
    absent = [name for name, p in model.named_parameters() if p.device.type == "meta" and name not in offloaded]
    if absent:
        raise ValueError(
            f"{len(absent)} weights are not loaded (on the meta device), among them {absent[0]}: load the model with "
            "from_pretrained, which may offload it (device_map='auto'), or offload it with accelerate."
        )
    devices = {p.device for p in model.parameters()} - {torch.device("meta")}
    if any(device.type == "mps" for device in devices):
        raise ValueError(
            "Apple's mps device has no float64, which SparseGPT needs: move the model with model.to('cpu')."
        )
    if len(devices) > 1 and not hasattr(model, "hf_device_map"):
        raise ValueError(
            f"The model is spread over {', '.join(sorted(map(str, devices)))}: move it to one device with "
            "model.to(...), or load it with device_map='auto'."
        )
