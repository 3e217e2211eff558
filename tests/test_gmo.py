"""GMO: the modification is that of the singular values, image by image; `neon generate --gmo` and its price."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, error_of, files, neon, torchrun
from torch.autograd.functional import jacobian as dense_jacobian
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from neon import Diverged, NeonError, cost, gmo
from neon import plan as plans
from neon.family import get_family
from neon.gmo import Jacobian, Modification, Spectrum, modification, same_rms, spectrum, streams_of
from neon.sampling import start
from neon.weights.checkpoint import save_safetensors

# Samplers that are maps of their noise, of one and of several steps.
MAPS = {
    "imm-1": ("imm", {"num_steps": 1, "cfg_scale": 1.5}),
    "imm-2-edm": ("imm", {"num_steps": 2, "cfg_scale": 1.0, "schedule": "edm"}),
    "edm-euler": ("edm", {"num_steps": 3, "solver": "euler", "sigma_max": 20.0}),
    "edm-heun": ("edm", {"num_steps": 2}),
    "flow-euler": ("flow", {"num_steps": 4, "solver": "euler"}),
    "flow-heun": ("flow", {"num_steps": 1, "solver": "heun"}),
}
SEEDS = torch.tensor([3, 2**40 + 1, 5])


def small(name: str) -> SimpleNamespace:
    """A family's network for digits whose outputs depend on all of its weights, and the options of its sampler."""
    family, options = get_family(MAPS[name][0]), MAPS[name][1]
    torch.manual_seed(0)
    model = family.create("digits", device="cpu")
    with torch.no_grad():  # initial zeros would hide what is behind them
        for p in family.weights(model).parameters():
            p.add_(0.05 * torch.randn_like(p))
    return SimpleNamespace(family=family, model=model, sampling=dataclasses.asdict(family.Sampling()) | options)


@pytest.fixture(params=MAPS)
def case(request):
    return small(request.param)


def map_of(case, seeds=SEEDS):
    return case.family.noise_map(case.model, seeds, case.family.labels(case.model, seeds), **case.sampling)


# ---------------------------------------------------------------- against the dense Jacobian, in float64


WIDTH, OUT, N = 6, 8, 4


def toy(seed: int = 0):
    """A smooth map of float64 noise (N, 6) → (N, 2, 4), its noise, and the dense Jacobians (N, 8, 6).

    Their singular values lie so far apart that the power iteration arrives.
    """
    drawn = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(OUT, WIDTH, generator=drawn, dtype=torch.float64))[0]
    weights = left * torch.tensor([5.0, 2, 1.5, 1, 0.5, 0.2], dtype=torch.float64)

    def map(z):
        return (torch.tanh(z / 4) @ weights.T + 0.3 * (z @ weights.T).cos()).unflatten(1, (2, 4))

    z = torch.randn(N, WIDTH, generator=drawn, dtype=torch.float64)
    return map, z, torch.stack([dense_jacobian(map, row[None]).reshape(OUT, WIDTH) for row in z])


def exact(s: torch.Tensor, z: torch.Tensor, dense: torch.Tensor, alpha: float) -> torch.Tensor:
    """s̃ (N, d) of s (N, d), z (N, h) and the Jacobians (N, d, h), by a singular value decomposition."""
    u, sigma, vt = torch.linalg.svd(dense, full_matrices=False)
    jz = torch.einsum("nij,nj->ni", dense, z)
    return s - jz + torch.einsum("nik,nk,nkj,nj->ni", u, changed_values(sigma, alpha), vt, z)


def changed_values(sigma: torch.Tensor, alpha: float) -> torch.Tensor:
    changed = math.sqrt(1 - alpha) * sigma
    changed[:, 0] = ((1 - alpha) * sigma[:, 0] ** 2 + alpha * sigma.square().sum(1)).sqrt()
    return changed


def found_of(map, z, iterations=400, probes=20) -> Spectrum:
    return spectrum(Jacobian(map, z), streams_of(torch.arange(len(z)), "cpu"), iterations, probes)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
def test_the_modified_outputs_are_those_of_the_modified_singular_values(alpha):
    map, z, dense = toy()
    found = found_of(map, z)._replace(energy=dense.square().sum((1, 2)))
    wanted = exact(found.s.flatten(1), z, dense, alpha)
    assert torch.allclose(found.modified(alpha).flatten(1), wanted, rtol=0, atol=1e-10)
    assert (wanted - found.s.flatten(1)).abs().amax(1).min() > 1e-3  # and it is a modification of every image


