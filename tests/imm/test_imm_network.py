import json

import pytest
import torch
from imm_tiny import GOLDEN, TINY, golden, near, tiny

from imm.network import IMMPrecond, logsnr, nt_to_time, position_table, time_to_nt, timestep_embedding
from neon import NeonError


def test_manifest_of_the_real_network():
    """Names, order and shapes are those of the released checkpoint."""
    manifest = json.loads((GOLDEN / "manifest_imagenet256.json").read_text())
    with torch.device("meta"):
        net = IMMPrecond(**manifest["constructor_kwargs"])
    assert [(k, list(v.shape)) for k, v in net.state_dict().items()] == [
        (e["name"], e["shape"]) for e in manifest["entries"]
    ]
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == manifest["param_count"]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == manifest["frozen_at_construction"]
    # The resolved options, spelled out, give the same network.
    with torch.device("meta"):
        spelled = IMMPrecond(**(manifest["constructor_kwargs"] | manifest["resolved_model_kwargs"]))
    assert {k: v.shape for k, v in spelled.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_tiny_checkpoint_forward():
    kwargs = json.loads((GOLDEN / "tiny_imm.json").read_text())["constructor_kwargs"]
    net, g = IMMPrecond(**kwargs), golden("tiny_imm_expect")
    net.load_state_dict(golden("tiny_imm_state"))
    with torch.no_grad():
        y = net(g["x"], g["t"], g["s"], g["class_labels"], cfg=g["cfg_scale"].item())
    near(y, g["y"])


def test_time_maps():
    g = golden("time_maps")
    near(logsnr(g["t"]), g["logsnr"], rtol=1e-12, atol=0)
    near(-logsnr(g["t"]) / 2, g["log_nt"], rtol=1e-12, atol=0)
    near(time_to_nt(g["t"]), g["nt_of_t"], rtol=1e-12, atol=0)
    near(nt_to_time(g["nt"]), g["t_of_nt"], rtol=1e-12, atol=0)
    for eps, key in [(0.0, "nt_low_high_eps0"), (0.006, "nt_low_high_eps0006")]:
        near(time_to_nt(torch.tensor([eps, 0.994], dtype=torch.float64)), g[key], rtol=1e-12, atol=0)
    t = g["t"][1:-1].clone().requires_grad_()
    logsnr(t).sum().backward()
    near(-t.grad, g["minus_dlogsnr_dt"], rtol=1e-12, atol=0)
    assert logsnr(t.float()).dtype == nt_to_time(g["nt"].float()).dtype == torch.float32


def test_embeddings():
    g = golden("timestep_embedding")
    near(timestep_embedding(g["t"].double()), g["emb64"], rtol=1e-12, atol=1e-12)
    near(timestep_embedding(g["t"]), g["emb32"], rtol=0, atol=1e-7)
    g = golden("pos_embed")
    near(position_table(64, 4), g["hidden64_grid4"], rtol=0, atol=1e-12)
    near(position_table(1152, 16)[g["hidden1152_grid16_rows"]], g["hidden1152_grid16"], rtol=0, atol=1e-12)
    near(IMMPrecond(**TINY).model.pos_embed.data, g["hidden64_grid4"].float()[None], rtol=0, atol=0)


def test_transformer_and_its_parts():
    g, model = golden("dit_forward"), tiny().model
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out, name + ".in": args[0]}))
    with torch.no_grad():
        near(model(g["x"], g["t"], g["s"], g["class_labels"]), g["F"])
        for ours, theirs in {
            "t_embedder": "t_emb",
            "s_embedder": "s_emb",
            "y_embedder.embedding_table.in": "y_index",
            "y_embedder": "y_emb",
            "x_embedder": "patch_embed",
            "blocks.0.attn.in": "block0_attn_in",
            "blocks.0.attn": "block0_attn_out",
            "blocks.0": "block0",
            "blocks.1": "block1",
        }.items():
            near(seen[ours], g[theirs])
        near(model(g["x"], g["t"], None, g["class_labels"]), g["F_no_s"])
        near(model(g["x"], g["t"][:1], g["s"][1:2], g["class_labels"]), g["F_shared_t"])


def test_preconditioner():
    g, net = golden("precond_forward"), tiny()
    x, t, s, labels = g["x"], g["t"], g["s"], g["class_labels"]
    received = {}
    net.model.register_forward_hook(lambda _, args, out: received.update(x=args[0], t=args[1], s=args[2], F=out))
    with torch.no_grad():
        near(net(x.double(), t, s, labels), g["y64"])
        near(received["x"], g["model_x"])
        near(received["t"], g["model_t"])
        near(received["s"], g["model_s"])
        near(received["F"], g["F"])
        near(net(x, t.float(), s.float(), labels), g["y32"])
        near(tiny(temb_type="identity")(x.double(), t, s, labels), g["y64_temb_identity"])
        for f_type in ("identity", "simple_edm"):
            near(tiny(f_type=f_type)(x.double(), t, s, labels), g[f"y64_f_{f_type}"])


