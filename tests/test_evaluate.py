"""Evaluation, search and final comparison: the same numbers however they are computed, each computed once."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from processes import error_of, finish, kill_when, neon, ranks, start, torchrun

import edm.family
from mini.features import DigitsCNN, save_digits_cnn
from neon import NeonError
from neon.cli.show import with_error
from neon.data import ImageSet
from neon.final import final_points
from neon.measure import metrics
from neon.measure.aside import Aside
from neon.measure.candidates import Point
from neon.measure.evaluate import METRICS, Evaluation, parse_metrics, title
from neon.measure.features import Extractor, load_extractor
from neon.measure.kept import Kept
from neon.measure.manifold import around_real
from neon.measure.manifold import recall as of_real
from neon.measure.metrics import Moments, Reference, load_reference
from neon.measure.mind import mind
from neon.measure.rows import budget_of
from neon.weights.checkpoint import load_weights

ALL = "fid,is,kid,precision,recall"
NUMBERS = ("fid", "fid_se", "is", "is_std", "kid", "kid_std", "precision", "recall")
SEEDS = "5-104"


def evaluate(mini, out, *more, metrics=ALL, batch_size=64):
    options = ("--seeds", SEEDS, "--metrics", metrics, "--batch_size", batch_size)
    return ["evaluate", *mini.measuring, "--model", mini.base, *options, "--out", out, *more]


def numbers(path):
    row = json.loads(path.read_text())
    return {name: row[name] for name in NUMBERS}


@pytest.fixture(scope="module")
def base_row(mini, tmp_path_factory):
    """What `neon evaluate` says of the base."""
    path = tmp_path_factory.mktemp("evaluate") / "base.json"
    printed = neon(*evaluate(mini, path))
    row = json.loads(path.read_text())
    assert f"FID {with_error(row, 'fid')}  " in printed and f"precision {row['precision']:.4g}" in printed
    return row


# ---------------------------------------------------------------- one evaluation


def test_numbers_are_those_of_the_images(mini, base_row):
    """Sampled by hand, measured at once."""
    model = edm.family.load(mini.base, device="cpu")
    seeds = torch.arange(5, 105)
    images = edm.family.sample(model, seeds, edm.family.labels(model, seeds), num_steps=4)
    extractor, reference = load_extractor(mini.features[1]), load_reference(mini.ref)
    features = extractor(images.expand(-1, 3, -1, -1)).features
    moments = Moments(16)
    moments.update(features)
    assert base_row["fid"] == pytest.approx(metrics.frechet_distance(moments.mean, moments.cov, reference), rel=1e-9)
    precision, recall = around_real(reference.features, features).precision, of_real(reference.features, features)
    assert (base_row["precision"], base_row["recall"]) == (precision, recall)
    kid = metrics.kid(features, reference.features, subset_size=100)
    assert (base_row["kid"], base_row["kid_std"]) == pytest.approx(kid, rel=1e-6)
    assert precision > 0 and recall > 0 and base_row["is"] > 1
    assert (base_row["n"], base_row["seeds"], base_row["w"], base_row["budget"]) == (100, "5-104", 0.0, 0)


def test_every_metric_of_a_reference_with_features(mini, base_row, tmp_path):
    """`all` measures, next to what a list of the older five has, what the functions say of the same features."""
    printed = neon(*evaluate(mini, tmp_path / "row.json", "--keep_features", metrics="all"))
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["metrics"] == list(METRICS) and f"metrics: {', '.join(METRICS)}\n" in printed
    assert {name: row[name] for name in NUMBERS} == {name: base_row[name] for name in NUMBERS}
    features, real = Kept(tmp_path / "row.features" / row["kept"]).load()[1], load_reference(mini.ref).features
    near = around_real(real, features)
    assert (row["density"], row["coverage"], row["authpct"]) == near[1:]
    assert row["mind"] == mind(features, real) > 0
    assert f"density {near.density:.4g}  coverage {near.coverage:.4g}  AuthPct {near.authpct:.4g}  MIND " in printed


def test_an_explicit_list_is_measured_as_it_is_listed(mini, tmp_path):
    """In its order, for the key of a row is of it; nothing is chosen, so nothing is said about it."""
    printed = neon(*evaluate(mini, tmp_path / "row.json", metrics="kid,density,fid"))
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["metrics"] == ["kid", "density", "fid"] and "metrics:" not in printed
    assert {"kid", "kid_std", "density", "fid", "fid_se"} <= row.keys()
    assert not {"is", "precision", "recall", "coverage", "authpct", "mind"} & row.keys()


def test_kid_is_measured_by_default_where_features_are(mini, tmp_path):
    """The reference says so; a list is not needed. Without features it is FID and IS, as the line says."""
    reference, command = load_reference(mini.ref), ["--model", mini.base, "--seeds", "0-31", *mini.features]
    np.savez(tmp_path / "plain.npz", mu=reference.mu, sigma=reference.sigma)
    for ref, chosen in ((mini.ref, ["fid", "is", "kid"]), (tmp_path / "plain.npz", ["fid", "is"])):
        printed = neon("evaluate", *mini.sampling, *command, "--ref", ref, "--out", tmp_path / "row.json")
        row = json.loads((tmp_path / "row.json").read_text())
        assert row["metrics"] == chosen and f"metrics: {', '.join(chosen)}\n" in printed
        assert ("kid" in row) == ("kid" in chosen)


def test_the_default_is_what_extractor_and_reference_allow():
    bare = Reference(torch.zeros(2), torch.eye(2))
    full = Reference(torch.zeros(2), torch.eye(2), torch.zeros(9, 2))
    allowed = {(10, bare): ("fid", "is"), (10, full): ("fid", "is", "kid")}
    allowed |= {(None, bare): ("fid",), (None, full): ("fid", "kid")}
    for (classes, reference), expected in allowed.items():
        assert parse_metrics("auto", constant(classes), reference) == expected
    assert parse_metrics("all", constant(), full) == tuple(m for m in METRICS if m != "is")
    assert [title(m) for m in METRICS[:3] + METRICS[-2:]] == ["FID", "IS", "KID", "AuthPct", "MIND"]


def same(found, row):
    wanted = {name: row[name] for name in NUMBERS}
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert (found["precision"], found["recall"]) == (wanted["precision"], wanted["recall"])


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_any_batch_size(mini, base_row, tmp_path, batch_size):
    neon(*evaluate(mini, tmp_path / "row.json", batch_size=batch_size))
    same(numbers(tmp_path / "row.json"), base_row)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes(mini, base_row, tmp_path, processes):
    (done,) = torchrun(processes, "-m", "neon.cli", *evaluate(mini, tmp_path / "row.json", batch_size=7))
    same(numbers(tmp_path / "row.json"), base_row)
    assert json.loads((tmp_path / "row.json").read_text())["world"] == processes
    assert done.stdout.count("FID") == 1


@pytest.mark.slow
def test_two_nodes(mini, base_row, tmp_path):
    done = torchrun(1, "-m", "neon.cli", *evaluate(mini, tmp_path / "row.json"), nodes=2)
    same(numbers(tmp_path / "row.json"), base_row)
    assert [node.stdout.count("FID") for node in done] == [1, 0]


def test_merge_in_memory(mini, base_row, tmp_path):
    """w = −1 is the self-trained model, and a merge in memory is the merge in a file."""
    trained, w = mini.snapshots[1], ("--selftrained", mini.snapshots[1], "-w")
    neon(*evaluate(mini, tmp_path / "minus.json", *w, "-1"))
    neon(*evaluate(mini, tmp_path / "trained.json", "--model", trained))
    minus, alone = numbers(tmp_path / "minus.json"), numbers(tmp_path / "trained.json")
    assert minus["fid"] == pytest.approx(alone["fid"], rel=1e-3)
    assert alone["fid"] != pytest.approx(base_row["fid"], rel=1e-3)

    merged = tmp_path / "merged.safetensors"
    neon("merge", "--family", "edm", "--base", mini.base, "--selftrained", trained, "-w", 1.5, "--out", merged)
    neon(*evaluate(mini, tmp_path / "file.json", "--model", merged))
    neon(*evaluate(mini, tmp_path / "memory.json", *w, 1.5))
    assert numbers(tmp_path / "file.json") == numbers(tmp_path / "memory.json")
    assert json.loads((tmp_path / "memory.json").read_text())["budget"] == 256

    neon(*evaluate(mini, tmp_path / "zero.json", *w, 0))
    assert numbers(tmp_path / "zero.json") == {name: base_row[name] for name in NUMBERS}


def constant(classes=None):
    return Extractor("constant", 2, classes, torch.device("cpu"), lambda images: (images[:, :2, 0, 0].float(), None))


def test_what_does_not_fit_together(mini):
    seeds, reference = torch.arange(8), load_reference(mini.ref)
    with pytest.raises(NeonError, match=r"features have 2 dimensions, the reference ref\.npz has 16"):
        Evaluation(seeds, constant(), reference)
    for name in ("nope", ""):
        with pytest.raises(NeonError, match=f"unknown metric {name!r}"):
            Evaluation(seeds, load_extractor(mini.features[1]), reference, ("fid", name))


def test_more_processes_than_images(mini, tmp_path):
    """A rank without any image still takes part."""
    command = evaluate(mini, tmp_path / "one.json", "--seeds", "0-2", metrics="fid")
    neon(*command)
    finish(*ranks(4, *command, "--out", tmp_path / "four.json"))
    one, four = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "four"))
    assert (one["world"], four["world"]) == (1, 4) and four["n"] == 3
    assert (four["fid"], four["fid_se"]) == pytest.approx((one["fid"], one["fid_se"]), rel=1e-6)


# ---------------------------------------------------------------- search and final


def search(mini, out, *more, w="0,-1,0.5,1", batch_size=64):
    options = ("--selftrained", *mini.snapshots, f"--w={w}", "--batch_size", batch_size, "--seeds", SEEDS)
    return ["search", *mini.measuring, "--base", mini.base, *options, "--metrics", ALL, "--out", out, *more]


def final(mini, out, searched, *more):
    options = ("--seeds", "200-299", "--metrics", ALL, "--search", searched, "--out", out)
    return ["final", *mini.measuring, "--base", mini.base, *options, *more]


def rows(path):
    """The rows without what depends on the hour."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines]


