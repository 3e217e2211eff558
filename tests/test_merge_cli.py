"""`neon merge` as the user runs it: a process, its files, its exit status and what it says."""

import argparse
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neon.cli import main
from neon.weights.checkpoint import open_weights

NEON = shutil.which("neon", path=Path(sys.prefix) / "bin")
EDM = Path(__file__).parent / "golden" / "edm"


def state(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(300, 1000, generator=g),
        "bias": torch.randn(5, generator=g).half(),
        "steps": torch.tensor(seed),
        "mask": torch.full((2, 2), -torch.inf).triu(1),
        "last": torch.randn(3, generator=g, dtype=torch.float64),
    }


BASE, SELFTRAINED = state(1), state(2)
SIDES = {"base": "base.pth", "self-trained": "new.pth"}


def expected(w):
    wide = {
        name: ((1 + w) * BASE[name].double() - w * SELFTRAINED[name].double()) for name in ("weight", "bias", "last")
    }
    return {name: wide[name].to(t.dtype) if name in wide else t for name, t in BASE.items()}


def check(found, w):
    assert set(found) == set(BASE)
    for name, wanted in expected(w).items():
        assert found[name].dtype == wanted.dtype
        torch.testing.assert_close(found[name], wanted, rtol=2e-3 if name == "bias" else 1e-6, atol=1e-6)


