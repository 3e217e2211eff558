"""Guidance by a second network: Neon's formula for outputs, at every call, and rows that say so."""

import dataclasses
import json
import re
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from processes import error_of, neon, torchrun
from test_family import BATCH, SAMPLING, SMALL, case  # noqa: F401, case is a fixture

import edm.family
from neon import NeonError, cost
from neon.card import results_of
from neon.family import get_family
from neon.guidance import guided_output
from neon.measure.candidates import Candidates, Guided, Point
from neon.measure.evaluate import Evaluation
from neon.measure.features import load_extractor
from neon.measure.metrics import load_reference
from neon.measure.rows import Rows, digest, images_of, key_of, measure
from neon.weights.checkpoint import load_weights, open_weights, save_safetensors

# A family whose network is linear in its weights, and whose images are linear in the outputs of two calls.
LINEAR = """
import torch
from neon.family import Recipe
recipes = {"tune": Recipe(batch=4, lr=1e-3, budget=8, snapshot=8)}
guidable = True
class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope, self.shift = (torch.nn.Parameter(torch.zeros(8, dtype=torch.float64)) for _ in range(2))
    def forward(self, x, *, times):
        return self.slope * x * times + self.shift
def load(path, *, device, precision="float32"):
    from neon.weights.checkpoint import load_weights
    model = Linear()
    model.load_state_dict(load_weights(path))
    return model.to(device).requires_grad_(False).eval()
def sample(model, seeds, labels):
    x = seeds[:, None] + torch.zeros(8, dtype=torch.float64)
    return sum(model(x, times=step) for step in (1, 3))
def draw(model, n, generator, *, images):
    return None
def loss(model, images, labels, draws):
    return images.sum()
"""
GUIDABLE = ("edm", "flow", "imm", "diffusers")


@pytest.fixture
def linear(tmp_path, monkeypatch):
    """The family, a base and a θ_s."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("linear.py").write_text(LINEAR)
    drawn = torch.Generator().manual_seed(0)
    for name in ("base", "selftrained"):
        state = {part: torch.randn(8, generator=drawn, dtype=torch.float64) for part in ("slope", "shift")}
        save_safetensors(f"{name}.safetensors", state)
    return get_family("linear.py")


@pytest.fixture
def pair(case):  # noqa: F811
    """A family's base and a θ_s near it, in files."""
    paths = []
    for name, far in (("base", 0.0), ("trained", 0.02)):
        model, drawn = case.model(), torch.Generator().manual_seed(1)
        state = case.family.weights(model).state_dict()
        with torch.no_grad():
            for tensor in state.values():
                if tensor.is_floating_point():
                    tensor.add_(far * torch.randn(tensor.shape, generator=drawn))
        paths.append(case.path / f"{name}.safetensors")
        save_safetensors(paths[-1], state, case.family.metadata(model))
    return paths


def guided(case, base, **options) -> Guided:  # noqa: F811
    return Guided(case.family, base, "cpu", **options, **case.loading)


def outputs(network, run) -> list:
    """What every call of the network returns while run() runs, after all hooks."""
    seen = []
    hook = network.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        run()
    finally:
        hook.remove()
    return seen


def sampled(case, model, seeds):  # noqa: F811
    return case.family.sample(model, seeds, case.family.labels(model, seeds), **case.sampling)


only_guidable = pytest.mark.parametrize("case", GUIDABLE, indirect=True)
SEEDS = torch.tensor([3, 2**40 + 1, 5])


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize("w", [-1.0, 0.5, 2.0])
def test_guidance_of_a_linear_network_is_a_merge(linear, w):
    models = (kind(linear, "base.safetensors", "cpu") for kind in (Candidates, Guided))
    merged, found = (linear.sample(one.load("selftrained.safetensors", w), SEEDS, None) for one in models)
    assert torch.allclose(found, merged, rtol=1e-12)
    base = linear.sample(Candidates(linear, "base.safetensors", "cpu").model, SEEDS, None)
    assert not torch.allclose(found, base, rtol=1e-2)


def test_every_tensor_of_an_output_is_extrapolated():
    @dataclass
    class Output:
        sample: torch.Tensor
        more: torch.Tensor | None = None

    one, two = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    wanted = [-1.0, 6.0]
    assert guided_output(one, two, 2.0).tolist() == wanted
    assert [part.tolist() for part in guided_output((one, one), (two, two), 2.0)] == [wanted, wanted]
    found = guided_output(Output(one), Output(two), 2.0)
    assert found.sample.tolist() == wanted and found.more is None
    half = guided_output(one.half(), two.half(), 2.0)
    assert half.dtype == torch.float16 and half.tolist() == wanted


