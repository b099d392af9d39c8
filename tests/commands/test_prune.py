"""`optimum-cli sparse prune`: every option arrives, the result is what the library gives, errors are one line."""

import dataclasses
import json
import logging
import os
import shlex
import shutil
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_sparse.commands.prune import CLAIMED, PruneCommand, build_config, command_line
from optimum_sparse.config import SparseConfig, preset_options
from optimum_sparse.estimate import held_memory
from optimum_sparse.loading import PACKED, load_model
from optimum_sparse.pruner import SparsePruner
from optimum_sparse.report import SparsityReport

from ..beyond_text import bert_model, t5_model
from ..checkpoints import save_tiny, tiny_tokenizer, write_gguf, write_text
from .cli import sparse

# What someone types to set each field, and the value that it must get.
EVERY_FIELD = {
    "method": ("--method wanda", "wanda"),
    "sparsity": ("--sparsity 0.7", 0.7),
    "pattern": ("--pattern 1:4", "1:4"),
    "dataset": ("--dataset my.txt", "my.txt"),
    "num_samples": ("--num-samples 7", 7),
    "seqlen": ("--seqlen 99", 99),
    "batch_size": ("--batch-size 3", 3),
    "pack_documents": ("--no-pack-documents", False),
    "seed": ("--seed 5", 5),
    "targets": ("--targets q_proj mlp.* --targets k_proj", ("q_proj", "mlp.*", "k_proj")),
    "ignore": ("--ignore lm_head layers.0.*", ("lm_head", "layers.0.*")),
    "overrides": (
        "--override k_proj=2:4 mlp.*=0.6 --override v_proj=0",
        (
            {"match": "k_proj", "pattern": "2:4"},
            {"match": "mlp.*", "sparsity": 0.6},
            {"match": "v_proj", "sparsity": 0.0},
        ),
    ),
    "block_range": ("--block-range 1 3", (1, 3)),
    "block_size": ("--block-size 64", 64),
    "dampening_frac": ("--dampening-frac 0.1", 0.1),
    "equal_tokens": ("--equal-tokens", True),
    "rescale": ("--rescale", True),
    "iterations": ("--iterations 24", 24),
    "true_sequential": ("--no-true-sequential", False),
    "min_expert_tokens": ("--min-expert-tokens 32", 32),
    "calibrate_all_experts": ("--calibrate-all-experts", True),
    "comparison_group": ("--method wanda --comparison-group layer", "layer"),
    "refine": ("--refine cg", "cg"),
    "reconstruct": ("--reconstruct 5", 5),
    "error_correction": ("--error-correction 0.5", 0.5),
    "quantization": ("--quantization int4", "int4"),
    "group_size": ("--quantization int4 --group-size 32", 32),
    "symmetric": ("--quantization int4 --symmetric", True),
    "allocation": ("--allocation error", "error"),
}


def config_of(command_line: str) -> SparseConfig:
    parser = ArgumentParser()
    PruneCommand.parse_args(parser)
    return build_config(parser.parse_args(["MODEL", "OUT", *command_line.split()]))


def error_of(capsys: pytest.CaptureFixture) -> str:
    """The message of a command that failed as it should."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "squares.txt")


def test_the_table_above_has_every_field():
    assert list(EVERY_FIELD) == [field.name for field in dataclasses.fields(SparseConfig)]


@pytest.mark.parametrize("field", EVERY_FIELD)
def test_every_field_can_be_set(field: str):
    command_line, value = EVERY_FIELD[field]
    assert getattr(config_of(command_line), field) == value
    assert value != getattr(SparseConfig(), field)


def test_no_options_are_the_defaults():
    assert config_of("") == SparseConfig()


@pytest.mark.parametrize("value", ["mlp", "=0.5", "mlp=half", "mlp="])
def test_bad_override(value: str, capsys: pytest.CaptureFixture):
    assert sparse("prune", "MODEL", "OUT", "--override", value) == 2
    assert "argument --override: " in capsys.readouterr().err.splitlines()[-1]


def test_help_names_every_option_and_default(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "10000")  # or lines may break inside of a name, at its hyphens
    assert sparse("prune", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(SparseConfig):
        assert field.metadata["help"] in text
    for shown in ("MODEL", "OUT", "(default: 128)", "(default: admm)", "(default: yes)", "--no-true-sequential"):
        assert shown in text
    assert "default: None" not in text


@pytest.mark.parametrize("build", [t5_model, bert_model])
def test_other_models_of_text(build, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The class is that of the checkpoint, and the calibration data text as ever."""
    dense = build()
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    arguments = ("--pattern", "2:4", "--dataset", text, "--num-samples", "4", "--seqlen", "16")
    assert sparse("prune", tmp_path / "dense", tmp_path / "out", *arguments) == 0
    pruned = type(dense).from_pretrained(tmp_path / "out")
    metadata = pruned.config.sparsity_config
    assert metadata["achieved_sparsity"] == 0.5 and len(metadata["matrices"]) > 5
    assert sum(not torch.equal(a, b) for a, b in zip(pruned.parameters(), dense.parameters(), strict=True)) > 5
    capsys.readouterr()
    assert sparse("inspect", tmp_path / "out") == 0


