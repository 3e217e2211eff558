"""`neon diagnose`: s, its cosine and interval, the predicted w; on losses with known gradients, and on families."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from processes import error_of, neon
from sets import write_images
from test_family import OWN, case  # noqa: F401, a fixture

from neon import NeonError
from neon.data import ImageSet
from neon.diagnose import (
    NEON,
    SELF_TRAINING,
    UNKNOWN,
    Gradients,
    Sampled,
    Sizes,
    alignment,
    inner,
    interval,
    needed,
    predicted_w,
    pseudo_values,
    sizes_of,
    verdict,
)
from neon.family import Recipe, get_family
from neon.measure.candidates import Candidates
from neon.selftrain import seed_step
from neon.weights.checkpoint import save_safetensors

CPU = torch.device("cpu")
# The loss is ½ Σ h (θ − pixel / 255 − noise)²: gradient, preconditioner and the best w are known.
QUADRATIC = """
import torch
from neon.family import Recipe
from neon.weights.checkpoint import load_weights
H = torch.tensor([[1.0, 4.0], [0.5, 2.0]])
recipes = {"tune": Recipe(batch=8, lr=1e-3, budget=8, snapshot=8),
           "noisy": Recipe(batch=8, lr=1e-3, budget=8, snapshot=8, loss={"noise": 0.5})}
class Centre(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(2, 2))
        self.unused = torch.nn.Parameter(torch.ones(4))
def load(path, *, device, precision="float32"):
    model = Centre()
    model.load_state_dict(load_weights(path))
    return model.to(device)
def sample(model, seeds, labels):
    grey = (255 * model.theta.detach()).clamp(0, 255).to(torch.uint8)
    return grey.expand(len(seeds), 1, 2, 2)
def draw(model, n, generator, *, images, noise=0.0):
    return noise * torch.randn(n, 1, 2, 2, generator=generator)
def loss(model, images, labels, draws, noise=0.0):
    return (H * (model.theta - images / 255 - draws) ** 2).sum() / 2 / len(images)
"""
THETA = torch.tensor([[0.5, 0.25], [0.75, 0.125]])
H = torch.tensor([[1.0, 4.0], [0.5, 2.0]])


@pytest.fixture
def quadratic(tmp_path, monkeypatch):
    """A working folder with quadratic.py and base.safetensors; the family."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("quadratic.py").write_text(QUADRATIC)
    save(Path("base.safetensors"), THETA)
    return get_family("quadratic.py")


def save(path, theta):
    save_safetensors(path, {"theta": theta, "unused": torch.ones(4)})


def alike(values, n=64) -> Sampled:
    """n times the image with these pixels."""
    return Sampled(torch.tensor(values, dtype=torch.uint8).expand(n, 1, 2, 2), None)


def varied(mean, n=64, seed=0) -> Sampled:
    drawn = torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Sampled((torch.tensor(mean) + 40 * drawn).clamp(0, 255).to(torch.uint8), None)


def gradients_of(family, recipe="tune", repeats=1, **options):
    model = family.load("base.safetensors", device=CPU)
    return Gradients(family, model, family.recipes[recipe], CPU, seed=0, repeats=repeats, **options)


# ---------------------------------------------------------------- what is known in closed form


def test_s_and_cosine_are_those_of_the_formula(quadratic):
    real, synthetic = [[200, 20], [30, 90]], [[100, 120], [255, 10]]
    sizes = sizes_of(quadratic.recipes["tune"], 64, 128, batches=6)
    found = alignment(gradients_of(quadratic), alike(real), alike(synthetic, 128), sizes, seed=0)
    r_d, r_s = (H * (THETA - torch.tensor(x) / 255).double() for x in (real, synthetic))
    scale = 1 / (r_s.abs() + 1e-8)  # every batch has the same gradient
    s, squares = (r_d * scale * r_s).sum(), [(g * scale * g).sum() for g in (r_d, r_s)]
    assert found["s"] == pytest.approx(float(s), rel=1e-4)
    assert found["cosine"] == pytest.approx(float(s / (squares[0] * squares[1]).sqrt()), rel=1e-4)
    assert found["plain_s"] == pytest.approx(float((r_d * r_s).sum()), rel=1e-4)
    assert found["s_lo"] == pytest.approx(found["s"]) == found["s_hi"] and found["still"] == 0.5


