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
