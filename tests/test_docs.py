"""The documentation is true: its code runs, its commands and links exist, its figures show what the text says."""

import argparse
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_sparse import SparsePruner
from optimum_sparse.checkpoint import pack_folder
from optimum_sparse.commands.bench import BenchCommand
from optimum_sparse.commands.compare import CompareCommand
from optimum_sparse.commands.evaluate import EvaluateCommand
from optimum_sparse.commands.inspect import InspectCommand, inspect
from optimum_sparse.commands.pack import PackCommand, UnpackCommand
from optimum_sparse.commands.plan import PlanCommand
from optimum_sparse.commands.prune import PruneCommand, build_config
from optimum_sparse.commands.recover import RecoverCommand
from optimum_sparse.config import METHOD_NAMES, SparseConfig
from optimum_sparse.packing import pack
from optimum_sparse.runtime import ops

from .checkpoints import save_tiny, write_text
from .integrations.fake_hub import FakeHub

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "tests" / "benchmarks" / "README.md"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the documentation prunes; here, a tiny model stands in for it
COMMANDS = {
    "prune": PruneCommand,
    "plan": PlanCommand,
    "recover": RecoverCommand,
    "evaluate": EvaluateCommand,
    "compare": CompareCommand,
    "inspect": InspectCommand,
    "pack": PackCommand,
    "unpack": UnpackCommand,
    "bench": BenchCommand,
}

BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A block of code on a page, and the HTML comment on the line before it."""

    page: Path
    line: int
    language: str
    text: str
    comment: str


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, m.start("text")) + 1, m["language"], m["text"], m["comment"] or "")
        for m in BLOCK.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def name_of(value: object) -> str | None:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else None


def load(path: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands() -> list[list[str]]:
    """The words of all command lines on all pages."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documentation speaks of; the Hub's datasets are replaced by a short one."""
    import datasets

    save_tiny(tmp_path / MODEL)
    text = write_text(tmp_path / "my-text.txt").read_text(encoding="utf-8")

    def load_dataset(path: str, streaming: bool = False, **options: object):
        rows = datasets.Dataset.from_list([{"text": text}] * 4)
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(page: Path) -> dict[str, object]:
    """Run the Python code of a page from top to bottom, and return the variables it leaves."""
    names: dict[str, object] = {"__name__": "documentation"}
    for block in blocks(page, "python"):
        if not block.comment.startswith("not run: "):
            # The line numbers of an error are those of the page.
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
    return names


def test_readme_runs(workplace: Path):
    names = run_blocks(ROOT / "README.md")
    assert names["pruner"].report.sparsity == 0.5
    assert inspect("pruned")["metadata_is_true"]
    (example,) = (block for block in blocks(ROOT / "README.md", "json"))
    shown = json.loads("{" + example.text + "}")["sparsity_config"]
    assert set(shown) == set(json.loads(Path("pruned/config.json").read_text())["sparsity_config"])


def test_getting_started_runs(workplace: Path):
    names = run_blocks(ROOT / "docs" / "getting-started.md")
    assert inspect("pruned")["metadata_is_true"] and inspect("pruned-at-load")["metadata_is_true"]
    assert names["config"] == SparseConfig.from_json_file("config-2of4.json")


def test_architectures_runs():
    names = run_blocks(ROOT / "docs" / "architectures.md")
    assert "model.vision_tower.*" in names["pruner"].config.targets


def test_scale_runs(workplace: Path):
    names = run_blocks(ROOT / "docs" / "scale.md")
    assert names["pruner"].report.sparsity == 0.5
    assert (workplace / "progress" / "run.json").is_file() and (workplace / "pruned" / "config.json").is_file()


def test_evaluation_runs(workplace: Path):
    pruner = SparsePruner(method="magnitude")
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    pruner.prune(model)
    pruner.save(model, "pruned", AutoTokenizer.from_pretrained(MODEL))
    names = run_blocks(ROOT / "docs" / "evaluation.md")
    assert names["found"]["texts"][0]["ratio"] > 0 and names["report"].sparsity == 0.5
    assert Path("report.html").read_text() == names["report"].to_html()


