"""Executed notebooks as one HTML page that needs nothing else: figures inside, formulas as MathML, no script.

python -m report.page NOTEBOOK.ipynb … --out PAGE.html
"""

import argparse
import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

import mistune
import nbformat
from latex2mathml.converter import convert
from PIL import Image

from neon import NeonError
from neon.cli import command_line
from neon.files import atomic, existing

FORMULA = r"\$\$(.+?)\$\$|\$([^$\n][^$]*?)\$"
STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: .8rem; }
summary { color: #777; font-size: .8rem; cursor: pointer; }
nav { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
nav a { color: inherit; text-decoration: none; border: 1px solid #ddd; border-radius: .4rem; padding: .6rem; }
nav img { height: 8rem; width: 100%; object-fit: contain; }
section { border-top: 2px solid #ddd; margin-top: 3rem; }
"""


def page(notebooks: Sequence[str | Path], title: str) -> str:
    """The page: an index with the first figure of each notebook, then all of them, code folded away.

    Raises NeonError if a file is not a notebook.
    """
    index, sections = [], []
    for path in map(existing, notebooks):
        try:
            cells = nbformat.read(path, as_version=4).cells
        except Exception as error:  # of several libraries
            raise NeonError(f"{path}: not a notebook ({error})") from None
        body = "\n".join(map(_cell, cells))
        heading = next((line[2:] for c in cells for line in c.source.splitlines() if line.startswith("# ")), path.stem)
        figure = re.search(r'base64,([^"]*)"', body)
        index.append(f'<a href="#{path.stem}">{_thumbnail(figure[1]) if figure else ""}<br>{html.escape(heading)}</a>')
        sections.append(f'<section id="{path.stem}">\n{body}\n</section>')
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n<nav>{''.join(index)}</nav>\n{''.join(sections)}\n</html>\n"
    )


def _thumbnail(png: str) -> str:
    image, small = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.thumbnail((400, 260))
    image.save(small, "JPEG")
    return _image(small.getvalue(), "jpeg")


def _image(data: bytes, kind: str) -> str:
    return f'<img alt="figure" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _cell(cell) -> str:
    if cell.cell_type == "markdown":
        return _markdown(cell.source)
    code = f"<details><summary>code</summary><pre>{html.escape(cell.source)}</pre></details>"
    return code + "\n".join(map(_output, cell.get("outputs", [])))


def _output(output) -> str:
    if output.output_type == "error":
        return f"<pre>{html.escape(output.ename)}: {html.escape(output.evalue)}</pre>"
    if output.output_type == "stream":
        return f"<pre>{html.escape(output.text)}</pre>" if output.name == "stdout" else ""
    data = output.data
    if "image/png" in data:
        return _image(base64.b64decode(data["image/png"]), "png")
    if "text/html" in data:
        return re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
    if "text/markdown" in data:
        return _markdown(data["text/markdown"])
    return f"<pre>{html.escape(data.get('text/plain', ''))}</pre>"


def _markdown(source: str) -> str:
    formulas = []  # kept away from Markdown, to which _ and * mean something else

    def keep(match):
        formulas.append(convert(match[1], display="block") if match[1] else convert(match[2]))
        return f"\0{len(formulas) - 1}\0"

    rendered = mistune.html(re.sub(FORMULA, keep, source, flags=re.DOTALL))
    rendered = re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", rendered)  # files that the page does not hold
    return re.sub("\0(\\d+)\0", lambda m: formulas[int(m[1])], rendered)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", help="executed .ipynb files, in order")
    parser.add_argument("--title", default="Neon: results")
    parser.add_argument("--out", required=True, help=".html")
    args = parser.parse_args()
    text = page(args.notebooks, args.title)
    with atomic(args.out) as partial:
        partial.write_text(text)


if __name__ == "__main__":
    command_line(main)
