"""The explorer alone and the site of plain pages, in a real browser."""

import re
import subprocess
import sys
import time

import pytest

from condcomp_lib import pages, reproduce


@pytest.fixture
def alone(tmp_path):
    """`condcomp explore`, and the address that it prints."""
    command = [sys.executable, "-c", "from condcomp_lib.cli import main; main()", "explore", "--no-browser"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield server.stdout.readline().split()[0]
    finally:
        server.terminate()  # a job in the background would not hear an interrupt
        try:
            server.wait(timeout=30)
        finally:
            server.kill()
            server.stdout.close()


def _opened(page, url):
    """Open a page whose server may still be starting."""
    for _ in range(60):
        try:
            return page.goto(url)
        except Exception as error:
            if "ERR_CONNECTION_REFUSED" not in str(error):
                raise
            time.sleep(0.5)
    pytest.fail(f"no answer at {url}")


def test_the_explorer_stands_alone(alone, browser, shots, follow, capsys):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[0-9a-f]{32}", alone)
    page = browser.new_page(viewport={"width": 1100, "height": 950})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    started = time.perf_counter()
    assert _opened(page, alone).ok
    page.wait_for_selector(".condcomp-explorer img", timeout=60_000)
    with capsys.disabled():
        print(f"\ncondcomp explore: visible {time.perf_counter() - started:.1f} s after its address is printed")
    follow(page, "condcomp explore")
    page.wait_for_function("() => document.querySelector('.condcomp-explorer').innerText.includes('times as fast as')",
                           timeout=120_000)  # fmt: skip
    page.screenshot(path=shots / "explorer.png")
    here = alone.split("?")[0]
    assert [url for url in asked if not url.startswith((here, here.replace("http", "ws"), "data:", "blob:"))] == []
    # Whoever does not know the token sees nothing.
    stranger = browser.new_context().new_page()
    stranger.goto(here)
    assert stranger.locator(".condcomp-explorer").count() == 0
    assert "login" in stranger.url


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_the_site_needs_nothing_else_and_fits(browser, tmp_path, shots, width, height):
    written = pages.write_site(tmp_path)
    assert [path.stem for path in written] == ["index", *reproduce.names()]
    page, asked, said = browser.new_page(viewport={"width": width, "height": height}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    for path in written:
        page.goto(path.as_uri())
        broken = "() => [...document.images].filter(image => !image.complete || !image.naturalWidth).length"
        assert page.evaluate(broken) == 0
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, path.stem
    page.screenshot(path=shots / f"site-{width}.png")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.goto(written[0].as_uri())
    page.get_by_role("link", name="Start here").click()
    assert page.url.endswith("00_start_here.html")
    page.get_by_role("link", name="next: 01_partitioning").first.click()
    assert page.title().startswith("Partitioning") or "01" in page.url
