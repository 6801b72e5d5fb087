"""The companion outside JupyterLab: the sparsity explorer alone, and the executed notebooks as plain pages."""

import html
import os
import secrets
import socket
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from condcomp_lib import paths, reproduce, studies
from condcomp_lib.errors import CondcompError, UsageError
from condcomp_lib.files import write_atomically

TEMPLATE = "condcomp"
# Voilà's own page without the two style sheets that it fetches from elsewhere: offline they hold the page up.
PAGE = """{% extends 'voila/templates/lab/index.html.j2' %}
{%- block notebook_css -%}
{{ super() | replace('rel="stylesheet" href="https://', 'rel="alternate" data-left-out="') }}
{%- endblock notebook_css -%}
"""
EXPLORER = """import torch
from condcomp_lib.widgets import sparsity
torch.set_num_threads(1)
sparsity.explore()"""
TITLE = """# How much of a network does an input need?

Move a slider. The networks were trained before; what is timed is timed on this machine."""
EDITORS = "jupyterlab-jupytext"  # an extension of JupyterLab that this page cannot load, and does not need
PORTS = 50  # tried from the first one on


def free_port(first: int) -> int:
    """The first port from `first` on that nothing listens at on this machine.

    Raises UsageError for a number that is no port, CondcompError where PORTS in a row are taken.
    """
    if not 1 <= first <= 65535:
        raise UsageError(f"a port is a number from 1 to 65535, not {first}")
    last = min(first + PORTS, 65536) - 1
    for port in range(first, last + 1):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                reason = error.strerror
                continue
            return port
    raise CondcompError(f"no port from {first} to {last} can be had ({reason}); give another one by --port")


def explore(port: int = 8866, browser: bool = True) -> None:
    """Serve the sparsity explorer at 127.0.0.1, for whoever knows the token that is printed, until interrupted."""
    from voila.app import Voila

    port, token = free_port(port), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="condcomp-explore-") as name:
        folder = Path(name)
        template = folder / "voila" / "templates" / TEMPLATE
        template.mkdir(parents=True)
        (template / "conf.json").write_text('{"base_template": "lab"}', encoding="utf-8")
        (template / "index.html.j2").write_text(PAGE, encoding="utf-8")
        cells = [nbformat.v4.new_markdown_cell(TITLE), nbformat.v4.new_code_cell(EXPLORER)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "explore.ipynb")
        before = os.environ.get("JUPYTER_PATH")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (str(folder), before)))
        print(f"http://127.0.0.1:{port}/?token={token} (Ctrl-C ends it)", flush=True)
        options = [
            f"--port={port}", "--Voila.ip=127.0.0.1", f"--Voila.token={token}", f"--template={TEMPLATE}",
            f"--Voila.open_browser={browser}", "--Voila.port_retries=0", "--Voila.log_level=ERROR",
            f"--VoilaConfiguration.extension_denylist={EDITORS}", "--KernelManager.transport_encryption=auto",
        ]  # fmt: skip
        Voila.launch_instance([str(folder / "explore.ipynb"), *options])


STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --quiet: #57606a; --line: #d8dee4; --link: #0060a8; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem 1.1rem 4rem; color: var(--ink); background: #fff;
       font: 1rem/1.6 system-ui, sans-serif; overflow-wrap: break-word; }
