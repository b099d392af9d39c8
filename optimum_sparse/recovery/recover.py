"""`recover`: from a pruned model and a dataset to a trained model with the same zeros, saved with a record of it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from .. import metadata
from ..calibration.interface import is_encoder_decoder, longest_input
from ..integrations.hub import model_card
from ..loading import read_json
from ..saving import check_target, replace_folder
from .callback import SparsityCallback, train_norms_only
from .config import RecoveryConfig
from .data import IGNORED, PadRight, read_rows, tokenize_rows
from .distillation import DistillationTrainer, check_teacher
from .masks import Mask, count_outside, find_masks, parameter
from .teacher_cache import TopKCache, fingerprint

logger = logging.getLogger(__name__)

CHECKPOINTS = "recovery-checkpoints"
RUN_FILE = "run.json"
WARMUP = 0.05  # of the steps
SEQLEN = 1024
# A loss, in nats, of which no perplexity can be computed.
DIVERGED = 700.0

CARD = """
## How it was trained after pruning

{what} on {dataset}{teacher}: {steps} steps, {tokens:,} tokens. No pruned weight was changed.
Perplexity on {num_texts} texts held out of the same data: {before:.4g} before, {after:.4g} after.
"""


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str | os.PathLike[str],
    dataset: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    config: RecoveryConfig | None = None,
    teacher: PreTrainedModel | None = None,
    teacher_cache: TopKCache | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a pruned model without changing a zero, and save it with tokenizer, record and card.

    Checkpoints are written to a folder in `output`; when the same call is made again after an interruption, training
    goes on from the last of them. They are removed when the result is saved.

    Args:
        model: A pruned model; trained in place, unless its adapter is merged into it.
        tokenizer: Its tokenizer.
        output: Folder to save in.
        dataset: A file, a Hub id or rows, in one of the formats of `tokenize_rows`.
        config: How to train.
        teacher: The dense model; the loss is then the distance to it.
        teacher_cache: Keeps what the teacher says on disk.
        device: "cpu" or "cuda" (default: a GPU if there is one).
        progress: Show a progress bar.

    Returns:
        The record, as it stands in `config.sparsity_config["recovery"]` of the saved model.

    Raises:
        ValueError: The model is dense or does not predict the next token, `seqlen` is longer than it supports, the
            teacher has another vocabulary, the data are of no known format or too few, `output` holds checkpoints of
            another run, or training diverged.
        OSError: Data cannot be read, or the result cannot be written.
    """
    config = config or RecoveryConfig()
    seqlen = _length(config, model)
    config = replace(config, seqlen=seqlen)
    output = Path(output)
    check_target(model, output)
    if (described := getattr(model.config, "sparsity_config", None)) is not None:
        metadata.check_record(described)
    masks = find_masks(model)
    if teacher is not None:
        check_teacher(model, teacher)
        if getattr(teacher.config, "sparsity_config", None) is not None:
            logger.warning("The teacher, %s, has been pruned itself.", teacher.name_or_path)
    if "quantization" in model.config.sparsity_config:
        logger.warning("Training moves weights off their grids: the result is saved without, and is not quantised.")
    examples = tokenize_rows(read_rows(dataset, config.num_samples), tokenizer, seqlen)
    training, held_out = _split(examples, config)
    checkpoints = output / CHECKPOINTS
    _check_same_run(checkpoints, _identity(config, model, masks, examples, teacher))

    arguments = _arguments(config, checkpoints, device, model.dtype, progress)
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    model.to(arguments.device)
    collate = PadRight(_padding(tokenizer))
    before = mean_loss(model, held_out, collate, config.batch_size)
    if config.method != "lora":
        model.float()  # the small steps of training vanish in half precision
    kind: Any = Trainer
    if teacher is not None:
        distilled = {"teacher": teacher, "kl_weight": config.kl_weight, "temperature": config.temperature}
        kind = partial(DistillationTrainer, **distilled, cache=teacher_cache)
    trainer = kind(
        model=_prepared(model, config, masks),
        args=arguments,
        train_dataset=training,
        data_collator=collate,
        callbacks=[SparsityCallback(model, masks)] if config.method == "full" else [],
    )
    last = get_last_checkpoint(str(checkpoints))
    if last and config.method != "lora":  # `Trainer` leaves out what is renamed or joined in saving
        model.load_state_dict(type(model).from_pretrained(last, dtype=torch.float32).state_dict())
    state = TrainerState.load_from_json(os.path.join(last, TRAINER_STATE_NAME)) if last else TrainerState()
    if last is None or state.global_step < config.max_steps:
        trainer.train(resume_from_checkpoint=last)
    else:  # `train` would make one more step
        trainer.state = state
        trainer._load_from_checkpoint(last)

    recovered: Any = trainer.model.merge_and_unload() if config.method == "lora" else trainer.model
    recovered.eval()
    for name, tensor in _tensors(recovered):  # each its own: some models keep a few in fp32
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
    finite = all(tensor.isfinite().all() for tensor in recovered.parameters())
    after = mean_loss(recovered, held_out, collate, config.batch_size) if finite else math.inf
    if not after < DIVERGED:
        shutil.rmtree(checkpoints)
        raise ValueError(
            f"Training diverged: the loss on held-out texts was {before:.2f} and is {after:.2f}. Lower the learning "
            f"rate, which was {config.peak_learning_rate:g}."
        )
    _check_zeros(recovered, masks)
    record = {
        **config.to_dict(),
        "learning_rate": config.peak_learning_rate,
        "dataset": _public_name(dataset),
        "teacher": None if teacher is None else _public_name(teacher.name_or_path),
        "num_texts": len(training),
        "num_tokens": int(trainer.state.num_input_tokens_seen),
        "perplexity_before": math.exp(before),
        "perplexity_after": math.exp(after),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        | ({"peft": importlib.metadata.version("peft")} if config.method == "lora" else {}),
    }
    _save(recovered, tokenizer, output, record)
    shutil.rmtree(checkpoints)
    return record


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, examples: Sequence[Mapping[str, list[int]]], collate: PadRight, batch_size: int
) -> float:
    """Mean negative log-likelihood of all labels, in nats per token."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = {name: value.to(model.device) for name, value in collate(examples[start : start + batch_size]).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        for row, wanted in zip(logits, labels, strict=True):  # one text in fp32 at a time
            total += functional.cross_entropy(row.float(), wanted, ignore_index=IGNORED, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    model.train(was_training)
    return total / count


def _length(config: RecoveryConfig, model: PreTrainedModel) -> int:
    """Tokens per text, which the model supports."""
    if is_encoder_decoder(model) or not model.can_generate():
        raise ValueError(
            f"What is trained is a model that predicts the next token, got {type(model).__name__}: load it with "
            "AutoModelForCausalLM if it is one."
        )
    longest = longest_input(model) or math.inf
    seqlen = min(SEQLEN, longest) if config.seqlen is None else config.seqlen
    if seqlen > longest:
        raise ValueError(f"seqlen is {seqlen}, and {type(model).__name__} has {longest} positions: give at most that.")
    return int(seqlen)


def _split(examples: list[Any], config: RecoveryConfig) -> tuple[list[Any], list[Any]]:
    if len(examples) <= config.eval_samples:
        raise ValueError(
            f"The dataset gives {len(examples)} texts of at most {config.seqlen} tokens, and {config.eval_samples} "
            "are held out for evaluation: give more data, or lower eval_samples or seqlen."
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed)).tolist()
    shuffled = [examples[index] for index in order]
    return shuffled[config.eval_samples :], shuffled[: config.eval_samples]


def _prepared(model: PreTrainedModel, config: RecoveryConfig, masks: Mapping[str, Mask]) -> Any:
    """The model with only those parameters trainable that the method trains."""
    if config.method == "full":
        return model.requires_grad_(True)
    if config.method == "norms":
        return train_norms_only(model)
    from . import keep_sparsity  # says what to install if PEFT is missing

    from peft import LoraConfig, get_peft_model  # isort: skip

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        target_modules=[key.removesuffix(".weight") for key in masks if parameter(model, key).ndim == 2],
        target_parameters=[key for key in masks if parameter(model, key).ndim == 3] or None,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return keep_sparsity(get_peft_model(model, lora), masks)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"LoRA cannot train this {type(model).__name__} ({error}): choose method 'full' or 'norms'."
        ) from error


def _arguments(
    config: RecoveryConfig, folder: Path, device: str | None, dtype: torch.dtype, progress: bool
) -> TrainingArguments:
    on_gpu = torch.cuda.is_available() and device != "cpu"
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.peak_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(WARMUP * config.max_steps)),
        weight_decay=0.0,
        bf16=on_gpu and (dtype == torch.float32 or config.method != "lora") and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        seed=config.seed,
        save_steps=config.save_steps,
        save_total_limit=1,
        logging_steps=10,
        remove_unused_columns=False,  # all are used, whatever the signature of a model's forward says
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=not progress,
        report_to=[],
    )


def _identity(
    config: RecoveryConfig,
    model: PreTrainedModel,
    masks: Mapping[str, Mask],
    examples: list[Any],
    teacher: PreTrainedModel | None,
) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    digest = hashlib.sha256(json.dumps(examples).encode())
    digest.update("".join(f"{key} {mask.digest}" for key, mask in masks.items()).encode())
    options = {name: value for name, value in config.to_dict().items() if name != "save_steps"}
    models = {"model": fingerprint(model), "teacher": None if teacher is None else fingerprint(teacher)}
    return {**options, **models, "data or zeros": digest.hexdigest()}


def _check_same_run(folder: Path, identity: dict[str, Any]) -> None:
    file = folder / RUN_FILE
    if file.is_file() and get_last_checkpoint(str(folder)) is not None:
        found = read_json(file)
        different = [name for name in identity if found.get(name) != identity[name]]
        if different:
            raise ValueError(
                f"{folder} holds checkpoints of another run (other {', '.join(different)}): delete it to start anew, "
                "or repeat the options of that run to resume it."
            )
        logger.warning("Resuming the run in %s.", folder)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def _check_zeros(model: PreTrainedModel, masks: Mapping[str, Mask]) -> None:
    lost = {key: outside for key, mask in masks.items() if (outside := count_outside(parameter(model, key), mask))}
    assert not lost, f"pruned weights are not zero after training: {lost}"


def _save(model: PreTrainedModel, tokenizer: Any, output: Path, record: dict[str, Any]) -> None:
    described = model.config.sparsity_config
    if "recovery" in described:
        record["previous"] = described["recovery"]
    model.config.sparsity_config = {**metadata.recount(model, described), "recovery": record}
    card = model_card(model.config.sparsity_config)
    card.data["base_model_relation"] = "finetune"
    learned = {"lora": "Masked LoRA was trained and merged", "full": "All weights that are not zero were trained"}
    card.content += CARD.format(
        what=learned.get(record["method"], "Norms and biases were trained"),
        dataset=record["dataset"],
        teacher=f", with {record['teacher']} as the teacher" if record["teacher"] else "",
        steps=record["max_steps"],
        tokens=record["num_tokens"],
        num_texts=record["eval_samples"],
        before=record["perplexity_before"],
        after=record["perplexity_after"],
    )
    with replace_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card.save(folder / "README.md")


def _padding(tokenizer: Any) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None)


def _public_name(source: Any) -> str:
    """A name without the folders of this machine, which are nobody's business."""
    if not isinstance(source, (str, os.PathLike)):
        return "rows"
    return Path(source).resolve().name if os.path.exists(source) else str(source)