def test_the_energy_is_kept_and_moves_to_the_leading_direction():
    """The linear map with the modified singular values, seen through the outputs of all unit noises."""
    _, _, dense = toy()
    map, eye, alpha = (lambda z: z @ dense[0].T), torch.eye(WIDTH, dtype=torch.float64), 0.3
    found = found_of(map, eye)._replace(energy=dense[0].square().sum().expand(WIDTH))
    before, after = (torch.linalg.svdvals(rows) for rows in (map(eye), found.modified(alpha)))
    assert torch.allclose(after.square().sum(), before.square().sum())
    assert torch.allclose(after[1:], math.sqrt(1 - alpha) * before[1:]) and after[0] > before[0]


def test_the_estimate_of_the_energy_has_the_right_mean_and_its_usual_spread():
    """The variance of the mean over P probes is 2 ‖JJᵀ‖²_F / P."""
    map, z, dense = toy()
    energy, gram = dense.square().sum((1, 2)), dense @ dense.mT
    many = spectrum(Jacobian(map, z), streams_of(torch.arange(N), "cpu"), 1, 4000).energy
    spread = (2 * gram.square().sum((1, 2)) / 4000).sqrt()
    assert ((many - energy).abs() < 4 * spread).all() and (spread < 0.05 * energy).all()


def test_the_default_number_of_iterations_finds_the_leading_triple():
    map, z, dense = toy()
    found, (u, sigma, vt) = found_of(map, z, iterations=20), torch.linalg.svd(dense, full_matrices=False)
    assert torch.allclose(found.sigma, sigma[:, 0], rtol=1e-4)
    assert ((found.u.flatten(1) * u[:, :, 0]).sum(1).abs() > 1 - 1e-4).all()
    assert torch.allclose(found.along.abs(), (vt[:, 0] * z).sum(1).abs(), atol=1e-2)


@pytest.mark.parametrize("fraction", [0.0, 1e-9])
def test_a_map_without_a_derivative_is_left_as_it_is(fraction):
    """J = 0 or next to it: no division by its norm."""
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = found_of(lambda z: fraction * z + 1, z, 3, 3)
    assert torch.allclose(found.modified(0.5), torch.ones_like(z), atol=1e-8)


def test_a_map_that_stops_gradients_is_named():
    with pytest.raises(NeonError, match=r"noise_map: no gradient reaches the outputs; is there a torch\.no_grad in it"):
        Jacobian(torch.no_grad()(lambda z: 2 * z), torch.ones(2, 3))


# ---------------------------------------------------------------- the families' samplers


def test_the_map_is_the_sampler(case):
    labels = case.family.labels(case.model, SEEDS)
    sampler = map_of(case)
    with torch.no_grad():
        images = sampler.images()
    assert torch.equal(images, case.family.sample(case.model, SEEDS, labels, **case.sampling))
    assert len(sampler.noise) == len(SEEDS) and sampler.noise.dtype == torch.float64 == sampler.map(sampler.noise).dtype
    assert not case.family.sample(case.model, SEEDS, labels, **case.sampling).is_floating_point()


def test_products_are_those_of_the_dense_jacobian(case):
    """Of each image by itself, by reverse differentiation alone."""
    seeds = SEEDS[:2]
    sampler = map_of(case, seeds)
    with gmo.differentiable(case.model):
        alone = [map_of(case, seed[None]) for seed in seeds]
        dense = torch.stack([dense_jacobian(one.map, one.noise).reshape(64, 64) for one in alone])
        jacobian = Jacobian(sampler.map, sampler.noise)
        drawn = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        forward, back = jacobian.times(drawn).flatten(1), jacobian.transposed(drawn).flatten(1)
    for found, wanted in ((forward, dense), (back, dense.mT)):
        product = torch.einsum("nij,nj->ni", wanted, drawn.flatten(1))
        assert (found - product).norm() < 1e-4 * product.norm() and product.norm() > 0.1


