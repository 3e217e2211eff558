"""No number is reported on what chose it: seeds of images and references, over every command of every pipeline."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from processes import BIN, ROOT

from mini.plan import plan
from mini.settings import COPIES, TRAIN
from neon.sampling import parse_seeds

Words = dict[str, str]  # option → value of a command


def words(command: list[str]) -> Words:
    return dict(re.findall(r"--(\w+)[ =](\S+)", shlex.join(command)))


def seeds(options: Words) -> set[int]:
    return set(parse_seeds(options["seeds"]).tolist())


def mini(stage: str) -> list[Words]:
    """Every command of a stage, over all chains."""
    return [words(job.command) for (name, _), jobs in plan().items() if name == stage for job in jobs]


def overlaps(sets: dict[str, set[int]]) -> set[tuple[str, str]]:
    return {(a, b) for a, b in itertools.combinations(sets, 2) if sets[a] & sets[b]}


def test_an_overlap_is_found():
    assert overlaps({"S": {1, 2}, "search": {3, 4}, "final": {2, 5}}) == {("S", "final")}


def test_images_of_S_of_the_search_and_of_the_report_are_others_on_digits():
    sets = {stage: set().union(*map(seeds, mini(stage))) for stage in ("generate", "search", "final")}
    sets["copies"] = set(parse_seeds(COPIES).tolist())
    assert all(len(found) >= 1000 for found in sets.values())
    assert overlaps(sets) == set()


def test_a_report_takes_its_choice_from_a_search_and_has_another_reference_on_digits():
    searches, finals = mini("search"), mini("final")
    chosen = {search["out"]: search for search in searches}
    assert len(finals) > 60
    for final in finals:
        search = chosen[final["search"]]
        (first, to_choose), (other, to_report) = (Path(one["ref"]).parts[1:] for one in (search, final))
        assert (to_choose, to_report) == ("train.npz", "heldout.npz") and not seeds(search) & seeds(final)
        assert (search["features"] == final["features"]) == (first == other) and {first, other} <= {"ref", "second"}
        assert ("other_features" in final) == (first != other)


def test_the_two_references_are_of_different_digits(tmp_path):
    """Those that train the base and the features are none of those that the report is measured against."""
    command = [BIN / "python", "-m", "mini.prepare", "--train", str(TRAIN), "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    train, heldout = ([path.read_bytes() for path in (tmp_path / name).rglob("*.png")] for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (TRAIN, 1797 - TRAIN)
    assert not set(train) & set(heldout)


def params(folder: str = "") -> dict:
    return yaml.safe_load((ROOT / f"{folder}params.yaml").read_text())


def of_the_paper() -> dict[str, set[int]]:
    """Seeds of the search, of the report and of every S at paper scale."""
    found = params()
    others = [item for name in ("ablations", "controls") for item in params(f"paper/{name}/")["like"].values()]
    others += params("paper/rivals/")["gmo"].values()
    sets = {"search": found["seeds"]["search"], "final": f"{found['seeds']['final']} {found['seeds']['more']}"}
    sets["S"] = " ".join(item["synthetic"] for item in (*found["models"].values(), *others))
    return {name: set().union(*(parse_seeds(part).tolist() for part in text.split())) for name, text in sets.items()}


def test_images_of_S_of_the_search_and_of_the_report_are_others_at_paper_scale():
    sets = of_the_paper()
    assert {name: len(found) for name, found in sets.items()} == {"search": 10_000, "final": 150_000, "S": 750_000}
    assert overlaps(sets) == set()


PIPELINES = ["dvc.yaml", *(f"paper/{name}/dvc.yaml" for name in ("ablations", "controls", "rivals"))]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_search_and_report_of_the_paper_takes_these_seeds(pipeline):
    text = re.sub(r"\s+", " ", (ROOT / pipeline).read_text())
    commands = re.findall(r"neon\.cli (search|final) (.*?) --out ", text)
    assert {name for name, _ in commands} == {"search", "final"}
    for name, options in commands:
        expected = {"search": {"${seeds.search}"}, "final": {"${seeds.final}", "$images"}}[name]
        (found,) = re.findall(r"--seeds (\S+)", options)
        assert found in expected
    if "$images" in text:
        assert "for images in $(echo ${seeds.final} ${seeds.more} |" in text


def test_the_known_limit_of_the_paper_scale_is_stated():
    """One reference for search and report, as published: where this changes, so does the page."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    refs = {name: set(re.findall(r"--ref (\S+)", " ".join(stages[name]["do"]["cmd"]))) for name in ("search", "final")}
    assert refs["search"] == refs["final"] == {"runs/reference/${item.reference}.npz"}
    assert "there is one reference for both" in (ROOT / "docs/claims.md").read_text()
