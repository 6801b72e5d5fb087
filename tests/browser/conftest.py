"""A real browser, and servers for it to open."""

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


def pytest_collection_modifyitems(items):
    """All tests of this folder need the browser; in CI one that is not there is an error, elsewhere a listed skip."""
    missing = pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"),
        reason="no chromium on this machine (Debian: apt-get install chromium)",
    )
    for item in items:
        if "tests/browser" in item.path.as_posix():
            item.add_marker(pytest.mark.browser)
            item.add_marker(missing)


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def shots():
    """Where pictures of what the browser shows are kept."""
    folder = paths.build() / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
        wait_for(f"{url}/api?token=test", tmp_path / "log")
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


def wait_for(url, log):
    """Wait until something answers at `url`."""
    for _ in range(120):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no answer:\n{log.read_text()}")


# Moves the first slider of the explorer by keyboard, to and fro; milliseconds from each key to the new picture.
MOVES = """async (moves) => {
  const box = document.querySelector('.condcomp-explorer'), image = box.querySelector('img');
  const handle = box.querySelector('[role=slider]'), found = [];
  for (let i = 0; i < moves; i++) {
    const started = performance.now();
    const changed = new Promise((done, late) => {
      const observer = new MutationObserver(() => { observer.disconnect(); image.decode().then(done, done); });
      observer.observe(image, {attributes: true, attributeFilter: ['src']});
      setTimeout(() => late(new Error(`no new picture after move ${i}`)), 20000);
    });
    const key = i % 20 < 10 ? 'ArrowRight' : 'ArrowLeft';
    handle.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
    await changed;
    found.push(performance.now() - started);
  }
  return found;
}"""


@pytest.fixture
def follow(capsys):
    """Move the explorer's slider of a page, report how long its picture takes to follow, and look at what changes."""

    def moved(page, name):
        page.wait_for_function("() => document.querySelector('.condcomp-explorer img')?.complete", timeout=60_000)
        page.evaluate(MOVES, 3)  # the first ones find caches empty
        times = sorted(page.evaluate(MOVES, 50))
        with capsys.disabled():
            print(f"\n{name}: slider to new picture, 50 moves: median {times[25]:.0f} ms, worst {times[-1]:.0f} ms")
        numbers = "() => document.querySelector('.condcomp-explorer table').innerText"
        before = page.evaluate(numbers)
        handle = page.locator(".condcomp-explorer [role=slider]").first
        handle.focus()
        for _ in range(5):
            handle.press("ArrowRight")
        page.wait_for_function(f"before => ({numbers})() !== before", arg=before, timeout=20_000)
        assert "accuracy" in page.evaluate(numbers)
        # Loose, since machines differ and others may be at work on this one.
        assert times[25] < 1500
        assert times[-1] < 6000

    return moved
