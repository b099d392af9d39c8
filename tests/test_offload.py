"""Offloaded models: the same bits as resident ones, one block at a time, and the source left alone."""

import copy
import gc
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils.modeling import get_state_dict_offloaded_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_sparse import SparsePruner
from optimum_sparse.offload import Residency, offloaded_places
from optimum_sparse.uses import Watched
from tests.helpers import tiny_batches, tiny_mixtral, tiny_model

CPU = torch.device("cpu")
PLACES = ["resident", "cpu", "disk", "map", "mixed"]


def dense_model(architecture: str) -> PreTrainedModel:
    if architecture == "mixtral":
        return tiny_mixtral(num_hidden_layers=3)
    return tiny_model(architecture, num_hidden_layers=3, tie_word_embeddings=True)


def placed(model: PreTrainedModel, place: str, folder: Path) -> PreTrainedModel:
    """A copy of a model that is offloaded in one of the ways there are."""
    source, offload = folder / "source", folder / "offload"
    model.save_pretrained(source)
    if place in ("map", "mixed"):
        device_map = {"": "disk"}
        if place == "mixed":
            names = [name for name, _ in model.model.named_children() if name != "layers"]
            device_map = {"lm_head": "cpu"} | {f"model.{name}": "cpu" for name in names}
            device_map |= {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(len(model.model.layers))}
        return AutoModelForCausalLM.from_pretrained(source, device_map=device_map, offload_folder=offload)
    model = copy.deepcopy(model)
    if place == "cpu":
        cpu_offload(model, execution_device=CPU)
    elif place == "disk":
        disk_offload(model, offload, execution_device=CPU)
    return model


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def blocks_in_memory(model: PreTrainedModel) -> list[int]:
    layers = enumerate(model.model.layers)
    return [i for i, layer in layers if any(p.device.type != "meta" for p in layer.parameters())]


@contextmanager
def watching_memory(model: PreTrainedModel) -> Iterator[list[list[int]]]:
    """The blocks that are in memory whenever a matrix product of the model begins."""
    seen: list[list[int]] = []
    modules = [m for layer in model.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    handles = [m.register_forward_pre_hook(lambda *_: seen.append(blocks_in_memory(model))) for m in modules]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "options",
    [{}, {"true_sequential": False}, {"method": "wanda", "pattern": "2:4"}, {"method": "magnitude"}],
    ids=["defaults", "by block", "wanda 2:4", "magnitude"],
)
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_same_bits_wherever_the_weights_are(tmp_path: Path, architecture: str, options: dict) -> None:
    dense, batches = dense_model(architecture), tiny_batches(3)
    resident: dict[str, torch.Tensor] = {}
    for place in PLACES:
        folder = tmp_path / place
        model = placed(dense, place, folder)
        assert bool(offloaded_places(model)) == (place != "resident")
        kept = hashes(folder)
        pruner = SparsePruner(progress=False, **options)
        with watching_memory(model) as seen:
            pruner.prune(model, dataset=batches)
        if place not in ("resident", "mixed"):
            assert blocks_in_memory(model) == []
            assert max(map(len, seen)) <= 2
        with torch.no_grad():
            logits = model(**batches[0]).logits

        pruner.save(model, folder / "out")
        saved = AutoModelForCausalLM.from_pretrained(folder / "out")
        resident = resident or saved.state_dict()
        assert saved.state_dict().keys() == resident.keys()
        assert [name for name, value in saved.state_dict().items() if not torch.equal(value, resident[name])] == []
        held = get_state_dict_offloaded_model(model) if offloaded_places(model) else model.state_dict()
        assert [name for name, value in saved.state_dict().items() if not torch.equal(value, held[name])] == []
        # The last bit of a product depends on where in memory its factors begin, in files that are mapped, anywhere.
        torch.testing.assert_close(saved(**batches[0]).logits, logits, rtol=1e-5, atol=1e-6)
        assert saved.config.sparsity_config["achieved_sparsity"] == pytest.approx(0.5, abs=0.01)
        after = hashes(folder)
        assert {name: after[name] for name in kept} == kept


