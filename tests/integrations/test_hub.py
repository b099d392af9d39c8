"""Model card, upload and download, with the official client over real HTTP against a Hub in this process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from safetensors.torch import load

from optimum_sparse import SparsePruner
from optimum_sparse.integrations.hub import PLOT_FILE, model_card, save_card
from optimum_sparse.report import MatrixReport, SparsityReport

from ..checkpoints import save_tiny
from ..helpers import tiny_model
from ..report.reports import full_report
from .fake_hub import FakeHub

ROOT = Path(__file__).parents[2]

METADATA = {
    "method": "sparsegpt",
    "pattern": "2:4",
    "sparsity": 0.5,
    "achieved_sparsity": 0.5,
    "base_model": "some/base",
    "base_revision": "abc123",
    "dataset": "c4",
    "num_samples": 128,
    "seqlen": 2048,
    "seed": 7,
    "calibration_sha256": "00",
    "num_tokens": 262144,
    "versions": {"optimum_sparse": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "matrices": {
        "layers.{0-1}.up": {"zeros": 500, "numel": 1000, "pattern": "2:4"},
        "layers.0.down": {"zeros": 30, "numel": 60, "pattern": None},
    },
}


def card_of(metadata: dict, *arguments) -> tuple[dict, str]:
    """The YAML header and the text of a card."""
    _, header, text = str(model_card(metadata, *arguments)).split("---\n", 2)
    return yaml.safe_load(header), text


def report_of(errors: dict[str, float | None]) -> SparsityReport:
    entry = dict(
        block="0",
        shape=(2, 2),
        pattern="2:4",
        zeros=2,
        numel=4,
        num_tokens=8,
        layer_share=0.0,
        damping=None,
        residual=None,
    )
    entry["seconds"] = 0.1
    return SparsityReport(config={}, matrices=[MatrixReport(name=n, error=e, **entry) for n, e in errors.items()])


def test_header_of_the_card():
    header, _ = card_of(METADATA)
    assert header == {
        "base_model": "some/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["optimum-sparse", "sparse", "pruned", "sparsegpt", "2:4"],
    }
    header, _ = card_of({**METADATA, "pattern": None, "base_model": "my-folder", "base_revision": None})
    assert header["tags"] == ["optimum-sparse", "sparse", "pruned", "sparsegpt"]
    assert "base_model" not in header  # the Hub would look for a model of this name


def test_text_of_the_card():
    report = report_of({"layers.0.up": 0.01, "layers.1.up": 0.03, "layers.0.down": None})
    _, text = card_of(METADATA, report, "me/sparse-base")
    assert "# sparse-base\n" in text
    assert "50.00% of the weights of 3 matrices are zero**.\n" in text
    assert "| `layers.{0-1}.up` | 1,000 | 50.00% | 2:4 | 2.00% |" in text
    assert "| `layers.0.down` | 60 | 50.00% | unstructured |  |" in text
    assert 'AutoModelForCausalLM.from_pretrained("me/sparse-base", dtype="auto")' in text
    assert "run at the same\nspeed" in text
    for fact in ("`abc123`", "c4, 128 windows, 262144 tokens in all, seed 7", "torch 2.13.0", "[some/base]("):
        assert fact in text


def test_pattern_in_the_card():
    """The first sentence names the pattern if it holds everywhere."""
    matrices = {"layers.{0-1}.up": METADATA["matrices"]["layers.{0-1}.up"]}
    _, text = card_of({**METADATA, "matrices": matrices})
    assert "of 2 matrices are zero**, in the pattern 2:4 (N non-zero of every M consecutive inputs).\n" in text


def test_card_without_calibration():
    metadata = {**METADATA, "method": "magnitude", "pattern": None, "dataset": None, "num_samples": None}
    _, text = card_of(metadata, report_of({"layers.0.up": None}))
    assert "- calibration data: none" in text
    assert "squared change" not in text


def test_card_of_a_model_calibrated_without_tokens():
    _, text = card_of({**METADATA, "dataset": "DataLoader", "num_tokens": None, "seqlen": None})
    assert "- calibration data: DataLoader, 128 samples, seed 7\n" in text
    assert "None" not in text


def client(hub: FakeHub, home: Path, code: str, *arguments: str) -> str:
    """What a Python process prints whose Hub is `hub`."""
    environment = {**hub.client_environment(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
    assert result.returncode == 0, result.stderr
    return result.stdout


PUSH = """
import torch
from optimum_sparse import SparsePruner
from optimum_sparse.loading import load_model
from tests.checkpoints import write_text
from pathlib import Path

