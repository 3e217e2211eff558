"""Checkpoints that the tests of VAR share."""

from pathlib import Path

import torch

from VAR.configs import CONFIGS
from VAR.family import RELEASED_VQVAE
from VAR.sampler import sample_codes
from VAR.transformer import Transformer
from VAR.vqvae import VQVAE

TINY = CONFIGS["tiny"]


def lively(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights that let every part matter: initial gates are all but closed, initial codes all but equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3 / p.shape[-1] ** 0.5)
    return model.eval()


def write_pair(folder: Path, config, name: str = "var.pth", seed: int = 0) -> Path:
    """A transformer and its VQVAE, as released: two flat .pth files side by side. Returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.save(lively(Transformer(config), seed).state_dict(), folder / name)
    vqvae = VQVAE(config)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    torch.save(vqvae.state_dict(), folder / RELEASED_VQVAE)
    return folder / name


def sample(transformer, vqvae, labels, streams, **options) -> torch.Tensor:
    """Images (B, C, S, S) float32 in [0, 1], as the original returns them."""
    _, f_hat = sample_codes(transformer, vqvae.quantize, labels, streams, **options)
    return (vqvae.decode_latent(f_hat).float().clamp(-1, 1) + 1) / 2
