"""IMM's pushforward sampler: a few jumps from noise at time T to data at time eps."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from imm.network import IMMPrecond, nt_to_time, time_to_nt
from neon import NeonError
from neon.sampling import Streams


def schedule(net: IMMPrecond, steps: int, kind: str = "uniform", dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Times from net.T down to net.eps, (steps + 1,) on the CPU.

    'uniform' in time, or 'edm': uniform in the 7th root of the noise-to-signal ratio. Raises NeonError.
    """
    if steps < 1:
        raise NeonError(f"the sampler needs at least one step, not {steps}")
    if kind == "uniform":
        return torch.linspace(net.T, net.eps, steps + 1, dtype=dtype)
    if kind == "edm":
        first, last = time_to_nt(torch.tensor([net.T, net.eps], dtype=dtype)) ** (1 / 7)
        return nt_to_time((first + torch.linspace(0, 1, steps + 1, dtype=dtype) * (last - first)) ** 7)
    raise NeonError(f"no schedule {kind!r} (uniform, edm)")


def pushforward(
    net: IMMPrecond,
    x: torch.Tensor,
    class_labels: torch.Tensor | None,
    times: torch.Tensor,
    cfg: float | None = None,
) -> torch.Tensor:
    """x (N, C, R, R) at times[0] → times[-1], through every time between, in the dtype of times.

    float64 times are the original sampler, float32 ones what Neon's scripts compute; they agree to about 1e-6.
    class_labels (N, label_dim) one-hot or None; cfg: guidance scale or None. It runs with the gradients that its caller
    allows.
    """
    x, times = x.to(times.dtype), times.to(x.device)
    for t, s in pairwise(times):
        x = net(x, t, s, class_labels, cfg=cfg)
    return x


def start_noise(net: IMMPrecond, streams: Streams) -> torch.Tensor:
    """The x at time T of every stream, (N, C, R, R) float32."""
    return net.sigma_data * streams.randn((net.img_channels, net.img_resolution, net.img_resolution))


@torch.no_grad()
def sample(net: IMMPrecond, streams: Streams, labels: torch.Tensor | None, **options) -> torch.Tensor:
    """One latent per stream, (N, C, R, R). labels, options: those of `jumps`."""
    return jumps(net, labels, **options)(start_noise(net, streams))


def jumps(
    net: IMMPrecond,
    labels: torch.Tensor | None,
    *,
    steps: int = 8,
    cfg: float | None = 1.5,
    kind: str = "uniform",
    dtype: torch.dtype = torch.float64,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """x (N, C, R, R) at time T → latents of the given dtype. labels: (N,) int64 classes, or None for no class."""
    times = schedule(net, steps, kind, dtype)

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = None if labels is None else F.one_hot(labels.to(x.device), net.label_dim).float()
        return pushforward(net, x, rows, times, cfg)

    return run
