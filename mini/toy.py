"""Neon in two dimensions (the paper's App. B): small enough to train many seeds at once and to measure exactly.

Two generators learn N(0, TARGET) from a few samples. One is a diffusion model, whose sampler scales the score by ζ; the
other an autoregressive Gaussian x₁, x₂ | x₁, whose sampler has a temperature τ. ζ > 1 and τ < 1 seek modes, ζ < 1 and
τ > 1 spread out. All tensors have the seeds as their first dimension; θ is a dict of tensors, as `neon.merge` takes it.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from scipy.special import ndtri
from scipy.stats.qmc import Sobol
from torch import Tensor

from neon.merge import merge

TARGET = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
TIMES = 1000  # of the diffusion's schedule
STEPS = 20  # of its sampler
WIDTH, LAYERS = 32, 4

Theta = dict[str, Tensor]


def real_data(seeds: int, n: int, generator: torch.Generator) -> Tensor:
    """Samples of N(0, TARGET), (seeds, n, 2) float32."""
    return torch.randn(seeds, n, 2, generator=generator) @ torch.linalg.cholesky(TARGET).T.float()


def frechet(mean: Tensor, cov: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance from N(mean, cov) to N(0, TARGET): (…, 2), (…, 2, 2) float64 → (…).

    For 2×2 matrices tr √M = √(tr M + 2 √det M).
    """
    product = cov @ TARGET
    root = (trace(product) + 2 * torch.linalg.det(product).clamp(min=0).sqrt()).clamp(min=0).sqrt()
    return mean.square().sum(-1) + trace(cov) + trace(TARGET) - 2 * root


def trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def merged(base: Theta, trained: Theta, w: float) -> Theta:
    """θ_r − w (θ_s − θ_r)."""
    return dict(merge(base, trained, w))


def train(
    loss: Callable[[Theta], Tensor], theta: Theta, steps: int, lr: float, anneal: bool = False
) -> tuple[Theta, Theta]:
    """Adam on loss(θ), (seeds,), from θ; returns the new θ and the running mean square of its gradients.

    Adam treats each number by itself, so seeds do not affect each other. anneal: lr falls linearly to 0.
    """
    theta = {name: p.clone().requires_grad_() for name, p in theta.items()}
    adam = torch.optim.Adam(theta.values(), lr=lr, fused=True)
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 - step / steps) if anneal else lr
        adam.zero_grad()
        loss(theta).sum().backward()
        adam.step()
    squares = {name: adam.state[p]["exp_avg_sq"] / (1 - 0.999**steps) for name, p in theta.items()}
    return {name: p.detach() for name, p in theta.items()}, squares


# ---- the diffusion model


def noise_predictor(seeds: int, generator: torch.Generator) -> Theta:
    """Initial weights of an MLP with LAYERS hidden layers, uniform in ±1/√fan_in."""
    sizes = [3, *[WIDTH] * LAYERS, 2]
    theta = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        for name, rows in ((f"{i}.weight", fan_in), (f"{i}.bias", 1)):
            theta[name] = (2 * torch.rand(seeds, rows, fan_out, generator=generator) - 1) / fan_in**0.5
    return theta


def predict(theta: Theta, x: Tensor, t: Tensor) -> Tensor:
    """The noise in x at times t: (seeds, n, 2), (seeds, n, 1) in [0, 1) → (seeds, n, 2)."""
    h = torch.cat([x, t], dim=2)
    for i in range(LAYERS + 1):
        h = torch.baddbmm(theta[f"{i}.bias"], h.relu() if i else h, theta[f"{i}.weight"])
    return h


def alpha_bar(t: Tensor) -> Tensor:
    """The cosine schedule (Nichol & Dhariwal 2021): how much of the variance is data at t = 0, 1, …, TIMES - 1."""

    def level(time):
        return torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return level((t + 1) / TIMES) / level(torch.zeros(()))


