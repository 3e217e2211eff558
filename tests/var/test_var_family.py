"""VAR behind the contract of neon.family."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from var_cases import TINY, write_pair

from neon import NeonError
from neon.family import get_family
from neon.merge import merge
from neon.weights.checkpoint import load_weights, save_safetensors
from VAR import family
from VAR.augment import draw_corners, enlarged_crops, lanczos_matrix
from VAR.family import RELEASED_VQVAE

SEEDS = torch.tensor([3, 8, 2**32 + 1])
KAPPA = {"cfg": 1.5, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("released"), TINY)


@pytest.fixture(scope="module")
def model(pair):
    return family.load(pair, device="cpu")


def images_of(model):
    return family.sample(model, SEEDS, family.labels(model, SEEDS), **KAPPA)


def test_the_table_knows_it():
    assert get_family("var") is family


def test_a_released_pair(model):
    images = images_of(model)
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.uint8 and images.float().std() > 5
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    alone = family.sample(model, SEEDS[1:2], family.labels(model, SEEDS)[1:2], **KAPPA)
    assert (alone[0].int() - images[1].int()).abs().max() <= 1


def nested(state):
    return {"epoch": 1, "trainer": {"config": "x", "var_wo_ddp": state, "vae_local": {}}, "args": {"depth": 3}}


@pytest.mark.parametrize(
    "wrap",
    [
        nested,
        lambda state: {"var_wo_ddp": state, "epoch": 3},
        lambda state: {"state_dict": state},
        lambda state: state | {"lvl_1L": state["lvl_1L"].float()},
    ],
    ids=["trainer", "var_wo_ddp", "state_dict", "merged by the original"],
)
def test_other_layouts(pair, model, tmp_path, wrap):
    torch.save(wrap(load_weights(pair)), tmp_path / "x.pth")
    other = family.load(tmp_path / "x.pth", device="cpu", vae_ckpt=str(pair.parent / RELEASED_VQVAE))
    assert torch.equal(images_of(other), images_of(model))
    assert other.transformer.lvl_1L.dtype == torch.int64


def test_a_vqvae_nested_and_of_other_scales(pair, model, tmp_path):
    state = load_weights(pair.parent / RELEASED_VQVAE) | {"quantize.ema_vocab_hit_SV": torch.ones(10, TINY.vocab)}
    torch.save({"model": state}, tmp_path / "vae.pth")
    other = family.load(pair, device="cpu", vae_ckpt=str(tmp_path / "vae.pth"))
    assert torch.equal(images_of(other), images_of(model))


def test_where_the_vqvae_is_looked_for(pair, tmp_path, monkeypatch):
    """Given, near the checkpoint, in a script's pretrained/, in checkpoints/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(family, "__file__", str(tmp_path / "VAR" / "family.py"))
    lonely = tmp_path / "elsewhere" / "var.pth"
    lonely.parent.mkdir()
    shutil.copy(pair, lonely)
    with pytest.raises(NeonError, match=r"`bash download_models.sh vae_ch160v4096z32.pth`.*--vae_ckpt"):
        family.load(lonely, device="cpu")
    with pytest.raises(NeonError, match="no such file"):
        family.load(lonely, device="cpu", vae_ckpt="nowhere.pth")
    places = [tmp_path / "checkpoints", tmp_path / "VAR" / "VAR_imagenet_512" / "pretrained", lonely.parent]
    for place in places:  # each goes before those that already have it
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(pair.parent / RELEASED_VQVAE, place)
        assert family.load(lonely, device="cpu").vae_file.absolute() == place / RELEASED_VQVAE
    given = tmp_path / "mine.pth"
    shutil.copy(pair.parent / RELEASED_VQVAE, given)
    assert family.load(lonely, device="cpu", vae_ckpt=str(given)).vae_file == given


def snapshot(model, path):
    save_safetensors(path, family.weights(model).state_dict(), family.metadata(model))
    return path


def test_a_snapshot_carries_what_load_needs(pair, model, tmp_path, monkeypatch):
    path = snapshot(model, tmp_path / "snapshot.safetensors")
    again = family.load(path, device="cpu")
    assert again.config == model.config and torch.equal(images_of(again), images_of(model))
    assert family.metadata(again) == family.metadata(model)


def test_a_snapshot_finds_a_relative_vqvae_from_anywhere(pair, tmp_path, monkeypatch):
    shutil.copytree(pair.parent, tmp_path / "run" / "base")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "deep").mkdir()
    path = snapshot(family.load("run/base/var.pth", device="cpu"), tmp_path / "run" / "deep" / "s.safetensors")
    monkeypatch.chdir("/")
    assert family.load(path, device="cpu").vae_file == tmp_path / "run" / "base" / RELEASED_VQVAE
    shutil.rmtree(tmp_path / "run" / "base")
    with pytest.raises(NeonError, match="the VQVAE is missing"):
        family.load(path, device="cpu")


def test_a_snapshot_refuses_another_vqvae(model, tmp_path):
    path = snapshot(model, tmp_path / "snapshot.safetensors")
    write_pair(tmp_path / "other", TINY, seed=1)
    with pytest.raises(NeonError, match="not the VQVAE"):
        family.load(path, device="cpu", vae_ckpt=str(tmp_path / "other" / RELEASED_VQVAE))


