"""`optimum-cli sparse recover` on tiny models, checked with `optimum-cli sparse inspect`."""

import json
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_sparse import SparsePruner
from optimum_sparse.commands.inspect import inspect
from optimum_sparse.recovery import recover as recover_module
from optimum_sparse.recovery.config import RecoveryConfig
from optimum_sparse.report import read_report, write_report
from tests.beyond_text import t5_model
from tests.checkpoints import save_tiny, tiny_tokenizer, write_text
from tests.commands.cli import sparse
from tests.helpers import tiny_mixtral
from tests.recovery.pruned import assert_zeros_kept, pruned_model, zero_positions
from tests.report.reports import full_report

run = partial(sparse, "recover")


@pytest.fixture
def folders(tmp_path):
    """A pruned model, its dense teacher and a text."""
    model = pruned_model()
    model.save_pretrained(tmp_path / "pruned")
    tiny_tokenizer().save_pretrained(tmp_path / "pruned")
    save_tiny(tmp_path / "dense")
    write_text(tmp_path / "text.txt")
    return tmp_path


FAST = ("--max-steps", 4, "--seqlen", 32, "--gradient-accumulation", 2, "--eval-samples", 4, "--device", "cpu")


@pytest.mark.parametrize("method", ["lora", "full", "norms"])
@pytest.mark.parametrize("distill", [False, True], ids=["", "distilled"])
def test_recovers_and_keeps_the_zeros(method, distill, folders, capsys):
    teacher = ("--distill", folders / "dense") if distill else ()
    options = ("--dataset", folders / "text.txt", "--method", method, *teacher, *FAST)
    assert run(folders / "pruned", folders / "out", *options, "--learning-rate", 1e-2) == 0
    printed = capsys.readouterr().out
    pruned, recovered = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("pruned", "out"))
    assert_zeros_kept(recovered, zero_positions(pruned))
    changed = [n for n, w in recovered.state_dict().items() if not torch.equal(w, pruned.state_dict()[n])]
    assert changed and (method != "norms" or all("norm" in name for name in changed))

    before, after = (inspect(str(folders / name)) for name in ("pruned", "out"))
    assert after["metadata_is_true"]
    assert after["pruned_zeros"] == before["pruned_zeros"] > 0
    record = recovered.config.sparsity_config["recovery"]
    assert record["method"] == method
    assert record["dataset"] == "text.txt"
    assert record["teacher"] == ("dense" if distill else None)
    assert record["num_tokens"] == 4 * 2 * 32
    assert f"{record['perplexity_before']:.4g} before, {record['perplexity_after']:.4g} after" in printed
    assert record["perplexity_after"] != record["perplexity_before"]
    card = (folders / "out" / "README.md").read_text()
    assert "base_model_relation: finetune" in card
    assert f"{record['perplexity_after']:.4g} after" in card
    assert str(folders) not in card + json.dumps(recovered.config.to_dict()["sparsity_config"])
    assert sorted(path.name for path in (folders / "out").iterdir() if path.is_dir()) == []


def test_the_report_goes_along(folders):
    write_report(full_report(), folders / "pruned", page=True)
    assert run(folders / "pruned", folders / "out", "--dataset", folders / "text.txt", "--method", "norms", *FAST) == 0
    report = read_report(folders / "out")
    assert report.recovery == json.loads((folders / "out" / "config.json").read_text())["sparsity_config"]["recovery"]
    assert report.matrices == full_report().matrices
    assert (report.evaluations, report.bench, report.generations) == ([], None, [])  # those are of the pruned model
    assert report.sizes["saved"] == (folders / "out" / "model.safetensors").stat().st_size
    assert (folders / "out" / "sparsity_report.html").read_text() == report.to_html()
    assert read_report(folders / "pruned") == full_report()


