"""`vispruner web` in a headless browser: upload, slider, question, invalid file."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
scenes = pytest.importorskip("vispruner.embedded.scenes")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vispruner.cli", "web", *arguments]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("web") / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command("--port", str(port), "--max-upload", "1"), stdout=output, stderr=output
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(240):
                try:
                    urllib.request.urlopen(url, timeout=1).close()
                    break
                except OSError:
                    assert server.poll() is None, log.read_text()
                    time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(address: str, browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(120_000)
    page.other_hosts = []
    page.on("request", lambda r: r.url.startswith("http") and page.other_hosts.append(r.url))
    page.goto(address)
    page.wait_for_selector("#counts:has-text('22 of 196 visual tokens are retained')")
    yield page
    assert all(url.startswith(address) for url in page.other_hosts), (
        "the page sends requests to other hosts"
    )
    page.close()


def drawing(page: Any) -> str:
    """Address of the drawing of the retained tokens."""
    return str(page.get_attribute("#kept img", "src"))


def test_the_slider_updates_the_drawing(page: Any) -> None:
    before = drawing(page)
    box = page.locator("#k input[type=range]").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_function(
        r"/^(?!22 )\d+ of 196/.test(document.querySelector('#counts').innerText)"
    )
    count = int(re.match(r"(\d+) of 196", page.inner_text("#counts"))[1])
    assert 80 < count < 120
    page.wait_for_function("src => document.querySelector('#kept img').src != src", arg=before)


def test_another_method(page: Any) -> None:
    before = drawing(page)
    page.get_by_label("tokens that the deduplication drops per round").first.wait_for()
    page.get_by_label("method").click()
    page.get_by_role("option", name="mmr").click()
    page.wait_for_function("src => document.querySelector('#kept img').src != src", arg=before)
    page.get_by_label("weight of the similarity to retained tokens").first.wait_for()
    page.get_by_label("tokens that the deduplication drops per round").first.wait_for(
        state="hidden"
    )
    page.click("#ask")
    page.wait_for_selector("#answers:has-text('unpruned')")
    cells = page.inner_text("#answers").split()
    assert cells[cells.index("pruned") + 2] == "22"


def test_both_models_answer(page: Any) -> None:
    page.click("#ask")
    page.wait_for_selector("#answers:has-text('unpruned')")
    cells = page.inner_text("#answers").split()
    assert cells[cells.index("unpruned") + 2] == "196"
    assert cells[cells.index("pruned") + 2] == "22"


def test_an_uploaded_image(page: Any, tmp_path: Path) -> None:
    scenes.draw(3).image.save(tmp_path / "scene.png")
    before = drawing(page)
    page.set_input_files("#picture input[type=file]", tmp_path / "scene.png")
    page.wait_for_function("src => document.querySelector('#kept img').src != src", arg=before)
    assert "22 of 196" in page.inner_text("#counts")


@pytest.mark.parametrize(
    ("name", "content"), [("broken.png", b"\x89PNG\r\n\x1a\nno"), ("large.png", b"\0" * (2 << 20))]
)
def test_an_invalid_file_is_refused(page: Any, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    page.set_input_files("#picture input[type=file]", tmp_path / name)
    page.wait_for_selector("[data-testid=toast-body]")
    assert "Traceback" not in page.inner_text("body")
    page.reload()  # the server still works
    page.wait_for_selector("#counts:has-text('22 of 196 visual tokens are retained')")


def test_port_in_use(address: str) -> None:
    port = address.rpartition(":")[2]
    done = subprocess.run(command("--port", port), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"vispruner web: argument --port: cannot listen on 127.0.0.1:{port}" in done.stderr
