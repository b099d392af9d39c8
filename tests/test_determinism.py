"""Same seed, same bits: in two processes, and whatever else the process has done."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from optimum_sparse import SparsePruner
from tests.helpers import tiny_batches, tiny_model

ROOT = Path(__file__).parents[1]

# What each process prunes: the methods, and calibration data that the model generates from the seed.
RUNS = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda", "pattern": "2:4"},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.6},
    "sparsegpt-by-block": {"method": "sparsegpt", "true_sequential": False},
    "self": {"method": "sparsegpt", "dataset": "self", "num_samples": 4, "seqlen": 16},
}


def sha256_of(model: nn.Module) -> str:
    """Over all parameters, names and bits."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def prune(run: str, seed: int = 0) -> str:
    model = tiny_model("llama")
    dataset = None if run == "self" else tiny_batches()
    SparsePruner(**RUNS[run], seed=seed, progress=False).prune(model, dataset=dataset)
    return sha256_of(model)


def test_two_processes_agree():
    """This one, and one with another hash seed, so that nothing hangs on the order of a set."""
    code = "from tests.test_determinism import RUNS, prune\nfor run in RUNS: print(prune(run))"
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    hashes = [prune(run) for run in RUNS]
    assert other.stdout.decode().split() == hashes
    assert len(set(hashes)) == len(RUNS)


@pytest.mark.parametrize("run", RUNS)
def test_global_random_state_has_no_say(run):
    """It is neither read nor advanced."""
    torch.manual_seed(1)
    first = prune(run)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert prune(run) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_matters():
    assert prune("self", seed=0) != prune("self", seed=1)
