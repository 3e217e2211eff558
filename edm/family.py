"""EDM as the method sees it (neon.family.Family)."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from edm.augment import augment as augmented
from edm.configs import NETWORKS as networks
from edm.configs import PRESETS as presets
from edm.configs import RECIPES as recipes
from edm.loss import edm_loss
from edm.network import EDMPrecond
from edm.sampler import sample as edm_sample
from edm.sampler import start
from neon.family import check_images, named
from neon.sampling import from_uint8
from neon.weights import network

__all__ = [
    "Sampling",
    "check",
    "create",
    "is_buffer",
    "labels",
    "load",
    "loss",
    "metadata",
    "networks",
    "presets",
    "recipes",
    "sample",
]

name = "edm"
PAPER = presets["edm_cifar10_cond"].sampling


@dataclass(frozen=True)
class Sampling:
    """Options of the sampler (Karras et al. 2022, Algorithm 2); the defaults are the paper's for CIFAR-10."""

    num_steps: int = PAPER["num_steps"]
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    solver: Literal["heun", "euler"] = "heun"


@dataclass(frozen=True)
class Loading:
    """Nothing beside the checkpoint."""


def is_buffer(tensor_name: str) -> bool:
    return tensor_name.endswith(".resample_filter")


def create(config: str, *, device: torch.device | str, **options) -> EDMPrecond:
    """A new network, initialised from the global generator. Raises NeonError for an unknown configuration."""
    net = network.build(EDMPrecond, {**named(networks, config, "EDM network"), **options})
    return net.to(device, memory_format=torch.channels_last)


def load(path: str | Path, *, device: torch.device | str, precision: str = "float32", **options) -> EDMPrecond:
    """A network from an original .pkl or an own .safetensors, in eval mode; options override its constructor's.

    precision: 'float32' (the reference), 'float16' (on GPUs) or 'bfloat16', in which the U-Net computes.
    Raises NeonError if the file records no constructor arguments or its tensors do not fit them.
    """
    net, _ = network.load(path, EDMPrecond, "EDM", device, **options)
    net.dtype = getattr(torch, precision)
    return net.to(memory_format=torch.channels_last)


def weights(model: EDMPrecond) -> EDMPrecond:
    return model


def metadata(model: EDMPrecond) -> dict[str, str]:
    return network.metadata(model)


def labels(model: EDMPrecond, seeds: torch.Tensor) -> torch.Tensor | None:
    """As in EDM, each image draws its class from its own stream, after its latent."""
    classes = start(model, seeds, device=next(model.parameters()).device)[1]
    return None if classes is None else classes.cpu()


def sample(model: EDMPrecond, seeds: torch.Tensor, labels: torch.Tensor | None, **kappa) -> torch.Tensor:
    """uint8 (N, C, R, R); kappa: fields of Sampling."""
    return edm_sample(model, seeds, labels, next(model.parameters()).device, **kappa)


def check(model: EDMPrecond, shape: tuple[int, ...], labels: torch.Tensor | None) -> None:
    """Raises NeonError if the network cannot be trained on images of that (C, H, W) and labels."""
    wanted = (model.img_channels, model.img_resolution, model.img_resolution)
    check_images(shape, labels, wanted, model.label_dim)


def loss(
    model: EDMPrecond,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    generator: torch.Generator,
    augment: float = 0.0,
) -> torch.Tensor:
    """Sum over pixels, mean over images. augment: probability of each augmentation, 0 for none."""
    one_hot = F.one_hot(labels, model.label_dim).float() if model.label_dim else None
    transform = functools.partial(augmented, p=augment) if augment else None
    return edm_loss(model, from_uint8(images), one_hot, generator, transform).sum() / len(images)
