"""`neon inspect` and `neon convert` on the golden pickles and a torch file."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from neon.cli import main
from neon.weights.checkpoint import load_weights, open_weights, save_safetensors

GOLDEN = Path(__file__).parent / "golden"
PICKLES = [GOLDEN / "edm" / "tiny_edm.pkl", GOLDEN / "edm" / "tiny_edm_torch2.pkl", GOLDEN / "imm" / "tiny_imm.pkl"]


@pytest.mark.parametrize("path", PICKLES, ids=lambda p: p.stem)
def test_convert_keeps_tensors_order_and_constructor(path, tmp_path):
    main(["convert", str(path), str(tmp_path / "out.safetensors")])
    with open_weights(path) as before, open_weights(tmp_path / "out.safetensors") as after:
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert before.metadata == after.metadata
        assert json.loads(after.metadata["init_kwargs"])["img_resolution"] == 8


def test_inspect_prints_format_tensors_arguments_and_digest(capsys):
    main(["inspect", str(PICKLES[0])])
    out = capsys.readouterr().out
    names = json.loads((GOLDEN / "edm" / "tiny_edm.json").read_text())["entries"]
    assert all(entry["name"] in out for entry in names)
    assert "format   pickle\nkey      ema\n" in out and "EDMPrecond" in out and '"label_dim": 10' in out
    assert hashlib.sha256(PICKLES[0].read_bytes()).hexdigest() in out


@pytest.fixture
def nested(tmp_path):
    """A file with an EMA, raw weights under a longer key, and something else."""
    state = {"a": torch.arange(3.0), "b": torch.arange(4)}
    raw = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"epoch": 3, "raw": {"net": raw}, "model_ema": state}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


KEYS = [((), "model_ema", 0), (("--key", "raw.net"), "raw.net", 1)]


@pytest.mark.parametrize(("options", "key", "first"), KEYS)
def test_convert_unwraps_a_nested_torch_file_and_prints_the_key(nested, capsys, options, key, first):
    out = nested.with_suffix(".safetensors")
    main(["convert", str(nested), str(out), *options])
    assert capsys.readouterr().out == f"{out}: from {nested} (key {key})\n"
    found = {name: tensor.tolist() for name, tensor in load_weights(out).items()}
    assert found == {"a": [first + i for i in range(3)], "b": [first + i for i in range(4)]}


@pytest.mark.parametrize(("options", "key", "first"), KEYS)
def test_inspect_prints_the_key(nested, capsys, options, key, first):
    main(["inspect", str(nested), *options])
    assert f"\nformat   torch\nkey      {key}\n" in capsys.readouterr().out


def test_flat_files_are_said_to_be_flat(tmp_path, capsys):
    out, flat = tmp_path / "out.safetensors", tmp_path / "flat.pth"
    torch.save({"a": torch.ones(2)}, flat)
    main(["convert", str(flat), str(out)])
    assert capsys.readouterr().out == f"{out}: from {flat} (flat)\n"
    for file, format in ((flat, "torch"), (out, "safetensors")):
        main(["inspect", str(file)])
        assert f"\nformat   {format}\nkey      none (flat)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "key", "message"),
    [
        ("x.pth", "model", "no dict of tensors at 'model'; it has 3 entries: epoch, raw, model_ema (choose one"),
        ("flat.safetensors", "model", "flat.safetensors: safetensors files are flat, there is no key 'model' in one"),
        (PICKLES[0], "model", "tiny_edm.pkl: this pickle has no entry 'model'"),
    ],
)
def test_a_key_that_is_not_there(nested, capsys, file, key, message):
    folder = nested.parent
    save_safetensors(folder / "flat.safetensors", {"a": torch.ones(1)})
    before = sorted(folder.iterdir())
    for command in (["inspect", str(folder / file)], ["convert", str(folder / file), str(folder / "out.safetensors")]):
        with pytest.raises(SystemExit, match="1"):
            main([*command, "--key", key])
        said, error = capsys.readouterr()
        assert said == "" and message in error and error.count("\n") == 1
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("out", ["x.pkl", "x.pth"])
def test_other_targets_are_refused(tmp_path, out, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["convert", str(PICKLES[0]), str(tmp_path / out)])
    assert capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- two checkpoints


def two(tmp_path, changes):
    """Files A and B of three layers; B as changed."""
    generator = torch.Generator().manual_seed(0)
    a = {f"net.{i}.{kind}": torch.randn(4, 5, generator=generator) for i in range(2) for kind in ("weight", "bias")}
    a |= {"head": torch.ones(4), "steps": torch.tensor(3), "mask": torch.full((2, 2), -torch.inf).triu(1)}
    b = {name: tensor for name, tensor in (a | changes(a)).items() if tensor is not None}
    save_safetensors(tmp_path / "a.safetensors", a)
    torch.save({"model_ema": b}, tmp_path / "b.pth")
    return a, b


def compared(tmp_path, capsys, *options):
    main(["inspect", str(tmp_path / "a.safetensors"), str(tmp_path / "b.pth"), *options])
    return [" ".join(text.split()) for text in capsys.readouterr().out.splitlines()]


def test_two_checkpoints_that_differ_in_kind(tmp_path, capsys):
    two(
        tmp_path,
        lambda a: {
            **{"net.0.weight": None, "more": torch.ones(2), "net.1.bias": torch.ones(5)},
            **{"head": a["head"].half(), "steps": torch.tensor(4)},
        },
    )
    lines = compared(tmp_path, capsys)
    assert lines[:7] == [
        f"A {tmp_path / 'a.safetensors'} (flat)",
        f"B {tmp_path / 'b.pth'} (key model_ema)",
        "only in A: net.0.weight",
        "only in B: more",
        "shapes differ: net.1.bias (4, 5) (5,)",
        "dtypes differ: head float32 float16",
        "not floating point, and different: steps",
    ]
    assert "48 0 100 % all: ‖B − A‖ / ‖A‖" in lines and "moved most" not in lines


def test_two_checkpoints_that_are_apart(tmp_path, capsys):
    """Drift by group and over all, what moved most, how much did not; infinities that agree are part of no norm."""
    a, b = two(tmp_path, lambda a: {"net.0.weight": 1.5 * a["net.0.weight"], "net.1.bias": 1.1 * a["net.1.bias"]})
    lines = compared(tmp_path, capsys)
    start = lines.index("values drift unmoved") + 1

    def ratio(*names):
        r, s = (torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (a, b))
        return f"{(s - r).norm() / r.norm():.4g}"

    assert lines[start : start + 7] == [
        f"20 {ratio('net.0.weight')} 0 % net.0.weight",
        "20 0 100 % net.0.bias",
        "20 0 100 % net.1.weight",
        f"20 {ratio('net.1.bias')} 0 % net.1.bias",
        "4 0 100 % head",
        "4 0 100 % mask",
        f"88 {ratio('net.0.weight', 'net.1.bias')} 54.5 % all: ‖B − A‖ / ‖A‖",
    ]
    top = lines.index("moved most")
    assert lines[top + 1 : top + 4] == ["0.5 net.0.weight", "0.1 net.1.bias", ""]


def test_many_tensors_are_grouped(tmp_path, capsys):
    state = {f"blocks.{i}.{kind}.weight": torch.full((2,), float(i + 1)) for i in range(20) for kind in "ab"}
    save_safetensors(tmp_path / "a.safetensors", state)
    torch.save(
        {name: 2 * tensor if "blocks.3." in name else tensor for name, tensor in state.items()}, tmp_path / "b.pth"
    )
    lines = compared(tmp_path, capsys)
    start = lines.index("values drift unmoved") + 1
    assert lines[start : start + 20] == [f"4 {int(i == 3)} {0 if i == 3 else 100} % blocks.{i}" for i in range(20)]


def test_a_merge_and_what_it_was_made_from(tmp_path, capsys):
    two(tmp_path, lambda a: {"head": 2 * a["head"]})
    out = tmp_path / "neon.safetensors"
    files = ("--base", str(tmp_path / "a.safetensors"), "--selftrained", str(tmp_path / "b.pth"))
    main(["merge", *files, "-w", "0.75", "--out", str(out)])
    for other, symbol in (("a.safetensors", "θ_r"), ("b.pth", "θ_s")):
        capsys.readouterr()
        main(["inspect", str(tmp_path / other), str(out)])
        said = capsys.readouterr().out
        assert "\nB: neon_w  0.75\n" in said and f"\nA is the {symbol} that B was merged from\n" in said
        assert all(hashlib.sha256(path.read_bytes()).hexdigest() in said for path in (tmp_path / other, out))
    main(["inspect", str(out)])
    assert "\nneon_w  0.75\n" in capsys.readouterr().out


def test_keys_of_two_checkpoints(tmp_path, capsys):
    two(tmp_path, lambda a: {})
    assert compared(tmp_path, capsys, "--other_key", "model_ema")[1].endswith("(key model_ema)")
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", str(tmp_path / "a.safetensors"), str(tmp_path / "b.pth"), "--other_key", "model"])
    assert "no dict of tensors at 'model'" in capsys.readouterr().err
