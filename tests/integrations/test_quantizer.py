"""`from_pretrained(..., quantization_config=SparseConfig(...))`: an ordinary model, pruned as `SparsePruner` does."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_sparse import SparseConfig
from optimum_sparse.loading import load_model
from optimum_sparse.pruner import SparsePruner

from ..checkpoints import save_tiny, write_text
from ..helpers import tiny_batches


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "squares.txt")


def assert_same_weights(one: PreTrainedModel, other: PreTrainedModel) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("dataset", ["text", "self"])
def test_prunes_as_the_pruner_does(dataset: str, dense: Path, text: Path):
    dataset = str(text) if dataset == "text" else dataset
    config = SparseConfig(pattern="2:4", dataset=dataset, num_samples=4, seqlen=16)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    expected = SparsePruner(config).prune(*load_model(dense))
    assert_same_weights(model, expected)
    assert model.config.sparsity_config == expected.config.sparsity_config
    assert model.config.sparsity_config["achieved_sparsity"] == 0.5


@pytest.fixture
def pruned(dense: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(dense, quantization_config=SparseConfig(method="magnitude"))


def test_nothing_of_a_quantised_model_is_left(pruned: PreTrainedModel, dense: Path):
    ordinary = AutoModelForCausalLM.from_pretrained(dense)
    assert not pruned.training
    assert not getattr(pruned, "is_quantized", False)
    assert not hasattr(pruned, "hf_quantizer")
    assert not hasattr(pruned, "quantization_method")
    assert set(vars(pruned.config)) - {"sparsity_config", "_commit_hash"} == set(vars(ordinary.config))
    assert pruned.generation_config == ordinary.generation_config


def test_can_be_trained(pruned: PreTrainedModel):
    pruned.train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    before = pruned.model.layers[0].mlp.up_proj.weight.clone()
    (batch,) = tiny_batches(1)
    pruned(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(pruned.model.layers[0].mlp.up_proj.weight, before)


def test_can_be_moved_and_cast(pruned: PreTrainedModel):
    assert pruned.to("cpu", torch.float64).dtype == torch.float64
    assert pruned.half().dtype == torch.float16


def test_can_be_saved_and_loaded(pruned: PreTrainedModel, tmp_path: Path):
    pruned.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sparsity_config"] == pruned.config.sparsity_config
    assert not {"quantization_config", "_is_quantized"} & set(saved)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), pruned)


def test_options_of_from_pretrained_are_kept(dense: Path):
    config = SparseConfig(method="magnitude", pattern="2:4")
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager"
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert (model.model.layers[0].mlp.up_proj.weight == 0).sum() == 1024


def test_dictionary(dense: Path):
    options = {"quant_method": "optimum_sparse", "method": "magnitude", "sparsity": 0.75}
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=options)
    assert (model.lm_head.weight == 0).sum() == 0
    assert (model.model.layers[0].mlp.up_proj.weight == 0).sum() == 1536
    with pytest.raises(ValueError, match="did you mean 'sparsity'"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config={**options, "sparsty": 0.5})


def test_no_tokenizer(tmp_path: Path, text: Path):
    save_tiny(tmp_path, tokenizer=False)
    with pytest.raises(ValueError, match="tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SparseConfig(dataset=str(text)))


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "unheard-of"}, {"quant_method": "optimum_sparse"}, {"quant_method": "gptq", "bits": 4}],
    ids=str,
)
def test_quantised_checkpoint(quantization: dict, tmp_path: Path):
    """Its tensors are not weights, and transformers merely warns if it does not know the method."""
    save_tiny(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = quantization
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"carries a quantization_config|is quantized with GPTQConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SparseConfig(method="magnitude"))
