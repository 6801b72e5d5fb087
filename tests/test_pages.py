"""The site of plain pages and the explorer's server, without a browser."""

import re
import socket
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup

from condcomp_lib import pages, paths, reproduce
from condcomp_lib.errors import CondcompError, UsageError


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return {path.name: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
            for path in pages.write_site(tmp_path_factory.mktemp("site"))}  # fmt: skip


def test_every_internal_link_resolves_and_nothing_is_fetched_from_elsewhere(site):
    assert set(site) == {"index.html", *(f"{name}.html" for name in reproduce.names())}
    for soup in site.values():
        assert not soup.find_all("script")
        for link in soup.find_all("a", href=True):
            page, _, anchor = link["href"].partition("#")
            assert not page or page in site
            assert not anchor or soup.find(id=unquote(anchor)), anchor
        for tag, attribute in (("img", "src"), ("link", "href"), ("iframe", "src")):
            assert all(found[attribute].startswith("data:") for found in soup.find_all(tag))


def test_formulas_become_mathml_and_no_tex_is_left(site):
    formulas = 0
    for soup in site.values():
        formulas += len(soup.find_all("math"))
        for quoted in soup.find_all(["pre", "code", "annotation"]):
            quoted.extract()
        left = re.findall(r"\\[a-zA-Z]+|\$[^$]+\$", soup.get_text())
        assert left == []
    assert formulas > 100


def test_every_explorer_is_there_as_a_picture(site):
    for name in ("00_start_here", "01_partitioning", "02_policies", "04_coactivation", "05_block_speedups"):
        notebook = nbformat.read(paths.notebooks() / f"{name}.ipynb", as_version=4)
        shown = [cell for cell in notebook.cells if ".explore(" in cell.source]
        assert shown
        for cell in shown:
            assert ["image/png" in output.get("data", {}) for output in cell.outputs] == [True]
            assert not any("widget" in kind for output in cell.outputs for kind in output.data)


def test_a_notebook_without_its_executed_reference_is_named(tmp_path):
    (tmp_path / "00_first.py").write_text('# %% tags=["parameters"]\nprofile: str = "paper"\n', encoding="utf-8")
    with pytest.raises(CondcompError, match="00_first has no executed reference"):
        pages.write_site(tmp_path / "site", tmp_path)
    assert not (tmp_path / "site").exists()


def test_a_port_in_use_is_passed_over_and_a_number_that_is_none_rejected():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if port < 65535:
            assert pages.free_port(port) > port
    for wrong in (0, -1, 65536):
        with pytest.raises(UsageError, match="a port is a number from 1 to 65535"):
            pages.free_port(wrong)