@pytest.mark.parametrize("cfg", [None, 0.0, 1.0, 1.5, 1.8, 2.6])
@torch.no_grad()
def test_guidance(cfg):
    g, net = golden("cfg_forward"), tiny()
    for dtype, bits in [(torch.float64, 64), (torch.float32, 32)]:
        y = net(g["x"].to(dtype), g["t"].to(dtype), g["s"].to(dtype), g["class_labels"], cfg=cfg)
        near(y, g[f"y{bits}_cfg{cfg}"])


@torch.no_grad()
def test_no_class_is_the_zero_row_and_guidance_zero():
    g, net = golden("cfg_forward"), tiny()
    args = g["x"], g["t"], g["s"]
    nothing = net(*args)
    near(net(*args, torch.zeros_like(g["class_labels"])), nothing)
    near(net(*args, g["class_labels"], cfg=0.0), nothing)


@torch.no_grad()
def test_times_per_image_agree_with_one_image_at_a_time():
    g, net = golden("precond_forward"), tiny()
    together = net(g["x"], g["t"], g["s"], g["class_labels"], cfg=1.5)
    for i in range(4):
        alone = net(g["x"][i : i + 1], g["t"][i], g["s"][i], g["class_labels"][i : i + 1], cfg=1.5)
        near(together[i : i + 1], alone)


def test_fresh_network_predicts_zero_and_jumps_along_nothing():
    """Zero-initialised output: with euler_fm the jump is the identity, and every block passes its input on."""
    net, x = IMMPrecond(**TINY), torch.randn(2, 4, 8, 8)
    assert torch.equal(net(x, torch.tensor(0.9), torch.tensor(0.1), torch.eye(10)[:2]), x)
    tokens = torch.randn(2, 16, 64)
    assert torch.equal(net.model.blocks[0](tokens, torch.randn(2, 64)), tokens)
    weights = dict(net.model.named_parameters())
    assert 0.018 < weights["t_embedder.mlp.0.weight"].std() < 0.022
    for name, fans in [("x_embedder.proj", 64 + 16), ("blocks.1.attn.qkv", 192 + 64), ("blocks.0.mlp.fc1", 256 + 64)]:
        bound = (6 / fans) ** 0.5
        assert 0.95 * bound < weights[name + ".weight"].abs().max() <= bound
        assert not weights[name + ".bias"].any()


@torch.no_grad()
def test_residual_stream_stays_float32_under_autocast():
    g, model, types = golden("dit_forward"), tiny().model, {}
    for name in ("x_embedder", "blocks.0.attn", "blocks.0", "final_layer"):
        model.get_submodule(name).register_forward_hook(lambda _, a, out, name=name: types.update({name: out.dtype}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(g["x"], g["t"], g["s"], g["class_labels"])
    assert types.pop("blocks.0") == torch.float32
    assert set(types.values()) == {torch.bfloat16}
    near(out.float(), g["F"], rtol=0.05, atol=0.1)


@torch.no_grad()
def test_the_caller_decides_the_precision_not_the_checkpoint():
    g, net, types = golden("cfg_forward"), tiny(mixed_precision="fp16"), []
    args = g["x"], g["t"], g["s"], g["class_labels"]
    net.model.blocks[0].attn.register_forward_hook(lambda _, args, out: types.append(out.dtype))
    plain = net(*args)
    near(plain, g["y64_cfgNone"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(*args)
    assert types == [torch.float32, torch.bfloat16] and half.dtype == plain.dtype
    near(half, plain, rtol=0.05, atol=0.05)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_half_precision_on_cuda():
    g, net = golden("cfg_forward"), tiny().cuda()
    args = [g[name].cuda() for name in ("x", "t", "s", "class_labels")]
    with torch.autocast("cuda", dtype=torch.float16):
        near(net(*args), g["y64_cfgNone"].cuda(), rtol=2e-2, atol=2e-2)
    near(net(*args), g["y64_cfgNone"].cuda(), rtol=1e-2, atol=5e-3)  # TF32 may be on


def test_pixel_space_configuration():
    small = {"img_channels": 1, "in_channels": 1}
    net = tiny(**small)
    x = torch.randn(3, 1, 8, 8)
    y = net(x, torch.tensor(0.8), torch.tensor(0.2), torch.eye(10)[:3], cfg=1.5)
    assert y.shape == x.shape and y.isfinite().all() and not torch.equal(y, x)
    unconditional = tiny(**small, label_dim=0, num_classes=0)
    assert unconditional(x, torch.tensor(0.8), torch.tensor(0.2)).shape == x.shape
    with pytest.raises(NeonError, match="guidance"):
        unconditional(x, torch.tensor(0.8), torch.tensor(0.2), torch.zeros(3, 0), cfg=1.5)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "UNet"},
        {"noise_schedule": "vp_cosine"},
        {"f_type": "other"},
        {"temb_type": "other"},
        {"qk_norm": True},
        {"img_channels": 3},
    ],
)
def test_options_without_implementation_are_refused(options):
    with pytest.raises(NeonError, match=next(iter(options))):
        IMMPrecond(**(TINY | options))


@pytest.mark.parametrize("labels", [None, torch.eye(10)[:1]])
def test_guidance_needs_a_label_for_every_image(labels):
    with pytest.raises(NeonError, match="guidance"):
        tiny()(torch.randn(2, 4, 8, 8), torch.tensor(0.8), torch.tensor(0.2), labels, cfg=1.5)
