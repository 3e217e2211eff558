"""SIGTERM, as schedulers send it before they take a machine away: to real processes, alone and together."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from processes import BIN, ROOT, files, neon, ranks, words
from test_selftrain import ALONE, PLAIN, Numbers, images_in, line, selftrain, toy

from neon.cli import command_line
from neon.selftrain import train
from neon.stop import Terminated, attended, deferred

LONG = {"budget": 64_000, "snapshot": 64_000}


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def program(*argv, **env):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([BIN / "neon", *words(argv)], env=os.environ | env, **pipes)


def logged(folder):
    path = folder / "log.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def test_training_saves_its_state_first(mini, tmp_path):
    """The state at the moment of the signal, not that of the last snapshot; the run resumes to the same weights."""
    out = tmp_path / "stopped"
    process = program(*selftrain(mini, out, **LONG))
    wait_for(lambda: len(logged(out)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate(timeout=30)
    images = images_in(out / "state.safetensors")
    assert images >= 1280 and images % 64 == 0 and not list(out.glob("snapshot-*"))
    saved = f"the state after {images} images is saved in {out}; the same command resumes"
    assert (process.returncode, printed, said) == (143, "", f"stopped by SIGTERM: {saved}\n")
    assert not list(out.glob(".*"))


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path):
    """In this process, so that the signal comes in a chosen step."""

    def run(out, stop_at=None):
        steps = []

        def loss(model, images):
            steps.append(images)
            if len(steps) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return line(model, images)

        family, model = toy(loss, a=1.0, b=0.0)
        with attended():
            train(family, model, Numbers(16), PLAIN, tmp_path / out, world=ALONE)

    before = signal.getsignal(signal.SIGTERM)
    run("whole")
    for at, images in ((3, 24), (1, 32)):
        with pytest.raises(Terminated, match=rf"^the state after {images} images is saved"):
            run("stopped", stop_at=at)
    run("stopped", stop_at=4)  # in the last step: the run is complete
    assert files(tmp_path / "stopped").keys() == files(tmp_path / "whole").keys()
    names = [name for name in files(tmp_path / "whole") if name.endswith(".safetensors")]
    assert len(names) == 2
    assert all(files(tmp_path / "stopped")[name] == files(tmp_path / "whole")[name] for name in names)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("who", [(0, 1), (1,)], ids=["both", "one"])
def test_two_processes_stop_at_the_same_step(mini, tmp_path, who):
    out, command = tmp_path / "stopped", {"budget": 64_000, "snapshot": 64_000}
    both = ranks(2, *selftrain(mini, out, **command))
    deadline = time.monotonic() + 60
    while len(logged(out)) < 2:
        assert all(process.is_alive() for process in both) and time.monotonic() < deadline
        time.sleep(0.005)
    for rank in who:
        os.kill(both[rank].pid, signal.SIGTERM)
    for process in both:
        process.join(30)
        assert process.exitcode == 143
    assert 1280 <= images_in(out / "state.safetensors") < 64_000
    assert not list(out.glob("snapshot-*")) and not list(out.glob(".*"))


@pytest.mark.slow
def test_torchrun_passes_it_on(mini, tmp_path):
    out = tmp_path / "stopped"
    argv = ["--standalone", "--nproc_per_node=2", "-m", "neon.cli", *words(selftrain(mini, out, **LONG))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen([BIN / "torchrun", *argv], cwd=ROOT, **pipes)
    wait_for(lambda: len(logged(out)) >= 2, launcher)
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    images = images_in(out / "state.safetensors")
    assert images >= 1280 and launcher.returncode
    assert said.count(f"stopped by SIGTERM: the state after {images} images is saved in {out}") == 1


def test_a_second_signal_ends_at_once(tmp_path):
    """One that comes within two seconds is the same request, passed on by torchrun."""
    code = f"""
import sys, time
from pathlib import Path
from neon.cli import command_line
from neon.stop import deferred
def run():
    with deferred() as asked:
        while True:
            Path({str(tmp_path / "asked")!r}).write_text(str(asked()))
            time.sleep(0.05)
command_line(run)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    seen = tmp_path / "asked"
    for text in ("False", "True"):
        wait_for(lambda text=text: seen.exists() and seen.read_text() == text, process)
        process.send_signal(signal.SIGTERM)
    time.sleep(2.1)
    assert process.poll() is None  # two, but one request
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[1] == "" and process.returncode == 143


def stop_in(mini, out, command, seen):
    process = program(*command)
    wait_for(seen, process)
    return stopped(process, out)


def stopped(process, out):
    """Stop it; what it says."""
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 143
    assert not list(out.parent.rglob("*.partial"))
    return said


