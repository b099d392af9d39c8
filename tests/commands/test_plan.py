"""`optimum-cli sparse plan`, and what `prune --max-memory` makes of it."""

import hashlib
import shutil
from pathlib import Path

import pytest

from ..checkpoints import save_tiny, write_text
from .cli import sparse
from .test_prune import error_of

BIG = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=6, vocab_size=128, num_attention_heads=8)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    save_tiny(folder, head_dim=64, **BIG)
    return folder


def test_says_what_a_run_takes(dense: Path, capsys: pytest.CaptureFixture) -> None:
    assert sparse("plan", dense, "--assume", "h200", "--num-samples", 4, "--seqlen", 64) == 0
    out = capsys.readouterr().out
    assert "42 matrices, 13,369,344 weights" in out and "4 calibration windows of 64 tokens: 256 tokens" in out
    assert "assumed speed of h200" in out and "weights on disk, brought in block by block" in out
    assert "activations of waiting batches" in out and "chosen: weights in memory" in out


def test_reads_a_configuration_alone_and_measures_this_machine(dense: Path, tmp_path: Path, capsys) -> None:
    shutil.copy(dense / "config.json", tmp_path / "some.json")
    assert sparse("plan", tmp_path / "some.json", "--method", "wanda", "--num-samples", 2) == 0
    assert "measured speed of this CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all.json"], "There is no file or folder"),
        (["DENSE", "--max-memory", "1MiB"], "takes at least"),
        (["DENSE", "--max-memory", "much"], "max_memory must be"),
        (["DENSE", "--sparsity", "2"], "sparsity must be"),
    ],
    ids=str,
)
def test_mistakes(dense: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    arguments = [str(dense) if argument == "DENSE" else argument for argument in arguments]
    assert sparse("plan", *arguments) == 2
    assert message in error_of(capsys)


@pytest.mark.slow
def test_a_model_that_is_too_large_is_pruned_from_disk(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are 54 MB and the budget leaves room for the run, but not for them: the result has the same bits."""
    from optimum_sparse import dry_run
    from optimum_sparse.offload import Residency

    text = write_text(tmp_path / "text.txt")
    options = ["--dataset", text, "--num-samples", 4, "--seqlen", 64, "--batch-size", 1]
    assert sparse("prune", dense, tmp_path / "resident", *options) == 0
    place, units = dry_run.place, []
    monkeypatch.setattr(dry_run, "place", lambda *args, **kwargs: (True, place(*args, **kwargs)[1]))
    enter = Residency.__enter__
    monkeypatch.setattr(Residency, "__enter__", lambda self: (units.append(len(self.units)), enter(self))[1])
    assert sparse("prune", dense, tmp_path / "offloaded", *options, "--max-memory", "20GiB") == 0
    assert units == [6 + 3]  # embeddings, norm and head besides the blocks
    hashes = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((tmp_path / name).iterdir())}
        for name in ("resident", "offloaded")
    ]
    for found in hashes:
        del found["sparsity_report.json"], found["sparsity_report.html"]  # they have the times
    assert hashes[0] == hashes[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["offloaded", "resident", "text.txt"]


def test_too_little_memory_is_said_before_anything_is_loaded(dense: Path, tmp_path: Path, capsys) -> None:
    text = write_text(tmp_path / "text.txt")
    assert sparse("prune", dense, tmp_path / "out", "--dataset", text, "--max-memory", "50MiB") == 2
    assert "takes at least" in error_of(capsys)
    assert not (tmp_path / "out").exists()