@pytest.fixture(scope="module")
def searched(mini, tmp_path_factory):
    """A finished search."""
    path = tmp_path_factory.mktemp("search") / "search.jsonl"
    printed = neon(*search(mini, path))
    best = min((row for row in rows(path) if row["w"] >= 0), key=lambda row: row["fid"])
    assert printed.splitlines()[-1].startswith(f"best: w {best['w']:g}")
    return path


def test_a_search_measures_every_point_once(mini, searched, base_row):
    found = rows(searched)
    assert [(row["budget"], row["w"]) for row in found] == [
        *((0, 0.0), (128, -1.0), (128, 0.5), (128, 1.0)),
        *((256, -1.0), (256, 0.5), (256, 1.0)),
    ]
    assert {name: found[0][name] for name in NUMBERS} == {name: base_row[name] for name in NUMBERS}
    assert len({row["fid"] for row in found}) == len(found)


def test_minus_one_is_the_snapshot(mini, searched, tmp_path):
    for row in rows(searched):
        if row["w"] == -1:
            neon(*evaluate(mini, tmp_path / "row.json", "--model", row["selftrained"]))
            assert row["fid"] == pytest.approx(numbers(tmp_path / "row.json")["fid"], rel=1e-3)


def test_a_finished_search_is_not_repeated(mini, searched):
    before = searched.read_bytes(), searched.stat().st_mtime_ns
    neon(*search(mini, searched))
    neon(*search(mini, searched, w="1,0"))
    assert (searched.read_bytes(), searched.stat().st_mtime_ns) == before


