"""`sparsity_config`: the record of what was pruned, as it stands in a model's config.json."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import __version__
from .config import SparseConfig, split_pattern

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from .quantization import Grid
    from .uses import View

logger = logging.getLogger(__name__)

OF_ANOTHER = "What had been pruned before is left out of the record, which is of another model: %s"

# A component of a module name that is an integer: an index into a list of blocks or experts.
_INDEX = re.compile(r"(?<![^.])(?:0|[1-9]\d*)(?![^.])")
_RANGES = re.compile(r"\{(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\}")
# What of a configuration says how weights are quantised.
QUANTIZATION_FIELDS = ("quantization", "group_size", "symmetric")
# What each `sparsity_config` has, and what is told of it in cards and reports.
FIELDS = (
    *("method", "pattern", "sparsity", "base_model", "base_revision"),
    *("dataset", "num_samples", "num_tokens", "seed", "versions"),
)
_MOST_NAMES = 1_000_000
_HUB_SNAPSHOT = re.compile(r"models--(.+)/snapshots/([0-9a-f]{40})$")


class Matrix(Protocol):
    """A pruned matrix, as `sparsity_config` needs to see it."""

    @property
    def name(self) -> str:
        """Module name."""

    @property
    def pattern(self) -> object:
        """What was asked for; reads as `"N:M"` if it is N:M."""

    @property
    def view(self) -> View:
        """Its shape, and whether it is stored transposed."""

    def read(self) -> torch.Tensor:
        """The weights, `[out_features, in_features]`."""


@dataclass(frozen=True)
class Count:
    """The zeros that a matrix was found to have, and the N:M patterns that it satisfies."""

    zeros: int
    numel: int
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What a `sparsity_config` says about a group of matrices that differ only in their block."""

    names: list[str]
    zeros: int
    numel: int
    pattern: str | None
    shape: tuple[int, int]
    transposed: bool
    quantized: bool = False


def fold_names(names: Iterable[str]) -> list[str]:
    """Join names that differ only in one index, and what results from that.

    `["h.0.fc", "h.1.fc", "h.3.fc", "head"]` becomes `["h.{0-1,3}.fc", "head"]`, and the experts of several blocks
    become `"h.{0-1}.experts.up.{0-7}"`; `expand_name` is the way back.
    """
    # For each name what stands between its indices, and the indices: each a set of one, until sets are joined.
    folded = dict.fromkeys((tuple(_INDEX.split(name)), tuple(_INDEX.findall(name))) for name in names)
    for place in range(max((len(indices) for _, indices in folded), default=0)):
        joined: dict[tuple[Any, ...], set[int]] = {}
        for texts, indices in folded:
            if place < len(indices):
                joined.setdefault((texts, indices[:place], indices[place + 1 :]), set()).add(int(indices[place]))
            else:
                joined[texts, indices, None] = set()
        folded = dict.fromkeys(
            (texts, before if after is None else (*before, _ranges(members), *after))
            for (texts, before, after), members in joined.items()
        )
    return ["".join(map("".join, zip(texts, (*indices, ""), strict=True))) for texts, indices in folded]


def _ranges(indices: set[int]) -> str:
    if len(indices) == 1:
        return str(*indices)
    starts = sorted(i for i in indices if i - 1 not in indices)
    ends = sorted(i for i in indices if i + 1 not in indices)
    return "{" + ",".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True)) + "}"


def expand_name(name: str) -> list[str]:
    """The names that a folded name stands for, in the order of their indices.

    Raises:
        ValueError: They are so many that they cannot come from a model, or none.
    """
    texts, choices, total = _RANGES.split(name)[::2], [], 1
    for ranges in _RANGES.findall(name):
        bounds = [tuple(map(int, part.split("-"))) for part in ranges.split(",")]
        if any(bound[-1] < bound[0] for bound in bounds):
            raise ValueError(f"{name!r} has a range that ends before it begins: it stands for no names.")
        total *= sum(bound[-1] - bound[0] + 1 for bound in bounds)
        if total > _MOST_NAMES:
            raise ValueError(f"{name!r} stands for more than {_MOST_NAMES} names: no model has as many.")
        choices.append([index for bound in bounds for index in range(bound[0], bound[-1] + 1)])
    return [
        "".join(f"{text}{index}" for text, index in zip(texts, (*indices, ""), strict=True))
        for indices in itertools.product(*choices)
    ]


