import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from edm_cases import digits_net, golden, tiny_net
from fill import fill_parameters
from torch import nn
from torch.testing import assert_close

from edm.sampler import edm_sampler, sample, sigma_schedule, start
from neon import NeonError
from neon.sampling import Streams, from_uint8, to_uint8

CHURN = {"s_churn": 40, "s_min": 0.05, "s_max": 50, "s_noise": 1.003}


@pytest.mark.parametrize(
    "name, net, options",
    [
        ("heun_cond", "cond", {"num_steps": 18}),
        ("heun_ffhq", "ffhq", {"num_steps": 6}),
        ("churn", "cond", {"num_steps": 18, **CHURN}),
    ],
)
def test_sampler(name, net, options):
    net, g = tiny_net(net), golden(f"sampler_{name}")
    latents, class_idx, streams = start(net, g["seeds"])
    assert torch.equal(latents, g["latents"])
    labels = None
    if net.label_dim:
        assert torch.equal(class_idx, g["label_index"])
        labels = F.one_hot(class_idx, net.label_dim)
    else:
        assert class_idx is None
    x = edm_sampler(net, latents, labels, streams, **options)
    assert x.dtype == torch.float64
    assert_close(x, g["x"], rtol=0, atol=1e-4)

    images = sample(net, g["seeds"], **options)
    assert images.dtype == torch.uint8
    difference = (images.int() - g["uint8"].int()).abs()
    assert difference.max() <= 1 and difference.sum() <= 5
    if net.label_dim and "s_churn" not in options:
        assert torch.equal(sample(net, g["seeds"], g["label_index"], **options), images)


class Gaussian(nn.Module):
    """The ideal denoiser of data ~ N(mean, std²), for which the flow from noise to data is known."""

    label_dim, sigma_min, sigma_max = 0, 0.0, math.inf

    def __init__(self, mean=0.3, std=0.5):
        super().__init__()
        self.mean, self.std, self.sigmas = mean, std, []

    def forward(self, x, sigma, class_labels=None):
        self.sigmas.append(sigma.item())
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)

    def flow(self, x, sigma):
        return self.mean + (x - self.mean) * self.std / math.hypot(self.std, sigma)


@pytest.mark.parametrize("solver, order, calls", [("euler", 1, lambda n: n), ("heun", 2, lambda n: 2 * n - 1)])
def test_order_of_convergence(solver, order, calls):
    latents = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    errors = []
    for n in (40, 80, 160):
        net = Gaussian()
        x = edm_sampler(net, latents, num_steps=n, sigma_min=1e-4, sigma_max=10, solver=solver)
        errors.append((x - net.flow(10 * latents.double(), 10)).abs().max().item())
        assert len(net.sigmas) == calls(n)
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([order] * 2, abs=0.2), errors


def test_churn_keeps_the_distribution():
    net = Gaussian()
    streams = Streams(range(4))
    latents = streams.randn((1, 40, 40))
    x = edm_sampler(net, latents, streams=streams, num_steps=100, s_churn=20)
    assert x.mean().item() == pytest.approx(net.mean, abs=0.03)
    assert x.std().item() == pytest.approx(net.std, rel=0.04)
    assert not torch.allclose(x, edm_sampler(net, latents, num_steps=100), atol=0.1)


@pytest.mark.parametrize("n", [2, 5, 18, 40, 256])
def test_sigma_schedule(n):
    g, net = golden("sigma_schedule"), Gaussian()
    assert_close(sigma_schedule(n), g[f"t_{n}"], rtol=1e-12, atol=0)
    edm_sampler(net, torch.zeros(1, 1, 2, 2), num_steps=n)
    assert_close(torch.tensor(net.sigmas, dtype=torch.float64), g[f"net_calls_{n}"], rtol=1e-12, atol=0)


def test_one_step_goes_all_the_way():
    assert sigma_schedule(1).tolist() == pytest.approx([80, 0])
    net, latents = Gaussian(), torch.ones(1, 1, 2, 2)
    assert_close(edm_sampler(net, latents, num_steps=1), net(80 * latents.double(), torch.tensor(80.0)))


def test_the_networks_range_bounds_the_schedule():
    net = Gaussian()
    net.sigma_min, net.sigma_max = 0.1, 5.0
    edm_sampler(net, torch.zeros(1, 1, 2, 2), num_steps=4)
    assert (max(net.sigmas), min(net.sigmas)) == pytest.approx((5, 0.1))


