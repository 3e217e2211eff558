"""What people see of rows: lines, a plot on a terminal, a table elsewhere."""

import io
import math
import os
import pty
import re
import subprocess
import sys

import pytest
from processes import ROOT

from neon.cli.show import summary, terminal_plot, with_error

ROW = {"w": 1.5, "selftrained": "s", "budget": 20_000, "n": 100, "seconds": 2.0, "cfg": 2.0, "solver": "heun"}


def row(**changes):
    return ROW | {"fid": 12.34567, "fid_se": 0.4321, "is": 3.21} | changes


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.34567, 0.4321, "12.3 ± 0.4"),
        (12.34567, 0.1432, "12.35 ± 0.14"),
        (123.4567, 20.0, "123 ± 20"),
        (123.4567, 2.0, "123 ± 2"),
        (1.234567, 0.00312, "1.235 ± 0.003"),
        (1.234567, 0.1, "1.23 ± 0.10"),
        (1.234567, 0.0, "1.235"),
        (1.234567, math.nan, "1.235"),
        (math.inf, 0.1, "inf"),
    ],
)
def test_values_with_errors(value, error, text):
    assert with_error({"fid": value, "fid_se": error}, "fid") == text


def test_a_value_without_an_error():
    assert with_error({"recall": 0.98765}, "recall") == "0.9877"


def test_a_line_says_what_varies_and_how_sure_it_is():
    assert summary(row(), ("fid", "is")) == "w 1.5  B 20000  FID 12.3 ± 0.4  IS 3.21  n 100  2.0 s"
    line = summary(row(), ("fid",), ("cfg", "solver"))
    assert line == "w 1.5  B 20000  cfg 2  solver heun  FID 12.3 ± 0.4  n 100  2.0 s"
    assert summary(row(selftrained=None, w=0.0), ("fid",), ("cfg",)) == "w 0  cfg 2  FID 12.3 ± 0.4  n 100  2.0 s"
    diverged = row(fid=math.inf, reason="too far")
    assert summary(diverged, ("fid",), ("cfg",)) == "w 1.5  B 20000  cfg 2  diverged: too far"


ROWS = [row(w=w, cfg=cfg, fid=4 + (w - cfg / 2) ** 2, fid_se=0.25) for cfg in (2.0, 3.0) for w in (2.0, 0.0, 1.0)]


def test_a_table_where_there_is_no_terminal(capsys):
    terminal_plot([*ROWS, row(w=3.0, cfg=3.0, fid=math.inf)], "w", "fid", ("cfg",), "search.jsonl")
    assert capsys.readouterr().out.splitlines() == [
        "cfg  w        FID",
        "  2  0  5.0 ± 0.2",
        "  2  1  4.0 ± 0.2  ← best",
        "  2  2  5.0 ± 0.2",
        "  3  0  6.2 ± 0.2",
        "  3  1  4.2 ± 0.2",
        "  3  2  4.2 ± 0.2",
        "  3  3        inf",
        "all rows: search.jsonl",
    ]


def test_nothing_to_show(capsys):
    terminal_plot([], "w", "fid")
    terminal_plot([row(fid=math.inf)], "w", "fid")
    assert capsys.readouterr().out.splitlines() == ["w  FID", "  w  FID", "1.5  inf  ← best"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_plot_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    terminal_plot([*ROWS, row(w=9.0, cfg=3.0, fid=math.inf)], "w", "fid", ("cfg",), "search.jsonl")
    *plot, last, _ = re.sub(r"\x1b\[[\d;]*m", "", sys.stdout.getvalue()).split("\n")
    assert last == "all rows: search.jsonl" and len(plot) == 20 and max(map(len, plot)) <= 80
    assert "FID" in plot[-1] and " w " in plot[-1]
    text = "\n".join(plot)
    assert "o cfg 2" in text and "* cfg 3" in text and text.count("o") > 20 and text.count("*") > 20
    ticks = [float(line.split("┤")[0]) for line in plot if "┤" in line]
    assert min(ticks) == pytest.approx(4 - 0.25, abs=0.1) and max(ticks) == pytest.approx(6.25 + 0.25, abs=0.1)
    assert plot[-2].split()[-1] == "2.0" or float(plot[-2].split()[-1]) == 2.0


def test_a_table_on_a_terminal_without_plotext(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setitem(sys.modules, "plotext", None)
    terminal_plot(ROWS, "w", "fid", ("cfg",))
    assert sys.stdout.getvalue().startswith("cfg  w        FID\n")


def test_a_real_terminal():
    code = f"from neon.cli.show import terminal_plot; terminal_plot({ROWS!r}, 'w', 'fid', ('cfg',))"
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert done.returncode == 0 and "cfg 3" in os.read(ours, 65536).decode()