def count(weight: torch.Tensor, patterns: Iterable[str] = ()) -> Count:
    """Count the zeros of `weight` `[out_features, in_features]` and test which of `patterns` ("N:M") it satisfies."""
    nonzero = weight != 0
    num_nonzero = int(nonzero.sum())
    satisfied = tuple(pattern for pattern in patterns if _holds(nonzero, num_nonzero, pattern))
    return Count(weight.numel() - num_nonzero, weight.numel(), satisfied)


def _holds(nonzero: torch.Tensor, num_nonzero: int, pattern: str) -> bool:
    n, m = split_pattern(pattern)
    if nonzero.ndim != 2 or nonzero.shape[1] % m or num_nonzero * m > nonzero.numel() * n:
        return False
    return bool((nonzero.reshape(-1, m).sum(dim=1) <= n).all())


def sparsity_config(
    model: PreTrainedModel, config: SparseConfig, matrices: Sequence[Matrix], calibration_record: Mapping | None
) -> dict[str, Any]:
    """Describe what was done to `model`, as pure JSON.

    Args:
        model: The pruned model; its `name_or_path` says what it was before.
        config: How it was pruned.
        matrices: What was pruned, with the weights it has now.
        calibration_record: `Calibration.record`, or `None` for a method that uses no data.
    """
    seen = dict(calibration_record or {})
    base_model, base_revision = _base(model)
    record: dict[str, Any] = {
        "method": config.method,
        "pattern": config.pattern,
        "sparsity": config.sparsity,
        "achieved_sparsity": None,
        "base_model": base_model,
        "base_revision": base_revision,
        "dataset": seen.get("dataset"),
        "num_samples": seen.get("num_samples"),
        "seqlen": seen.get("seqlen"),
        "seed": config.seed,
        "calibration_sha256": seen.get("sha256"),
        "num_tokens": seen.get("num_tokens"),
        **({"generation": seen["generation"]} if "generation" in seen else {}),
        "versions": versions(),
        "matrices": {},
    }
    options = config.to_dict()
    for field in fields(config):
        if field.name not in record and getattr(config, field.name) != field.default:
            record[field.name] = options[field.name]
    # Names are folded only with those pruned alike, so that each entry speaks for all of its members.
    kinds: dict[tuple[str, tuple[int, int], bool], dict[str, Matrix]] = {}
    for matrix in matrices:
        kind = (str(matrix.pattern), matrix.view.shape, matrix.view.transposed)
        kinds.setdefault(kind, {})[matrix.name] = matrix
    for (pattern, shape, transposed), alike in kinds.items():
        for folded in fold_names(alike):
            counts = [count(alike[name].read()) for name in expand_name(folded)]
            entry = _entry(counts, pattern if ":" in pattern else None)
            record["matrices"][folded] = {**entry, "shape": list(shape), "transposed": transposed}
    record["achieved_sparsity"] = _achieved(record["matrices"])
    json.dumps(record, allow_nan=False)  # a value that is not JSON would fail in the middle of saving the model
    return record


def versions() -> dict[str, str]:
    """Of the software that a result depends on; that of torch says which build it is."""
    import torch

    return {
        "optimum_sparse": __version__,
        "torch": str(torch.__version__),  # pip may leave out the build
        "transformers": importlib.metadata.version("transformers"),
    }


