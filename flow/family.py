"""Flow matching as the method sees it (neon.family.Family)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from flow.configs import NETWORKS, PRESETS, RECIPES
from flow.loss import Draws, flow_loss, nearest_pairs
from flow.network import UNet
from flow.sampler import flow_sampler
from neon import NeonError
from neon.family import NoiseMap, check_images, named, option
from neon.precision import autocast, network
from neon.sampling import from_uint8, start, to_uint8
from neon.weights import network as recorded
from nets.images import mirror

name = "flow"
networks, recipes, presets = NETWORKS, RECIPES, PRESETS
released_precision, released_tf32 = "float32", False
guidable = True
PAPER = PRESETS["flow_cifar10"].sampling
DOPRI5_EVALUATIONS = 134  # an image at tolerance 1e-5, for OT-CFM on CIFAR-10 (Tong et al. 2024, arXiv 2302.00482)


@dataclass(frozen=True)
class Sampling:
    """Options of the solver; the defaults are those of the public checkpoints' evaluation."""

    solver: Literal["dopri5", "heun", "euler"] = option(PAPER["solver"], "of the ODE from noise to image")
    num_steps: int = option(100, "steps of heun and euler; dopri5 chooses its own")
    tol: float = option(1e-5, "relative and absolute tolerance of dopri5")


@dataclass(frozen=True)
class Loading:
    """Nothing besides the checkpoint."""


def is_buffer(tensor_name: str) -> bool:
    return False


def create(config: str, *, device: torch.device | str, **options) -> UNet:
    """A new network, initialised from the global generator. Raises NeonError for an unknown configuration."""
    net = recorded.build(UNet, {**named(networks, config, "flow network"), **options})
    return net.to(device, memory_format=torch.channels_last).eval()


def hollow(config: str | Path, *, precision: str = "float32", **options) -> UNet:
    """On the meta device, of a named configuration or of a checkpoint's."""
    net = recorded.hollow(config, networks, UNet, "flow", networks["cifar10"], **options)
    net.precision = precision
    return net


def countable(sampling: Mapping[str, object]) -> tuple[dict[str, object], str]:
    """dopri5 evaluates the network as often as an image needs: here DOPRI5_EVALUATIONS times at any tolerance."""
    if sampling["solver"] != "dopri5":
        return dict(sampling), "num_steps"
    return {**sampling, "solver": "euler", "num_steps": DOPRI5_EVALUATIONS}, "num_steps"


def load(path: str | Path, *, device: torch.device | str, precision: str = "float32", **options) -> UNet:
    """A network from torchcfm's CIFAR-10 .pt (its ema_model) or an own .safetensors, in eval mode.

    precision: of the autocast in which sampling runs. options override the constructor's. Raises NeonError if the file
    is of no such network.
    """
    net, _ = recorded.load(path, UNet, "flow", device, networks["cifar10"], **options)
    net.precision = precision
    return net.to(memory_format=torch.channels_last)


def weights(model: UNet) -> UNet:
    return model


def metadata(model: UNet) -> dict[str, str]:
    return recorded.metadata(model)


def labels(model: UNet, seeds: torch.Tensor) -> torch.Tensor | None:
    """Each image draws its class from its own stream, after its noise; None for an unconditional network."""
    if not model.num_classes:
        return None
    return start(seeds, model.dim, model.num_classes, device=_device(model))[1].cpu()


@torch.no_grad()
def sample(model: UNet, seeds: torch.Tensor, labels: torch.Tensor | None, **sampling) -> torch.Tensor:
    """uint8 (N, C, H, W); sampling: fields of Sampling. The state is float64, the network computes in its precision."""
    return _sampler(model, seeds, labels, **sampling).images()


def noise_map(model: UNet, seeds: torch.Tensor, labels: torch.Tensor | None, **sampling) -> NoiseMap:
    """Raises NeonError for dopri5, whose steps depend on the noise."""
    if sampling.get("solver", Sampling.solver) == "dopri5":
        raise NeonError("the steps of dopri5 depend on the noise: choose --solver heun or euler for a fixed map")
    return _sampler(model, seeds, labels, **sampling)


def _sampler(model: UNet, seeds: torch.Tensor, labels: torch.Tensor | None, **sampling) -> NoiseMap:
    """The noise is float64."""
    device = _device(model)
    noise, labels, _ = start(seeds, model.dim, model.num_classes, labels, device)

    def velocity(x, t, labels):
        with autocast(device, network(model.precision)):
            return model(x.float(), t, labels).double()

    return NoiseMap(
        noise.double(), lambda z: flow_sampler(velocity, z, labels, **sampling), partial(to_uint8, nearest=True)
    )


def check(model: UNet, shape: tuple[int, ...], labels: torch.Tensor | None) -> None:
    """Raises NeonError if the network cannot be trained on images of that (C, H, W) and labels."""
    check_images(shape, labels, model.dim, model.num_classes)


def draw(
    model: UNet,
    n: int,
    generator: torch.Generator,
    *,
    images: Callable[[], torch.Tensor],
    coupling: str = "independent",
    flip: bool = False,
) -> Draws:
    """Mirrorings, noise and times of a step, drawn in this order. flip: mirror every other image, at random.

    coupling: 'independent', or 'ot': the step's images and noise are paired at the least sum of squared distances.
    """
    here = {"generator": generator, "device": generator.device}
    mirrored = torch.rand(n, **here) < 0.5 if flip else None
    noise, t = torch.randn(n, *model.dim, **here), torch.rand(n, **here)
    if coupling == "ot":
        noise = noise[nearest_pairs(from_uint8(mirror(images().to(noise.device), mirrored)), noise)]
    return Draws(mirrored, noise, t)


def loss(model: UNet, images: torch.Tensor, labels: torch.Tensor | None, draws: Draws, **_) -> torch.Tensor:
    """Mean over pixels and images."""
    x, noise, t = (v.to(images.device) for v in (from_uint8(mirror(images, draws.mirrored)), draws.noise, draws.t))
    return flow_loss(model, x, labels if model.num_classes else None, noise, t).mean()


def _device(model: UNet) -> torch.device:
    return next(model.parameters()).device
