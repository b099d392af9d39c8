"""What importing the package costs, what it brings in, and which file may import which."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimum_sparse

PACKAGE = Path(optimum_sparse.__file__).parent

# The direction of the data flow: a file imports only from its own entry and from those above it.
ORDER = [
    "config",
    "tables",
    "order",
    "patterns",
    "distributed",
    "precision",
    "muon",
    "saving",
    "quantization",
    "uses",
    "offload",
    "calibration",
    "experts",
    "trace",
    "matrices",
    "lockstep",
    "spill",
    "padding",
    "statistics",
    "methods",
    "allocation",
    "sensitivity",
    "report",
    "runtime.kernels",
    "runtime.tiles",
    "runtime.gpu",
    "runtime.quantized",
    "runtime.ops",
    "runtime.weight",
    "runtime.linear",
    "runtime.semi_structured",
    "metadata",
    "loading",
    "runtime.grids",
    "packing",
    "checkpoint",
    "plan",
    "estimate",
    "progress",
    "solver",
    "resume",
    "reconstruction",
    "forwards",
    "stages",
    "blocks",
    "run",
    "depth",
    "integrations.hub",
    "pruner",
    "dry_run",
    "evaluation",
    "runtime.report",
    "runtime.timing",
    "runtime.sparsify",
    "runtime.bench",
    "runtime",
    "integrations",
    "recovery",
    "commands",
]

HEAVY = ["torch", "transformers", "datasets", "accelerate", "numpy"]

RUN_CLI = """
import sys
from optimum.commands.optimum_cli import main
try:
    main()
finally:
    print("imported:", *(name for name in {heavy} if name in sys.modules))
"""


def run(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_takes_less_than_half_of_that_of_asyncio():
    """Which takes some 30 milliseconds where nothing else runs, and more on a busy machine, as everything does."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    pairs = [[float(run(code.format(name))) for name in ("optimum_sparse", "asyncio")] for _ in range(5)]
    ours, theirs = map(min, zip(*pairs, strict=True))
    assert ours < theirs / 2


@pytest.mark.parametrize("statement", ["import optimum_sparse", "from optimum_sparse.config import SparseConfig"])
def test_import_is_light(statement: str):
    assert run(f"{statement}\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))").split() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["sparse", "--help"],
        *(["sparse", name, "--help"] for name in ("prune", "plan", "inspect", "pack", "unpack", "bench")),
    ],
    ids=" ".join,
)
def test_help_of_the_command_is_light(arguments: list[str]):
    last_line = run(RUN_CLI.format(heavy=HEAVY), *arguments).splitlines()[-1]
    assert last_line.split() == ["imported:"]


@pytest.mark.parametrize("name", ["PackedConfig", "SparseConfig", "SparsePruner"])
def test_public_entry_points_register_the_quantizer(name: str):
    code = f"""
from optimum_sparse import {name}
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
for name in ("optimum_sparse", "optimum_sparse_packed"):
    print(name in AUTO_QUANTIZATION_CONFIG_MAPPING, name in AUTO_QUANTIZER_MAPPING)
"""
    assert run(code).split() == 4 * ["True"]


def test_public_names():
    from optimum_sparse.config import SparseConfig
    from optimum_sparse.integrations.packed import PackedConfig
    from optimum_sparse.pruner import SparsePruner
    from optimum_sparse.report import SparsityReport
    from optimum_sparse.runtime import sparsify_for_inference

    public = {name: getattr(optimum_sparse, name) for name in optimum_sparse.__all__}
    assert public == {
        "PackedConfig": PackedConfig,
        "SparseConfig": SparseConfig,
        "SparsePruner": SparsePruner,
        "SparsityReport": SparsityReport,
        "sparsify_for_inference": sparsify_for_inference,
    }
    assert set(public) <= set(dir(optimum_sparse))


def test_unknown_public_name():
    with pytest.raises(AttributeError, match=r"no attribute 'SparsePrune'; it has PackedConfig, SparseConfig, Spar"):
        optimum_sparse.SparsePrune  # noqa: B018


def test_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("optimum-sparse") == optimum_sparse.__version__


def imported_names(file: Path) -> Iterator[str]:
    """The dotted names that a file imports, at any depth of nesting; `from a import b` counts as `a.b`."""
    package = ["optimum_sparse", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*parents, *filter(None, [node.module]), alias.name]) for alias in node.names)


def entry_of(name: str) -> str | None:
    """The entry of `ORDER` that a module of the package, or a name in it, belongs to."""
    return max((entry for entry in ORDER if f"{name}.".startswith(f"{entry}.")), key=len, default=None)


# Every file but the package's own __init__.py, which shows the names of all the others.
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.parent != PACKAGE or file.name != "__init__.py"
}


def test_every_file_has_its_place_in_the_order():
    assert {name: entry_of(name) for name in FILES if entry_of(name) is None} == {}
    assert {entry_of(name) for name in FILES} == set(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_files_import_only_from_those_above(name: str):
    allowed = ORDER[: ORDER.index(entry_of(name)) + 1]
    ours = {
        imported.removeprefix("optimum_sparse.")
        for imported in imported_names(FILES[name])
        if imported.startswith("optimum_sparse.")
    }
    assert {imported for imported in ours - {"__version__"} if entry_of(imported) not in allowed} == set()