def recount(
    model: PreTrainedModel, metadata: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
) -> dict[str, Any]:
    """The metadata of `model`, with the zeros that its weights have now.

    Weights change after pruning: merging an ordinary LoRA adapter, for one, leaves no zero. An N:M pattern that no
    longer holds is set to `None`, and what is no longer on its grid is not called quantised. Differences are logged as
    a warning.

    Args:
        model: The model.
        metadata: Its `config.sparsity_config`.
        grids: What its matrices were rounded to, by name, if they were.

    Raises:
        ValueError: The metadata names a module that the model does not have.
    """
    matrices, off_grid = {}, None
    for folded, entry in metadata["matrices"].items():
        matrices[folded] = _recounted(model, expand_name(folded), entry)
        for name in expand_name(folded) if _quantization(metadata, entry) else ():
            off_grid = off_grid or against_grid(name, _matrix_of(model, name, entry), grids or {})
    current = {**metadata, "achieved_sparsity": _achieved(matrices), "matrices": matrices}
    if matrices != metadata["matrices"]:
        logger.warning(
            "The weights changed after pruning: sparsity_config said %.2f %% zeros, corrected to %.2f %%.",
            100 * metadata["achieved_sparsity"],
            100 * current["achieved_sparsity"],
        )
    if off_grid is not None:
        logger.warning("The model is saved without its grids and no longer called quantised: %s.", off_grid)
        current = _without_quantization(current)
    return current


