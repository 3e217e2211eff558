"""Tables from rows, and the notebook that draws FID against B."""

import json
from pathlib import Path

import matplotlib
import pandas as pd

from report.tables import best_by_budget, read_rows

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "budget.ipynb"


def row(w, fid, budget, size):
    told = {"key": f"{w} {budget} {size}", "family": "imm", "cfg_scale": 1.5, "n": 4, "versions": {}}
    return told | {"w": w, "fid": fid, "budget": budget, "num_synthetic": size}


def searched(folder):
    """Rows of two seeds: a base, two budgets on each of two sizes of S."""
    files = {}
    for seed in (0, 1):
        rows = [row(0.0, 10 + seed, 0, 0)]
        for size in (100, 200):
            for budget in (64, 128):
                rows += [row(w, 9 - w - budget / size + seed, budget, size) for w in (-1.0, 0.5, 1.0)]
        path = folder / f"{seed}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        files[path] = {"setting": "imm4", "seed": seed}
    return read_rows(files)


def test_the_best_w_of_every_budget_and_size(tmp_path):
    table = searched(tmp_path)
    assert (table["cfg"] == 1.5).all()  # guidance has one name
    best = best_by_budget(table)
    assert len(best) == 2 * (1 + 2 * 2)
    assert best[best["budget"] > 0]["w"].eq(1.0).all()  # w = -1 is no merge of Neon's
    (line,) = best[(best["seed"] == 1) & (best["budget"] == 128) & (best["num_synthetic"] == 200)].to_dict("records")
    assert line["fid"] == 9 - 1 - 128 / 200 + 1


def executed(results: Path, capsys) -> str:
    matplotlib.use("Agg")
    namespace = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace["results"] = str(results)
    return capsys.readouterr().out


def test_the_notebook_draws_what_there_is(tmp_path, capsys):
    best_by_budget(searched(tmp_path)).to_csv(tmp_path / "budget.csv", index=False)
    pd.Series({"imm4": "IMM"}).to_json(tmp_path / "titles.json")
    assert "imm4" in executed(tmp_path, capsys)
    assert (tmp_path / "budget.png").stat().st_size > 5000


def test_the_notebook_without_results_does_not_fail(tmp_path, capsys):
    executed(tmp_path, capsys)
    assert not (tmp_path / "budget.png").exists()
