"""Tables from rows, their command lines, and the notebooks that draw them."""

import io
import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from processes import BIN, ROOT, neon
from sets import write_images

import report.copies
from neon import NeonError
from neon.measure.features import Extractor, load_extractor
from neon.measure.manifold import around_real
from neon.measure.metrics import load_reference
from neon.measure.rows import images_of
from report.metrics import curve, metrics
from report.table_a1 import main as write_table_a1
from report.tables import (
    CURVES,
    as_csv,
    best_by_budget,
    chosen,
    compared,
    copies_table,
    ends,
    ends_table,
    final_table,
    markdown,
    read_rows,
    rows_of,
    summarise,
    table_of,
)


def row(w, fid, budget, size):
    facts = {"key": f"{w} {budget} {size}", "family": "imm", "cfg_scale": 1.5, "n": 4, "versions": {}, "seconds": 1.0}
    return facts | {"w": w, "fid": fid, "budget": budget, "num_synthetic": size}


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def searched(folder):
    """Rows of two seeds: a base, two budgets on each of two sizes of S."""
    files = {}
    for seed in (0, 1):
        rows = [row(0.0, 10 + seed, 0, 0)]
        for size in (100, 200):
            for budget in (64, 128):
                rows += [row(w, 9 - w - budget / size + seed, budget, size) for w in (-1.0, 0.5, 1.0)]
        files[write(folder / f"{seed}.jsonl", rows)] = {"setting": "imm4", "seed": seed}
    return read_rows(files)


def paper_search():
    """10 752 rows: 59 budgets, 13 weights, 14 guidances, one seed. All merges of the first B diverged, and far ones."""
    weights, guidances = [round(0.4 * i, 1) for i in range(1, 14)], [round(1.3 + i / 10, 1) for i in range(14)]
    rows = [row(0.0, 8 + (g - 1.7) ** 2, 0, 0) | {"cfg_scale": g} for g in guidances]
    for i in range(1, 60):
        for w in weights:
            for g in guidances:
                fid = math.inf if i == 1 or w > 5 else 3 + (w - 1.6) ** 2 + (g - 1.9) ** 2 + ((i - 35) / 20) ** 2
                rows.append(row(w, fid, 64 * i, 100) | {"cfg_scale": g})
    return [{**r, "key": str(i)} for i, r in enumerate(rows)]


def final_rows(w, base=10.0, trained=20.0, neon=8.0):
    """What `neon final` writes for one seed: w = 0 for Neon is the base."""
    points = {"base": (0.0, base), "selftrained": (-1.0, trained), "neon": (w, neon if w else base)}
    return [
        {**row(at, fid, 64 if at else 0, 100 if at else 0), "key": f"{role} x", "role": role}
        for role, (at, fid) in points.items()
    ]


def finals(w, setting="imm4", **fids):
    """Of seeds that chose these w; a tenth of FID apart."""
    parts = [table_of(final_rows(value, **fids)).assign(seed=seed) for seed, value in enumerate(w)]
    table = pd.concat(parts, ignore_index=True).assign(setting=setting)
    return table.assign(fid=table["fid"] + table["seed"] / 10)


# ---------------------------------------------------------------- tables of a search


def test_the_best_w_of_every_budget_and_size(tmp_path):
    table = searched(tmp_path)
    assert (table["cfg"] == 1.5).all() and "cfg_scale" not in table  # guidance has one name
    best = best_by_budget(table)
    assert len(best) == 2 * (1 + 2 * 2)
    assert best[best["budget"] > 0]["w"].eq(1.0).all()  # w = -1 is no merge of Neon's
    (line,) = best[(best["seed"] == 1) & (best["budget"] == 128) & (best["num_synthetic"] == 200)].to_dict("records")
    assert line["fid"] == 9 - 1 - 128 / 200 + 1


