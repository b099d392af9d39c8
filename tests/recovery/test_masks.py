import pytest
import torch

from optimum_sparse.recovery import Mask, find_masks, load_masks, masks_of, save_masks
from optimum_sparse.recovery.masks import check_masks, count_outside, parameter
from tests.helpers import tiny_model

from .pruned import pruned_model


@pytest.mark.parametrize("shape", [(8, 8), (3, 5), (1, 1), (2, 3, 7), (64, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_mask_expands_to_what_it_was_made_of(shape, dtype):
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = Mask.of(kept)
    assert mask.bits.numel() == -(-kept.numel() // 8)
    assert mask.expand(dtype).dtype == dtype
    assert torch.equal(mask.expand(dtype), kept.to(dtype))
    assert mask.num_pruned == int((~kept).sum())


def test_bits_are_in_the_order_of_storage():
    kept = torch.zeros(2, 8, dtype=torch.bool)
    kept[0, 0] = kept[0, 3] = kept[1, 7] = True
    assert Mask.of(kept).bits.tolist() == [0b1001, 0b10000000]


def test_digest_depends_on_shape_and_bits():
    kept = torch.ones(4, 4, dtype=torch.bool)
    other = kept.clone()
    other[1, 2] = False
    digests = {Mask.of(k).digest for k in (kept, kept.view(2, 8), other)}
    assert len(digests) == 3
    assert Mask.of(kept).digest == Mask.of(kept.clone()).digest


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_masks_are_those_of_the_weights(architecture):
    model = pruned_model(architecture)
    masks = find_masks(model)
    assert len(masks) == len(model.config.sparsity_config["matrices"])
    for key, mask in masks.items():
        assert torch.equal(mask.expand(), model.get_parameter(key) != 0)
    check_masks(model, masks)


def test_experts_share_the_mask_of_their_parameter():
    model = pruned_model("mixtral")
    masks = find_masks(model)
    experts = [key for key in masks if key.endswith(".experts.gate_up_proj")]
    assert experts == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(masks[experts[0]].expand(), parameter(model, experts[0]) != 0)


def test_folded_names_are_understood():
    model = pruned_model()
    matrices = model.config.sparsity_config["matrices"]
    folded = {"model.layers.{0-1}.mlp.up_proj": matrices["model.layers.0.mlp.up_proj"]}
    model.config.sparsity_config["matrices"] = folded
    assert list(find_masks(model)) == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]


def test_a_kept_weight_that_becomes_zero_stays_kept(tmp_path):
    model = pruned_model()
    masks = find_masks(model)
    key = "model.layers.0.mlp.up_proj.weight"
    kept = masks[key].expand()
    with torch.no_grad():
        model.get_parameter(key).zero_()
    assert torch.equal(masks[key].expand(), kept)
    save_masks(masks, tmp_path / "masks.safetensors")
    loaded = load_masks(tmp_path / "masks.safetensors")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[k].expand(), masks[k].expand()) for k in masks)
    check_masks(model, loaded)


def test_a_dense_model_has_no_masks():
    with pytest.raises(ValueError, match=r"no config\.sparsity_config, so it is not known to be pruned"):
        find_masks(tiny_model())


def test_a_model_that_lost_its_zeros_is_refused():
    model = pruned_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(ValueError, match=r"says that 9216 weights were pruned, but only 8192 are zero"):
        find_masks(model)


def test_masks_of_a_model_pruned_by_other_means():
    model = pruned_model()
    del model.config.sparsity_config
    masks = masks_of(model, ["model.layers.0.mlp.up_proj"])
    assert list(masks) == ["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no matrix 'model\.layers\.9\.up_proj'"):
        masks_of(model, ["model.layers.9.up_proj"])


def test_masks_that_do_not_fit_are_refused():
    model, other = pruned_model(), pruned_model(seed=1)
    with pytest.raises(ValueError, match=r"\d+ weights of .* are not zero"):
        check_masks(model, find_masks(other))
    with pytest.raises(ValueError, match=r"is \[64, 32\] there, \[96, 32\] here"):
        check_masks(pruned_model(intermediate_size=96), {k: m for k, m in find_masks(model).items() if "gate" in k})
    with pytest.raises(
        ValueError, match=r"it has a 'model\.layers\.0\.self_attn\.q_proj\.weight', GPT2LMHeadModel not"
    ):
        check_masks(pruned_model("gpt2"), find_masks(model))


def test_weights_outside_the_mask_are_counted():
    kept = torch.tensor([[True, False, True, False]])
    assert count_outside(torch.tensor([[1.0, 2.0, 0.0, 0.0]]), Mask.of(kept)) == 1


def test_a_file_that_holds_no_masks_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is not a file of masks"):
        load_masks(path)
