"""The small IMM network of the golden vectors, how to read those, and checkpoints as users have them."""

from pathlib import Path

import numpy as np
import torch
from fill import fill_parameters
from pickle_writer import IMM_CLASSES, write_persistent_pickle

from imm import family
from imm.autoencoder import NAME
from imm.network import IMMPrecond
from neon.weights.checkpoint import save_safetensors

GOLDEN = Path(__file__).parents[1] / "golden" / "imm"
TINY = {
    "model_type": "DiT",
    "img_resolution": 8,
    "img_channels": 4,
    "label_dim": 10,
    "num_classes": 10,
    "patch_size": 2,
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 4,
}


def golden(stem: str) -> dict:
    """The arrays of one file: numbers as tensors, texts as numpy arrays."""
    with np.load(GOLDEN / f"{stem}.npz") as data:
        return {key: torch.from_numpy(a) if a.dtype.kind in "fiu" else a for key, a in data.items()}


def tiny(**options) -> IMMPrecond:
    """The net `tiny` of golden/imm/README.md with its deterministic weights."""
    return fill_parameters(IMMPrecond(**(TINY | options)))


def near(got, want, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def write_vae(folder: Path, seed: int = 0) -> Path:
    """A narrow VAE with the interface of Stable Diffusion's, in diffusers' format."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": 4}
    AutoencoderKL(**kinds, **widths).save_pretrained(folder / NAME)
    return folder / NAME


def write_pickle(path: Path, net: IMMPrecond, init_kwargs: dict) -> Path:
    """A network as the original training pickles it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {"augment_pipe": None, "dataset_kwargs": {"path": "dataset.zip"}}
    write_persistent_pickle(path, "IMMPrecond", init_kwargs, net.state_dict(), IMM_CLASSES, buffers=(), **entries)
    return path


def write_full_size(path: Path, depth: int = 28) -> Path:
    """A checkpoint of DiT-XL/2's width with small random weights, in the original format."""
    kwargs = family.networks["imagenet256"] | {"depth": depth}
    with torch.device("meta"):
        net = IMMPrecond(**kwargs)
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator)).mul_(0.02)
    return write_pickle(path, net, kwargs)


def write_digits(path: Path, seed: int = 0) -> Path:
    """A checkpoint of the pixel-space mini network with weights that let every part matter."""
    torch.manual_seed(seed)
    model = family.create("digits", device="cpu")
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(torch.randn(p.shape), alpha=0.5 / p.shape[-1] ** 0.5)
    save_safetensors(path, model.net.state_dict(), family.metadata(model))
    return path