@pytest.mark.parametrize("output", [[torch.ones(2)], {"sample": torch.ones(2)}, namedtuple("Two", "a")(torch.ones(2))])
def test_an_output_of_another_kind_is_refused(output):
    with pytest.raises(NeonError, match=f"returns a {type(output).__name__} cannot be guided"):
        guided_output(output, output, 1.0)


def test_outputs_of_two_shapes_are_refused():
    with pytest.raises(NeonError, match=r"\(2,\) and \(1,\)"):
        guided_output(torch.ones(2), torch.ones(1), 1.0)


# ---------------------------------------------------------------- families


@only_guidable
def test_without_strength_it_is_the_base_without_a_second_network(case, pair, monkeypatch):  # noqa: F811
    base, trained = pair
    wanted = outputs(*_run(case, case.family.load(base, device="cpu", **case.loading)))
    candidates = guided(case, base)
    with monkeypatch.context() as alone:
        alone.setattr(Candidates, "_new", None)  # no further network
        found = outputs(*_run(case, candidates.load(trained, 0.0)))
    assert _bytes(found) == _bytes(wanted)
    far = outputs(*_run(case, candidates.load(trained, 3.0)))
    assert _bytes(far) != _bytes(wanted)
    assert _bytes(outputs(*_run(case, candidates.load(None, 0.0)))) == _bytes(wanted)  # nothing is left of it


@only_guidable
def test_minus_one_is_the_self_trained_model(case, pair):  # noqa: F811
    base, trained = pair
    wanted = outputs(*_run(case, case.family.load(trained, device="cpu", **case.loading)))
    found = outputs(*_run(case, guided(case, base).load(trained, -1.0)))
    assert len(found) == len(wanted)
    for one, other in zip(_tensors(found), _tensors(wanted)):
        assert torch.allclose(one.double(), other.double(), atol=1e-5 * float(other.abs().max()))


@only_guidable
def test_every_call_is_extrapolated_from_the_same_input(case, pair):  # noqa: F811
    """Each guided output follows from those of the two networks for that input."""
    base, trained = pair
    one, two = (case.family.weights(case.family.load(p, device="cpu", **case.loading)) for p in pair)
    model, calls = guided(case, base).load(trained, 1.5), []
    network = case.family.weights(model)
    network.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    sampled(case, model, SEEDS)
    alone = outputs(*_run(case, case.family.load(base, device="cpu", **case.loading)))
    assert len(calls) == len(alone) > 0
    for args, kwargs, output in calls:
        a, b, found = (_tensors([part])[0].double() for part in (one(*args, **kwargs), two(*args, **kwargs), output))
        assert torch.allclose(found, a + 1.5 * (a - b), atol=1e-5 * float(a.abs().max()))
        assert not torch.allclose(found, a, atol=1e-3 * float((a - b).abs().max()))


@only_guidable
def test_an_image_depends_on_its_seed_alone(case, pair):  # noqa: F811
    base, trained = pair
    model = guided(case, base).load(trained, 1.0)
    whole, part = sampled(case, model, SEEDS), sampled(case, model, SEEDS[1:])
    assert (whole[1:].int() - part.int()).abs().max() <= 1


@only_guidable
def test_both_networks_compute_in_the_precision_asked_for(case, pair):  # noqa: F811
    """As if bfloat16 networks were called alone."""
    base, trained = pair
    how = {"device": "cpu", "precision": "bfloat16", **case.loading}
    exact = outputs(*_run(case, case.family.load(trained, device="cpu", **case.loading)))
    wanted = outputs(*_run(case, case.family.load(trained, **how)))
    found = outputs(*_run(case, guided(case, base, precision="bfloat16").load(trained, -1.0)))
    first, second, third = (_tensors(part)[0].double() for part in (found, wanted, exact))
    assert first.dtype == second.dtype and (first - second).norm() < 0.5 * (second - third).norm() + 1e-6


@pytest.mark.parametrize("case", ["var", "xar"], indirect=True)
def test_a_sampler_whose_calls_share_a_cache_is_refused(case, pair):  # noqa: F811
    with pytest.raises(NeonError, match=rf"the sampler of {case.family.name} does more than call the network"):
        guided(case, pair[0])


