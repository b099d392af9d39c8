"""`SparseConfig`: the one place where options, their ranges and their errors are written."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any

METHOD_NAMES = (
    "magnitude",
    "wanda",
    "ria",
    "sparsegpt",
    "admm",
    "sparsegpt-reference",
    "magnitude-update",
    "wanda-update",
)
COMPARISON_GROUPS = ("output", "layer")
# The methods in which weights compete within what `comparison_group` says.
GROUPED_METHODS = ("magnitude", "wanda", "ria", "admm", "magnitude-update", "wanda-update")
REFINEMENTS = ("cg", "swaps")
QUANTIZATIONS = tuple(f"int{bits}" for bits in range(2, 9))
ALLOCATIONS = ("owl", "dlp", "error", "loss")
# Ready-made options, from the least time to the best result; what each gives is measured in docs/benchmarks.md.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "admm", "iterations": 8},
    "balanced": {"method": "admm", "iterations": 10, "allocation": "loss"},
    "best": {"method": "admm", "iterations": 24, "allocation": "loss", "error_correction": 0.25, "reconstruct": 3},
}
OVERRIDE_KEYS = ("match", "sparsity", "pattern")


def _option(default: Any, help: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """How a model is pruned.

    Every field is JSON, so a configuration can be written to a file, put in a model's `config.json`, or passed as
    `quantization_config=` to `from_pretrained`, which then prunes while loading.

    Raises:
        ValueError: A value is out of range; the message gives the value, what is allowed and what to do.
        TypeError: A value has the wrong type.
    """

    method: str = _option("admm", f"how weights are chosen and updated: {', '.join(METHOD_NAMES)}")
    sparsity: float | None = _option(
        None, "fraction of weights set to zero in each matrix, 0 <= s < 1 (default: 0.5, or what the pattern implies)"
    )
    pattern: str | None = _option(
        None, "'N:M' keeps N non-zero weights of every M consecutive inputs, e.g. 2:4 (default: unstructured)", "N:M"
    )
    dataset: str | list[str] = _option(
        "c4",
        "calibration text: 'c4', 'wikitext2', a Hub id as path[:config[:split[:column]]], a .txt/.jsonl/.parquet file "
        "or 'self' for text that the dense model generates",
    )
    num_samples: int = _option(128, "number of calibration windows")
    seqlen: int | None = _option(
        None, "tokens per calibration window (default: 2048, or the model's maximum if that is less)"
    )
    batch_size: int | None = _option(
        None, "windows per forward (default: as many as fit in 2048 tokens on a CPU, 16384 on an accelerator)"
    )
    pack_documents: bool = _option(
        True,
        "join documents and cut them into windows; without it, the papers' rule: one random window from each "
        "document that is longer than seqlen",
    )
    seed: int = _option(0, "seed of the calibration sampling, which has its own random generator")
    targets: tuple[str, ...] = _option(
        ("*",), "name patterns of the modules to prune; a pattern also matches any dotted suffix, e.g. q_proj, 'mlp.*'"
    )
    ignore: tuple[str, ...] = _option(
        ("lm_head",),
        "name patterns of modules left dense, in place of the default; 'lm_head' also stands for the output "
        "embeddings of any name",
    )
    overrides: tuple[dict[str, Any], ...] = _option(
        (),
        "other sparsity or pattern for the modules that match, e.g. 'mlp.*=0.6' or 'k_proj=2:4'; the last match wins, "
        "sparsity 0 leaves a module dense",
        "MATCH=VALUE",
    )
    block_range: tuple[int, int] | None = _option(
        None, "prune only the blocks with FIRST <= index < LAST (default: all)", "FIRST LAST"
    )
    block_size: int = _option(
        128, "sparsegpt: columns per lazy update, and per mask selection if the pattern is unstructured"
    )
    dampening_frac: float = _option(
        0.01,
        "methods that update weights: damping added to the Hessian's diagonal, as a fraction of its mean (admm and "
        "refine='cg': of each entry)",
    )
    equal_tokens: bool | None = _option(
        None,
        "the inputs of each token are scaled to the same norm, so that a few large ones do not decide alone (default: "
        "for admm)",
    )
    rescale: bool | None = _option(
        None,
        "each output of a layer is scaled to be as large over the calibration tokens as before pruning (default: for "
        "admm)",
    )
    iterations: int = _option(8, "admm: how often weights and mask take turns, a product with the Gram matrix each")
    true_sequential: bool | None = _option(
        None,
        "each group of layers sees inputs that went through all pruned layers before it; without it, all layers of a "
        "block see the block's dense inputs, as in the papers' code (slower, less memory) (default: yes, unless only "
        "the latter fits in memory)",
    )
    min_expert_tokens: int | None = _option(
        None,
        "an expert that fewer calibration tokens are routed to is pruned on a blend with all tokens of its layer "
        "(default: 64 for wanda and ria alone, else its number of inputs)",
    )
    calibrate_all_experts: bool = _option(False, "prune each expert on all tokens of its layer, not only its own")
    comparison_group: str | None = _option(
        None,
        f"{', '.join(GROUPED_METHODS)}: weights compete within one 'output' or the whole 'layer' "
        "(default: wanda and wanda-update output, the others layer)",
    )
    refine: str | None = _option(
        None,
        "what is done to each solution afterwards: 'cg' gives the kept weights their best values, 'swaps' exchanges "
        "kept and pruned ones (default: nothing)",
    )
    reconstruct: int | None = _option(
        None,
        "train the kept weights, norms and biases of each pruned block to do what the dense block did, for so many "
        "epochs at most; goes block by block, as true_sequential=False (default: do not)",
    )
    error_correction: float | None = _option(
        None,
        "how much of the error of the blocks before each one makes up for, 0 < e <= 1; the calibration data runs "
        "through the dense model as well, block by block, as true_sequential=False (default: none)",
    )
    quantization: str | None = _option(
        None,
        f"also round the kept weights to so many bits, {QUANTIZATIONS[0]} to {QUANTIZATIONS[-1]}; methods that update "
        "weights make up for it with the others (default: no)",
    )
    group_size: int | None = _option(
        None, "quantization: how many consecutive inputs of an output share a scale, -1 for all of them (default: 128)"
    )
    symmetric: bool = _option(False, "quantization: the code of 0 is the one in the middle, whatever the weights are")
    allocation: str | None = _option(
        None,
        "give each matrix a sparsity of its own, with as many zeros in all of them together: by outliers ('owl') or "
        "means ('dlp') of weights times inputs, so that the estimated error of matrices is least ('error'), or that "
        "the loss of the model is ('loss'); with a pattern and a lower sparsity, the last two choose which matrices "
        "stay dense (default: the same for all)",
    )

    def __post_init__(self) -> None:
        for name in ("targets", "ignore"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("num_samples", "block_size", "iterations"):
            _check_int(name, getattr(self, name), 1)
        for name in ("seqlen", "batch_size", "min_expert_tokens", "reconstruct"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        _check_int("seed", self.seed, 0)
        for name in ("pack_documents", "calibrate_all_experts", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        for name in ("true_sequential", "equal_tokens", "rescale"):
            if not isinstance(getattr(self, name), (bool, NoneType)):
                raise TypeError(f"{name} must be true, false or None, got {getattr(self, name)!r}.")
        _check_choice("method", self.method, METHOD_NAMES)
        if self.comparison_group is not None:
            _check_choice("comparison_group", self.comparison_group, COMPARISON_GROUPS)
            if self.method not in GROUPED_METHODS:
                raise ValueError(
                    f"comparison_group={self.comparison_group!r} applies to {', '.join(GROUPED_METHODS)}, not to "
                    f"{self.method}: leave it out, or choose one of these methods."
                )
        if self.refine is not None:
            _check_choice("refine", self.refine, REFINEMENTS)
        self._check_by_block()
        self._check_quantization()
        if self.rescale and self.method == "magnitude" and self.refine is None:
            raise ValueError(
                "rescale=True does not go with method='magnitude', which sees no data: leave it out, choose a refine, "
                "or another method."
            )
        if not _is_number(self.dampening_frac) or not 0 < self.dampening_frac <= 1:
            raise ValueError(f"dampening_frac must be a number in (0, 1], got {self.dampening_frac!r}.")
        object.__setattr__(self, "dataset", _dataset(self.dataset))
        object.__setattr__(
            self, "sparsity", resolve_sparsity(self.sparsity, self.pattern, self.allocation is not None)
        )
        self._check_allocation()
        object.__setattr__(
            self, "overrides", tuple(_override(entry) for entry in _sequence("overrides", self.overrides))
        )
        if self.block_range is not None:
            object.__setattr__(self, "block_range", _block_range(self.block_range))

    def _check_by_block(self) -> None:
        """Check what makes a run go block by block."""
        correction = self.error_correction
        if correction is not None and not (_is_number(correction) and 0 < correction <= 1):
            raise ValueError(f"error_correction must be a number in (0, 1], got {correction!r}.")
        for name in ("reconstruct", "error_correction"):
            if (value := getattr(self, name)) is None:
                continue
            why = None
            if self.method == "magnitude" and self.refine is None:
                why = "method='magnitude', which sees no data"
            elif self.true_sequential:
                why = "true_sequential=True, which prunes layer by layer: it goes block by block"
            elif name == "reconstruct" and self.quantization is not None:
                why = f"quantization={self.quantization!r}: training leaves the grid"
            if why:
                raise ValueError(f"{name}={value} does not go with {why}. Leave one of them out.")
            object.__setattr__(self, "true_sequential", False)

    def _check_quantization(self) -> None:
        if self.group_size is not None and self.group_size != -1:
            _check_int("group_size", self.group_size, 1)
        if self.quantization is not None:
            _check_choice("quantization", self.quantization, QUANTIZATIONS)
            object.__setattr__(self, "group_size", self.group_size or 128)
        elif self.group_size is not None or self.symmetric:
            raise ValueError(
                f"group_size={self.group_size!r} and symmetric={self.symmetric!r} are those of a quantization: choose "
                f"one of {', '.join(QUANTIZATIONS)}, or leave them out."
            )

    def _check_allocation(self) -> None:
        if self.allocation is None:
            return
        _check_choice("allocation", self.allocation, ALLOCATIONS)
        if self.method == "magnitude" and self.refine is None:
            raise ValueError(
                f"allocation={self.allocation!r} does not go with method='magnitude', which sees no data to allocate "
                "by. Leave one of them out."
            )
        if self.pattern is None:
            return
        if self.allocation not in ("error", "loss"):
            raise ValueError(
                f"allocation={self.allocation!r} does not go with pattern {self.pattern!r}, which a matrix has or has "
                "not: choose allocation='error' or 'loss', or leave one of them out."
            )
        implied = resolve_sparsity(None, self.pattern)
        if self.sparsity == implied:
            raise ValueError(
                f"allocation={self.allocation!r} has nothing to choose: pattern {self.pattern!r} in all matrices is a "
                f"sparsity of {implied:g}. Give a lower sparsity, so that some matrices stay dense."
            )

    @property
    def quant_method(self) -> str:
        """The name under which transformers finds the code that prunes while loading."""
        return "optimum_sparse"

    @classmethod
    def preset(cls, preset: str, **options: Any) -> SparseConfig:
        """The options of a preset, and others, which win over it.

        With a pattern there is no `allocation` unless it is given: all matrices get the pattern.

        Args:
            preset: `"fast"`, `"balanced"` or `"best"`.
            **options: Fields of the configuration.

        Raises:
            ValueError: There is no such preset, or as `from_dict`.
        """
        return cls.from_dict({"preset": preset, **options})

    def to_dict(self) -> dict[str, Any]:
        """The configuration as pure JSON; `from_dict` gives back an equal object."""
        return json.loads(json.dumps({f.name: getattr(self, f.name) for f in fields(self)}))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SparseConfig:
        """Build a configuration from a mapping of field names to values, and `"preset"` to values that they win over.

        Raises:
            ValueError: A key is no field, or there is no such preset; the message names the closest one.
            TypeError: `options` is no mapping, or a value is of another type than its option.
        """
        if not isinstance(options, Mapping):
            raise TypeError(f"A configuration must be a mapping of field names to values, got {options!r}.")
        names = [f.name for f in fields(cls)]
        preset = options.get("preset")
        if preset is not None:
            _check_choice("preset", preset, tuple(PRESETS))
        given = {key: value for key, value in options.items() if key != "preset"}
        options = {**preset_options(preset, given.get("pattern")), **given} if preset is not None else given
        for key in options:
            if key not in names:
                raise ValueError(f"Unknown option {key!r}{_closest(key, names)} Options are: {', '.join(names)}.")
        return cls(**options)

    def to_json_file(self, path: str | Path) -> None:
        """Write the configuration to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> SparseConfig:
        """Read a configuration from a JSON file.

        Raises:
            ValueError: The file is not JSON, or holds an unknown option or a bad value.
            FileNotFoundError: There is no such file.
        """
        try:
            options = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}).") from error
        return cls.from_dict(options)