def test_tables_of_a_search_of_the_papers_size(tmp_path):
    path = write(tmp_path / "0.jsonl", paper_search())
    table = read_rows({path: {"setting": "imm_t1", "seed": 0}})
    best = best_by_budget(table)
    assert len(table) == 10_752 and best["budget"].tolist() == [64 * i for i in range(60)]
    assert best["fid"].iloc[:3].tolist() == pytest.approx([8, math.inf, 3 + (33 / 20) ** 2])
    assert (best["w"].iloc[35], best["cfg"].iloc[35]) == (1.6, 1.9)
    again = pd.read_csv(io.StringIO(as_csv(best)))
    assert again["fid"].tolist() == pytest.approx(best["fid"].tolist(), rel=1e-4)  # infinity, too
    shown = ends(best)
    assert shown["budget"].tolist() == [0, 64, 64 * 35, 64 * 59]
    assert shown["fid"].iloc[2] == pytest.approx(3) and shown["w"].iloc[2] == "1.6"


def test_ends_of_a_few_budgets(tmp_path):
    best = best_by_budget(searched(tmp_path))
    shown = ends(best)
    at = shown[["setting", "num_synthetic", "budget"]].to_numpy().tolist()
    assert at == [["imm4", *at] for at in [(0, 0), (100, 64), (100, 128), (200, 64), (200, 128)]]
    assert shown["fid"].tolist() == pytest.approx([10.5, 7.86, 7.22, 8.18, 7.86])
    table = ends_table(best, {"imm4": "IMM, 4 steps"})
    assert list(table) == ["setting", "|S|", "B", "best FID", "its w"] and set(table["setting"]) == {"IMM, 4 steps"}
    assert table["its w"].tolist() == ["none", "1", "1", "1", "1"]


def test_a_curve_has_the_best_row_at_each_w():
    best = curve(table_of(paper_search()))
    assert best["w"].tolist() == [0, *(round(0.4 * i, 1) for i in range(1, 13))]  # 5.2 diverged everywhere
    assert best["fid"].iloc[4] == pytest.approx(3) and best["cfg"].iloc[4] == 1.9 and best["budget"].iloc[4] == 64 * 35
    assert np.isfinite(best["fid"]).all() and "precision" not in best
    with pytest.raises(NeonError, match="no finite FID"):
        curve(table_of([row(1.0, math.inf, 64, 100)]))


# ---------------------------------------------------------------- tables of final rows


@pytest.mark.parametrize(
    ("w", "text"),
    [
        ([1.5], "1.5"),
        ([1.0, 1.0, 1.0], "1"),
        ([2.0, 1.0, 1.0], "1–2, median 1"),
        ([0.0, 0.0], "none"),
        ([0.0, 1.0, 0.0, 0.5, 0.0], "0–1, median 0 (none in 3 of 5)"),
        ([0.5, 0.0, 1.0], "0–1, median 0.5 (none in 1 of 3)"),
    ],
)
def test_w_has_one_form(w, text):
    final = finals(w)
    assert chosen(w) == text
    assert final_table(final)["w*"].tolist() == [text]
    (line,) = summarise(final).to_dict("records")
    assert (line["w_star"], line["w_lo"], line["w_hi"]) == (np.median(w), min(w), max(w))


def test_neon_is_the_base_where_no_w_is_better():
    final = pd.concat([finals([0.0] * 3), finals([0.0, 2.0, 2.0], "imm8")])
    none, some = summarise(final).to_dict("records")
    assert none["fid_neon"] == none["fid_base"] == pytest.approx(10.1)
    assert none["fid_selftrained"] == pytest.approx(20.1)
    assert none["gain"] == none["gain_lo"] == none["gain_hi"] == 0
    assert some["gain"] == pytest.approx(4 / 3) and some["gain_hi"] - some["gain"] == pytest.approx(2.868, abs=1e-3)
    first, second = final_table(final).to_dict("records")
    assert first["FID Neon"] == first["FID base"] == "10.1 ± 0.25" and first["gain"] == "0 ± 0"
    assert first["FID w = −1"] == "20.1 ± 0.25" and second["setting"] == "imm8"


def test_one_seed_has_no_interval():
    final = finals([1.0])
    (line,) = summarise(final).to_dict("records")
    assert (line["gain"], line["num_images"], line["cfg_star"]) == (2, 4, 1.5)
    assert math.isnan(line["gain_lo"]) and math.isnan(line["gain_hi"])
    (line,) = final_table(final).to_dict("records")
    assert line["FID Neon"] == "8" and line["gain"] == "2" and line["precision"] == ""