def test_the_verdict_is_the_side_of_the_interval(quadratic):
    sizes = sizes_of(quadratic.recipes["tune"], 64, 128, batches=6)

    def found(real, synthetic):
        return alignment(gradients_of(quadratic), alike(real), alike(synthetic, 128), sizes, seed=0)["verdict"]

    low, high = [[0, 0], [0, 0]], [[255, 255], [255, 255]]
    assert (found(low, high), found(high, low)) == (NEON, NEON)
    assert (found(low, low), found(high, high)) == (SELF_TRAINING, SELF_TRAINING)
    assert [verdict(*ends) for ends in ((-2, -1), (1, 2), (-1, 1))] == [NEON, SELF_TRAINING, UNKNOWN]


def test_only_products_of_different_batches_count(quadratic):
    """The streamed sums give what the table of all products gives without its diagonal."""
    real, synthetic = varied([[230, 160], [80, 150]]), varied([[60, 180], [90, 140]], 128, seed=1)
    recipe, gradients = quadratic.recipes["noisy"], gradients_of(quadratic, "noisy", repeats=2)
    sizes = sizes_of(recipe, 64, 128, batches=5)
    found, seen = alignment(gradients, real, synthetic, sizes, seed=3), []

    class Kept(Gradients):
        def __call__(self, data, step, indices, repeats=None):
            seen.append((data, step, super().__call__(data, step, indices, repeats)))
            return [g.clone() for g in seen[-1][2]]

    kept = Kept(quadratic, gradients.model, recipe, CPU, seed=0, repeats=2)
    assert alignment(kept, real, synthetic, sizes, seed=3) == found
    xs, ys = ([g for data, step, g in seen[sizes.squares :] if data is of][:5] for of in (real, synthetic))
    squares = torch.stack([g[0] for _, _, g in seen[: sizes.squares]]).square().mean(0)
    scale = [1 / (squares.sqrt() + 1e-8), torch.zeros(4)]

    def mean(a, b, scale=None):
        return np.mean([inner(x, y, scale) for i, x in enumerate(a) for j, y in enumerate(b) if i != j])

    assert found["s"] == pytest.approx(mean(xs, ys, scale), rel=1e-4, abs=1e-6)
    cosine = mean(xs, ys) / math.sqrt(mean(xs, xs) * mean(ys, ys))
    assert found["plain_cosine"] == pytest.approx(cosine, rel=1e-3)
    assert -1 < cosine < 1


def test_the_same_noise_is_on_both_sides_and_no_bias(quadratic):
    """With the base at the mean of the images both gradients are noise alone: s is about 0, not a variance."""
    grey = alike((255 * THETA).round().to(torch.uint8).tolist(), 256)
    gradients = gradients_of(quadratic, "noisy")
    one, other = gradients(grey, 3, range(8)), gradients(grey, 3, range(8))
    assert all(torch.equal(a, b) for a, b in zip(one, other)) and one[0].abs().min() > 1e-3
    assert not torch.equal(one[0], gradients(grey, 4, range(8))[0])
    found = alignment(gradients, grey, grey, sizes_of(quadratic.recipes["noisy"], 256, 256, 16), seed=0)
    variance = 0.25 * H.square() / 8
    assert abs(found["plain_s"]) < 0.3 * float(variance.sum()) and found["plain_s_lo"] < 0 < found["plain_s_hi"]


