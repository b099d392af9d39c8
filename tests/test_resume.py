"""Progress on disk: a run is taken up where it stopped, only by the same run, with the same bits."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_sparse import SparsePruner
from optimum_sparse.resume import remove_progress
from tests.helpers import tiny_batches, tiny_mixtral, tiny_model


def model_of(kind: str, folder: Path) -> PreTrainedModel:
    if kind == "mixtral":
        return tiny_mixtral()
    if kind != "offloaded":
        return tiny_model(kind)
    if not folder.is_dir():
        tiny_model("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder / "offload")


def pruned(model: PreTrainedModel, folder: Path | None, **options: object) -> SparsePruner:
    pruner = SparsePruner(progress=False, **options)
    pruner.prune(model, dataset=tiny_batches(3), resume_from=folder)
    return pruner


def weights(model: PreTrainedModel, pruner: SparsePruner, folder: Path) -> tuple[str, dict]:
    pruner.save(model, folder)
    content = (folder / "model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest(), json.loads((folder / "config.json").read_text())["sparsity_config"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"true_sequential": False},
        {"method": "magnitude"},
        {"allocation": "error"},
        {"error_correction": 0.5, "batch_size": 2},
        {"min_expert_tokens": 1000},
    ],
    ids=["by group", "by block", "without data", "allocated", "corrected", "experts before their turn"],
)
@pytest.mark.parametrize("kind", ["llama", "mixtral", "zamba2", "offloaded"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_same_bits_from_wherever_it_is_taken_up(tmp_path: Path, kind: str, options: dict) -> None:
    source, progress = tmp_path / "source", tmp_path / "progress"
    model = model_of(kind, source)
    pruner = pruned(model, None, **options)
    expected = weights(model, pruner, tmp_path / "undisturbed")
    entries = [(e.name, e.zeros, e.error) for e in pruner.report.matrices]

    pruned(model_of(kind, source), progress, **options)
    files = sorted(progress.glob("*.safetensors"))
    assert len(files) >= 2
    for number in range(len(files) + 1):
        folder = tmp_path / f"stopped-{number}"
        shutil.copytree(progress, folder)
        for file in files[number:]:
            (folder / file.name).unlink()
        model = model_of(kind, source)
        pruner = pruned(model, folder, **options)
        assert weights(model, pruner, tmp_path / f"out-{number}") == expected
        assert [(e.name, e.zeros, e.error) for e in pruner.report.matrices] == entries
        assert sorted(f.name for f in folder.glob("*.safetensors")) == [f.name for f in files]


def test_done_blocks_are_not_solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum_sparse.solver import Solver

    pruned(tiny_model(), tmp_path / "progress")
    (tmp_path / "progress" / sorted(f.name for f in (tmp_path / "progress").glob("*.safetensors"))[-1]).unlink()
    solve, solved = Solver.solve, []
    monkeypatch.setattr(Solver, "solve", lambda self, group, *args: solved.extend(group) or solve(self, group, *args))
    pruned(tiny_model(), tmp_path / "progress")
    assert {matrix.block for matrix in solved} == {"model.layers.1"}


def test_an_allocation_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was made from is gone where blocks are pruned, and on another machine it might come out otherwise."""
    pruned(tiny_model(), tmp_path, allocation="error")
    max(tmp_path.glob("*.safetensors")).unlink()

    def never(*_: object) -> list[int]:
        raise AssertionError("allocated anew")

    monkeypatch.setattr("optimum_sparse.run.allocate", never)
    pruner = pruned(tiny_model(), tmp_path, allocation="error")
    assert len({entry.pattern for entry in pruner.report.matrices}) > 2
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"config\.sparsity was 0\.5 and is 0\.6") as info:
        pruned(tiny_model(), tmp_path, allocation="error", sparsity=0.6)
    assert len(str(info.value)) < 400
    model = tiny_model()
    with pytest.raises(ValueError, match=r"config\.allocation was 'error' and is None; the allocation differ"):
        pruned(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))