@pytest.mark.parametrize("options", [{}, {"s_churn": 10}, {"solver": "euler"}])
def test_an_image_depends_on_its_seed_alone(options):
    net = fill_parameters(digits_net()).eval()
    seeds = torch.tensor([7, 2**32 + 3, 50_000, 1, 12])
    together = sample(net, seeds, num_steps=4, **options).int()
    apart = torch.cat([sample(net, part, num_steps=4, **options) for part in seeds.split([1, 3, 1])]).int()
    assert (together - apart).abs().max() <= 1
    assert (together - apart).ne(0).float().mean() < 0.02
    assert (together[0] - together[1]).abs().max() > 1


@torch.no_grad()
@pytest.mark.parametrize("group", ["a", "b"])
@pytest.mark.parametrize("resolution", [32, 64])
def test_streams(group, resolution):
    g, seeds = golden("stacked_rng"), golden("stacked_rng")[f"{group}_seeds"]
    net = Gaussian()
    net.label_dim, net.img_channels, net.img_resolution = 10, 3, resolution
    latents, class_idx, streams = start(net, seeds)
    flat = latents.flatten(1)
    assert torch.equal(flat[:, :16], g[f"{group}_latents{resolution}_first16"])
    assert torch.equal(flat[:, -4:], g[f"{group}_latents{resolution}_last4"])
    assert torch.equal(class_idx, g[f"{group}_labels_after_latents{resolution}"])
    noise = streams.randn((3, resolution, resolution), torch.float64).flatten(1)
    assert torch.equal(noise[:, :8], g[f"{group}_randnlike64_after_{resolution}_first8"])
    _, given, streams = start(net, seeds, (class_idx + 1) % 10)  # drawn all the same
    noise = streams.randn((3, resolution, resolution), torch.float64).flatten(1)
    assert torch.equal(noise[:, :8], g[f"{group}_randnlike64_after_{resolution}_first8"])
    assert torch.equal(given, (class_idx + 1) % 10)


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_churn_after_labels_as_the_original_draws_it(given):
    """Latents, then a class whether one is given or not, then the noise of each step, each from the image's stream."""
    seeds, steps, churn = [3, 8], 4, 2.0
    net = tiny_net("cond")
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def stacked(draw):
        return torch.stack([draw(generator) for generator in generators])

    latents = stacked(lambda g: torch.randn(shape, generator=g))
    labels = stacked(lambda g: torch.randint(net.label_dim, (), generator=g))
    if given:
        labels = torch.tensor([0, net.label_dim - 1])
    one_hot = F.one_hot(labels, net.label_dim).double()
    sigmas = sigma_schedule(steps, max(0.002, net.sigma_min), min(80, net.sigma_max)).tolist()
    x = latents.double() * sigmas[0]
    for sigma, after in pairwise(sigmas):
        raised = sigma * (1 + min(churn / steps, math.sqrt(2) - 1))
        noise = stacked(lambda g: torch.randn(shape, generator=g, dtype=torch.float64))
        x = x + math.sqrt(raised**2 - sigma**2) * noise
        x = x + (after - raised) * (x - net(x, torch.tensor(raised).double(), one_hot).double()) / raised
    options = {"num_steps": steps, "s_churn": churn, "solver": "euler"}
    images = sample(net, torch.tensor(seeds), labels if given else None, **options)
    assert torch.equal(images, to_uint8(x, nearest=True))


def test_uint8_rule():
    g = golden("uint8_rule")
    assert torch.equal(to_uint8(g["x"], nearest=True), g["uint8"])
    assert torch.equal(from_uint8(g["train_uint8"]), g["train_float"])
    levels = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels), nearest=True), levels)


@pytest.mark.parametrize(
    "net, arguments",
    [
        ({"label_dim": 0}, {"class_idx": torch.tensor([1])}),
        ({}, {"class_idx": torch.tensor([1, 2])}),
        ({}, {"class_idx": torch.tensor([10])}),
        ({}, {"class_idx": torch.tensor([-1])}),
        ({}, {"solver": "dpm"}),
        ({}, {"num_steps": 0}),
    ],
)
def test_refusals(net, arguments):
    with pytest.raises(NeonError):
        sample(digits_net(**net), [0], **arguments)


def test_churn_needs_streams():
    with pytest.raises(NeonError, match="streams"):
        edm_sampler(Gaussian(), torch.zeros(1, 1, 2, 2), s_churn=1)


@pytest.mark.parametrize(
    ("low", "high", "rho"), [(0, 80, 7), (-1, 80, 7), (0.002, 0, 7), (0.002, 80, 0), (float("nan"), 80, 7)]
)
def test_impossible_noise_levels(low, high, rho):
    with pytest.raises(NeonError, match="0 < sigma_min < sigma_max"):
        sigma_schedule(18, low, high, rho)