a { color: var(--link); }
h1 { line-height: 1.25; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
a.anchor-link { display: none; }
nav { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; font-size: .92rem; padding: .5rem 0; }
img { max-width: 100%; height: auto; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .86rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
pre { overflow-x: auto; background: #f6f8fa; border-radius: 6px; padding: .7rem .8rem; font-size: .82rem;
      line-height: 1.45; }
.output_area pre { background: none; border-left: 3px solid var(--line); border-radius: 0; }
code { font-size: .9em; } blockquote { margin-left: 0; padding-left: 1rem; border-left: 3px solid var(--line);
       color: var(--quiet); }
math[display=block] { display: block math; overflow-x: auto; padding: .4rem 0; }
.prompt, .input_prompt, .output_prompt { display: none; }
ol.contents > li { margin-bottom: .9rem; }
@media (max-width: 40rem) { .output_png { overflow-x: auto; } .output_png img { max-width: none; width: 38rem; } }
@media print { nav { display: none; } pre, table { overflow: visible; white-space: pre-wrap; }
               body { max-width: none; font-size: 10pt; } h2, img, tr { break-inside: avoid; } }
"""


class Pages(HTMLExporter):
    """Notebooks as plain HTML: formulas as MathML, which browsers show by themselves; nothing is fetched."""

    def markdown2html(self, context: Any, source: str) -> str:  # noqa: ARG002 (called by the template)
        """Markdown with formulas to HTML."""
        renderer = _Formulas(escape=False, anchor_link_text="")
        return MarkdownWithMath(renderer=renderer).render(source)


Pages.markdown2html.__dict__.update(HTMLExporter.markdown2html.__dict__)  # what makes it a filter with a context


class _Formulas(IPythonRenderer):
    def block_math(self, body: str) -> str:
        return _mathml(body, "block")

    def multiline_math(self, text: str) -> str:
        return _mathml(text, "block")

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")


def _mathml(formula: str, display: str) -> str:
    """A formula in TeX as MathML."""
    known = formula.strip().replace(r"\arg", r"\operatorname{arg}")  # which the converter does not know
    found: str = convert(known, display=display)
    return found


def described(body: str) -> str:
    """A page's pictures named after the heading that they stand under, for whoever cannot see them."""
    soup, heading = BeautifulSoup(body, "html.parser"), ""
    for tag in soup.find_all(["h1", "h2", "h3", "img"]):
        if tag.name == "img":
            tag["alt"] = f"Figure of the section: {heading}"
        else:
            heading = tag.get_text().strip()
    return str(soup)


def title_of(notebook: nbformat.NotebookNode) -> tuple[str, str]:
    """A notebook's first heading, and the first paragraph below it."""
    lines = notebook.cells[0].source.split("\n")
    heading = lines[0].removeprefix("# ").strip()
    text = "\n".join(lines[1:]).strip().split("\n\n")[0]
    return heading, text


def write_site(output: Path | None = None, folder: Path | None = None) -> list[Path]:
    """Write the executed notebooks (the references beside their texts in `folder`) as pages, with an index; returns the
    written files.

    Raises CondcompError where a notebook has no executed reference.
    """
    output, folder = output or paths.build() / "site", folder or paths.notebooks()
    names, notebooks = reproduce.names(folder), {}
    for name in names:
        if not (folder / f"{name}.ipynb").is_file():
            raise CondcompError(f"{name} has no executed reference; write it with: condcomp reproduce --profile paper "
                                "--reference")  # fmt: skip
        notebooks[name] = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    exporter = Pages(template_name="basic", config=Config({"HTMLExporter": {"embed_images": True}}))
    written = []
    for index, name in enumerate(names):
        body = described(exporter.from_notebook_node(notebooks[name])[0])
        links = [("index.html", "Contents")]
        links += [(f"{other}.html", f"previous: {other}") for other in names[max(index - 1, 0) : index]]
        links += [(f"{other}.html", f"next: {other}") for other in names[index + 1 : index + 2]]
        written.append(_write(output / f"{name}.html", title_of(notebooks[name])[0], _nav(links) + body + _nav(links)))
    return [_write(output / "index.html", "condcomp", _index(notebooks)), *written]


def _index(notebooks: dict[str, nbformat.NotebookNode]) -> str:
    rows = []
    for name, notebook in notebooks.items():
        heading, text = title_of(notebook)
        told = MarkdownWithMath(renderer=_Formulas(escape=False, anchor_link_text="")).render(text)
        rows.append(f'<li><a href="{name}.html">{html.escape(heading)}</a>{told}</li>')
    about = "The reproducible companion to the conditional-computation papers (Bengio, Bacon, Pineau, Precup 2015; "
    about += "Antaki and Bengio): every notebook as it was last executed, its numbers from the stored runs."
    live = "Sliders need a kernel: <code>make lab</code> in a checkout opens the notebooks, "
    live += "<code>condcomp explore</code> the first explorer."
    return (
        f"<h1>condcomp</h1><p>{about}</p><p>{html.escape(studies.progress())} {live}</p>"
        f"<ol class='contents' start='0'>{''.join(rows)}</ol>"
    )


def _nav(links: list[tuple[str, str]]) -> str:
    return "<nav>" + "".join(f'<a href="{to}">{html.escape(text)}</a>' for to, text in links) + "</nav>"


def _write(path: Path, title: str, body: str) -> Path:
    code = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{code}{STYLE}</style></head><body>{body}</body></html>"
    )
    write_atomically(path, page.encode())
    return path