def test_a_modified_image_is_that_of_the_dense_jacobian(case):
    """To one level of grey, with the exact energy."""
    seeds, alpha = SEEDS[:1], 0.2
    with gmo.differentiable(case.model):
        sampler = map_of(case, seeds)
        dense = dense_jacobian(sampler.map, sampler.noise).reshape(1, 64, 64)
        found = spectrum(Jacobian(sampler.map, sampler.noise), streams_of(seeds, "cpu"), 80, 1)
    found = found._replace(energy=dense.square().sum((1, 2)))
    wanted = exact(found.s.flatten(1), sampler.noise.flatten(1), dense, alpha).view_as(found.s)
    assert (found.modified(alpha) - wanted).abs().max() < 0.02 * (wanted - found.s).abs().max()
    levels = [sampler.finish(x).int() for x in (found.modified(alpha), wanted)]
    assert (levels[0] - levels[1]).abs().max() <= 1


def test_an_image_does_not_depend_on_its_batch(case):
    change = Modification(0.2, iterations=5, probes=3)
    whole = gmo.images(case.family, case.model, change, SEEDS, **case.sampling)
    parts = [gmo.images(case.family, case.model, change, part, **case.sampling) for part in SEEDS.flip(0).split([1, 2])]
    assert (torch.cat(parts).flip(0).int() - whole.int()).abs().max() <= 1
    plain = case.family.sample(case.model, SEEDS, case.family.labels(case.model, SEEDS), **case.sampling)
    assert ((whole.int() - plain.int()).abs().flatten(1).amax(1) > 1).all()


def test_alpha_0_is_the_plain_sampler(case, monkeypatch):
    """Bit for bit, and without its work."""
    monkeypatch.setattr(gmo, "spectrum", None)
    plain = case.family.sample(case.model, SEEDS, case.family.labels(case.model, SEEDS), **case.sampling)
    assert torch.equal(gmo.images(case.family, case.model, Modification(0.0), SEEDS, **case.sampling), plain)


def test_the_model_is_left_as_it_was(case):
    before = [p.requires_grad for p in case.model.parameters()]
    gmo.images(case.family, case.model, Modification(0.1, 1, 1), SEEDS, **case.sampling)
    assert [p.requires_grad for p in case.model.parameters()] == before
    assert all(p.grad is None for p in case.model.parameters())


def test_the_control_has_the_same_rms_in_another_direction():
    drawn = torch.Generator().manual_seed(0)
    change, noise = (torch.randn(5, 1, 8, 8, generator=drawn, dtype=torch.float64) for _ in range(2))
    change *= torch.arange(5.0)[:, None, None, None]
    scaled = same_rms(change, noise)
    assert torch.allclose(*((x.square().flatten(1).mean(1)) for x in (change, scaled)))
    angle = torch.nn.functional.cosine_similarity(scaled[1:].flatten(1), noise[1:].flatten(1))
    assert torch.allclose(angle, torch.ones_like(angle))


def test_images_are_of_the_modified_outputs_or_of_noise_as_far_from_the_samples():
    """Of a sampler whose outputs are seen before rounding."""
    case, seen = small("flow-euler"), []
    family = SimpleNamespace(labels=case.family.labels, name="seen")
    family.noise_map = lambda *args, **options: case.family.noise_map(*args, **options)._replace(finish=seen.append)
    for control in ("", "noise"):
        gmo.images(family, case.model, Modification(0.2, 3, 2, control), SEEDS, **case.sampling)
    sampler = map_of(case)
    with gmo.differentiable(case.model):
        found = spectrum(Jacobian(sampler.map, sampler.noise), streams_of(SEEDS, "cpu"), 3, 2)
    assert torch.equal(seen[0], found.modified(0.2))
    modified, noisy = ((x - found.s).flatten(1) for x in seen)
    assert torch.allclose(modified.norm(dim=1), noisy.norm(dim=1))
    assert torch.nn.functional.cosine_similarity(modified, noisy).abs().max() < 0.6


def test_random_numbers_are_the_seeds_own_and_not_those_of_its_noise():
    drawn = streams_of(SEEDS, "cpu").randn((64,))
    assert torch.equal(streams_of(SEEDS[1:], "cpu").randn((64,)), drawn[1:])
    correlation = torch.corrcoef(torch.cat([drawn, start(SEEDS, (64,))[0]]))
    assert (correlation - torch.eye(6)).abs().max() < 0.5


def test_outputs_that_are_not_finite_are_refused():
    case = small("imm-1")
    with torch.no_grad():
        for p in case.model.parameters():
            p.fill_(math.inf)
    with pytest.raises(Diverged, match="GMO: 3 of 3 outputs are not finite"):
        gmo.images(case.family, case.model, Modification(0.1, 1, 1), SEEDS, **case.sampling)


