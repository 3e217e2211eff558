from dataclasses import dataclass, field

import pytest
import torch
from imm_tiny import golden, near

from imm import latents
from neon import NeonError
from neon.sampling import to_uint8


@dataclass
class FakeVAE:
    """The stand-in of the golden vectors; remembers what it was given."""

    dtype: torch.dtype
    given: list = field(default_factory=list)

    def encode(self, pixels):
        self.given.append(pixels)
        return 2 * pixels[:, [0, 1, 2, 0]], pixels[:, [2, 1, 0, 1]].abs()

    def decode(self, z):
        self.given.append(z)
        return 0.2 * z[:, :3]


DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def test_normalisation_of_stored_posteriors():
    g = golden("latents")
    near(latents.SCALE.flatten(), g["scale"], rtol=1e-6, atol=0)
    near(latents.BIAS.flatten(), g["bias"], rtol=1e-6, atol=0)
    near(latents.sample_posterior(g["raw_mean_std"], g["eps"]), g["final"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", DTYPES)
def test_decode(precision):
    g, vae = golden("latents"), FakeVAE(DTYPES[precision])
    images = latents.decode(vae, g["decode_arg"])
    assert str(vae.given[0].dtype) == str(g[f"vae_input_dtype_{precision}"]) == str(DTYPES[precision])
    near(vae.given[0].float(), g[f"vae_input_{precision}"], rtol=1e-3 if precision == "fp16" else 1e-6, atol=1e-6)
    assert torch.equal(images, g[f"decoded_uint8_{precision}"])


@pytest.mark.parametrize("precision", DTYPES)
def test_encode(precision):
    g, vae = golden("latents"), FakeVAE(DTYPES[precision])
    moments = latents.encode(vae, g["pixels"])
    near(vae.given[0].float(), g[f"vae_encode_input_{precision}"], rtol=1e-6, atol=1e-6)
    near(moments, g[f"encode_pixels_{precision}"], rtol=1e-6, atol=1e-6)


def test_pixels_are_clamped_and_truncated():
    g = golden("latents")
    assert torch.equal(to_uint8(g["vae_sample"]), g["uint8_of_vae_sample"])


def test_the_vae_sees_small_batches_and_the_order_stays():
    images = torch.randint(0, 256, (19, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vae = FakeVAE(torch.float32)
    moments = latents.encode(vae, images)
    assert [len(part) for part in vae.given] == [8, 8, 3]
    near(moments[17:18], latents.encode(vae, images[17:18]), rtol=0, atol=0)
    z = latents.sample_posterior(moments, torch.zeros(19, 4, 4, 4))
    near(latents.decode(vae, z)[17:18], latents.decode(vae, z[17:18]), rtol=0, atol=0)


def test_decode_undoes_the_normalisation():
    moments = torch.cat([torch.randn(2, 4, 3, 3), torch.rand(2, 4, 3, 3)], dim=1)
    vae = FakeVAE(torch.float32)
    latents.decode(vae, latents.sample_posterior(moments, torch.zeros(2, 4, 3, 3)).double())
    near(vae.given[0], moments[:, :4], rtol=1e-5, atol=1e-5)


def test_wrong_channels_are_named():
    vae = FakeVAE(torch.float32)
    with pytest.raises(NeonError, match="3 channels"):
        latents.encode(vae, torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(NeonError, match="8 channels"):
        latents.sample_posterior(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(NeonError, match="4 channels"):
        latents.decode(vae, torch.zeros(1, 3, 8, 8))
