"""JupyterLab in a real browser: the start page opens, runs from top to bottom, shows its figures, and is moved."""

import time

PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(cell => cell.innerText)"
ERRORS = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], .jp-RenderedText[data-mime-type$='.error']"


def test_the_start_page_runs_in_jupyterlab(lab, browser, shots, follow, capsys):
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    opened = time.perf_counter()
    page.goto(f"{lab}/lab/tree/00_start_here.ipynb?token=test")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_selector("text=| Idle", timeout=60_000)
    page.screenshot(path=shots / "start-page.png")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells…").click()
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    page.wait_for_selector(".condcomp-explorer img", timeout=60_000)
    with capsys.disabled():
        print(f"\nJupyterLab: first explorer {time.perf_counter() - opened:.1f} s after opening the notebook")
    # While a cell waits or runs, its prompt is [*]; afterwards all are numbered from 1.
    page.wait_for_function(f"() => {PROMPTS}.every((text, i) => text.includes(`[${{i + 1}}]`))", timeout=120_000)
    page.wait_for_selector("text=| Idle", timeout=60_000)
    assert page.locator(ERRORS).count() == 0
    assert page.locator(".jp-RenderedImage img").count() >= 3
    page.locator(".condcomp-explorer").first.scroll_into_view_if_needed()
    follow(page, "JupyterLab")
    page.screenshot(path=shots / "start-page-explorer.png")
    assert page.locator(ERRORS).count() == 0
    page.locator(".jp-RenderedImage img").nth(1).scroll_into_view_if_needed()
    page.screenshot(path=shots / "start-page-figures.png")
