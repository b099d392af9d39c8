"""`optimum-cli sparse inspect`: the zeros that a checkpoint has, against those that it claims to have."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..loading import hub_errors, local_path, model_class, read_json
from ..metadata import Claim, Count, against_grid, check_record, count, differences, expand_name, fold_names, matrix_of
from ..tables import text_table
from . import user_errors

if TYPE_CHECKING:
    import torch

    from ..quantization import Grid

DESCRIPTION = """\
Read the weights of a checkpoint, one tensor at a time, and print how many of them are zero, which N:M patterns they
satisfy, and whether the sparsity_config in config.json tells the truth about them: if it says that they are
quantised, also whether they are on their grids.

exit code: 0 it does, 1 it does not or there is none, 2 the checkpoint cannot be read
"""

# From strict to loose, so that the first that holds is the strictest.
COMMON_PATTERNS = ("1:4", "2:4", "4:8", "8:16")

# In these models, modules of these names are Conv1D: their weights are stored as [in_features, out_features].
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")

NOTHING = "config.json has no sparsity_config: there is nothing to compare the weights with."


class InspectCommand(BaseOptimumCLICommand):
    """Prints the sparsity of a checkpoint and checks its metadata."""

    COMMAND = CommandInfo(name="inspect", help="Show the sparsity of a checkpoint and check its metadata.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description = DESCRIPTION
        parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a checkpoint in safetensors files")
        parser.add_argument("--all", action="store_true", help="one row for each matrix, not one for each kind")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self) -> None:
        """Print what was found and exit."""
        with user_errors():
            findings = inspect(self.args.model, every_matrix=self.args.all)
            print(json.dumps(findings, indent=2) if self.args.json else _table(findings))
        sys.exit(0 if findings["metadata_is_true"] else 1)


def inspect(source: str, every_matrix: bool = False) -> dict[str, Any]:
    """Count the zeros of a checkpoint and compare them with its metadata.

    Args:
        source: A folder or Hub id.
        every_matrix: One row for each matrix; else those that differ in their block only share one.

    Returns:
        Pure JSON: `"metadata_is_true"`, the `"problems"` if it is not, totals of what it names, and `"rows"`.

    Raises:
        OSError: There is no such checkpoint, or it has no safetensors files.
        ValueError: A file is corrupt.
    """
    folder = local_path(source) or _download(source)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder of a checkpoint.")
    config_file = folder / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    claims, problems = _claims(config)
    claimed = {name: claim for claim in claims.values() for name in claim.names}

    grids, missing = _grids(folder, config)
    problems += missing
    found, off_grid = {}, []
    for name, weight in _matrices(folder, config, values=bool(grids)):
        claim = claimed.get(name)
        conv1d = config.get("model_type") in CONV1D_MODELS and name.rsplit(".", 1)[-1] in CONV1D_MODULES
        patterns = dict.fromkeys([*COMMON_PATTERNS, claim.pattern if claim else None])
        transposed = claim.transposed if claim else conv1d
        weight = weight.T if transposed and weight.ndim == 2 else weight
        found[name] = count(weight, filter(None, patterns))
        if claim and claim.quantized and grids:
            off_grid.append(against_grid(name, weight, grids))
    elsewhere = {name: claim for name, claim in claimed.items() if name not in found}
    if elsewhere:
        for name, weight in _after_loading(folder, elsewhere):
            found[name] = count(weight, filter(None, [elsewhere[name].pattern]))
            if elsewhere[name].quantized and grids:
                off_grid.append(against_grid(name, weight, grids))
    problems = problems or [*differences(claims, found), *(f"{reason}." for reason in off_grid if reason)]

    unclaimed = fold_names(name for name in found if name not in claimed)
    groups = {folded: claim.names for folded, claim in claims.items()}
    groups |= {folded: expand_name(folded) for folded in unclaimed}
    if every_matrix:
        groups = {name: [name] for names in groups.values() for name in names}
    rows = [_row(name, [found[n] for n in names if n in found], claims.get(name)) for name, names in groups.items()]
    pruned = [found[name] for name in claimed if name in found]
    return {
        "model": source,
        "metadata_is_true": not problems,
        "problems": problems,
        "method": config["sparsity_config"].get("method") if claims else None,
        "pruned_matrices": len(pruned),
        "pruned_zeros": sum(c.zeros for c in pruned),
        "pruned_weights": sum(c.numel for c in pruned),
        "rows": rows,
    }


def _grids(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Grid], list[str]]:
    """The grids of a checkpoint, and what is wrong if it should have some."""
    from ..quantization import read_grids
    from ..saving import GRIDS_FILE

    claim = config.get("sparsity_config")
    if not isinstance(claim, dict) or claim.get("quantization") is None:
        return {}, []
    try:
        return read_grids(folder / GRIDS_FILE), []
    except ValueError as error:
        return {}, [str(error)]
    except FileNotFoundError:
        return {}, [f"It claims {claim['quantization']}, but there is no {GRIDS_FILE}: save with SparsePruner.save."]


def _after_loading(folder: Path, claimed: dict[str, Claim]) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices that are not in the files by their names: many architectures rename or join them in saving.

    Only transformers knows how, so this takes the memory of the model.

    Args:
        folder: The checkpoint.
        claimed: What is claimed for each matrix. Those that are nowhere in the files are left out.
    """
    from transformers import AutoConfig

    model, info = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    for name, claim in claimed.items():
        try:
            parameter, matrix = matrix_of(model, name, claim.shape, claim.transposed)
        except ValueError:
            continue  # the caller says that it is missing
        if parameter not in absent:
            yield name, matrix


