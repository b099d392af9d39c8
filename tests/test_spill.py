"""Activations of waiting batches: away while they wait, the same afterwards."""

import gc
from pathlib import Path

import pytest
import torch

from optimum_sparse import SparsePruner, spill
from optimum_sparse.spill import Activations
from tests.helpers import tiny_batches, tiny_mixtral, tiny_model


@pytest.fixture(params=["cpu", "disk"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def held(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def test_memory_is_away_and_comes_back(device: str, tmp_path: Path) -> None:
    given = torch.randn(50, 50)
    with Activations(device, tmp_path) as activations:
        with activations.computing(0):
            made = torch.randn(50, 50, dtype=torch.float64)
            view, half = made.T[3:], made.to(torch.bfloat16)
            of_given, small = given[1:], torch.ones(3)
        before = [tensor.tolist() for tensor in (made, view, half)]
        with activations.away(0):
            assert [held(tensor) for tensor in (made, view, half)] == [0, 0, 0]
            assert held(of_given) == 10_000 and held(small) == 12  # not the batch's, and not worth it
            with activations.shown([{"some": view}]):
                assert made.tolist() == before[0]
                assert held(half) == 0
            assert held(made) == 0
        assert [tensor.tolist() for tensor in (made, view, half)] == before
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, write = [], spill._Away.__init__

    def full(away: spill._Away, *arguments) -> None:
        if not all(held(tensor) for tensor in kept):
            raise OSError(28, "No space left on device")
        write(away, *arguments)

    monkeypatch.setattr(spill._Away, "__init__", full)
    with Activations("disk", tmp_path) as activations:
        with activations.computing(0):
            kept += [torch.full((50, 50), 1.0), torch.full((50, 50), 2.0)]
        with pytest.raises(OSError, match="No space left"), activations.away(0):
            raise AssertionError("is not entered")
    assert [tensor.unique().tolist() for tensor in kept] == [[1], [2]]


def test_what_is_dropped_is_not_kept(device: str) -> None:
    with Activations(device) as activations:
        with activations.computing(0):
            made = torch.randn(50, 50)
        storages = list(activations._owned[0])
        assert len(storages) == 1
        del made, storages
        gc.collect()
        assert list(activations._owned[0]) == []


def test_what_another_batch_meets_comes_back_for_good(device: str) -> None:
    """Models may keep tensors between calls, such as masks and tables of positions."""
    with Activations(device) as activations:
        with activations.computing(0):
            table = torch.randn(50, 50)
        expected = table.tolist()
        with activations.away(0):
            with activations.computing(1):
                result = table + 0
            assert result.tolist() == expected and held(table) == 10_000


def test_left_alone_by_default() -> None:
    with Activations(None) as activations:
        with activations.computing(0):
            made = torch.randn(50, 50)
        with activations.away(0), activations.shown(made):
            assert held(made) == 10_000


def test_files_of_a_run_that_was_killed_are_removed(tmp_path: Path) -> None:
    left_behind = tmp_path / f"{spill.ACTIVATIONS_FOLDER}-0" / "17"
    left_behind.parent.mkdir()
    left_behind.write_bytes(bytes(10))
    with Activations("disk", tmp_path):
        assert not left_behind.exists()


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "falcon_h1", "zamba2", "gpt2", "bloom", "mixtral"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_same_bits(architecture: str, true_sequential: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SMALLEST", 1)
    results = []
    for place in (None, device):
        model = tiny_mixtral() if architecture == "mixtral" else tiny_model(architecture)
        pruner = SparsePruner(progress=False, true_sequential=true_sequential)
        pruner.prune(model, dataset=tiny_batches(3, padding=True), activation_device=place)
        results.append(model.state_dict())
    assert [name for name, value in results[0].items() if not torch.equal(value, results[1][name])] == []


@pytest.mark.parametrize("true_sequential", [True, False])
def test_only_one_batch_is_there_at_a_time(
    true_sequential: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever statistics are added, what all others hold is away."""
    from optimum_sparse.stages import Stages

    present = []
    add = Stages._add_shown

    def note(self: Stages, *args: object) -> int:
        owned = self._forwards.activations._owned
        there = [batch for batch in owned if any(storage.nbytes() >= spill.SMALLEST for storage in owned[batch])]
        present.append(len(there))
        return add(self, *args)

    monkeypatch.setattr(Stages, "_add_shown", note)
    model = tiny_model("llama", hidden_size=64)
    batches = tiny_batches(5, rows=4)
    SparsePruner(progress=False, true_sequential=true_sequential).prune(
        model, dataset=batches, activation_device=device
    )
    assert set(present) == {1}


def test_unknown_place() -> None:
    with pytest.raises(ValueError, match="activation_device must be one of cpu, disk or None, got 'ssd'"):
        SparsePruner(progress=False).prune(tiny_model(), dataset=tiny_batches(1), activation_device="ssd")
