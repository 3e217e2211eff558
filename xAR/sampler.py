"""Sampling: one cell after the other, each by Euler-Maruyama steps of the reverse SDE from noise to data."""

from itertools import pairwise

import torch
from torch import Tensor

from neon import NeonError
from neon.sampling import Streams
from xAR.network import XAR, to_map


def time_grid(steps: int) -> Tensor:
    """(steps + 1,) float64: evenly from 1 to 0.04, then 0. Raises NeonError below two steps."""
    if steps < 2:
        raise NeonError(f"xAR needs two sampling steps or more (from noise to 0.04 and from there to 0), not {steps}")
    return torch.cat([torch.linspace(1, 0.04, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def cell_guidance(cfg: float, cells: int) -> list[float]:
    """Guidance of each cell: none (1) for the first, rising evenly to cfg for the last. Raises NeonError if cfg < 1."""
    if not cfg >= 1:
        raise NeonError(f"cfg must be 1 (no guidance) or more, not {cfg}")
    return [1 + (cfg - 1) * c / (cells - 1) for c in range(cells)]


def drift(velocity: Tensor, x: Tensor, t: float) -> Tensor:
    """Drift of the reverse SDE with diffusion 2t: velocity - t·score, where score = -((1-t)·velocity + x)/t."""
    return (2 - t) * velocity + x


def guided_velocity(model: XAR, x: Tensor, t: Tensor, labels: Tensor, cfg: float, cache: list[list[Tensor]]) -> Tensor:
    """Velocity of the last cell of x, (B, size, channels) float64; arguments as in `XAR.forward`."""
    if cfg > 1:
        labels = torch.cat([labels, torch.full_like(labels, model.classes)])
        x, t = x.repeat(2, 1, 1), t.repeat(2, 1)
    velocity = model(x, t, labels, cache)[:, -model.size :].double()
    if cfg > 1:
        conditional, unconditional = velocity.chunk(2)
        velocity = unconditional + cfg * (conditional - unconditional)
    return velocity


@torch.no_grad()
def sample(model: XAR, streams: Streams, labels: Tensor | None, *, cfg: float = 1.0, steps: int = 40) -> Tensor:
    """Latents (B, channels, side, side) float32, scaled, one for each stream, on the model's device.

    labels (B,) int64 in [0, classes), None: no class. cfg ≥ 1 guides the last cell in full and the first not at all.
    Use the model in eval mode; under autocast the network alone runs in low precision, the state is float64.
    Each stream gives, cell by cell, one start and steps - 1 noises, whatever labels and cfg are.
    Raises NeonError for labels, cfg or steps out of range.
    """
    device = model.pred.weight.device
    if labels is None:
        labels = torch.full((len(streams),), model.classes, device=device)
    elif len(labels) != len(streams) or not all(0 <= label < model.classes for label in labels.tolist()):
        raise NeonError(f"xAR needs one label in 0 … {model.classes - 1} for each of {len(streams)} images")
    labels = labels.to(device)
    grid, shape = time_grid(steps).tolist(), (model.size, model.channels)

    cache, cells = model.new_cache(), []
    for gamma in cell_guidance(cfg, model.cells):
        x = streams.randn(shape).to(device).double()
        context, context_t = cells[-1:], [0.0] * len(cells[-1:])  # the last clean cell, to be cached in the first step
        for t, t_next in pairwise(grid):
            noise = streams.randn(shape, torch.float64).to(device) if t_next else 0.0
            network_x = torch.cat([*context, x], 1).float()
            network_t = torch.tensor([*context_t, t], device=device).expand(len(x), -1)
            velocity = guided_velocity(model, network_x, network_t, labels, gamma, cache)
            x = x + drift(velocity, x, t) * (t_next - t) + (2 * t * (t - t_next)) ** 0.5 * noise
            context, context_t = [], []
        cells.append(x)
    return to_map(torch.cat(cells, 1).float(), model.cell)
