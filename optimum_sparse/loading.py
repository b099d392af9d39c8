"""Load a dense model and its tokenizer from the Hub, a folder or a GGUF file."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.getLogger(__name__)

# quantization_config.quant_method of a checkpoint that this package packed: without loss, hence not quantised.
PACKED = "optimum_sparse_packed"
# What a packed checkpoint can be in memory: see `PackedConfig`.
RUNTIMES = ("dense", "sparse")

# A folder with none of these has no tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# A GGUF file begins with its metadata: some megabytes, most of them the vocabulary.
GGUF_HEADER = 2**26
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_model(
    source: str | os.PathLike,
    dtype: str | torch.dtype = "auto",
    device_map: str | Mapping[str, str | int | torch.device] | None = None,
    offload_folder: Path | None = None,
    quantized: bool = False,
    quantization_config: QuantizationConfigMixin | None = None,
    trust_remote_code: bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model: a causal language model, or of whatever kind its configuration says.

    Args:
        source: A Hub id, a folder that `save_pretrained` wrote, or a `.gguf` file, which is dequantised.
        dtype: A floating-point type or its name; `"auto"` is the type of the checkpoint, bfloat16 for GGUF.
        device_map: Where its modules go, as for `from_pretrained`; by default to the CPU. Not for GGUF.
        offload_folder: Where weights go that are offloaded to disk and are not in the checkpoint as in memory.
        quantized: Whether it may be quantised, which it may not be to be pruned.
        quantization_config: As for `from_pretrained`, e.g. a `PackedConfig`. Not for GGUF.
        trust_remote_code: Whether code that comes with the model may be run; `None` asks who sits at the terminal.

    Returns:
        The model in evaluation mode, and its tokenizer, or `None` if there are no tokenizer files.

    Raises:
        FileNotFoundError: There is no such file, folder or Hub model.
        ConnectionError: The model is not in the local cache and the Hub cannot be reached.
        ValueError: The checkpoint is quantised, is an adapter, lacks weights, or is damaged.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig

    path = local_path(source)
    if path is not None and path.is_file():
        if quantization_config is not None:
            raise ValueError(f"{path} is a file, and {type(quantization_config).__name__} is not for it.")
        return _load_gguf(path, dtype)
    name = str(path or source)
    with hub_errors(name):
        config_file = find_file(name, "config.json")
        if config_file is None:
            raise FileNotFoundError(_no_config(name, path))
        if not quantized:
            check_not_quantized(name, config_file)
        # The cache names the folder of a snapshot after its commit.
        revision = None if path else config_file.parent.name
        try:
            _check_dtype(name, read_json(config_file))
            where = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
            model, info = model_class(AutoConfig.from_pretrained(name, **where)).from_pretrained(
                name,
                **where,
                dtype=dtype,
                output_loading_info=True,
                device_map=device_map,
                offload_folder=offload_folder,
                quantization_config=quantization_config,
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"The files of {name} do not make the model that its config.json describes ({error}): they are "
                "damaged, incomplete, or of another model."
            ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]}, which would be "
            "random: give a complete checkpoint in the layout of `save_pretrained`."
        )
    model.config._commit_hash = revision
    return model, load_tokenizer(name, revision, trust_remote_code)


def model_without_weights(
    source: str | os.PathLike, dtype: str | torch.dtype = "auto", trust_remote_code: bool | None = None
) -> PreTrainedModel:
    """The model that a Hub id, a folder or a config.json describes, with weights as they are before training.

    Args:
        source: Where the configuration is.
        dtype: As for `load_model`; `"auto"` is what the configuration says, else float32.
        trust_remote_code: As for `load_model`.

    Raises:
        FileNotFoundError: There is no configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = local_path(source)
    if path is not None and path.is_file() and path.suffix != ".json":
        raise ValueError(f"{path} is neither a folder nor a config.json: the plan needs the configuration of a model.")
    with hub_errors(str(source)):
        file = path if path is not None and path.is_file() else find_file(str(path or source), "config.json")
        if file is None:
            raise FileNotFoundError(_no_config(str(source), path))
        _check_dtype(str(source), read_json(file))
        # Code that comes with a model is not found beside a file, but in a folder or on the Hub.
        where = str(source) if path is None else file.parent if file.name == "config.json" else file
        revision = file.parent.name if path is None else "main"
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    kind = model_class(config)
    wanted = (getattr(config, "dtype", None) or "float32") if dtype == "auto" else dtype
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted)
    try:
        if kind is AutoModelForCausalLM:
            return kind.from_config(config, trust_remote_code=trust_remote_code)
        return kind(config)
    finally:
        torch.set_default_dtype(before)


