"""Noisy context learning: flow matching in which every cell, the context included, has its own noise level."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xAR.network import XAR, to_cells

LABEL_DROP = 0.1


class Draws(NamedTuple):
    """The random numbers of one training step."""

    uniform: Tensor  # (B,): the label is dropped where it is below LABEL_DROP
    logit: Tensor  # (B, cells), standard normal: noise level t = sigmoid(logit)
    noise: Tensor  # (B, positions, channels) float32, standard normal, in sequence order


def draw(model: XAR, batch: int, generator: torch.Generator) -> Draws:
    """Draws for `batch` images, on the generator's device."""
    options = {"generator": generator, "device": generator.device}
    return Draws(
        uniform=torch.rand(batch, **options),
        logit=torch.randn(batch, model.cells, dtype=torch.float64, **options),
        noise=torch.randn(batch, model.cells * model.size, model.channels, **options),
    )


def noisy_context_loss(model: XAR, latents: Tensor, labels: Tensor, draws: Draws) -> Tensor:
    """Mean squared error of the velocity, a float32 scalar.

    latents (B, channels, side, side) float32, scaled; labels (B,) int64 in [0, classes).
    """
    uniform, logit, noise = (x.to(latents.device) for x in draws)
    labels = labels.where(uniform >= LABEL_DROP, model.classes)
    t = logit.double().sigmoid().float()
    data = to_cells(latents, model.cell)
    level = t.repeat_interleave(model.size, 1)[..., None]
    velocity = model((1 - level) * data + level * noise, t, labels)
    return F.mse_loss(velocity.float(), noise - data)
