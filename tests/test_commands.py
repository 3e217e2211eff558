"""What users see after an error of theirs: one line that says what to fix, and no half-written file."""

import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import BIN, ROOT, error_of, files, neon, torchrun, words

import edm.family
from neon.cli import main
from neon.cli.parser import parse
from neon.data import encode_png
from neon.family import Preset, find_preset
from neon.weights.checkpoint import load_weights, open_weights, save_safetensors

# ---------------------------------------------------------------- commands that would work


def evaluate(mini, *more):
    return ["evaluate", *mini.measuring, "--model", mini.base, "--seeds", "0-15", "--metrics", "fid", *more]


def generate(mini, out, *more):
    return ["generate", *mini.sampling, "--model", mini.base, "--seeds", "0-3", "--out", out, *more]


def selftrain(mini, out, *more):
    recipe = ("--recipe", "digits", "--budget", 128, "--snapshot", 128)
    return ["selftrain", "--family", "edm", "--base", mini.base, "--data", mini.data, *recipe, "--out", out, *more]


def search(mini, out, *more):
    models = ("--base", mini.base, "--selftrained", mini.snapshots[0], "--w=0,1")
    return ["search", *mini.measuring, *models, "--seeds", "0-15", "--metrics", "fid", "--out", out, *more]


def final(mini, out, *more):
    options = ("--base", mini.base, "--seeds", "0-15", "--metrics", "fid", "--out", out)
    return ["final", *mini.measuring, *options, *more]


def reference(mini, out, *more):
    return ["reference", "--images", mini.data, *mini.features, "--out", out, *more]


@pytest.fixture
def out(tmp_path):
    """Where a command writes to; a test may check that nothing is there, nor next to it."""
    return tmp_path / "out"


def nothing_left(out):
    return [str(p) for p in out.parent.rglob("*")] == []


# ---------------------------------------------------------------- damaged and foreign checkpoints


