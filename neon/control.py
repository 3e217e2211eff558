"""A control of Neon: a step from θ_r as long as θ_s − θ_r in every tensor, in a random direction."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from neon import NeonError
from neon.merge import is_finite, merge
from neon.weights.match import Renamed


class Steps:
    """Norms of two steps from one base, over all tensors added, and the cosine between them; in float64."""

    def __init__(self):
        self.drift = self.random = self.product = 0.0

    def add(self, drift: torch.Tensor, random: torch.Tensor) -> None:
        """Two steps of one tensor, of one shape."""
        self.drift = math.hypot(self.drift, drift.norm())
        self.random = math.hypot(self.random, random.norm())
        self.product += float((drift * random).sum())

    @property
    def cosine(self) -> float:
        """NaN if there was no step."""
        return self.product / (self.drift * self.random) if self.drift * self.random else math.nan


@torch.no_grad()
def random_steps(
    base: Mapping[str, torch.Tensor],
    selftrained: Mapping[str, torch.Tensor],
    seed: int,
    is_buffer: Callable[[str], bool] = lambda name: False,
    observe: Callable[[str, torch.Tensor, torch.Tensor, str | None], None] = lambda *seen: None,
    steps: Steps | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, θ_r + d) in the order of the names, on the CPU, one at a time, in the dtype of θ_r.

    d is Gaussian with the norm of θ_s − θ_r for every tensor that a merge would change, up to the rounding of the sum;
    all other tensors are the base's. The numbers depend on the seed and on these norms alone: on no device, and on no
    order in files. observe: see neon.merge.merge. steps: counts both steps, the random one as it is after rounding.
    Raises NeonError as merge does, and if the sum overflows.
    """
    generator, pair = torch.Generator().manual_seed(seed), []

    def seen(name: str, old: torch.Tensor, new: torch.Tensor, reason: str | None) -> None:
        pair[:] = [] if reason else [old, new]
        observe(name, old, new, reason)

    in_order = Renamed(base, {name: name for name in sorted(base)})
    for name, tensor in merge(in_order, selftrained, -1.0, is_buffer, seen):  # checks what a merge checks
        yield name, _stepped(name, *pair, generator, steps or Steps()) if pair else tensor


def _stepped(name: str, base: torch.Tensor, selftrained: torch.Tensor, generator, steps: Steps) -> torch.Tensor:
    old = base.to("cpu", torch.float64)
    drift = selftrained.to("cpu", torch.float64) - old
    direction = torch.randn(old.shape, generator=generator, dtype=torch.float64)
    found = (old + direction * (drift.norm() / direction.norm())).to(base.dtype)
    if not is_finite(found):
        raise NeonError(f"{name}: not finite after the random step in {base.dtype}")
    steps.add(drift, found.double() - old)
    return found