# ---------------------------------------------------------------- the command


GMO = ("--gmo", 0.2, "--gmo_iterations", 3, "--gmo_probes", 2)


def command(mini, out, *more, seeds="0-5", batch_size=4):
    model = ("--family", "edm", "--model", mini.base, "--num_steps", 2)
    return ["generate", *model, "--seeds", seeds, "--batch_size", batch_size, "--out", out, *more]


@pytest.fixture(scope="module")
def made(mini, tmp_path_factory):
    """A modified set, and what the command printed."""
    out = tmp_path_factory.mktemp("gmo") / "S"
    return SimpleNamespace(out=out, said=neon(*command(mini, out, *GMO)))


def pixels(folder) -> dict[str, bytes]:
    return {name: text for name, text in files(folder).items() if name.endswith(".png")}


def test_a_set_says_what_was_done_to_it(mini, made, tmp_path):
    record = json.loads((made.out / "generate.json").read_text())
    assert {name: record[name] for name in record if "gmo" in name} == {
        "gmo": 0.2,
        "gmo_iterations": 3,
        "gmo_probes": 2,
        "gmo_control": None,
    }
    assert "GMO at alpha = 0.2: modified samples; 9 products with the Jacobian an image, about 18 passes" in made.said
    neon(*command(mini, tmp_path / "plain"))
    assert not any("gmo" in name for name in json.loads((tmp_path / "plain" / "generate.json").read_text()))
    plain = pixels(tmp_path / "plain")
    assert plain.keys() == pixels(made.out).keys() and plain != pixels(made.out)
    neon(*command(mini, tmp_path / "zero", "--gmo", 0))
    assert pixels(tmp_path / "zero") == plain


def test_a_modified_set_resumes_and_is_no_other_set(mini, made, tmp_path):
    neon(*command(mini, tmp_path / "S", *GMO))
    whole = files(tmp_path / "S")
    assert whole == files(made.out)
    next((tmp_path / "S").rglob("img00000004.png")).unlink()
    neon(*command(mini, tmp_path / "S", *GMO))
    assert files(tmp_path / "S") == whole
    others = [(), ("--gmo", 0.1, *GMO[2:]), (*GMO, "--gmo_control", "noise"), (*GMO[:4], "--gmo_probes", 3)]
    for other in others:
        assert re.search(
            r"holds another set \(gmo\w* differs\)", error_of(*command(mini, made.out, *other), prints=bool(other))
        )


@pytest.mark.parametrize("batch_size", [1, 6])
def test_any_batch_size(mini, made, tmp_path, batch_size):
    neon(*command(mini, tmp_path / "S", *GMO, batch_size=batch_size))
    assert files(tmp_path / "S") == files(made.out)