def preset_options(preset: str, pattern: str | None) -> dict[str, Any]:
    """The options of a preset, but for an allocation if there is a pattern, which all matrices are to have."""
    return {name: value for name, value in PRESETS[preset].items() if name != "allocation" or pattern is None}


def resolve_sparsity(sparsity: float | None, pattern: str | None, some_dense: bool = False) -> float:
    """The fraction of zeros that a sparsity and a pattern ask for together.

    Args:
        sparsity: Fraction of zeros in [0, 1), or `None` for what the pattern implies (0.5 without a pattern).
        pattern: `"N:M"` or `None` for unstructured.
        some_dense: Whether the sparsity may be lower than the pattern's, as where some matrices stay dense.

    Raises:
        ValueError: The sparsity is out of range, the pattern is malformed, or the two contradict each other.
    """
    if sparsity is not None and not (_is_number(sparsity) and 0 <= sparsity < 1):
        raise ValueError(
            f"sparsity must be a number with 0 <= sparsity < 1, got {sparsity!r}: 0.5 sets half of them to zero."
        )
    if pattern is None:
        return 0.5 if sparsity is None else float(sparsity)
    n, m = split_pattern(pattern)
    implied = 1 - n / m
    if some_dense and sparsity is not None and sparsity < implied - 1e-9:
        return float(sparsity)
    if sparsity is not None and not math.isclose(sparsity, implied, abs_tol=1e-9):
        raise ValueError(
            f"pattern {pattern!r} sets exactly {implied:g} of the weights to zero, but sparsity is {sparsity!r}: "
            "leave sparsity out, or choose another pattern."
        )
    return implied