def test_an_own_family_has_to_say_that_it_can_be_guided(linear):
    Path("silent.py").write_text(LINEAR.replace("guidable = True", ""))
    assert linear.guidable and not get_family("silent.py").guidable
    with pytest.raises(NeonError, match=r"silent\.py does more than call"):
        Guided(get_family("silent.py"), "base.safetensors", "cpu")


def _run(case, model):  # noqa: F811
    return case.family.weights(model), lambda: sampled(case, model, SEEDS)


def _tensors(found) -> list[torch.Tensor]:
    return [one if isinstance(one, torch.Tensor) else one[0] for one in found]


def _bytes(found) -> bytes:
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in _tensors(found))


# ---------------------------------------------------------------- candidates


def test_each_snapshot_guides_in_its_turn(mini):
    candidates = Guided(edm.family, mini.base, "cpu")
    for path in (*mini.snapshots, mini.snapshots[0]):
        candidates.load(path, 1.0)
        state, wanted = candidates._second.state_dict(), load_weights(path)
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_a_compiled_network_follows_every_change_of_w(linear, monkeypatch):
    """And is not compiled again for it."""
    compiled, graphs = torch.nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend=backend))
    fast, slow = (Guided(linear, "base.safetensors", "cpu", compile=on) for on in (True, False))
    for w in (0.0, 1.0, 0.0, 2.0, -1.0, 0.25, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0):
        found, wanted = (linear.sample(one.load("selftrained.safetensors", w), SEEDS, None) for one in (fast, slow))
        assert torch.equal(found, wanted), w
        if w == 1.0:
            both = len(graphs)
    assert 0 < len(graphs) == both
    assert fast.model._compiled_call_impl and fast._second._compiled_call_impl


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop(next(iter(state))), "is missing"),
        (lambda state: state.update(more=torch.ones(2)), "more is not of this network"),
        (lambda state: [t.fill_(torch.nan) for t in state.values()], "not finite in the self-trained model"),
    ],
)
def test_what_does_not_fit_is_refused(mini, tmp_path, change, message):
    state = load_weights(mini.snapshots[0])
    change(state)
    save_safetensors(tmp_path / "bad.safetensors", state)
    with pytest.raises(NeonError, match=message):
        Guided(edm.family, mini.base, "cpu").load(tmp_path / "bad.safetensors", 1.0)


@pytest.mark.parametrize("selftrained, w", [(None, 1.0), ("x", float("nan"))])
def test_a_strength_needs_a_network_and_is_a_number(linear, selftrained, w):
    with pytest.raises(NeonError, match=r"needs a self-trained checkpoint|must be finite"):
        Guided(linear, "base.safetensors", "cpu").load(selftrained, w)


# ---------------------------------------------------------------- rows


def test_rows_by_guidance_have_keys_of_their_own(mini):
    """And those by merge have the keys of old rows: nothing in them says so."""
    extractor, reference = load_extractor(mini.features[1]), load_reference(mini.ref)
    evaluation = Evaluation(torch.arange(8), extractor, reference, ("fid",))
    sampling = dataclasses.asdict(edm.family.Sampling(num_steps=2))
    point = Point(str(mini.snapshots[0]), 1.0)
    both = Candidates(edm.family, mini.base, "cpu"), Guided(edm.family, mini.base, "cpu")
    merged, found = (measure(one, evaluation, sampling, point) for one in both)
    assert "by" not in merged and "networks" not in merged
    assert (found["by"], found["networks"]) == ("guidance", 2) and found["fid"] != merged["fid"]
    assert key_of(both[0], evaluation, sampling, point) != key_of(both[1], evaluation, sampling, point)
    base, same = (measure(one, evaluation, sampling, Point()) for one in both)
    assert same["networks"] == 1 and same["fid"] == base["fid"]
    seeds, model = torch.arange(8), both[1].load(point.selftrained, point.w)
    again = images_of(found, seeds, 3, "cpu")
    wanted = edm.family.sample(model, seeds, edm.family.labels(model, seeds), **sampling)
    assert (again.int() - wanted.int()).abs().max() <= 1
    assert (again.int() - images_of(merged, seeds, 2, "cpu").int()).abs().max() > 1


