"""Loading dense models: what comes back, and what is said when it cannot be had."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_sparse.loading import load_model, load_tokenizer, model_class, model_without_weights

from . import beyond_text
from .checkpoints import save_tiny, tiny_tokenizer, write_gguf


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("as_type", [str, Path])
def test_folder(as_type: type, tmp_path: Path):
    dense = save_tiny(tmp_path)
    model, tokenizer = load_model(as_type(tmp_path))
    assert not model.training
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.name_or_path == str(tmp_path)
    assert tokenizer("a b").input_ids == tiny_tokenizer()("a b").input_ids


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float16), ("bfloat16", torch.bfloat16), (torch.float32, torch.float32)],
    ids=str,
)
def test_dtype(dtype: str | torch.dtype, expected: torch.dtype, tmp_path: Path):
    save_tiny(tmp_path).half().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny(tmp_path / "model")
    assert load_model("~/model")[1] is not None


def test_no_tokenizer_files(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_tiny(tmp_path, tokenizer=False)
    assert load_model(tmp_path)[1] is None
    assert "has no tokenizer files" in caplog.text


def test_broken_tokenizer_is_not_taken_for_none(tmp_path: Path):
    save_tiny(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Exception):  # noqa: B017 (of whatever type transformers raises)
        load_tokenizer(str(tmp_path), None)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("./none", FileNotFoundError, r"no file or folder './none'"),
        ("/none/at/all", FileNotFoundError, r"no file or folder '/none/at/all'"),
        ("none/model.gguf", FileNotFoundError, r"no file or folder 'none/model.gguf'"),
        ("white space", FileNotFoundError, r"give a Hub id"),
        ("some/model", ConnectionError, r"no folder 'some/model'.*cannot be reached.*path of a local folder"),
        ("model", ConnectionError, r"no folder 'model'"),
    ],
)
def test_nothing_there(source: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        load_model(source)


def empty(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapter(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text("{}")


def only_gguf(folder: Path) -> None:
    empty(folder)
    (folder / "model.gguf").write_bytes(b"GGUF")


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{'a': 1}")


def quantised(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def packed(folder: Path) -> None:
    """As the compressed-tensors files of old: transformers would load random weights with no error."""
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if "proj" in name]
    for name in names:
        tensors[f"{name}_packed"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, r"has no config\.json"),
        (adapter, r"is a PEFT adapter: merge it"),
        (only_gguf, r"give one of them, e\.g\. \S+model\.gguf"),
        (not_json, r"is not valid JSON"),
        (quantised, r"carries a quantization_config \(gptq\)"),
        (packed, r"lacks 14 weights of LlamaForCausalLM, among them model\.layers\.0\.\S+_proj\.weight"),
    ],
)
def test_what_cannot_be_pruned(damage, message: str, tmp_path: Path):
    save_tiny(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(tmp_path)


def test_tied_weights_are_not_missing(tmp_path: Path):
    save_tiny(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model, _ = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "build",
    [
        beyond_text.t5_model,
        beyond_text.bart_model,
        beyond_text.bert_model,
        beyond_text.whisper_model,
        beyond_text.vit_model,
        beyond_text.convnext_model,
        beyond_text.llava_model,
    ],
)
def test_other_models_than_those_of_language(build, tmp_path: Path):
    """The class is the one that saved the model."""
    dense = build()
    dense.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert type(model) is type(dense) and tokenizer is None and not model.training
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["LlamaForCausalLM"], "LlamaForCausalLM"),
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        (["LlamaModel"], "LlamaModel"),
        (["SomethingElse", "LlamaForQuestionAnswering"], "LlamaForQuestionAnswering"),
        # Not among those that Transformers has for Llama, so that it must not be looked up by name.
        (["GPT2LMHeadModel"], "AutoModelForCausalLM"),
        (["os.system"], "AutoModelForCausalLM"),
        (["AutoConfig"], "AutoModelForCausalLM"),
        ([], "AutoModelForCausalLM"),
        (None, "AutoModelForCausalLM"),
    ],
    ids=str,
)
def test_model_class(architectures: list[str] | None, expected: str, tmp_path: Path):
    save_tiny(tmp_path, tokenizer=False)
    change_config(tmp_path, architectures=architectures)
    assert model_class(AutoConfig.from_pretrained(tmp_path)).__name__ == expected


@pytest.mark.parametrize(("name", "message"), [("a.gguf", "is not a GGUF file"), ("a.bin", "not a .gguf file")])
def test_files_that_are_no_gguf(name: str, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("pre_tokenizer", "tokens"), [("smollm", "ĠĠ 1 2"), ("gpt-2", "Ġ Ġ 1 2"), ("smol", "Ġ Ġ 1 2")]
)
def test_text_is_split_as_a_gguf_file_says(pre_tokenizer: str, tokens: str, tmp_path: Path):
    _, tokenizer = load_model(write_gguf(tmp_path / "tiny.gguf", pre_tokenizer))
    assert tokenizer.tokenize("  12") == tokens.split()


@pytest.mark.slow
def test_gguf(smollm2, smollm2_gguf: Path, tmp_path: Path):
    model, tokenizer = smollm2  # what `load_model` makes of the file
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert model.name_or_path == str(smollm2_gguf)
    # SmolLM's tokenizer splits digits before spaces are joined, so two spaces stay one token.
    assert tokenizer.tokenize("  12 a34") == ["ĠĠ", "1", "2", "Ġa", "3", "4"]
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    (answer,) = model.generate(**prompt, max_new_tokens=1, do_sample=False)[:, -1:].tolist()
    assert tokenizer.decode(answer) == " Paris"

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("  12 a34", "x = 3.14\n\n\tif é: # 日本", "<|im_start|>user"):
        assert reloaded(text).input_ids == tokenizer(text).input_ids
        assert reloaded.decode(reloaded(text).input_ids) == text


@pytest.mark.parametrize("dtype", ["int17", 5, "", "torch.bfloat16"], ids=str)
def test_a_dtype_that_is_none(dtype: object, tmp_path: Path):
    save_tiny(tmp_path, tokenizer=False)
    change_config(tmp_path, dtype=dtype)
    for load in (load_model, model_without_weights):
        with pytest.raises(ValueError, match=f"names {dtype!r} as the dtype of its weights, which is none"):
            load(tmp_path)
