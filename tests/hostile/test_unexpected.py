"""The command line's last line of defence."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

from neon import NeonError
from neon.cli import command_line, main


def fails(error: BaseException, *words, monkeypatch) -> tuple[int, str]:
    """The exit status and stderr of a command in which that is raised."""

    def run(args):
        raise error

    monkeypatch.setattr("neon.cli.commands.run_inspect", run)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([*words, "inspect", "a.pth"])
    return ended.value.code, err.getvalue()


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), MemoryError(), RecursionError("deep"), KeyError("a")])
def test_what_is_not_expected_is_one_line_with_the_place_of_its_traceback(error, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, said = fails(error, monkeypatch=monkeypatch)
    assert status == 70 and said.count("\n") == 1
    found = re.fullmatch(
        rf"error: unexpected {type(error).__name__}: .*; the traceback is in (\S+) \(--debug shows it\)\n", said
    )
    text = Path(found[1]).read_text()
    assert text.startswith("Traceback") and "raise error" in text and type(error).__name__ in text


def test_debug_shows_it(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, said = fails(RuntimeError("why"), "--debug", monkeypatch=monkeypatch)
    assert status == 70 and said.startswith("Traceback") and said.endswith("error: unexpected RuntimeError: why\n")
    assert not list(tmp_path.iterdir())


def test_without_a_place_to_write(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    status, said = fails(RuntimeError("why"), monkeypatch=monkeypatch)
    assert (status, said) == (70, "error: unexpected RuntimeError: why; --debug shows the traceback\n")


def test_what_is_expected_stays_as_it_is(monkeypatch):
    assert fails(KeyboardInterrupt(), monkeypatch=monkeypatch) == (130, "")
    assert fails(NeonError("bad"), monkeypatch=monkeypatch) == (1, "error: bad\n")
    assert fails(BrokenPipeError(32, "Broken pipe"), monkeypatch=monkeypatch)[0] == 1
    assert fails(SystemExit(3), monkeypatch=monkeypatch)[0] == 3


def test_a_process_whose_partner_has_ended_is_no_defect(monkeypatch):
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:60066")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = "error: another process of this run has ended; what it printed says why\n"
    assert fails(gone, monkeypatch=monkeypatch) == (1, said)
    assert fails(RuntimeError("two"), "--debug", monkeypatch=monkeypatch)[0] == 70
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert fails(gone, "--debug", monkeypatch=monkeypatch)[0] == 70


def test_of_scripts_too(monkeypatch, capsys):
    def script():
        assert sys.argv == ["script", "a"]
        raise ValueError("x")

    monkeypatch.setattr(sys, "argv", ["script", "--debug", "a"])
    with pytest.raises(SystemExit) as ended:
        command_line(script)
    assert ended.value.code == 70 and "Traceback" in capsys.readouterr().err
