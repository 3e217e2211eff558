"""Checkpoints and references that the tests of xAR share."""

from pathlib import Path

import torch

from xAR.configs import NETWORKS
from xAR.family import new_transformer
from xAR.vae import AutoencoderKL


def write_checkpoint(path: Path, network: str, seed: int = 0) -> Path:
    """A flat .pth as released, with initial weights: no part of xAR starts at zero."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(new_transformer(NETWORKS[network]).state_dict(), path)
    return path


def write_vae(path: Path, network: str, seed: int = 0) -> Path:
    """{"model": …} with something beside the VAE in it."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = NETWORKS[network]
    vae = AutoencoderKL(config.get("channels", 16), **config["vae"])
    torch.save({"model": vae.state_dict() | {"loss.logvar": torch.zeros(())}}, path)
    return path