def test_the_perplexity_is_that_of_the_saved_model(folders):
    assert run(folders / "pruned", folders / "out", "--dataset", folders / "text.txt", *FAST) == 0
    recovered = AutoModelForCausalLM.from_pretrained(folders / "out")
    tokens = tiny_tokenizer()((folders / "text.txt").read_text())["input_ids"] + [2]
    pieces = [tokens[i : i + 32] for i in range(0, len(tokens) - 31, 32)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:4]
    ids = torch.tensor([pieces[i] for i in order])
    with torch.no_grad():
        expected = recovered(input_ids=ids, labels=ids).loss.exp().item()
    assert recovered.config.sparsity_config["recovery"]["perplexity_after"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_run_goes_on(method, folders, monkeypatch, caplog):
    options = ("--dataset", folders / "text.txt", "--method", method, *FAST, "--save-steps", 2)
    assert run(folders / "pruned", folders / "whole", *options) == 0

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        train = recover_module.Trainer.train

        def interrupted(self, *args, **kwargs):
            self.add_callback(Interrupt())
            return train(self, *args, **kwargs)

        patch.setattr(recover_module.Trainer, "train", interrupted)
        assert run(folders / "pruned", folders / "out", *options) == 130
    assert (folders / "out" / "recovery-checkpoints" / "checkpoint-2").is_dir()
    assert run(folders / "pruned", folders / "out", *options) == 0
    assert "Resuming the run" in caplog.text
    whole, resumed = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("whole", "out"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


@contextmanager
def interrupted_after_training(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recover_module, "_check_zeros", interrupted)
        yield


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_was_interrupted_after_training_trains_no_more(method, folders, monkeypatch):
    options = ("--dataset", folders / "text.txt", "--method", method, *FAST)
    assert run(folders / "pruned", folders / "whole", *options) == 0

    with interrupted_after_training(monkeypatch):
        assert run(folders / "pruned", folders / "out", *options) == 130
    assert (folders / "out" / "recovery-checkpoints" / "checkpoint-4").is_dir()
    assert run(folders / "pruned", folders / "out", *options) == 0
    whole, resumed = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("whole", "out"))
    assert all(torch.equal(weight, resumed.state_dict()[name]) for name, weight in whole.state_dict().items())
    tokens = [model.config.sparsity_config["recovery"]["num_tokens"] for model in (whole, resumed)]
    assert tokens[0] == tokens[1] == 4 * 2 * 32


def test_weights_that_are_renamed_in_saving_are_resumed(tmp_path, monkeypatch):
    """Those of experts, which the files have one by one."""
    model = tiny_mixtral()
    pruner = SparsePruner(method="magnitude", progress=False)
    pruner.prune(model)
    pruner.save(model, tmp_path / "pruned", tiny_tokenizer())
    write_text(tmp_path / "text.txt")
    options = ("--dataset", tmp_path / "text.txt", "--method", "full", "--learning-rate", 1e-2, *FAST)
    assert run(tmp_path / "pruned", tmp_path / "whole", *options) == 0

    with interrupted_after_training(monkeypatch):
        assert run(tmp_path / "pruned", tmp_path / "out", *options) == 130
    assert run(tmp_path / "pruned", tmp_path / "out", *options) == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_what_a_training_cannot_keep_is_said_before_it(folders, caplog):
    model = pruned_model()
    model.config.sparsity_config["quantization"] = "int4"
    model.save_pretrained(folders / "pruned")
    options = ("--dataset", folders / "text.txt", "--distill", folders / "pruned", *FAST)
    assert run(folders / "pruned", folders / "out", *options) == 0
    assert any("has been pruned itself" in message for message in caplog.messages)
    assert any("without, and is not quantised" in message for message in caplog.messages)


def test_a_damaged_record_is_said_before_the_training(folders, capsys):
    config = json.loads((folders / "pruned" / "config.json").read_text())
    del config["sparsity_config"]["method"]
    (folders / "pruned" / "config.json").write_text(json.dumps(config))
    assert run(folders / "pruned", folders / "out", "--dataset", folders / "text.txt", *FAST) == 2
    assert "sparsity_config is damaged: it has no method" in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_checkpoints_of_another_run_are_not_used(folders, monkeypatch, capsys):
    class Interrupt(TrainerCallback):
        def on_save(self, *args, **kwargs):
            raise KeyboardInterrupt

    options = ("--dataset", folders / "text.txt", *FAST, "--save-steps", 1)
    with monkeypatch.context() as patch:
        train = recover_module.Trainer.train
        patch.setattr(
            recover_module.Trainer, "train", lambda self, **kw: (self.add_callback(Interrupt), train(self, **kw))[1]
        )
        run(folders / "pruned", folders / "out", *options)
    assert run(folders / "pruned", folders / "out", *options, "--rank", 4) == 2
    assert "holds checkpoints of another run (other rank): delete it to start anew" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["model", "teacher"])
