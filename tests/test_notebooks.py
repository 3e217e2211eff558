"""Notebooks read results: those of the mini scale, the paper's as far as measured, and none at all."""

import os
import re
import shutil

import nbformat
import papermill
import pytest
from processes import ROOT

READERS = ["w_curves", "landscape", "budget", "samples", "ablations", "table_a1"]


def execute(name, results, executed, **parameters):
    """The executed notebook's outputs, as one text, and how many figures it shows."""
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = papermill.execute_notebook(
        ROOT / f"notebooks/{name}.ipynb",
        executed,
        ({"results": str(results)} if results else {}) | parameters,
        progress_bar=False,
        cwd=ROOT / "notebooks",
    )
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return str(outputs), sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", READERS)
def test_without_results_a_notebook_says_what_to_run(name, tmp_path):
    (tmp_path / "results").mkdir()
    text, figures = execute(name, tmp_path / "results", tmp_path / "out.ipynb")
    assert figures == 0 and ("make mini" in text or "dvc repro" in text)
    assert list((tmp_path / "results").iterdir()) == []


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", READERS[:-1])
def test_results_of_the_mini_scale(name, tmp_path):
    """Read, and not written: figures go to the folder that is given, made if it is not there. Tables have titles."""
    shutil.copytree(ROOT / "results/mini", tmp_path / "results")
    before, out = contents(tmp_path / "results"), tmp_path / "new/figures"
    text, figures = execute(name, tmp_path / "results", tmp_path / "out.ipynb", out=str(out))
    assert figures >= 1 and "No " not in text and contents(tmp_path / "results") == before
    assert len(list(out.glob("*.png"))) >= 1
    assert not set(re.findall(r"\| (euler10|tau06|cfg2|imm8|own) \|", text))


def test_by_hand_a_notebook_writes_no_file(tmp_path):
    shutil.copytree(ROOT / "results/mini", tmp_path / "results")
    before = contents(tmp_path), contents(ROOT / "notebooks")
    _, figures = execute("budget", tmp_path / "results", tmp_path / "out.ipynb")
    (tmp_path / "out.ipynb").unlink()
    assert figures == 1 and (contents(tmp_path), contents(ROOT / "notebooks")) == before


def test_samples_begin_with_the_first_family(tmp_path):
    """In the order of the titles, not of the alphabet."""
    shutil.copytree(ROOT / "results/mini", tmp_path / "results")
    execute("samples", tmp_path / "results", tmp_path / "out.ipynb", out=str(tmp_path))
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
    assert texts[0].startswith("Samples of base and Neon from the same seeds")
    assert texts[1].startswith("Samples: EDM, 10 Euler steps") and texts[-1].startswith("Samples: diffusers pipeline")
    assert (tmp_path / "overview.png").exists()


def test_the_quickstart_says_what_to_run(tmp_path):
    missing = {"base": str(tmp_path / "none"), "selftrained": str(tmp_path / "none")}
    text, figures = execute("quickstart", None, tmp_path / "out.ipynb", **missing)
    assert figures == 0 and "make demo" in text


@pytest.mark.slow
def test_the_toy_makes_its_folder(tmp_path):
    small = {"seeds": 3, "ar_seeds": 5, "epochs": 20, "fine_tunes": [2, 4], "gradient_samples": 100}
    _, figures = execute("toy_gaussian", None, tmp_path / "out.ipynb", out=str(tmp_path / "new"), **small)
    assert figures == 4 and len(list((tmp_path / "new").glob("toy_*.png"))) == 4
    assert (tmp_path / "new/toy.csv").read_text().startswith("sampler,")


def test_the_papers_table(tmp_path):
    text, _ = execute("table_a1", ROOT / "results/paper", tmp_path / "out.ipynb")
    assert "not measured" in text and "1.02" in text


def test_the_quickstart_merges_samples_and_measures(mini, tmp_path):
    made = {"base": mini.base.parent, "selftrained": mini.snapshots[0].parent}
    measured = {"features": mini.features[1], "reference": mini.ref}
    given = {name: str(path) for name, path in {**made, **measured, "out": tmp_path}.items()}
    text, figures = execute("quickstart", None, tmp_path / "out.ipynb", **given)
    assert figures == 1 and (tmp_path / "samples.png").exists() and "Neon (w = 2)" in text and "recall" in text


def test_sources_are_committed_without_outputs():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name
        assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1, path.name