def test_files_hold_what_a_block_is_pruned_to(tmp_path: Path) -> None:
    model = tiny_model()
    pruned(model, tmp_path)
    for number, file in enumerate(sorted(tmp_path.glob("*.safetensors"))):
        with safe_open(file, framework="pt") as tensors:
            assert len(tensors.keys()) == 7
            for name in tensors.keys():  # noqa: SIM118
                assert name.startswith(f"model.layers.{number}.")
                assert torch.equal(tensors.get_tensor(name), model.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.6}, "config.sparsity was 0.5 and is 0.6"),
        ({"method": "wanda"}, "config.method was 'admm' and is 'wanda'"),
        ({"pattern": "2:4"}, "config.pattern was None and is '2:4'"),
    ],
    ids=str,
)
def test_another_configuration_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    pruned(tiny_model(), tmp_path)
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        pruned(model, tmp_path, **options)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, tiny_model().model.layers[0].mlp.up_proj.weight)


def test_other_data_weights_and_versions_are_refused(tmp_path: Path) -> None:
    pruned(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="the calibration data differ"):
        SparsePruner(progress=False).prune(tiny_model(), dataset=tiny_batches(3, seed=9), resume_from=tmp_path)
    with pytest.raises(ValueError, match="the weights differ"):
        pruned(tiny_model(seed=1), tmp_path)
    # Weights that are already pruned are not those that the run began with.
    with pytest.raises(ValueError, match="the weights differ"):
        model = tiny_model()
        pruned(model, None)
        pruned(model, tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    record["versions"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"versions\.torch was '1\.0' and is "):
        pruned(tiny_model(), tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="other files than those of an interrupted run"):
        pruned(tiny_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_of_something_else_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for folder, message in ((tmp_path, "has other files"), (tmp_path / "mine.txt", "is a file: name a folder")):
        with pytest.raises(ValueError, match=message):
            SparsePruner(progress=False).prune(tiny_model(), dataset="no such data", resume_from=folder)


def test_a_full_disk_stops_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    expected = tiny_model()
    pruned(expected, None)
    calls = []

    def full(tensors: dict, path: Path, metadata: dict | None = None) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("optimum_sparse.saving.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        pruned(tiny_model(), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and not list(tmp_path.glob(".*"))
    model = tiny_model()
    pruned(model, tmp_path)  # there is space again
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


def test_remove_progress_leaves_other_files(tmp_path: Path) -> None:
    pruned(tiny_model(), tmp_path / "progress")
    (tmp_path / "progress" / "notes.txt").write_text("mine")
    remove_progress(tmp_path / "progress")
    assert [path.name for path in (tmp_path / "progress").iterdir()] == ["notes.txt"]
    (tmp_path / "progress" / "notes.txt").unlink()
    remove_progress(tmp_path / "progress")
    assert not (tmp_path / "progress").exists()


def test_remove_progress_leaves_nothing_of_killed_runs(tmp_path: Path) -> None:
    """Also what a run left behind that kept its activations there, or was killed while it wrote."""
    pruned(tiny_model(), tmp_path / "progress")
    (tmp_path / "progress" / "activations-0").mkdir()
    (tmp_path / "progress" / "activations-0" / "3").write_bytes(b"half")
    (tmp_path / "progress" / ".000099.safetensors.tmp").write_bytes(b"half")
    remove_progress(tmp_path / "progress")
    assert not (tmp_path / "progress").exists()


def test_what_is_left_of_removed_progress_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = tiny_model(num_hidden_layers=3), tiny_model(num_hidden_layers=3)
    pruned(expected, tmp_path)
    unlink, gone = Path.unlink, []

    def killed(path: Path, missing_ok: bool = False) -> None:
        if len(gone) == 1:
            raise KeyboardInterrupt
        gone.append(path)
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        remove_progress(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    pruned(model, tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("targets", ["*experts*", "*"])
def test_experts_that_are_solved_before_their_turn_are_solved_once(
    tmp_path: Path, targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each file, of which the last step of a block has written some, and what came after it others."""
    from optimum_sparse.resume import Steps

    options = {"targets": [targets], "min_expert_tokens": 40, "quantization": "int8", "group_size": -1}
    whole = tiny_mixtral(num_hidden_layers=3)
    expected = [entry.name for entry in pruned(whole, None, **options).report.matrices]
    save = Steps._save
    for files in range(1, 4):
        folder = tmp_path / str(files)

        def stopping(steps: Steps, done: int, files: int = files, folder: Path = folder) -> None:
            save(steps, done)
            if len(list(folder.glob("0*.safetensors"))) == files:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Steps, "_save", stopping)
            pruned(tiny_mixtral(num_hidden_layers=3), folder, **options)
        model = tiny_mixtral(num_hidden_layers=3)
        report = pruned(model, folder, **options).report
        assert sorted(entry.name for entry in report.matrices) == sorted(expected)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