def test_tables_have_titles_and_the_guidance_of_either_model():
    final = finals([1.0, 2.0])
    final.loc[(final["role"] == "neon") & (final["seed"] == 1), "cfg"] = 2
    (line,) = final_table(final, {"imm4": "IMM, 4 steps"}, guidance=True).to_dict("records")
    assert (line["setting"], line["γ of base"], line["γ of Neon"]) == ("IMM, 4 steps", "1.5", "1.5–2, median 1.75")
    assert "γ of base" not in final_table(final)
    copies = pd.DataFrame({"setting": 4, "role": ["base", "neon"] * 2, "copies": [0.01, 0.02, 0.03, 0.04]})
    table = copies_table(copies, {"4": "Four"})
    assert list(table) == ["setting", "model", "mean, %", "greatest, %"]
    assert table.to_numpy().tolist() == [["Four", "base (w = 0)", 2.0, 3.0], ["Four", "Neon (w*)", 3.0, 4.0]]
    assert markdown(pd.DataFrame({"|S|": [1]})).startswith("| \\|S\\| |\n")


def test_tables_say_how_every_metric_moved():
    """Of base and Neon, means over seeds; no column where nobody measured, no number where a setting did not."""
    plain, measured = finals([1.0, 2.0], "imm8"), finals([1.0, 2.0])
    neon = measured["role"] == "neon"
    values = {"recall": (0.876, 0.955), "density": (1.2, 0.9), "kid": (0.0123, 0.0045), "authpct": (60, 75.5)}
    for metric, (before, after) in values.items():
        measured[metric] = np.where(neon, after, before) + measured["seed"] * 0.0002 - 0.0001
    assert list(final_table(plain).columns[-3:]) == ["gain", "precision", "recall"]
    table = final_table(pd.concat([plain, measured]))
    assert list(table.columns[-6:]) == ["gain", "precision", "recall", "density", "KID", "AuthPct"]
    assert table.iloc[0, -4:].tolist() == [""] * 4
    assert table.iloc[1, -4:].tolist() == ["0.876 → 0.955", "1.200 → 0.900", "0.0123 → 0.0045", "60.0 → 75.5"]
    lines = summarise(pd.concat([plain, measured]))
    assert list(lines.columns[lines.columns.get_loc("recall_neon") :]) == [
        *("recall_neon", "density_base", "density_neon", "coverage_base", "coverage_neon", "kid_base", "kid_neon"),
        *("num_images", "seconds"),
    ]
    first, second = lines.to_dict("records")
    assert (second["density_base"], second["density_neon"]) == pytest.approx((1.2, 0.9))
    assert (second["kid_base"], second["kid_neon"]) == pytest.approx((0.0123, 0.0045))
    assert math.isnan(first["density_base"]) and math.isnan(second["coverage_base"])


def test_files_of_tables_hold_the_metrics_of_the_rows(tmp_path, run):
    """And no empty columns where the rows are older."""
    (tmp_path / "titles.yaml").write_text("titles: {imm4: Four}")
    command = ("report.tables", "--rows", tmp_path / "rows", "--titles", tmp_path / "titles.yaml", "--out", tmp_path)
    heads = {}
    for name, more in {"old": {}, "new": {"coverage": 0.5, "mind": 2.0, "density": 0.9}}.items():
        write(tmp_path / "rows/search/imm4/0.jsonl", [row(0.0, 10, 0, 0) | more, row(1.0, 8, 64, 100) | more])
        write(tmp_path / "rows/final/imm4/0.jsonl", [line | more for line in final_rows(1.0)])
        assert run(*command)[0] == 0
        heads[name] = {file: pd.read_csv(tmp_path / file).columns.tolist() for file in ("final.csv", "search.csv")}
    assert heads["old"] == {"final.csv": ["role", *CURVES], "search.csv": CURVES}
    for file, head in heads["new"].items():
        assert head == [*heads["old"][file], "density", "coverage", "mind"]
    assert "| 0.900 → 0.900 | 0.500 → 0.500 | 2 → 2 |" in (tmp_path / "table.md").read_text()