model, tokenizer = load_model("base/dense")
assert model.name_or_path == "base/dense"
text = write_text(Path("text.txt"))
pruner = SparsePruner(pattern="2:4", dataset=str(text), num_samples=4, seqlen=16, progress=False)
pruner.prune(model, tokenizer)
torch.save(model.state_dict(), "expected.pt")
print(pruner.push_to_hub(model, "me/sparse", tokenizer=tokenizer, private=True, commit_message="As pruned"))
"""

PULL = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from optimum_sparse import SparseConfig
from tests.commands.cli import sparse

model = AutoModelForCausalLM.from_pretrained("me/sparse")
expected = torch.load(sys.argv[1], weights_only=True)
assert model.state_dict().keys() == expected.keys()
assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
assert AutoTokenizer.from_pretrained("me/sparse")("x^2").input_ids == [92, 66, 22]
assert not hasattr(model.config, "quantization_config")
print(json.dumps(model.config.sparsity_config))

assert sparse("inspect", "me/sparse") == 0
assert sparse("inspect", "base/dense") == 1
assert sparse("inspect", "nobody/nothing") == 2
out = "again"
assert sparse("prune", "base/dense", out, "--method", "magnitude", "--push-to-hub", "again") == 0
assert sparse("prune", "nobody/nothing", out) == 2
pruned = AutoModelForCausalLM.from_pretrained("base/dense", quantization_config=SparseConfig(method="magnitude"))
assert pruned.config.sparsity_config["base_revision"] == sys.argv[2]
"""


def test_push_and_pull(tmp_path: Path):
    folder = tmp_path / "dense"
    save_tiny(folder)
    homes = [tmp_path / name for name in ("pusher", "puller")]
    for home in homes:
        home.mkdir()
    with FakeHub() as hub:
        hub.create("base/dense", {path.name: path.read_bytes() for path in folder.iterdir()})
        (revision,) = hub.commits["base/dense"]
        url = client(hub, homes[0], PUSH).strip()
        assert url == f"{hub.url}/me/sparse/commit/{hub.commits['me/sparse'][-1]}"
        assert hub.created["me/sparse"]["visibility"] == "private"
        assert len(hub.commits["me/sparse"]) == 2  # its creation, and all files in one commit
        files = hub.repos["me/sparse"]
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(
            files
        )

        lines = client(hub, homes[1], PULL, str(homes[0] / "expected.pt"), revision).splitlines()
        assert set(hub.repos["tester/again"]) >= {"README.md", "model.safetensors"}
        assert {authorization for _, path, authorization in hub.requests if path.startswith("/api")} == {
            "Bearer hf_fake"
        }

    metadata = json.loads(lines[0])
    assert metadata == json.loads(files["config.json"])["sparsity_config"]
    assert (metadata["base_model"], metadata["base_revision"]) == ("base/dense", revision)
    assert (metadata["method"], metadata["pattern"], metadata["achieved_sparsity"]) == ("admm", "2:4", 0.5)
    header = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert header["base_model"] == "base/dense"
    assert str(tmp_path) not in files["README.md"].decode() + files["config.json"].decode()