class Program:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture(scope="module")
def broken(mini, tmp_path_factory):
    """A folder of files that are no checkpoints of this network."""
    path = tmp_path_factory.mktemp("broken")
    with open_weights(mini.base) as weights:
        state, metadata = dict(weights.items()), weights.metadata
    first = next(iter(state))
    content = mini.base.read_bytes()
    for name, data in {
        "truncated.safetensors": content[: len(content) // 2],
        "text.safetensors": b"not a checkpoint" * 9,
        "empty.safetensors": b"",
        "unknown.bin": content,
        "program.pkl": pickle.dumps(Program()),
        "program.pth": pickle.dumps(Program()),
        "program.safetensors": pickle.dumps(Program()),
    }.items():
        (path / name).write_bytes(data)
    torch.save({"model": Program()}, path / "zipped.pth")
    for name, changed in {
        "shape": state | {first: state[first][:-1]},
        "extra": state | {"more.weight": torch.zeros(1)},
        "missing": {name: tensor for name, tensor in state.items() if name != first},
        "nan": state | {first: state[first] * float("nan")},
        "inf": state | {first: state[first] / 0.0},
    }.items():
        save_safetensors(path / f"{name}.safetensors", changed, metadata)
    save_safetensors(path / "bare.safetensors", state)
    save_safetensors(path / "garbled.safetensors", state, metadata | {"init_kwargs": "{"})
    save_safetensors(path / "options.safetensors", state, metadata | {"init_kwargs": '{"width": 3}'})
    shutil.copy(ROOT / "tests" / "golden" / "imm" / "tiny_imm.pkl", path / "imm.pkl")
    (path / "folder").mkdir()
    return path


BROKEN = {
    "gone.safetensors": "no such file",
    "truncated.safetensors": "not a readable safetensors file",
    "text.safetensors": "not a readable safetensors file",
    "empty.safetensors": "not a readable safetensors file",
    "unknown.bin": "unknown kind of checkpoint",
    "program.pkl": "program.pkl: ",
    "program.pth": "refused, its pickle is damaged or not plain data",
    "program.safetensors": "not a readable safetensors file",
    "zipped.pth": "refused, it asks for",
    "folder": "need one",
    "shape.safetensors": "shape",
    "extra.safetensors": "more.weight",
    "missing.safetensors": "missing",
    "nan.safetensors": "not finite",
    "inf.safetensors": "not finite",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(mini, broken, out, name):
    file, before = broken / name, files(broken)
    for command in (
        evaluate(mini, "--model", file, "--out", out),
        evaluate(mini, "--selftrained", file, "-w", 1, "--out", out),
        generate(mini, out, "--model", file),
        selftrain(mini, out, "--base", file),
        search(mini, out, "--base", file),
        ["merge", "--base", mini.base, "--selftrained", file, "-w", 1, "--out", out.with_suffix(".safetensors")],
    ):
        assert BROKEN[name] in error_of(*command), command
        assert nothing_left(out), command
    assert files(broken) == before and not Path("executed").exists()


@pytest.mark.parametrize(
    "name",
    [
        "bare.safetensors",
        "garbled.safetensors",
        "options.safetensors",
        "imm.pkl",
    ],
)
def test_checkpoints_of_other_networks(mini, broken, out, name):
    for command in (
        evaluate(mini, "--model", broken / name, "--out", out),
        generate(mini, out, "--model", broken / name),
        selftrain(mini, out, "--base", broken / name),
    ):
        assert f"{name}: no EDM checkpoint" in error_of(*command)
        assert nothing_left(out)


# ---------------------------------------------------------------- other wrong inputs


def image_set(path, shape, labels, n=64):
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        image = torch.randint(256, shape, generator=generator).to(torch.uint8)
        (path / f"{i:02d}.png").write_bytes(encode_png(image))
    pairs = None if labels is None else [[f"{i:02d}.png", labels] for i in range(n)]
    (path / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return path


def test_data_that_cannot_be_read(mini, out, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    (path / "none").mkdir()
    (path / "text.zip").write_text("no zip")
    torn = image_set(path / "torn", (1, 8, 8), 0)
    for file in torn.glob("*.png"):
        file.write_bytes(file.read_bytes()[:40])
    for name, message in {"gone": "no such file", "none": "no images", "text.zip": "neither a folder nor"}.items():
        assert message in error_of(*selftrain(mini, out, "--data", path / name))
        assert message in error_of(*reference(mini, out.with_suffix(".npz"), "--images", path / name))
        assert nothing_left(out)
    assert "is not a readable image" in error_of(*selftrain(mini, out, "--data", torn))
    assert nothing_left(out)
    large = image_set(path / "large", (1, 16, 16), 0)
    assert "reads 8x8 images" in error_of(*reference(mini, out.with_suffix(".npz"), "--images", large))
    assert nothing_left(out)


@pytest.mark.parametrize(
    ("shape", "labels"),
    [((3, 8, 8), 0), ((1, 16, 16), 0), ((1, 8, 8), None), ((1, 8, 8), 10), ((1, 8, 8), -1)],
    ids=["colour", "large", "unlabelled", "label 10", "label -1"],
)
def test_data_of_another_kind(mini, out, tmp_path_factory, shape, labels):
    """Being convolutional, the network itself would train on images of any size without complaint."""
    data = image_set(tmp_path_factory.mktemp("data") / "set", shape, labels)
    error_of(*selftrain(mini, out, "--data", data))
    assert not list(out.glob("snapshot-*"))


def test_references_that_do_not_fit(mini, out, tmp_path_factory):
    path = tmp_path_factory.mktemp("refs")
    np.savez(path / "three.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(path / "no_mu.npz", sigma=np.eye(16))
    np.savez(path / "plain.npz", mu=np.zeros(16), sigma=np.eye(16))
    (path / "program.npz").write_bytes(pickle.dumps(Program()))
    for name, message in {
        "three.npz": "features have 16 dimensions, the reference three.npz has 3",
        "no_mu.npz": "no entry 'mu'",
        "program.npz": "not an npz file",
        "gone.npz": "no such file",
    }.items():
        assert message in error_of(*evaluate(mini, "--ref", path / name, "--out", out))
        assert message in error_of(*search(mini, out, "--ref", path / name))
    plain = evaluate(mini, "--ref", path / "plain.npz", "--metrics", "fid,kid", "--out", out)
    assert "plain.npz has no features" in error_of(*plain)
    assert nothing_left(out) and not Path("executed").exists()


WRONG = {
    "family": (lambda m, out: evaluate(m, "--family", "gan"), "unknown family 'gan' (know edm"),
    "preset": (
        lambda m, out: generate(m, out, "--preset", "xar_xl"),
        "unknown preset 'xar_xl' (know edm_cifar10_cond, ",
    ),
    "preset of another family": (
        lambda m, out: evaluate(m, "--preset", "xar_l"),
        "unknown preset 'xar_l' (know edm_cifar10_cond, edm_cifar10_uncond, edm_ffhq64)",
    ),
    "network": (
        lambda m, out: ["train", "--network", "huge", *selftrain(m, out)[1:3], *selftrain(m, out)[5:]],
        "unknown EDM network 'huge' (know ",
    ),
    "recipe": (lambda m, out: selftrain(m, out, "--recipe", "secret"), "unknown recipe 'secret' (know "),
    "metric": (lambda m, out: evaluate(m, "--metrics", "fid,psnr"), "unknown metric 'psnr' (know "),
    "no metric": (lambda m, out: evaluate(m, "--metrics", ""), "unknown metric ''"),
    "search without fid": (lambda m, out: search(m, out, "--metrics", "is"), "fid"),
    "extractor": (lambda m, out: evaluate(m, "--features", "vgg"), "no feature extractor 'vgg'"),
    "extractor file": (lambda m, out: evaluate(m, "--features", "digits:gone"), "no such file"),
    "extractor weights": (lambda m, out: evaluate(m, "--features", f"digits:{m.base}"), "not hold a DigitsCNN"),
    "seeds": (lambda m, out: generate(m, out, "--seeds", "a-b"), "not a list of seeds: 'a-b'"),
    "no seeds": (lambda m, out: evaluate(m, "--seeds", ""), "not a list of seeds"),
    "range": (lambda m, out: generate(m, out, "--seeds", "9-1"), "empty range of seeds: '9-1'"),
    "too few for FID": (lambda m, out: evaluate(m, "--seeds", "3"), "at least two images"),
    "too few for IS": (lambda m, out: evaluate(m, "--seeds", "0-8", "--metrics", "is"), "at least 10 images, got 9"),
    "grid of w": (lambda m, out: search(m, out, "--w=0:1", "--method", "grid"), "not a grid: '0:1'"),
    "uneven grid": (lambda m, out: search(m, out, "--w=0:1:0.3", "--method", "grid"), "not a grid: '0:1:0.3'"),
    "endless grid": (lambda m, out: search(m, out, "--w=0:inf:1", "--method", "grid"), "not a grid: '0:inf:1'"),
    "grid option": (lambda m, out: search(m, out, "--grid", "temperature=1,2"), "know num_steps, "),
    "grid without values": (lambda m, out: search(m, out, "--grid", "rho"), "write OPTION=GRID"),
    "grid of integers": (lambda m, out: search(m, out, "--grid", "num_steps=2.5,3"), "num_steps takes integers"),
    "selftrained without w": (lambda m, out: evaluate(m, "--selftrained", m.snapshots[0]), "--selftrained needs -w"),
    "w alone": (lambda m, out: evaluate(m, "-w", 1), "w = 1.0 needs a self-trained checkpoint"),
    "infinite w": (lambda m, out: evaluate(m, "--selftrained", m.snapshots[0], "-w", "inf"), "w must be finite"),
    "overflowing w": (lambda m, out: evaluate(m, "--selftrained", m.snapshots[0], "-w", "1e42"), "not finite"),
    "steps": (lambda m, out: evaluate(m, "--num_steps", "-3"), "num_steps must be at least 1"),
    "snapshots": (lambda m, out: search(m, out, "--selftrained", "gone"), "gone: no such file"),
    "search": (lambda m, out: final(m, out, "--search", "gone"), "gone: no such file"),
    "suffix": (lambda m, out: reference(m, out.with_suffix(".txt")), "written as .npz"),
    "file as folder": (lambda m, out: reference(m, m.base / "ref.npz"), "File exists"),
    "unwritable": (lambda m, out: reference(m, Path("/proc/none/ref.npz")), "/proc/none"),
}
if not torch.cuda.is_available():
    WRONG["device"] = (lambda m, out: evaluate(m, "--device", "cuda"), "GPU")
    WRONG["device for training"] = (lambda m, out: selftrain(m, out, "--device", "cuda"), "GPU")
    WRONG["device for reference"] = (lambda m, out: reference(m, out.with_suffix(".npz"), "--device", "cuda"), "GPU")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(mini, out, case):
    command, message = WRONG[case]
    before = files(mini.path)
    assert message in error_of(*command(mini, out))
    assert nothing_left(out) and files(mini.path) == before


@pytest.mark.parametrize(
    "options",
    [
        *("--batch=0", "--batch=-64", "--batch=x", "--budget=0", "--budget=inf", "--budget=nan", "--budget=k"),
        *("--budget=0.2", "--snapshot=0", "--ramp=-1", "--micro_batch=0", "--save_every=-1", "--seed=-1"),
        *("--lr=0", "--lr=-1", "--lr=nan", "--lr=inf", "--precision=int8", "--device=tpu", "--dropout=1"),
    ],
)
def test_numbers_that_make_no_sense(mini, out, capsys, options):
    with pytest.raises(SystemExit) as exit:
        main(words(selftrain(mini, out, options)))
    assert exit.value.code == 2 and options.partition("=")[0] in capsys.readouterr().err
    assert nothing_left(out)


@pytest.mark.parametrize(("text", "wanted"), [("64", 64), ("500k", 500_000), ("6M", 6_000_000), ("2.3k", 2300)])
def test_counts_of_images(mini, text, wanted):
    from neon.cli.options import count

    assert count(text) == wanted


def test_batch_size_zero(mini, out, capsys):
    for command in (evaluate(mini), generate(mini, out), reference(mini, out)):
        with pytest.raises(SystemExit) as exit:
            main(words([*command, "--batch_size", 0]))
        assert exit.value.code == 2 and "batch_size" in capsys.readouterr().err


def test_what_was_measured_is_said_even_if_it_cannot_be_written(mini):
    before = files(mini.path)
    assert error_of(*evaluate(mini, "--out", mini.data), prints=True) == f"error: {mini.data}: Is a directory"
    assert files(mini.path) == before


def test_a_search_ends_at_the_first_broken_snapshot(mini, broken, out):
    """What was measured before stays: it is whole, and need not be measured again."""
    command = search(mini, out, "--selftrained", broken / "shape.safetensors")
    assert "shape" in error_of(*command, prints=True)
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["w"] == 0 and not list(out.parent.glob(".*"))


def test_a_reference_that_is_not_there_is_found_before_anything_is_downloaded(mini, out, monkeypatch):
    def refuse(*anything):
        raise AssertionError("an extractor was loaded")

    monkeypatch.setattr("neon.cli.commands.load_extractor", refuse)
    gone = ("--ref", out.with_name("gone.npz"), "--features", "inception")
    for command in (evaluate(mini, *gone), search(mini, out, *gone)):
        assert "gone.npz: no such file" in error_of(*command)


def test_a_missing_file_of_the_table_says_how_to_get_it(mini, out, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(ROOT)
    model, ref = "checkpoints/Neon_EDM_FFHQ.pkl", "fid_stats/adm_in256_stats.npz"
    assert not Path(model).exists() and not Path(ref).exists()
    hint = "; `neon download {0}` downloads it to {1}"
    error = error_of(*evaluate(mini, "--model", model))
    assert error == f"error: {model}: no such file" + hint.format("Neon_EDM_FFHQ.pkl", model)
    elsewhere = out.with_name("Neon_EDM_FFHQ.pkl")
    error = error_of("merge", "--base", elsewhere, "--selftrained", mini.base, "-w", 1, "--out", out)
    assert error == f"error: {elsewhere}: no such file" + hint.format("Neon_EDM_FFHQ.pkl", model)
    error = error_of(*evaluate(mini, "--ref", ref))
    assert error == f"error: {ref}: no such file" + hint.format("adm_in256_stats.npz", ref)
    argv = ["--network_pkl", mini.base, "--ref", ref, "--seeds", "0-3"]
    done = subprocess.run(
        [sys.executable, "edm/calculate_fid.py", *words(argv)],
        **{"cwd": ROOT, "capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {ref}: no such file" + hint.format("adm_in256_stats.npz", ref) + "\n"


# ---------------------------------------------------------------- how a line is read, and help


def test_a_grid_that_begins_with_a_minus(mini, out):
    """argparse would take -1,0,1 for an option."""
    for option in ("-w", "--w"):
        args = parse(words([*search(mini, out)[:-2], "--out", out, option, "-1,0,1"]), "neon")
        assert args.w == "-1,0,1"
    assert parse(words([*evaluate(mini), "-w", "-.5"]), "neon").w == -0.5
    line = ["merge", "--base", "a", "--selftrained", "b", "--out", "c"]
    assert parse([*line, "-w", "-1,0.5"], "neon").w == (-1.0, 0.5)
    with pytest.raises(SystemExit):
        parse([*line, "-w", "--dry_run"], "neon")  # another option is no number


def commands_of(help: str) -> list[str]:
    """The names under COMMAND."""
    return re.findall(r"^    ([\w-]+) ", help, flags=re.MULTILINE)


def test_every_help_has_examples_that_work(capsys):
    """Each example is a line that the parser takes as it is typed."""

    def help_of(*command):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        return capsys.readouterr().out

    commands = commands_of(help_of())
    assert {"merge", "extract-lora", "selftrain", "search", "reference"} <= set(commands)
    for command in commands:
        text = help_of(command).partition("\nexamples:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
        lines = [shlex.split(line) for line in text.splitlines()]
        assert lines, command
        for line in lines:
            assert "neon" in line or "neon.cli" in line
            start = line.index("neon.cli" if "neon.cli" in line else "neon") + 1
            assert line[start] == command
            parse(line[start:], "neon")


def test_a_missing_family_says_what_it_is_for(mini, capsys):
    command = evaluate(mini)
    del command[1:5]
    with pytest.raises(SystemExit):
        main(words(command))
    error = capsys.readouterr().err
    assert "required: --family (--family is one of edm, " in error and "sampling options of its own" in error
    with pytest.raises(SystemExit):
        main(["merge"])
    assert "sampling" not in capsys.readouterr().err


def test_completion_in_a_real_bash(tmp_path):
    script = tmp_path / "neon"
    script.write_text(neon_exit_0("--completion", "bash"))
    (tmp_path / "base.pth").touch()

    def completed(*typed):
        line = " ".join(f"'{word}'" for word in ("neon", *typed))
        code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(typed)}; COMPREPLY=();"
        code += ' $(complete -p neon | sed "s/.*-F \\([^ ]*\\).*/\\1/"); printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
        return done.stdout.split()

    assert completed("self") == ["selftrain"]
    assert {"--selftrained", "--selftrained_key"} == set(completed("merge", "--self"))
    assert completed("merge", "--base", "ba") == ["base.pth"]


def neon_exit_0(*argv):
    done = subprocess.run([sys.executable, "-m", "neon.cli", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    return done.stdout


def test_completion_needs_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "this needs shtab, of the extra terminal" in error_of("--completion", "bash")


# ---------------------------------------------------------------- presets


@pytest.fixture
def preset(mini, monkeypatch):
    """A row that needs no download."""
    base = str(mini.base)
    kappa = {"num_steps": 4, "rho": 5.0}
    row = Preset(
        **{"network": "digits", "base": base, "released": str(mini.snapshots[0]), "reference": "digits"},
        **{"synthetic": 4, "made_with": {"num_steps": 3}, "recipe": "digits", "micro_batch": 16},
        **{"sampling": kappa, "batch_size": 8, "w": "0,1", "grid": "rho=5,7", "fid": (2.0, 1.0), "rows": ("a", "b")},
    )
    monkeypatch.setitem(edm.family.presets, "small", row)
    return "--preset", "small"


def test_a_preset_stands_for_its_options(mini, preset, tmp_path):
    """Every command writes what it writes when each option is typed, and says in one line what was chosen."""
    edm_is, measure = ("--family", "edm"), ("--ref", mini.ref, *mini.features, "--metrics", "fid")
    brief, at = ("--data", mini.data, "--budget", 64, "--snapshot", 64), ("--seeds", "0-15", *measure)
    short, long = tmp_path / "short", tmp_path / "long"
    model, base = ("--model", mini.base), ("--base", mini.base)
    recipe = ("--recipe", "digits", "--micro_batch", 16)
    grid = ("--selftrained", mini.snapshots[0], *at)
    fixed = ("--num_steps", 4, "--batch_size", 8)
    said = neon("generate", *preset, "--out", short / "S")
    neon("generate", *edm_is, *model, "--num_steps", 3, "--seeds", "0-3", "--batch_size", 8, "--out", long / "S")
    options = f"--family edm --model {mini.base} --num_steps 3 --seeds 0-3 --batch_size 8"
    assert said == f"preset small: {options}\n"
    neon("selftrain", *preset, *brief, "--out", short / "run")
    neon("selftrain", *edm_is, *base, *recipe, *brief, "--out", long / "run")
    released = ("--model", mini.snapshots[0], *fixed, "--rho", 5)
    neon("evaluate", *preset, *at, "--out", short / "released.json")
    neon("evaluate", *edm_is, *released, *at, "--out", long / "released.json")
    neon("evaluate", *preset, *grid, "-w", 1, "--out", short / "merged.json")
    neon("evaluate", *edm_is, *base, *fixed, "--rho", 5, *grid, "-w", 1, "--out", long / "merged.json")
    neon("search", *preset, *grid, "--evaluations", 5, "--out", short / "search.jsonl")
    searched = ("--method", "surface", "-w", "0,1", "--grid", "rho=5,7", "--evaluations", 5)
    neon("search", *edm_is, *base, *fixed, *grid, *searched, "--out", long / "search.jsonl")
    neon("final", *preset, *at, "--search", short / "search.jsonl", "--out", short / "final.jsonl")
    neon("final", *edm_is, *base, *fixed, *at, "--search", short / "search.jsonl", "--out", long / "final.jsonl")

    def content(folder):
        texts = {name: text for name, text in files(folder).items() if not name.endswith("state.safetensors")}
        return {name: re.sub(rb'"seconds": [\d.]+', b"", text) for name, text in texts.items()}

    assert content(short) == content(long)
    assert {"S/dataset.json", "released.json", "merged.json", "search.jsonl", "final.jsonl"} <= content(short).keys()
    assert {json.loads(line)["rho"] for line in (short / "search.jsonl").read_text().splitlines()} == {5.3, 6.7, 7.0}


def test_what_is_given_overrides_a_preset(mini, preset, tmp_path):
    said = neon(
        "generate", *preset, "--num_steps", 2, "--seeds=7-8", "--model", mini.snapshots[0], "--out", tmp_path / "S"
    )
    assert said == "preset small: --family edm --batch_size 8\n"
    record = json.loads((tmp_path / "S" / "generate.json").read_text())
    assert (record["num_steps"], record["seeds"]) == (2, "7-8")
    measure = (
        "--ref",
        mini.ref,
        *mini.features,
        "--metrics",
        "fid",
        "--seeds",
        "0-7",
        "--selftrained",
        mini.snapshots[0],
    )

    def rows(name, *options):
        said = neon("search", *preset, "--selftrained", mini.snapshots[0], *measure, *options, "--out", tmp_path / name)
        assert "--grid" not in said.splitlines()[0]
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    assert {(row["rho"], row["w"]) for row in rows("value", "--rho", 6.5, "--method", "grid")} == {
        (6.5, 0.0),
        (6.5, 1.0),
    }
    one = rows(
        "one", "--grid", "num_steps=2,3", "--w=0", "--method", "grid"
    )  # no grid over rho, which is as in the evaluation
    assert {(row["num_steps"], row["rho"]) for row in one} == {(2, 5.0), (3, 5.0)}
    two = rows("two", "--grid", "num_steps=2,3", "--grid", "rho=6,8", "--w=0", "--method", "grid")
    assert {(row["num_steps"], row["rho"]) for row in two} == {(2, 6.0), (2, 8.0), (3, 6.0), (3, 8.0)}


def test_the_scripts_of_a_model_have_its_preset(monkeypatch):
    """`generate_dataset.py --out S`, `selftrain.py --data S --out RUN`, and nothing more."""
    asked = []
    monkeypatch.setattr("neon.cli.commands.run_generate", asked.append)
    monkeypatch.setattr("neon.cli.commands.run_train", asked.append)
    for folder, name in {
        "VAR/VAR_imagenet_256": "var_d16",
        "VAR/VAR_imagenet_512": "var_d36",
        "imm": "imm_t8",
        "flow": "flow_cifar10",
    }.items():
        for script in (("generate_dataset.py",), ("selftrain.py", "--data", "S")):
            monkeypatch.setattr(sys, "argv", [*script, "--out", "out"])
            runpy.run_path(str(ROOT / folder / script[0]), run_name="__main__")
        made, trained = asked[-2:]
        preset = find_preset(name)[1]
        assert preset.made_with.items() <= vars(made).items() and made.seeds == preset.seeds
        assert (trained.recipe, trained.micro_batch) == (preset.recipe, preset.micro_batch)
        assert str(made.model) == str(trained.base) == preset.base


def test_a_family_is_loaded_only_for_a_command_that_names_one():
    code = "import sys; from neon.cli import main; sys.argv[1:] = ['search', '--help']\n"
    code += "try: main()\nfinally: print([m for m in sys.modules if m.startswith(('edm', 'VAR', 'imm'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n") and "--preset" in done.stdout


# ---------------------------------------------------------------- as real processes


def test_a_program_that_fails(mini, tmp_path):
    command = evaluate(mini, "--model", tmp_path / "gone.safetensors")
    done = subprocess.run([BIN / "neon", *words(command)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'gone.safetensors'}: no such file\n"


def test_two_processes_that_fail(mini, tmp_path):
    """Both find the same error; one says it, and torchrun's report ends with it."""
    (done,) = torchrun(2, "-m", "neon.cli", *evaluate(mini, "--model", tmp_path / "gone.safetensors"), check=False)
    assert done.returncode == 1 and not done.stdout
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {tmp_path / 'gone.safetensors'}: no such file"
    ]
    assert "NeonError" not in done.stderr and "/neon/" not in done.stderr
    report = [line.strip() for line in done.stderr.splitlines() if line.strip(" =")]  # torchrun's own, of 25 lines
    assert report[-1] == f"traceback : error: {tmp_path / 'gone.safetensors'}: no such file"


def test_interrupt(mini, tmp_path):
    """Ctrl-C ends a run at once, quietly, with the status that shells expect; typed again, the run resumes."""
    out = tmp_path / "run"
    command = selftrain(mini, out, "--budget", 640_000, "--snapshot", 64, "--save_every", 64)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A suite that was started in the background ignores SIGINT, and so would its children.
    attend = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen([BIN / "neon", *words(command)], **pipes, **attend)
    deadline = time.monotonic() + 60
    while len(list(out.glob("snapshot-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    printed, complained = process.communicate(timeout=30)
    assert process.returncode == 130 and not printed and not complained
    assert time.monotonic() - sent < 15
    assert not list(out.glob(".*"))
    with open_weights(out / "state.safetensors") as state:
        assert 128 <= int(state.metadata["images"]) < 640_000


def test_importing_neon_is_cheap():
    """Neither the package nor its command load anything heavy before they must."""
    heavy = "torch", "torch_fidelity", "torchvision", "numpy", "scipy", "pandas", "safetensors"
    for module in ("neon", "neon.cli"):
        code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("[]\n", "")


# ---------------------------------------------------------------- the family's scripts


def script(monkeypatch, name, *argv):
    monkeypatch.setattr(sys, "argv", words([name, *argv]))
    monkeypatch.syspath_prepend(ROOT / "edm")  # as python does for a script
    runpy.run_path(str(ROOT / "edm" / name), run_name="__main__")


def test_merge_script(mini, tmp_path, monkeypatch):
    options = ("--base", mini.base, "--selftrained", mini.snapshots[1], "-w", 0.75, "--out")
    script(monkeypatch, "merge.py", *options, tmp_path / "script.safetensors")
    neon("merge", "--family", "edm", *options, tmp_path / "neon.safetensors")
    found = load_weights(tmp_path / "script.safetensors")
    base, trained = load_weights(mini.base), load_weights(mini.snapshots[1])
    assert (tmp_path / "script.safetensors").read_bytes() == (tmp_path / "neon.safetensors").read_bytes()
    for name, tensor in found.items():
        wanted = base[name] if name.endswith("resample_filter") else 1.75 * base[name] - 0.75 * trained[name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-5)


def test_fid_script(mini, tmp_path, monkeypatch, capsys):
    measuring = (*mini.measuring[2:], "--seeds", "0-31", "--metrics", "fid,is")
    script(monkeypatch, "calculate_fid.py", "--network_pkl", mini.base, *measuring, "--out", tmp_path / "script.json")
    printed, said = capsys.readouterr()
    assert printed.startswith("FID ")
    if not torch.cuda.is_available():
        wanted = r"no usable GPU: computing on the CPU; the first 32 images took \d+ s, all take about \d+ s\n"
        assert re.fullmatch(wanted, said)
        script(monkeypatch, "calculate_fid.py", "--network_pkl", mini.base, *measuring, "--device", "cpu")
        assert capsys.readouterr().err == ""  # as asked for
    neon("evaluate", "--family", "edm", "--model", mini.base, *measuring, "--out", tmp_path / "neon.json")
    found, wanted = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("script", "neon"))
    assert {k: v for k, v in found.items() if k != "seconds"} == {k: v for k, v in wanted.items() if k != "seconds"}


def test_grid_shows_what_final_compared(mini, out):
    rows = out.with_suffix(".jsonl")
    searched = out.with_name("search.jsonl")
    neon(*search(mini, searched))
    neon(*final(mini, rows, "--search", searched))
    neon("grid", "--family", "edm", "--final", rows, "--seeds", "0-4", "--columns", 3, "--out", out)
    sheets = {path.stem: np.array(Image.open(path)) for path in out.iterdir()}
    assert sheets.keys() == {"base", "selftrained", "neon"}
    assert all(sheet.shape == (20, 30) for sheet in sheets.values())  # 2 × 3 of 8 pixels and a frame, the last is white
    assert (sheets["base"][11:, 21:] == 255).all() and (sheets["base"][:10, :10] != 255).any()
    assert (sheets["base"] != sheets["selftrained"]).any()
    neon("generate", *mini.sampling, "--model", mini.base, "--seeds", "4", "--out", out.with_name("S"))
    (single,) = out.with_name("S").rglob("*.png")
    assert (np.array(Image.open(single)) == sheets["base"][11:19, 11:19]).all()


def test_grid_takes_only_final_rows_of_what_is_there(mini, out):
    searched, rows, other = (out.with_name(f"{name}.jsonl") for name in ("search", "final", "other"))
    neon(*search(mini, searched))
    neon(*final(mini, rows, "--search", searched))
    other.write_text(re.sub(r'"base_sha256": "\w{4}', '"base_sha256": "0000', rows.read_text()))
    grid = ("grid", "--seeds", "0-4", "--out", out)
    assert "not what `neon final` wrote" in error_of(*grid, "--family", "edm", "--final", searched)
    assert "rows of edm, not of imm" in error_of(*grid, "--family", "imm", "--final", rows)
    assert "its base_sha256 is not what it was" in error_of(*grid, "--family", "edm", "--final", other)
    assert not out.exists()
