"""Stable Diffusion's VAE, through diffusers; read from a folder, or from where `hf download` puts what has a hub id."""

import warnings
from pathlib import Path

import torch
from torch import nn

from neon import NeonError, extra
from neon.precision import autocast

NAME = "sd-vae-ft-ema"
HUB = f"stabilityai/{NAME}"
RELEASED = {  # its config.json, as far as it differs from diffusers' defaults
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
FETCH = f"hf download {HUB} --local-dir checkpoints/{NAME}"


class StableDiffusionVAE(nn.Module):
    """A VAE as imm.latents wants it. It encodes in float32 whatever the autocast around it, and decodes in that."""

    def __init__(self, source: str):
        """source: a folder in diffusers' format, or a hub id; "" for one of the released shape on the meta device.

        Raises NeonError if it is missing, or no such VAE.
        """
        with extra("imm"):
            from diffusers import AutoencoderKL  # slow to import

        super().__init__()
        try:
            with warnings.catch_warnings(action="ignore"), torch.device("cpu" if source else "meta"):
                kl = (
                    AutoencoderKL.from_pretrained(
                        source, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
                    )
                    if source
                    else AutoencoderKL(**RELEASED)
                )
        except (OSError, ValueError):
            raise NeonError(
                f"no VAE in diffusers' format at {source}; get it with `{FETCH}`, or say where it is with --vae"
            ) from None
        if kl.config.latent_channels != 4 or len(kl.config.block_out_channels) != 4:
            raise NeonError(f"{source}: not a VAE of 4 channels at an eighth of the resolution")
        self.source, self.kl = source, kl.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.kl.dtype

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(pixels.device, "float32"):
            posterior = self.kl.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.kl.decode(latents).sample


def find_vae(given: str = "", checkpoint: str | Path | None = None) -> str:
    """The given source, or a folder of the released name next to the checkpoint or in checkpoints/, or the hub id."""
    near = [Path(checkpoint).parent] if checkpoint else []
    folders = (folder / NAME for folder in [*near, Path("checkpoints")])
    return given or next((str(f) for f in folders if f.is_dir()), HUB)