def test_models_are_compared_within_a_seed():
    """A tenth apart between the settings in each seed: an interval of width 0, though the seeds differ by more."""
    final = pd.concat([finals([1.0] * 3), finals([1.0] * 4, "imm8", neon=8.1)])
    table = compared(
        final, [(("imm8", "neon"), ("imm4", "neon")), (("imm4", "base"), ("imm4", "neon"))], {"imm4": "Four"}
    )
    assert table.iloc[:, :4].to_numpy().tolist() == [
        ["imm8: Neon (w*)", "8.25", "Four: Neon (w*)", "8.1"],
        ["Four: base (w = 0)", "10.1", "Four: Neon (w*)", "8.1"],
    ]
    assert [text.split(" ")[0] for text in table.iloc[:, 4]] == ["0.1", "2"]
    assert float(table.iloc[0, 4].split(" ")[2]) < 1e-9


def test_rows_of_a_final_evaluation_are_complete():
    final = finals([1.0, 1.0])
    for wrong, found in ((final.iloc[:-1], 0), (pd.concat([final, final.iloc[-1:]]), 2)):
        for table in (summarise, final_table):
            with pytest.raises(NeonError, match=f"imm4, seed 1: {found} rows of role neon, not 1"):
                table(wrong)


def test_metrics_by_role(tmp_path):
    diverged = {**row(0.0, math.inf, 0, 0), "key": "other x", "role": "other", "precision": math.nan}
    rows = [*final_rows(1.0), diverged]
    found = metrics(table_of(rows_of(write(tmp_path / "0.jsonl", rows))))
    assert found["neon"] == {"fid": 8.0, "w": 1.0, "cfg": 1.5, "budget": 64}
    assert found["selftrained"]["fid"] == 20 and found["other"]["fid"] == math.inf and "precision" not in found["other"]
    released = tmp_path / "imm.json"
    released.write_text(json.dumps(row(0.0, 2.5, 0, 0)))
    assert metrics(table_of(rows_of(released))) == {"released": {"fid": 2.5, "w": 0.0, "cfg": 1.5, "budget": 0}}


# ---------------------------------------------------------------- command lines


@pytest.fixture
def run(monkeypatch, capsys):
    """`python -m MODULE …` in this process → exit status, stdout, stderr."""

    def run(module, *words):
        monkeypatch.setattr("sys.argv", [module, *map(str, words)])
        monkeypatch.delitem(sys.modules, module, raising=False)
        status = 0
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_the_tables_of_a_folder(tmp_path, run):
    for seed, w in enumerate((1.0, 0.0)):
        base, *others = [row(0.0, 10, 0, 0), row(-1.0, 5, 64, 100), row(1.0, math.inf, 64, 100), row(2.0, 9, 64, 100)]
        write(tmp_path / f"rows/search/imm4/{seed}.jsonl", [base, *others])
        write(tmp_path / f"rows/final/imm4/{seed}.jsonl", final_rows(w))
    (tmp_path / "titles.yaml").write_text("titles: {other: Other, imm4: 'IMM, 4 steps'}")
    command = ("--titles", tmp_path / "titles.yaml", "--out", tmp_path / "out")
    status, out, error = run("report.tables", "--rows", tmp_path / "rows", *command)
    assert status == 0, error
    assert out.splitlines()[2].startswith("| IMM, 4 steps | 2 | 0–1, median 0.5 (none in 1 of 2) | 20 ± 0 | 10 ± 0 |")
    tables = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert len(tables) == 9
    assert len(pd.read_csv(tables["curves.csv"])) == len(pd.read_csv(tables["best.csv"])) == 0  # searched by a grid
    search = pd.read_csv(tables["search.csv"])
    assert search["fid"].tolist() == [10, 5, math.inf, 9] * 2 and search["cfg"].eq(1.5).all()
    assert pd.read_csv(tables["budget.csv"])["fid"].tolist() == [10, 9] * 2
    summary = pd.read_csv(tables["summary.csv"])
    assert summary[["w_star", "w_lo", "w_hi", "fid_neon"]].to_numpy().tolist() == [[0.5, 0, 1, 9]]