def denoising_loss(theta: Theta, data: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted noise at one random time for each sample, (seeds,)."""
    t = torch.randint(TIMES, (*data.shape[:2], 1), generator=generator)
    noise = torch.randn(data.shape, generator=generator)
    share = alpha_bar(t)
    return (predict(theta, share.sqrt() * data + (1 - share).sqrt() * noise, t / TIMES) - noise).square().mean((1, 2))


@torch.no_grad()
def ddim(theta: Theta, noise: Tensor, zeta: float) -> Tensor:
    """Deterministic sampling in STEPS steps with the score scaled by ζ: (seeds or 1, n, 2) → (seeds, n, 2)."""
    seeds = len(theta["0.weight"])
    x = noise.expand(seeds, -1, -1)
    times = torch.arange(0, TIMES, TIMES // STEPS).flip(0)
    shares = torch.cat([alpha_bar(times), torch.ones(1)])
    for t, (share, after) in zip(times, pairwise(shares)):
        eps = zeta * predict(theta, x, (t / TIMES).expand(*x.shape[:2], 1))
        clean = (x - (1 - share).sqrt() * eps) / share.sqrt()
        x = after.sqrt() * clean + (1 - after).sqrt() * eps
    return x


def even_noise(n: int) -> Tensor:
    """n standard normals in the plane, spread evenly (Sobol), with mean 0 and covariance 1 exactly: (1, n, 2)."""
    z = torch.from_numpy(ndtri(Sobol(2, seed=0).random(n)))
    z = z - z.mean(0)
    return (z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / n)).T).float()[None]


def ddim_moments(theta: Theta, zeta: float, n: int = 2048) -> tuple[Tensor, Tensor]:
    """Mean (seeds, 2) and covariance (seeds, 2, 2) of what the sampler makes, whose only randomness is its start."""
    x = ddim(theta, even_noise(n), zeta).double()
    centred = x - x.mean(1, keepdim=True)
    return x.mean(1), centred.mT @ centred / n


def gradient(theta: Theta, data: Tensor, generator: torch.Generator) -> Theta:
    theta = {name: p.clone().requires_grad_() for name, p in theta.items()}
    denoising_loss(theta, data, generator).sum().backward()
    return {name: p.grad for name, p in theta.items()}


def cosine(a: Theta, b: Theta, squares: Theta) -> Tensor:
    """Cosine of two gradients in the metric of Adam's preconditioner 1 / √(mean square), (seeds,)."""

    def inner(a, b):
        return sum((a[name] * b[name] / (squares[name].sqrt() + 1e-8)).double().flatten(1).sum(1) for name in a)

    return inner(a, b) / (inner(a, a) * inner(b, b)).sqrt()


# ---- the autoregressive Gaussian


def ar_fit(data: Tensor) -> Theta:
    """Maximum likelihood: x₁ ~ N(m, s²), x₂ | x₁ ~ N(a x₁ + b, r²); (seeds, n, 2) → tensors (seeds,)."""
    mean = data.double().mean(1)
    centred = data.double() - mean[:, None]
    cov = centred.mT @ centred / data.shape[1]
    a = cov[:, 0, 1] / cov[:, 0, 0]
    b, rest = mean[:, 1] - a * mean[:, 0], cov[:, 1, 1] - a * cov[:, 0, 1]
    return {"m": mean[:, 0], "log_s": cov[:, 0, 0].log() / 2, "a": a, "b": b, "log_r": rest.log() / 2}


def ar_loss(theta: Theta, data: Tensor) -> Tensor:
    """Mean negative log-likelihood up to a constant, (seeds,)."""
    m, log_s, a, b, log_r = (theta[name][:, None] for name in ("m", "log_s", "a", "b", "log_r"))
    first, second = data.double().unbind(2)
    z1, z2 = (first - m) / log_s.exp(), (second - a * first - b) / log_r.exp()
    return ((z1.square() + z2.square()) / 2 + log_s + log_r).mean(1)


def ar_moments(theta: Theta, tau: float) -> tuple[Tensor, Tensor]:
    """Mean (…, 2) and covariance (…, 2, 2) of samples at temperature τ, which multiplies both variances."""
    m, a, b = theta["m"], theta["a"], theta["b"]
    first, rest = tau * (2 * theta["log_s"]).exp(), tau * (2 * theta["log_r"]).exp()
    cov = torch.stack([first, a * first, a * first, a**2 * first + rest], -1).unflatten(-1, (2, 2))
    return torch.stack([m, a * m + b], -1), cov


def ar_sample(theta: Theta, n: int, tau: float, generator: torch.Generator) -> Tensor:
    mean, cov = ar_moments(theta, tau)
    z = torch.randn(len(mean), n, 2, generator=generator, dtype=torch.float64)
    return mean[:, None] + z @ torch.linalg.cholesky(cov).mT