def test_files_that_are_no_var(pair, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(NeonError, match="not a checkpoint of a VAR"):
        family.load(tmp_path / "x.pth", device="cpu")
    state = load_weights(pair)
    del state["head.bias"]
    torch.save(state, tmp_path / "y.pth")
    with pytest.raises(NeonError, match=r"head\.bias is missing"):
        family.load(tmp_path / "y.pth", device="cpu", vae_ckpt=str(pair.parent / RELEASED_VQVAE))
    with pytest.raises(NeonError, match="not of this network"):
        family.load(pair, device="cpu", depth=2)
    with pytest.raises(NeonError, match="unknown VAR network"):
        family.create("d17", device="cpu")


def test_a_new_transformer_beside_a_trained_vqvae(pair):
    torch.manual_seed(1)
    new = family.create("tiny", device="cpu", vae_ckpt=str(pair.parent / RELEASED_VQVAE), label_drop=0.5)
    assert new.config == dataclasses.replace(TINY, label_drop=0.5)
    trained = load_weights(pair.parent / RELEASED_VQVAE)
    assert all(torch.equal(t, trained[name]) for name, t in new.vqvae.named_parameters())
    assert new.transformer.head.weight.std() > 0


@given(st.integers(0, 10**6), st.integers(1, 50))
def test_labels_are_balanced_and_fixed_per_seed(first, n):
    model = type("Model", (), {"config": TINY})
    seeds = torch.arange(first, first + n)
    counts = torch.bincount(family.labels(model, seeds), minlength=10)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(family.labels(model, seeds)[n // 2 :], family.labels(model, seeds[n // 2 :]))


def test_buffers_are_never_merged(pair):
    base = load_weights(pair)
    other = {name: t + 1 for name, t in base.items()}
    merged = dict(merge(base, other, 2.0, family.is_buffer))
    parameters = {name for name, _ in family.load(pair, device="cpu").transformer.named_parameters()}
    for name, tensor in merged.items():
        if name in parameters:
            torch.testing.assert_close(tensor, base[name] - 2)
        else:
            assert family.is_buffer(name) and torch.equal(tensor, base[name])
    assert {name for name in base if family.is_buffer(name)} == base.keys() - parameters


def test_half_precision_samples(pair, model):
    half = family.load(pair, device="cpu", precision="bfloat16")
    options = {**KAPPA, "cfg": 0.0, "top_k": 1}
    a, b = (family.sample(m, SEEDS, family.labels(m, SEEDS), **options) for m in (model, half))
    assert (a.float() - b.float()).abs().median() < 30 and not torch.equal(a, b)


# ---- training


def loss_of(model, seed=0, **options):
    images = torch.randint(256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    draws = family.draw(model, 4, generator, images=lambda: images, **options)
    return family.loss(model, images, torch.tensor([0, 1, 2, 3]), draws, **options)


def test_the_loss_trains_the_transformer_alone(pair):
    model = family.load(pair, device="cpu")
    network = family.weights(model).train().requires_grad_(True)
    loss_of(model, enlarge=1.125).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert all(p.grad is None for p in model.vqvae.parameters()) and not model.vqvae.training


def test_all_randomness_comes_from_the_generator(pair):
    model = family.load(pair, device="cpu", label_drop=0.5, drop_path=0.3)
    family.weights(model).train()
    first, again, other = (loss_of(model, seed, enlarge=1.125).item() for seed in (0, 0, 1))
    assert first == again != other


def test_images_that_cannot_be_trained_on(model):
    family.check(model, (3, 64, 64), torch.arange(10))
    with pytest.raises(NeonError, match="no labels"):
        family.check(model, (3, 64, 64), None)
    with pytest.raises(NeonError, match=r"images are \(1, 64, 64\), the network is trained on \(3, 64, 64\)"):
        family.check(model, (1, 64, 64), torch.arange(10))
    with pytest.raises(NeonError, match=r"labels must lie in 0…9, the set has 0…10"):
        family.check(model, (3, 64, 64), torch.arange(11))


@pytest.mark.parametrize("size, enlarged", [(64, 72), (256, 288), (17, 19)])
def test_enlarging_is_pils(size, enlarged):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).resize((enlarged, enlarged), Image.LANCZOS)).astype(int)
    matrix = lanczos_matrix(size, enlarged)
    wide = ((torch.from_numpy(pixels).double() @ matrix.mT) + 0.5).floor().clamp(0, 255)
    found = ((matrix @ wide) + 0.5).floor().clamp(0, 255).numpy().astype(int)
    assert np.abs(found - wanted).max() <= 1 and (found != wanted).mean() < 1e-3


def test_crops_are_windows_of_the_enlarged_image():
    images = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8)
    corners = draw_corners(40, 16, 1.125, torch.Generator().manual_seed(0))
    crops = enlarged_crops(images, 1.125, corners)
    assert crops.shape == images.shape and crops.dtype == torch.uint8
    places = set()
    for image, crop in zip(images, crops):
        whole = np.asarray(Image.fromarray(image[0].numpy()).resize((18, 18), Image.LANCZOS)).astype(int)
        windows = {
            (y, x): np.abs(whole[y : y + 16, x : x + 16] - crop[0].numpy()).max() for y in range(3) for x in range(3)
        }
        place = min(windows, key=windows.get)
        assert windows[place] <= 1
        places.add(place)
    assert len(places) == 9  # every window occurs


def test_recipes_are_the_papers():
    for name, n, file_number in (("d16_256", 250_000, 250_368), ("d36_512", 200_000, 200_016)):
        recipe = family.recipes[name]
        assert recipe.lr_at(0) == 0 and recipe.lr_at(recipe.budget) == recipe.lr
        assert recipe.lr_at(recipe.budget // 2) == pytest.approx(recipe.lr / 2)
        assert -(-n // recipe.batch) * recipe.batch == file_number and recipe.snapshot == n
        assert recipe.ema_beta() is None and recipe.weight_decay == 0 and recipe.betas == (0.9, 0.95)


def test_config_survives_its_file():
    for config in family.networks.values():
        assert type(config).from_json(json.dumps(dataclasses.asdict(config))) == config
