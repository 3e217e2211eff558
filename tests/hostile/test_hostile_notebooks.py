"""Notebooks from anyone: what stands in the page is text, tables, formulas and figures, and nothing runs or loads."""

import hashlib
import json
import re
from base64 import b64encode
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_page import PNG, tab  # noqa: F401, a fixture

from neon import NeonError
from report.page import page

RUN = "document.title='run'"
MARKDOWN = {
    "script": f"<script>{RUN}</script>",
    "script in two": f"<scr<script>ipt>{RUN}</script>",
    "handler": f'<p onclick="{RUN}" onmouseover={RUN}>x</p>',
    "handler of an image": f'<img src=x onerror="{RUN}">',
    "handler after a slash": f"<svg/onload={RUN}>",
    "toggle": f"<details open ontoggle={RUN}>x</details>",
    "frame": '<iframe src="https://evil.example"></iframe>',
    "frame with its page": f'<iframe srcdoc="<script>{RUN}</script>"></iframe>',
    "object": '<object data="https://evil.example/x.swf"></object><embed src="https://evil.example/x">',
    "link of script": f"[x](javascript:{RUN})",
    "link of script, raw": f'<a href="JaVa&#x09;Script:{RUN}">x</a>',
    "link of data": f'<a href="data:text/html,<script>{RUN}</script>">x</a>',
    "link of vbscript": '<a href="vbscript:msgbox(1)">x</a>',
    "remote image": "![x](https://evil.example/pixel.png)",
    "remote image, raw": '<img srcset="https://evil.example/pixel.png 2x">',
    "remote video": '<video poster="https://evil.example/p.png" src="https://evil.example/v"></video>',
    "svg": f'<svg><script>{RUN}</script><a xlink:href="javascript:{RUN}"><text>x</text></a></svg>',
    "foreign object": f"<svg><foreignObject><body onload={RUN}></foreignObject></svg>",
    "svg animation": f'<svg><a><animate attributeName=href values="javascript:{RUN}" /></a></svg>',
    "style": "<style>@import url(https://evil.example/x.css);</style>",
    "style of an element": '<p style="background:url(https://evil.example/x)">x</p>',
    "style sheet": '<link rel="stylesheet" href="https://evil.example/x.css">',
    "refresh": '<meta http-equiv="refresh" content="0;url=https://evil.example">',
    "base": '<base href="https://evil.example/">',
    "form": '<form action="https://evil.example"><input name=x><button formaction="javascript:1">x</button></form>',
    "mathml": f'<math href="javascript:{RUN}"><mtext><table><mglyph><style><!--</style>'
    f'<img title="--&gt;&lt;img src=1 onerror={RUN}&gt;">',
    "annotation": f'<math><annotation-xml encoding="text/html"><img src=x onerror={RUN}></annotation-xml></math>',
    "formula of text": f"$\\text{{<script>{RUN}</script>}}$",
    "formula of a link": f"$\\href{{javascript:{RUN}}}{{x}}$",
    "formula with style": "$\\style{background:url(https://evil.example)}{x}$",
    "formula in an attribute": f'<a href="https://e.org/$\\text{{ onmouseover={RUN} }}$">x</a>',
    "formula that is none": f"$\\frac{{<img src=x onerror={RUN}>$ $$\\begin{{x}}<script>{RUN}</script>$$",
    "end of the page": f"</section></main></body></html><script>{RUN}</script>",
    "comment": f"<!--><script>{RUN}</script>-->",
    "noscript": f'<noscript><p title="</noscript><img src=x onerror={RUN}>"></noscript>',
    "template": f"<template><script>{RUN}</script></template><textarea><script>{RUN}</script></textarea>",
    "names": '<p id="w_curves" name="body" class="wide">x</p><a href="x" target="_blank" ping="https://evil.example">x</a>',
    "placeholder": "\x00" + "7\x00 $w$",
    "link of a title": f'[x](https://e.org "a\\"onclick=\\"{RUN}")',
}
OURS = {"html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section"}
OURS |= {"details", "summary", "img"}
TEXTS = {"a", "b", "blockquote", "br", "code", "del", "div", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "li"}
TEXTS |= {"ol", "p", "pre", "s", "span", "strong", "sub", "sup", "u", "ul"}
TABLES = {"table", "tbody", "td", "th", "thead", "tr"}
FORMULAS = {"math", "mi", "mn", "mo", "mrow", "mtext", "msub", "msup", "mtable", "mtr", "mtd", "mfrac"}
FORMULAS |= {"mspace"}
ATTRIBUTES = {"alt", "aria-label", "charset", "class", "content", "display", "height", "href"}
ATTRIBUTES |= {"http-equiv", "id", "lang", "name", "role", "src", "stretchy", "tabindex", "width"}
ATTRIBUTES |= {"xmlns"}


