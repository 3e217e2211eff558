"""The solvers on velocities whose flow is known, and against other implementations."""

import numpy as np
import pytest
import torch
from fill import inputs
from flow_cases import SMALL, filled, gaussian_velocity, golden
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch.testing import assert_close

from flow.sampler import flow_sampler
from neon import NeonError

NOISE = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spiral(x, t, labels=None):
    """Curved in space and time; faster the farther out."""
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return torch.sin(3 * x.flip(1)) * (1 + x.square()) * torch.cos(6 * t)


@given(st.floats(-2, 2), st.floats(0.3, 3), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_dopri5_carries_a_gaussian_onto_a_gaussian(mean, std, tol):
    """The flow is x ↦ mean + std·x; errors of the steps add up to no more than a few tolerances."""
    found = flow_sampler(gaussian_velocity(mean, std), NOISE, tol=tol)
    assert (found - (mean + std * NOISE)).abs().max() < 30 * tol * (1 + NOISE.abs().max() * max(std, 1))


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_orders_of_the_fixed_steps(solver, order):
    velocity, exact = gaussian_velocity(0.7, 0.4), 0.7 + 0.4 * NOISE
    errors = [(flow_sampler(velocity, NOISE, None, n, solver) - exact).abs().max() for n in (40, 80, 160)]
    ratios = [errors[0] / errors[1], errors[1] / errors[2]]
    assert ratios == pytest.approx([2**order] * 2, rel=0.1)


def test_one_step():
    assert_close(flow_sampler(spiral, NOISE, None, 1, "euler"), NOISE + spiral(NOISE, torch.tensor(0.0)))
    euler = NOISE + spiral(NOISE, torch.tensor(0.0))
    heun = NOISE + (spiral(NOISE, torch.tensor(0.0)) + spiral(euler, torch.tensor(1.0))) / 2
    assert_close(flow_sampler(spiral, NOISE, None, 1, "heun"), heun)


@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-9])
def test_dopri5_of_one_image_takes_the_steps_that_scipy_takes(tol):
    for image in NOISE:
        times = []

        def velocity(x, t, labels):
            times.append(float(t))  # noqa: B023
            return spiral(x, t)

        found = flow_sampler(velocity, image[None], tol=tol)
        wanted_times = []

        def field(t, x):
            wanted_times.append(t)  # noqa: B023
            return spiral(torch.from_numpy(x).view(1, 2, 3), torch.tensor(t)).numpy().ravel()

        wanted = solve_ivp(field, (0, 1), image.numpy().ravel(), "RK45", rtol=tol, atol=tol)
        assert len(wanted_times) > 8
        assert_close(torch.tensor(times), torch.tensor(wanted_times, dtype=torch.float32), rtol=1e-5, atol=1e-6)
        assert_close(found.ravel(), torch.from_numpy(wanted.y[:, -1]), rtol=1e-7, atol=1e-9)


@given(st.permutations(range(5)), st.integers(1, 5), st.sampled_from(["dopri5", "heun", "euler"]))
def test_an_image_does_not_depend_on_its_batch(order, n, solver):
    options = {"num_steps": 7, "solver": solver, "tol": 1e-4}
    whole = flow_sampler(spiral, NOISE, **options)
    part = flow_sampler(spiral, NOISE[order[:n]], **options)
    assert_close(part, whole[order[:n]], rtol=1e-12, atol=1e-12)


def test_labels_stay_with_their_images():
    """Velocity = label, but at a rate that makes images need different numbers of steps."""
    labels = torch.tensor([0, 1, 2, 3, 4])

    def velocity(x, t, y):
        return (y * (1 + (20 * y * t).cos())).view(-1, 1, 1).expand_as(x).double()

    exact = NOISE + torch.tensor([0, *(y + np.sin(20 * y) / 20 for y in range(1, 5))]).view(-1, 1, 1)
    assert_close(flow_sampler(velocity, NOISE, labels, tol=1e-8), exact, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_original_evaluation():
    """torchdiffeq on the original's network, one image at a time; it interpolates the end, which we step onto."""
    net = filled(**SMALL, channel_mult=[1, 2])
    x = inputs("plain", "x", (3, 3, 8, 8))[:2].double()
    found = flow_sampler(lambda x, t, _: net(x.float(), t).double(), x)
    assert_close(found, golden()["dopri5"].double(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "rk4"}, "unknown solver 'rk4'"),
        ({"solver": "euler", "num_steps": 0}, "num_steps must be at least 1"),
        ({"tol": 0.0}, "tol must lie between 0 and 1"),
        ({"tol": float("nan")}, "tol must lie between 0 and 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(NeonError, match=message):
        flow_sampler(spiral, NOISE, **options)


@pytest.mark.parametrize("velocity", [lambda x, t, _: x * torch.nan, lambda x, t, _: 10 + x.abs() ** 3])
def test_a_velocity_without_end_is_an_error(velocity):
    """NaN, or a flow that reaches infinity before t = 1."""
    with pytest.raises(NeonError, match="is w too large"):
        flow_sampler(velocity, NOISE)
