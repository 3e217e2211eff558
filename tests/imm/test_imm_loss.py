import copy

import pytest
import torch
from fill import inputs
from hypothesis import given
from hypothesis import strategies as st
from imm_tiny import golden, near, tiny

from imm.loss import Draws, draw, group_times, kernel, kernel_scale, loss_weight, moment_matching_loss
from imm.network import time_to_nt
from neon import NeonError

CASES = {"loss": {}, "loss_k4": {"k": 4, "a": 1, "min_gap": None}}


def draws_of(g, prefix=""):
    return Draws(*(g[prefix + name] for name in ("u_t", "u_s", "u_label", "noise_unit")))


@pytest.mark.parametrize("case", CASES)
def test_draws_are_the_originals_for_the_same_seed(case):
    g = golden(case)
    draws = draw(g["images"].shape, torch.Generator().manual_seed(g["seed"].item()))
    for got, want in zip(draws, draws_of(g)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_its_parts(case):
    g, options, net = golden(case), CASES[case], tiny().requires_grad_()
    t, r, s = group_times(net, g["u_t"], g["u_s"], **{k: v for k, v in options.items() if k != "a"})
    for got, want in zip((t, r, s), (g["t"], g["r"], g["s"])):
        near(got, want, rtol=1e-12, atol=0)
    w = kernel_scale(g["t"], g["s"], 0.5).flatten()
    near(w, g["w"], rtol=1e-10, atol=0)
    near(loss_weight(g["t"], a=options.get("a", 2)).flatten(), g["wout"], rtol=1e-10, atol=0)
    for x, y, mean in [("st", "st", "inter_sample"), ("sr", "sr", "inter_gt"), ("st", "sr", "cross")]:
        near(kernel(g[f"f_{x}"], g[f"f_{y}"], w).mean((1, 2)), g[f"{mean}_sim"], rtol=1e-10, atol=0)

    jumps = []
    hook = net.register_forward_hook(lambda *args: jumps.append(args[-1].detach()))
    loss = moment_matching_loss(net, g["images"], g["class_labels"], draws_of(g), **options)
    hook.remove()
    near(jumps[0], g["f_st"].flatten(0, 1))
    near(jumps[1], g["f_sr"].flatten(0, 1))
    near(loss, g["loss"], rtol=1e-4, atol=0)
    near(loss.mean(), g["loss_mean"], rtol=1e-4, atol=0)
    loss.mean().backward()
    parameters = dict(net.named_parameters())
    norms = torch.stack([parameters[str(name)].grad.norm() for name in g["param_names"]]).double()
    near(norms, g["grad_norms"], rtol=1e-3, atol=1e-9)
    near(norms.norm(), g["grad_norm_total"], rtol=1e-3, atol=0)


def test_kernel_and_weights():
    g, net = golden("kernel"), tiny()
    near(kernel(g["x"], g["y"], g["w"]), g["k_xy"], rtol=1e-12, atol=0)
    near(kernel(g["x"], g["x"], g["w"]), g["k_xx"], rtol=1e-12, atol=0)
    near(kernel_scale(g["t"], g["s"], 0.5), g["w_ts"], rtol=1e-12, atol=0)
    near(loss_weight(g["t"]), g["wout_a2_b4"], rtol=1e-12, atol=0)
    near(loss_weight(g["t"], a=1, b=0), g["wout_a1_b0"], rtol=1e-12, atol=0)
    t, r, _ = group_times(net, g["t"] / 0.994, torch.zeros(5), min_gap=None)
    near(t, g["t"], rtol=1e-12, atol=0)
    near(time_to_nt(t), g["nt"], rtol=1e-12, atol=0)
    near(r, g["r_k12"], rtol=1e-11, atol=0)
    near(time_to_nt(r), g["nr_k12"], rtol=1e-11, atol=0)


def test_training_steps():
    """Three steps of AdamW with an EMA, every parameter trained, the position table too."""
    g, net = golden("train_steps"), tiny().requires_grad_()
    ema = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    for step, (want_loss, want_net, want_ema) in enumerate(g["loss_netsq_emasq"].tolist()):
        images = 0.5 * inputs("imm/train_steps", f"images{step}", (8, 4, 8, 8))
        rows = torch.eye(10)[(torch.arange(8) + step) % 10]
        loss = moment_matching_loss(net, images, rows, draws_of(g, f"s{step}_")).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for e, p in zip(ema.parameters(), net.parameters()):
                e.lerp_(p, 0.1)
        assert loss.item() == pytest.approx(want_loss, rel=1e-4)
        for model, want in [(net, want_net), (ema, want_ema)]:
            assert sum(p.double().square().sum().item() for p in model.parameters()) == pytest.approx(want, rel=1e-6)
        near(net.model.final_layer.linear.weight.data, g[f"s{step}_net_final_linear"], rtol=0, atol=1e-4)
        near(ema.model.final_layer.linear.weight.data, g[f"s{step}_ema_final_linear"], rtol=0, atol=1e-4)
        near(net.model.pos_embed.data, g[f"s{step}_net_pos_embed"], rtol=0, atol=1e-4)


NETS = {eps: tiny(eps=eps) for eps in (0.0, 0.006)}
unit = st.floats(0, 1, exclude_max=True)


@given(unit, unit, st.sampled_from(sorted(NETS)), st.integers(1, 14))
def test_times_are_ordered(u_t, u_s, eps, k):
    net = NETS[eps]
    t, r, s = group_times(net, torch.tensor(u_t, dtype=torch.float64), torch.tensor(u_s, dtype=torch.float64), k)
    assert eps - 1e-12 <= s <= r <= t <= net.T + 1e-12
    assert t - r >= 1e-4 * (1 - 1e-9) or r == s


def one_batch(seed=0):
    g = golden("loss")
    draws = draw(g["images"].shape, torch.Generator().manual_seed(seed))
    return g["images"], g["class_labels"], draws


@pytest.mark.parametrize("field, value", [("u_t", 0.0), ("u_s", 1.0)])
def test_degenerate_times_count_zero_and_leave_the_gradient_finite(field, value):
    """t = 0 and s = t give infinite weights; the other groups go on as if nothing had happened."""
    net, (images, labels, draws) = tiny().requires_grad_(), one_batch()
    getattr(draws, field)[1] = value
    loss = moment_matching_loss(net, images, labels, draws)
    assert loss[1] == 0 and (loss[[0, 2]] > 0).all()
    loss.sum().backward()
    got = [p.grad.clone() for p in net.parameters()]
    assert all(grad.isfinite().all() for grad in got)

    net.zero_grad()
    others = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    kept = Draws(draws.u_t[[0, 2]], draws.u_s[[0, 2]], draws.gate[others], draws.noise[others])
    moment_matching_loss(net, images[others], labels[others], kept).sum().backward()
    for a, b in zip(got, (p.grad for p in net.parameters())):
        near(a, b)


def test_overflow_counts_zero_but_shows_in_the_gradient():
    net, (images, labels, draws) = tiny().requires_grad_(), one_batch()
    images = images.clone()
    images[4] = torch.inf
    loss = moment_matching_loss(net, images, labels, draws)
    assert loss[1] == 0 and (loss[[0, 2]] > 0).all()
    loss.mean().backward()
    assert not all(p.grad.isfinite().all() for p in net.parameters())


def test_only_the_jump_from_t_loses_labels_has_a_gradient_and_follows_autocast():
    net, (images, labels, draws) = tiny().requires_grad_(), one_batch()
    draws.gate.fill_(0.5)
    draws.gate[2] = 0.05
    calls, types = [], []
    net.register_forward_hook(lambda _, args, out: calls.append((args, out)))
    net.model.blocks[0].attn.register_forward_hook(lambda _, args, out: types.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = moment_matching_loss(net, images, labels, draws)
    (from_t, jump), (from_r, target) = calls
    kept = labels.clone()
    kept[2] = 0
    assert torch.equal(from_t[3], kept) and torch.equal(from_r[3], labels)
    assert jump.requires_grad and not target.requires_grad
    assert types == [torch.bfloat16, torch.float32] and loss.dtype == torch.float64


def test_unequal_groups_are_refused():
    with pytest.raises(NeonError, match="groups of 4"):
        draw((6, 4, 8, 8), torch.Generator())
