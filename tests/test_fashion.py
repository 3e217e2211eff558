"""The Fashion-MNIST scale: its plan, its stages, and one family's chain on a tiny set of its own."""

import gzip
import itertools
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from processes import BIN, ROOT, neon
from test_idx import idx, write_pair
from test_mini import commands, stages, within

from fashion import settings
from fashion.levels import levels
from mini import readme
from mini.features import save_digits_cnn, train_digits_cnn
from mini.plan import plan
from mini.run import choose
from neon import NeonError, fetch
from neon.family import get_family
from neon.measure.features import load_extractor
from report import claims
from report.tables import final_table


def test_neon_knows_every_command():
    from neon.cli.parser import parse

    jobs = plan(settings)
    for command in (job.command for job in itertools.chain(*jobs.values())):
        parse(command[1:], "neon")
    assert len(jobs) == 4 + 4 * 4 + 4 * 2  # bases; chains; spaces
    (search,) = choose("search", "edm", "heun18", 1, settings)
    words = shlex.join(search.command)
    assert "--ref runs/ref/train.npz --features lite0" in words and "--seeds 20000-20999" in words
    final, *_ = choose("final", "edm", "heun18", 1, settings)
    assert "--ref runs/ref/test.npz" in shlex.join(final.command) and "30000-39999" in final.command


def test_no_image_chooses_and_reports():
    from neon.sampling import parse_seeds

    sets = [set(parse_seeds(getattr(settings.IMAGES, name)).tolist()) for name in ("synthetic", "search", "final")]
    assert len(sets[2]) == 10_000 and sum(map(len, sets)) == len(set.union(*sets))


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_every_family_has_the_networks_and_recipes_of_the_scale(scale):
    name = {"cpu": "fashion", "gpu": "fashion_gpu"}[scale]
    for base in settings.BASES.values():
        family = get_family(base.family)
        model = family.hollow(name)
        assert {name, f"{name}_base"} <= set(family.recipes)
        family.check(model, (1, 28, 28), torch.arange(10))
        for recipe in (family.recipes[name], family.recipes[f"{name}_base"]):
            assert recipe.budget % recipe.snapshot == 0 and recipe.snapshot % recipe.batch == 0


def test_scale_gpu_changes_networks_and_device(tmp_path):
    shutil.copytree(
        ROOT / "fashion", tmp_path / "fashion", ignore=shutil.ignore_patterns("runs", "data", "__pycache__")
    )
    (tmp_path / "fashion/params.yaml").write_text("scale: gpu\n")
    printed = run("base", "flow", "--seed", "0", "--dry_run", cwd=tmp_path / "fashion", path=tmp_path)
    assert "--network fashion_gpu --recipe fashion_gpu_base" in printed and "--device cuda" in printed


def test_stages_run_all_that_is_planned_and_name_what_it_reads_and_writes():
    jobs, ran = plan(settings), []
    found = stages("fashion")
    needs = {Path(out.fs_path): {Path(dep.fs_path) for dep in stage.deps} for stage in found for out in stage.outs}
    reads = ("--model", "--base", "--data", "--selftrained", "--search", "--ref", "--vae_ckpt")
    for stage in found:
        deps, outs = ({Path(file.fs_path) for file in files} for files in (stage.deps, stage.outs))
        ancestors = deps | {dep for made, given in needs.items() if made in deps for dep in given}
        for path in deps:
            assert within(path, set(needs)) or any(out.is_relative_to(path) for out in needs) or path.exists(), path
        for name, chain in [words[-2:] for words in commands(stage) if "fashion.run" in words]:
            ran.append((name, chain))
            assert ROOT / f"fashion/runs/plan/{name}/{chain}.sh" in deps
            for command in (job.command for job in jobs[name, chain]):
                for option, value in itertools.pairwise(command):
                    path = ROOT / "fashion" / value
                    assert option != "--out" or within(path, outs), f"{stage.name} writes {value}"
                    assert option not in reads or within(path, ancestors | outs), f"{stage.name} reads {value}"
    assert sorted(ran) == sorted(jobs)


# ---------------------------------------------------------------- the chain

TINY = """
FEW = Images("0-39", "100-139", "200-239")
BASES = {"flow": Base("flow", range(1), {"budget": 128, "snapshot": 128, "ramp": 64})}
ONE = replace(FM4, training={"budget": 64, "snapshot": 64}, w=(0, 1), sampling={"solver": "euler", "num_steps": 1})
CHAINS = ALL = {"flow": replace(chain("flow", fm4=ONE), seeds=range(1), images=FEW, reported=METRICS)}
TITLED = {"fashion": CHAINS}
FEATURES = ("cnn:runs/features.safetensors",) * 2
"""


