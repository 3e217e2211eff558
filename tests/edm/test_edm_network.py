import json
import math

import pytest
import torch
import torch.nn.functional as F
from edm_cases import GOLDEN, digits_net, golden, tiny_net
from fill import fill_parameters, inputs
from torch.testing import assert_close

from edm.network import Conv2d, EDMPrecond, UNetBlock, positional_embedding
from neon import NeonError

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("name", ["cifar10_cond", "cifar10_uncond", "ffhq64"])
def test_public_checkpoints_fit(name):
    manifest = json.loads((GOLDEN / f"manifest_{name}.json").read_text())
    with torch.device("meta"):
        net = EDMPrecond(**manifest["constructor_kwargs"])
    params = dict(net.named_parameters())
    entries = [
        {
            "name": key,
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "kind": "param" if key in params else "buffer",
        }
        for key, value in net.state_dict().items()
    ]
    assert entries == manifest["entries"]
    assert sum(p.numel() for p in params.values()) == manifest["param_count"]


def test_resample_filter_holds_what_resampling_does():
    assert_close(digits_net().model.enc["4x4_down"].skip.resample_filter, torch.full((1, 1, 2, 2), 0.25))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["cond", "uncond", "ffhq"])
def test_precond(name, layout):
    net, g = tiny_net(name).to(memory_format=layout), golden(f"precond_{name}")
    x, sigma, labels = g["x"], g["sigma"], g.get("class_labels")
    statistics = {}

    def record(block, _, out):
        statistics[names[block]] = (out.double().mean().item(), out.double().std().item())

    names = {block: f"{side}.{key}" for side in ("enc", "dec") for key, block in getattr(net.model, side).items()}
    handles = [block.register_forward_hook(record) for block in names]
    with torch.no_grad():
        out = net(x, sigma, labels, g["augment_labels"])
        # Block by block first, to say where the difference begins.
        for key, mean, std in zip(g["block_names"], g["block_mean"], g["block_std"], strict=True):
            assert statistics[key] == pytest.approx((mean.item(), std.item()), rel=1e-4, abs=1e-5), key
        for handle in handles:
            handle.remove()
        assert out.dtype == torch.float32
        assert_close(out, g["D_label_augment"], **CLOSE)
        assert_close(net(x, sigma, labels), g["D_noaug"], **CLOSE)
        assert_close(net(x.double(), sigma.double().view(-1, 1, 1, 1), labels), g["D_noaug"], **CLOSE)
        assert_close(net(x, torch.tensor(1.25), labels), g["D_scalar_sigma"], **CLOSE)
        assert_close(net(x, 1.25, labels), g["D_scalar_sigma"], **CLOSE)
        if name == "cond":
            assert_close(net(x, sigma), g["D_nolabel"], **CLOSE)


@torch.no_grad()
def test_unet():
    net, g = tiny_net("cond").model, golden("unet_raw")
    embedding = net.embed(g["noise_labels"], g["class_labels"], g["augment_labels"])
    assert_close(embedding, F.silu(g["map_layer1_presilu"]), **CLOSE)
    assert_close(net(g["x"], g["noise_labels"], g["class_labels"], g["augment_labels"]), g["F"], **CLOSE)