def test_checkpoints_are_of_the_same_models(changed, folders, monkeypatch, capsys):
    class Interrupt(TrainerCallback):
        def on_save(self, *args, **kwargs):
            raise KeyboardInterrupt

    options = ("--dataset", folders / "text.txt", "--distill", folders / "dense", *FAST, "--save-steps", 1)
    with monkeypatch.context() as patch:
        train = recover_module.Trainer.train
        patch.setattr(
            recover_module.Trainer, "train", lambda self, **kw: (self.add_callback(Interrupt), train(self, **kw))[1]
        )
        run(folders / "pruned", folders / "out", *options)
    folder = folders / ("pruned" if changed == "model" else "dense")
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)  # the zeros are the same
    other.save_pretrained(folder)
    assert f"checkpoints of another run (other {changed})" in refused(
        capsys, folders / "pruned", folders / "out", *options
    )


@pytest.mark.parametrize("rate", ["1e6", "1e30"])
def test_training_that_diverges(rate, folders, capsys):
    options = ("--dataset", folders / "text.txt", "--method", "norms", *FAST)
    error = refused(capsys, folders / "pruned", folders / "out", *options, "--learning-rate", rate)
    assert "Training diverged: the loss on held-out texts was" in error
    assert f"Lower the learning rate, which was {float(rate):g}." in error
    assert run(folders / "pruned", folders / "out", *options) == 0  # what it left is no obstacle


@pytest.mark.parametrize("method", ["lora", "full", "norms"])
def test_every_tensor_keeps_its_type(method, folders):
    """Rotary frequencies are in fp32 even in a bf16 model, and some experts' biases are, too."""
    model = pruned_model().to(torch.bfloat16)
    scales = torch.tensor([1.0, 1.00033])
    model.model.register_buffer("scales", scales.clone())
    frequencies = torch.linspace(0.123456789, 1, 4)
    model.model.rotary_emb.inv_freq = frequencies.clone()
    model = (
        recover_module.recover(
            model,
            tiny_tokenizer(),
            folders / "out",
            folders / "text.txt",
            RecoveryConfig(method=method, max_steps=1, seqlen=32, eval_samples=4, learning_rate=1e-12),
            device="cpu",
            progress=False,
        )
        and model
    )
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    saved = load_file(folders / "out" / "model.safetensors")
    assert torch.equal(saved["model.scales"], scales)
    assert saved["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_the_report_of_another_model_does_not_stay(folders):
    (folders / "out").mkdir()
    write_report(full_report(), folders / "out", page=True)
    config = json.loads((folders / "pruned" / "config.json").read_text())
    (folders / "out" / "config.json").write_text(json.dumps(config))
    assert run(folders / "pruned", folders / "out", "--dataset", folders / "text.txt", "--method", "norms", *FAST) == 0
    assert not {"sparsity_report.json", "sparsity_report.html"} & {path.name for path in (folders / "out").iterdir()}


def test_report_without_sizes(folders):
    report = full_report()
    report.sizes = {}
    write_report(report, folders / "pruned", page=True)
    assert run(folders / "pruned", folders / "out", "--dataset", folders / "text.txt", "--method", "norms", *FAST) == 0
    assert read_report(folders / "out").sizes.keys() == {"saved"}


def test_bfloat16_and_experts(tmp_path):
    model = pruned_model("mixtral").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "pruned")
    tiny_tokenizer().save_pretrained(tmp_path / "pruned")
    write_text(tmp_path / "text.txt")
    assert run(tmp_path / "pruned", tmp_path / "out", "--dataset", tmp_path / "text.txt", *FAST) == 0
    recovered = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert recovered.dtype == torch.bfloat16
    assert_zeros_kept(recovered, zero_positions(model))
    key = "model.layers.0.mlp.experts.gate_up_proj"
    assert not torch.equal(recovered.get_parameter(key), model.get_parameter(key))
    assert recovered.config.sparsity_config["matrices"] == model.config.sparsity_config["matrices"]


