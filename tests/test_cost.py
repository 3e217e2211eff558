"""Costs are those of a hand count; `neon plan` and `--dry_run` print them and touch nothing."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from processes import ROOT, error_of, neon
from torch import nn

from neon import cost
from neon import plan as plans
from neon.cost import Cost, Device
from neon.family import FAMILIES, Recipe, get_family
from neon.weights.checkpoint import save_safetensors

DEVICE = Device("some", dict.fromkeys(("float32", "tf32", "float16", "bfloat16"), 1.0), 0.5)
SMALL = {"edm": "digits", "flow": "digits", "var": "tiny", "xar": "digits", "imm": "digits", "diffusers": "digits"}
FEW = {"edm": {"num_steps": 3}, "xar": {"flow_steps": 3}, "diffusers": {"num_inference_steps": 3}}
# Sampling options; and passes of the network by hand, a row with a class and one without counted apart.
PASSES = [
    ("edm", {"num_steps": 18}, 2 * 18 - 1),
    ("edm", {"num_steps": 18, "s_churn": 40.0}, 2 * 18 - 1),
    ("edm", {"num_steps": 10, "solver": "euler"}, 10),
    ("edm", {"num_steps": 1}, 1),
    ("flow", {"num_steps": 7, "solver": "heun"}, 14),
    ("flow", {"num_steps": 7, "solver": "euler"}, 7),
    ("flow", {"solver": "dopri5"}, 134),
    ("var", {"cfg": 0.0}, 4),
    ("var", {"cfg": 1.5}, 2 * 4),
    ("xar", {"cfg": 1.0, "flow_steps": 10}, 4 * 10),
    ("xar", {"cfg": 2.7, "flow_steps": 10}, 10 + 3 * 2 * 10),  # the first cell is not guided
    ("imm", {"num_steps": 8, "cfg_scale": 1.0}, 8),
    ("imm", {"num_steps": 8, "cfg_scale": 1.5}, 2 * 8),
    ("diffusers", {"num_inference_steps": 8}, 8),
]


class Family:
    """As much of a family as counting needs, around one module; `loss` sums its output."""

    name = "toy"

    def __init__(self, module: nn.Module):
        self.module = module

    def weights(self, model):
        return model


def counted(module: nn.Module, *shape: int, backward: bool = False) -> Cost:
    module = module.to("meta")
    x = torch.empty(shape, device="meta", requires_grad=backward)

    def run():
        y = module(x)
        if backward:
            y.sum().backward()

    return cost.count(module, Family(module), run)


# ---------------------------------------------------------------- layers by hand


def test_a_linear_layer_costs_two_flops_a_weight_and_row():
    assert counted(nn.Linear(5, 7), 3, 5).flops == {"float32": 2 * 3 * 5 * 7}


def test_a_convolution_costs_two_flops_a_weight_and_output_pixel():
    found = counted(nn.Conv2d(4, 6, 3, padding=1, stride=2), 2, 4, 8, 8)
    assert found.total == 2 * (2 * 4 * 4) * 6 * 4 * 3 * 3 and found.passes == 2


def test_attention_costs_two_products_with_and_without_a_mask():
    q = torch.empty(2, 4, 16, 8, device="meta")
    layer = nn.Linear(1, 1, device="meta")
    for mask in (None, torch.zeros(16, 16, device="meta")):
        run = lambda mask=mask: nn.functional.scaled_dot_product_attention(q, q, q, mask)  # noqa: E731
        assert cost.count(layer, Family(layer), run).total == 2 * (2 * 2 * 4 * 16 * 16 * 8)


def test_a_backward_pass_costs_two_forward_passes():
    for module, shape in ((nn.Linear(5, 7), (3, 5)), (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8))):
        assert counted(module, *shape, backward=True).total == 3 * counted(module, *shape).total


def test_uncounted_functions_cost_nothing():
    """They are skipped, for speed: no formula of torch's may be lost with them."""
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.ones(2, 4, 8), torch.ones(8)
    calls = {
        nn.functional.layer_norm: lambda: nn.functional.layer_norm(x, (8,), w),
        nn.functional.group_norm: lambda: nn.functional.group_norm(x, 2),
        nn.functional.rms_norm: lambda: nn.functional.rms_norm(x, (8,), w),
        torch.Tensor.clamp: lambda: x.clamp(0, 1),
        torch.clamp: lambda: torch.clamp(x, 0, 1),
    }
    for function in cost.UNCOUNTED:
        with FlopCounterMode(display=False) as counter:
            out = calls.get(function, lambda function=function: function(x))()
        assert counter.get_total_flops() == 0 and out.shape == x.shape