def test_a_killed_search_goes_on(mini, searched, tmp_path):
    path = tmp_path / "search.jsonl"
    for done in (1, 3):
        slow = start(*search(mini, path, batch_size=1))
        kill_when(lambda done=done: path.exists() and path.read_bytes().count(b"\n") >= done, slow)
    before = path.read_bytes()
    before = before[: before.rindex(b"\n") + 1]
    assert 3 <= before.count(b"\n") < 7
    path.write_bytes(before + b'{"key": "0123')  # the row that a kill may tear
    finish(start(*search(mini, path)))
    assert path.read_bytes().startswith(before)
    for found, wanted in zip(rows(path), rows(searched), strict=True):
        assert found["key"] == wanted["key"]
        same({name: found[name] for name in NUMBERS}, wanted)


def test_final(mini, searched, tmp_path):
    path, found = tmp_path / "final.jsonl", rows(searched)
    neon(*final(mini, path, searched))
    base, trained, best = rows(path)
    merged = min((row for row in found if row["w"] > 0), key=lambda row: row["fid"])
    assert [row["role"] for row in (base, trained, best)] == ["base", "selftrained", "neon"]
    assert (base["w"], trained["w"], best["w"]) == (0, -1, merged["w"] if merged["fid"] < found[0]["fid"] else 0)
    assert trained["selftrained"] == merged["selftrained"]
    assert {row["seeds"] for row in (base, trained, best)} == {"200-299"}
    assert best["gain_base"] == pytest.approx(base["fid"] - best["fid"], abs=1e-9)
    assert best["gain_selftrained"] == pytest.approx(trained["fid"] - best["fid"], abs=1e-9)
    assert 0 < best["gain_selftrained_se"] < math.hypot(trained["fid_se"], best["fid_se"])

    # Killed after the first row: that one stays, the others come out the same.
    whole = path.read_bytes()
    first = whole[: whole.index(b"\n") + 1]
    path.write_bytes(first + whole[len(first) :][:40])
    neon(*final(mini, path, searched))
    assert path.read_bytes().startswith(first)
    for found, wanted in zip(rows(path), (base, trained, best), strict=True):
        assert found["key"] == wanted["key"] and found["fid"] == pytest.approx(wanted["fid"], rel=1e-9)
    before = path.stat().st_mtime_ns
    neon(*final(mini, path, searched))
    assert path.stat().st_mtime_ns == before