def _claims(config: dict[str, Any]) -> tuple[dict[str, Claim], list[str]]:
    """The claims of a config.json, and what is wrong with it as it stands."""
    if "sparsity_config" not in config:
        return {}, [NOTHING]
    try:
        return check_record(config["sparsity_config"]), []
    except ValueError as error:
        return {}, [str(error)]


def _row(name: str, counts: list[Count], claim: Claim | None) -> dict[str, Any]:
    patterns = counts[0].patterns if counts else ()
    return {
        "name": name,
        "matrices": len(counts),
        "zeros": sum(c.zeros for c in counts),
        "numel": sum(c.numel for c in counts),
        "pattern": next((p for p in patterns if all(p in c.patterns for c in counts)), None),
        "claimed_zeros": claim.zeros if claim else None,
        "claimed_pattern": claim.pattern if claim else None,
    }


def _table(findings: dict[str, Any]) -> str:
    """The findings as text."""
    rows = []
    for row in findings["rows"]:
        zeros, claimed = (_percent(row[key], row["numel"]) for key in ("zeros", "claimed_zeros"))
        rows.append((row["name"], str(row["matrices"]), f"{row['numel']:,}", zeros, claimed, row["pattern"] or "-"))
    lines = [text_table(("matrix", "count", "weights", "zeros", "claimed", "pattern"), rows)]
    if findings["metadata_is_true"]:
        named = f"{findings['pruned_matrices']} matrices"
        zeros = _percent(findings["pruned_zeros"], findings["pruned_weights"])
        lines += ["", f"The metadata tells the truth: {zeros} zeros in {named} pruned with {findings['method']}."]
    else:
        verdict = "There is nothing to check:" if findings["problems"] == [NOTHING] else "The metadata is not true:"
        lines += ["", verdict, *(f"- {problem}" for problem in findings["problems"])]
    return "\n".join(lines)


def _percent(part: int | None, whole: int) -> str:
    return "-" if part is None or not whole else f"{100 * part / whole:.2f} %"


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id):
        return Path(
            snapshot_download(repo_id, allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json"])
        )


def _matrices(folder: Path, config: dict[str, Any], values: bool) -> Iterator[tuple[str, Any]]:
    """Module name of each tensor with two or more dimensions, and the tensor.

    Of a packed one, which weights are not zero, unless their values are needed.
    """
    from ..checkpoint import Checkpoint, encoding, weight_files
    from ..packing import Packed

    with Checkpoint(weight_files(folder), encoding(config)) as checkpoint:
        for names in checkpoint.names.values():
            for name in names:
                tensor = checkpoint.read(name)
                if len(tensor.shape) >= 2:
                    if isinstance(tensor, Packed):
                        tensor = tensor.unpack() if values else tensor.nonzero()
                    yield name.removesuffix(".weight"), tensor
