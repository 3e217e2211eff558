"""xAR behind the contract of neon.family."""

import json

import pytest
import torch
from xar_cases import write_checkpoint, write_vae

from neon import NeonError
from neon.family import get_family
from neon.merge import merge
from neon.weights.checkpoint import load_weights, save_safetensors
from xAR import family
from xAR.configs import NETWORKS
from xAR.network import to_cells

SEEDS = torch.tensor([3, 8, 2**32 + 1])
KAPPA = {"cfg": 2.0, "flow_steps": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    return write_checkpoint(folder / "xAR.pth", "tiny"), str(write_vae(folder / "kl16.ckpt", "tiny"))


@pytest.fixture(scope="module")
def model(files):
    return family.load(files[0], device="cpu", vae_path=files[1])


def images_of(model, seeds=SEEDS):
    return family.sample(model, seeds, family.labels(model, seeds), **KAPPA)


def test_the_table_knows_it():
    assert get_family("xar") is family


def test_a_released_checkpoint(model):
    images = images_of(model)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8 and images.float().std() > 5
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (images_of(model, SEEDS[1:2])[0].int() - images[1].int()).abs().max() <= 1


def other(state):
    return {name: torch.zeros_like(t) if "weight" in name else t for name, t in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": other(s), "model_ema": s, "optimizer": {"lr": 1.0}, "epoch": 3, "scaler": {}, "args": {}},
        lambda s: {"model_ema": s, "epoch": 3},
        lambda s: {"state_dict": s},
        lambda s: {"model": s},
    ],
    ids=["trainer", "Neon's trainer", "state_dict", "raw"],
)
def test_other_layouts(files, model, tmp_path, wrap):
    torch.save(wrap(load_weights(files[0])), tmp_path / "x.pth")
    found = family.load(tmp_path / "x.pth", device="cpu", vae_path=files[1])
    assert torch.equal(images_of(found), images_of(model))


@pytest.mark.parametrize("network", ["tiny", "digits"])
def test_a_snapshot_carries_what_load_needs(files, tmp_path, network):
    torch.manual_seed(0)
    new = family.create(network, device="cpu", vae_path=files[1], dropout=0.3)
    path = tmp_path / "snapshot.safetensors"
    save_safetensors(path, family.weights(new).state_dict(), family.metadata(new))
    again = family.load(path, device="cpu", vae_path=files[1])
    assert torch.equal(images_of(again), images_of(new)) and again.config == new.config
    assert again.transformer.encoder_blocks[0].mlp.dropout == 0.3


def test_a_snapshot_refuses_another_vae(model, files, tmp_path):
    path, other = tmp_path / "s.safetensors", str(write_vae(tmp_path / "other.ckpt", "tiny", seed=1))
    save_safetensors(path, family.weights(model).state_dict(), family.metadata(model))
    with pytest.raises(NeonError, match=r"other\.ckpt: not the VAE that .*s\.safetensors was trained with"):
        family.load(path, device="cpu", vae_path=other)
    assert torch.equal(images_of(family.load(path, device="cpu", vae_path=files[1])), images_of(model))


def test_digits_need_no_vae(tmp_path):
    path = write_checkpoint(tmp_path / "digits.pth", "digits")
    images = images_of(family.load(path, device="cpu", vae_path="nowhere"))
    assert images.shape == (3, 1, 8, 8)


def test_files_that_do_not_fit(files, tmp_path):
    with pytest.raises(NeonError, match=r"nowhere: no such file.*hf download xwen99/mar-vae-kl16.*--vae_path"):
        family.load(files[0], device="cpu", vae_path="nowhere")
    with pytest.raises(NeonError, match="not a checkpoint of an xAR"):
        family.load(files[1], device="cpu", vae_path=files[1])
    with pytest.raises(NeonError, match="this network needs"):
        family.load(files[0], device="cpu", vae_path=files[1], dim=64)
    with pytest.raises(NeonError, match=r"encoder\.conv_in\.weight is missing"):
        family.load(files[0], device="cpu", vae_path=str(files[0]))
    with pytest.raises(NeonError, match="unknown xAR network"):
        family.create("xar_huge", device="cpu")
    save_safetensors(tmp_path / "x.safetensors", load_weights(files[0]), {"config": json.dumps({"dim": "wide"})})
    with pytest.raises(NeonError, match="no xAR checkpoint"):
        family.load(tmp_path / "x.safetensors", device="cpu", vae_path=files[1])