def test_two_processes(mini, made, tmp_path):
    torchrun(2, "edm/generate_dataset.py", *command(mini, tmp_path / "S", *GMO)[3:])
    assert files(tmp_path / "S") == files(made.out)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--gmo", 1.5), "--gmo must lie between 0 and 1, not 1.5"),
        (("--gmo=-0.1",), "--gmo must lie between 0 and 1, not -0.1"),
        (("--gmo", "nan"), "--gmo must lie between 0 and 1, not nan"),
        (("--gmo_control", "noise"), "--gmo_iterations, --gmo_probes and --gmo_control need --gmo"),
        (("--gmo", 0.1, "--s_churn", 5), "EDM's sampler with s_churn > 0 adds noise at each step"),
        (("--gmo", 0.1, "--compile"), "--gmo differentiates the network, which --compile does not allow"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_folder(mini, tmp_path, options, error):
    assert error in error_of(*command(mini, tmp_path / "S", *options))
    assert not (tmp_path / "S").exists()


def test_dopri5_is_refused(tmp_path):
    family = get_family("flow")
    model = family.create("digits", device="cpu")
    save_safetensors(tmp_path / "flow.safetensors", model.state_dict(), family.metadata(model))
    flow = ("generate", "--family", "flow", "--model", tmp_path / "flow.safetensors", "--seeds", "0-1")
    wanted = "the steps of dopri5 depend on the noise: choose --solver heun or euler"
    assert wanted in error_of(*flow, "--gmo", 0.1, "--out", tmp_path / "S")
    assert wanted in error_of(*flow, "--gmo", 0.1, "--out", tmp_path / "S", "--dry_run")


@pytest.mark.parametrize("name", ["var", "xar", "diffusers"])
def test_other_families_are_refused(tmp_path, name):
    (tmp_path / "x.safetensors").touch()
    options = ("--family", name, "--model", tmp_path / "x.safetensors", "--seeds", "0-1", "--out", tmp_path / "S")
    wanted = f"{name}: this family's sampler is not a differentiable map of its noise: --gmo needs a noise_map"
    assert wanted in error_of("generate", *options, "--gmo", 0.1)


def test_counts_are_checked_in_python_too():
    for options in ({"iterations": 0}, {"probes": 0}, {"control": "salt"}):
        with pytest.raises(NeonError):
            Modification(0.1, **options)
    assert modification({"gmo": None, "gmo_probes": None}) is None


# ---------------------------------------------------------------- a family of one's own


def test_a_family_of_ones_own_as_its_page_has_it(tmp_path):
    """The example with the page's noise_map in place of its sampler."""
    page = (ROOT / "docs/own-family.md").read_text()
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def noise_map" in text)
    example = (ROOT / "examples/my_family.py").read_text()
    (tmp_path / "mapped.py").write_text(f"{example}\n\n{block}")
    own, plain = get_family(str(tmp_path / "mapped.py")), get_family(str(ROOT / "examples/my_family.py"))
    torch.manual_seed(0)
    model = own.create("digits", device="cpu")
    labels = own.labels(model, SEEDS)
    images = own.sample(model, SEEDS, labels, num_steps=3)
    assert torch.equal(images, plain.sample(model, SEEDS, labels, num_steps=3).detach())
    modified = gmo.images(own, model, Modification(0.5), SEEDS, num_steps=3)
    assert modified.shape == images.shape and not torch.equal(modified, images)
    with pytest.raises(NeonError, match=r"my_family\.py: this family's sampler is not a differentiable map"):
        gmo.images(plain, model, Modification(0.5), SEEDS, num_steps=3)


def test_a_noise_map_with_other_parameters_is_refused(tmp_path):
    example = (ROOT / "examples/my_family.py").read_text()
    (tmp_path / "wrong.py").write_text(f"{example}\n\ndef noise_map(model, seeds):\n    return None\n")
    with pytest.raises(NeonError, match="noise_map does not take labels"):
        get_family(str(tmp_path / "wrong.py"))


# ---------------------------------------------------------------- its price


class Flops(TorchDispatchMode):
    """The sum over all that runs inside; FlopCounterMode does not work in torch.autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("name", MAPS)
def test_the_price_is_that_of_the_products(name):
    """FLOPs of real products, counted as they run, against what is planned."""
    case, change, n = small(name), Modification(0.1, iterations=2, probes=3), 4
    with Flops() as counter:
        gmo.images(case.family, case.model, change, torch.arange(n), **case.sampling)
    planned = cost.sampling(case.family, "digits", case.sampling, passes=change.passes)
    least, most = (0.6, 0.8) if case.family.name == "imm" else (0.95, 1.05)  # transformers cost less
    assert least * planned.total < counter.total / n < most * planned.total
    once = cost.sampling(case.family, "digits", case.sampling)
    assert planned.passes == change.passes * once.passes and change.passes == 1 + 3 * 3 + 5


def test_what_is_decoded_once_is_priced_once():
    family, options = get_family("imm"), {"num_steps": 1, "cfg_scale": 1.0}
    once, often = (
        cost.sampling(family, "imagenet256", options, "float32+float16", passes=passes) for passes in (1, 83)
    )
    assert often.flops["float16"] == once.flops["float16"]
    assert often.flops["float32"] == pytest.approx(83 * once.flops["float32"])


def test_plan_and_dry_run_count_it(mini, tmp_path):
    said = neon(*command(mini, tmp_path / "S", *GMO, "--dry_run"))
    assert re.search(r"images       6, 54 network passes", said) and not (tmp_path / "S").exists()
    params = {
        "features": "inception",
        "seeds": {"search": "0-9", "final": "0-9", "samples": "0-3"},
        "models": {"m": {"family": "edm", "base": "base.pkl", "recipe": "digits", "synthetic": "0-99"}},
    }
    params["models"]["m"] |= {"sampling": {"num_steps": 2}, "compute": {"gmo": 0.1}}
    (row,) = (row for row in plans._Plan(params).rows() if row.stage == "generate")
    assert row.each.passes == 3 * Modification(0.1).passes == 3 * 104