def neon(*args):
    """Run the installed command. Returns exit status, lines on stdout, lines on stderr."""
    done = subprocess.run([NEON, *map(str, args)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def merges(*args):
    """Run `neon merge`, which must succeed without a warning. Returns the lines it prints, spaces made single."""
    status, said, complained = neon("merge", *args)
    assert (status, complained) == (0, [])
    return [re.sub(" +", " ", line).strip() for line in said]


def everything(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# ---------------------------------------------------------------- every format


def test_safetensors_with_an_old_torch_file(tmp_path):
    base, new, out = (tmp_path / name for name in ("base.safetensors", "new.pth", "sub/out.safetensors"))
    save_file(BASE, base, {"format": "pt"})
    wrapped = {"model": BASE, "inner": {"net": dict(reversed(SELFTRAINED.items()))}}
    torch.save(wrapped, new, _use_new_zipfile_serialization=False)
    files = ("--base", base, "--selftrained", new, "--selftrained_key", "inner.net", "--out", out)
    said = merges(*files, "-w", 1.5)
    assert said[:2] == [f"base {base} (flat)", f"self-trained {new} (key inner.net)"]
    check(load_file(out), 1.5)
    with safe_open(out, "pt") as f:
        assert f.metadata()["format"] == "pt"
    assert everything(tmp_path / "sub") == ["out.safetensors"]


def test_shards(tmp_path):
    for folder, tensors in (("base", BASE), ("new", SELFTRAINED)):
        (tmp_path / folder).mkdir()
        names = list(tensors)
        parts = {f"m-{i}.safetensors": names[i::2] for i in range(2)}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, tmp_path / folder / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (tmp_path / folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    new, out = tmp_path / "new" / "m.safetensors.index.json", tmp_path / "neon-w0.5"
    merges("--base", tmp_path / "base", "--selftrained", new, "-w", 0.5, "--out", out)
    assert everything(out) == everything(tmp_path / "base")
    check(load_file(out / "m-0.safetensors") | load_file(out / "m-1.safetensors"), 0.5)


def test_nested_torch(tmp_path):
    args = argparse.Namespace(lr=1e-4, out="runs/1")
    for name, tensors in (("base", BASE), ("new", SELFTRAINED)):
        tree = {"model": {"weight": torch.zeros(1)}, "model_ema": tensors, "args": args, "epoch": 7}
        torch.save(tree, tmp_path / f"{name}.pth")
    files = ("--base", tmp_path / "base.pth", "--selftrained", tmp_path / "new.pth", "--out", tmp_path / "out.pth")
    said = merges(*files, "-w", "-0.5")
    assert said[:2] == [f"{side} {tmp_path / file} (key model_ema)" for side, file in SIDES.items()]
    assert everything(tmp_path) == ["base.pth", "new.pth", "out.pth"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        tree = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(tree) == ["model", "model_ema", "args", "epoch", "neon"]
    assert tree["neon"] == {"neon_w": "-0.5"} | digests(tmp_path, "base.pth", "new.pth")
    assert tree["args"] == args and tree["epoch"] == 7 and not tree["model"]["weight"].any()
    assert list(tree["model_ema"]) == list(BASE)
    check(tree["model_ema"], -0.5)


@pytest.mark.parametrize(("family", "source"), [((), "tiny_edm.pkl"), (("--family", "edm"), "edm")])
def test_pickle(tmp_path, family, source):
    """A pickle itself says which of its tensors are buffers."""
    pkl, new, out = EDM / "tiny_edm.pkl", tmp_path / "new.safetensors", tmp_path / "out.safetensors"
    wanted = {name: torch.from_numpy(array) for name, array in np.load(EDM / "tiny_edm_state.npz").items()}
    save_file({name: tensor + 1 for name, tensor in wanted.items()}, new)
    said = merges("--base", pkl, "--selftrained", new, "-w", 2, "--out", out, *family)
    assert said[0] == f"base {pkl} (key ema)" and f"4 16 from the base: buffers of {source}" in said
    found = load_file(out)
    buffers = {name for name in wanted if name.endswith("resample_filter")}
    assert set(found) == set(wanted) and buffers
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor if name in buffers else tensor - 2, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- errors, in a process


def fails(tmp_path, message, *args):
    """Exit status 1 and one line, nothing written."""
    before = everything(tmp_path)
    status, said, errors = neon(*args)
    assert (status, said, len(errors)) == (1, [], 1), errors
    assert errors[0].startswith("error: ") and re.search(message, errors[0])
    assert everything(tmp_path) == before


def test_an_error_in_the_last_tensor(tmp_path):
    torch.save(BASE, tmp_path / "base.pth")
    torch.save(SELFTRAINED | {"last": torch.tensor([1.0, torch.nan, 1.0])}, tmp_path / "new.pth")
    (tmp_path / "out.pth").write_bytes(b"old")
    files = ("--base", tmp_path / "base.pth", "--selftrained", tmp_path / "new.pth", "--out", tmp_path / "out.pth")
    fails(tmp_path, "last: not finite in the self-trained model", "merge", *files, "-w", 1)
    assert (tmp_path / "out.pth").read_bytes() == b"old"


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_a_file_that_wants_to_run_a_program(tmp_path):
    torch.save(BASE, tmp_path / "base.pth")
    torch.save({"model": SELFTRAINED, "args": Evil(tmp_path / "canary")}, tmp_path / "new.pth")
    files = ("--base", tmp_path / "base.pth", "--selftrained", tmp_path / "new.pth", "--out", tmp_path / "out.pth")
    fails(tmp_path, r"new.pth: refused, it asks for posix.system", "merge", *files, "-w", 1)
    (tmp_path / "new.pth").write_bytes(pickle.dumps({"args": Evil(tmp_path / "canary")}))
    fails(tmp_path, r"new.pth: refused", "merge", *files, "-w", 1)


def test_a_truncated_file(tmp_path):
    save_file(BASE, tmp_path / "base.safetensors")
    content = (tmp_path / "base.safetensors").read_bytes()
    (tmp_path / "new.safetensors").write_bytes(content[:-1000])
    files = ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "new.safetensors")
    out = tmp_path / "out.safetensors"
    fails(tmp_path, r"new.safetensors: not a readable", "merge", *files, "--out", out, "-w", 1)


# ---------------------------------------------------------------- the same command, called


@pytest.fixture
def files(tmp_path):
    save_file(BASE, tmp_path / "base.safetensors", {"a": "b"})
    save_file(SELFTRAINED, tmp_path / "new.safetensors")
    return {"--base": "base.safetensors", "--selftrained": "new.safetensors", "--out": "out.safetensors", "-w": "1"}


def words(tmp_path, files):
    return [part for name, value in files.items() for part in (name, str(value if name == "-w" else tmp_path / value))]


def call(tmp_path, files):
    main(["merge", *words(tmp_path, files)])


@pytest.mark.parametrize("w", ["1.5", "-1", "-0.25", "+2", "1e-3", ".5"])
def test_w(tmp_path, files, w):
    call(tmp_path, files | {"-w": w})
    check(load_file(tmp_path / "out.safetensors"), float(w))


def test_w0_copies_the_base(tmp_path, files):
    call(tmp_path, files | {"-w": "0"})
    call(tmp_path, files | {"-w": "0", "--base": "out.safetensors", "--out": "again.safetensors"})
    found = load_file(tmp_path / "out.safetensors")
    for name, tensor in BASE.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()
    again = load_file(tmp_path / "again.safetensors")
    assert all(again[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in BASE.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--base": "gone.pth"}, "gone.pth: no such file"),
        ({"--selftrained": "gone"}, "gone: no such file"),
        ({"--selftrained": "text.bin"}, "text.bin: unknown kind of checkpoint"),
        ({"--selftrained": "text.pth"}, "text.pth: "),
        ({"--selftrained": "."}, "5 files of weights, need one: base.safetensors, fewer.safetensors"),
        ({"--selftrained": "fewer.safetensors"}, "last and 1 more: missing in the self-trained model"),
        ({"--base": "fewer.safetensors"}, "last and 1 more: missing in the base"),
        ({"--selftrained": "shape.safetensors"}, r"last: shape \(3,\) in the base, \(4,\) in the self-trained model"),
        ({"-w": "nan"}, "w must be finite, not nan"),
        ({"-w": "inf"}, "w must be finite, not inf"),
        ({"-w": "1e9"}, "bias: not finite in the merge with w = 1000000000.0 in torch.float16"),
        ({"--out": "out.pth"}, r"out.pth: weights from base.safetensors are written as .safetensors"),
        ({"--out": "out"}, r"out: weights from base.safetensors are written as .safetensors"),
        ({"--out": "text.pth/out.safetensors"}, "text.pth"),
        ({"--out": "folder.safetensors"}, "folder.safetensors: Is a directory"),
    ],
)
def test_errors(tmp_path, files, capsys, change, message):
    for name in ("text.bin", "text.pth"):
        (tmp_path / name).write_text("<html>\nnot\nfound\n")
    (tmp_path / "folder.safetensors").mkdir()
    save_file({name: BASE[name] for name in ("weight", "bias", "steps")}, tmp_path / "fewer.safetensors")
    save_file(SELFTRAINED | {"last": torch.ones(4)}, tmp_path / "shape.safetensors")
    before = everything(tmp_path)
    with pytest.raises(SystemExit) as caught:
        call(tmp_path, files | change)
    said, error = capsys.readouterr()
    assert (caught.value.code, said, error.count("\n")) == (1, "", 1), error
    assert error.startswith("error: ") and re.search(message, error)
    assert everything(tmp_path) == before


# ---------------------------------------------------------------- what it says it did


def test_counts_and_drift(tmp_path, files, capsys):
    """Of 300,010 values, 300,008 differ and are merged; a mask's infinities are not part of any norm."""
    call(tmp_path, files)
    said = re.sub(" +", " ", capsys.readouterr().out).splitlines()
    assert said[2:-3] == [
        " tensors values",
        " 3 300,008 merged",
        " 1 1 from the base: not floating point",
        " 1 4 from the base: equal on both sides",
    ]
    merged = ("weight", "bias", "last")
    r, s = (torch.cat([tensors[name].double().flatten() for name in merged]) for tensors in (BASE, SELFTRAINED))
    assert said[-3] == f"drift ‖θ_s − θ_r‖ / ‖θ_r‖ = {(s - r).norm() / r.norm():.4g} over what was merged"
    same = sum(int((BASE[name] == SELFTRAINED[name]).sum()) for name in merged) + 4
    assert same == 4 and said[-2] == "unmoved < 0.1 % of the weights are the same in θ_r and θ_s"  # 4 of 300,012
    assert said[-1] == f"w 1 written to {tmp_path / 'out.safetensors'}"


def test_the_share_that_did_not_move(tmp_path, capsys):
    """A frozen layer, a half of a layer that moved, a counter that is no weight: 5 of 8 weights."""
    torch.save({"frozen": torch.ones(4), "half": torch.ones(4), "n": torch.tensor(1)}, tmp_path / "base.pth")
    moved = torch.tensor([1.0, 2.0, 2.0, 2.0])
    torch.save({"frozen": torch.ones(4), "half": moved, "n": torch.tensor(2)}, tmp_path / "new.pth")
    call(tmp_path, {"--base": "base.pth", "--selftrained": "new.pth", "--out": "out.pth", "-w": "1"})
    assert "\nunmoved  62.5 % of the weights are the same in θ_r and θ_s\n" in capsys.readouterr().out


# ---------------------------------------------------------------- several w, nothing written, not onto the inputs


def test_several_w(tmp_path, files, capsys):
    call(tmp_path, files | {"--out": "sub/neon-{w}.safetensors", "-w": "-0.5,1,1.5"})
    assert everything(tmp_path / "sub") == [f"neon-{w}.safetensors" for w in ("-0.5", "1.5", "1")]
    for w in (-0.5, 1, 1.5):
        check(load_file(tmp_path / "sub" / f"neon-{w}.safetensors"), w)
    said = capsys.readouterr().out
    assert said.count("drift") == 1 and said.count("written to") == 3


@pytest.mark.parametrize(("out", "w"), [("out.safetensors", "0.5,1"), ("{w}.safetensors", "1,1.0")])
def test_several_w_need_several_files(tmp_path, files, capsys, out, w):
    before = everything(tmp_path)
    with pytest.raises(SystemExit):
        call(tmp_path, files | {"--out": out, "-w": w})
    said, error = capsys.readouterr()
    assert (said, error.count("\n")) == ("", 1) and "2 values of w need as many files: write {w} in --out" in error
    assert everything(tmp_path) == before


def test_dry_run(tmp_path, files, capsys):
    """Everything is printed, nothing is written; what would fail fails."""
    several = files | {"--out": "{w}.safetensors", "-w": "0.5,1"}
    call(tmp_path, several)
    wet = capsys.readouterr().out
    for w in ("0.5", "1"):
        (tmp_path / f"{w}.safetensors").unlink()
    before = everything(tmp_path)
    main(["merge", *words(tmp_path, several), "--dry_run"])
    assert capsys.readouterr().out == wet.replace("written to", "not written, would be")
    with pytest.raises(SystemExit):
        main(["merge", *words(tmp_path, files | {"-w": "1e9"}), "--dry_run"])
    assert everything(tmp_path) == before


@pytest.mark.parametrize("side", ["base", "selftrained"])
@pytest.mark.parametrize("how", ["same", "relative", "link", "hard link"])
def test_the_inputs_are_not_written_over(tmp_path, files, capsys, monkeypatch, side, how):
    source = tmp_path / files[f"--{side}"]
    out = tmp_path / "out.safetensors"
    if how == "same":
        out = source
    elif how == "relative":
        (tmp_path / "sub").mkdir()
        monkeypatch.chdir(tmp_path / "sub")
        out = Path("..", source.name)
    elif how == "link":
        out.symlink_to(source)
    else:
        out.hardlink_to(source)
    before = source.read_bytes()
    with pytest.raises(SystemExit):
        main(["merge", *words(tmp_path, {k: v for k, v in files.items() if k != "--out"}), "--out", str(out)])
    said, error = capsys.readouterr()
    assert (said, error) == ("", f"error: {out}: --out is the file of --{side}; choose another\n")
    assert source.read_bytes() == before


# ---------------------------------------------------------------- what the file says of itself


def digests(tmp_path, base, new):
    found = {
        side: hashlib.sha256((tmp_path / name).read_bytes()) for side, name in (("base", base), ("selftrained", new))
    }
    return {f"neon_{side}_sha256": digest.hexdigest() for side, digest in found.items()}


def test_metadata_of_safetensors(tmp_path, files):
    """What holds for the merge is kept, what held for the base alone is not; a merge of a merge has its own w."""
    network = {
        "init_kwargs": "{}",
        "class_name": "Net",
        "format": "pt",
        "vae_sha256": "0f",
        "config": "{}",
        "family": "x",
    }
    trained = {"images": "640", "data_images": "128", "global_step": "7", "epoch": "3", "modelspec.hash_sha256": "0x1"}
    save_file(BASE, tmp_path / "base.safetensors", network | trained)
    wanted = {"neon_w": "1.5"} | digests(tmp_path, files["--base"], files["--selftrained"])
    call(tmp_path, files | {"-w": "1.5"})
    with safe_open(tmp_path / "out.safetensors", "pt") as f:
        assert f.metadata() == network | wanted
    wanted = {"neon_w": "-0.25"} | digests(tmp_path, "out.safetensors", files["--selftrained"])
    call(tmp_path, files | {"--base": "out.safetensors", "--out": "again.safetensors", "-w": "-0.25"})
    with safe_open(tmp_path / "again.safetensors", "pt") as f:
        assert f.metadata() == network | wanted


def drift(capsys):
    return float(re.search(r"‖θ_r‖ = (\S+)", capsys.readouterr().out)[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_drift_of_large_empty_and_transposed_tensors(tmp_path, capsys, dtype):
    """Norms of 2.5 million numbers, of numbers whose squares are out of range, of a base of zeros."""
    files = {name: f"{name[2:]}.pth" for name in ("--base", "--selftrained", "--out")} | {"-w": 1}
    for r, s, wanted in ((1.0, 1.5, 0.5), (0.0, 1.0, float("inf"))):
        base = {"a": torch.full((1_250_000, 2), r, dtype=dtype).t(), "none": torch.empty(0, dtype=dtype)}
        torch.save(base, tmp_path / "base.pth")
        torch.save({name: torch.full_like(t, s) for name, t in base.items()}, tmp_path / "selftrained.pth")
        call(tmp_path, files)
        assert drift(capsys) == wanted
    if dtype != torch.float16:
        torch.save({"a": torch.full((9,), 2.0**100, dtype=dtype)}, tmp_path / "base.pth")
        torch.save({"a": torch.full((9,), 2.0**101, dtype=dtype)}, tmp_path / "selftrained.pth")
        call(tmp_path, files)
        assert drift(capsys) == 1.0


def test_nothing_to_merge_is_said(tmp_path, files, capsys):
    call(tmp_path, files | {"--selftrained": "base.safetensors"})
    said, warning = capsys.readouterr()
    assert re.search(r"^ +0 +0  merged$", said, re.MULTILINE) and "drift" not in said
    assert warning == "warning: nothing was merged: the result is the base\n"


# ---------------------------------------------------------------- buffers


@pytest.fixture
def statistics(tmp_path):
    """A base and a self-trained model with batch normalisation: the README's variances 1 → 2.5 among others."""
    base = {
        "net.weight": torch.ones(2),
        "norm.weight": torch.ones(2),
        "norm.running_mean": torch.zeros(2),
        "norm.running_var": torch.ones(2),
        "norm.num_batches_tracked": torch.tensor(5),
    }
    changed = {"net.weight": 1.5, "norm.weight": 1.25, "norm.running_mean": 2, "norm.running_var": 2.5}
    new = {name: torch.full_like(tensor, changed.get(name, 7)) for name, tensor in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(new, tmp_path / "new.safetensors")
    return base


def test_running_statistics_that_were_merged_are_named(tmp_path, files, statistics, capsys):
    """In one line, with the option that keeps them, which does."""
    call(tmp_path, files)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert "norm.running_mean, norm.running_var;" in warning and "num_batches_tracked" not in warning
    assert load_file(tmp_path / "out.safetensors")["norm.running_var"].tolist() == [-0.5, -0.5]

    option, pattern = shlex.split(warning.partition("add ")[2])
    main(["merge", *words(tmp_path, files), option, pattern])
    said, warning = capsys.readouterr()
    assert warning == "" and re.search(rf"^ +2 +4  from the base: --buffers {re.escape(pattern)}$", said, re.MULTILINE)
    found = load_file(tmp_path / "out.safetensors")
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(found[name], statistics[name])
    assert found["net.weight"].tolist() == [0.5, 0.5] and found["norm.weight"].tolist() == [0.75, 0.75]


def test_the_warning_stays_one_short_line(tmp_path, files, capsys):
    for name, value in (("base", 1.0), ("new", 2.0)):
        tensors = {f"block{i}.norm.running_var": torch.tensor([value]) for i in range(500)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    call(tmp_path, files)
    warning = capsys.readouterr().err
    assert "block0.norm.running_var, " in warning and " and 497 more; " in warning and len(warning) < 300


LOOKS = {
    True: [
        *("bn.running_mean", "running_var", "x.running_std", "a.num_batches_tracked", "bn.moving_variance"),
        *("bn.stored_mean", "mapping.w_avg", "synthesis.b4.magnitude_ema", "vq.ema_cluster_size", "q.embed_avg"),
        *("conv.weight_u", "parametrizations.weight.0._v", "model_ema.num_updates", "linear.u0", "fq.min_val"),
    ],
    False: [
        *("conv.weight", "bias", "running.weight", "model_ema.weight", "attn.w_u", "lora_A", "blocks.0.mean_head"),
        *("conv.weight_v", "conv.weight_g", "ema.diffusion_modelinput_blocks00weight", "gamma", "pos_embed"),
    ],
}


@pytest.mark.parametrize("warns", LOOKS)
def test_names_that_look_like_running_statistics(tmp_path, files, capsys, warns):
    for name in LOOKS[warns]:
        save_file({"net": torch.ones(1), name: torch.ones(1)}, tmp_path / "base.safetensors")
        save_file({"net": torch.zeros(1), name: torch.zeros(1)}, tmp_path / "new.safetensors")
        call(tmp_path, files)
        assert (name in capsys.readouterr().err) == warns, name


def test_weight_v_of_spectral_and_of_weight_normalisation(tmp_path, files, capsys):
    """The same name is a vector of the power iteration in the one and a learned direction in the other."""
    for other, warned in (("weight_u", True), ("weight_g", False)):
        for file, value in (("base", 1.0), ("new", 2.0)):
            tensors = {f"conv.{name}": torch.tensor([value]) for name in ("weight_v", other)}
            save_file(tensors, tmp_path / f"{file}.safetensors")
        call(tmp_path, files)
        assert ("conv.weight_v" in capsys.readouterr().err) == warned


def test_statistics_that_agree_are_not_warned_of(tmp_path, files, capsys):
    save_file({"net": torch.ones(1), "running_var": torch.ones(1)}, tmp_path / "base.safetensors")
    save_file({"net": torch.zeros(1), "running_var": torch.ones(1)}, tmp_path / "new.safetensors")
    call(tmp_path, files)
    assert capsys.readouterr().err == ""


def test_family_and_pattern_together(tmp_path, files, capsys):
    """Each says what it keeps; what both name is the family's."""
    for file, value in (("base", 1.0), ("new", 2.0)):
        tensors = {name: torch.tensor([value]) for name in ("a.resample_filter", "a.scale", "a.weight")}
        save_file(tensors, tmp_path / f"{file}.safetensors")
    main(["merge", *words(tmp_path, files), "--family", "edm", "--buffers", "scale|filter"])
    said = re.sub(" +", " ", capsys.readouterr().out)
    for line in (" 1 1 merged", " 1 1 from the base: buffers of edm", " 1 1 from the base: --buffers scale|filter"):
        assert line in said.splitlines()
    found = load_file(tmp_path / "out.safetensors")
    assert {name: tensor.item() for name, tensor in found.items()} == {
        "a.resample_filter": 1.0, "a.scale": 1.0, "a.weight": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"--buffers '\(' is not a regular expression: missing \), unterminated subpattern at position 0"),
        ("*", "is not a regular expression"),
        ("a{99999999999999999999}", "is not a regular expression"),
        ("running_var$", "--buffers 'running_var\\$' matches no name in .*base.safetensors"),
        ("Weight", "matches no name"),
    ],
)
def test_patterns_that_are_wrong(tmp_path, files, capsys, pattern, message):
    before = everything(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["merge", *words(tmp_path, files), "--buffers", pattern])
    said, error = capsys.readouterr()
    assert (caught.value.code, said, error.count("\n")) == (1, "", 1), error
    assert error.startswith("error: ") and re.search(message, error)
    assert everything(tmp_path) == before


# ---------------------------------------------------------------- keys


def constant(value):
    return {"weight": torch.full((2,), float(value))}


@pytest.fixture
def trees(tmp_path):
    """model_ema and model in the base, model alone in what was fine-tuned, both in another, and a flat file."""
    torch.save({"model": constant(0), "model_ema": constant(1)}, tmp_path / "base.pth")
    torch.save({"model": constant(3), "epoch": 4}, tmp_path / "raw.pth")
    torch.save({"model": constant(3), "model_ema": constant(2)}, tmp_path / "both.pth")
    torch.save(constant(5), tmp_path / "flat.pth")
    return {"--base": "base.pth", "--out": "out.pth", "-w": "1"}


KEYS = {  # self-trained model, options → which keys are merged; None: refused
    ("both.pth",): ("model_ema", "model_ema", 2 * 1 - 2),
    ("raw.pth",): None,
    ("raw.pth", "--key=model"): ("model", "model", 2 * 0 - 3),
    ("both.pth", "--key=model"): None,
    ("both.pth", "--key=model_ema"): ("model_ema", "model_ema", 2 * 1 - 2),
    ("both.pth", "--selftrained_key=model"): None,
    ("both.pth", "--key=model", "--selftrained_key=model"): ("model", "model", 2 * 0 - 3),
    ("raw.pth", "--key=model_ema", "--selftrained_key=model"): ("model_ema", "model", 2 * 1 - 3),
    ("flat.pth",): ("model_ema", "flat", 2 * 1 - 5),
    ("flat.pth", "--key=model"): ("model", "flat", 2 * 0 - 5),
}


@pytest.mark.parametrize("case", KEYS, ids=" ".join)
def test_keys(tmp_path, trees, capsys, case):
    """An average is not merged with raw weights unless both keys are given, and what is merged is printed."""
    selftrained, *options = case
    command = ["merge", *words(tmp_path, trees | {"--selftrained": selftrained}), *options]
    if KEYS[case]:
        main(command)
        *keys, wanted = KEYS[case]
        said = re.sub(" +", " ", capsys.readouterr().out).splitlines()
        base, new = ("flat" if key == "flat" else f"key {key}" for key in keys)
        assert said[0] == f"base {tmp_path / 'base.pth'} ({base})"
        assert said[1] == f"self-trained {tmp_path / selftrained} ({new})"
        tree = torch.load(tmp_path / "out.pth")
        assert tree[keys[0]]["weight"].tolist() == [wanted] * 2
    else:
        with pytest.raises(SystemExit):
            main(command)
        said, error = capsys.readouterr()
        assert (said, error.count("\n")) == ("", 1) and not (tmp_path / "out.pth").exists()
        assert error.startswith("error: ") and "--key and --selftrained_key" in error
        assert "(key model)" in error and "(key model_ema)" in error


def test_a_pickle_is_an_average(tmp_path, capsys):
    """Its key is 'ema', which another file's 'model' is not."""
    with open_weights(EDM / "tiny_edm.pkl") as weights:
        state = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"model": state}, tmp_path / "raw.pth")
    command = ["merge", "--base", str(EDM / "tiny_edm.pkl"), "--selftrained", str(tmp_path / "raw.pth"), "-w", "1"]
    command += ["--out", str(tmp_path / "out.safetensors")]
    with pytest.raises(SystemExit, match="1"):
        main(command)
    assert "(key ema)" in capsys.readouterr().err
    main([*command, "--key", "ema", "--selftrained_key", "model"])
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--key=model",), "base.safetensors: safetensors files are flat, there is no key 'model' in one"),
        (("--selftrained_key=a.b",), "new.safetensors: safetensors files are flat, there is no key 'a.b' in one"),
    ],
)
def test_a_key_of_a_flat_file(tmp_path, files, capsys, options, message):
    with pytest.raises(SystemExit, match="1"):
        main(["merge", *words(tmp_path, files), *options])
    assert message in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()


# ---------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two models of 500 MB in both formats; the widest tensor has 50 MB."""
    folder = tmp_path_factory.mktemp("large")
    for i, name in enumerate(("base", "new")):
        g = torch.Generator().manual_seed(i)
        tensors = {f"block{b}": torch.randn(4096, 1024, generator=g) for b in range(27)}
        tensors["embedding"] = torch.randn(12288, 1024, generator=g)
        save_file(tensors, folder / f"{name}.safetensors")
        torch.save(tensors, folder / f"{name}.pth")
    yield folder
    shutil.rmtree(folder)


def memory(*args):
    """Run the command; its peak memory in MB: all that is resident, and that without the pages of mapped files."""
    peak = {"VmHWM": 0, "RssAnon": 0}  # not ru_maxrss, which starts from the parent's
    child = subprocess.Popen([NEON, *map(str, args)])
    while child.poll() is None:
        for key, kilobytes in re.findall(r"(VmHWM|RssAnon):\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text()):
            peak[key] = max(peak[key], int(kilobytes))
        time.sleep(0.01)
    assert child.returncode == 0
    return peak["VmHWM"] / 1024, peak["RssAnon"] / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_merge_does_not_need_the_memory_of_a_model(large, suffix):
    """.pth files are mapped: their pages are counted in the total, but the system takes them back when it needs to."""
    files = [large / f"{name}{suffix}" for name in ("base", "new", "out")]
    total, anonymous = memory("merge", "--base", files[0], "--selftrained", files[1], "--out", files[2], "-w", 1.5)
    print(f"\n{suffix}: peak {total:.0f} MB, {anonymous:.0f} MB of it not mapped files")
    assert anonymous < 800
    if suffix == ".safetensors":
        assert total < 1500
    out = large / f"out{suffix}"
    assert out.stat().st_size == pytest.approx(files[0].stat().st_size, rel=1e-3)