def test_final_of_a_grid_takes_its_options(mini, tmp_path):
    path = tmp_path / "search.jsonl"
    neon(*search(mini, path, "--grid", "num_steps=2,4", "--grid", "solver=heun,euler", w="0,1"))
    found = rows(path)
    assert len(found) == 4 + 2 * 4
    neon(*final(mini, tmp_path / "final.jsonl", path))
    base, trained, best = rows(tmp_path / "final.jsonl")

    def options(row):
        return row["num_steps"], row["solver"]

    assert options(base) == options(min((row for row in found if row["w"] == 0), key=lambda row: row["fid"]))
    best_found = min(found, key=lambda row: row["fid"])  # of w = 0 and w = 1
    assert options(best) == options(best_found) and best["w"] == best_found["w"] and trained["w"] == -1


def test_stop_ends_a_row_early(mini, searched, tmp_path):
    ascending = sorted((row for row in rows(searched) if row["budget"] in (0, 128)), key=lambda row: row["fid"])
    w = ",".join(str(row["w"]) for row in ascending)
    last = ascending[2]["fid"] - ascending[0]["fid"]
    for stop, measured in ((0, 2), (last * 0.999, 3), (last * 1.001, 4)):
        path = tmp_path / f"{measured}.jsonl"
        neon(*search(mini, path, "--selftrained", mini.snapshots[0], "--stop", stop, w=w))
        assert rows(path) == ascending[:measured]


ROW = {"family": "edm", "base_sha256": "a", "dtype": "float32", "seeds": "0-9", "features": "f", "reference": "r"}


def point_row(w, fid, snapshot="s", cfg=1.0):
    return {**ROW, "w": w, "fid": fid, "selftrained": snapshot if w else None, "cfg": cfg}


def test_final_points_of_rows_that_do_not_compare():
    found = [point_row(0.0, 1.0), point_row(1.0, 2.0)]
    assert final_points(found, [])["selftrained"].selftrained == "s"
    for fact in (*ROW, "vae_sha256"):
        with pytest.raises(NeonError, match=f"the rows of the search differ in {fact}"):
            final_points([found[0], {**found[1], fact: "other"}], [])
    with pytest.raises(NeonError, match="holds no self-trained model"):
        final_points(found[:1], [])


def test_neon_is_the_best_positive_w_or_the_base():
    """Never w = -1, however good that is; a base is compared at its own best options."""
    trained = point_row(-1.0, 0.5, "t", 2.0)
    found = [point_row(0.0, 4.0), point_row(0.0, 3.0, cfg=2.0), point_row(1.0, 3.5), trained, point_row(2.0, 9.0, "u")]
    points = final_points(found, ["cfg"])
    assert points["base"] == points["neon"] == Point(None, 0.0, (("cfg", 2.0),))
    assert points["selftrained"] == Point("s", -1.0, (("cfg", 2.0),))  # of the best w > 0, which lost; as the base is
    points = final_points([*found, point_row(0.5, 2.9, "u")], ["cfg"])
    assert points["neon"] == Point("u", 0.5, (("cfg", 1.0),))
    assert points["selftrained"] == Point("u", -1.0, (("cfg", 2.0),))  # Neon's best options are not fair to it
    alone = [point_row(-1.0, 8.0, "u", 2.0), point_row(-1.0, 7.0, "u")]  # the self-trained model at its own best, too
    points = final_points([*found, point_row(0.5, 2.9, "u", 2.0), *alone], ["cfg"])
    assert points["selftrained"] == Point("u", -1.0, (("cfg", 1.0),))
    points = final_points([*found, point_row(1.0, 3.0, "u")], ["cfg"])  # as good as the base is not better
    assert points["neon"].w == 0
    points = final_points([row for row in found if row["w"] <= 0], ["cfg"])
    assert points["neon"] == points["base"] and points["selftrained"] == Point("t", -1.0, (("cfg", 2.0),))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_fid_that_is_not_finite_never_wins(bad):
    found = [point_row(0.0, bad), point_row(0.0, 3.0, cfg=2.0), point_row(1.0, bad), point_row(1.0, 2.0, "u")]
    points = final_points(found, ["cfg"])
    assert points["base"].sampling == (("cfg", 2.0),) and points["neon"] == Point("u", 1.0, (("cfg", 1.0),))
    points = final_points(found[:3], ["cfg"])  # every merge diverged
    assert points["neon"] == points["base"] and points["selftrained"] == Point("s", -1.0, (("cfg", 2.0),))
    with pytest.raises(NeonError, match="no finite FID"):
        final_points([found[0], found[2]], ["cfg"])


