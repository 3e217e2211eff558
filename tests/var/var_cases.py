"""Checkpoints that the tests of VAR share."""

from pathlib import Path

import torch

from VAR.configs import CONFIGS
from VAR.family import RELEASED_VQVAE
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