def predicted(path: Path, seed: int):
    """What a search by a surface writes next to its rows."""
    write(path, [row(0.0, 10, 0, 0), row(1.2 + seed / 10, 8, 64, 100)])
    lines = [f"{w},{g},64,{10 - w + g / 10},{0.2 if g == 2 else ''}" for g in (1, 2) for w in (-0.0, 1e-17, 0.5, 1)]
    path.with_name(f"{seed}.curve.csv").write_text("w,cfg_scale,budget,fid,fid_se\n" + "\n".join(lines) + "\n")
    best = {"w": 1.0, "w_lo": 0.8, "w_hi": 1.3, "cfg_scale": 2, "evaluations": 12}
    path.with_name(f"{seed}.best.json").write_text(json.dumps(best if seed else {"w": 1.0}))


def test_predicted_curves_of_a_folder(tmp_path, run):
    """Collected next to the measured rows; intervals as far as there."""
    for seed in (0, 1):
        predicted(tmp_path / f"rows/search/imm4/{seed}.jsonl", seed)
        write(tmp_path / f"rows/final/imm4/{seed}.jsonl", final_rows(1.0))
    (tmp_path / "titles.yaml").write_text("titles: {imm4: 'IMM, 4 steps'}")
    command = ("--titles", tmp_path / "titles.yaml", "--out", tmp_path / "out", "--rows", tmp_path / "rows")
    status, _, error = run("report.tables", *command)
    assert status == 0, error
    curves = pd.read_csv(tmp_path / "out/curves.csv")
    assert list(curves) == ["family", "setting", "seed", "w", "cfg", "budget", "fid", "fid_se"] and len(curves) == 16
    assert curves["w"].tolist() == [0, 0, 0.5, 1] * 4 and set(curves["family"]) == {"imm"}
    assert curves["fid_se"].notna().sum() == 8 and curves["seed"].tolist() == [0] * 8 + [1] * 8
    assert pd.read_csv(tmp_path / "out/best.csv").to_numpy().tolist() == [["imm4", 1, 1.0, 0.8, 1.3]]
    assert pd.read_csv(tmp_path / "out/search.csv")["w"].tolist() == [0, 1.2, 0, 1.3]
    broken = tmp_path / "rows/search/imm4/0.curve.csv"
    broken.write_text("w,fid\n1,2\n")
    status, _, error = run("report.tables", *command)
    assert status == 1 and error.startswith(f"error: {broken}: holds something other than a predicted curve (")


def test_predictions_of_the_papers_models(tmp_path):
    predicted(tmp_path / "rows/search/imm_t1/0.jsonl", 0)
    write_table_a1(tmp_path)
    curves = pd.read_csv(tmp_path / "curves.csv")
    assert len(curves) == 8 and set(curves["setting"]) == {"imm_t1"}


