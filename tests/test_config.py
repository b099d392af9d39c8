"""Options: defaults, ranges, errors that help, and the JSON round trip."""

import json
from pathlib import Path

import pytest

from optimum_sparse import SparsePruner
from optimum_sparse.config import METHOD_NAMES, PRESETS, SparseConfig, resolve_sparsity, split_pattern
from optimum_sparse.methods import METHODS


def test_defaults_are_those_of_the_documentation():
    config = SparseConfig()
    assert (config.method, config.sparsity, config.pattern) == ("admm", 0.5, None)
    assert (config.num_samples, config.iterations, config.dampening_frac) == (128, 8, 0.01)
    assert config.ignore == ("lm_head",) and config.true_sequential is None and config.pack_documents


def test_method_names_are_those_of_the_methods():
    assert tuple(METHODS) == METHOD_NAMES


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "wanda", "pattern": "2:4", "comparison_group": "layer", "seed": 3},
        {"sparsity": 0.7, "targets": ["mlp.*"], "ignore": [], "block_range": [1, 3], "dataset": ["a text", "another"]},
        {"overrides": [{"match": "k_proj", "pattern": "1:4"}, {"match": "*.0.*", "sparsity": 0}]},
    ],
)
def test_json_round_trip(options, tmp_path):
    config = SparseConfig(**options)
    assert SparseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.to_json_file(tmp_path / "config.json")
    assert SparseConfig.from_json_file(tmp_path / "config.json") == config


def test_every_field_has_a_help_text():
    assert all(len(field.metadata["help"]) > 10 for field in SparseConfig.__dataclass_fields__.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spasity": 0.5}, "did you mean 'sparsity'"),
        ({"method": "wnada"}, "did you mean 'wanda'"),
        ({"sparsity": 1.0}, r"0 <= sparsity < 1, got 1.0"),
        ({"sparsity": -0.1}, r"got -0.1"),
        ({"sparsity": 50}, r"got 50"),
        ({"sparsity": float("nan")}, r"got nan"),
        ({"sparsity": True}, r"got True"),
        ({"pattern": "4:2"}, "1 <= N < M"),
        ({"pattern": "0:4"}, "1 <= N < M"),
        ({"pattern": "2-4"}, "got '2-4'"),
        ({"pattern": "2:4", "sparsity": 0.7}, "sets exactly 0.5"),
        ({"num_samples": 0}, "at least 1"),
        ({"block_size": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
        ({"dampening_frac": 0}, r"\(0, 1\]"),
        ({"comparison_group": "row", "method": "wanda"}, "output, layer"),
        ({"comparison_group": "layer", "method": "sparsegpt"}, "not to sparsegpt"),
        ({"iterations": 0}, "at least 1"),
        ({"block_range": [3, 3]}, "empty"),
        ({"block_range": [1, 2, 3]}, "first, last"),
        ({"dataset": []}, "empty"),
        ({"dataset": ["", "  "]}, "empty"),
        ({"overrides": [{"match": "k_proj"}]}, "changes nothing"),
        ({"overrides": [{"match": "k_proj", "sparsity": 2}]}, "got 2"),
        ({"rescale": True, "method": "magnitude"}, "does not go with method='magnitude', which sees no data"),
        ({"overrides": [{"match": "k_proj", "sparsty": 0.2}]}, "did you mean 'sparsity'"),
    ],
)
def test_bad_values_are_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig.from_dict(options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 1.5},
        {"seed": "0"},
        {"true_sequential": "no"},
        {"equal_tokens": 1},
        {"rescale": "yes"},
        {"iterations": 2.5},
        {"dataset": 3},
        {"dataset": [[1, 2]]},
        {"targets": [1]},
        {"overrides": {"match": "k_proj", "sparsity": 0.1}},
        {"overrides": ["k_proj"]},
        {"block_range": 3},
    ],
)
def test_wrong_types_are_refused(options):
    with pytest.raises(TypeError, match=r"must be|is like"):
        SparseConfig(**options)


def test_a_single_pattern_may_stand_alone():
    assert SparseConfig(targets="q_proj").targets == ("q_proj",)


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not valid JSON"):
        SparseConfig.from_json_file(tmp_path / "bad.json")


def test_pattern_counts_the_weights_that_are_kept():
    assert split_pattern("1:4") == (1, 4)
    assert resolve_sparsity(None, "1:4") == 0.75
    assert resolve_sparsity(0.75, "1:4") == 0.75
    assert resolve_sparsity(None, None) == 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_options_that_others_win_over(preset: str):
    config = SparseConfig.preset(preset, sparsity=0.7)
    assert config == SparseConfig(sparsity=0.7, **PRESETS[preset])
    assert SparsePruner(preset=preset, sparsity=0.7).config == config
    assert SparseConfig.from_dict(config.to_dict()) == config
    assert SparseConfig.preset(preset, method="wanda").method == "wanda"
    assert "preset" not in config.to_dict()  # what it stood for is what counts, also if that changes


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_patterns_alone(preset: str):
    assert SparseConfig.preset(preset, pattern="2:4").allocation is None
    assert SparseConfig.preset(preset, pattern=None).allocation == PRESETS[preset].get("allocation")
    some_dense = SparseConfig.preset(preset, pattern="2:4", sparsity=0.4, allocation="loss")
    assert some_dense.allocation == "loss"


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="Unknown preset 'bset': did you mean 'best'"):
        SparseConfig.preset("bset")
    with pytest.raises(ValueError, match="Unknown option 'methd'"):
        SparseConfig.preset("best", methd="wanda")
    assert SparseConfig.from_dict({"preset": None}) == SparseConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_correction": 0}, r"must be a number in \(0, 1\], got 0"),
        ({"error_correction": 1.5}, r"must be a number in \(0, 1\], got 1.5"),
        ({"error_correction": True}, r"must be a number in \(0, 1\], got True"),
        ({"error_correction": 0.5, "true_sequential": True}, "true_sequential=True, which prunes layer by layer"),
        ({"error_correction": 0.5, "method": "magnitude"}, "method='magnitude', which sees no data"),
    ],
)
def test_error_correction(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SparseConfig(**options)
    assert SparseConfig(error_correction=0.5).true_sequential is False


def test_a_path_is_a_dataset():
    assert SparseConfig(dataset=Path("texts") / "mine.txt").dataset == str(Path("texts") / "mine.txt")


def test_texts_in_a_tuple_round_trip():
    config = SparseConfig(dataset=("one", "two"))
    assert SparseConfig.from_dict(config.to_dict()) == config