def test_final_points_of_a_search_without_the_base():
    points = final_points([point_row(1.0, 5.0), point_row(2.0, 4.0, cfg=2.0), point_row(-1.0, 3.0)], ["cfg"])
    assert points["neon"] == Point("s", 2.0, (("cfg", 2.0),))
    assert points["base"] == Point(None, 0.0, (("cfg", 2.0),))


def test_final_of_another_base(mini, searched, tmp_path):
    other = final(mini, tmp_path / "final.jsonl", searched, "--base", mini.snapshots[0])
    assert error_of(*other) == f"error: {searched} started from another base, {mini.base}"
    assert not (tmp_path / "final.jsonl").exists()


def test_final_samples_and_measures_as_the_search_did(mini, searched, tmp_path):
    """What the search did not sweep must be what it was then."""
    out = tmp_path / "final.jsonl"
    for option, value, was in [("num_steps", 5, 4), ("solver", "euler", "heun"), ("sigma_max", 20, 80.0)]:
        wanted = f"the search had {option} {was}, this command has "
        assert wanted in error_of(*final(mini, out, searched, f"--{option}", value))
    assert "the search had dtype float32" in error_of(*final(mini, out, searched, "--precision", "bfloat16"))
    other = tmp_path / "other.safetensors"
    save_digits_cnn(DigitsCNN(16), other)
    message = error_of(*final(mini, out, searched, "--features", f"digits:{other}"))
    assert "the search had features digits-" in message and not out.exists()
    reference = tmp_path / "other.npz"
    neon("reference", "--images", mini.data, "--features", f"digits:{other}", "--out", reference)
    judged = tmp_path / "judged.jsonl"
    printed = neon(
        *final(mini, judged, searched, "--features", f"digits:{other}", "--ref", reference, "--other_features")
    )
    assert {row["features"] for row in rows(judged)}.isdisjoint(row["features"] for row in rows(searched))
    assert len(rows(judged)) == 3 and "warning" not in printed
    path = tmp_path / "swept.jsonl"
    neon(*search(mini, path, "--grid", "num_steps=2,3", w="0,1"))
    neon(*final(mini, out, path))  # num_steps is 4 here, but was swept
    assert {row["num_steps"] for row in rows(out)} <= {2, 3}


def test_final_on_images_that_chose_w_warns(mini, searched, tmp_path):
    seeds = str(rows(searched)[0]["seeds"])
    first, _, last = seeds.partition("-")
    printed = neon(*final(mini, tmp_path / "final.jsonl", searched, "--seeds", f"{first}-{int(last) + 3}"))
    assert f"warning: the search measured {int(last) - int(first) + 1} of these images too" in printed


def test_replace(mini, tmp_path):
    """Rows of another search or final evaluation are dropped; those of this one are not measured again."""
    path, out = tmp_path / "rows.jsonl", tmp_path / "final.jsonl"
    neon(*search(mini, path, w="0,1"))
    before = {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}
    neon(*search(mini, path, "--replace", w="1,0.5"))
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["w"] for row in found] == [1, 0.5, 1, 0.5]
    assert all(row == before[row["key"]] for row in found if row["w"] == 1)
    for seeds in ("300-339", "200-239"):
        neon(*final(mini, out, path, "--seeds", seeds, "--replace"))
    assert [(row["role"], row["seeds"]) for row in rows(out)] == [
        (role, "200-239") for role in ("base", "selftrained", "neon")
    ]