def test_equal_images_do_not_speak_for_neon(quadratic):
    images, recipe = varied([[20, 20], [20, 20]], 128), quadratic.recipes["tune"]
    found = alignment(gradients_of(quadratic), images, images, sizes_of(recipe, 128, 128, 8), seed=0)
    assert found["s_lo"] > 0 and found["verdict"] == SELF_TRAINING and found["cosine"] > 0.9


def test_intervals_cover_the_truth():
    """Products of noisy vectors with known means, 8 batches: 95 % intervals hold the true product about as often."""
    generator, held, trials = np.random.default_rng(0), 0, 300
    mean_x, mean_y = np.full(20, 0.3), np.full(20, -0.1)
    for _ in range(trials):
        x, y = mean_x + generator.normal(size=(8, 20)), mean_y + generator.normal(size=(8, 20))
        table = x @ y.T
        rows = table.sum(0) + table.sum(1) - 2 * table.diagonal()
        values = pseudo_values(rows)
        assert values.mean() == pytest.approx((table.sum() - table.trace()) / 56)
        low, high = interval(values, seed=0)
        held += low <= mean_x @ mean_y <= high
    assert 0.93 < held / trials <= 0.995


# ---------------------------------------------------------------- the predicted w


@pytest.mark.parametrize("towards", [1, -1])
def test_the_predicted_w_is_where_a_quadratic_is_lowest(quadratic, towards):
    mean, drift = torch.tensor([[140.0, 51.0], [204.0, 25.5]]), torch.tensor([[0.1, -0.05], [0.02, 0.1]]) * towards
    save("tuned.safetensors", THETA + drift)
    candidates = Candidates(quadratic, "base.safetensors", CPU)
    gradients = Gradients(quadratic, candidates.model, quadratic.recipes["tune"], CPU, seed=0, repeats=1)
    sizes = sizes_of(quadratic.recipes["tune"], 64, None, batches=8)
    found = predicted_w(gradients, candidates, "tuned.safetensors", alike(mean.int().tolist()), sizes, seed=0)
    away = THETA - mean.int() / 255
    best = (H * away * drift).sum() / (H * drift * drift).sum()
    assert found["w"] == pytest.approx(float(best), rel=1e-3) == found["w_lo"]
    assert found["curvature"] == pytest.approx(float((H * drift**2).sum()), rel=1e-3)
    assert torch.equal(candidates.model.theta, THETA), "the base is there again"


def test_the_curvature_is_that_of_the_second_derivative(tmp_path):
    """Central differences against a Hessian-vector product by double backward, on a network."""
    family = get_family(OWN)
    torch.manual_seed(0)
    model = family.create("digits", device="cpu", width=16)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    drift = {name: 0.02 * torch.randn_like(p) for name, p in start.items()}
    for name, state in (("base", start), ("tuned", {n: p + drift[n] for n, p in start.items()})):
        save_safetensors(tmp_path / f"{name}.safetensors", state, family.metadata(model))
    pixels = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8)
    data, recipe = Sampled(pixels, torch.arange(32) % 10), Recipe(batch=8, lr=1e-3, budget=8, snapshot=8)
    candidates = Candidates(family, tmp_path / "base.safetensors", CPU)
    gradients = Gradients(family, candidates.model, recipe, CPU, seed=0, repeats=1)
    sizes = sizes_of(recipe, 32, None, batches=4)
    found = predicted_w(gradients, candidates, str(tmp_path / "tuned.safetensors"), data, sizes, seed=0)

    params, slopes, curvatures = gradients.params, [], []
    directions = [drift[name] for name, _ in candidates.model.named_parameters()]
    order = np.random.default_rng([0, 0]).permutation(32).reshape(4, 8)
    for k, indices in enumerate(order.tolist()):
        generator = torch.Generator()
        seed_step(generator, 0, k, 8, 0)
        draws = family.draw(candidates.model, 8, generator, images=lambda: None)
        loss = family.loss(candidates.model, data.images(indices), data.labels[indices], draws)
        first = torch.autograd.grad(loss, params, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, directions))
        second = torch.autograd.grad(along, params, allow_unused=True)
        slopes.append(-float(along.detach()))
        curvatures.append(sum(float((h * d).sum()) for h, d in zip(second, directions) if h is not None))
    assert found["slope"] == pytest.approx(np.mean(slopes), rel=0.01)
    assert found["curvature"] == pytest.approx(np.mean(curvatures), rel=0.01)


