"""The loss that a scheduler's config describes: noise levels of its training, and what the network predicts there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from neon import NeonError


class Draws(NamedTuple):
    """The random numbers of a training step of N images."""

    dropped: torch.Tensor | None  # (N,) bool: trained without class or prompt
    latent: torch.Tensor | None  # (N, C, h, w) standard normal: which latent of its posterior an image gets
    noise: torch.Tensor  # (N, C, h, w) standard normal
    u: torch.Tensor  # (N,) uniform in [0, 1): which noise level


@dataclass(frozen=True)
class Levels:
    """The noise levels of training, in the order of their times: x_t = signal·x + noise·ε, each (T,) float32."""

    times: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor
    predicted: str  # epsilon, sample, v_prediction or flow

    def at(self, u: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Time (N,), signal and noise (N, 1, …) of the levels that u (N,) in [0, 1) chooses evenly."""
        index = (u * len(self.times)).long()
        times, *scales = (table.to(u.device)[index] for table in (self.times, self.signal, self.noise))
        return times, *(scale.view(-1, *[1] * (ndim - 1)) for scale in scales)

    def target(self, x: torch.Tensor, eps: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the network should say at signal·x + noise·eps."""
        if self.predicted == "epsilon":
            return eps
        if self.predicted == "sample":
            return x
        return signal * eps - noise * x if self.predicted == "v_prediction" else eps - x


def levels_of(scheduler) -> Levels:
    """Of a scheduler of diffusers, whatever steps it is set to. Raises NeonError if its kind is not known here."""
    kind = type(scheduler).__name__
    fresh = type(scheduler).from_config(scheduler.config)
    if kind.startswith("FlowMatch"):
        sigmas = fresh.sigmas.float()[: fresh.config.num_train_timesteps]
        return Levels(sigmas * fresh.config.num_train_timesteps, 1 - sigmas, sigmas, "flow")
    predicted = fresh.config.get("prediction_type", "epsilon")
    if not hasattr(fresh, "alphas_cumprod") or predicted not in ("epsilon", "sample", "v_prediction"):
        raise NeonError(f"{kind} with prediction_type {predicted}: its training loss is not known here")
    signal = fresh.alphas_cumprod.float()
    return Levels(torch.arange(len(signal)), signal.sqrt(), (1 - signal).sqrt(), predicted)


def draw(n: int, shape: tuple[int, ...], generator: torch.Generator, latent: bool, drop: float) -> Draws:
    """Draws for n images or latents of that (C, h, w), in the order of the fields. drop: probability of dropping."""
    here: Mapping = {"generator": generator, "device": generator.device}
    dropped = torch.rand(n, **here) < drop if drop else None
    posterior = torch.randn(n, *shape, **here) if latent else None
    return Draws(dropped, posterior, torch.randn(n, *shape, **here), torch.rand(n, **here))