# ---------------------------------------------------------------- families


@pytest.mark.parametrize(("name", "options", "passes"), PASSES, ids=lambda value: str(value))
def test_passes_of_the_samplers(name, options, passes):
    assert cost.sampling(get_family(name), SMALL[name], options).passes == pytest.approx(passes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("edm", {"num_steps": 7}),
        ("flow", {"num_steps": 6, "solver": "heun"}),
        ("xar", {"flow_steps": 7, "cfg": 2.0}),
        ("imm", {"num_steps": 6}),
    ],
)
def test_steps_that_are_not_run_cost_what_they_would(name, options):
    """n steps are counted from two and three; here all of them are run."""
    family = get_family(name)
    chosen = {field.name: field.default for field in dataclasses.fields(family.Sampling)} | options
    model, seeds = family.hollow(SMALL[name]), torch.arange(4)
    whole = cost.count(model, family, lambda: family.sample(model, seeds, family.labels(model, seeds), **chosen)) * 0.25
    found = cost.sampling(family, SMALL[name], options)
    assert found.total == pytest.approx(whole.total) and found.passes == pytest.approx(whole.passes)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "var"])
def test_the_count_on_meta_is_that_of_a_real_run(name):
    """With attention made of products on the CPU too: torch's counter misses the fused kernel there."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    family, options = get_family(name), FEW.get(name, {"num_steps": 2})
    options |= {"solver": "heun"} if name == "flow" else {}
    chosen = {field.name: field.default for field in dataclasses.fields(family.Sampling)} | options
    model = family.create("digits", device="cpu")
    seeds = torch.arange(cost.BATCH)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        family.sample(model, seeds, family.labels(model, seeds), **chosen)
    assert cost.sampling(family, "digits", options).total * cost.BATCH == pytest.approx(counter.get_total_flops())


@pytest.mark.parametrize(
    ("name", "tflop"),
    [("edm_cifar10_cond", 1.5), ("edm_ffhq64", 6.6), ("var_d16", 1.0), ("imm_t8", 4.4)],
)
def test_flops_of_an_image_of_the_papers_models(name, tflop):
    family = next(get_family(one) for one in FAMILIES if name in get_family(one).presets)
    row = family.presets[name]
    found = cost.sampling(family, row.network, row.sampling, family.released_precision)
    assert found.total / 1e12 == pytest.approx(tflop, rel=0.03)


def test_precisions_are_kept_apart():
    """The network of IMM samples in float32 and its VAE decodes in float16; TF32 is another rate."""
    family = get_family("imm")
    found = cost.sampling(family, "imagenet256", {"num_steps": 1, "cfg_scale": 1.0}, "float32+float16")
    decoder = cost.sampling(family, "imagenet256", {"num_steps": 2, "cfg_scale": 1.0}, "float32+float16")
    assert found.flops["float16"] == decoder.flops["float16"] > 5e11  # the VAE's, once
    assert decoder.flops["float32"] == pytest.approx(2 * found.flops["float32"])
    assert found.with_precision(cost.TF32).flops == {"tf32": found.flops["float32"], "float16": found.flops["float16"]}
    assert cost.sampling(family, "imagenet256", {"num_steps": 1, "cfg_scale": 1.0}).flops == {"float32": found.total}


PASS = {  # sampling options of one pass of the network; how many times of it a training step costs
    "edm": ({"num_steps": 1}, 3),
    "flow": ({"num_steps": 1, "solver": "euler"}, 3),
    "diffusers": ({"num_inference_steps": 1}, 3),
    "imm": ({"num_steps": 1, "cfg_scale": 1.0}, 4),  # the target is one more forward pass
}
RECIPE = Recipe(batch=64, lr=1e-4, budget=64, snapshot=64)


@pytest.mark.parametrize("name", PASS)
def test_a_training_step_costs_three_forward_passes(name):
    options, times = PASS[name]
    found = cost.training(get_family(name), SMALL[name], RECIPE)
    once = cost.sampling(get_family(name), SMALL[name], options)
    assert found.total == pytest.approx(times * once.total, rel=0.03) and found.passes == times - 2


def test_a_training_step_of_xar_sees_all_cells_at_once():
    family = get_family("xar")
    net = family.hollow("digits").transformer
    x, t = torch.empty(4, 16, 4, device="meta"), torch.empty(4, 4, device="meta")
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    once = cost.count(family.hollow("digits"), family, lambda: net(x, t, labels)) * (1 / 4)
    assert cost.training(family, "digits", RECIPE).total == pytest.approx(3 * once.total, rel=0.03)


def test_a_training_step_of_var_encodes_without_a_backward_pass():
    family = get_family("var")
    model = family.hollow("tiny")
    images = torch.empty(4, 3, 64, 64, device="meta")
    encode = cost.count(model, family, lambda: model.vqvae.encode(images)) * (1 / 4)
    inputs = torch.empty(4, model.config.tokens - 1, model.config.code_channels, device="meta")
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    once = cost.count(model, family, lambda: model.transformer(labels, inputs)) * (1 / 4)
    assert cost.training(family, "tiny", RECIPE).total == pytest.approx(encode.total + 3 * once.total, rel=0.03)


def test_training_runs_in_the_recipes_precision():
    family = get_family("imm")
    recipe = dataclasses.replace(family.recipes["digits"], precision="float16")
    found = cost.training(family, "digits", recipe).flops
    assert found["float16"] == pytest.approx(3 * found["float32"], rel=0.05)  # the target is in float32


def test_a_file_says_its_network(tmp_path):
    family = get_family("xar")
    config = {**family.networks["digits"], "dim": 32}
    file = tmp_path / "x.safetensors"
    save_safetensors(file, {"x": torch.zeros(1)}, {"config": json.dumps(config)})
    assert cost.sizes(family, file)[0] < cost.sizes(family, "digits")[0]
    assert plans.network_of(family, file) == file
    preset = family.presets["xar_l"]
    assert plans.network_of(family, preset.base) == plans.network_of(family, "no", preset="xar_l") == "xar_large"
    assert plans.network_of(family, "no", recipe="digits") == "digits"


def test_inception_is_counted():
    found = cost.features("inception", (3, 32, 32))
    assert found.total == cost.features("inception:random", (1, 8, 8)).total == pytest.approx(11.4e9, rel=0.02)


# ---------------------------------------------------------------- hours


def test_hours_are_flops_over_what_is_reached():
    found = Cost({"float32": 3600e12, "float16": 3600e12})
    assert Device("some", {"float32": 1.0, "float16": 4.0}, 0.5).hours(found) == 2 + 0.5
    assert cost.device("", tflops=2.0).hours(found) == 1.0  # as measured: no utilisation
    assert cost.device("A100").hours(Cost({"tf32": 156e12 * 3600})) == pytest.approx(1 / 0.35)


def test_the_cpu_is_measured():
    assert 1e-3 < cost.device("cpu").tflops["float32"] < 100


# ---------------------------------------------------------------- bytes and counts


def test_snapshots_are_those_that_a_training_writes(mini):
    recipe = dataclasses.replace(get_family("edm").recipes["digits"], budget=256, snapshot=128)
    written = sorted(path.name for path in mini.snapshots[0].parent.glob("snapshot-*"))
    assert plans.snapshots_of(recipe) == len(written) == 2
    size = cost.sizes(get_family("edm"), "digits")[0]
    assert mini.snapshots[0].stat().st_size == pytest.approx(size, rel=0.1)
    for budget, every, count in ((6_000_000, 500_000, 12), (7_488_000, 250_000, 30), (64, 1000, 1), (320, 1, 5)):
        assert plans.snapshots_of(Recipe(batch=64, lr=1, budget=budget, snapshot=every)) == count


def test_a_grid_is_counted_as_the_search_counts_it():
    from neon.search import grid, parse_grid

    w, guidance = "0,0.5,1", "cfg=1:3:1"
    grids = {"cfg": parse_grid("1:3:1")}
    points = {point for point, _ in grid(lambda point: 0.0, ["a", "b"], parse_grid(w), grids)}
    assert plans.evaluations_of(w, [guidance], "grid", 12, snapshots=2) == len(points) == 15
    assert plans.evaluations_of(w, [guidance, "solver=heun,euler"], "grid", 12, snapshots=2) == 30
    assert plans.evaluations_of(w, [guidance], "surface", 9, snapshots=2) == 9


def test_the_searched_option_is_taken_where_it_costs_most():
    family = get_family("edm")
    assert plans.costliest(family, "digits", {"num_steps": 4}, ["solver=euler,heun"])["solver"] == "heun"
    assert plans.costliest(family, "digits", {}, ["num_steps=4:8:2"])["num_steps"] == 8
    assert plans.costliest(get_family("xar"), "digits", {}, ["cfg=1,1.5"])["cfg"] == 1.5
    with pytest.raises(plans.NeonError, match="unknown sampling option of edm 'nope'"):
        plans.costliest(family, "digits", {}, ["nope=1:2"])


# ---------------------------------------------------------------- the pipeline


@pytest.fixture(scope="module")
def rows() -> list:
    """Of the paper's pipeline."""
    return plans.plan(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def root(rows) -> dict:
    return plans.as_json(rows, DEVICE)


def params(**changes) -> dict:
    """The digits of one family as a pipeline."""
    point = {"model": "m", "sampling": {"num_steps": 4}, "search": {"method": "surface", "w": "0:2", "evaluations": 5}}
    model = {"family": "edm", "base": "base.pkl", "recipe": "digits", "synthetic": "0-99", "sampling": {"num_steps": 4}}
    whole = {
        "device": "cuda",
        "features": "inception",
        "seeds": {"search": "0-999", "final": "0-1999", "released": "0-9", "samples": "0-3"},
        "models": {"m": model},
        "points": {"p": point},
    }
    return whole | changes


def planned(tmp_path: Path, found: dict, *options) -> dict:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(found))
    return json.loads(neon("plan", "--json", "--params", file, *options))