def test_guides_run(workplace: Path):
    names = run_blocks(ROOT / "docs" / "guides" / "push.md")
    assert names["pruner"].report.evaluations[0]["texts"][0]["ratio"] > 0 and inspect("pruned")["metadata_is_true"]
    pack_folder(Path("pruned"), Path("packed"))
    names = run_blocks(ROOT / "docs" / "guides" / "serve.md")
    assert sum(layer.count for layer in names["report"].layers) == 2 * 7 + 1


def test_packing_runs(workplace: Path):
    names = run_blocks(ROOT / "docs" / "packing.md")
    assert names["model"].config.sparsity_config["achieved_sparsity"] == 0.5
    layers = names["model"].runtime_report.layers
    assert sum(layer.count for layer in layers if layer.choice == "sparse") == 2 * 7
    assert inspect("packed")["metadata_is_true"]


def test_sizes_of_packed_matrices():
    text = (ROOT / "docs" / "packing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+)[^|]*\| (0\.\d+) \| (0\.\d+) \|$", text, re.MULTILINE)
    assert {row[0] for row in rows} == {"50", "60", "70", "2:4", "4:8", "1:4"}
    for kind, *shares in rows:
        n, m = map(int, kind.split(":")) if ":" in kind else (100 - int(kind), 100)
        for dtype, share in zip((torch.bfloat16, torch.float32), shares, strict=True):
            weight = (torch.arange(m) < n).to(dtype).repeat(800, 800 // m)
            assert pack(weight, kind if ":" in kind else "bitmask").nbytes / weight.nbytes == pytest.approx(
                float(share), abs=5.1e-4
            )


def test_runtime_runs(workplace: Path):
    names = run_blocks(ROOT / "docs" / "runtime.md")
    assert sum(layer.count for layer in names["report"].layers) == 2 * 7 + 1
    page = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")
    assert f"From {ops.MOST_TOKENS + 1} tokens at once on, or {ops.MOST_TOKENS_AMX + 1} in bfloat16" in page
    assert f"a buffer of {ops.BUFFER_BYTES >> 20} MB" in page
    assert all(f"`{level}`" in page for level in ["portable", "avx2", "avx512", "avx512_bf16", "torch"])


def test_all_python_is_run_or_says_why_not():
    """Code that is neither on the pages above, nor in tests/recovery/test_page.py, nor a step of CONTRIBUTING.md."""
    run = {
        ROOT / "README.md",
        *(
            ROOT / "docs" / f"{name}.md"
            for name in (
                "getting-started",
                "architectures",
                "evaluation",
                "guides/push",
                "guides/serve",
                "packing",
                "recovery",
                "runtime",
                "scale",
            )
        ),
    }
    elsewhere = [block for page in PAGES if page not in run for block in blocks(page, "python")]
    assert all(block.comment.startswith("file: ") for block in elsewhere)
    assert {block.page.name for block in elsewhere} == {"CONTRIBUTING.md"}


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False)
    COMMANDS[command].parse_args(parser)
    return parser


def test_command_lines_are_valid():
    ours = [words for words in commands() if words[:2] == ["optimum-cli", "sparse"] and "[options]" not in words]
    assert {words[2] for words in ours} == set(COMMANDS)
    for _, _, command, *arguments in ours:
        args = parser_of(command).parse_args(arguments)
        if command == "prune":
            build_config(args)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {words[1] for words in commands() if words[0] == "make"}
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_options_of_scripts_exist():
    scripts = [words[1:] for words in commands() if words[0].endswith("python") and words[1].endswith(".py")]
    assert scripts
    for script, *arguments in scripts:
        sources = [ROOT / script, (ROOT / script).with_name("common.py")]
        code = "".join(source.read_text(encoding="utf-8") for source in sources if source.exists())
        assert all(f'"{word}"' in code for word in arguments if word.startswith("--")), script