def test_labels_are_balanced_and_fixed_per_seed(model):
    seeds = torch.arange(17, 57)
    labels = family.labels(model, seeds)
    assert torch.bincount(labels).tolist() == [4] * 10
    assert torch.equal(labels[20:], family.labels(model, seeds[20:]))


def test_buffers_are_never_merged(files, model):
    """The mask holds infinities, whose difference is not a number."""
    base = load_weights(files[0])
    merged = dict(merge(base, {name: t + 1 for name, t in base.items()}, 2.0, family.is_buffer))
    parameters = {name for name, _ in model.transformer.named_parameters()}
    assert {name for name in base if family.is_buffer(name)} == base.keys() - parameters
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, base[name] - 2 if name in parameters else base[name])


def test_half_precision_samples(files, model):
    half = family.load(files[0], device="cpu", vae_path=files[1], precision="bfloat16")
    a, b = images_of(model).float(), images_of(half).float()
    assert 0 < (a - b).abs().mean() < 3


# ---- training


def loss_of(model, seed=0, images=None, **options):
    if images is None:
        images = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    draws = family.draw(model, len(images), torch.Generator().manual_seed(seed), images=lambda: images, **options)
    return family.loss(model, images, torch.arange(len(images)), draws, **options)


def test_the_loss_trains_the_transformer_alone(files):
    model = family.load(files[0], device="cpu", vae_path=files[1])
    network = family.weights(model).train().requires_grad_(True)
    loss_of(model, flip=True).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert all(p.grad is None for p in model.vae.parameters()) and not model.vae.training


def test_all_randomness_but_dropouts_comes_from_the_generator(model):
    state = torch.get_rng_state()
    first, again, other = (loss_of(model, seed, flip=True).item() for seed in (0, 0, 1))
    assert first == again != other and torch.equal(torch.get_rng_state(), state)


def test_latents_are_encoded_in_full_precision(model):
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        hook = model.vae.quant_conv.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        loss_of(model)
    hook.remove()
    assert seen == [torch.float32]


def test_every_second_image_is_mirrored(tmp_path):
    model = family.load(write_checkpoint(tmp_path / "digits.pth", "digits"), device="cpu")
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    seen = []
    encode, model.vae.encode = model.vae.encode, lambda x, noise: seen.append(x) or encode(x, noise)
    images, labels = image.expand(200, -1, -1, -1), torch.zeros(200, dtype=int)
    draws = family.draw(model, 200, torch.Generator().manual_seed(0), images=lambda: images, flip=True)
    loss = family.loss(model, images, labels, draws, flip=True)
    pixels = ((seen[0] + 1) * 127.5).round()
    plain, mirrored = ((pixels == x).flatten(1).all(1) for x in (image, image.flip(-1)))
    assert loss.isfinite() and (plain ^ mirrored).all() and 70 < mirrored.sum() < 130


def test_patches_are_exact_both_ways(tmp_path):
    model = family.load(write_checkpoint(tmp_path / "digits.pth", "digits"), device="cpu")
    images = torch.rand(2, 1, 8, 8)
    latents = model.vae.encode(images, None)
    assert torch.equal(model.vae.decode(latents), images)
    first = images[:, 0, :2, :2].flatten(1)  # the first position is the upper left corner
    assert torch.equal(to_cells(latents, 2)[:, 0], first)


def test_images_that_cannot_be_trained_on(model):
    family.check(model, (3, 8, 8), torch.arange(10))
    for shape, labels, message in [
        ((3, 8, 8), None, "no labels"),
        ((1, 8, 8), torch.arange(10), r"images are \(1, 8, 8\), the network is trained on \(3, 8, 8\)"),
        ((3, 8, 8), torch.arange(11), r"labels must lie in 0…9, the set has 0…10"),
    ]:
        with pytest.raises(NeonError, match=message):
            family.check(model, shape, labels)


def test_recipes_are_the_papers():
    for name in ("xar_base", "xar_large"):
        recipe = family.recipes[name]
        steps = [recipe.lr_at(n * 117 * 256) for n in (0, 125, 250)]
        assert steps == pytest.approx([0, 5e-7, 1e-6])
        assert -(-recipe.snapshot // recipe.batch) * recipe.batch == 250_112  # the released files' first name
        assert recipe.ema_beta() == 0.9999 and recipe.weight_decay == 0.02 and recipe.betas == (0.9, 0.96)
        assert NETWORKS[name].get("dropout", 0.1) == 0.1 and recipe.loss == {"flip": True}