def test_the_papers_search_is_at_most_two_million_images(root):
    assert 0 < root["search_images"] <= 2_000_000
    assert root["search_images"] == root["stages"]["search"]["images"]
    assert root["search_evaluations"] == root["stages"]["search"]["evaluations"]


@pytest.mark.parametrize("key", ["evaluations", "images", "flops", "gpu_hours", "disk_bytes"])
def test_totals_are_sums(root, key):
    assert root[key] == pytest.approx(sum(stage[key] for stage in root["stages"].values()))
    for name, stage in root["stages"].items():
        assert stage[key] == pytest.approx(sum(row[key] for row in root["rows"] if row["stage"] == name))
    assert root[key] > 0


def test_every_item_of_the_pipeline_has_its_row(root):
    found = yaml.safe_load((ROOT / "params.yaml").read_text())
    sections = {"generate": "models", "selftrain": "models", "search": "points", "final": "points"}
    for stage, section in (sections | {"released": "released", "samples": "points", "fetch": "files"}).items():
        assert {row["name"] for row in root["rows"] if row["stage"] == stage} == set(found[section])
    assert all(row["disk_bytes"] for row in root["rows"] if row["stage"] == "fetch" and "config" not in row["name"])
    assert {row["model"] for row in root["rows"] if row["stage"] == "released"} <= set(found["models"])


