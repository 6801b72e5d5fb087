"""JupyterLab in a real browser: the start page opens, runs from top to bottom, and shows its figures."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from condcomp_lib import paths

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(cell => cell.innerText)"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"),  # in CI a browser that is not there is an error
        reason="no chromium on this machine (Debian: apt-get install chromium)",
    ),
]


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of the notebooks: running them must not touch the committed references."""
    work = tmp_path / "notebooks"
    shutil.copytree(paths.notebooks(), work)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "JUPYTERLAB_SETTINGS_DIR": str(_settings(tmp_path / "settings")),
    }
    options = ["--no-browser", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=test", "--allow-root"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options, f"--notebook-dir={work}"],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{url}/api?token=test", tmp_path / "log")
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def _settings(folder):
    """All cells in the page, also those out of sight, and no question about news."""
    for plugin, settings in (
        ("notebook-extension/tracker", {"windowingMode": "none"}),
        ("apputils-extension/notification", {"fetchNews": "false"}),
    ):
        path = folder / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    return folder


def _wait_for(url, log):
    for _ in range(120):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not answer:\n{log.read_text()}")


def test_the_start_page_runs_in_jupyterlab(lab):
    from playwright.sync_api import sync_playwright

    shots = paths.build() / "screenshots"
    shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.goto(f"{lab}/lab/tree/00_start_here.ipynb?token=test")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        page.wait_for_selector("text=| Idle", timeout=60_000)
        page.screenshot(path=shots / "start-page.png")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Restart Kernel and Run All Cells…").click()
        page.get_by_role("button", name="Confirm Kernel Restart").click()
        # While a cell waits or runs, its prompt is [*]; afterwards all are numbered from 1.
        page.wait_for_function(f"() => {PROMPTS}.some(text => text.includes('*'))", timeout=60_000)
        page.wait_for_function(f"() => {PROMPTS}.every((text, i) => text.includes(`[${{i + 1}}]`))", timeout=120_000)
        page.wait_for_selector("text=| Idle", timeout=60_000)
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        assert page.locator(".jp-RenderedImage img").count() >= 3
        page.locator(".jp-RenderedImage img").nth(1).scroll_into_view_if_needed()
        page.screenshot(path=shots / "start-page-figures.png")
        browser.close()
