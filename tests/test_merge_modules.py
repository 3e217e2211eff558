"""merge_modules on networks that hold more than learned weights: what it returns can be loaded and run."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neon import NeonError
from neon.merge import merge_modules

strengths = st.floats(-3, 3, allow_nan=False, allow_subnormal=False)
kinds = st.sampled_from([nn.BatchNorm2d, nn.SyncBatchNorm])


def network(kind=nn.BatchNorm2d, dtype=torch.float32):
    """Convolutions with batch normalisation in a nested module, and a table that is not stored."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Sequential(kind(3), nn.SiLU(), nn.Conv2d(3, 2, 1)), kind(2, affine=False)
    )
    net.register_buffer("table", torch.arange(3.0), persistent=False)
    return net.to(dtype)


def other(base, seed):
    """The same network after training: every parameter moved by about a tenth, every statistic by more."""
    g, net = torch.Generator().manual_seed(seed), copy.deepcopy(base)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=g).to(tensor.dtype))
        for tensor in net.buffers():
            tensor.add_(torch.rand(tensor.shape, generator=g).to(tensor.dtype) + 1)
    return net


def pair(kind, dtype, seed):
    torch.manual_seed(seed)
    base = network(kind, dtype)
    base = other(base, seed + 1)  # statistics that are not the initial ones
    return base, other(base, seed + 2)


def names(net):
    """Its parameters and its stored buffers."""
    learned = set(dict(net.named_parameters(remove_duplicate=False)))
    return learned, net.state_dict().keys() - learned


def same_bits(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))


def bits(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


@given(kinds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(0, 99), strengths)
@settings(max_examples=50, deadline=None)
def test_parameters_are_merged_and_buffers_are_the_base_s(kind, dtype, seed, w):
    base, new = pair(kind, dtype, seed)
    merged, old, learned = merge_modules(base, new, w), base.state_dict(), new.state_dict()
    parameters, buffers = names(base)
    assert type(merged) is dict and list(merged) == list(old) and len(parameters) == 6 and len(buffers) == 6
    assert not any(tensor.requires_grad for tensor in merged.values())
    assert all(same_bits(merged[name], old[name]) for name in buffers)
    for name in parameters:
        exact = (1 + w) * old[name].double() - w * learned[name].double()
        close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(merged[name].double(), exact, **close)
    base.load_state_dict(merged)


@given(kinds, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_w0_is_the_base_and_minus_one_the_selftrained_model(kind, seed):
    base, new = pair(kind, torch.float32, seed)
    old, trained, (parameters, buffers) = base.state_dict(), new.state_dict(), names(base)
    assert all(same_bits(tensor, old[name]) for name, tensor in merge_modules(base, new, 0.0).items())
    merged = merge_modules(base, new, -1.0)
    for name in parameters:
        torch.testing.assert_close(merged[name], trained[name], rtol=1e-6, atol=1e-6)
    assert all(same_bits(merged[name], old[name]) for name in buffers)


def test_a_variance_that_grew_gives_no_nan():
    """The variance 1 → 2.5 would be −0.5 at w = 1."""
    base = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    new = copy.deepcopy(base)
    new[1].running_var.fill_(2.5)
    with torch.no_grad():
        new[0].weight.mul_(1.01)
    model = copy.deepcopy(base)
    model.load_state_dict(merge_modules(base, new, w=1.0))
    assert model[1].running_var.tolist() == [1.0, 1.0] and model(torch.ones(3, 2)).isfinite().all()
    assert not torch.equal(model[0].weight, base[0].weight)


def test_neither_module_changes():
    base, new = pair(nn.BatchNorm2d, torch.float32, 0)
    before = [copy.deepcopy(net.state_dict()) for net in (base, new)]
    merge_modules(base, new, 1.5)
    for net, state in zip((base, new), before):
        assert all(same_bits(tensor, state[name]) for name, tensor in net.state_dict().items())


class Tied(nn.Module):
    """One weight under two names, one normalisation under two names, one buffer under two names."""

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.norm = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(4)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList([self.norm, nn.Linear(4, 4)])
        self.register_buffer("scale", torch.ones(1))
        self.blocks[1].register_buffer("scale", self.scale)


@given(st.integers(0, 99), strengths)
@settings(max_examples=20, deadline=None)
def test_one_tensor_under_two_names(seed, w):
    torch.manual_seed(seed)
    base = Tied()
    new = other(base, seed)
    merged, old, trained = merge_modules(base, new, w), base.state_dict(), new.state_dict()
    assert list(merged) == list(old)
    learned, buffers = names(base)
    assert {"embed.weight", "head.weight", "norm.weight", "blocks.0.weight"} <= learned
    assert {"scale", "blocks.1.scale", "norm.running_var", "blocks.0.running_var"} <= buffers
    assert all(same_bits(merged[name], old[name]) for name in buffers)
    model = Tied()
    model.load_state_dict(merged)
    assert model.head.weight is model.embed.weight and model.blocks[0] is model.norm
    for name, tensor in model.named_parameters():
        exact = (1 + w) * old[name].double() - w * trained[name].double()
        torch.testing.assert_close(tensor.detach().double(), exact, rtol=1e-6, atol=1e-6)


def test_power_iteration_vectors_are_buffers():
    torch.manual_seed(0)
    base = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    new = other(base, 1)
    merged = merge_modules(base, new, 2.0)
    vectors = [name for name in merged if name.endswith(("_u", "_v"))]
    assert len(vectors) == 2 and all(same_bits(merged[name], base.state_dict()[name]) for name in vectors)
    weight = "parametrizations.weight.original"
    assert not torch.equal(merged[weight], base.state_dict()[weight])


def test_complex_parameters_are_merged():
    """As Fourier layers have them; what is not finite in one part is found."""
    base, new = nn.Module(), nn.Module()
    base.register_parameter("a", nn.Parameter(torch.tensor([1 + 2j, 3.0])))
    new.register_parameter("a", nn.Parameter(torch.tensor([2 + 2j, 3 + 1j])))
    assert merge_modules(base, new, 1.0)["a"].tolist() == [2j, 3 - 1j]
    new.register_parameter("a", nn.Parameter(torch.tensor([2 + 2j, complex(3, float("nan"))])))
    with pytest.raises(NeonError, match="a: not finite in the self-trained model"):
        merge_modules(base, new, 1.0)


def test_networks_that_do_not_fit():
    with pytest.raises(NeonError, match=r"1\.weight and 4 more: missing in the self-trained model"):
        merge_modules(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(2, 2)), 1.0)
    with pytest.raises(NeonError, match="w must be finite"):
        merge_modules(network(), network(), float("nan"))
