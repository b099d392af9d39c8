"""The demo of examples/app.py in a real browser, on a tiny model, through one prune and a mistake."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import chromium, needs_chromium
from tests.checkpoints import save_tiny

APP = Path(__file__).parents[1] / "examples" / "app.py"
pytestmark = needs_chromium


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where the demo is served."""
    save_tiny(tmp_path / "model", max_position_embeddings=1024)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(APP), "--model", str(tmp_path / "model"), "--port", str(port)]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            for _ in range(600):
                assert server.poll() is None, (tmp_path / "log").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()


def test_one_prune_and_a_mistake(address: str):
    with chromium() as browser:
        page = browser.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.get_by_label("2:4").check()
        page.get_by_label("Text to continue").fill("The square of 4 is")
        page.get_by_role("button", name="Prune").click()
        frame = page.frame_locator("iframe[title=Report]")
        frame.locator("h1").wait_for(timeout=120_000)
        figures = page.get_by_role("table").first.inner_text()
        assert "50.00%" in figures and "perplexity" in figures
        assert page.get_by_label("The dense model continues").input_value()
        assert "2:4" in frame.locator(".lead").inner_text()
        assert frame.locator("svg").count() >= 4 and frame.locator("canvas").is_visible()
        assert "Quality was not measured" not in frame.locator("#summary").inner_text()
        assert "The square of 4 is" in frame.locator("#samples").inner_text()

        page.get_by_label("Text to continue").fill(" ")
        page.get_by_role("button", name="Prune").click()
        page.get_by_text("The prompt is empty").first.wait_for(timeout=30_000)
        assert wrong == []
