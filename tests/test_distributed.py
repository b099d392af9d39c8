"""Several processes give what one gives, and say so if they do not fit together."""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_sparse.distributed import Processes
from tests.checkpoints import save_tiny, write_text
from tests.two_processes import RUNS, inexact, main

ROOT = Path(__file__).parent.parent


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes, as Accelerate starts them; --multi_gpu is its name for several of any kind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = (*accelerate, "--main_process_port", port, *command)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)


@cache
def products_of_rows_agree() -> bool:
    """Whether half of the rows of a product have the same bits on this machine if they are computed by themselves."""
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows, columns in product((32, 64, 96, 128, 256), (32, 64, 128)):
            left, right = (torch.randn(size, columns, generator=generator) for size in (rows, columns))
            whole, turned = left @ right, right @ left.T
            for half in (slice(0, rows // 2), slice(rows // 2, rows)):
                if not torch.equal(left[half] @ right, whole[half]):
                    return False
                if not torch.equal(right @ left[half].T.contiguous(), turned[:, half]):
                    return False
    finally:
        torch.set_num_threads(threads)
    return True


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes made."""
    folder = tmp_path_factory.mktemp("two")
    result = launch("--module", "tests.two_processes", str(folder))
    assert result.returncode == 0, result.stderr[-5000:]
    (folder / "stderr").write_text(result.stderr)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process made, this one."""
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main(folder)
    torch.set_num_threads(threads)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_what_one_gives(one: Path, two: Path, name: str) -> None:
    expected, found = load_file(one / f"{name}.safetensors"), load_file(two / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    # Products of a few rows, and of batches that were split, differ in the last bit; all others are the same, if the
    # library for products gives a row the same bits whatever rows are beside it.
    exact = not inexact(name) and products_of_rows_agree()
    # What iterates makes much of the last bit: the weights differ, and are as good.
    options = RUNS[name][2]
    iterates = not exact and (options.get("method", "admm") == "admm" or "refine" in options)
    same = total = 0
    for key, value in expected.items() if not iterates else ():
        assert not exact or torch.equal(found[key], value), key
        torch.testing.assert_close(found[key].float(), value.float(), rtol=1e-4, atol=1e-5 * value.abs().max().item())
        same += int(((found[key] == 0) == (value == 0)).sum())
        total += value.numel()
    assert same >= 0.9999 * total

    old, new = (json.loads((folder / f"{name}.json").read_text()) for folder in (one, two))
    first = "sums " + old["entries"][0]["name"]
    if first in expected:  # nothing was pruned before it
        assert (found[first] - expected[first]).norm() <= 1e-6 * expected[first].norm()
    assert new["skipped"] == old["skipped"]
    whole = [note for note in new["notes"] if "each process solved all rows" in note]
    assert [note for note in new["notes"] if note not in whole] == old["notes"]
    assert bool(whole) == ("reference" in name)
    assert len(new["entries"]) == len(old["entries"])
    measured = dict.fromkeys(("error", "residual", "seconds"))
    for left, right in zip(new["entries"], old["entries"], strict=True):
        for figure in ("error", "residual"):
            near = 0.0 if exact else 0.1 if iterates else 1e-3
            assert left[figure] == (right[figure] and pytest.approx(right[figure], rel=near))
        assert {**left, **measured} == {**right, **measured}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["None", "disk"])
def test_a_run_that_stopped_goes_on_to_the_same_bits(two: Path, place: str) -> None:
    undisturbed, resumed = (two / f"{kind}-{place}" / "model.safetensors" for kind in ("undisturbed", "resumed"))
    assert undisturbed.read_bytes() == resumed.read_bytes()


@pytest.mark.slow
def test_the_main_process_alone_speaks(two: Path) -> None:
    assert (two / "stderr").read_text().count("left dense: lm_head") == 1
    assert not list(two.glob("progress-*/activations-*"))


@pytest.mark.slow
def test_all_are_told_what_does_not_fit(two: Path) -> None:
    for process in (0, 1):
        differ, few = json.loads((two / f"errors-{process}.json").read_text())
        assert "The 2 processes differ in: calibration data" in differ
        assert "1 calibration batches cannot be shared out to 2 processes" in few


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    """With options that concern files, which one process alone may write."""
    source, out, report = tmp_path / "source", tmp_path / "out", tmp_path / "report.json"
    save_tiny(source)
    text = write_text(tmp_path / "text.txt")
    cli = str(Path(sys.executable).with_name("optimum-cli"))
    command = [cli, "sparse", "prune", str(source), str(out), "--dataset", str(text), "--num-samples", "4"]
    command += ["--seqlen", "32", "--resume", "--activation-device", "disk", "--report", str(report)]
    result = launch("--no_python", *command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Saved to") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "report.json", "source", "text.txt"]
    assert json.loads(report.read_text())["sparsity"] == 0.5
    assert {entry["num_tokens"] for entry in json.loads(report.read_text())["matrices"]} == {4 * 32}
    pruned = AutoModelForCausalLM.from_pretrained(out)
    assert (pruned.model.layers[1].mlp.down_proj.weight == 0).float().mean() == 0.5


def test_a_process_alone() -> None:
    processes, rows = Processes(), torch.arange(6).view(3, 2)
    assert processes.is_main and processes.count == 1
    assert processes.totals(3, 4) == [3, 4] and processes.least(5) == 5 and processes.most(5) == 5
    assert torch.equal(processes.gather(rows[processes.share(3)], 3), rows)


def test_rows_are_shared_out_without_gaps() -> None:
    processes = Processes()
    for count in (1, 2, 3, 7, 8):
        processes.count = count
        for rows in (1, 2, 5, 8, 16, 100):
            shares = [processes.share(rows, index) for index in range(count)]
            assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