def test_a_loss_that_curves_down_has_no_best_w(quadratic):
    Path("down.py").write_text(QUADRATIC.replace(".sum() / 2", ".sum() / -2"))
    family = get_family("down.py")
    save("tuned.safetensors", THETA + 0.1)
    candidates = Candidates(family, "base.safetensors", CPU)
    gradients = Gradients(family, candidates.model, family.recipes["tune"], CPU, seed=0, repeats=1)
    sizes = sizes_of(family.recipes["tune"], 64, None, batches=8)
    found = predicted_w(gradients, candidates, "tuned.safetensors", alike([[0, 0], [0, 0]]), sizes, seed=0)
    assert found["w"] is None and found["curvature"] < 0 and (found["w_lo"], found["w_hi"]) == (-math.inf, math.inf)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("real", "synthetic", "images", "wanted"),
    [
        (597, 2000, None, Sizes(16, 32, 16, 64, True)),
        (5000, 2000, None, Sizes(16, 64, 15, 64, True)),
        (597, None, None, Sizes(16, 32, 16, 64, True)),
        (597, 600, None, Sizes(16, 32, 9, 64, False)),
        (597, 2000, 100, Sizes(16, 4, 16, 64, True)),
        (32, 40, None, Sizes(16, 2, 1, 32, False)),
    ],
)
def test_batches_are_parts_of_the_recipes(real, synthetic, images, wanted):
    recipe = Recipe(batch=64, lr=1, budget=64, snapshot=64)
    assert sizes_of(recipe, real, synthetic, 16, images) == wanted
    assert needed(wanted) <= (synthetic or 1536)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((64, 64, 3), "at least 4"),
        ((10, 64, 16), "16 batches of 10 images"),
        ((64, 10, 16), "16 batches of 10 images"),
        ((64, 64, 4, 100), "100 images are asked for, there are 64"),
    ],
)
def test_too_few_images_are_refused(options, said):
    with pytest.raises(NeonError, match=said):
        sizes_of(Recipe(batch=64, lr=1, budget=64, snapshot=64), *options)


# ---------------------------------------------------------------- every family


def test_every_family_has_gradients_that_micro_batches_do_not_change(case):  # noqa: F811
    recipe = Recipe(batch=16, lr=1e-3, budget=16, snapshot=16, loss=case.loss)
    data = Sampled(case.data.pixels, case.data.labels)

    def of(images=range(16), **options):
        return Gradients(case.family, case.model(), recipe, CPU, seed=1, repeats=2, **options)(data, 5, list(images))

    whole, parts, other = of(), of(micro_batch=8), of(range(16, 32))
    total = math.sqrt(inner(whole, whole))
    difference = [a - b for a, b in zip(whole, parts)]
    assert total > 0 and math.sqrt(inner(difference, difference)) < 1e-3 * total
    assert all(torch.equal(a, b) for a, b in zip(whole, of()))
    assert not all(torch.equal(a, b) for a, b in zip(whole, other))


def test_every_family_is_diagnosed(case):  # noqa: F811
    recipe = Recipe(batch=8, lr=1e-3, budget=16, snapshot=16, loss=case.loss)
    data = Sampled(case.data.pixels, case.data.labels)
    gradients = Gradients(case.family, case.model(), recipe, CPU, seed=1, repeats=1)
    found = alignment(gradients, data, data, sizes_of(recipe, 32, 32, 4), seed=0)
    assert found["s_lo"] <= found["s"] <= found["s_hi"] and found["verdict"] in (NEON, SELF_TRAINING, UNKNOWN)
    assert found["s"] > 0 and 0 <= found["still"] < 1


