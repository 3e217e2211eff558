"""neon.extrapolated: a model that is θ_neon inside a `with` block and θ_r after it, bit for bit."""

import copy
import warnings

import folders
import pytest
import torch
from folders import moved, with_adapter
from safetensors.torch import save_file
from torch import nn

import neon
from neon import NeonError
from neon.extrapolate import strengths
from neon.merge import merge_modules
from neon.weights.adapters import read_adapter


class Tied(nn.Module):
    """An embedding, which is also the output's weight, and batch normalisation."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.to(dtype)


def bits(model):
    return {
        name: tensor.detach().clone().view(torch.uint8) for name, tensor in model.state_dict().items() if tensor.ndim
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    base = Tied(dtype)
    new = moved(base)
    new.norm.running_mean += 1
    return base, new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["module", "state dict", "file"])
def test_it_is_the_merge_in_place_and_then_the_base(tmp_path, dtype, kind):
    base, new = pair(dtype)
    before, places = bits(base), {name: p.data_ptr() for name, p in base.named_parameters()}
    wanted = merge_modules(base, new, 1.5)
    state = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    save_file({name: t for name, t in state.items() if name != "head.weight"}, tmp_path / "new.safetensors")
    drift = {"module": new, "state dict": state, "file": tmp_path / "new.safetensors"}[kind]
    with warnings.catch_warnings(action="error"):
        block = neon.extrapolated(base, drift, 1.5)
        inside = block.__enter__()
    assert inside is base and base.head.weight is base.table.weight
    assert {name: p.data_ptr() for name, p in base.named_parameters()} == places
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert not torch.equal(base.table.weight, new.table.weight)
    block.__exit__(None, None, None)
    assert same(bits(base), before)


def test_it_is_the_base_again_after_an_exception():
    base, new = pair()
    before = bits(base)
    with pytest.raises(ZeroDivisionError), neon.extrapolated(base, new, 2):
        assert not same(bits(base), before)
        1 / 0  # noqa: B018
    assert same(bits(base), before)


@pytest.mark.parametrize("where", ["norm.weight", "norm.bias"])
def test_a_merge_that_fails_half_way_leaves_the_base(where):
    """The first tensors have moved already when a later one is found to be not finite."""
    base, new = pair()
    before = bits(base)
    with torch.no_grad():
        new.get_parameter(where)[0] = float("inf")
    with (
        pytest.raises(NeonError, match=f"{where}: not finite in the self-trained model"),
        neon.extrapolated(base, new, 1),
    ):
        pytest.fail("inside")
    assert same(bits(base), before)


def test_w0_changes_no_bit_and_blocks_nest():
    base, new = pair()
    with torch.no_grad():
        base.norm.bias[0] = -0.0
    before = bits(base)
    with neon.extrapolated(base, new, 0):
        assert same(bits(base), before)
        with neon.extrapolated(base, new, 1):
            inner = bits(base)
            with neon.extrapolated(base, pair()[0], -1):
                assert not same(bits(base), inner)
            assert same(bits(base), inner)
        assert same(bits(base), before)


def test_gradients_and_optimizers_keep_their_parameters():
    """The block changes values only: a parameter stays the one that an optimizer holds."""
    base, new = pair()
    optimizer = torch.optim.SGD(base.parameters(), 0.1)
    with neon.extrapolated(base, new, 1):
        base.table(torch.tensor([1])).sum().backward()
    assert optimizer.param_groups[0]["params"][0] is base.table.weight and base.table.weight.grad is not None
    assert base.table.weight.requires_grad


def test_groups():
    """Regex → w: the first that is found counts, and '' is the rest; without it the rest is the base."""
    base, new = pair()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    for w, wanted in (({"table": 2.0, "": -1.0}, (2, -1, -1)), ({"norm.b": 1.0}, (0, 0, 1))):
        with neon.extrapolated(base, new, w):
            for name, strength in zip(("table.weight", "norm.weight", "norm.bias"), wanted):
                r, s = before[name], new.get_parameter(name)
                torch.testing.assert_close(base.get_parameter(name), (1 + strength) * r - strength * s)
    assert strengths(["a", "b"], {"a": 1.0}) == {"a": 1.0, "b": 0.0}
    for wrong in ({"none": 1.0}, {"(": 1.0}):
        with pytest.raises(NeonError, match="of the weights is"), neon.extrapolated(base, new, wrong):
            pytest.fail("inside")


def test_a_prefix_is_matched_and_said():
    base, new = pair()
    wanted = merge_modules(base, new, 1)
    state = {f"module.{name}": tensor for name, tensor in new.state_dict().items()}
    with (
        pytest.warns(UserWarning, match="those of θ_s begin with module."),
        neon.extrapolated(base, state, 1),
    ):
        torch.testing.assert_close(base.norm.weight, wanted["norm.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, "norm.bias: missing in the self-trained model"),
        (lambda s: s | {"more": torch.ones(1)}, "more: missing in the base"),
        (lambda s: s | {"norm.bias": torch.ones(3)}, r"norm.bias: shape \(4,\) in the base, \(3,\)"),
    ],
)
def test_a_theta_s_of_another_network(change, message):
    base, new = pair()
    with pytest.raises(NeonError, match=message), neon.extrapolated(base, change(dict(new.state_dict())), 1):
        pytest.fail("inside")


def test_a_drift_without_buffers():
    """An EMA is often kept as its parameters alone."""
    base, new = pair()
    with neon.extrapolated(base, dict(new.named_parameters()) | {"head.weight": new.head.weight}, 1):
        torch.testing.assert_close(base.norm.weight, 2 * torch.ones(4) - new.norm.weight)


@pytest.mark.parametrize("read", [str, read_adapter])
def test_an_adapter_is_the_drift(tmp_path, read):
    """w can be tried without a merge: the model is what PEFT merges at scale −w."""
    base = folders.unet_with_text()
    trained = with_adapter(base, ["to_q", "conv1"])
    trained.save_pretrained(tmp_path / "lora")
    tuned = copy.deepcopy(trained).merge_and_unload().state_dict()
    before, old = bits(base), {name: p.detach().clone() for name, p in base.named_parameters()}
    for w in (0.5, 2):
        with neon.extrapolated(base, read(tmp_path / "lora"), w):
            moving = 0
            for name, p in base.named_parameters():
                torch.testing.assert_close(p, (1 + w) * old[name] - w * tuned[name], rtol=1e-5, atol=1e-6)
                moving += not torch.equal(p, old[name])
            assert moving > 4
        assert same(bits(base), before)


def test_an_adapter_of_a_tied_weight_is_refused(tmp_path):
    """Its step would change the embedding, too."""
    model = folders.gpt2()
    with_adapter(model, ["lm_head"]).save_pretrained(tmp_path / "lora")
    with pytest.raises(NeonError, match=r"lm_head\.weight: a second name of a weight"):
        neon.extrapolated(model, tmp_path / "lora", 1).__enter__()
