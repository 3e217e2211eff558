"""How far a command is, on a terminal and off one; JSON that every reader understands."""

import io
import json
import math
import sys

import pytest
from processes import neon
from server import DATA, serving
from test_selftrain import selftrain

from neon import NeonError
from neon.fetch import local
from neon.files import Lines, duration, from_json, progress, read_json, to_json, write_json
from neon.measure.rows import Rows


class Clock:
    """Stands for the time module."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("neon.files.time", clock)
    return clock


def test_a_line_after_ten_seconds_and_then_every_minute(clock, capsys):
    with progress(6000, "img", "generate", done=1000) as bar:
        for second in range(1, 200):
            clock.now = second
            bar.update(10)
            if second == 100:
                bar.set_postfix_str("loss 0.125")
    assert capsys.readouterr() == (
        "",
        "generate: 1,100 of 6,000 images, 10 images/s, 8 min left\n"
        "generate: 1,700 of 6,000 images, 10 images/s, 7 min left\n"
        "generate: 2,300 of 6,000 images, 10 images/s, loss 0.125, 6 min left\n"
        "generate: 2,900 of 6,000 images, 10 images/s, loss 0.125, 5 min left\n",
    )


def test_the_interval(clock, capsys, monkeypatch):
    monkeypatch.setenv("NEON_PROGRESS_SECONDS", "0.5")
    for rank in (0, 1):
        with progress(10, "img", "train", rank) as bar:
            for _ in range(4):
                clock.now += 0.25
                bar.update(1)
    assert capsys.readouterr().err.splitlines() == [
        "train: 2 of 10 images, 4 images/s, 2 s left",
        "train: 4 of 10 images, 4 images/s, 2 s left",
    ]
    monkeypatch.setenv("NEON_PROGRESS_SECONDS", "soon")
    with pytest.raises(NeonError, match="NEON_PROGRESS_SECONDS is a number of seconds, not 'soon'"):
        progress(1, "img", "train")


def test_downloads_are_counted_in_mebibytes_and_may_have_no_known_size():
    line = Lines(None, "B", "x.pkl", 0, 60)
    line.update(5 * 2**20)
    assert line.line(2.0) == "x.pkl: 5 MiB, 2.5 MiB/s"
    line.total = 10 * 2**20
    assert line.line(2.0) == "x.pkl: 5 of 10 MiB, 2.5 MiB/s, 2 s left"


def test_a_download_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    """What an earlier download left counts, but has no speed."""
    monkeypatch.setenv("NEON_PROGRESS_SECONDS", "0")
    (tmp_path / ".x.npz.partial").write_bytes(DATA[: 2**20])
    clock = Clock()
    monkeypatch.setattr("neon.files.time", clock)
    monkeypatch.setattr("neon.files.Lines.update", lambda bar, n, update=Lines.update: (tick(clock), update(bar, n)))
    with serving() as server:
        assert local(f"{server.url}/x.npz", tmp_path).read_bytes() == DATA
    assert capsys.readouterr().err.splitlines()[-1] == "x.npz: 1 of 1 MiB, 0.221 MiB/s, 0 s left"


def tick(clock):
    clock.now += 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5990, "100 min"), (6000, "1.7 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(10, "img", "generate") as bar:
        bar.update(10)
    assert "100%|" in sys.stderr.getvalue() and "10/10" in sys.stderr.getvalue()


def test_every_long_command_says_how_far_it_is(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NEON_PROGRESS_SECONDS", "0")

    def said(*argv):
        neon(*argv)
        return capsys.readouterr().err.splitlines()

    made = said("generate", *mini.sampling, "--model", mini.base, "--seeds", "0-15", "--out", tmp_path / "S")
    assert made[-1].startswith("generate: 16 of 16 images, ")
    trained = said(*selftrain(mini, tmp_path / "run", budget=128, snapshot=64))
    assert trained[-1].startswith("train: 128 of 128 images, ") and ", loss " in trained[-1]
    real = said("reference", "--images", mini.data, *mini.features, "--out", tmp_path / "ref.npz")
    assert real[-1].startswith("reference: 128 of 128 images, ")
    measured = said("evaluate", *mini.measuring, "--model", mini.base, "--seeds", "0-15", "--metrics", "fid")
    assert measured[-1].startswith("w = 0: 16 of 16 images, ")


# ---------------------------------------------------------------- JSON


VALUES = {"fid": math.inf, "list": [1, -math.inf, "x"], "deep": {"s_max": math.inf, "n": None, "ok": True}}
STRICT = '{"fid": "Infinity", "list": [1, "-Infinity", "x"], "deep": {"s_max": "Infinity", "n": null, "ok": true}}'


def strictly(text):
    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict_and_read_back(tmp_path):
    assert to_json(VALUES) == STRICT and from_json(STRICT) == VALUES
    assert from_json(json.dumps(VALUES)) == VALUES  # as older versions wrote it
    assert (
        to_json([math.nan]) == '["NaN"]' and math.isnan(from_json("[NaN]")[0]) and math.isnan(from_json('["NaN"]')[0])
    )
    write_json(tmp_path / "x.json", VALUES)
    strictly((tmp_path / "x.json").read_text())
    assert read_json(tmp_path / "x.json") == VALUES


def test_rows_are_strict_and_old_rows_are_read(mini, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"key": "old", "fid": math.inf}) + "\n")
    rows = Rows(path)
    rows.cached("new", lambda: {"fid": math.inf, "s_max": math.inf})
    assert rows.rows["old"]["fid"] == rows.rows["new"]["fid"] == math.inf
    strictly(path.read_text().splitlines()[1])
    assert Rows(path).rows == rows.rows
    rows.keep(["old", "new"])
    for text in path.read_text().splitlines():
        strictly(text)
    assert Rows(path).rows == rows.rows

    options = ("--seeds", "0-15", "--metrics", "fid", "--out", tmp_path / "row.json")
    neon("evaluate", *mini.measuring, "--model", mini.base, *options)
    assert strictly((tmp_path / "row.json").read_text())["s_max"] == "Infinity"