# ---------------------------------------------------------------- the command


@pytest.fixture
def words(mini):
    few = ("--batches", 4, "--images", 32, "--repeats", 1)
    return (
        "diagnose",
        "--family",
        "edm",
        "--base",
        mini.base,
        "--recipe",
        "digits",
        "--real",
        mini.path / "heldout",
        *few,
    )


def test_the_command_prints_and_writes_all_it_found(mini, words, tmp_path):
    out = tmp_path / "found.json"
    said = neon(*words, "--synthetic", mini.data, "--selftrained", *mini.snapshots, "--out", out)
    row = json.loads(out.read_text())
    assert said.strip().splitlines()[-1].startswith(row["verdict"]) and f"cosine {row['cosine']:.3g}" in said
    assert [one["budget"] for one in row["selftrained"]] == [128, 256]
    assert said.count("predicted w") == 2 and all(one["slope"] for one in row["selftrained"])
    assert (row["batches"], row["batch"], row["synthetic_images"], row["device"]) == (4, 8, 128, "cpu")
    assert len(row["base_sha256"]) == 64 and row["recipe"] == "digits"
    again = tmp_path / "again.json"
    neon(
        *words, "--synthetic", mini.data, "--selftrained", mini.snapshots[0].parent, "--micro_batch", 4, "--out", again
    )
    other = json.loads(again.read_text())
    assert other["s"] == pytest.approx(row["s"], rel=1e-3)
    assert other["selftrained"][1]["slope"] == pytest.approx(row["selftrained"][1]["slope"], rel=1e-2)


def test_s_in_memory_is_the_s_of_generate(mini, words, tmp_path):
    folder, rows = tmp_path / "S", [tmp_path / name for name in ("read.json", "sampled.json")]
    neon("generate", *mini.sampling, "--model", mini.base, "--seeds", "5-164", "--out", folder)
    neon(*words, "--synthetic", folder, "--out", rows[0])
    neon(*words, "--num_steps", 4, "--seeds", "5-164", "--out", rows[1])
    read, sampled = (json.loads(path.read_text()) for path in rows)
    assert read["s"] == sampled["s"] and read["verdict"] == sampled["verdict"]
    assert sampled["sampling"]["num_steps"] == 4 and "synthetic_sha256" in read
    line = neon(*words, "--num_steps", 4)  # as many as it takes: 4 batches of 8, and 4 of 64 for the second moment
    assert "4 batches of 64 of S, others" in line


