"""DDO, the rival that trains on real images and on samples of the base: its loss, and runs of it."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from processes import files, neon
from torch.testing import assert_close

import edm.family
import VAR.family
from mini import ddo
from neon import NeonError
from neon.distributed import World
from neon.family import rows_of
from neon.selftrain import train
from neon.weights.checkpoint import open_weights, save_safetensors
from VAR.configs import CONFIGS
from VAR.vqvae import VQVAE

N, ALPHA, BETA = 6, 0.7, 0.3
OPTIONS = {"alpha": ALPHA, "beta": BETA}


class Images:
    """Random digits with labels, in place of an ImageSet."""

    shape = (1, 8, 8)

    def __init__(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(10, (n,), generator=generator)

    def __len__(self):
        return len(self.pixels)

    def images(self, indices):
        return self.pixels[list(indices)]


def shaken(network, seed):
    """Other weights: those of a new network multiply much by 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return network


@pytest.fixture(params=["edm", "var"])
def step(request, tmp_path):
    """A family, θ and the reference, which differ, and a step of real images with its draws."""
    torch.manual_seed(0)
    if request.param == "var":
        vae = VQVAE(CONFIGS["digits"])
        torch.nn.init.normal_(vae.quantize.embedding.weight)
        save_safetensors(tmp_path / "vqvae.safetensors", vae.state_dict())
        family, loading = VAR.family, {"vae_ckpt": str(tmp_path / "vqvae.safetensors")}
    else:
        family, loading = edm.family, {}
    model = family.create("digits", device="cpu", **loading)
    shaken(family.weights(model), 1)
    reference = copy.deepcopy(model)
    shaken(family.weights(model.requires_grad_(True)), 2)
    real, fakes = Images(N, 3), Images(20, 4)
    pairs = ddo.Discriminating(family, reference, fakes)
    draws = pairs.draw(model, N, torch.Generator().manual_seed(5), images=None, **OPTIONS)
    return SimpleNamespace(
        family=family, pairs=pairs, model=model, reference=reference, real=real, fakes=fakes, draws=draws
    )


def plain(step, model, kind):
    """The family's own loss of each image of a step, (N,); of VAR the sum over codes, with no branch dropped."""
    images = step.real.pixels if kind == "real" else step.fakes.pixels[step.draws.chosen]
    labels = step.real.labels if kind == "real" else step.fakes.labels[step.draws.chosen]
    draws, tokens = getattr(step.draws, kind), 1
    if step.family is VAR.family:
        draws, tokens = draws._replace(dropped=draws.dropped._replace(branches=None)), 21
    each = [slice(i, i + 1) for i in range(N)]
    losses = [step.family.loss(model, images[i], labels[i], rows_of(draws, i.start, i.stop, N)) for i in each]
    return torch.stack(losses) * tokens


def gradient(loss, model):
    params = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def loss_of(step, model):
    return step.pairs.loss(model, step.real.pixels, step.real.labels, step.draws, **OPTIONS)


def test_likelihood_is_minus_the_loss_of_the_family(step):
    likelihood = ddo.LIKELIHOODS[step.family.name]
    found = likelihood(step.model, step.real.pixels, step.real.labels, step.draws.real)
    assert_close(found, -plain(step, step.model, "real"), rtol=1e-4, atol=1e-3)


def test_loss_is_of_both_models_with_the_same_noise(step):
    real, fake = (plain(step, step.reference, kind) - plain(step, step.model, kind) for kind in ("real", "fake"))
    assert real.abs().min() > 0.01 and fake.abs().min() > 0.01  # θ is not the reference
    expected = -(BETA * real).sigmoid().log() - ALPHA * (1 - (BETA * fake).double().sigmoid()).log()
    assert_close(loss_of(step, step.model).double(), expected.mean().double(), rtol=1e-3, atol=1e-3)


def test_at_the_reference(step):
    """log 2 (1 + α), and the gradient of the real images' loss less α times that of the fakes', times β / 2."""
    step.model.load_state_dict(step.reference.state_dict())
    loss = loss_of(step, step.model)
    assert loss.item() == pytest.approx(math.log(2) * (1 + ALPHA), rel=1e-6)
    real, fake = (gradient(plain(step, step.model, kind).mean(), step.model) for kind in ("real", "fake"))
    expected = BETA / 2 * (real - ALPHA * fake)
    assert expected.norm() > 1e-3
    assert (gradient(loss, step.model) - expected).norm() < 1e-4 * expected.norm()


def test_micro_batches_add_up(step):
    def part(i):
        draws = rows_of(step.draws, i, i + 2, N)
        return step.pairs.loss(step.model, step.real.pixels[i : i + 2], step.real.labels[i : i + 2], draws, **OPTIONS)

    assert_close(torch.stack([part(i) for i in (0, 2, 4)]).mean(), loss_of(step, step.model))