def search(mini, out, *more):
    models = ("--base", mini.base, "--selftrained", mini.snapshots[1], "--seeds", "0-19", "--metrics", "fid")
    return ["search", *mini.measuring, *models, "--out", out, *more]


def final(mini, rows, out, *more):
    models = ("--base", mini.base, "--search", rows, "--seeds", "100-119", "--metrics", "fid", "--out", out)
    return ["final", *mini.measuring, *models, *more]


def test_search_final_and_grid_by_guidance(mini, tmp_path):
    """By surface, and every row and sheet is a guided one."""
    rows, out = tmp_path / "search.jsonl", tmp_path / "final.jsonl"
    said = neon(*search(mini, rows, "--by", "guidance", "-w", "0:2", "--evaluations", 3))
    found = list(Rows(rows, write=False).rows.values())
    assert {row["by"] for row in found} == {"guidance"} and 2 <= len(found) <= 3
    assert {row["networks"] for row in found if row["w"]} == {2} and "by guidance" in said
    assert json.loads(rows.with_suffix(".best.json").read_text())["by"] == "guidance"
    assert "--by guidance, this command has --by merge" in error_of(*final(mini, rows, out)) and not out.exists()
    neon(*final(mini, rows, out, "--by", "guidance"))
    roles = {row["role"]: row for row in Rows(out, write=False).rows.values()}
    assert {row["by"] for row in roles.values()} == {"guidance"}
    one = tmp_path / "row.json"
    neon("evaluate", *mini.measuring, "--base", mini.base, "--selftrained", mini.snapshots[1], "--by", "guidance",
         "-w", "-1", "--seeds", "100-119", "--metrics", "fid", "--out", one)  # fmt: skip
    assert json.loads(one.read_text())["fid"] == pytest.approx(roles["selftrained"]["fid"], rel=1e-6)
    trained = tmp_path / "trained.json"
    neon("evaluate", *mini.measuring, "--base", mini.snapshots[1], "--seeds", "100-119", "--metrics", "fid",
         "--out", trained)  # fmt: skip
    assert json.loads(trained.read_text())["fid"] == pytest.approx(roles["selftrained"]["fid"], rel=1e-2)
    neon("grid", "--family", "edm", "--final", out, "--seeds", "0-3", "--out", tmp_path / "sheets")
    assert len(list((tmp_path / "sheets").iterdir())) == 3


def test_a_search_by_merge_is_not_finished_by_guidance(mini, tmp_path):
    rows, out = tmp_path / "search.jsonl", tmp_path / "final.jsonl"
    neon(*search(mini, rows, "-w", "0,1"))
    assert "--by merge, this command has --by guidance" in error_of(*final(mini, rows, out, "--by", "guidance"))
    neon(*search(mini, rows, "-w", "0,1", "--by", "guidance"))  # into the same file
    for by in ("merge", "guidance"):
        assert "--by " in error_of(*final(mini, rows, out, "--by", by))
    assert not out.exists()


def test_guidance_is_no_merged_checkpoint(tmp_path):
    roles = ("base", "selftrained", "neon")
    rows = tmp_path / "final.jsonl"
    rows.write_text("".join(json.dumps({"key": r, "role": r, "w": 1.0, "by": "guidance"}) + "\n" for r in roles))
    with pytest.raises(NeonError, match="rows --by guidance"):
        results_of(rows)


def test_processes_and_batches_change_nothing(mini, tmp_path):
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    words = ("--by", "guidance", "-w", "0,1")
    neon(*search(mini, alone, *words))
    torchrun(2, "-m", "neon.cli", *search(mini, shared, *words, "--batch_size", 3))
    one, two = (Rows(path, write=False).rows for path in (alone, shared))
    assert one.keys() == two.keys() and len(one) == 2
    assert all(two[key]["fid"] == pytest.approx(row["fid"], rel=1e-4) for key, row in one.items())
    assert {row["world"] for row in two.values()} == {2}


@pytest.mark.parametrize(
    "words, message",
    [
        (("--by", "guidance"), "--by guidance needs --selftrained"),
        (("--by", "guidance", "--selftrained", "{s}"), "--selftrained needs -w"),
    ],
)
def test_an_evaluation_needs_the_second_network(mini, words, message):
    words = [word.format(s=mini.snapshots[0]) for word in words]
    measuring = (*mini.measuring, "--seeds", "0-9", "--metrics", "fid")
    assert message in error_of("evaluate", *measuring, "--base", mini.base, *words)