def test_the_users_own_family(quadratic):
    write_images(Path("real"), (1, 2, 2), 32, 1, labelled=False)
    said = neon("diagnose", "--family", "quadratic.py", "--base", "base.safetensors", "--recipe", "tune",
                "--real", "real", "--batches", 4, "--out", "row.json")  # fmt: skip
    assert "50.0% of the weights get no gradient from S" in said
    assert json.loads(Path("row.json").read_text())["seeds"] == "0-63"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--synthetic", "{data}", "--seeds", "0-9"), "give --synthetic or --seeds, not both"),
        (("--synthetic", "gone"), "gone: no such file"),
        (("--synthetic", "{data}", "--recipe", "none"), "unknown recipe 'none' (know "),
        (("--synthetic", "{data}", "--selftrained", "gone"), "gone: no such file"),
        (("--synthetic", "{data}", "--selftrained", "{base}"), "the same weights as the base"),
        (("--synthetic", "{data}", "--batches", "2"), "at least 4"),
        (("--seeds", "0-2",), "4 batches of 3 images"),
        (("--synthetic", "{colour}"), "images are (3, 8, 8)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_no_file(mini, words, tmp_path, options, said):
    colour = write_images(tmp_path / "colour", (3, 8, 8), 40, 10)
    filled = [text.format(data=mini.data, base=mini.base, colour=colour) for text in options]
    assert said in error_of(*words, *filled, "--out", tmp_path / "row.json")
    assert not (tmp_path / "row.json").exists()


def test_several_processes_are_refused(mini, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in error_of(*words, "--synthetic", mini.data)


# ---------------------------------------------------------------- the scores


def _final(gains):
    """Final rows: setting → gain of Neon, gain of self-training, by seed 0."""
    rows = []
    for setting, (gain, gain_selftrained) in gains.items():
        shared = {"family": "edm", "setting": setting, "seed": 0, "precision": 0.9, "recall": 0.5}
        rows.append(shared | {"role": "base", "fid": 10.0, "w": 0.0, "budget": 0})
        rows.append(shared | {"role": "selftrained", "fid": 10.0 - gain_selftrained, "w": -1.0, "budget": 64})
        rows.append(
            shared | {"role": "neon", "fid": 10.0 - gain, "w": 1.5 if gain else 0.0, "budget": 64 if gain else 0}
        )
    return pd.DataFrame(rows)


def test_scores_compare_verdicts_with_what_was_measured():
    from mini.diagnosed import by_setting, summary, table_of

    def found(s, cosine, verdict):
        snapshots = [{"budget": b, "w": w, "w_lo": w - 0.5, "w_hi": w + 1} for b, w in ((64, 1.0), (128, 3.0))]
        return {"s": s, "s_lo": s, "s_hi": s, "cosine": cosine, "verdict": verdict, "selftrained": snapshots}

    diagnoses = {
        ("a", 0): found(-1.0, -0.5, NEON),
        ("b", 0): found(-1.0, None, UNKNOWN),
        ("c", 0): found(2.0, 0.5, SELF_TRAINING),
        ("d", 0): found(1.0, 0.2, UNKNOWN),
    }
    table = table_of(diagnoses, _final({"a": (5.0, -9.0), "b": (0.0, 2.0), "c": (0.0, 3.0), "d": (0.0, -1.0)}))
    assert table["sign_right"].tolist() == [True, False, True, None]
    assert table["w_predicted"].tolist() == [1.0, 3.0, 3.0, 3.0]  # of the searched snapshot, else of the last
    sentences = summary(table)
    assert "right in 2 of 3 runs" in sentences[0] and "2 of 4 verdicts" in sentences[0] and "2 of 2" in sentences[0]
    assert by_setting(table, {"a": "Title"})["setting"].tolist() == ["Title", "b", "c", "d"]
    with pytest.raises(NeonError, match="e, seed 0: a diagnosis without final rows"):
        table_of({("e", 0): found(0.0, 0.0, UNKNOWN)}, _final({"a": (1.0, 0.0)}))


def test_the_plan_diagnoses_every_reported_setting_with_its_own_s():
    from mini.diagnosed import diagnosed
    from mini.plan import plan

    found = diagnosed()
    assert {run.name for run in found} == {"euler10", "heun8", "heun18", "fm4", "tau06", "cfg2", "imm8", "ddim10"}
    assert (
        len(found)
        == len({run.diagnosis() for run in found})
        == sum(len(jobs) for (stage, _), jobs in plan().items() if stage == "diagnose")
    )


def test_the_toys_signs_are_counted():
    from mini.diagnosed import toy_sentence, toy_signs

    found = toy_signs(seeds=2, epochs=20, fine_tune=2, samples=200)
    assert list(found.columns) == ["zeta", "seed", "cosine", "w"] and len(found) == 4
    given = pd.DataFrame({"zeta": [1.1, 1.1, 0.9], "seed": [0, 1, 0], "cosine": [-1, 1, 0.5], "w": [1, 1, -1]})
    assert "2 of 3 runs (ζ = 1.1: 1 of 2, ζ = 0.9: 1 of 1)" in toy_sentence(given)


def test_image_sets_are_taken_as_they_are(mini):
    images = ImageSet(mini.data)
    held = Sampled(images.images(range(4)), images.labels[:4])
    assert held.shape == images.shape and torch.equal(held.images([2, 0]), images.images([2, 0]))
