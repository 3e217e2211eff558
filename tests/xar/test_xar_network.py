"""The xAR transformer and its loss against the original's numbers (golden/xar/README.md), and its own properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_parameters, inputs
from hypothesis import given
from hypothesis import strategies as st

from neon import NeonError
from nets.embedding import sinusoids
from xAR.configs import NETWORKS
from xAR.family import new_transformer
from xAR.loss import Draws, draw, noisy_context_loss
from xAR.network import XAR, Block, Rope, TimeEmbed, block_mask, to_cells, to_map

GOLDEN = Path(__file__).parents[1] / "golden" / "xar"
TINY = {"dim": 32, "depth": 2, "heads": 2, "dropout": 0.0}


def golden(case):
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {key: torch.from_numpy(file[key]) if file[key].dtype.kind in "fiu" else file[key] for key in file}


def close(actual, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def cell_major(x, cells):
    """Rows of a recorded (cells·B, …) tensor → (B, cells, …)."""
    return x.unflatten(0, (cells, -1)).transpose(0, 1)


def training_case():
    model = fill_parameters(XAR(**TINY)).train()
    noise = torch.cat([inputs("train", f"noise{i}", (2, 64, 16)) for i in range(4)], 1)
    draws = Draws(torch.tensor([0.5, 0.05]), cell_major(inputs("train", "t_normal", (8,)), 4), noise)
    return model, inputs("train", "latent", (2, 16, 16, 16)), torch.tensor([3, 977]), draws


@pytest.mark.parametrize("name", ["base", "large"])
def test_state_dict_is_the_released_one(name):
    manifest = json.loads((GOLDEN / f"manifest_{name}.json").read_text())
    with torch.device("meta"):
        model = new_transformer(NETWORKS[f"xar_{name}"])
    expected = [(e["name"], e["shape"], f"torch.{e['dtype']}") for e in manifest["entries"]]
    assert [(name, list(x.shape), str(x.dtype)) for name, x in model.state_dict().items()] == expected
    parameters = {e["name"] for e in manifest["entries"] if e["kind"] == "param"}
    assert dict(model.named_parameters()).keys() == parameters
    assert sum(p.numel() for p in model.parameters()) == manifest["total_parameters"]


def test_tables():
    expected = golden("tables")
    for head in (16, 64):
        rope = Rope(16, 8, head)
        close(rope.freqs, expected[f"freqs_{head}"], rtol=1e-6, atol=0)
        close(rope.freqs_cos, expected[f"cos_{head}"], rtol=0, atol=1e-6)
        close(rope.freqs_sin, expected[f"sin_{head}"], rtol=0, atol=1e-6)
    rope, x = Rope(16, 8, 16), inputs("tables", "rope16", (1, 2, 256, 16))
    close(rope(x, 0), expected["rope_train_16"])
    close(rope(x[:, :, :64], 128), expected["rope_cell2_16"])
    close(rope(x[:, :, :128], 64), expected["rope_cells12_16"])
    assert torch.equal(block_mask(4, 64) == 0, expected["mask_allowed"] == 1)
    assert torch.equal(block_mask(4, 64) == -torch.inf, expected["mask_allowed"] == 0)
    order = to_cells(torch.arange(256).view(1, 1, 16, 16), 8).flatten()
    assert torch.equal(order, expected["cell_order"])


def test_time_embedding():
    expected = golden("tables")
    ids = expected["time_ids"]
    close(sinusoids(ids, 256), expected["time_sinusoid"], rtol=0, atol=6e-5)  # an ulp of exp() times 1000
    embed = fill_parameters(XAR(**TINY)).time_embed
    close(embed((ids + 0.5) / 1000), expected["time_embed"])


def test_times_count_in_whole_thousandths():
    embed = TimeEmbed(32)
    assert torch.equal(embed(torch.tensor(0.3601)), embed(torch.tensor(0.3609)))
    assert not torch.equal(embed(torch.tensor(0.3599)), embed(torch.tensor(0.3601)))


def test_block():
    expected = golden("block")
    block = fill_parameters(Block(32, 2)).eval()
    x, condition = inputs("block", "x", (2, 128, 32)), inputs("block", "cond", (4, 32))
    close(block.mlp(x), expected["swiglu"])
    close(block.ada_lin(condition), expected["ada"])

    cache = []
    y = block(x.unflatten(1, (2, 64)), cell_major(condition, 2), block_mask(2, 64), cache)
    close(y.flatten(1, 2), expected["y"])
    close(cache[0], expected["cache_k"])
    close(cache[1], expected["cache_v"])
    before = [x.clone() for x in cache]
    y = block(inputs("block", "x2", (2, 1, 64, 32)), inputs("block", "cond2", (2, 1, 32)), None, cache)
    close(y.flatten(1, 2), expected["y2"])
    assert all(torch.equal(a, b) for a, b in zip(before, cache))


def test_training_forward_and_gradients():
    expected = golden("train")
    model, latents, labels, draws = training_case()
    seen = {}
    model.register_forward_hook(lambda _, args, out: seen.update(args=args, velocity=out))
    model.encoder_norm.register_forward_hook(lambda _, args, out: seen.update(encoder=out))
    model.encoder_blocks[0].register_forward_hook(lambda _, args, out: seen.update(condition=args[1]))
    loss = noisy_context_loss(model, latents, labels, draws)
    loss.backward()

    x, t, y = seen["args"][:3]
    close(to_cells(latents, 8), expected["cells"], rtol=0, atol=0)
    assert torch.equal(y, expected["labels_effective"])
    close(t, cell_major(expected["t"], 4), rtol=0, atol=0)
    close(x, expected["x_t"])
    close(seen["condition"], cell_major(expected["condition"], 4))
    close(seen["encoder"].flatten(1, 2), expected["encoder_out"])
    close(seen["velocity"], expected["velocity"])
    close(loss, expected["loss"])
    names, grads = zip(*((name, p.grad) for name, p in model.named_parameters()))
    assert list(names) == expected["grad_names"].tolist()
    close(torch.stack([grad.double().norm() for grad in grads]), expected["grad_norms"])
    close(torch.nn.utils.get_total_norm(grads), expected["total_grad_norm"])


def test_three_training_steps():
    expected = golden("train3")
    model, latents, labels, draws = training_case()
    params = dict(model.named_parameters())
    start = {name: p.detach().clone() for name, p in params.items()}
    ema = {name: p.clone() for name, p in start.items()}
    groups = [{"params": [p], "weight_decay": 0.02 if p.ndim >= 2 else 0.0} for p in params.values()]
    assert [g["weight_decay"] for g in groups] == expected["weight_decay"].tolist()
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.96))
    losses, norms = [], []
    for lr in expected["lrs"].tolist():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = noisy_context_loss(model, latents, labels, draws)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(params.values(), 1.0).double())
        optimizer.step()
        losses.append(loss.detach().double())
        for name, p in params.items():
            ema[name].lerp_(p.detach(), 0.1)
    losses.append(noisy_context_loss(model, latents, labels, draws).detach().double())

    close(torch.stack(losses), expected["losses"], rtol=1e-3)
    close(torch.stack(norms), expected["grad_norms"], rtol=1e-3)
    for weights, key in ((params, "delta_norms"), (ema, "ema_delta_norms")):
        deltas = [(weights[name].detach().double() - start[name].double()).norm() for name in expected["names"]]
        close(torch.stack(deltas), expected[key], rtol=1e-3)


@given(n=st.integers(1, 4), cell=st.integers(1, 4), channels=st.integers(1, 3))
def test_cells_and_map_are_inverse(n, cell, channels):
    x = torch.arange(2 * channels * (n * cell) ** 2).view(2, channels, n * cell, n * cell)
    cells = to_cells(x, cell)
    assert torch.equal(to_map(cells, cell), x)
    last = x[:, :, -cell:, -cell:].flatten(2).mT  # the last cell is the bottom right one, in raster order
    assert torch.equal(cells[:, -(cell**2) :], last)


def test_a_cell_sees_itself_and_the_cells_before():
    model = fill_parameters(new_transformer(NETWORKS["digits"])).eval()
    x, t, labels = torch.randn(1, 16, 4, requires_grad=True), torch.rand(1, 4), torch.tensor([7])
    velocity = model(x, t, labels)
    for cell, part in enumerate(velocity.split(model.size, 1)):
        (grad,) = torch.autograd.grad(part.square().sum(), x, retain_graph=True)
        seen = [bool(g.abs().sum() > 0) for g in grad.split(model.size, 1)]
        assert seen == [other <= cell for other in range(4)]


def test_draws_follow_the_generator():
    model = new_transformer(NETWORKS["digits"])
    first, again = (draw(model, 3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert [tuple(x.shape) for x in first] == [(3,), (3, 4), (3, 16, 4)]
    assert first.uniform.min() >= 0 and first.uniform.max() < 1


def test_digits_learn():
    """Two images are learnt. A constant is at 1.33 at best, the variance of the noise plus that of the images."""
    torch.manual_seed(0)
    model = new_transformer(NETWORKS["digits"])
    latents, labels = torch.rand(2, 4, 4, 4) * 2 - 1, torch.tensor([0, 1])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        loss = noisy_context_loss(model, latents.repeat(8, 1, 1, 1), labels.repeat(8), draw(model, 16, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.8


def test_autocast_is_close_and_keeps_the_loss_in_float32():
    model, latents, labels, draws = training_case()
    with torch.autocast("cpu", torch.bfloat16):
        loss = noisy_context_loss(model, latents, labels, draws)
    assert loss.dtype == torch.float32
    close(loss, golden("train")["loss"], rtol=0.02)


@pytest.mark.parametrize("sizes", [{"heads": 5}, {"heads": 384}, {"cell": 16}, {"cell": 5}])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(NeonError), torch.device("meta"):
        XAR(**sizes)