def class_to_load(architecture: str) -> str:
    """Name of the class whose `from_pretrained` loads a model of a class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return "AutoModelForCausalLM" if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else architecture


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of Transformers that a configuration names for its model type.

    Only classes that Transformers itself has for that type come into question; without one among them, that of causal
    language models is taken.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _LazyAutoMapping

    asked_for = getattr(config, "architectures", None) or []
    for mapping in vars(modeling_auto).values():
        if isinstance(mapping, _LazyAutoMapping) and type(config) in mapping:
            found = mapping[type(config)]
            for candidate in found if isinstance(found, tuple) else (found,):
                if candidate.__name__ in asked_for:
                    return candidate
    return AutoModelForCausalLM


def load_tokenizer(
    name: str, revision: str | None, trust_remote_code: bool | None = None
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a folder (`revision=None`) or Hub model; `None` if it has no tokenizer files."""
    from transformers import AutoTokenizer

    with hub_errors(name):
        if not any(find_file(name, file, revision) for file in TOKENIZER_FILES):
            logger.warning("%s has no tokenizer files.", name)
            return None
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=trust_remote_code)


def find_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """Path of the file `name` of a folder or Hub model, downloaded if need be; `None` if it has no such file.

    Raises:
        OSError: As huggingface_hub does if the Hub model cannot be reached; see `hub_errors`.
    """
    if os.path.isdir(source):
        path = Path(source, name)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except EntryNotFoundError as error:
        # A known revision is in the cache. Offline, a file that is not there counts as one that the model lacks.
        if isinstance(error, LocalEntryNotFoundError) and revision is None:
            raise
        return None


def local_path(source: str | os.PathLike) -> Path | None:
    """The existing file or folder `source`, or `None` if it can only be a Hub id.

    Raises:
        FileNotFoundError: `source` does not exist and is not like a Hub id.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"There is no file or folder {str(source)!r}: check the path, or give a Hub id.")
    return None


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Say what to do when the Hub model `source` cannot be had."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{source!r} is gated: accept its terms on its Hub page, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no folder {source!r} and no model of this name on the Hub: check the spelling; if the model is "
            "private, log in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"There is no folder {source!r}, no model of this name in the local cache, and the Hub cannot be reached: "
            "check the connection (and that HF_HUB_OFFLINE is not set), or give the path of a local folder."
        ) from error


def read_json(path: Path) -> dict:
    """Read a JSON file that must hold an object.

    Raises:
        ValueError: The file is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(content).__name__}.")
    return content


def snapshot_revision(folder: Path) -> str | None:
    """The revision whose files the Hub cache keeps in `folder`, or `None` if it is another folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Which quantisation, or packing, a config.json names; `None` if the weights are as they are."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    return str(quantization.get("quant_method") if isinstance(quantization, dict) else quantization)


def check_not_quantized(source: str, config_file: Path) -> None:
    """Refuse a checkpoint whose config.json says that it is quantised.

    Raises:
        ValueError: It has a `quantization_config`, and not that of a packed checkpoint.
    """
    method = quantization_method(read_json(config_file))
    if method is not None and method != PACKED:
        raise ValueError(
            f"{source} carries a quantization_config ({method}): quantised weights cannot be pruned. Give the dense "
            "checkpoint that it was made from, and quantise after pruning."
        )


def _check_dtype(source: str, config: Mapping[str, Any]) -> None:
    import torch

    dtype = config.get("dtype", config.get("torch_dtype"))
    known = isinstance(getattr(torch, str(dtype), None), torch.dtype)
    if dtype is not None and not isinstance(dtype, dict) and not known:  # a dict has one for each part of the model
        raise ValueError(f"The config.json of {source} names {dtype!r} as the dtype of its weights, which is none.")


def _no_config(name: str, folder: Path | None) -> str:
    if folder is not None and (folder / "adapter_config.json").is_file():
        return f"{name} is a PEFT adapter: merge it into its base model (`merge_and_unload`), save that and prune it."
    if folder is not None and (files := sorted(file.name for file in folder.glob("*.gguf"))):
        return f"{name} has no config.json, but GGUF files: give one of them, e.g. {os.path.join(name, files[0])}."
    return f"{name} has no config.json: give a model that transformers can load."


def _load_gguf(path: Path, dtype: str | torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise ImportError("Reading .gguf files needs one more package: pip install 'optimum-sparse[gguf]'.")
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is a file, but not a .gguf file: give the folder of the model, or a Hub id.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file, whatever its name says: download it again.")
    folder = str(path.parent)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=path.name,
        dtype="bfloat16" if dtype == "auto" else dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The reader puts these in the configuration; they are no options of the model.
    for stray in ("_model_name_or_path", "unk_token_id"):
        model.config.__dict__.pop(stray, None)
    model.name_or_path = model.config.name_or_path = str(path)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    if _splits_digits(path):
        _split_digits(tokenizer)
    return model, tokenizer


def _splits_digits(path: Path) -> bool:
    """Whether a GGUF file names SmolLM's way to split text; `GGUFReader` would decode all of its vocabulary first."""
    named = b"tokenizer.ggml.pre" + struct.pack("<IQ", 8, 6) + b"smollm"  # key, kind of value, length, value
    with path.open("rb") as file:
        return named in file.read(GGUF_HEADER)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give SmolLM's tokenizer back the splitting of digits, which transformers' GGUF reader drops."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