def test_a_params_file_decides(tmp_path):
    once = planned(tmp_path, params())
    assert (once["search_evaluations"], once["search_images"]) == (5, 5_000)
    assert once["stages"]["generate"]["images"] == 100
    assert once["stages"]["final"]["images"] == 3 * 2_000
    assert once["stages"]["selftrain"]["images"] == 19_200
    assert once["stages"]["generate"]["disk_bytes"] == 2 * 100 * 64 and "released" not in once["stages"]
    model = params()["models"]["m"]
    changed = params(models={"m": {**model, "synthetic": "0-199", "train": {"budget": 640, "snapshot": 640}}})
    twice = planned(tmp_path, changed)
    assert twice["stages"]["generate"]["flops"] == pytest.approx(2 * once["stages"]["generate"]["flops"])
    assert twice["stages"]["selftrain"]["images"] == 640
    grid = {"method": "grid", "w": "0,1,2", "grid": "num_steps=4,8"}
    point = {**params()["points"]["p"], "search": grid}
    found = planned(tmp_path, params(points={"p": point}))
    assert found["search_evaluations"] == 2 * (1 + 2 * 3)  # w = 0 once, w = 1 and 2 for three snapshots
    (row,) = (row for row in found["rows"] if row["stage"] == "search")
    assert row["passes_per_image"] == 2 * 8 - 1
    default = params(points={"p": {"model": "m", "search": {"w": "0:2"}}})
    assert planned(tmp_path, default)["search_evaluations"] == 12