class Checked(HTMLParser):
    """Every element and attribute is one that we know, and leads nowhere."""

    def __init__(self):
        super().__init__()
        self.metas, self.styles, self.inside = [], [], ""

    def handle_starttag(self, tag, attributes):
        assert tag in OURS | TEXTS | TABLES | FORMULAS, tag
        self.inside = tag
        for name, value in attributes:
            assert name in ATTRIBUTES, (tag, name)
            if name == "href":
                assert tag == "a" and re.match(r"https?://|#", value), value
            if name == "src":
                assert tag == "img" and re.fullmatch(r"data:image/(png|jpeg);base64,[\w+/=]+", value), value
            if name in ("id", "class"):
                assert (tag, name, value) in {("section", "id", SECTION), ("div", "class", "wide")}
        if tag == "meta":
            self.metas.append(dict(attributes))

    def handle_data(self, text):
        if self.inside == "style":
            self.styles.append(text)

    def handle_endtag(self, tag):
        self.inside = ""


SECTION = "bad"


def written(folder, cells, name="bad"):
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def checked(html):
    parser = Checked()
    parser.feed(html)
    parser.close()
    return parser


@pytest.mark.parametrize("name", MARKDOWN)
def test_nothing_of_it_reaches_the_page(tmp_path, name):
    """As a cell, in a table, and as the Markdown that code has put out."""
    text = MARKDOWN[name]
    table = "| a |\n| --- |\n| " + text.replace("\n", " ").replace("|", "") + " |\n"
    outputs = [new_output("display_data", {"text/markdown": text, "text/html": text, "image/svg+xml": text})]
    cells = [new_markdown_cell(f"# {text}\n\n{text}\n\n{table}"), new_code_cell("1", outputs=outputs)]
    cells += [new_code_cell(text, outputs=[new_output("display_data", {"text/html": text, "text/plain": text})])]
    html = page([written(tmp_path, cells)], "T")
    checked(html)
    assert html.endswith("</section>\n</main>\n</body>\n</html>\n") and html.count("</body>") == 1


def test_figures_and_what_stands_next_to_them(tmp_path):
    """The text of a figure is no markup, and what is no figure is refused in one line."""
    alt = f'" onload="{RUN}'
    outputs = [new_output("display_data", {"image/png": PNG}, metadata={"image/png": {"alt": alt}})]
    checked(page([written(tmp_path, [new_code_cell("1", outputs=outputs)])], f"</title><script>{RUN}</script>"))
    svg = b64encode(f"<svg onload={RUN}>".encode()).decode()
    outputs = [new_output("display_data", {"image/png": svg})]
    with pytest.raises(NeonError, match=r"bad\.ipynb: holds what cannot be shown"):
        page([written(tmp_path, [new_code_cell("1", outputs=outputs)])], "T")


def test_cells_of_an_odd_form_are_one_line(tmp_path):
    path = tmp_path / "odd.ipynb"
    for cell in ({"cell_type": "code"}, {"cell_type": "code", "source": "", "outputs": [3]}, {"cell_type": "markdown"}):
        path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
        with pytest.raises(NeonError, match=r"odd\.ipynb: "):
            page([path], "T")


def test_a_name_is_no_markup(tmp_path, monkeypatch):
    for name in ('"><script>1<', "a b&c", "'onclick='1", "x<img src=x onerror=1>"):
        html = page([written(tmp_path, [new_markdown_cell("x")], name)], name)
        monkeypatch.setattr(f"{__name__}.SECTION", re.search(r'<a href="#([^"]*)"', html)[1])
        checked(html)


def test_the_page_itself_forbids_to_run_and_to_load(tmp_path):
    parser = checked(page([written(tmp_path, [new_markdown_cell("x")])], "T"))
    (policy,) = [meta["content"] for meta in parser.metas if meta.get("http-equiv") == "Content-Security-Policy"]
    digest = b64encode(hashlib.sha256("".join(parser.styles).encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'" and rules.pop("style-src") == f"'sha256-{digest}'"
    assert rules == {"img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


@pytest.mark.slow
def test_a_browser_runs_and_asks_for_nothing(tab, tmp_path):  # noqa: F811
    """Also past our own cleaning: script and a remote image put into the page by hand are stopped by its policy."""
    cells = [new_markdown_cell(text) for text in MARKDOWN.values()]
    outputs = [new_output("display_data", {"image/png": PNG})]
    html = page([written(tmp_path, [*cells, new_code_cell("1", outputs=outputs)])], "T")
    for extra in (
        "",
        f'<script>{RUN}</script><img src=x onerror="{RUN}"><img id="far" src="https://evil.example/p.png">',
    ):
        (tmp_path / "index.html").write_text(html.replace("</main>", f"{extra}</main>"))
        tab.open(tmp_path / "index.html", 1280)
        assert tab.value("document.title") == "T" and tab.value("location.protocol") == "file:"
        loaded = tab.value("performance.getEntriesByType('resource').map(r => r.name).filter(n => /evil/.test(n))")
        sizes = tab.value("[...document.images].map(i => [i.src.slice(0, 10), i.naturalWidth > 0])")
        assert loaded == [] or extra  # what the policy stops may still be listed
        assert [shown for source, shown in sizes if source == "data:image"] == [True, True]
        assert not any(shown for source, shown in sizes if source != "data:image")
        assert tab.value("getComputedStyle(document.body).maxWidth") == "960px"  # our own style counts