def test_one_reading_per_block_and_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lockstep forwards of many batches read a block as often as that of one."""
    from optimum_sparse import offload

    counts = []
    for num in (2, 6):
        fetched: list[str] = []
        fetch = offload.Place.fetch
        monkeypatch.setattr(offload.Place, "fetch", lambda self, f=fetch, out=fetched: (out.append(""), f(self))[1])
        model = placed(dense_model("llama"), "map", tmp_path / str(num))
        SparsePruner(progress=False, method="wanda").prune(model, dataset=tiny_batches(num))
        monkeypatch.undo()
        counts.append(len(fetched))
    assert counts[0] == counts[1]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = placed(dense_model("llama"), "cpu", tmp_path)
    pruner = SparsePruner(progress=False, method="wanda", ignore=())
    pruner.prune(model, dataset=tiny_batches(1))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "shares its weight with the embedding" in pruner.report.skipped["lm_head"]


def test_an_error_in_the_middle_leaves_a_usable_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum_sparse.solver import Solver

    dense = dense_model("llama")
    model = placed(dense, "map", tmp_path)
    write, batches = Solver.write, tiny_batches(2)

    def write_some(self: Solver, solved: list) -> None:
        if len(self._report.matrices) >= 9:
            raise KeyboardInterrupt
        write(self, solved)

    monkeypatch.setattr(Solver, "write", write_some)
    with pytest.raises(KeyboardInterrupt):
        SparsePruner(progress=False).prune(model, dataset=batches)
    assert blocks_in_memory(model) == []
    pruned = SparsePruner(progress=False)
    with torch.no_grad():
        logits = model(**batches[0]).logits
    # What was written is what a resident model has at the same point.
    with pytest.raises(KeyboardInterrupt):
        pruned.prune(dense, dataset=batches)
    assert torch.equal(dense(**batches[0]).logits, logits)


def test_new_files_go_when_the_model_goes(tmp_path: Path) -> None:
    model = placed(dense_model("llama"), "map", tmp_path)
    SparsePruner(progress=False).prune(model, dataset=tiny_batches(2))
    assert [path.name[:7] for path in (tmp_path / "offload").iterdir()] == ["pruned-"]
    del model
    gc.collect()
    assert list((tmp_path / "offload").iterdir()) == []


@pytest.mark.parametrize("seconds", [0, 1])  # the run has come to its end before a slow disk says that it is full
def test_a_full_disk_is_said_and_the_model_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    dense, batches = dense_model("llama"), tiny_batches(2)
    model = placed(dense, "map", tmp_path)

    def full(*_: object) -> None:
        time.sleep(seconds)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optimum_sparse.offload.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        SparsePruner(progress=False, method="wanda").prune(model, dataset=batches)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, dense(**batches[0]).logits)


def test_residency_follows_the_forward_that_it_has_seen(tmp_path: Path) -> None:
    """The second forward finds each block in memory or on its way when it comes to it."""
    model = placed(dense_model("llama"), "disk", tmp_path)
    blocks = [f"model.layers.{i}" for i in range(3)]
    residency = Residency(model, blocks, Watched({}))
    assert residency.units == {*blocks, "model.embed_tokens", "model.norm", "lm_head"}
    batch, awaited = tiny_batches(1)[0], []
    with residency, torch.no_grad():
        first = model(**batch).logits
        for name in (*blocks, "model.norm"):
            unit = residency._units[name]
            module = model.get_submodule(name)
            module.register_forward_pre_hook(
                lambda *_, unit=unit: awaited.append(unit.is_in or unit.coming is not None), prepend=True
            )
        assert torch.equal(model(**batch).logits, first)
    assert awaited == [True] * 4


def test_values_that_were_read_ahead_are_not_used_once_others_are_restored(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor, around: bool = False) -> torch.Tensor:
            return self.c(self.a(x) if around else self.b(self.a(x)))

    model = Net()
    disk_offload(model, tmp_path / "offload", execution_device=CPU)
    save_file({"b.weight": torch.zeros(8, 8)}, tmp_path / "finished.safetensors")
    x = torch.ones(1, 8)
    with torch.no_grad(), Residency(model, ["a", "b", "c"], Watched(dict(model.named_parameters()))) as residency:
        assert model(x).abs().max() > 0
        model(x, around=True)  # b is read ahead, and not entered
        residency.settle()
        residency.restore(tmp_path / "finished.safetensors", ["b.weight"])
        assert model(x).abs().max() == 0