def test_several_fine_tunes_and_sets_of_images_cost_as_many_times(tmp_path):
    once = planned(tmp_path, params())["stages"]
    seeds = {**params()["seeds"], "selftrain": "0 1", "more": "5000-5999 7000-7999"}
    point = {"model": "m", "sampling": {"num_steps": 4}, "values": {"w": "0:2"}, "sets": 2}
    changed = params(seeds=seeds, points={"p": point}, search={"method": "surface", "evaluations": 7})
    found = planned(tmp_path, changed)["stages"]
    assert found["selftrain"]["images"] == 2 * once["selftrain"]["images"]
    assert found["selftrain"]["dvc_copy_bytes"] == 2 * once["selftrain"]["dvc_copy_bytes"]
    assert found["search"]["evaluations"] == 2 * 7 and found["search"]["images"] == 2 * 7 * 1_000
    assert found["final"]["evaluations"] == 2 * 2 * 3 and found["final"]["images"] == 2 * 3 * (2_000 + 1_000)


def test_device_rate_and_number_of_gpus(tmp_path):
    at_100 = planned(tmp_path, params(), "--tflops", 100)
    assert at_100["gpu_hours"] == pytest.approx(at_100["flops"] / 100e12 / 3600)
    shared = planned(tmp_path, params(), "--tflops", 50, "--gpus", 4)
    assert shared["gpu_hours"] == pytest.approx(2 * at_100["gpu_hours"])
    assert shared["hours"] == pytest.approx(shared["gpu_hours"] / 4)
    half = planned(tmp_path, params(), "--device", "H100", "--utilisation", 0.5)
    assert half["utilisation"] == 0.5 and half["device"] == "H100"


