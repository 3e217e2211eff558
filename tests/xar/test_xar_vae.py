"""The KL-16 autoencoder against the original's numbers (golden/xar/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_parameters, inputs

from neon.sampling import to_uint8
from xAR.vae import LATENT_SCALE, AutoencoderKL

GOLDEN = Path(__file__).parents[1] / "golden" / "xar"


def close(actual, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "vae.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(scope="module")
def vae():
    return fill_parameters(AutoencoderKL(4, (1, 1, 1, 2, 2))).requires_grad_(False)


def test_state_dict_is_the_released_one():
    manifest = json.loads((GOLDEN / "manifest_kl16.json").read_text())
    with torch.device("meta"):
        vae = AutoencoderKL()
    expected = [(e["name"], e["shape"], f"torch.{e['dtype']}") for e in manifest["entries"]]
    assert [(name, list(x.shape), str(x.dtype)) for name, x in vae.state_dict().items()] == expected
    assert sum(p.numel() for p in vae.parameters()) == manifest["total_parameters"]


def test_encode(vae, expected):
    images, noise = inputs("vae", "img", (2, 3, 32, 32)), inputs("vae", "noise", (2, 4, 2, 2))
    mean, std = vae.moments(images)
    close(mean, expected["mean"])
    close(std, expected["std"])
    close(std.log() * 2, expected["logvar"])
    close(vae.encode(images, noise), expected["latent_scaled"])
    close(vae.encode(images, noise) / LATENT_SCALE, expected["sample"])


def test_log_variance_is_clamped(vae, expected):
    logvar = expected["logvar_in"].view(1, -1, 1, 1)
    hook = vae.quant_conv.register_forward_hook(lambda *_: torch.cat([logvar, logvar], 1))
    mean, std = vae.moments(torch.zeros(1, 3, 32, 32))
    hook.remove()
    assert torch.equal(mean, logvar)
    close(std.flatten(), (expected["logvar_clamped"] / 2).exp(), atol=0)


def test_decode_and_uint8(vae, expected):
    images = vae.decode(LATENT_SCALE * inputs("vae", "z", (2, 4, 2, 2)))
    close(images, expected["decoded"])
    off = (to_uint8(images).int() - expected["u8_truncated"].int()).abs()
    assert off.max() <= 1 and (off > 0).sum() <= 3
    assert torch.equal(to_uint8(expected["decoded"]), expected["u8_truncated"])