def test_config_file_and_options(tmp_path: Path):
    file = tmp_path / "config.json"
    SparseConfig(pattern="2:4", num_samples=9, targets=["mlp.*"], dataset=["one text", "two"]).to_json_file(file)
    assert config_of(f"--config {file}") == SparseConfig.from_json_file(file)
    # The file says sparsity 0.5 as well, which is what 2:4 implies; 1:4 implies another one.
    mixed = config_of(f"--config {file} --pattern 1:4 --targets q_proj")
    assert (mixed.pattern, mixed.sparsity, mixed.targets, mixed.num_samples) == ("1:4", 0.75, ("q_proj",), 9)
    best = config_of(f"--config {file} --preset best --method wanda")
    assert best == SparseConfig.from_dict(
        {**json.loads(file.read_text()), **preset_options("best", "2:4"), "method": "wanda"}
    )
    assert config_of("--preset best").allocation == "loss" and best.allocation is None
    unstructured = config_of(f"--config {file} --sparsity 0.6")
    assert (unstructured.pattern, unstructured.sparsity) == (None, 0.6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{sparsity: 0.5}", "is not valid JSON"),
        ("[0.5]", "must hold a JSON object"),
        ('{"sparsty": 0.5}', "Unknown option 'sparsty': did you mean 'sparsity'?"),
        ('{"sparsity": "half"}', "sparsity must be a number"),
        ('{"targets": 5}', "targets must be a list"),
    ],
)
def test_bad_config_file(content: str, message: str, tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "config.json"
    file.write_text(content)
    assert sparse("prune", dense, tmp_path / "out", "--config", file) == 2
    assert message in error_of(capsys)


def test_magnitude(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "new" / "out"
    assert sparse("prune", dense, out, "--method", "magnitude", "--sparsity", "0.75") == 0
    assert f"Saved to {out}" in capsys.readouterr().out
    pruned, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, dense))
    weight, original = (m.model.layers[1].mlp.up_proj.weight for m in (pruned, before))
    smallest_kept = weight[weight != 0].abs().min()
    assert (weight == 0).sum() == 0.75 * weight.numel()
    assert (original[weight == 0].abs() <= smallest_kept).all()
    assert torch.equal(weight[weight != 0], original[weight != 0])
    assert AutoTokenizer.from_pretrained(out)("x^2").input_ids == tiny_tokenizer()("x^2").input_ids
    assert sparse("inspect", out) == 0