def test_files_that_hold_something_else(mini, searched, tmp_path):
    for name, content in {
        "notes": b"bought milk\nand tea",
        "rows": b'{"fid": 1}\n',
        "list": b"[1, 2]\n",
        "bytes": bytes(range(256)),
        "json": b'{"labels": null}',
    }.items():
        (tmp_path / name).write_bytes(content)
        wanted = f"error: {tmp_path / name}: holds something other than rows of results"
        assert error_of(*search(mini, tmp_path / name)).startswith(wanted)
        assert error_of(*final(mini, tmp_path / "final.jsonl", tmp_path / name)).startswith(wanted)
        assert error_of(*final(mini, tmp_path / name, searched)).startswith(wanted)
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / "none").touch()
    assert "no finished evaluation" in error_of(*final(mini, tmp_path / "final.jsonl", tmp_path / "none"))
    assert not (tmp_path / "final.jsonl").exists()


def test_budget_of():
    assert budget_of("runs/snapshot-003000320.safetensors") == 3_000_320
    assert budget_of(None) == 0 and budget_of("released.safetensors") == 0


def test_reference_statistics_are_of_all_images(mini, tmp_path):
    images = ImageSet(mini.data).images(range(128)).expand(-1, 3, -1, -1)
    features = load_extractor(mini.features[1])(images).features
    for size in (7, 1000):
        neon("reference", "--images", mini.data, *mini.features, "--out", tmp_path / "r.npz", "--batch_size", size)
        found = load_reference(tmp_path / "r.npz")
        torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mu, features.double().mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.sigma, features.double().T.cov(), rtol=1e-5, atol=1e-5)


def test_published_statistics_with_features_of_some_images(mini, tmp_path):
    """FID against what was published; precision and recall against one's own copy of the images."""
    np.savez(tmp_path / "published.npz", mu=np.ones(16), sigma=np.eye(16))
    make = ("reference", *mini.features, "--statistics", tmp_path / "published.npz", "--out", tmp_path / "r.npz")
    evaluate = ("evaluate", "--model", mini.base, *mini.sampling, *mini.features, "--ref", tmp_path / "r.npz")
    evaluate += ("--seeds", "0-31", "--metrics", "all", "--out", tmp_path / "row.json")
    found = {}
    for kind, more in {"alone": (), "features": ("--images", mini.data, "--keep", 50)}.items():
        neon(*make, *more)
        neon(*evaluate)
        found[kind] = json.loads((tmp_path / "row.json").read_text())
    assert found["alone"]["fid"] == found["features"]["fid"]
    assert found["alone"]["metrics"] == ["fid", "is"] and {"precision", "recall", "kid"} <= found["features"].keys()
    kept = load_reference(tmp_path / "r.npz").features
    every = load_extractor(mini.features[1])(ImageSet(mini.data).images(range(128)).expand(-1, 3, -1, -1)).features
    nearest = torch.cdist(kept, every).min(1)
    assert nearest.values.max() < 1e-2 and len(nearest.indices.unique()) == 50
    np.savez(tmp_path / "published.npz", mu=np.ones(3), sigma=np.eye(3))
    assert "features have 16 dimensions, published.npz has 3" in error_of(*make, "--images", mini.data)
    assert "give --images" in error_of("reference", "--out", tmp_path / "x.npz")