def test_the_text_has_totals_and_says_what_is_a_bound(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(params()))
    text = neon("plan", "--params", file)
    assert "search: at most 5 evaluations, 5,000 images" in text and "A100 at 35 % of its dense peak" in text
    (total,) = (line for line in text.splitlines() if line.startswith("total"))
    assert total.split()[1:3] == ["8", f"{100 + 19_200 + 5_000 + 6_000 + 12:,}"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "no such file"),
        ("a: [", "not YAML"),
        ("3", "no `models` in it"),
        ("models: {m: {family: nope, base: x}}", "unknown family 'nope'"),
        ("models: {m: {family: edm}}", "not the parameters of the pipeline"),
        ("models: {m: 3}", "not the parameters of the pipeline"),
        ("models: {m: {family: edm, base: x, recipe: r, synthetic: 0-1}}", "no such file"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, error):
    file = tmp_path / "params.yaml"
    if text:
        file.write_text(text)
    assert error in error_of("plan", "--params", file)


def test_an_unknown_device_is_one_line():
    assert "unknown device 'nope' (know A100, " in error_of("plan", "--device", "nope")


# ---------------------------------------------------------------- --dry_run


def commands(out: Path) -> dict[str, tuple]:
    """With a base that is not there."""
    edm, measuring = ("--preset", "edm_cifar10_cond"), ("--seeds", "0-99", "--ref", "no.npz")
    new = ("--recipe", "digits", "--network", "digits")
    return {
        "generate": ("generate", *edm, "--out", out),
        "selftrain": ("selftrain", *edm, "--data", "no", "--out", out, "--budget", "51200"),
        "train": ("train", "--family", "edm", *new, "--data", "no", "--out", out),
        "search": ("search", *edm, "--selftrained", "no", *measuring, "--out", out),
        "final": ("final", *edm, "--search", "no", *measuring, "--out", out),
        "evaluate": ("evaluate", *edm, *measuring, "--out", out),
    }


@pytest.mark.parametrize("command", ["generate", "selftrain", "train", "search", "final", "evaluate"])
def test_a_dry_run_prints_its_part_and_writes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = neon(*commands(tmp_path / "out")[command], "--dry_run")
    assert "TFLOP each" in text and "hours of A100" in text and "GB" in text
    assert not list(tmp_path.iterdir())
    assert ("evaluations  3\n" in text) == (command == "final")
    assert ("evaluations  1\n" in text) == (command == "evaluate")


def test_a_dry_run_counts_what_the_plan_counts(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    (row,) = (row for row in root["rows"] if row["stage"] == "generate" and row["name"] == "edm_cifar10_cond")
    text = neon(*commands(tmp_path / "out")["generate"], "--dry_run", "100")
    assert f"compute      {row['flops'] / 1e15:.4g} PFLOP" in text
    assert f"time         {row['flops'] / 100e12 / 3600:.3g} hours of 100 TFLOP/s as measured" in text


def test_a_dry_run_reads_the_network_from_a_checkpoint(mini, tmp_path):
    out = tmp_path / "S"
    words = ("generate", *mini.sampling, "--model", mini.base, "--seeds", "0-9", "--out", out, "--dry_run", "cpu")
    assert "images       10, 7 network passes" in neon(*words) and not out.exists()
    text = neon(
        *("search", "--base", mini.base, "--selftrained", mini.path / "selftrained", *mini.measuring, "--seeds", "0-9"),
        *("-w", "0,1", "--out", out, "--dry_run"),
    )
    assert "images" in text and not out.exists()


def test_a_dry_run_without_a_network_is_one_line(tmp_path):
    words = ("--family", "edm", "--base", "no.pkl", "--seeds", "0-9", "--ref", "no.npz", "--dry_run")
    assert "no.pkl: no such file" in error_of("evaluate", *words)


# ---------------------------------------------------------------- docs


def test_the_costs_in_docs_are_those_of_the_plan(rows):
    from paper.docs import filled, planned

    for path, text in planned(rows).items():
        found = path.read_text()
        assert "<!-- plan:begin -->" in found
        assert filled(found, text, "plan") == found, f"{path.name}: run python -m paper.docs"


def test_the_scale_in_docs_is_computed_from_the_plan(rows):
    from paper.docs import filled, scaled

    found = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    for name, text in scaled(rows).items():
        assert f"<!-- {name}:begin -->" in found
        assert filled(found, text, name) == found, "run python -m paper.docs"
