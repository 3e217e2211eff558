"""The loss, against its definition and its minimiser."""

from itertools import permutations

import pytest
import torch
from flow_cases import gaussian_velocity
from torch.testing import assert_close

from flow.loss import flow_loss, nearest_pairs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(images, seed):
    again = generator(seed)
    return torch.randn(images.shape, generator=again), torch.rand(len(images), generator=again)


def test_the_target_is_the_straight_line_from_noise_to_image():
    images, seen = torch.randn(6, 1, 2, 2, generator=generator(1)), []

    def velocity(x, t, labels):
        seen.append((x, t, labels))
        return torch.zeros_like(x)

    labels = torch.arange(6)
    noise, times = draws(images, 2)
    loss = flow_loss(velocity, images, labels, noise, times)
    ((x, t, y),) = seen
    assert_close(loss, (images - noise) ** 2)
    assert t is times and y is labels
    assert_close(x, torch.lerp(noise, images, t[:, None, None, None]))


def test_the_exact_velocity_of_a_gaussian_is_stationary():
    """Derivatives of the mean loss along changes of the velocity vanish there, within four standard errors."""
    images = 0.3 + 0.5 * torch.randn(200_000, 1, 1, 1, generator=generator(3))
    field = gaussian_velocity(0.3, 0.5)
    for change in (lambda x, t: 1 + 0 * x, lambda x, t: x, lambda x, t: x * t, lambda x, t: torch.sin(4 * x)):
        up, down = (
            flow_loss(
                lambda x, t, _, c=change, e=e: field(x, t) + e * c(x, t[:, None, None, None]),
                images,
                None,
                *draws(images, 4),
            )
            for e in (0.5, -0.5)
        )
        slope = (up - down).flatten()
        assert abs(slope.mean()) < 4 * slope.std() / len(slope) ** 0.5
        assert (up + down).mean() / 2 > flow_loss(lambda x, t, _: field(x, t), images, None, *draws(images, 4)).mean()


@pytest.mark.parametrize("seed", range(3))
def test_the_optimal_coupling_is_the_cheapest_of_all(seed):
    images, noise = torch.randn(2, 5, 1, 2, 2, generator=generator(seed))

    def cost(order):
        return float(((images - noise[torch.as_tensor(order)]) ** 2).sum())

    found = nearest_pairs(images, noise)
    assert sorted(found.tolist()) == list(range(5))
    assert cost(found) == pytest.approx(min(map(cost, permutations(range(5)))))


def test_the_optimal_coupling_shortens_the_lines():
    images = torch.randn(64, 1, 2, 2, generator=generator(5))
    noise, t = draws(images, 6)
    coupled = noise[nearest_pairs(images, noise)]
    rest = [flow_loss(lambda x, t, _: 0 * x, images, None, n, t).mean() for n in (noise, coupled)]
    assert rest[1] < 0.5 * rest[0]
