"""The moment-matching loss of IMM (arXiv 2503.07565).

A jump from x_t to s should land where the jump from a slightly less noisy x_r lands: not image by image but in
distribution, measured by a kernel (MMD) over groups of M images that share their times s <= r <= t.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from imm.network import IMMPrecond, logsnr, nt_to_time, time_to_nt
from neon import NeonError
from neon.precision import autocast

M = 4  # images in a group


class Draws(NamedTuple):
    """All random numbers of one loss: G groups, B = M G images."""

    u_t: torch.Tensor  # (G, 1, 1, 1) float64 in [0, 1)
    u_s: torch.Tensor  # the same
    gate: torch.Tensor  # (B,) float32 in [0, 1): small values drop the label
    noise: torch.Tensor  # (B, C, H, W) float32, standard normal


def check_groups(n: int) -> None:
    """Raises NeonError unless n images, of a step or of a forward pass, are whole groups."""
    if n % M:
        raise NeonError(f"IMM's loss compares groups of {M} images; {n} images are not a multiple of it")


def draw(shape: Sequence[int], generator: torch.Generator) -> Draws:
    """Draws for a batch (B, C, H, W), on the generator's device, in the order of the fields.

    Raises NeonError unless B is a multiple of M.
    """
    check_groups(shape[0])
    here = {"generator": generator, "device": generator.device}
    groups = (shape[0] // M, 1, 1, 1)
    u_t = torch.rand(groups, dtype=torch.float64, **here)
    u_s = torch.rand(groups, dtype=torch.float64, **here)
    gate = torch.rand(shape[0], dtype=torch.float32, **here)
    return Draws(u_t, u_s, gate, torch.randn(shape, dtype=torch.float32, **here))


def group_times(
    net: IMMPrecond, u_t: torch.Tensor, u_s: torch.Tensor, k: float = 12, min_gap: float | None = 1e-4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uniforms in [0, 1) → times (t, r, s), same shape, float64.

    t is uniform on [eps, T], s on [eps, t]. r precedes t by 2^-k of the range of noise-to-signal ratios, and by
    min_gap at least, but is never less than s.
    """
    ends = torch.tensor([net.eps, net.T], dtype=torch.float64, device=u_t.device)
    (nt_low, nt_high), (low, high) = time_to_nt(ends), nt_to_time(time_to_nt(ends))
    t = low + u_t * (high - low)
    nt_t = time_to_nt(t)
    s = low + u_s * (nt_to_time(nt_t) - low)
    nt_s = time_to_nt(s).minimum(nt_t).clamp(min=nt_low)
    nt_r = (nt_t - (nt_high - nt_low) / 2**k).clamp(nt_low, nt_high)
    t, r, s = nt_to_time(nt_t), nt_to_time(nt_r), nt_to_time(nt_s)
    if min_gap is not None:
        r = r.minimum(t - min_gap)
    return t, r.maximum(s), s


def kernel(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Laplace kernel between all pairs of a group: (G, M, ...), (G, M, ...), (G,) → (G, M, M)."""
    x, y = x.flatten(2), y.flatten(2)
    square = (x[:, :, None] - y[:, None, :]).square().sum(-1)
    distance = square.clamp(min=1e-8).sqrt()  # the floor keeps the gradient finite where x = y
    return torch.exp(-w[:, None, None] * distance / x.shape[-1])


def kernel_scale(t: torch.Tensor, s: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """The kernel's w: a jump over t - s moves images by about (t - s) sigma_data."""
    return 1 / ((t - s).abs() * sigma_data)


def loss_weight(t: torch.Tensor, a: float = 2, b: float = 4) -> torch.Tensor:
    """Weight of a group at time t: sigmoid(b - logsnr) times half of -dlogsnr/dt, times alpha^a / (alpha² + sigma²)."""
    return (1 - t) ** a / ((1 - t) ** 2 + t**2) * torch.sigmoid(b - logsnr(t)) / (t * (1 - t))


def moment_matching_loss(
    net: IMMPrecond,
    images: torch.Tensor,
    class_labels: torch.Tensor,
    draws: Draws,
    *,
    a: float = 2,
    b: float = 4,
    k: float = 12,
    min_gap: float | None = 1e-4,
    label_dropout: float = 0.1,
) -> torch.Tensor:
    """Loss of every group, (G,) float64; the objective is its mean.

    images (B, C, H, W) float32 with standard deviation near sigma_data, class_labels (B, label_dim) one-hot; group
    g is images[M g : M g + M]. Only the jump from t has a gradient, and runs in the caller's autocast.
    A NaN loss (overflow in float16) counts as 0, but its gradient stays NaN: a gradient scaler skips that step.
    """
    check_groups(len(images))
    draws = Draws(*(d.to(images.device) for d in draws))
    t, r, s = group_times(net, draws.u_t, draws.u_s, k, min_gap)
    t_, r_, s_ = (time.repeat_interleave(M, dim=0) for time in (t, r, s))
    noise = net.sigma_data * draws.noise
    x_t = (1 - t_) * images + t_ * noise
    x_r = (1 - r_) * images + r_ * noise

    kept = class_labels * (draws.gate >= label_dropout)[:, None]
    jump_t = net(x_t, t_, s_, kept).unflatten(0, (-1, M))
    with torch.no_grad(), autocast(images.device, "float32"):
        jump_r = net(x_r, r_, s_, class_labels).unflatten(0, (-1, M))

    t, s = t.flatten(), s.flatten()
    # s = t (or t = 0) has nothing to learn, but infinite weights: such a group counts as 0, in the gradient too.
    w = torch.where(t > s, kernel_scale(t, s, net.sigma_data), 0)
    weight = torch.where(t > s, loss_weight(t, a, b), 0)
    pairs = kernel(jump_t, jump_t, w) + kernel(jump_r, jump_r, w) - 2 * kernel(jump_t, jump_r, w)
    return (weight * pairs.mean(dim=(1, 2))).nan_to_num(nan=0.0)