def test_fakes_that_do_not_fit(step):
    step.fakes.labels = step.fakes.labels + 1
    step.fakes.labels[0] = 10
    with pytest.raises(NeonError, match="labels must lie in 0…9"):
        ddo.Discriminating(step.family, step.reference, step.fakes)


def test_training_leaves_the_reference_and_all_buffers(step, tmp_path):
    frozen = {name: t.clone() for name, t in step.reference.state_dict().items()}
    before = {name: t.clone() for name, t in step.model.state_dict().items()}
    recipe = ddo.recipe_of(step.family, **OPTIONS, batch=2, budget=8, snapshot=8, lr=1e-3)
    train(step.pairs, step.model, step.real, recipe, tmp_path / "out", world=World())
    assert all(torch.equal(t, frozen[name]) for name, t in step.reference.state_dict().items())
    trained = {name for name, _ in step.family.weights(step.model).named_parameters()}
    moved = {name for name, t in step.model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved and {name.removeprefix("transformer.") for name in moved} <= trained
    assert not any(p.grad is not None for p in step.reference.parameters())


# ---------------------------------------------------------------- runs, with the small world of the other commands


@pytest.fixture(scope="module")
def fakes(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("ddo") / "S"
    neon("generate", *mini.sampling, "--model", mini.base, "--seeds", "0-63", "--out", out)
    return out


def run(mini, fakes, out, **changes):
    options = {"alpha": 1, "beta": 0.1, "lr": 1e-3, "budget": 512, "snapshot": 128, "seed": 1, **changes}
    words = [f"--{name}={value}" for name, value in options.items()]
    paths = {"base": mini.base, "real": mini.data, "fake": fakes, "out": out}
    words += [f"--{name}={value}" for name, value in paths.items()]
    return ddo.run(ddo.parser().parse_args(["--family", "edm", *words]))


def test_same_seed_same_bytes_also_when_killed_between(mini, fakes, tmp_path, monkeypatch):
    run(mini, fakes, tmp_path / "whole")
    plain_loss, calls = ddo.ddo_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain_loss(*args)

    monkeypatch.setattr(ddo, "ddo_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        run(mini, fakes, tmp_path / "broken")
    run(mini, fakes, tmp_path / "broken")
    assert len(calls) == 6 + 4  # 64 pairs a step: two snapshots of two steps each were kept
    whole, broken = files(tmp_path / "whole"), files(tmp_path / "broken")
    assert len([name for name in whole if name.startswith("snapshot-")]) == 4 and whole == broken
    run(mini, fakes, tmp_path / "other", seed=2)
    name = "snapshot-000000512.safetensors"
    assert files(tmp_path / "other")[name] != whole[name]


@pytest.mark.parametrize("change", [{"alpha": 2}, {"beta": 0.2}])
def test_another_run_is_not_continued(mini, fakes, tmp_path, change):
    run(mini, fakes, tmp_path / "out", budget=128)
    with pytest.raises(NeonError, match="holds another run"):
        run(mini, fakes, tmp_path / "out", budget=128, **change)


def test_fakes_of_another_base_are_another_run(mini, fakes, tmp_path):
    run(mini, fakes, tmp_path / "out", budget=128)
    with pytest.raises(NeonError, match="holds another run"):
        run(mini, mini.data, tmp_path / "out", budget=128)


def test_it_learns_to_tell_real_from_fake(mini, fakes, tmp_path):
    run(mini, fakes, tmp_path / "out", budget=2048, snapshot=2048, beta=0.3)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(2 * math.log(2), rel=1e-6) and losses[-1] < losses[0] - 0.05


def test_search_and_final_read_its_snapshots(mini, fakes, tmp_path):
    written = run(mini, fakes, tmp_path / "out")
    with open_weights(written[0]) as one, open_weights(mini.base) as base:
        assert one.metadata["images"] == "128" and one.metadata["data_images"] == "128"
        assert one.keys() == base.keys()
    rows = tmp_path / "search.jsonl"
    common = ("--base", mini.base, *mini.measuring, "--metrics", "fid", "--batch_size", 64)
    where = ("--selftrained", tmp_path / "out", "--method", "grid", "--w=-1,0")
    neon("search", *common, *where, "--seeds", "100-227", "--out", rows)
    searched = [json.loads(line) for line in rows.read_text().splitlines()]
    best = min((row for row in searched if row["w"] == -1), key=lambda row: row["fid"])
    neon("final", *common, "--search", rows, "--seeds", "300-427", "--out", tmp_path / "final.jsonl")
    final = {row["role"]: row for row in map(json.loads, (tmp_path / "final.jsonl").read_text().splitlines())}
    assert len(searched) == 5 and final["selftrained"]["selftrained"] == best["selftrained"]
    assert (final["selftrained"]["w"], final["neon"]["w"]) == (-1, 0)