def test_what_is_wrong_is_one_line(tmp_path, run):
    search = write(tmp_path / "rows/search/imm4/0.jsonl", [row(0.0, 10, 0, 0)])
    write(tmp_path / "bad/search/imm4/first.jsonl", [row(0.0, 10, 0, 0)])
    titles, broken, none = tmp_path / "titles.yaml", tmp_path / "broken.yaml", tmp_path / "none.jsonl"
    titles.write_text("titles: {imm8: IMM}")
    broken.write_text("titles: [")
    other, empty = tmp_path / "other.csv", tmp_path / "empty.csv"
    other.write_text("a,b\n1,2\n")
    empty.touch()
    out = tmp_path / "out"
    tables = ("report.tables", "--out", out, "--titles")
    (tmp_path / "rows/released").mkdir()
    (tmp_path / "rows/released/imm_t8.json").write_text("[1]")
    for command, message in {
        (*tables, titles, "--rows", tmp_path / "empty"): "no results yet",
        (*tables, titles, "--rows", tmp_path / "rows"): "no title for imm4",
        (*tables, titles, "--rows", tmp_path / "bad"): "first.jsonl: a file of rows is named by its seed",
        (*tables, broken, "--rows", tmp_path / "rows"): "broken.yaml: not YAML with an entry `titles`",
        ("report.metrics", "metrics", none, out): "none.jsonl: no such file",
        ("report.metrics", "metrics", search, out): "0.jsonl: not what `neon final` wrote",
        ("report.metrics", "curve", titles, out): "holds something other than rows of results",
        ("report.metrics", "summary", other, out): "other.csv: no table with a column family",
        ("report.metrics", "summary", search, out): "0.jsonl: no table with a column family",
        ("report.metrics", "metrics", other, out): "other.csv: no table with a column role",
        ("report.metrics", "curve", empty, out): "empty.csv: no table with a column w",
        ("report.table_a1", "--out", tmp_path): "imm_t8.json: holds something other than a row of results",
    }.items():
        status, _, error = run(*command)
        assert status == 1 and error.count("\n") == 1, (command, error)
        assert error.startswith("error: ") and message in error, (command, error)
        assert not out.exists() and not (tmp_path / "table_a1.csv").exists()
    status, _, error = run("report.metrics", "metric", search, out)
    assert status == 2 and "usage" in error


def test_what_dvc_shows(tmp_path, run):
    """The best of a surface at each w, and a line of metrics per family."""
    surface, out = tmp_path / "0.curve.csv", tmp_path / "curve.csv"
    surface.write_text("w,cfg,budget,fid,fid_se\n0,2,100,9,\n0,3,100,8,0.5\n1,2,100,5,0.25\n1,3,100,7,\n")
    assert run("report.metrics", "curve", surface, out)[0] == 0
    assert out.read_text() == "w,fid,fid_se,cfg,budget\n0,8,0.5,3,100\n1,5,0.25,2,100\n"
    found = summarise(read_rows({write(tmp_path / "0.jsonl", final_rows(1.0)): {"setting": "imm4", "seed": 0}}))
    found.to_csv(tmp_path / "summary.csv", index=False)
    assert run("report.metrics", "summary", tmp_path / "summary.csv", tmp_path / "metrics.json")[0] == 0
    shown = json.loads((tmp_path / "metrics.json").read_text())
    assert shown == {"imm": {"fid_base": 10, "fid_neon": 8, "fid_selftrained": 20, "gain": 2, "w_star": 1}}