def test_positional_embedding():
    g = golden("posemb")
    assert_close(positional_embedding(g["c_noise"], 128), g["used_by_unet_sin_cos"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("resize", ["plain", "down", "up"])
def test_block(resize, layout):
    g = golden("block_attention")
    options = {} if resize == "plain" else {resize: True}
    block = fill_parameters(UNetBlock(24, 32, 20, attention=True, **options)).to(memory_format=layout)
    x = g["x"].contiguous(memory_format=layout)
    y = block(x, g["emb"])
    assert_close(y, g[f"y_{resize}"], **CLOSE)
    assert y.is_contiguous(memory_format=layout)  # a stray layout makes all that follows slow
    assert torch.equal(x, g["x"])  # still needed for the decoder


@torch.no_grad()
def test_block_without_attention():
    g = golden("block_attention")
    block = fill_parameters(UNetBlock(32, 32, 20))
    assert_close(block(g["x2"], g["emb"]), g["y_same_channels_no_attention"], **CLOSE)


@torch.no_grad()
def test_attention_weights():
    g = golden("block_attention")
    block = UNetBlock(6, 6, 4, attention=True)
    # Let q and k be golden and v the identity: what comes out are the weights.
    block.qkv = Conv2d(18, 18, 1)
    block.qkv.weight.copy_(torch.eye(18).view(3, 6, 18, 1, 1).transpose(0, 1).flatten(0, 1))
    block.qkv.bias.zero_()
    x = torch.cat([g["q"], g["k"], torch.eye(6, 5).expand(2, 6, 5)], dim=1)
    assert_close(block.attend(x.unsqueeze(2))[:, :5, 0].transpose(1, 2), g["attn_weights"], **CLOSE)


def test_initialisation():
    net = digits_net(augment_dim=9).model
    block = net.dec["4x4_in0"]

    def largest(weight):
        """Over the largest that Xavier's uniform gives."""
        fan_out, fan_in, *kernel = weight.shape
        return weight.abs().max().item() / math.sqrt(6 / ((fan_in + fan_out) * math.prod(kernel)))

    for layer in (net.map_augment, net.map_layer0, net.enc["8x8_conv"], block.conv0, block.affine):
        assert 0.9 < largest(layer.weight) <= 1
    for layer in (block.conv1, block.proj, net.dec["8x8_aux_conv"]):
        assert 0.9e-5 < largest(layer.weight) <= 1.0001e-5
    assert 0.9 < largest(block.qkv.weight) / math.sqrt(0.2) <= 1.0001
    assert all(not value.any() for name, value in net.named_parameters() if name.endswith(".bias"))
    assert all((value == 1).all() for name, value in net.named_parameters() if "norm" in name and "weight" in name)


@pytest.mark.parametrize("attn_resolutions", [[], [4]])
def test_digits_net_trains(attn_resolutions):
    net = digits_net(attn_resolutions=attn_resolutions, dropout=0.1).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x, labels = inputs("digits", "x", (32, 1, 8, 8)), F.one_hot(torch.arange(32) % 10, 10)
    losses = []
    for _ in range(12):
        loss = (net(x, torch.ones(32), labels) - labels[:, :1, None, None]).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@torch.no_grad()
def test_compiles_without_graph_breaks():
    net = fill_parameters(digits_net()).eval()
    x, sigma = inputs("digits", "x", (4, 1, 8, 8)), torch.tensor(1.25)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert_close(compiled(x, sigma, torch.eye(10)[:4]), net(x, sigma, torch.eye(10)[:4]), **CLOSE)


def test_dropout_acts_in_training_only():
    net = fill_parameters(digits_net(dropout=0.5))
    x = inputs("digits", "x", (2, 1, 8, 8))
    with torch.no_grad():
        assert not torch.equal(net.train()(x, 1.0), net(x, 1.0))
        assert torch.equal(net.eval()(x, 1.0), net(x, 1.0))


@torch.no_grad()
def test_compute_dtype():
    net = fill_parameters(digits_net(label_dim=0)).eval()
    x, sigma = inputs("digits", "x", (4, 1, 8, 8)), torch.tensor([0.01, 0.3, 1.0, 20.0])
    seen = []
    net.model.register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[1].dtype)))
    exact = net(x, sigma)
    net.dtype = torch.bfloat16
    rough = net(x, sigma)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert_close(rough, exact, rtol=0.1, atol=0.1)
    assert torch.equal(net(x, sigma, force_fp32=True), exact)
    net.dtype = torch.float16  # on the CPU without effect
    assert torch.equal(net(x, sigma), exact)
    assert [compute for compute, _ in seen] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert {embedding for _, embedding in seen} == {torch.float32}
    assert digits_net(use_fp16=True).dtype == torch.float16


@pytest.mark.parametrize(
    "option",
    [
        {"model_type": "DhariwalUNet"},
        {"embedding_type": "fourier"},
        {"encoder_type": "residual"},
        {"decoder_type": "skip"},
        {"resample_filter": [1, 3, 3, 1]},
        {"channel_mult_noise": 2},
        {"colour": "red"},
    ],
)
def test_other_networks_are_refused(option):
    with pytest.raises(NeonError, match=r"not supported|no option"):
        digits_net(**option)