def test_reference_over_two_processes(mini, tmp_path):
    make = ("reference", "--images", mini.data, *mini.features, "--batch_size", 50, "--keep", 100, "--out")
    neon(*make, tmp_path / "one.npz")
    finish(*ranks(2, *make, tmp_path / "two.npz"))
    one, two = (load_reference(tmp_path / f"{name}.npz") for name in ("one", "two"))
    torch.testing.assert_close(one.sigma, two.sigma, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(one.features, two.features, rtol=1e-4, atol=1e-5)


def test_base_weights_come_back_after_a_merge(mini):
    """One network serves all points: a merge must leave no trace in the next."""
    from neon.measure.candidates import Candidates

    candidates, base = Candidates(edm.family, mini.base, "cpu"), load_weights(mini.base)
    candidates.load(mini.snapshots[0], 2.0)
    state = candidates.load(None, 0.0).state_dict()
    assert all(torch.equal(state[name], base[name]) for name in base)
    with pytest.raises(NeonError, match=r"w = 0.5 needs a self-trained checkpoint"):
        candidates.load(None, 0.5)


# ---------------------------------------------------------------- by surface


def surface(mini, path, *more, seeds="5-204", w="0:2"):
    options = ("--selftrained", *mini.snapshots, "-w", w, "--seeds", seeds, "--first", 100, "--metrics", "fid,recall")
    return ["search", *mini.measuring, "--base", mini.base, *options, "--out", path, *more]


def chosen(path):
    return json.loads(path.with_suffix(".best.json").read_text())


@pytest.fixture(scope="module")
def by_surface(mini, tmp_path_factory):
    path = tmp_path_factory.mktemp("surface") / "search.jsonl"
    return path, neon(*surface(mini, path, "--grid", "sigma_max=20:60", "--evaluations", 7))


def test_a_search_by_surface(mini, by_surface):
    """Few evaluations, each with its row and features; the best is the lowest measured; the curve is a file."""
    path, printed = by_surface
    found, best = rows(path), chosen(path)
    lowest = min((row for row in found if row["w"] >= 0), key=lambda row: row["fid"])
    assert 4 <= len(found) <= 7 and best["evaluations"] == len(found)
    assert (best["w"], best["sigma_max"], best["fid"]) == (lowest["w"], lowest["sigma_max"], lowest["fid"])
    assert best["w_lo"] <= best["lowest_w"] <= best["w_hi"] and {row["n"] for row in found} == {best["n"]}
    assert f"best: w {best['w']:g}" in printed and f"{len(found)} evaluations, {best['images']:,} images" in printed
    assert f"a grid of {13 * 10 * len(mini.snapshots):,} points" in printed
    kept = sorted(file.name for file in path.with_suffix(".features").iterdir())
    assert kept == sorted(row["kept"] for row in found)
    with path.with_suffix(".curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert list(curve[0]) == ["w", "sigma_max", "budget", "fid", "fid_se"] and len(curve) == 31 * 13
    budget = {float(row["budget"]) for row in curve}
    assert len(budget) == 1 and 15 < sum(bool(row["fid_se"]) for row in curve) <= 31  # where the nodes reach


def test_a_search_by_surface_resumes_and_repeats_nothing(mini, by_surface, tmp_path):
    path, printed = by_surface
    whole = path.read_bytes()
    for done in (1, 3):
        again = tmp_path / f"{done}.jsonl"
        again.write_bytes(b"".join(whole.splitlines(keepends=True)[:done]) + b'{"key": "01')
        neon(*surface(mini, again, "--grid", "sigma_max=20:60", "--evaluations", 7))
        assert [row["key"] for row in rows(again)] == [row["key"] for row in rows(path)]
        assert chosen(again) == pytest.approx(chosen(path))
    assert "best: " + neon(*surface(mini, path, "--grid", "sigma_max=20:60", "--evaluations", 7)).split("best: ")[
        1
    ] == ("best: " + printed.split("best: ")[1])
    assert path.read_bytes() == whole


def test_a_search_by_surface_in_two_processes(mini, by_surface, tmp_path):
    path, _ = by_surface
    again = tmp_path / "search.jsonl"
    torchrun(2, "-m", "neon.cli", *surface(mini, again, "--grid", "sigma_max=20:60", "--evaluations", 7))
    for found, wanted in zip(rows(again), rows(path), strict=True):
        assert found["key"] == wanted["key"] and found["fid"] == pytest.approx(wanted["fid"], rel=1e-6)
    assert chosen(again)["w_lo"] == pytest.approx(chosen(path)["w_lo"], abs=1e-3)


def test_what_a_grid_measured_serves_the_surface(mini, tmp_path):
    path = tmp_path / "search.jsonl"
    one = ("--selftrained", mini.snapshots[0])
    neon(*surface(mini, path, *one, "--method", "grid", seeds="5-104", w="0,1,2"))
    before = path.read_bytes()
    printed = neon(*surface(mini, path, *one, "--evaluations", 3, seeds="5-104"))
    assert path.read_bytes() == before and "3 evaluations" in printed
    neon("clean", path)
    assert not path.with_suffix(".features").exists()
    neon(*surface(mini, path, *one, "--evaluations", 3, seeds="5-104"))  # sampled again for the features alone
    assert path.read_bytes() == before and len(list(path.with_suffix(".features").iterdir())) == 3


def test_an_evaluation_is_extended_without_sampling_again(mini, tmp_path):
    """The first images are those that are kept; the numbers are those of an evaluation of all at once."""
    extractor, reference = load_extractor(mini.features[1]), load_reference(mini.ref)
    model = edm.family.load(mini.base, device="cpu")
    asked = []

    def sample(seeds):
        asked.extend(seeds.tolist())
        return edm.family.sample(model, seeds, edm.family.labels(model, seeds), num_steps=4)

    def evaluation(n):
        return Evaluation(torch.arange(n), extractor, reference, ("fid", "is", "kid", "recall"), 16)

    kept = Kept(tmp_path / "kept.npz", logits=True)
    evaluation(40)(sample, keep=kept)
    extended = evaluation(100)(sample, keep=kept)
    assert asked == list(range(100))
    assert extended == pytest.approx(evaluation(100)(sample), rel=1e-6)
    asked.clear()
    assert evaluation(60)(sample, keep=kept) == pytest.approx(evaluation(60)(sample), rel=1e-6) and asked == list(
        range(60)
    )
    (tmp_path / "kept.npz").write_bytes(b"broken")
    with pytest.raises(NeonError, match="not features that were kept"):
        evaluation(40)(sample, keep=kept)


def test_compare(mini, tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    neon(*evaluate(mini, one, "--keep_features", metrics="fid"))
    neon(*evaluate(mini, other, "--selftrained", mini.snapshots[1], "-w", 3, "--keep_features", metrics="fid"))
    difference = json.loads(one.read_text())["fid"] - json.loads(other.read_text())["fid"]
    printed = neon("compare", one, other, "--ref", mini.ref)
    assert f"FID of {one} minus {other}: {difference:.4g} (" in printed and printed.endswith("; 100 seeds\n")
    assert "no difference that" in neon("compare", one, one, "--ref", mini.ref)
    far = tmp_path / "far.json"
    neon(*evaluate(mini, far, "--seeds", "7000-7099", metrics="fid"))
    assert "without keeping its features" in error_of("compare", one, far, "--ref", mini.ref)
    neon(*evaluate(mini, far, "--seeds", "7000-7099", "--keep_features", metrics="fid"))
    assert "no seeds in common" in error_of("compare", one, far, "--ref", mini.ref)
    neon("clean", other)
    assert "not kept any more" in error_of("compare", one, other, "--ref", mini.ref)
    assert "no such file" in error_of("compare", one, tmp_path / "none.json", "--ref", mini.ref)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("-w", "3:0"), "a surface needs a range of w"),
        (("--grid", "solver=heun,euler", "--method", "surface"), "no numbers in between"),
        (("--grid", "sigma_max=20:20"), "a surface needs a range of sigma_max"),
        (("-w", "0:x"), "not a range"),
    ],
)
def test_surfaces_that_are_refused(mini, tmp_path, more, message):
    path = tmp_path / "search.jsonl"
    assert message in error_of(*surface(mini, path, *more))
    assert not path.exists()