def test_hub_out_of_reach(tmp_path: Path):
    """Nothing listens at the address, as if the network were down."""
    code = "from tests.commands.cli import sparse; import sys; sys.exit(sparse('inspect', 'some/model'))"
    with FakeHub() as hub:
        environment = {**hub.client_environment(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert "the Hub cannot be reached" in result.stderr.splitlines()[-1]


def test_card_of_another_kind_of_model():
    """What it says to run is what loads the model."""
    card = str(model_card(METADATA, None, "me/t5", "T5ForConditionalGeneration"))
    assert "from transformers import T5ForConditionalGeneration, AutoProcessor" in card
    assert 'T5ForConditionalGeneration.from_pretrained("me/t5"' in card
    assert "text-generation" not in card and "AutoModelForCausalLM" not in card


def test_card_and_files_of_a_packed_model(monkeypatch: pytest.MonkeyPatch):
    seen = {}

    def push(folder: str, repo_id: str, **options: object) -> str:
        seen.update(
            {path.name: path.read_text() for path in Path(folder).iterdir() if path.suffix in (".json", ".md")}
        )
        return "url"

    monkeypatch.setattr("optimum_sparse.integrations.hub.push_folder", push)
    model, pruner = tiny_model(), SparsePruner(method="magnitude", progress=False)
    pruner.prune(model)
    assert pruner.push_to_hub(model, "me/sparse", compressed=True) == "url"
    assert json.loads(seen["config.json"])["quantization_config"]["quant_method"] == "optimum_sparse_packed"
    code = seen["README.md"].split("```python\n")[1].split("```")[0]
    assert code.startswith("import optimum_sparse ")
    assert "sparse unpack" in seen["README.md"] and "same disk space" not in seen["README.md"]


def test_card_with_all_that_was_measured():
    """The golden card: what people and the Hub read, to the letter."""
    card = model_card(METADATA, full_report(), "me/sparse-base")
    golden = Path(__file__).with_name("card.md")
    assert str(card) == golden.read_text(encoding="utf-8")


def test_results_are_read_by_the_hub_client():
    card = model_card(METADATA, full_report(), "me/sparse-base")
    data = ModelCard(str(card)).data  # parses the YAML, and its model-index strictly
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "sparse-base"
    found = [(result.dataset_type, result.metric_type, result.metric_value) for result in results]
    assert found == [("wikitext2", "perplexity", 12.5), ("piqa", "acc_norm", 0.61)]
    assert results[0].dataset_args == {"seqlen": 2048, "num_windows": 20}
    assert [result.unique_identifier for result in results] == [r.unique_identifier for r in data.eval_results]


def test_card_says_what_is_not_known():
    _, text = card_of(METADATA)
    assert "## Quality\n\nNot measured." in text and "was not measured; it always is some" in text
    assert "## Speed" not in text and PLOT_FILE not in text
    header, _ = card_of(METADATA, report_of({"layers.0.up": 0.01}))
    assert "model-index" not in header


@pytest.mark.parametrize("error", [0.25, None])
def test_plot_and_page_are_where_the_card_says(tmp_path: Path, error: float | None):
    report = report_of({"0.up": error, "0.down": error})
    save_card(model_card(METADATA, report), tmp_path, report)
    text = (tmp_path / "README.md").read_text()
    assert f"![{'Zeros' if error is None else 'Output error'} of each matrix" in text
    for file in re.findall(r"\]\(([\w.]+)\)", text):
        assert (tmp_path / file).is_file()
    picture = Image.open(tmp_path / PLOT_FILE)
    assert picture.format == "PNG" and picture.width > 800 and len(picture.convert("RGB").getcolors(2**20)) > 10


def test_the_usage_snippet_runs(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_tiny(tmp_path)
    code = str(model_card(METADATA, None, str(tmp_path))).split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert capsys.readouterr().out.startswith("The capital of France is")


PUSH_OFFLOADED = """
import warnings
import torch
from transformers import AutoModelForCausalLM
from optimum_sparse import SparsePruner

warnings.simplefilter("ignore")
batches = [{"input_ids": torch.arange(3, 27)[None]}]
model = AutoModelForCausalLM.from_pretrained("base/dense")
SparsePruner(progress=False).prune(model, dataset=batches)
model.save_pretrained("expected")
model = AutoModelForCausalLM.from_pretrained("base/dense", device_map={"": "disk"}, offload_folder="offload")
pruner = SparsePruner(progress=False)
pruner.prune(model, dataset=batches)
pruner.push_to_hub(model, "me/offloaded")
"""


def test_push_from_disk(tmp_path: Path):
    save_tiny(tmp_path / "dense")
    with FakeHub() as hub:
        hub.create("base/dense", {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()})
        client(hub, tmp_path, PUSH_OFFLOADED)
        pushed = load(hub.repos["me/offloaded"]["model.safetensors"])
    expected = load((tmp_path / "expected" / "model.safetensors").read_bytes())
    assert pushed.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pushed.items())
