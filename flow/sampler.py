"""ODE solvers from noise at t = 0 to images at t = 1. Every image is solved by itself, with its own step sizes."""

from collections.abc import Callable
from itertools import pairwise

import torch

from neon import Diverged, NeonError

# The pair of orders 5 and 4 of Dormand and Prince (1980): times of the stages after the first, what each adds of the
# slopes before it (the last stage is the solution of order 5), and by which sum of slopes the two orders differ.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SMALLEST_STEP = 1e-7

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def flow_sampler(
    velocity: Velocity,
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    num_steps: int = 100,
    solver: str = "dopri5",
    tol: float = 1e-5,
) -> torch.Tensor:
    """Solve dx/dt = velocity(x, t, labels) from t = 0 to 1; x: (N, …) float64 → its value at t = 1.

    solver: 'euler' or 'heun' take num_steps equal steps, of one and two evaluations each; t is then a scalar.
    'dopri5' chooses its steps by the tolerance; t is then (N,). It runs with the gradients that its
    caller allows. Raises NeonError.
    """
    if solver == "dopri5":
        return dopri5(velocity, x, labels, tol)
    if solver not in ("euler", "heun"):
        raise NeonError(f"unknown solver {solver!r}, choose dopri5, heun or euler")
    if num_steps < 1:
        raise NeonError(f"num_steps must be at least 1, not {num_steps}")
    times = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device=x.device)
    for t, t_next in pairwise(times):
        slope = velocity(x, t, labels)
        if solver == "heun":
            slope = (slope + velocity(x + (t_next - t) * slope, t_next, labels)) / 2
        x = x + (t_next - t) * slope
    return x


def dopri5(velocity: Velocity, x: torch.Tensor, labels: torch.Tensor | None, tol: float) -> torch.Tensor:
    """Dormand-Prince 5(4); tol: relative and absolute tolerance of the error of a step, root mean square of an image.

    The usual control of the step (Hairer, Nørsett & Wanner 1993, II.4), but for each image separately, so that an
    image does not depend on its batch. Images that have arrived leave the batch. Raises NeonError if the steps of one
    become too small, as they do where the velocity is not finite.
    """
    if not 0 < tol < 1:
        raise NeonError(f"tol must lie between 0 and 1, not {tol}")
    result, index = torch.empty_like(x), torch.arange(len(x), device=x.device)
    t = x.new_zeros(len(x))
    slope = velocity(x, t, labels)
    step = first_step(velocity, x, slope, labels, tol)
    rejected = torch.zeros_like(t, dtype=torch.bool)
    while len(x):
        if not (step > SMALLEST_STEP).all():
            raise Diverged("dopri5: the velocity is not finite or changes too fast; is w too large?")
        last = step >= 1 - t
        step = torch.where(last, 1 - t, step)
        slopes = [slope]
        for node, stage in zip(NODES, STAGES):
            y = x + weighted(step, stage, slopes)
            slopes.append(velocity(y, t + node * step, labels))
        error = weighted(step, ERROR, slopes)
        ratio = rms(error / (tol + tol * torch.maximum(x.abs(), y.abs())))
        accepted = ratio < 1
        growth = (0.9 * ratio**-0.2).clamp(0.2, 10)
        x, slope = (torch.where(per_image(accepted, x), new, old) for new, old in ((y, x), (slopes[-1], slope)))
        t = torch.where(accepted, t + step, t)
        step = step * torch.where(accepted & ~rejected, growth, growth.clamp(max=1))  # no growth after a rejection
        rejected = ~accepted

        arrived = accepted & last
        result[index[arrived]] = x[arrived]
        index, x, t, slope, step, rejected = (value[~arrived] for value in (index, x, t, slope, step, rejected))
        labels = None if labels is None else labels[~arrived]
    return result


def first_step(velocity: Velocity, x: torch.Tensor, slope: torch.Tensor, labels, tol: float) -> torch.Tensor:
    """A first step for each image, (N,), from the size of the slope and of its change over a small Euler step."""
    scale = tol + tol * x.abs()
    size, speed = rms(x / scale), rms(slope / scale)
    probe = (0.01 * size / speed).clamp(1e-6, 1)
    change = rms((velocity(x + per_image(probe, x) * slope, probe, labels) - slope) / scale) / probe
    return torch.minimum(100 * probe, (0.01 / torch.maximum(speed, change)) ** 0.2).clamp(max=1)


def weighted(step: torch.Tensor, weights: tuple[float, ...], slopes: list[torch.Tensor]) -> torch.Tensor:
    """step · Σ weight · slope."""
    total = sum(weight * slope for weight, slope in zip(weights, slopes) if weight)
    return per_image(step, total) * total


def per_image(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N,) → (N, 1, …), to go with `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of each image, (N,)."""
    return x.flatten(1).square().mean(1).sqrt()