def run(*argv, cwd: Path, path: Path, module: str = "fashion.run") -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    command = [BIN / "python", "-m", module, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_chain_from_idx_files_to_tables(tmp_path):
    """With the classifier in place of EfficientNet-Lite0, which an extra installs."""
    shutil.copytree(
        ROOT / "fashion", tmp_path / "fashion", ignore=shutil.ignore_patterns("runs", "data", "__pycache__")
    )
    with open(tmp_path / "fashion/settings.py", "a") as file:
        file.write(TINY)
    work, rng = tmp_path / "fashion", np.random.default_rng(0)
    for name, n in (("train", 100), ("t10k", 40)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        pixels = rng.integers(0, 60, (n, 28, 28)) + 15 * labels[:, None, None]
        write_pair(work / "data", name, pixels.astype(np.uint8), labels, packed=name == "train")

    def module(name, *argv):
        return run(*argv, cwd=work, path=tmp_path, module=f"fashion.{name}")

    module("prepare", "--idx", "data", "--out", "runs/data")
    told = module("features", "--data", "runs/data", "--dim", 8, "--epochs", 1, "--out", "runs/features.safetensors")
    assert "40 images of test.zip" in told
    features = ("--features", f"cnn:{work}/runs/features.safetensors")
    for name in ("train", "test"):
        neon("reference", "--images", work / f"runs/data/{name}.zip", *features, "--out", work / f"runs/ref/{name}.npz")
    for stage in ("base", "generate", "selftrain", "search", "final"):
        module("run", stage, "flow")
    results = tmp_path / "results/fashion"
    module("keep", "flow", "--out", results / "rows/flow")
    kept = {str(path.relative_to(results / "rows/flow")) for path in results.rglob("*") if path.is_file()}
    assert {"search/fm4/0.jsonl", "search/fm4/0.curve.csv", "final/fm4/0.jsonl"} <= kept
    assert not any(path.endswith(".npz") for path in kept)

    module("plan", "--out", "runs/plan")
    titles = work / "runs/plan/fashion.yaml"
    run(
        "--rows",
        results / "rows/flow",
        "--titles",
        titles,
        "--out",
        results,
        cwd=work,
        path=tmp_path,
        module="report.tables",
    )
    assert "FD (classifier) Neon" in (results / "table.md").read_text()
    assert pd.read_csv(results / "summary.csv")["num_images"].tolist() == [40]

    module("baselines", "--data", "runs/data", "--out", "runs/baselines")
    for name in ("means", "train"):
        measuring = ("--ref", work / "runs/ref/test.npz", *features, "--metrics", "fid,precision,recall")
        images = ("--images", work / f"runs/baselines/{name}.zip")
        neon("evaluate", *images, *measuring, "--out", results / f"baselines/{name}.json")
    shown = module("levels", "--results", results)
    assert "| FD (classifier) |" in shown
    table = pd.read_csv(results / "levels.csv")
    assert table["images"].tolist() == [
        "training images",
        "the mean image of each class",
        "Flow matching, 4 Euler steps: base (w = 0)",
        "Flow matching, 4 Euler steps: Neon (w*)",
    ]
    assert table["fid"][0] < table["fid"][1:].min()  # training images are nearest


def test_levels_of_unequally_many_images_are_refused(tmp_path):
    (tmp_path / "baselines").mkdir()
    row = {"fid": 1.0, "precision": 1.0, "recall": 1.0, "features": "lite0-01234567"}
    for name, n in (("train", 10), ("means", 20)):
        (tmp_path / f"baselines/{name}.json").write_text(json.dumps(row | {"n": n, "images": "train.zip"}))
    with pytest.raises(NeonError, match=r"distances of .*10.*20.* do not compare"):
        levels(tmp_path, {})


def test_levels_name_what_was_measured(tmp_path):
    (tmp_path / "baselines").mkdir()
    row = {"n": 10, "precision": 1.0, "recall": 1.0, "features": "lite0-01234567"}
    for name, fid in (("train", 1.0), ("means", 2.0)):
        text = json.dumps(row | {"fid": fid, "images": f"runs/baselines/{name}.zip"})
        (tmp_path / f"baselines/{name}.json").write_text(text)
    table, distance = levels(tmp_path, {})
    assert dict(zip(table["images"], table["fid"])) == {"training images": 1.0, "the mean image of each class": 2.0}
    assert distance == "FD (EfficientNet-Lite0)"


def test_a_table_names_the_distance_by_its_features():
    rows = [
        {"setting": "fm4", "seed": 0, "role": role, "w": 1.0, "cfg": None, "fid": 2.0}
        for role in ("base", "neon", "selftrained")
    ]
    plain = pd.DataFrame(rows)
    assert "FID base" in final_table(plain)
    assert "FD (EfficientNet-Lite0) base" in final_table(plain.assign(features="lite0-57934424"))


# ---------------------------------------------------------------- data, features, claims


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table with one packed file of the group fashion, and a folder where a package puts it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "INSTALLED", {"fashion": tmp_path / "installed"})
    (tmp_path / "installed").mkdir()
    text = idx(np.arange(10, dtype=np.uint8))

    def write(source: str, data: bytes = text) -> Path:
        import hashlib

        row = f"fashion,data/labels,{source},{len(data)},{hashlib.sha256(data).hexdigest()}"
        Path("downloads.csv").write_text(f"group,path,source,size,sha256\n{row}\n")
        return tmp_path / "data/labels"

    write.text = text
    return write


def test_an_installed_copy_is_unpacked_without_a_network(table, tmp_path, capsys):
    target = table("http://127.0.0.1:9/labels.gz")
    (tmp_path / "installed/labels.gz").write_bytes(gzip.compress(table.text))
    neon("download", "fashion")
    assert target.read_bytes() == table.text and [p.name for p in target.parent.iterdir()] == ["labels"]


@pytest.mark.parametrize("held", [b"other", b"x" * 10_000_000])
def test_an_installed_copy_that_is_another_is_refused(table, tmp_path, held):
    target = table("http://127.0.0.1:9/labels.gz")
    (tmp_path / "installed/labels.gz").write_bytes(gzip.compress(held))
    with pytest.raises(NeonError, match=r"labels\.gz: it has \d+ bytes, not 18; nothing was kept"):
        fetch.fetch_row(fetch.read_table()[0])
    assert not target.exists() and not list(target.parent.glob(".*unpacked"))


def test_a_packed_download_is_unpacked_and_checked(table, tmp_path):
    from server import DATA, serving

    with serving() as server:
        server.data = gzip.compress(table.text)
        target = table(f"{server.url}/labels.gz")
        assert fetch.fetch_row(fetch.read_table()[0]) == "downloaded and whole"
        assert target.read_bytes() == table.text and [p.name for p in target.parent.iterdir()] == ["labels"]
        target.unlink()
        server.data = DATA
        with pytest.raises(NeonError, match="not a whole gzip file"):
            fetch.fetch_row(fetch.read_table()[0])
        assert not target.exists()


def test_a_classifier_of_larger_images(tmp_path):
    images = torch.randint(256, (20, 3, 28, 28), dtype=torch.uint8)
    save_digits_cnn(train_digits_cnn(images, torch.arange(20) % 10, epochs=1, dim=8), tmp_path / "f.safetensors")
    extractor = load_extractor(f"cnn:{tmp_path / 'f.safetensors'}")
    assert extractor.name.startswith("cnn-") and extractor(images).features.shape == (20, 8)
    with pytest.raises(NeonError, match="reads 28x28 images, not 8x8"):
        extractor(images[:, :, :8, :8])


def test_claims_of_digits_are_judged_on_clothes(tmp_path):
    folder = tmp_path / "fashion"
    folder.mkdir()
    fids = {"base": [9.0, 9.2, 9.1], "neon": [5.0, 5.1, 5.3], "selftrained": [12.0, 12.0, 12.0]}
    rows = [
        {"role": role, "family": "flow", "setting": "fm4", "seed": seed, "w": 1.0, "fid": fid}
        for role, values in fids.items()
        for seed, fid in enumerate(values)
    ]
    pd.DataFrame(rows).to_csv(folder / "final.csv", index=False)
    found = claims.ledger(folder).set_index("id")["verdict"]
    assert found["fid-flow"] == "reproduced" and found["fid-var"] == "not measured"
    for name, verdict in (("mini", "mixed (1 of 2)"), ("paper", "not measured")):
        (tmp_path / name).mkdir()
        line = {"id": "fid-flow", "claim": "x", "source": "y", "kind": "paper", "verdict": verdict, "evidence": ""}
        pd.DataFrame([line]).to_csv(tmp_path / name / "claims.csv", index=False)
    table = claims.as_table(claims.verdicts(tmp_path / "mini").assign(fashion=["reproduced"]))
    assert "| id | claim | source | verdict | fashion | evidence |" in table and "| reproduced |" in table


def test_the_page_says_what_is_not_measured(tmp_path):
    assert readme.fashion(tmp_path) == "Not measured yet.\n"
    (tmp_path / "spaces/edm").mkdir(parents=True)
    (tmp_path / "table.md").write_text("a\n")
    (tmp_path / "spaces/edm/spaces.md").write_text("b\n")
    assert readme.fashion(tmp_path) == "a\n\nb\n"


def test_the_pipeline_makes_every_family(tmp_path):
    text = yaml.safe_load((ROOT / "fashion/dvc.yaml").read_text())
    families = text["vars"][0]["families"]
    assert list(families) == list(settings.CHAINS)
    assert [one["settings"].split() for one in families.values()] == [
        list(c.settings) for c in settings.CHAINS.values()
    ]