def test_every_option_is_documented():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    options = {
        action.option_strings[0]: action.dest
        for command in COMMANDS
        for action in parser_of(command)._actions
        if action.option_strings and action.dest != "help"
    }
    for option, field in options.items():
        assert f"| `{field}` |" in reference or f"| `{option}" in page, option
    known = {name for command in COMMANDS for action in parser_of(command)._actions for name in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z-]+", page)) <= known


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_method_has_its_row(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert all(f"\n| `{name}`" in text for name in METHOD_NAMES)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("https://", "http://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_reference_is_up_to_date():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert load("docs/scripts/reference.py").render() == page, "run: python docs/scripts/reference.py"


def test_figures_are_small_and_shown():
    files = sorted((ROOT / "docs" / "figures").iterdir())
    # Those of concepts.md are drawn by a script from the package itself; others show measurements of benchmarks.md.
    pages = dict.fromkeys(load("docs/scripts/figures.py").FIGURES, "concepts.md") | {"quality": "benchmarks.md"}
    assert {file.stem for file in files} == set(pages)
    assert all(file.suffix == ".svg" and file.stat().st_size < 100_000 for file in files)
    for file in files:
        text = (ROOT / "docs" / pages[file.stem]).read_text(encoding="utf-8")
        assert f"](figures/{file.name})" in text


def test_figures_show_what_the_text_says():
    figures = load("docs/scripts/figures.py")
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")

    weight, statistics, pruned = figures.two_weights()
    errors = [figures.relative_error(weight, pruned[m], statistics) for m in ("magnitude", "wanda", "sparsegpt")]
    assert all(f": {100 * error:.0f} %" in text for error in errors)
    assert [int((pruned[m] == 0).nonzero()[0, 1]) for m in ("magnitude", "wanda", "sparsegpt")] == [1, 0, 0]

    unstructured, two_of_four = figures.layer_errors()
    for magnitude, wanda, sparsegpt in zip(
        *(unstructured[m] for m in ("magnitude", "wanda", "sparsegpt")), strict=True
    ):
        assert sparsegpt < wanda < magnitude
    half = figures.SPARSITIES.index(0.5)
    assert all(two_of_four[method] > errors[half] for method, errors in unstructured.items())

    stops = ["q\nk\nv", "o", "gate\nup", "down"] * 2
    assert figures.events(2) == [(lane, stop) for stop in stops for lane in (0, 1, None)]


def apply(block: Block, root: Path) -> None:
    """Do to a copy of the tree what a block of CONTRIBUTING.md shows: new code at the end of a file, or a change."""
    file = root / block.comment.removeprefix("file: ")
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if block.language == "python":
        file.write_text(f"{before}\n\n{block.text}", encoding="utf-8")
        return
    lines = block.text.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
    new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
    assert before.count(old) == 1, f"{block.page.name}, line {block.line}: this is not in {file.name}:\n{old}"
    file.write_text(before.replace(old, new), encoding="utf-8")


@pytest.mark.slow
def test_adding_a_method_works_as_contributing_says(tmp_path: Path):
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("optimum_sparse", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for block in blocks(ROOT / "CONTRIBUTING.md", "python", "diff"):
        apply(block, tmp_path)

    arguments = ["tests/methods/test_oracles.py", "-k", "obd or has_an_oracle", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 20

    code = "import sys, optimum_sparse as o; print(o.__file__, o.SparsePruner(method='obd').config.method)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.split() == [str(tmp_path / "optimum_sparse" / "__init__.py"), "obd"]


def test_prune_llama_runs(workplace: Path, capsys: pytest.CaptureFixture):
    options = ["--pattern", "2:4", "--dataset", "my-text.txt", "--num-samples", "4", "--seqlen", "32"]
    load("examples/prune_llama.py").main([MODEL, "pruned", *options, "--prompt", "Line 7"])
    printed = capsys.readouterr().out
    assert printed.count("Line 7") == 2
    assert "50.00% zeros in 14 matrices" in printed
    assert inspect("pruned")["metadata_is_true"]


def test_push_to_hub_runs(workplace: Path):
    options = ["--dataset", "my-text.txt", "--num-samples", "4", "--seqlen", "32"]
    command = [sys.executable, str(ROOT / "examples" / "push_to_hub.py"), MODEL, "tester/pruned", *options]
    with FakeHub() as hub:
        environment = hub.client_environment(workplace / "home")
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.repos["tester/pruned"])
    assert "50.00% zeros" in result.stdout
    assert "Its metadata tells the truth." in result.stdout
