"""The U-Net against the original's recorded outputs and state dict."""

import pytest
import torch
from fill import fill_parameters, inputs
from flow_cases import MANIFEST, SMALL, filled, golden
from torch.testing import assert_close

from flow import family
from flow.configs import NETWORKS
from flow.network import UNet

LEVELS = {"plain": {"channel_mult": [1, 2]}, "cond": {"channel_mult": [1, 1], "num_classes": 10}}


def test_the_state_dict_is_that_of_the_public_checkpoints():
    with torch.device("meta"):
        net = UNet(**NETWORKS["cifar10"])
    assert [[name, list(t.shape)] for name, t in net.state_dict().items()] == MANIFEST["entries"]
    assert sum(p.numel() for p in net.parameters()) == MANIFEST["parameters"] == 35_746_307
    assert not list(net.buffers())


@pytest.mark.parametrize("case", LEVELS)
@torch.no_grad()
def test_outputs_of_small_networks(case):
    net, x = filled(**SMALL, **LEVELS[case], dropout=0.1), inputs(case, "x", (3, 3, 8, 8))
    labels = torch.tensor([0, 7, 9]) if case == "cond" else None
    assert_close(net(x, torch.tensor([0.0, 0.37, 1.0]), labels), golden()[case], rtol=1e-4, atol=1e-5)
    assert_close(net(x, torch.tensor(0.6), labels), golden()[f"{case}_scalar_t"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_outputs_at_real_size():
    net = fill_parameters(family.create("cifar10", device="cpu")).eval()
    out = net(inputs("cifar10", "x", (1, 3, 32, 32)), torch.tensor([0.25]))
    assert_close(out, golden()["cifar10"], rtol=1e-4, atol=2e-5)


def test_a_new_network_is_at_rest_and_learns():
    torch.manual_seed(0)
    net = family.create("digits", device="cpu")
    x, t, labels = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2])
    out = net(x, t, labels)
    assert out.shape == x.shape and not out.any()
    out.sub(1).square().mean().backward()
    assert net.out[2].weight.grad.any() and net.out[2].bias.grad.any()
