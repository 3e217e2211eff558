"""A family of the user's own: found by file, module or entry point, completed by defaults, refused in one line."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, error_of, neon
from sets import write_images

from neon import NeonError
from neon.family import get_family
from neon.measure.rows import Rows, images_of
from neon.own_family import NEEDED, OwnFamily
from neon.weights.checkpoint import save_safetensors

EXAMPLE = ROOT / "examples" / "my_family.py"
# The least that is a family: one weight, which is the grey of every image.
LEAST = """
import torch
from neon.family import Recipe
from neon.sampling import to_uint8
from neon.weights.checkpoint import load_weights
recipes = {"tune": Recipe(batch=4, lr=1e-3, budget=8, snapshot=8)}
class Grey(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.grey = torch.nn.Parameter(torch.zeros(()))
def load(path, *, device, precision="float32"):
    model = Grey()
    model.load_state_dict(load_weights(path))
    return model.to(device)
def sample(model, seeds, labels):
    return to_uint8(model.grey.detach() + torch.zeros(len(seeds), 1, 8, 8, device=model.grey.device))
def draw(model, n, generator, *, images):
    return None
def loss(model, images, labels, draws):
    return (images.float() / 127.5 - 1 - model.grey).square().mean()
"""


@pytest.fixture
def least(tmp_path, monkeypatch):
    """A working folder with grey.py, the least family, and with grey.safetensors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("grey.py").write_text(LEAST)
    save_safetensors("grey.safetensors", {"grey": torch.tensor(0.25)})
    return tmp_path


# ---------------------------------------------------------------- how it is found


def test_a_file_is_found_under_the_name_that_its_rows_have(least, monkeypatch):
    family = get_family("./grey.py")
    assert family.name == "grey.py" and get_family(family.name) is family is get_family(str(least / "grey.py"))
    monkeypatch.chdir(ROOT)
    assert get_family(str(least / "grey.py")).name == str(least / "grey.py")


def test_two_files_of_one_name_are_two_families(least):
    for folder, lr in (("a", "1e-3"), ("b", "5e-3")):
        Path(folder).mkdir()
        Path(folder, "grey.py").write_text(LEAST.replace("1e-3", lr))
    assert [get_family(f"{folder}/grey.py").recipes["tune"].lr for folder in "ab"] == [1e-3, 5e-3]


def test_a_module_of_the_working_folder_is_found(least):
    Path("a_package").mkdir()
    Path("a_package", "grey.py").write_text(LEAST)
    family = get_family("a_package.grey")
    assert family.name == "a_package.grey" and family is get_family("a_package.grey")


def test_an_entry_point_is_found(least, monkeypatch):
    point = importlib.metadata.EntryPoint("grey", "an_installed_module", "neon.families")
    found = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr("neon.own_family.entry_points", lambda **wanted: found.select(**wanted))
    Path("an_installed_module.py").write_text(LEAST)
    sys.path.append(str(least))
    assert get_family("grey").name == "grey"
    with pytest.raises(NeonError, match="know edm, flow, var, xar, imm, diffusers, grey; your own"):
        get_family("gray")


# ---------------------------------------------------------------- defaults


def test_a_family_may_leave_out_what_has_a_default(least):
    family = get_family("grey.py")
    model = family.load("grey.safetensors", device="cpu")
    assert family.weights(model) is model and family.metadata(model) == {} and family.networks == family.presets == {}
    assert family.labels(model, torch.arange(2)) is None and family.Sampling() == family.Loading()
    assert family.is_buffer("layer.running_mean") and not family.is_buffer("layer.weight")
    hollow = family.hollow(Path("grey.safetensors"))
    assert hollow.grey.is_meta and family.countable({"a": 1}) == ({"a": 1}, "")
    with pytest.raises(NeonError, match=r"grey\.py: it has no create"):
        family.create("any", device="cpu")


def test_types_of_options_may_be_text(least):
    more = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    options = "\n@dataclass\nclass Sampling:\n    steps: int = 3\n"
    Path("grey.py").write_text(more + LEAST.replace("labels):", "labels, *, steps=3):", 1) + options)
    neon("generate", "--family", "grey.py", "--model", "grey.safetensors", "--seeds", "0-1", "--steps", 4, "--out", "S")
    assert '"steps": 4' in Path("S/generate.json").read_text()


def test_modules_next_to_the_file_can_be_imported(least):
    Path("grey_parts.py").write_text(LEAST)
    Path("whole.py").write_text("from grey_parts import *\n")
    assert get_family("whole.py").recipes


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "family, text, said",
    [
        ("gone.py", None, "gone.py: no such file"),
        ("bad.py", "1 / 0", "bad.py: not a family, importing it raises ZeroDivisionError: division by zero"),
        ("bad.py", "raise SystemExit", "bad.py: not a family, importing it raises SystemExit"),
        ("bad.py", "import nothing_here", "importing it raises ModuleNotFoundError: No module named 'nothing_here'"),
        ("bad.py", "def f(:", "bad.py: not a family, importing it raises SyntaxError"),
        ("bad.py", "", f"bad.py: not a family, it lacks {', '.join(NEEDED)} (docs/own-family.md says"),
        ("bad.py", LEAST.replace("def loss", "def los"), "it lacks loss ("),
        ("bad.py", LEAST + "loss = 1\n", "loss must be a function"),
        ("bad.py", LEAST.replace("draw(model, n, gen", "draw(model, gen"), "draw does not take n ("),
        ("bad.py", LEAST + "recipes = {'a': 1}\n", "recipes must be of neon.family.Recipe"),
        ("bad.py", LEAST + "recipes = 3\n", "recipes must be a dict"),
        ("bad.py", LEAST + "Sampling = 3\n", "Sampling must be a dataclass"),
        ("no.module", None, "unknown family 'no.module': no module of that name"),
        ("json.tool", None, "json.tool: not a family, it lacks recipes"),
        (
            "gan",
            None,
            "unknown family 'gan' (know edm, flow, var, xar, imm, diffusers; your own: path/to/file.py",
        ),
    ],
)
def test_what_is_no_family_ends_in_one_line(tmp_path, monkeypatch, family, text, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if text is not None:
        Path(family).write_text(text)
    line = error_of("generate", "--family", family, "--model", "x", "--seeds", "0", "--out", "S")
    assert said in line and not Path("S").exists()


def test_options_need_defaults(least):
    options = "\nfrom dataclasses import dataclass\n@dataclass\nclass Sampling:\n    steps: int\n"
    Path("grey.py").write_text(LEAST + options)
    with pytest.raises(NeonError, match=r"Sampling\.steps needs a default"):
        get_family("grey.py")


# ---------------------------------------------------------------- the example, as its page has it


def test_the_example_is_short_and_its_page_shows_all_of_it():
    text, page = EXAMPLE.read_text(), (ROOT / "docs" / "own-family.md").read_text()
    assert len(text.splitlines()) < 80
    shown = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    missing = [line for line in text.splitlines()[1:] if line.strip() and line not in shown]
    assert missing == []


def test_the_four_commands_on_the_example(mini, tmp_path, monkeypatch):
    """train → generate → selftrain → search → final → merge → grid; a row finds its family again."""
    monkeypatch.chdir(ROOT)
    family, measuring = ("--family", "examples/my_family.py"), ("--ref", mini.ref, *mini.features, "--metrics", "fid")
    short = ("--budget", 256, "--snapshot", 256)
    base, tuned, rows = (tmp_path / name for name in ("base", "tuned", "final.jsonl"))
    neon("train", *family, "--network", "digits", "--recipe", "base", "--data", mini.data, *short, "--out", base)
    neon("generate", *family, "--model", base, "--seeds", "0-63", "--out", tmp_path / "S")
    neon("selftrain", *family, "--base", base, "--recipe", "tune", "--data", tmp_path / "S", *short, "--out", tuned)
    models = ("--base", base, "--selftrained", tuned, "-w", "-1,0,1")
    neon("search", *family, *models, "--seeds", "100-139", *measuring, "--out", tmp_path / "search.jsonl")
    neon("final", *family, "--base", base, "--search", tmp_path / "search.jsonl", "--seeds", "200-239", *measuring,
         "--out", rows)  # fmt: skip
    found = {row["role"]: row for row in Rows(rows, write=False).rows.values()}
    assert found["base"]["family"] == "examples/my_family.py" and found["selftrained"]["w"] == -1
    assert found["base"]["fid"] != found["selftrained"]["fid"]
    images = images_of(found["base"], torch.arange(3), 2, "cpu")
    assert images.shape == (3, 1, 8, 8)
    neon("grid", *family, "--final", rows, "--seeds", "0-3", "--out", tmp_path / "sheets")
    assert len(list((tmp_path / "sheets").glob("*.png"))) == 3
    merged = tmp_path / "neon.safetensors"
    snapshots = [next(folder.glob("snapshot-*")) for folder in (base, tuned)]
    neon("merge", *family, "--base", snapshots[0], "--selftrained", snapshots[1], "-w", 1, "--out", merged)
    line = neon("evaluate", *family, "--model", merged, "--seeds", "200-239", *measuring)
    assert "FID" in line
    assert isinstance(get_family("examples/my_family.py"), OwnFamily)


def test_what_the_example_costs_is_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ("--recipe", "tune", "--data", "S", "--out", tmp_path / "out", "--dry_run", "1")
    said = neon("train", "--family", "examples/my_family.py", "--network", "digits", *words)
    inputs, width, images = 65, 128, 6_400
    products = inputs * width + width * width + width * (inputs - 1)
    found = float(re.search(r"compute +([\d.,e+-]+) PFLOP", said)[1].replace(",", ""))
    # Forward, gradients of weights, and of inputs except the first layer's, which reach the embedding: all three.
    assert found == pytest.approx(images * 2 * 3 * products / 1e15, rel=0.01)


def test_a_merge_that_is_only_tried_writes_nothing(least):
    save_safetensors("other.safetensors", {"grey": torch.tensor(0.5)})
    models = ("--base", "grey.safetensors", "--selftrained", "other.safetensors", "-w", 1, "--out", "out.safetensors")
    assert (
        "would be" in neon("merge", "--family", "grey.py", *models, "--dry_run")
        and not Path("out.safetensors").exists()
    )


def test_images_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    data = write_images(tmp_path / "S", (1, 4, 4), 8, 10)
    words = ("--network", "digits", "--recipe", "base", "--data", data, "--out", tmp_path / "out")
    line = error_of("train", "--family", "examples/my_family.py", *words)
    assert "images are (1, 4, 4), the network is trained on (1, 8, 8)" in line
