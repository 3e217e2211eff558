"""IMM behind the contract of neon.family."""

import copy
import json
from pathlib import Path

import pytest
import torch
from imm_tiny import GOLDEN, TINY, golden, near, tiny, write_digits, write_pickle, write_vae

from imm import autoencoder, family
from imm.autoencoder import NAME, StableDiffusionVAE
from neon import NeonError
from neon.family import get_family
from neon.weights.checkpoint import save_safetensors, values_sha256

SEEDS = torch.tensor([3, 8, 2**32 + 1])
KAPPA = {"num_steps": 2, "cfg_scale": 1.5, "schedule": "uniform"}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def released(vae):
    """Where the VAE lies, a checkpoint in the original format."""
    return write_pickle(vae.parent / "imm.pkl", tiny(), TINY | {"mixed_precision": "fp16"})


@pytest.fixture(scope="module")
def model(released):
    return family.load(released, device="cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return family.load(write_digits(tmp_path_factory.mktemp("digits") / "digits.safetensors"), device="cpu")


def images_of(model, **changes):
    return family.sample(model, SEEDS, family.labels(model, SEEDS), **(KAPPA | changes))


def test_the_table_knows_it():
    assert get_family("imm") is family


def test_the_pickle_of_the_original(vae):
    g, model = golden("tiny_imm_expect"), family.load(GOLDEN / "tiny_imm.pkl", device="cpu", vae=str(vae))
    with torch.no_grad():
        near(model.net(g["x"], g["t"], g["s"], g["class_labels"], cfg=g["cfg_scale"].item()), g["y"])


def test_a_released_checkpoint_makes_images(model):
    images = images_of(model)
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.uint8 and images.float().std() > 1
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_pixels_need_no_vae(digits):
    images = images_of(digits)
    assert digits.vae is None and images.shape == (3, 1, 8, 8) and images.float().std() > 5


@pytest.mark.parametrize("kind", ["model", "digits"])
def test_an_image_does_not_depend_on_its_batch(request, kind):
    model = request.getfixturevalue(kind)
    alone = family.sample(model, SEEDS[1:2], family.labels(model, SEEDS)[1:2], **KAPPA)
    assert (alone[0].int() - images_of(model)[1].int()).abs().max() <= 1


def test_every_option_of_sampling_matters(digits):
    first = images_of(digits)
    for change in ({"num_steps": 1}, {"cfg_scale": 3.0}, {"schedule": "edm"}):
        assert not torch.equal(first, images_of(digits, **change))


def test_guidance_one_is_no_guidance(digits):
    rows = torch.eye(10)[family.labels(digits, SEEDS)]
    x, t, s = torch.randn(3, 1, 8, 8), torch.tensor(0.9), torch.tensor(0.2)
    with torch.no_grad():
        near(digits.net(x, t, s, rows, cfg=1.0), digits.net(x, t, s, rows))
    passes = []
    hook = digits.net.model.register_forward_hook(lambda _, args, out: passes.append(len(out)))
    images_of(digits, cfg_scale=1.0)
    hook.remove()
    assert passes == [3, 3]  # not doubled


def test_half_precision(released, model):
    half = family.load(released, device="cpu", precision="bfloat16")
    a, b = images_of(model), images_of(half)
    assert not torch.equal(a, b) and (a.float() - b.float()).abs().median() < 10


def test_files_that_are_no_imm(released, vae, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(NeonError, match="no IMM checkpoint"):
        family.load(tmp_path / "x.pth", device="cpu", vae=str(vae))
    with pytest.raises(NeonError, match=r"no IMM checkpoint \(it holds a EDMPrecond\)"):
        family.load(GOLDEN.parent / "edm" / "tiny_edm.pkl", device="cpu", vae=str(vae))
    with pytest.raises(NeonError, match="not of this network"):
        family.load(released, device="cpu", depth=1)
    with pytest.raises(NeonError, match="unknown IMM network"):
        family.create("imagenet512", device="cpu")


# ---- the VAE


def test_where_the_vae_is_looked_for(released, vae, tmp_path, monkeypatch):
    """Given, beside the checkpoint, in checkpoints/; else the hub id, which needs to have been fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(autoencoder, "HUB", "nobody/nothing")
    lonely = tmp_path / "elsewhere" / "imm.pkl"
    lonely.parent.mkdir()
    lonely.symlink_to(released)
    with pytest.raises(NeonError, match=r"nobody/nothing; get it with `hf download stabilityai/sd-vae-ft-ema .*--vae"):
        family.load(lonely, device="cpu")
    with pytest.raises(NeonError, match="no VAE in diffusers' format at nowhere"):
        family.load(lonely, device="cpu", vae="nowhere")
    for folder in (Path("checkpoints"), lonely.parent):  # the second goes before the first
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NAME).symlink_to(vae)
        assert family.load(lonely, device="cpu").vae.source == str(folder / NAME)
    assert family.load(lonely, device="cpu", vae=str(vae)).vae.source == str(vae)


def snapshot(model, path):
    save_safetensors(path, family.weights(model).state_dict(), family.metadata(model))
    return path


def test_a_snapshot_carries_what_load_needs(model, vae, tmp_path):
    again = family.load(snapshot(model, tmp_path / "s.safetensors"), device="cpu", vae=str(vae))
    assert torch.equal(images_of(again), images_of(model))
    assert family.metadata(again) == family.metadata(model)
    assert json.loads(family.metadata(model)["init_kwargs"])["hidden_size"] == TINY["hidden_size"]


def test_a_snapshot_refuses_another_vae(model, tmp_path):
    path = snapshot(model, tmp_path / "s.safetensors")
    other = write_vae(tmp_path / "other", seed=1)
    with pytest.raises(NeonError, match="not the VAE that"):
        family.load(path, device="cpu", vae=str(other))


def test_the_digest_is_of_the_values(vae, tmp_path):
    first = StableDiffusionVAE(str(vae))
    first.kl.save_pretrained(tmp_path / "copy")
    assert values_sha256(StableDiffusionVAE(str(tmp_path / "copy"))) == values_sha256(first)
    with torch.no_grad():
        first.kl.encoder.conv_in.bias[0] += 1e-3
    assert values_sha256(StableDiffusionVAE(str(vae))) != values_sha256(first)


def test_encoding_is_float32_in_any_autocast(model):
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        plain = model.vae.encode(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = model.vae.encode(pixels)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


# ---- training


def loss_of(model, side, channels, seed=0, n=8):
    images = torch.randint(256, (n, channels, side, side), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    pixels = images.to(torch.uint8)
    return family.loss(model, pixels, torch.arange(n), family.draw(model, n, generator, images=lambda: pixels))


@pytest.mark.parametrize("kind, side, channels", [("model", 64, 3), ("digits", 8, 1)])
def test_the_loss_trains_the_network_alone_from_the_generator_alone(request, kind, side, channels):
    model = copy.deepcopy(request.getfixturevalue(kind))
    network = family.weights(model).train().requires_grad_(True)
    first, again, other = (loss_of(model, side, channels, seed) for seed in (0, 0, 1))
    assert first.item() == again.item() != other.item()
    first.backward()
    assert all(p.grad is not None for p in network.parameters()) and network.model.pos_embed.grad.abs().max() > 0
    assert model.vae is None or (all(p.grad is None for p in model.vae.parameters()) and not model.vae.training)


def test_batches_and_images_that_cannot_be_trained_on(model, digits):
    with pytest.raises(NeonError, match="groups of 4"):
        loss_of(digits, 8, 1, n=6)
    family.check(model, (3, 64, 64), torch.arange(10))
    family.check(digits, (1, 8, 8), torch.arange(10))
    for net, shape, labels, message in [
        (model, (3, 8, 8), torch.arange(10), r"images are \(3, 8, 8\), the network is trained on \(3, 64, 64\)"),
        (digits, (3, 8, 8), torch.arange(10), r"trained on \(1, 8, 8\)"),
        (digits, (1, 8, 8), None, "no labels"),
        (digits, (1, 8, 8), torch.arange(11), "0…9, the set has 0…10"),
    ]:
        with pytest.raises(NeonError, match=message):
            family.check(net, shape, labels)


def test_the_named_configuration_equals_the_manifest():
    manifest = json.loads((GOLDEN / "manifest_imagenet256.json").read_text())
    assert family.networks["imagenet256"] == manifest["constructor_kwargs"]


def test_the_recipe_is_the_papers():
    recipe = family.recipes["imagenet256"]
    assert recipe.lr_at(0) == recipe.lr_at(recipe.budget) == 1e-6 and recipe.weight_decay == 0
    assert recipe.snapshot == 200 * recipe.batch and recipe.budget == 59 * recipe.snapshot
    assert recipe.ema_beta() == 0.9999 and recipe.betas == (0.9, 0.999) and recipe.clip is None