def _without_quantization(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, or a part of it, in which nothing is called quantised."""
    return {
        name: _without_quantization(value) if isinstance(value, Mapping) else value
        for name, value in record.items()
        if name not in QUANTIZATION_FIELDS
    }


def _quantization(record: Mapping[str, Any], entry: Mapping[str, Any]) -> Any:
    """How the matrices of an entry are quantised, `None` if they are not: as all, unless it says otherwise."""
    return entry.get("quantization", record.get("quantization"))


def quantized_names(record: Mapping[str, Any]) -> list[str]:
    """Names of the matrices that a `sparsity_config` says are quantised."""
    entries = record["matrices"].items()
    return [name for folded, entry in entries if _quantization(record, entry) for name in expand_name(folded)]


def earlier_record(model: nn.Module) -> dict[str, Any] | None:
    """The `sparsity_config` of a model that had been pruned before, unless it has weights of another one since.

    One that is damaged is left out, with a warning.
    """
    record = getattr(getattr(model, "config", None), "sparsity_config", None)
    if not isinstance(record, dict) or "achieved_sparsity" not in record:
        return None  # none of ours
    try:
        claims = [claim for claim in check_record(record).values() if claim.zeros]
    except ValueError as error:
        logger.warning("What had been pruned before is left out of the record: %s", error)
        return None
    try:
        return record if not claims or any(_still_pruned(model, claim) for claim in claims) else None
    except ValueError as error:
        logger.warning(OF_ANOTHER, error)
        return None


def _still_pruned(model: nn.Module, claim: Claim) -> bool:
    zeros = 0
    for name in claim.names:
        zeros += count(matrix_of(model, name, claim.shape, claim.transposed)[1]).zeros
        if 2 * zeros >= claim.zeros:  # a dense model may have some
            return True
    return False


def carried_over(model: PreTrainedModel, record: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a model that had been pruned before, with the matrices that were pruned then and not now.

    Args:
        model: The model.
        record: Its `sparsity_config`.
        earlier: The one that it had before.
    """
    now = {name for folded in record["matrices"] for name in expand_name(folded)}
    then, since = ({f: one[f] for f in QUANTIZATION_FIELDS if f in one} for one in (earlier, record))
    if then and since and then != since:
        logger.warning("What had been quantised before, otherwise than now, is no longer called quantised: %s.", then)
        earlier = _without_quantization(earlier)
    elif then and not since:
        mine = {folded: {**entry, "quantization": None} for folded, entry in record["matrices"].items()}
        record = {**record, **then, "matrices": mine}
    matrices = dict(record["matrices"])
    try:
        for folded, entry in earlier["matrices"].items():
            for others in fold_names([name for name in expand_name(folded) if name not in now]):
                again = _recounted(model, expand_name(others), entry)
                if (how := _quantization(earlier, entry)) != record.get("quantization"):
                    again["quantization"] = how
                # Members of a group need not have equal shares of its zeros; with less than half, they were replaced.
                if 2 * again["zeros"] * entry["numel"] >= entry["zeros"] * again["numel"]:
                    matrices[others] = again
    except ValueError as error:
        logger.warning(OF_ANOTHER, error)
        matrices = dict(record["matrices"])
    # Where it comes from is what it was before that.
    base = {name: earlier.get(name) for name in ("base_model", "base_revision")}
    joined = {**record, **base, "matrices": matrices, "achieved_sparsity": _achieved(matrices)}
    return joined if quantized_names(joined) else _without_quantization(joined)


def _recounted(model: PreTrainedModel, names: Iterable[str], entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `matrices` with the zeros that its members have now."""
    patterns = [entry["pattern"]] if entry["pattern"] else []
    counts = [count(_matrix_of(model, name, entry), patterns) for name in names]
    holds = all(c.patterns for c in counts)
    return {**entry, **_entry(counts, entry["pattern"] if holds else None)}


def _matrix_of(model: PreTrainedModel, name: str, entry: Mapping[str, Any]) -> torch.Tensor:
    return matrix_of(model, name, tuple(entry["shape"]), entry["transposed"])[1]


def against_grid(name: str, matrix: torch.Tensor, grids: Mapping[str, Grid]) -> str | None:
    """Why a matrix cannot be said to be on its grid, or `None`.

    Args:
        name: Its name.
        matrix: Its weight, `[out_features, in_features]`.
        grids: Those of the model.
    """
    grid = grids.get(name)
    if grid is None:
        return f"the grid of {name} is not known"
    try:
        grid.codes(matrix)
    except ValueError as error:
        return f"{name}: {error}"
    return None


def matrix_of(model: nn.Module, name: str, shape: tuple[int, int], transposed: bool) -> tuple[str, torch.Tensor]:
    """The parameter that a matrix is in, and a view of the matrix, `[out_features, in_features]`.

    Args:
        model: The model.
        name: Name of the matrix in a `sparsity_config`: that of a module, of a parameter, or of either with the number
            of an expert behind it.
        shape: `(out_features, in_features)`.
        transposed: Whether it is stored as `[in_features, out_features]`.

    Raises:
        ValueError: The model has no such matrix.
    """
    from .offload import value_of
    from .runtime.linear import SparseLinear
    from .uses import View

    whole, _, part = name.rpartition(".")
    places = [(name, 0), (whole, int(part))] if part.isdigit() else [(name, 0)]
    for parameter_name, index in ((path, index) for owner, index in places for path in (f"{owner}.weight", owner)):
        owner, _, attribute = parameter_name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue  # it is not there
        parameter: torch.Tensor | None = module._parameters.get(attribute)
        if isinstance(module, SparseLinear) and attribute == "weight":
            parameter = module.weight  # which it writes to a checkpoint
        if parameter is not None and index < parameter.numel() // (shape[0] * shape[1]):
            value = value_of(module, attribute)
            return parameter_name, View(parameter_name, index, shape, transposed).of(value)
    raise ValueError(
        f"config.sparsity_config names the matrix {name!r} of shape {list(shape)}, which {type(model).__name__} does "
        "not have: unwrap the model (e.g. `merge_and_unload()`), or delete `model.config.sparsity_config` if it does "
        "not apply."
    )


def check_record(record: Any) -> dict[str, Claim]:
    """As `read_claims`, of a record that has everything that is told about a model.

    Raises:
        ValueError: As `read_claims`, or something is missing.
    """
    claims = read_claims(record)
    if missing := [name for name in FIELDS if name not in record]:
        raise ValueError(f"sparsity_config is damaged: it has no {', '.join(missing)}.")
    return claims


def read_claims(metadata: Any) -> dict[str, Claim]:
    """What a `sparsity_config` says about each group of matrices, by folded name.

    Args:
        metadata: From a config.json that need not be trusted.

    Raises:
        ValueError: It is not of the form that `sparsity_config` writes, or contradicts itself.
    """
    form = "sparsity_config is not of the form that optimum_sparse writes"
    entries = metadata.get("matrices") if isinstance(metadata, Mapping) else None
    if not isinstance(entries, Mapping) or "achieved_sparsity" not in metadata:
        raise ValueError(f"{form}: it must be an object with 'matrices', an object, and 'achieved_sparsity'.")
    claims, achieved = {}, metadata["achieved_sparsity"]
    for folded, entry in entries.items():
        try:
            claims[folded] = replace(_claim(folded, entry), quantized=_quantization(metadata, entry) is not None)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{form}: of {folded!r} it says {str(entry)[:200]} ({error}).") from error
    if not claims:
        raise ValueError("sparsity_config names no matrix.")
    if achieved != _achieved(metadata["matrices"]):
        raise ValueError(f"achieved_sparsity is {achieved}, but its matrices give {_achieved(metadata['matrices'])}.")
    return claims


def _claim(folded: str, entry: Mapping[str, Any]) -> Claim:
    if not all(isinstance(entry[name], int) for name in ("zeros", "numel")):
        raise TypeError("zeros and numel must be whole numbers")
    names, numel, (rows, columns) = expand_name(folded), int(entry["numel"]), entry["shape"]
    if entry["pattern"] is not None:
        split_pattern(entry["pattern"])
    if min(rows, columns) < 1 or len(names) * rows * columns != numel:
        raise ValueError(f"{folded}: {len(names)} matrices of shape {entry['shape']} do not have {numel} weights")
    return Claim(names, int(entry["zeros"]), numel, entry["pattern"], (rows, columns), bool(entry["transposed"]))


def differences(claims: Mapping[str, Claim], found: Mapping[str, Count]) -> list[str]:
    """What is claimed and is not so: one sentence each, none if all claims are true.

    Args:
        claims: From `read_claims`.
        found: What each matrix was found to have, by module name; its `patterns` include the claimed one if it holds.
    """
    problems = []
    for folded, claim in claims.items():
        missing = [name for name in claim.names if name not in found]
        if missing:
            problems.append(
                f"{folded}: there is no {missing[0]}.weight ({len(missing)} of {len(claim.names)} missing)."
            )
            continue
        counts = [found[name] for name in claim.names]
        zeros, numel = sum(c.zeros for c in counts), sum(c.numel for c in counts)
        if (claim.zeros, claim.numel) != (zeros, numel):
            problems.append(f"{folded}: claims {claim.zeros} zeros of {claim.numel}, there are {zeros} of {numel}.")
        broken = [c for c in counts if claim.pattern is not None and claim.pattern not in c.patterns]
        if broken:
            problems.append(f"{folded}: claims {claim.pattern}, but {len(broken)} of {len(counts)} are not.")
    return problems


def _entry(counts: list[Count], pattern: str | None) -> dict[str, Any]:
    return {"zeros": sum(c.zeros for c in counts), "numel": sum(c.numel for c in counts), "pattern": pattern}


def _achieved(matrices: Mapping[str, Mapping[str, Any]]) -> float:
    numel = sum(entry["numel"] for entry in matrices.values())
    return round(sum(entry["zeros"] for entry in matrices.values()) / numel, 6) if numel else 0.0


def _base(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Hub id and revision of the model before pruning; for local files their name only, which is nobody's secret."""
    source = str(model.name_or_path or "")
    snapshot = _HUB_SNAPSHOT.search(source.replace(os.sep, "/"))
    if snapshot:
        return snapshot[1].replace("--", "/"), snapshot[2]
    if not source or os.path.exists(source):
        return Path(source).resolve().name if source else None, None
    return source, getattr(model.config, "_commit_hash", None) or _only_cached_revision(source)


def _only_cached_revision(repo_id: str) -> str | None:
    """Revision of a Hub model that was loaded: transformers does not keep it, but the cache holds it.

    If the cache holds several revisions, there is no telling which one was loaded.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "snapshots")
    revisions = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
    return revisions[0] if len(revisions) == 1 else None
