"""`neon inspect` and `neon convert` on the golden pickles and a torch file."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from neon.cli import main
from neon.weights.checkpoint import load_weights, open_weights

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


def test_inspect_tells_format_tensors_arguments_and_digest(capsys):
    main(["inspect", str(PICKLES[0])])
    out = capsys.readouterr().out
    names = json.loads((GOLDEN / "edm" / "tiny_edm.json").read_text())["entries"]
    assert all(entry["name"] in out for entry in names)
    assert "format   pickle" in out and "EDMPrecond" in out and '"label_dim": 10' in out
    assert hashlib.sha256(PICKLES[0].read_bytes()).hexdigest() in out


def test_convert_unwraps_a_nested_torch_file(tmp_path):
    state = {"a": torch.randn(3), "b": torch.arange(4)}
    torch.save({"epoch": 3, "model_ema": state}, tmp_path / "x.pth")
    main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "x.safetensors")])
    assert {k: v.tolist() for k, v in load_weights(tmp_path / "x.safetensors").items()} == {
        k: v.tolist() for k, v in state.items()
    }


@pytest.mark.parametrize("out", ["x.pkl", "x.pth"])
def test_other_targets_are_refused(tmp_path, out, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["convert", str(PICKLES[0]), str(tmp_path / out)])
    assert capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir())
