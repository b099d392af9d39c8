"""The documentation as a site: it builds without a warning, and a reader's browser fetches nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([*BUILD, str(target)], cwd=source, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    result = build(ROOT, target)
    assert result.returncode == 0, result.stderr
    return target


def test_every_page_is_there(site: Path):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert len(pages) > 15 and all((site / page).is_file() for page in pages)
    assert not (site / "scripts").exists()


def test_nothing_is_fetched_from_elsewhere(site: Path):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|img|iframe)[^>]*src=\"(http[^\"]*)|<link[^>]*href=\"(http[^\"]*)", page.read_text()
        )
        assert fetched == [], page


@pytest.mark.parametrize("broken", ["[x](nowhere.md)", "[x](concepts.md#nowhere)"])
def test_a_broken_link_ends_the_build(tmp_path: Path, broken: str):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    page = tmp_path / "docs" / "limits.md"
    page.write_text(page.read_text() + broken)
    assert build(tmp_path, tmp_path / "site").returncode != 0