# ---------------------------------------------------------------- compiled networks, a second queue


def test_a_compiled_network_meets_one_shape(mini, monkeypatch, tmp_path):
    """The last batch is smaller; nothing is compiled again for it, and no number moves."""
    compiled, graphs = torch.nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend=backend))
    torch.compiler.reset()
    found = {}
    for n, seeds in {"whole": "0-31", "rest": "0-39"}.items():
        options = ("--seeds", seeds, "--metrics", "fid", "--batch_size", 16, "--model", mini.base)
        for way in ((), ("--compile",)):
            neon("evaluate", *mini.measuring, *options, *way, "--out", tmp_path / f"{n}{len(way)}.json")
        found[n] = len(graphs)
    assert 0 < found["whole"] == found["rest"]
    for n in found:
        plain, fast = (json.loads((tmp_path / f"{n}{i}.json").read_text())["fid"] for i in (0, 1))
        assert fast == pytest.approx(plain, rel=1e-4)

    graphs.clear()
    torch.compiler.reset()
    words = ("--model", mini.base, "--seeds", "0-20", "--batch_size", 16)
    for name, way in {"plain": (), "fast": ("--compile",)}.items():
        neon("generate", *mini.sampling, *words, *way, "--out", tmp_path / name)
    assert len(graphs) == found["whole"]
    plain, fast = (ImageSet(tmp_path / name).images(range(21)).int() for name in ("plain", "fast"))
    assert (plain - fast).abs().max() <= 1


def test_work_aside_is_done_in_order_and_waited_for():
    """On a CPU at once. tests marked cuda compare the two queues of a GPU with one."""
    aside, order = Aside(torch.device("cpu")), []
    x = torch.arange(3.0)
    with aside.after(x):
        order.append("aside")
        host = aside.to_host(x)
    order.append("next")
    aside.wait()
    assert order == ["aside", "next"] and torch.equal(host, x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_queues_of_a_gpu_give_the_numbers_of_one(mini, monkeypatch, tmp_path):
    words = ("--seeds", "0-255", "--metrics", ALL, "--batch_size", 16, "--model", mini.base, "--device", "cuda")
    neon("evaluate", *mini.measuring, *words, "--out", tmp_path / "two.json")
    monkeypatch.setattr(Aside, "__init__", lambda self, device: setattr(self, "stream", None))
    neon("evaluate", *mini.measuring, *words, "--out", tmp_path / "one.json")
    assert numbers(tmp_path / "two.json") == numbers(tmp_path / "one.json")
