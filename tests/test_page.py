"""Executed notebooks as one page: its text, and how a browser shows it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from processes import BIN, ROOT

from neon import NeonError
from report.page import NOTEBOOKS, found, page

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
TABLE = "| a |  |\n| --- | --- |\n| 4.25 | x |\n"


@pytest.fixture
def notebook(tmp_path):
    outputs = [
        new_output("display_data", {"image/png": PNG}, metadata={"image/png": {"alt": 'FID "falls" to 4'}}),
        new_output("display_data", {"text/markdown": TABLE}),
        new_output("stream", name="stdout", text="a < b"),
        new_output("stream", name="stderr", text="a warning"),
        new_output("error", ename="ValueError", evalue="<oops>", traceback=[]),
    ]
    text = """# A & B

## More

With $w_*^2 < 1$, [a file](../x.py), [a site](https://e.org), [curves](w_curves.ipynb) and

$$\\theta_r$$"""
    nbformat.write(
        new_notebook(cells=[new_markdown_cell(text), new_code_cell("1 < 2", outputs=outputs)]), tmp_path / "one.ipynb"
    )
    return tmp_path / "one.ipynb"


def test_a_page_holds_text_formulas_figures_and_tables(notebook):
    html = page([notebook], "T & t")
    assert "<title>T &amp; t</title>" in html and html.count("A &amp; B") == 2
    assert html.count("<math") == 2 and "$" not in html
    assert html.count("data:image/png") == 1 and html.count("data:image/jpeg") == 1
    assert "4.25" in html and "a &lt; b" in html and "ValueError: &lt;oops&gt;" in html
    assert "a warning" not in html and "../x.py" not in html and 'href="https://e.org"' in html
    assert '<a href="#w_curves">curves</a>' in html


def test_a_page_is_for_phones_and_for_readers_who_do_not_see_it(notebook):
    html = page([notebook], "T")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert re.findall(r"<h[1-6]>.*?</h[1-6]>", html) == ["<h1>T</h1>", "<h2>A &amp; B</h2>", "<h3>More</h3>"]
    assert re.findall(r'<img alt="(.*?)"', html) == ["", "FID &quot;falls&quot; to 4"]  # the first's link has a text
    assert html.count("<main>") == 1 and "<th></th>" not in html and html.count("<th>") == 1


def test_a_page_needs_nothing_else():
    html = page(sorted((ROOT / "results/mini").glob("*.ipynb")), "mini")
    assert not re.findall(r"""src=["'](?!data:)|href=["'](?!https?:|#)""", html) and "<script" not in html

    open_tags = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("img", "br", "meta", "hr"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Balanced().feed(html)
    assert open_tags == []


def test_every_notebook_has_its_place_and_a_folder_has_those_that_are_there(notebook):
    assert set(NOTEBOOKS) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    for name in ("quickstart", "ablations"):
        shutil.copy(notebook, notebook.with_stem(name))
    assert [path.stem for path in found(notebook.parent)] == ["ablations", "quickstart"] and found(notebook) == [
        notebook
    ]
    (notebook.parent / "none").mkdir()
    with pytest.raises(NeonError, match="no executed notebook"):
        found(notebook.parent / "none")


def test_a_file_that_is_not_a_notebook(tmp_path, notebook):
    (tmp_path / "bad.ipynb").write_text("{")
    command = ["-m", "report.page", notebook, tmp_path / "bad.ipynb", "--out", tmp_path / "index.html"]
    done = subprocess.run([BIN / "python", *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "bad.ipynb: not a notebook" in done.stderr
    assert not (tmp_path / "index.html").exists()


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    browser = pytest.importorskip("browser")
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium")
    with browser.tab(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The page of the committed results, and of a table and a line of code that are wider than any window."""
    folder = tmp_path_factory.mktemp("page")
    wide = new_output("display_data", {"text/markdown": TABLE.replace("4.25", "4.25" * 500)})
    cells = [new_markdown_cell("# Wide"), new_code_cell("1 + " * 500, outputs=[wide])]
    nbformat.write(new_notebook(cells=cells), folder / "wide.ipynb")
    notebooks = [*found(ROOT / "results/mini"), folder / "wide.ipynb"]
    (folder / "index.html").write_text(page(notebooks, "Neon on handwritten digits"))
    return folder / "index.html"


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_barriers(tab, committed, width):
    """axe-core finds nothing, letters keep their size and nothing but wide tables and code scrolls sideways."""
    axe = pytest.importorskip("axe_core_python")
    tab.open(committed, width)
    assert tab.value("innerWidth") == width and tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value("getComputedStyle(document.querySelector('p')).fontSize") == "16px"
    tab.value((Path(axe.__file__).parent / "axe.min.js").read_text() + ";0")
    wrong = tab.value("axe.run().then(r => r.violations.map(v => v.help + ': ' + v.nodes[0].html.slice(0, 200)))")
    assert wrong == []


def test_a_notebook_without_ids_is_no_warning(tmp_path, recwarn):
    cell = '{"cell_type": "markdown", "metadata": {}, "source": "text"}'
    (tmp_path / "a.ipynb").write_text(f'{{"cells": [{cell}], "metadata": {{}}, "nbformat": 4, "nbformat_minor": 5}}')
    assert "<p>text</p>" in page([tmp_path / "a.ipynb"], "title")
    assert not recwarn.list
