"""EDM as the method sees it (neon.family.Family)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from edm.configs import NETWORKS, PRESETS, RECIPES
from edm.loss import Draws, edm_loss
from edm.loss import draw as draw_numbers
from edm.network import EDMPrecond
from edm.sampler import sample as edm_sample
from edm.sampler import sampler_of, start
from neon import NeonError
from neon.family import NoiseMap, check_images, named, option
from neon.precision import network
from neon.sampling import from_uint8
from neon.weights import network as recorded

name = "edm"
networks, recipes, presets = NETWORKS, RECIPES, PRESETS
released_precision, released_tf32 = "float32", False
guidable = True
PAPER = PRESETS["edm_cifar10_cond"].sampling


@dataclass(frozen=True)
class Sampling:
    """Options of the sampler (Karras et al. 2022, Algorithm 2); the defaults are the paper's for CIFAR-10."""

    num_steps: int = option(PAPER["num_steps"], "noise levels from sigma_max to sigma_min")
    sigma_min: float = option(0.002, "lowest noise level")
    sigma_max: float = option(80.0, "highest noise level, where sampling starts")
    rho: float = option(7.0, "larger: more of the levels are low")
    s_churn: float = option(0.0, "how much noise is added and removed at each step; 0: none, a deterministic sampler")
    s_min: float = option(0.0, "lowest level at which noise is added")
    s_max: float = option(math.inf, "highest level at which noise is added")
    s_noise: float = option(1.0, "standard deviation of the added noise")
    solver: Literal["heun", "euler"] = option("heun", "heun: two network calls a step; euler: one")


@dataclass(frozen=True)
class Loading:
    """Nothing besides the checkpoint."""


def is_buffer(tensor_name: str) -> bool:
    return tensor_name.endswith(".resample_filter")


def create(config: str, *, device: torch.device | str, **options) -> EDMPrecond:
    """A new network, initialised from the global generator. Raises NeonError for an unknown configuration."""
    net = recorded.build(EDMPrecond, {**named(networks, config, "EDM network"), **options})
    return net.to(device, memory_format=torch.channels_last).eval()


def hollow(config: str | Path, *, precision: str = "float32", **options) -> EDMPrecond:
    """On the meta device, of a named configuration or of a checkpoint's."""
    net = recorded.hollow(config, networks, EDMPrecond, "EDM", **options)
    net.dtype = getattr(torch, network(precision))
    return net


def countable(sampling: Mapping[str, object]) -> tuple[dict[str, object], str]:
    return dict(sampling), "num_steps"


def load(path: str | Path, *, device: torch.device | str, precision: str = "float32", **options) -> EDMPrecond:
    """A network from an original .pkl or an own .safetensors, in eval mode; options override its constructor's.

    precision: 'float32' (the reference), 'float16' (on GPUs) or 'bfloat16', in which the U-Net computes.
    Raises NeonError if the file records no constructor arguments or its tensors do not fit them.
    """
    if network(precision) == "float16" and torch.device(device).type == "cpu":
        raise NeonError("EDM's U-Net computes in float16 on GPUs only: choose --precision float32 or bfloat16")
    net, _ = recorded.load(path, EDMPrecond, "EDM", device, **options)
    net.dtype = getattr(torch, network(precision))
    return net.to(memory_format=torch.channels_last)


def weights(model: EDMPrecond) -> EDMPrecond:
    return model


def metadata(model: EDMPrecond) -> dict[str, str]:
    return recorded.metadata(model)


def labels(model: EDMPrecond, seeds: torch.Tensor) -> torch.Tensor | None:
    """As in EDM, each image draws its class from its own stream, after its latent; None if there are none."""
    return start(model, seeds, device=next(model.parameters()).device)[1].cpu() if model.label_dim else None


def sample(model: EDMPrecond, seeds: torch.Tensor, labels: torch.Tensor | None, **sampling) -> torch.Tensor:
    """uint8 (N, C, R, R); sampling: fields of Sampling."""
    return edm_sample(model, seeds, labels, next(model.parameters()).device, **sampling)


def noise_map(model: EDMPrecond, seeds: torch.Tensor, labels: torch.Tensor | None, **sampling) -> NoiseMap:
    """Raises NeonError if s_churn > 0."""
    if sampling.get("s_churn", 0) > 0:
        raise NeonError("EDM's sampler with s_churn > 0 adds noise at each step, so it is no map of its first noise")
    return sampler_of(model, seeds, labels, next(model.parameters()).device, **sampling)


def check(model: EDMPrecond, shape: tuple[int, ...], labels: torch.Tensor | None) -> None:
    """Raises NeonError if the network cannot be trained on images of that (C, H, W) and labels."""
    wanted = (model.img_channels, model.img_resolution, model.img_resolution)
    check_images(shape, labels, wanted, model.label_dim)


def draw(model: EDMPrecond, n: int, generator: torch.Generator, *, augment: float = 0.0, **_) -> Draws:
    """Noise levels, augmentations and noise of a step. augment: probability of each augmentation, 0 for none."""
    shape = (n, model.img_channels, model.img_resolution, model.img_resolution)
    return draw_numbers(shape, generator, augment)


def loss(model: EDMPrecond, images: torch.Tensor, labels: torch.Tensor | None, draws: Draws, **_) -> torch.Tensor:
    """Sum over pixels, mean over images."""
    one_hot = F.one_hot(labels, model.label_dim).float() if model.label_dim else None
    return edm_loss(model, from_uint8(images), one_hot, draws).sum() / len(images)
