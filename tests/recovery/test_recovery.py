"""What the package shows, what importing it costs, and the ranges of its options."""

import subprocess
import sys

import pytest

from optimum_sparse import recovery
from optimum_sparse.recovery.config import RecoveryConfig


def test_public_names():
    assert {
        name for name in recovery.__all__ if getattr(recovery, name).__module__.startswith("optimum_sparse.rec")
    } == {*recovery.__all__}
    with pytest.raises(AttributeError, match=r"no attribute 'keep_zeros'; it has DistillationTrainer"):
        recovery.keep_zeros  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import optimum_sparse.recovery.config\nprint('torch' in sys.modules)", "False"),
        (
            "from optimum_sparse.recovery import SparsityCallback, DistillationTrainer\nprint('peft' in sys.modules)",
            "",
        ),
        (
            "from optimum_sparse import recovery\ntry:\n    recovery.keep_sparsity\n"
            "except ImportError as error:\n    print(error)",
            "keep_sparsity needs PEFT: pip install 'optimum-sparse[recovery]'",
        ),
    ],
    ids=["light", "full fine-tuning without PEFT", "LoRA without PEFT"],
)
def test_imports(statement, expected):
    halt = "" if expected == "False" else "sys.modules['peft'] = None\n"
    result = subprocess.run([sys.executable, "-c", f"import sys\n{halt}{statement}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="dora"), "method must be one of lora, full, norms, got 'dora'"),
        (dict(rank=0), "rank must be at least 1, got 0"),
        (dict(max_steps=0), "max_steps must be at least 1, got 0"),
        (dict(seqlen=1), "seqlen must be at least 2, got 1"),
        (dict(num_samples=0), "num_samples must be at least 1, got 0"),
        (dict(learning_rate=0.0), r"learning_rate must be above 0, got 0\.0"),
        (dict(kl_weight=2.0), r"kl_weight must be between 0 and 1, got 2\.0"),
        (dict(temperature=-1.0), r"temperature must be above 0, got -1\.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ranges(options, message):
    with pytest.raises(ValueError, match=message):
        RecoveryConfig(**options)


def test_each_method_has_a_learning_rate():
    assert RecoveryConfig(method="full").peak_learning_rate < RecoveryConfig().peak_learning_rate
    assert RecoveryConfig(learning_rate=0.5).peak_learning_rate == 0.5
