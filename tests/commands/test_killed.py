"""`optimum-cli sparse prune --resume`, killed at random moments: the same files in the end, and never half of one."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from ..checkpoints import save_tiny, write_text

KILLS = 10

# Runs the command in children that are forked when everything is imported, so that little else is there to be killed.
DRIVER = """
import faulthandler, os, random, signal, sys, time
from pathlib import Path

import torch
torch.set_num_threads(1)  # threads do not survive a fork
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from optimum_sparse.pruner import SparsePruner
from tests.commands.cli import sparse

source, out, kills, *options = sys.argv[1:]
out, progress, log, generator = Path(out), Path(f"{out}.progress"), Path(f"{out}.log"), random.Random(0)
killed = with_progress = 0

def start(resumed):
    child = os.fork()
    if child == 0:
        sys.stderr = sys.stdout = log.open("w", buffering=1)
        faulthandler.enable(sys.stderr)
        os._exit(sparse("prune", source, resumed, "--resume", *options))
    return child

def check_success(status):
    assert status == 0, f"status {status} after {killed} kills: {log.read_text()}"

def check_complete():
    # Whatever can be seen under its name can be read to its end.
    for file in [*progress.glob("*.safetensors"), *out.glob("*.safetensors")]:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensors.get_tensor(name).sum()

started = time.perf_counter()
check_success(os.waitpid(start(f"{out}-undisturbed"), 0)[1])
duration = time.perf_counter() - started

child = start(out)
while killed < int(kills):
    time.sleep(generator.uniform(0, duration))
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        check_success(status)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        with_progress += any(progress.glob("*.safetensors"))
        check_complete()
    child = start(out)
check_success(os.waitpid(child, 0)[1])
check_complete()
log.unlink()
print(killed, with_progress)
"""


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--activation-device", "disk")], ids=["resident", "activations on disk"])
def test_killed_again_and_again(tmp_path: Path, options: tuple[str, ...]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, num_hidden_layers=12, hidden_size=64, intermediate_size=128)
    before = hashes(source)
    calibration = ["--dataset", str(write_text(tmp_path / "text.txt")), "--num-samples", "24", "--seqlen", "64"]
    command = [sys.executable, "-c", DRIVER, str(source), str(out), str(KILLS), *calibration, "--batch-size", "1"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    killed, with_progress = map(int, result.stdout.split()[-2:])
    assert killed == KILLS and with_progress >= 3  # some were killed between the first block and the last

    ours, undisturbed = hashes(out), hashes(tmp_path / "out-undisturbed")
    for file in ("sparsity_report.json", "sparsity_report.html"):  # they have the times
        del ours[file], undisturbed[file]
    assert ours == undisturbed
    assert hashes(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-undisturbed", "source", "text.txt"]
