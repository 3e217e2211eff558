"""Executed notebooks as one HTML page that needs nothing else: figures inside, formulas as MathML, no script.

A notebook may come from anyone: what Markdown and formulas become is cut down to the elements of a text, tables and
MathML, without images, styles and scripts, and the page forbids browsers to run or load anything.

python -m report.page NOTEBOOK.ipynb … --out PAGE.html    in this order
python -m report.page FOLDER --out PAGE.html              those of NOTEBOOKS that are there
"""

import argparse
import base64
import hashlib
import html
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import mistune
import nbformat
import nh3
from latex2mathml.converter import convert
from PIL import Image

from neon import NeonError
from neon.cli import command_line
from neon.files import atomic, existing, reading

NOTEBOOKS = ("samples", "w_curves", "landscape", "budget", "ablations", "controls", "table_a1", "toy_gaussian")
NOTEBOOKS += ("quickstart",)
FORMULA = r"\$\$(.+?)\$\$|\$([^$\n][^$]*?)\$"
TEXT = {"a", "b", "blockquote", "br", "code", "del", "div", "dd", "dl", "dt", "em", "h1", "h2", "h3", "h4", "h5", "h6"}
TEXT |= {"hr", "i", "kbd", "li", "ol", "p", "pre", "s", "small", "span", "strong", "sub", "sup", "u", "ul"}
TABLE = {"caption", "table", "tbody", "td", "tfoot", "th", "thead", "tr"}
MATH = {"math", "mfenced", "mfrac", "mi", "mn", "mo", "mover", "mpadded", "mphantom", "mroot", "mrow", "ms", "mspace"}
MATH |= {"msqrt", "mstyle", "msub", "msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder", "munderover"}
ATTRIBUTES = {"*": set(), "a": {"href"}, "td": {"colspan", "rowspan"}, "th": {"colspan", "rowspan"}, "ol": {"start"}}
ATTRIBUTES |= {"math": {"display", "xmlns"}, "mo": {"fence", "form", "largeop", "lspace", "rspace", "stretchy"}}
ATTRIBUTES |= {"mspace": {"width"}, "mstyle": {"displaystyle", "scriptlevel"}, "mfrac": {"linethickness"}}
ATTRIBUTES |= {"mi": {"mathvariant"}, "mn": {"mathvariant"}, "mtable": {"columnalign"}, "mtd": {"columnalign"}}
ATTRIBUTES["mover"] = ATTRIBUTES["munder"] = ATTRIBUTES["munderover"] = {"accent", "accentunder"}
CLEANER = nh3.Cleaner(tags=TEXT | TABLE | MATH, attributes=ATTRIBUTES, url_schemes={"http", "https"}, link_rel=None)
STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
body { overflow-wrap: break-word; }
a { color: #0b57a4; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: .8rem; }
math[display=block] { overflow-x: auto; }
summary { color: #595959; font-size: .8rem; cursor: pointer; }
nav { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
nav a { color: inherit; text-decoration: none; border: 1px solid #767676; border-radius: .4rem; padding: .6rem; }
nav img { height: 8rem; width: 100%; object-fit: contain; }
section { border-top: 2px solid #ddd; margin-top: 3rem; }
"""


DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'sha256-{DIGEST}'; base-uri 'none'; form-action 'none'"


def page(notebooks: Sequence[str | Path], title: str) -> str:
    """The page: an index with the first figure of each notebook, then all of them, code folded away.

    Raises NeonError if a file is not a notebook, or holds what cannot be shown.
    """
    index, sections = [], []
    for path in map(existing, notebooks):
        with reading(path, "holds what cannot be shown"):
            cells, place = _cells(path), quote(path.stem)
            body, small = _shown(cells, path)
            lines = (line for cell in cells for line in cell.source.splitlines())
            heading = next((line[2:] for line in lines if line.startswith("# ")), path.stem)
        index.append(f'<a href="#{place}">{small}<br>{html.escape(heading)}</a>')
        sections.append(f'<section id="{place}">\n{body}\n</section>')
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="referrer" content="no-referrer">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{html.escape(title)}</h1></header>\n"
        f'<nav aria-label="Notebooks">{"".join(index)}</nav>\n<main>\n{"".join(sections)}\n</main>\n</body>\n</html>\n'
    )


def _cells(path: Path) -> list:
    with reading(path, "not a notebook"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fields that the page does not need, such as ids of cells
        return nbformat.read(path, as_version=4).cells


def _shown(cells: Sequence, path: Path) -> tuple[str, str]:
    """All cells, and the first figure, small."""
    body = "\n".join(_cell(cell, path.stem) for cell in cells)
    figure = re.search(r'<img alt="[^"]*" src="data:image/png;base64,([^"]*)"', body)
    return body, _thumbnail(figure[1]) if figure else ""


def _thumbnail(png: str) -> str:
    """Of a link that its text describes."""
    image, small = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.thumbnail((400, 260))
    image.save(small, "JPEG")
    return _image(small.getvalue(), "jpeg", "")


def _image(data: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _cell(cell, notebook: str) -> str:
    if cell.cell_type == "markdown":
        return _markdown(cell.source, notebook)
    code = f"<details><summary>code</summary>{_pre(cell.source)}</details>"
    return code + "\n".join(_output(output, notebook) for output in cell.get("outputs", []))


def _pre(text: str) -> str:
    """Scrolls sideways, with the keyboard too."""
    return f'<pre tabindex="0">{html.escape(text)}</pre>'


def _output(output, notebook: str) -> str:
    if output.output_type == "error":
        return _pre(f"{output.ename}: {output.evalue}")
    if output.output_type == "stream":
        return _pre(output.text) if output.name == "stdout" else ""
    data = output.data
    if "image/png" in data:
        alt = output.metadata.get("image/png", {}).get("alt", f"A figure of {notebook}.")
        return _image(base64.b64decode(data["image/png"]), "png", alt)
    if "text/markdown" in data:
        return _markdown(data["text/markdown"], notebook)
    return _pre(data.get("text/plain", ""))


def _markdown(source: str, notebook: str) -> str:
    formulas = []  # kept away from Markdown, to which _ and * mean something else

    def keep(match):
        formulas.append(_formula(match))
        return f"\0{len(formulas) - 1}\0"

    rendered = mistune.html(re.sub(FORMULA, keep, source.replace("\0", ""), flags=re.DOTALL))
    rendered = re.sub("\0(\\d+)\0", lambda m: formulas[int(m[1])], rendered)
    rendered = CLEANER.clean(rendered)  # with the formulas, which may stand in an attribute; what follows is our own
    rendered = re.sub(r"(</?h)([1-5])", lambda m: f"{m[1]}{int(m[2]) + 1}", rendered)  # the page's title is its one h1
    rendered = re.sub(r'<a href="(?!https?:)([^"]*)">(.*?)</a>', _link, rendered)
    return re.sub(r"<table>.*?</table>", _table, rendered, flags=re.DOTALL)


def _formula(match: re.Match) -> str:
    """MathML; the source where it cannot be converted."""
    try:
        return convert(match[1], display="block") if match[1] else convert(match[2])
    except Exception:  # the library raises many kinds
        return f"<code>{html.escape(match[0])}</code>"


def _link(match: re.Match) -> str:
    """To a notebook: to its section. To another file, which the page does not hold: its text alone."""
    name = Path(match[1])
    known = name.suffix == ".ipynb" and name.stem in NOTEBOOKS
    return f'<a href="#{name.stem}">{match[2]}</a>' if known else match[2]


def _table(match: re.Match) -> str:
    """Scrolls sideways, with the keyboard too. A head without text is no head."""
    table = re.sub(r"<th([^>]*)>\s*</th>", r"<td\1></td>", match[0])
    return f'<div class="wide" tabindex="0" role="group" aria-label="Table">{table}</div>'


def found(path: str | Path) -> list[Path]:
    """A notebook itself; of a folder, those of NOTEBOOKS that are there, in that order. Raises NeonError if none is."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    paths = [file for name in NOTEBOOKS if (file := path / f"{name}.ipynb").exists()]
    if not paths:
        raise NeonError(f"{path}: no executed notebook in it")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", help="executed .ipynb files, in order, or a folder of them")
    parser.add_argument("--title", default="Neon: results")
    parser.add_argument("--out", required=True, help=".html")
    args = parser.parse_args()
    text = page([path for name in args.notebooks for path in found(name)], args.title)
    with atomic(args.out) as partial:
        partial.write_text(text)


if __name__ == "__main__":
    command_line(main)