def test_images_are_not_guided(mini):
    words = ("--images", mini.data, "--ref", mini.ref, *mini.features, "--metrics", "fid", "--by", "guidance")
    assert "leave out --by" in error_of("evaluate", *words)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("name", ["edm", "flow", "imm", "diffusers"])
def test_two_networks_cost_twice(name):
    family, options = get_family(name), SAMPLING[name]
    once, twice = (cost.sampling(family, SMALL[name][0], options, guided=guided) for guided in (False, True))
    assert twice.passes == 2 * once.passes > 0 and twice.total == pytest.approx(2 * once.total, rel=1e-3)


def test_a_cost_of_what_cannot_be_guided_is_refused():
    with pytest.raises(NeonError, match="the sampler of xar"):
        cost.sampling(get_family("xar"), "digits", {}, guided=True)


def passes(text: str) -> float:
    return float(text.split(" network passes")[0].split()[-1].replace(",", ""))


def test_a_dry_run_counts_two_networks_except_at_the_base(mini, tmp_path):
    out = tmp_path / "rows.jsonl"
    dry, by = ("--dry_run", "cpu"), ("--by", "guidance")
    once = passes(neon(*search(mini, out, "-w", "0,1", *dry)))
    assert once == 7
    for w, factor in (("0,1", 1.5), ("1,2", 2), ("0:2", 2)):
        assert passes(neon(*search(mini, out, "-w", w, *by, *dry))) == pytest.approx(factor * once, abs=0.6)
    assert passes(neon(*final(mini, "no.jsonl", out, *by, *dry))) == pytest.approx(5 / 3 * once, abs=0.6)
    words = (*mini.measuring, "--base", mini.base, "--selftrained", mini.snapshots[0], "--seeds", "0-9", *by, *dry)
    assert [passes(neon("evaluate", *words, "-w", w)) for w in ("0", "1")] == [once, 2 * once]


# ---------------------------------------------------------------- the control: a random direction


def control(mini, out, *more):
    return ["control", "--base", mini.base, "--selftrained", mini.snapshots[1], "--out", out, *more]


def drifts(mini, path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """name → (θ_s − θ_r, what the file has more than θ_r), float64."""
    base, trained, found = (load_weights(p) for p in (mini.base, mini.snapshots[1], path))
    return {name: (trained[name].double() - r.double(), found[name].double() - r.double()) for name, r in base.items()}


def test_a_random_step_is_as_long_as_the_drift_in_every_tensor(mini, tmp_path):
    out = tmp_path / "snapshot-000000256.safetensors"
    said = neon(*control(mini, out, "--family", "edm"))
    product, squares, lengths = 0.0, 0.0, 0.0
    for name, (drift, step) in drifts(mini, out).items():
        rounding = 1e-7 * float(load_weights(mini.base)[name].norm())
        assert abs(float(step.norm() - drift.norm())) <= 1e-6 * float(drift.norm()) + rounding, name
        if drift.numel() > 1000 and drift.norm():
            assert abs(float((drift * step).sum() / (drift.norm() * step.norm()))) < 0.15
        product, squares = product + float((drift * step).sum()), squares + float(drift.square().sum())
        lengths += float(step.square().sum())
    cosine = product / (squares * lengths) ** 0.5
    assert abs(cosine) < 0.05
    printed = [float(text) for text in re.findall(r"norm (\S+); of θ_s − θ_r (\S+); cosine of both (\S+)", said)[0]]
    assert printed == pytest.approx([lengths**0.5, squares**0.5, cosine], rel=0.01)
    base = load_weights(mini.base)
    buffers = [name for name in base if edm.family.is_buffer(name)]
    assert buffers and all(torch.equal(load_weights(out)[name], base[name]) for name in buffers)


def test_a_random_step_takes_buffers_and_integers_from_the_base(mini, tmp_path):
    base = {"b": torch.ones(3, 4), "a": torch.zeros(2), "running_mean": torch.ones(2), "steps": torch.tensor(1)}
    base["same"] = torch.tensor([1.0, torch.inf])
    trained = base | {"b": torch.full((3, 4), 3.0), "running_mean": torch.zeros(2), "steps": torch.tensor(5)}
    for name, state in (("base", base), ("trained", trained)):
        save_safetensors(tmp_path / f"{name}.safetensors", state)
    words = ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "trained.safetensors")
    out = tmp_path / "out.safetensors"
    neon("control", *words, "--buffers", "running", "--out", out)
    found = load_weights(out)
    assert list(found) == list(base)
    assert all(torch.equal(found[name], base[name]) for name in base if name != "b")
    assert (found["b"] - 1).norm() == pytest.approx(2 * 12**0.5, rel=1e-6) and (found["b"] - 3).norm() > 1