def test_many_options_give_what_the_library_gives(dense: Path, text: Path, tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"method": "wanda", "seqlen": 32, "num_samples": 99}))
    options = "--method admm --pattern 2:4 --num-samples 6 --batch-size 4 --seed 3 --no-true-sequential"
    overrides = ["--override", "down_proj=0.25", "--override", "k_proj=0", "--ignore", "lm_head", "layers.0.mlp.*"]
    outputs = ["--report", tmp_path / "reports" / "report.json", "--dtype", "bfloat16", "--device", "cpu"]
    arguments = ["--config", file, *options.split(), *overrides, "--dataset", text, *outputs]
    assert sparse("prune", dense, tmp_path / "out", *arguments) == 0

    model, tokenizer = load_model(dense, "bfloat16")
    config = SparseConfig(
        pattern="2:4",
        seqlen=32,
        num_samples=6,
        batch_size=4,
        seed=3,
        true_sequential=False,
        dataset=str(text),
        ignore=("lm_head", "layers.0.mlp.*"),
        overrides=({"match": "down_proj", "sparsity": 0.25}, {"match": "k_proj", "sparsity": 0.0}),
    )
    expected = SparsePruner(config, progress=False).prune(model, tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype == torch.bfloat16
    assert saved.config.sparsity_config == expected.config.sparsity_config
    assert saved.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name
    report = json.loads((tmp_path / "reports" / "report.json").read_text())
    assert {matrix["name"] for matrix in report["matrices"]} >= {"model.layers.1.mlp.down_proj"}
    assert sparse("inspect", tmp_path / "out") == 0


def test_gguf(tmp_path: Path):
    file = write_gguf(tmp_path / "tiny.gguf")
    calibration = ["--dataset", "self", "--num-samples", "2", "--seqlen", "32"]
    options = ["--method", "wanda", *calibration, "--block-range", "1", "2", "--ignore", "o_proj"]
    assert sparse("prune", file, tmp_path / "out", *options) == 0
    model, tokenizer = load_model(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]
    metadata = model.config.sparsity_config
    assert metadata["base_model"] == file.name
    assert {name.split(".")[2] for name in metadata["matrices"]} == {"1"}
    assert metadata["achieved_sparsity"] == 0.5
    assert sparse("inspect", tmp_path / "out") == 0


def test_model_without_tokenizer(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    save_tiny(tmp_path / "dense", tokenizer=False)
    assert sparse("prune", tmp_path / "dense", tmp_path / "out", "--dataset", text) == 2
    assert "tokenizer" in error_of(capsys)
    assert not (tmp_path / "out").exists()
    assert sparse("prune", tmp_path / "dense", tmp_path / "out", "--method", "magnitude") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "OUT"], "There is no folder 'nowhere'"),
        (["./nowhere", "OUT"], "There is no file or folder './nowhere'"),
        (["DENSE", "DENSE"], "OUT is MODEL"),
        (["DENSE", "DENSE/../dense"], "OUT is MODEL"),
        (["DENSE", "DENSE/config.json"], "OUT must be a folder"),
        (["DENSE", "DENSE/config.json/out"], "config.json/out cannot be a folder"),
        (["DENSE/config.json", "OUT"], "is a file, but not a .gguf file"),
        (["DENSE", "OUT", "--sparsity", "1.5"], "sparsity must be a number with 0 <= sparsity < 1, got 1.5"),
        (["DENSE", "OUT", "--method", "sparsgpt"], "did you mean 'sparsegpt'"),
        (["DENSE", "OUT", "--pattern", "2:3", "--method", "magnitude"], "does not divide"),
        (["DENSE", "OUT", "--targets", "nothing", "--method", "magnitude"], "Nothing to prune"),
        (["DENSE", "OUT", "--config", "none.json"], "none.json"),
        (["DENSE", "OUT", "--report", "DENSE/config.json/report.json"], "config.json cannot be a folder"),
        (["DENSE", "OUT", "--device", "abacus"], "--device 'abacus' is no device that torch knows"),
        (["DENSE", "OUT", "--device", "cuda:99"], "--device cuda:99 is not there"),
        (["DENSE", "OUT", "--push-to-hub", "a/b/c"], "Repo id must be"),
        (["DENSE", "OUT", "--push-to-hub", "me/x"], "--push-to-hub needs a Hub access token"),
        (["DENSE", "OUT", "--dataset", "none.txt"], "none.txt"),
        (["DENSE", "OUT", "--seed", "9" * 30], "seed must be less than 2^63"),
        (["DENSE", "OUT", "--max-memory", "infGiB"], "max_memory must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(
    arguments: list[str],
    message: str,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    before = {path: path.read_bytes() for path in dense.iterdir()}
    assert sparse("prune", *(a.replace("DENSE", str(dense)) for a in arguments)) == 2
    assert message in error_of(capsys)
    assert {path: path.read_bytes() for path in dense.iterdir()} == before
    assert not (tmp_path / "OUT").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_that_cannot_be_written(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    tmp_path.chmod(0o500)
    assert sparse("prune", dense, tmp_path / "out") == 2
    assert "Permission denied" in error_of(capsys)


def test_missing_arguments(capsys: pytest.CaptureFixture):
    assert sparse("prune") == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage == "usage: optimum-cli sparse prune MODEL OUT [options]"
    assert "the following arguments are required: MODEL, OUT" in error


def test_the_traceback_of_an_error_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, logger="optimum_sparse"):
        assert sparse("prune", "./nowhere", tmp_path / "out") == 2
    assert any("FileNotFoundError" in str(record.exc_info) for record in caplog.records)


def test_interruption(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(SparsePruner, "prune", interrupted)
    assert sparse("prune", dense, tmp_path / "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not (tmp_path / "out").exists()


def test_a_bug_is_not_taken_for_a_user_error(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SparsePruner, "prune", lambda *_, **__: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        sparse("prune", dense, tmp_path / "out")


@pytest.mark.parametrize("field", EVERY_FIELD)
def test_the_command_in_the_report_gives_the_same_configuration(field: str):
    parser = ArgumentParser()
    PruneCommand.parse_args(parser)
    args = parser.parse_args(["some/model", "OUT", *EVERY_FIELD[field][0].split(), "--dtype", "float32"])
    config = build_config(args)
    words = shlex.split(command_line(args, config, config.dataset))
    assert words[:5] == ["optimum-cli", "sparse", "prune", "some/model", "OUT"]
    again = parser.parse_args(words[3:])
    assert build_config(again) == config and again.dtype == "float32"


def test_report_and_page_beside_the_model(dense: Path, text: Path, tmp_path: Path):
    out = tmp_path / "o" / "a name"
    assert sparse("prune", dense, out, "--method", "wanda", "--dataset", text, "--num-samples", 2, "--seqlen", 16) == 0
    report = SparsityReport.from_json(out / "sparsity_report.json")
    assert (out / "sparsity_report.html").read_text() == report.to_html()
    assert report.command == (
        "optimum-cli sparse prune dense 'a name' --method wanda --dataset squares.txt --num-samples 2 --seqlen 16"
    )
    assert str(tmp_path) not in report.to_json() and str(text.parent) not in report.to_json()
    assert report.model == "dense" and len(report.pictures) == 7 and len(report.depth_error) == 2
    weights = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(out).parameters())
    assert report.sizes == {"dense": weights, "saved": (out / "model.safetensors").stat().st_size}
    assert sparse("prune", dense, tmp_path / "plain", "--method", "magnitude", "--no-html") == 0
    assert not (tmp_path / "plain" / "sparsity_report.html").exists()


CALIBRATION = ("--num-samples", "2", "--seqlen", "32")


def test_what_stands_where_weights_would_be_offloaded_is_left_alone(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = tmp_path / "out.offload"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    options = ("--dataset", text, *CALIBRATION)
    assert sparse("prune", dense, tmp_path / "out", *options) == 0
    save_tiny(tmp_path / "larger", hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    memory = ("--max-memory", held_memory(torch.device("cpu")) + 2**28)
    assert sparse("prune", tmp_path / "larger", tmp_path / "out", *options, *memory) == 2
    assert "out.offload is in the way of weights that are offloaded" in error_of(capsys)
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]
    (folder / "precious.txt").rename(folder / CLAIMED)  # as a run that was killed has left it
    assert sparse("prune", tmp_path / "larger", tmp_path / "out", *options, *memory) == 0
    assert not folder.exists()


def test_a_dense_model_is_not_overwritten(dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    save_tiny(tmp_path / "other", "gpt2")
    before = {path: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert sparse("prune", dense, tmp_path / "other", "--dataset", text, *CALIBRATION) == 2
    assert "holds a dense model, which would be lost" in error_of(capsys)
    assert {path: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before


def test_a_damaged_checkpoint_is_named(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    copy = tmp_path / "copy"
    shutil.copytree(dense, copy)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert sparse("prune", copy, tmp_path / "out", "--method", "magnitude") == 2
    assert "damaged, incomplete, or of another model" in error_of(capsys)
    shutil.copy(dense / "model.safetensors", file)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    assert sparse("prune", copy, tmp_path / "out", "--method", "magnitude") == 2
    assert "damaged, incomplete, or of another model" in error_of(capsys)


@pytest.mark.parametrize("report", ["", "."])
def test_a_report_is_a_file(report: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert sparse("prune", dense, tmp_path / "out", "--method", "magnitude", "--report", report) == 2
    assert "must name a file" in error_of(capsys)


def test_the_folder_one_is_in(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert sparse("prune", dense, ".", "--method", "magnitude", "--resume") == 0
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    command = json.loads((tmp_path / "here" / "sparsity_report.json").read_text())["command"]
    assert f"prune {dense.name} here " in command


@pytest.mark.parametrize("command", ["prune", "recover", "pack", "unpack"])
def test_a_name_that_is_empty(command: str, dense: Path, capsys: pytest.CaptureFixture):
    """As of a variable of the shell that was not set."""
    assert sparse(command, dense, "") == 2
    assert "an empty name is no folder" in capsys.readouterr().err


def test_an_interruption_that_became_an_error_is_one(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def interrupted(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise ImportError("could not import") from interrupt

    monkeypatch.setattr(SparsePruner, "prune", interrupted)
    assert sparse("prune", dense, tmp_path / "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("quantization", ["gptq", PACKED], ids=str)
def test_a_quantization_config_that_is_a_name(
    quantization: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    status = sparse("prune", dense, tmp_path, "--method", "magnitude")
    assert status == (0 if quantization == PACKED else 2)
    if status:
        assert "holds a dense model, which would be lost" in error_of(capsys)
