"""Flow matching as the method sees it (neon.family.Family)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from flow.configs import NETWORKS as networks
from flow.configs import PRESETS as presets
from flow.configs import RECIPES as recipes
from flow.loss import flow_loss
from flow.network import UNet
from flow.sampler import flow_sampler
from neon.family import check_images, named
from neon.precision import autocast
from neon.sampling import from_uint8, start, to_uint8
from neon.weights import network

__all__ = [
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

name = "flow"
PAPER = presets["flow_cifar10"].sampling


@dataclass(frozen=True)
class Sampling:
    """Options of the solver; the defaults are those of the public checkpoints' evaluation."""

    solver: Literal["dopri5", "heun", "euler"] = PAPER["solver"]
    num_steps: int = 100  # of heun and euler
    tol: float = 1e-5  # of dopri5, relative and absolute


@dataclass(frozen=True)
class Loading:
    """Nothing beside the checkpoint."""


def is_buffer(tensor_name: str) -> bool:
    return False


def create(config: str, *, device: torch.device | str, **options) -> UNet:
    """A new network, initialised from the global generator. Raises NeonError for an unknown configuration."""
    net = network.build(UNet, {**named(networks, config, "flow network"), **options})
    return net.to(device, memory_format=torch.channels_last)


def load(path: str | Path, *, device: torch.device | str, precision: str = "float32", **options) -> UNet:
    """A network from torchcfm's CIFAR-10 .pt (its ema_model) or an own .safetensors, in eval mode.

    precision: of the autocast in which sampling runs. options override the constructor's. Raises NeonError if the file
    is of no such network.
    """
    net, _ = network.load(path, UNet, "flow", device, networks["cifar10"], **options)
    net.precision = precision
    return net.to(memory_format=torch.channels_last)


def weights(model: UNet) -> UNet:
    return model


def metadata(model: UNet) -> dict[str, str]:
    return network.metadata(model)


def labels(model: UNet, seeds: torch.Tensor) -> torch.Tensor | None:
    """Each image draws its class from its own stream, after its noise; None for an unconditional network."""
    classes = start(seeds, model.dim, model.num_classes, device=_device(model))[1]
    return None if classes is None else classes.cpu()


def sample(model: UNet, seeds: torch.Tensor, labels: torch.Tensor | None, **kappa) -> torch.Tensor:
    """uint8 (N, C, H, W); kappa: fields of Sampling. The state is float64, the network computes in its precision."""
    device = _device(model)
    noise, labels, _ = start(seeds, model.dim, model.num_classes, labels, device)

    def velocity(x, t, labels):
        with autocast(device, model.precision):
            return model(x.float(), t, labels).double()

    return to_uint8(flow_sampler(velocity, noise.double(), labels, **kappa))


def check(model: UNet, shape: tuple[int, ...], labels: torch.Tensor | None) -> None:
    """Raises NeonError if the network cannot be trained on images of that (C, H, W) and labels."""
    check_images(shape, labels, model.dim, model.num_classes)


def loss(
    model: UNet,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    generator: torch.Generator,
    coupling: str = "independent",
    flip: bool = False,
) -> torch.Tensor:
    """Mean over pixels and images. coupling: see `flow_loss`. flip: mirror every other image, at random."""
    if flip:
        mirrored = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
        images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)
    return flow_loss(model, from_uint8(images), labels if model.num_classes else None, generator, coupling).mean()


def _device(model: UNet) -> torch.device:
    return next(model.parameters()).device
