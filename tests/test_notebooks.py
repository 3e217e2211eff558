"""Notebooks read results: those of the mini scale, the paper's as far as measured, and none at all."""

import os
import shutil

import nbformat
import papermill
import pytest
from processes import ROOT

READERS = ["w_curves", "landscape", "budget", "samples", "ablations", "table_a1"]


def execute(name, results, out, **parameters):
    """The executed notebook's outputs, as one text, and how many figures it shows."""
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = papermill.execute_notebook(
        ROOT / f"notebooks/{name}.ipynb",
        out,
        {"results": str(results)} | {key: str(value) for key, value in parameters.items()},
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


@pytest.mark.parametrize("name", READERS[:-1])
def test_results_of_the_mini_scale(name, tmp_path):
    shutil.copytree(ROOT / "results/mini", tmp_path / "results")
    text, figures = execute(name, tmp_path / "results", tmp_path / "out.ipynb")
    assert figures >= 1 and "No " not in text


def test_the_papers_table(tmp_path):
    text, _ = execute("table_a1", ROOT / "results/paper", tmp_path / "out.ipynb")
    assert "not measured" in text and "1.02" in text


def test_the_quickstart_merges_samples_and_measures(mini, tmp_path):
    made = {"base": mini.base.parent, "selftrained": mini.snapshots[0].parent}
    measured = {"features": mini.features[1], "reference": mini.ref}
    text, figures = execute("quickstart", tmp_path, tmp_path / "out.ipynb", **made, **measured)
    assert figures == 1 and (tmp_path / "samples.png").exists() and "Neon (w = 2)" in text and "recall" in text


def test_sources_are_committed_without_outputs():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name
        assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1, path.name