def test_authentic_samples_by_hand(monkeypatch):
    """Images of one grey each, features: the grey. 20 is 14 from 6, whose nearest is 1 away; 60 is 10 from 50, 44."""
    grey = Extractor("grey", 1, None, torch.device("cpu"), lambda images: (images[:, 0, :1, 0].float(), None))
    monkeypatch.setattr(report.copies, "load_extractor", lambda spec: grey)
    training = torch.tensor([0, 1, 2, 3, 4, 5, 6, 50])[:, None].float()

    def images(*greys):
        return torch.tensor(greys, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    assert report.copies.authpct(images(3, 20, 30, 60, 200, 255), "grey", training) == 50
    assert report.copies.authpct(images(0, 1, 2, 3, 30, 60), "grey", training) == 0


@pytest.mark.slow
def test_copies_with_the_authenticity_of_every_model(mini, tmp_path):
    """A column more with --features and --ref, the others as without; what is missing or does not fit is said."""
    ref, search, out = tmp_path / "train.npz", tmp_path / "search.jsonl", tmp_path / "out.csv"
    neon("reference", "--images", mini.data, *mini.features, "--out", ref)
    models = ("--base", mini.base, "--selftrained", mini.snapshots[1], "--seeds", "0-15", "--metrics", "fid")
    neon("search", *mini.measuring, *models, "-w", "0,1", "--method", "grid", "--out", search)
    final = tmp_path / "edm/0.jsonl"
    neon(
        "final",
        *mini.measuring,
        "--base",
        mini.base,
        *models[4:6],
        "--metrics",
        "fid",
        "--search",
        search,
        "--out",
        final,
    )
    (tmp_path / "heldout").symlink_to(mini.data.parent / "heldout")
    (tmp_path / "train").symlink_to(mini.data)
    command = ["--data", tmp_path, "--rows", final, "--seeds", "50-69", "--out", out]
    assert copies(*command).returncode == 0
    plain = pd.read_csv(out)
    done = copies(*command, *mini.features, "--ref", ref)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(out)
    assert list(found) == [*plain, "authpct"] and found.drop(columns="authpct").equals(plain)
    extractor, training = load_extractor(mini.features[1]), load_reference(ref).features
    images = images_of(rows_of(final)[0], torch.arange(50, 70), 20, "cpu")
    expected = around_real(training, extractor(images.expand(-1, 3, -1, -1)).features).authpct
    assert found["authpct"][0] == pytest.approx(expected, abs=1e-3) and 0 < expected <= 100
    out.unlink()
    np.savez(tmp_path / "plain.npz", mu=np.zeros(16), sigma=np.eye(16))
    for options, said in {
        ("--ref", ref): "AuthPct needs both --features and --ref",
        (*mini.features, "--ref", tmp_path / "plain.npz"): "has no features, which AuthPct compares with",
    }.items():
        done = copies(*command, *options)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1 and not out.exists()


def copies(*words):
    """`python -m report.copies …`, which starts processes of its own."""
    command = [BIN / "python", "-m", "report.copies", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_copies_of_a_search(tmp_path):
    digits = write_images(tmp_path / "train", (1, 8, 8), 3, 2)
    shutil.copytree(digits, tmp_path / "heldout")
    search = write(tmp_path / "rows/search/imm4/0.jsonl", [row(0.0, 10, 0, 0)])
    done = copies("--data", tmp_path, "--rows", search, "--seeds", "0-3", "--out", tmp_path / "out.csv")
    assert done.returncode == 1 and done.stderr == f"error: {search}: not what `neon final` wrote\n"
    assert not (tmp_path / "out.csv").exists()


# ---------------------------------------------------------------- notebooks


def executed(name, results: Path) -> dict:
    """The names that a notebook's cells leave."""
    matplotlib.use("Agg")
    namespace = {}
    for cell in json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace |= {"results": str(results), "out": str(results)}
    plt.close("all")
    return namespace


def test_the_notebook_draws_what_there_is(tmp_path):
    best_by_budget(searched(tmp_path)).to_csv(tmp_path / "budget.csv", index=False)
    pd.Series({"imm4": "IMM"}).to_json(tmp_path / "titles.json")
    executed("budget", tmp_path)
    assert (tmp_path / "budget.png").stat().st_size > 5000


def test_the_notebook_without_results_does_not_fail(tmp_path):
    executed("budget", tmp_path)
    assert not (tmp_path / "budget.png").exists()


def test_notebooks_of_the_papers_size(tmp_path, capsys):
    """One model searched, but not yet evaluated; then both; without real images, so without precision."""
    names = ("w_curves", "landscape", "budget", "table_a1")
    write(tmp_path / "rows/search/imm_t1/0.jsonl", paper_search())
    write(tmp_path / "rows/final/imm_t2/0/3000000-3049999.jsonl", final_rows(1.0)[:1])  # killed after the first row
    write_table_a1(tmp_path)
    assert "Recipes rerun" not in capsys.readouterr().out
    for name in names:
        executed(name, tmp_path)
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {"w_curves.png", "landscape.png", "budget.png"}  # no final rows of what was searched
    write(tmp_path / "rows/final/imm_t1/0/3000000-3049999.jsonl", final_rows(0.0))
    write_table_a1(tmp_path)
    table = capsys.readouterr().out
    assert (
        "**Recipes rerun here**" in table
        and "| IMM (T=1), ImageNet-256, conditional | 1 | none | 20 | 10 | 10 | 0 |  |  |" in table
    )
    assert "| VAR-d30 + DDO³ |" in table and "³ Without guidance" in table
    found = {name: executed(name, tmp_path) for name in names}
    assert found["w_curves"]["figure"].axes[0].get_lines()
    assert (tmp_path / "before_after.png").exists() and not (tmp_path / "asymptotes.png").exists()