def test_teacher_cache(folders):
    options = ("--dataset", folders / "text.txt", "--distill", folders / "dense", *FAST)
    assert run(folders / "pruned", folders / "out", *options, "--teacher-cache", folders / "cache") == 0
    assert len(list((folders / "cache").glob("*.safetensors"))) == 8


class TestErrors:
    """Each ends with one line and exit code 2."""

    def fails(self, capsys, *arguments) -> str:
        assert run(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        return line

    def test_a_dense_model(self, folders, capsys):
        line = self.fails(capsys, folders / "dense", folders / "out", "--dataset", folders / "text.txt", *FAST)
        assert "has no config.sparsity_config, so it is not known to be pruned" in line

    def test_another_vocabulary(self, folders, capsys):
        save_tiny(folders / "other", vocab_size=256)
        options = ("--dataset", folders / "text.txt", "--distill", folders / "other", *FAST)
        line = self.fails(capsys, folders / "pruned", folders / "out", *options)
        assert "The teacher does not fit the model: its vocab_size is 256" in line

    def test_too_little_data(self, folders, capsys):
        options = ("--dataset", folders / "text.txt", *FAST, "--eval-samples", 1000)
        assert "1000 are held out for evaluation" in self.fails(capsys, folders / "pruned", folders / "out", *options)

    def test_out_is_dir(self, folders, capsys):
        options = ("--dataset", folders / "text.txt")
        assert "OUT is DIR" in self.fails(capsys, folders / "pruned", folders / "pruned", *options)

    def test_an_option_out_of_range(self, folders, capsys):
        options = ("--dataset", folders / "text.txt", "--rank", 0)
        assert "rank must be at least 1, got 0" in self.fails(capsys, folders / "pruned", folders / "out", *options)

    def test_a_cache_without_a_teacher(self, folders, capsys):
        options = ("--dataset", folders / "text.txt", "--teacher-cache", folders / "cache")
        assert "--teacher-cache needs a teacher" in self.fails(capsys, folders / "pruned", folders / "o", *options)


def refused(capsys, *arguments):
    assert run(*arguments) == 2
    return capsys.readouterr().err


def test_what_cannot_be_trained_is_said(folders, capsys):
    data = ("--dataset", folders / "text.txt")
    out = folders / "out"
    longest = AutoModelForCausalLM.from_pretrained(folders / "pruned").config.max_position_embeddings
    too_long = ("--seqlen", longest + 1)
    assert f"has {longest} positions: give at most that" in refused(capsys, folders / "pruned", out, *data, *too_long)
    assert "CUDA devices" in refused(capsys, folders / "pruned", out, *data, "--device", "cuda")
    assert "is a file" in refused(capsys, folders / "pruned", folders / "text.txt", *data)
    assert "holds a dense model" in refused(capsys, folders / "pruned", folders / "dense", *data)
    model = t5_model()
    SparsePruner(method="magnitude", progress=False).prune(model)
    model.save_pretrained(folders / "t5")
    tiny_tokenizer().save_pretrained(folders / "t5")
    assert "predicts the next token, got T5" in refused(capsys, folders / "t5", out, *data)
    assert not out.exists()


def test_the_teacher_must_read_the_same_tokens(folders, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["a token more"])
    tokenizer.save_pretrained(folders / "dense")
    options = ("--dataset", folders / "text.txt", "--distill", folders / "dense", *FAST)
    assert "the teacher have other tokenizers" in refused(capsys, folders / "pruned", folders / "out", *options)


def test_a_run_that_never_trained_is_no_obstacle(folders, monkeypatch):
    data = ("--dataset", folders / "text.txt", *FAST)

    def fail(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(recover_module, "mean_loss", fail)
        run(folders / "pruned", folders / "out", *data)
    assert (folders / "out" / "recovery-checkpoints" / "run.json").is_file()
    assert run(folders / "pruned", folders / "out", *data, "--rank", 8) == 0