def test_a_random_step_is_that_of_its_seed(mini, tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for file, seed in zip(files, (1, 1, 2)):
        neon(*control(mini, file, "--seed", seed))
    one, same, other = (file.read_bytes() for file in files)
    assert one == same != other
    moved, again = (drifts(mini, file) for file in (files[0], files[2]))
    largest = max(moved, key=lambda name: moved[name][0].numel())
    steps = (found[largest][1].flatten() for found in (moved, again))
    assert torch.nn.functional.cosine_similarity(*steps, 0).abs() < 0.15


def test_the_numbers_follow_the_order_of_names(tmp_path):
    """Not that of the files, which depends on their format."""
    states = {"base": torch.zeros(3), "trained": torch.ones(3)}
    found = []
    for names in ("xyz", "zxy"):
        for side, value in states.items():
            save_safetensors(tmp_path / f"{side}.safetensors", {name: value.clone() for name in names})
        words = ("--base", tmp_path / "base.safetensors", "--selftrained", tmp_path / "trained.safetensors")
        neon("control", *words, "--replace", "--out", tmp_path / "out.safetensors")
        found.append(load_weights(tmp_path / "out.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in "xyz")
    assert not torch.equal(found[0]["x"], found[0]["y"])


def test_a_random_step_is_searched_like_a_snapshot_and_says_what_it_is(mini, tmp_path):
    out = tmp_path / "snapshot-000000256.safetensors"
    neon(*control(mini, out))
    with open_weights(out) as weights, open_weights(mini.snapshots[1]) as trained:
        assert weights.metadata["neon_control"].startswith("random direction") and weights.metadata["neon_seed"] == "0"
        assert weights.metadata["neon_base_sha256"] == digest(mini.base) and "images" not in weights.metadata
        size = int(trained.metadata["data_images"])
    rows = tmp_path / "rows.jsonl"
    neon(*search(mini, rows, "--selftrained", out, "-w", "0,1"))
    (row,) = (row for row in Rows(rows, write=False).rows.values() if row["w"])
    assert (row["budget"], row["num_synthetic"]) == (256, size)


def test_a_name_without_the_budget_is_warned_of(mini, tmp_path, capsys):
    neon(*control(mini, tmp_path / "random.safetensors"))
    assert "warning: tables read B off the name" in capsys.readouterr().err
    neon(*control(mini, tmp_path / "snapshot-000000256.safetensors"))
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--out", "x.pth"), "is a .safetensors file"),
        (("--out", "{base}"), "--out is the file of --base"),
        (("--out", "{trained}"), "--out is the file of --selftrained"),
        (("--out", "there.safetensors"), "exists; choose another --out"),
        (("--selftrained", "other.safetensors"), "missing in the self-trained model"),
        (("--selftrained", "nan.safetensors"), "not finite in the self-trained model"),
        (("--buffers", "nothing_like_it"), "matches no name"),
    ],
)
def test_what_is_no_control_is_refused_and_nothing_is_written(mini, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("there.safetensors").write_text("mine")
    save_safetensors("other.safetensors", {"x": torch.ones(2)})
    save_safetensors("nan.safetensors", {n: torch.full_like(t, torch.nan) for n, t in load_weights(mini.base).items()})
    before = sorted(tmp_path.iterdir())
    words = [word.format(base=mini.base, trained=mini.snapshots[1]) for word in words]
    assert message in error_of(*control(mini, "out.safetensors", *words))
    assert sorted(tmp_path.iterdir()) == before and Path("there.safetensors").read_text() == "mine"


def test_a_sum_that_overflows_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_safetensors("base.safetensors", {"x": torch.full((50,), 6e4, dtype=torch.float16)})
    save_safetensors("trained.safetensors", {"x": torch.full((50,), 4e4, dtype=torch.float16)})
    line = error_of("control", "--base", "base.safetensors", "--selftrained", "trained.safetensors", "--out",
                    "out.safetensors")  # fmt: skip
    assert "x: not finite after the random step in torch.float16" in line and not Path("out.safetensors").exists()