def split_pattern(pattern: str) -> tuple[int, int]:
    """Split `"N:M"` into `(N, M)`: N non-zero weights of every M consecutive inputs.

    Raises:
        ValueError: Not of the form N:M with 1 <= N < M.
    """
    parts = pattern.split(":") if isinstance(pattern, str) else []
    if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts):
        n, m = int(parts[0]), int(parts[1])
        if 1 <= n < m:
            return n, m
    raise ValueError(
        f"pattern must be 'N:M' with 1 <= N < M, N being the number of weights kept of every M consecutive inputs "
        f"(e.g. '2:4', '4:8', '1:4'), got {pattern!r}."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    if value >= 2**63:
        raise ValueError(f"{name} must be less than 2^63, got {value}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}{_closest(value, choices)} Choose one of: {', '.join(choices)}.")


def _closest(word: Any, choices: Any) -> str:
    near = difflib.get_close_matches(str(word), choices, n=1)
    return f": did you mean {near[0]!r}?" if near else "."


def _dataset(dataset: Any) -> str | list[str]:
    dataset = os.fspath(dataset) if isinstance(dataset, os.PathLike) else dataset
    texts = [dataset] if isinstance(dataset, str) else dataset
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"dataset must be a name, a path or a list of strings, got {type(dataset).__name__}: pass token batches, "
            "a datasets.Dataset or a DataLoader to prune(model, dataset=...) instead."
        )
    if not texts or not any(text.strip() for text in texts):
        raise ValueError("dataset is empty: give a name, a path or at least one text.")
    return dataset if isinstance(dataset, str) else list(texts)


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {value!r}.")
    return tuple(value)


