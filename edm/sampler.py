"""EDM's samplers (Karras et al. 2022, Alg. 2), with one random stream per image."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from neon import NeonError
from neon.family import NoiseMap
from neon.sampling import Streams, to_uint8
from neon.sampling import start as draw_start


@torch.no_grad()
def sample(
    net: nn.Module,
    seeds: torch.Tensor | Sequence[int],
    class_idx: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **options,
) -> torch.Tensor:
    """The images of these seeds, (N, C, H, W) uint8 on `device`. Options: those of `edm_sampler`.

    class_idx: (N,) int64, or None: a class-conditional net then gets the classes drawn by `start`.
    net: in eval mode, on `device`. Raises NeonError.
    """
    return sampler_of(net, seeds, class_idx, device, **options).images()


def sampler_of(
    net: nn.Module,
    seeds: torch.Tensor | Sequence[int],
    class_idx: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **options,
) -> NoiseMap:
    """`sample` in its parts. The noise is float64; with s_churn > 0 the map draws more of it at each call."""
    latents, class_idx, streams = start(net, seeds, class_idx, device)
    class_labels = None if class_idx is None else F.one_hot(class_idx, net.label_dim)
    return NoiseMap(
        latents.double(),
        lambda z: edm_sampler(net, z, class_labels, streams, **options),
        partial(to_uint8, nearest=True),
    )


def start(
    net: nn.Module,
    seeds: torch.Tensor | Sequence[int],
    class_idx: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor | None, Streams]:
    """`neon.sampling.start` for this net: latents (N, C, H, W) float32, class indices (N,) or None, streams."""
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    return draw_start(seeds, shape, net.label_dim, class_idx, device)


def edm_sampler(
    net: nn.Module,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    streams: Streams | None = None,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    s_churn: float = 0,
    s_min: float = 0,
    s_max: float = math.inf,
    s_noise: float = 1,
    solver: str = "heun",
) -> torch.Tensor:
    """Integrate the probability-flow ODE from noise to images, (N, C, H, W) float64, about [-1, 1].

    net(x float64, sigma 0-d, class_labels) → denoised x; its own sigma_min, sigma_max bound the schedule.
    latents: (N, C, H, W) standard normals. solver: "heun", 2·num_steps - 1 evaluations of the net, or "euler",
    num_steps evaluations. s_churn > 0 adds noise from `streams`, drawn at every step. Without it nothing is drawn:
    EDM draws all the same, but nothing after depends on it. It runs with the gradients that its caller allows.
    Raises NeonError.
    """
    if solver not in ("heun", "euler"):
        raise NeonError(f"unknown solver {solver!r}, choose heun or euler")
    if s_churn > 0 and streams is None:
        raise NeonError("s_churn > 0 needs random streams")

    def slope(x, sigma):
        return (x - net(x, x.new_full((), sigma), class_labels).double()) / sigma

    sigmas = sigma_schedule(num_steps, max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max), rho).tolist()
    x = latents.double() * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        if s_churn > 0:
            gamma = min(s_churn / num_steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0
            noise = streams.randn(x.shape[1:], torch.float64)
            raised = sigma * (1 + gamma)
            x = x + math.sqrt(raised**2 - sigma**2) * s_noise * noise
            sigma = raised
        d = slope(x, sigma)
        if solver == "heun" and sigma_next > 0:
            d = (d + slope(x + (sigma_next - sigma) * d, sigma_next)) / 2
        x = x + (sigma_next - sigma) * d
    return x


def sigma_schedule(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80, rho: float = 7) -> torch.Tensor:
    """Noise levels from sigma_max to sigma_min, then 0: (num_steps + 1,) float64 (Karras et al. 2022, Eq. 5)."""
    if num_steps < 1:
        raise NeonError(f"num_steps must be at least 1, not {num_steps}")
    if not (0 < sigma_min < sigma_max < math.inf and 0 < rho < math.inf):
        raise NeonError(f"need 0 < sigma_min < sigma_max and rho > 0, not {sigma_min}, {sigma_max} and {rho}")
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps, dtype=torch.float64)
    return torch.cat([ramp**rho, ramp.new_zeros(1)])