def test_generate_resumes(mini, tmp_path):
    out = tmp_path / "S"
    command = ["generate", *mini.sampling, "--model", mini.base, "--seeds", "0-9999", "--batch_size", 8, "--out", out]
    said = stop_in(mini, out, command, lambda: len(list(out.rglob("*.png"))) > 20)
    assert said == f"stopped by SIGTERM: the images made so far are in {out}; the same command resumes\n"
    assert len(list(out.rglob("*.png"))) < 9999


def test_two_processes_that_generate_stop(mini, tmp_path):
    """The one that is through with its images waits for the other one: both end, and so does the run."""
    out = tmp_path / "S"
    command = ["generate", *mini.sampling, "--model", mini.base, "--seeds", "0-9999", "--batch_size", 8, "--out", out]
    both = ranks(2, *command)
    deadline = time.monotonic() + 60
    while len(list(out.rglob("*.png"))) < 20:
        assert all(process.is_alive() for process in both) and time.monotonic() < deadline
        time.sleep(0.005)
    for process in both:
        os.kill(process.pid, signal.SIGTERM)
    for process in both:
        process.join(30)
        assert process.exitcode == 143
    assert not list(tmp_path.rglob("*.partial"))


def test_a_process_that_waits_for_one_that_was_stopped(capsys):
    """Its connection breaks: a RuntimeError, which is no news after SIGTERM, and a defect without it."""
    code = "def run(): {}raise RuntimeError('Connection closed by peer')"

    def ends(before):
        space = {}
        exec(code.format(before), {"os": os, "signal": signal, "deferred": deferred}, space)
        command_line(space["run"])

    with pytest.raises(SystemExit, match="143"):
        ends("exec('with deferred(): os.kill(os.getpid(), signal.SIGTERM)'); ")
    assert capsys.readouterr().err == "stopped by SIGTERM: nothing of it is kept\n"
    with pytest.raises(SystemExit, match="70"):
        ends("")
    assert "unexpected RuntimeError: Connection closed" in capsys.readouterr().err


def test_search_final_and_evaluate_say_what_they_keep(mini, tmp_path):
    out = tmp_path / "search.jsonl"
    measuring = (*mini.measuring, "--base", mini.base, "--metrics", "fid", "--out", out)
    search = ["search", *measuring, "--selftrained", mini.snapshots[0], "--seeds", "0-999", "-w", "0:20:1"]
    search += ["--method", "grid"] if "--method" in help_of("search") else []
    said = stop_in(mini, out, search, lambda: out.exists() and out.read_text().count("\n") >= 1)
    assert said == f"stopped by SIGTERM: the rows measured so far are in {out}; the same command resumes\n"
    assert 1 <= out.read_text().count("\n") < 21
    row = tmp_path / "row.json"
    evaluate = ["evaluate", *mini.measuring, "--model", mini.base, "--seeds", "0-99999", "--metrics", "fid"]
    process = program(*evaluate, "--out", row, NEON_PROGRESS_SECONDS="0")
    assert re.match(r"w = 0: \d+ of 100,000 images, \S+ images/s, .* left\n", process.stderr.readline())
    *_, last = stopped(process, row).splitlines()
    assert last == "stopped by SIGTERM: nothing of it is kept" and not row.exists()


def help_of(command):
    return subprocess.run([BIN / "neon", command, "--help"], capture_output=True, text=True).stdout


def test_states_by_time(tmp_path):
    """A state every few hundredths of a second, of a run that has no snapshot before its end."""

    def loss(model, images):
        time.sleep(0.01)
        seen.append(images_in(tmp_path / "run" / "state.safetensors"))
        return line(model, images)

    for minutes, states in ((None, 1), (0.04 / 60, 5)):
        seen = []
        family, model = toy(loss, a=1.0, b=0.0)
        recipe = PLAIN.__class__(batch=8, lr=0.1, budget=320, snapshot=320)
        out = {"replace": True, "seed": states}
        train(family, model, Numbers(16), recipe, tmp_path / "run", world=ALONE, save_minutes=minutes, **out)
        assert (len(set(seen)) >= states) if minutes else (set(seen) == {0})
        assert torch.isfinite(model.a)


def test_minutes_that_make_no_sense(mini, tmp_path, capsys):
    for minutes in ("0", "-1", "inf", "x"):
        with pytest.raises(SystemExit) as exit:
            neon(*selftrain(mini, tmp_path / "run"), f"--save_minutes={minutes}")
        assert exit.value.code == 2 and "save_minutes" in capsys.readouterr().err
