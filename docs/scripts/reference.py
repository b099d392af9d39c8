"""Write docs/reference.md from the docstrings of the package: `python docs/scripts/reference.py [--check]`.

The sources are read, not imported, so that the result does not depend on what is installed. Only `SparseConfig`, whose
fields carry their help texts, is imported: its module needs the standard library only.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "optimum_sparse"
TARGET = ROOT / "docs" / "reference.md"

HEAD = """\
# Reference

Written from the docstrings by `python docs/scripts/reference.py`: change them, not this file.
"""

# Title, introduction, and what to list as (file below the package, names).
SECTIONS: list[tuple[str, str, list[tuple[str, tuple[str, ...]]]]] = [
    (
        "Pruning",
        "`from optimum_sparse import SparseConfig, SparsePruner, SparsityReport` gives all that most people need.",
        [
            ("config.py", ("SparseConfig",)),
            ("pruner.py", ("SparsePruner",)),
            ("report/record.py", ("SparsityReport", "MatrixReport")),
        ],
    ),
    (
        "Recovery",
        "See [Recovery](recovery.md).",
        [
            ("recovery/adapter.py", ("keep_sparsity",)),
            ("recovery/callback.py", ("SparsityCallback", "train_norms_only")),
            ("recovery/distillation.py", ("DistillationTrainer",)),
            ("recovery/teacher_cache.py", ("TopKCache",)),
            ("recovery/masks.py", ("Mask", "find_masks", "masks_of", "save_masks", "load_masks")),
            ("recovery/recover.py", ("recover",)),
            ("recovery/config.py", ("RecoveryConfig",)),
        ],
    ),
    (
        "Running",
        "See [Running a pruned model faster](runtime.md).",
        [
            ("runtime/sparsify.py", ("sparsify_for_inference",)),
            ("runtime/report.py", ("RuntimeReport", "LayerChoice")),
            ("runtime/linear.py", ("SparseLinear", "DenseLinear")),
            ("runtime/semi_structured.py", ("SemiStructuredLinear",)),
            ("runtime/tiles.py", ("Tiles",)),
            ("runtime/bench.py", ("bench",)),
        ],
    ),
    (
        "Loading and evaluating",
        "",
        [
            ("loading.py", ("load_model",)),
            ("evaluation/protocol.py", ("evaluate", "check_same_tokenizer", "generate")),
            ("evaluation/perplexity.py", ("perplexity", "Perplexity", "compare", "Comparison")),
            ("evaluation/texts.py", ("load_text", "Text", "wikitext_tokens")),
            ("evaluation/harness.py", ("load_tasks", "run_tasks", "TaskResult")),
        ],
    ),
    (
        "Calibration data",
        "`SparsePruner.prune` calls this; call it yourself to see the tokens before pruning.",
        [("calibration/__init__.py", ("load_calibration", "Calibration"))],
    ),
    (
        "Checking and publishing a checkpoint",
        "",
        [("commands/inspect.py", ("inspect",)), ("integrations/hub.py", ("model_card", "push_folder"))],
    ),
    (
        "Packed checkpoints",
        "See [Packed checkpoints](packing.md).",
        [
            ("integrations/packed.py", ("PackedConfig",)),
            ("checkpoint.py", ("pack_folder", "unpack_folder", "Sizes", "Checkpoint")),
            ("packing.py", ("Packed", "pack", "smallest")),
        ],
    ),
    (
        "Building a method",
        "What a method gets and gives back; see [CONTRIBUTING](../CONTRIBUTING.md#adding-a-method).",
        [
            ("methods/__init__.py", ("__doc__", "Method")),
            ("methods/solution.py", ("Solution",)),
            ("patterns.py", ("Unstructured", "NM", "parse_pattern", "num_pruned", "keep_mask", "keep_all_but")),
            ("methods/refine.py", ("refine",)),
            ("statistics.py", ("Statistics", "NormStatistics", "GramStatistics")),
            ("methods/hessian.py", ("reversed_cholesky",)),
            ("allocation.py", ("allocate", "least_loss")),
        ],
    ),
    (
        "The engine",
        "",
        [
            ("uses.py", ("View", "Use", "WeightUses")),
            ("trace.py", ("Trace", "trace")),
            ("matrices.py", ("PrunableMatrix", "find_matrices", "find_blocks")),
            ("lockstep.py", ("Lockstep", "Call")),
        ],
    ),
    (
        "Scale",
        "See [Scale](scale.md).",
        [
            ("plan.py", ("Plan", "Workload", "GroupShape", "Footprint", "make_plan", "measure")),
            ("dry_run.py", ("outline", "Outline", "phases", "Rates")),
            ("offload.py", ("Residency",)),
            ("spill.py", ("Activations",)),
            ("resume.py", ("Steps", "remove_progress")),
        ],
    ),
]

WIDTH = 100
FIELDS = ("Args:", "Attributes:", "Returns:", "Raises:")
Definition = ast.FunctionDef | ast.ClassDef


def main() -> None:
    """Write the page, or check that it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    args = parser.parse_args()
    page = render()
    if not args.check:
        TARGET.write_text(page, encoding="utf-8")
    elif not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != page:
        sys.exit(f"{TARGET.relative_to(ROOT)} is out of date: run python docs/scripts/reference.py")