def _names(name: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else _sequence(name, value)
    if not all(isinstance(pattern, str) for pattern in names):
        raise TypeError(f"{name} must be a list of name patterns, got {value!r}.")
    return names


def _override(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("match"), str):
        raise TypeError(
            f"An override is like {{'match': 'mlp.*', 'sparsity': 0.6}} or {{'match': 'k_proj', 'pattern': '2:4'}}"
            f", got {entry!r}."
        )
    for key in entry:
        if key not in OVERRIDE_KEYS:
            raise ValueError(f"Unknown key {key!r} in override {entry!r}{_closest(key, OVERRIDE_KEYS)}")
    sparsity, pattern = entry.get("sparsity"), entry.get("pattern")
    if sparsity is None and pattern is None:
        raise ValueError(f"Override {dict(entry)!r} changes nothing: give it a sparsity or a pattern.")
    resolve_sparsity(sparsity, pattern)
    return {key: value for key, value in entry.items() if value is not None}


def _block_range(value: Any) -> tuple[int, int]:
    first_last = _sequence("block_range", value)
    if len(first_last) != 2:
        raise ValueError(f"block_range must be (first, last), got {value!r}.")
    for bound in first_last:
        _check_int("block_range", bound, 0)
    if first_last[0] >= first_last[1]:
        raise ValueError(f"block_range {value!r} is empty: blocks with first <= index < last are pruned.")
    return first_last
