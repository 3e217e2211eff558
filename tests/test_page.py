"""Executed notebooks as one page."""

import re
import subprocess
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from processes import BIN, ROOT

from report.page import page

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


@pytest.fixture
def notebook(tmp_path):
    outputs = [
        new_output("display_data", {"image/png": PNG}),
        new_output("execute_result", {"text/html": "<style>x</style><table><tr><td>4.25</td></tr></table>"}),
        new_output("stream", name="stdout", text="a < b"),
        new_output("stream", name="stderr", text="a warning"),
        new_output("error", ename="ValueError", evalue="<oops>", traceback=[]),
    ]
    cells = [
        new_markdown_cell(
            "# A & B\n\nWith $w_*^2 < 1$, [a file](../x.py), [a site](https://e.org) and\n\n$$\\theta_r$$"
        ),
        new_code_cell("1 < 2", outputs=outputs),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "one.ipynb")
    return tmp_path / "one.ipynb"


def test_a_page_holds_text_formulas_figures_and_tables(notebook):
    html = page([notebook], "T & t")
    assert "<title>T &amp; t</title>" in html and html.count("A &amp; B") == 2
    assert html.count("<math") == 2 and "$" not in html
    assert html.count("data:image/png") == 1 and html.count("data:image/jpeg") == 1
    assert "4.25" in html and "a &lt; b" in html and "ValueError: &lt;oops&gt;" in html
    assert "a warning" not in html and "../x.py" not in html and 'href="https://e.org"' in html


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


def test_a_file_that_is_not_a_notebook(tmp_path, notebook):
    (tmp_path / "bad.ipynb").write_text("{")
    command = ["-m", "report.page", notebook, tmp_path / "bad.ipynb", "--out", tmp_path / "index.html"]
    done = subprocess.run([BIN / "python", *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "bad.ipynb: not a notebook" in done.stderr
    assert not (tmp_path / "index.html").exists()