def render() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for title, introduction, entries in SECTIONS:
        parts.append(f"## {title}\n")
        if introduction:
            parts.append(f"{introduction}\n")
        for file, names in entries:
            module = _parse(PACKAGE / file)
            definitions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            for name in names:
                parts += [_docstring(module)] if name == "__doc__" else _entry(definitions[name], _home(file, name))
    return "\n".join(parts)


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _home(file: str, name: str) -> str:
    """The module to import a name from: the outermost package that exports it, else that of its file."""
    parts = Path("optimum_sparse", file).with_suffix("").parts
    for depth in range(1, len(parts)):
        if name in _exports(ROOT.joinpath(*parts[:depth], "__init__.py")):
            return ".".join(parts[:depth])
    return ".".join(parts).removesuffix(".__init__")


def _exports(file: Path) -> list[str]:
    """The `__all__` of a file, if it has one."""
    lists = [node for node in _parse(file).body if ast.unparse(node).startswith("__all__ = ")]
    return ast.literal_eval(lists[0].value) if lists else []


def _entry(node: Definition, module: str) -> list[str]:
    parts = [f"### `{node.name}`\n", _code(f"from {module} import {node.name}", _signature(node)), _docstring(node)]
    if node.name.endswith("Config") and any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
        parts.append(_options(module, node.name))
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                parts += [f"#### `{node.name}.{member.name}`\n", _code(_signature(member)), _docstring(member)]
    return [part for part in parts if part]


def _code(*lines: str) -> str:
    return "```text\n" + "\n".join(lines) + "\n```\n"


def _signature(node: Definition) -> str:
    decorators = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
    if isinstance(node, ast.ClassDef):
        inits = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
        if inits:
            return _call(node.name, _arguments(inits[0].args)[1:], "")
        fields = [ast.unparse(m) for m in node.body if isinstance(m, ast.AnnAssign)]
        return _call(node.name, ["..."] if node.name == "SparseConfig" else fields, "")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if decorators & {"property", "cached_property"}:
        return f"{node.name}{returns.replace(' ->', ':')}"
    arguments = _arguments(node.args)
    return _call(node.name, arguments[1:] if arguments[:1] in (["self"], ["cls"]) else arguments, returns)


def _call(name: str, arguments: list[str], returns: str) -> str:
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def _arguments(arguments: ast.arguments) -> list[str]:
    """The arguments as they stand in the source, one string each."""
    plain = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    texts = [_argument(argument, default) for argument, default in zip(plain, defaults, strict=True)]
    if arguments.vararg:
        texts.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        texts.append("*")
    texts += [_argument(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        texts.append(f"**{_argument(arguments.kwarg, None)}")
    return texts


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if argument.annotation else f"{text}={ast.unparse(default)}"


def _docstring(node: Definition | ast.Module) -> str:
    """A Google-style docstring as Markdown."""
    lines, title = [], ""
    for line in inspect.cleandoc(ast.get_docstring(node) or "").splitlines():
        if line in FIELDS:
            title = line
            lines += [f"**{line.removesuffix(':')}**", ""]
        elif title and line and not line.startswith(" "):
            title = ""
            lines.append(line)
        elif title:
            lines.append(_item(line, title))
        else:
            lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


def _item(line: str, title: str) -> str:
    """A line of a section: the start of an item, or its continuation."""
    text = line[4:]
    if title == "Returns:" or not text.strip():
        return text
    item = re.match(r"(\*{0,2}[\w.]+): (.*)", text)
    return f"- `{item[1]}`: {item[2]}" if item else f"  {text[4:]}"


def _options(module: str, name: str) -> str:
    """The table of the fields of a configuration."""
    sys.path.insert(0, str(ROOT))
    config = getattr(importlib.import_module(module), name)
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(config):
        kind = str(field.type).replace("|", r"\|")
        meaning = field.metadata["help"].replace("|", r"\|").replace("*", r"\*")
        rows.append(f"| `{field.name}` | `{kind}` | `{field.default!r}` | {meaning} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
