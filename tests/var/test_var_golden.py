"""VAR and its VQVAE against numbers computed by the original models; see golden/var/README.md."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill_parameters, inputs
from var_cases import sample

from neon.sampling import Streams, to_uint8
from VAR.configs import CONFIGS
from VAR.loss import code_loss
from VAR.sampler import filter_logits, sample_codes
from VAR.transformer import Transformer
from VAR.vqvae import VQVAE, Quantizer, phi_table

GOLDEN = Path(__file__).parents[1] / "golden" / "var"
TINY = CONFIGS["tiny"]
LABELS = torch.tensor([3, 10])


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(a) if a.dtype.kind in "fiu" else a.tolist() for key, a in arrays.items()}


def close(actual, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=atol)


def formula_codes(batch=2):
    b, maps = torch.arange(batch)[:, None], []
    for k, side in enumerate(TINY.sides):
        maps.append((17 * torch.arange(side**2) + 5 * b + 31 * k + 3) % 64)
    return torch.cat(maps, dim=1)


@cache
def vqvae():
    return fill_parameters(VQVAE(TINY))


def transformer(**changes):
    return fill_parameters(Transformer(dataclasses.replace(TINY, **changes))).eval()


@pytest.mark.parametrize("name, network", [("d16_256", Transformer), ("d36_512", Transformer), ("vqvae", VQVAE)])
def test_state_has_the_released_names_shapes_and_order(name, network):
    manifest = json.loads((GOLDEN / f"manifest_{name}.json").read_text())
    for config in ("d16_256", "d36_512") if name == "vqvae" else (name,):
        with torch.device("meta"):
            model = network(CONFIGS[config])
        parameters = dict(model.named_parameters())
        state = [
            (
                key,
                list(value.shape),
                str(value.dtype).removeprefix("torch."),
                "param" if key in parameters else "buffer",
            )
            for key, value in model.state_dict().items()
        ]
        assert state == [(e["name"], e["shape"], e["dtype"], e["kind"]) for e in manifest["entries"]]
        assert sum(p.numel() for p in parameters.values()) == manifest["total_parameters"]
        if network is Transformer:
            original = manifest["kwargs"]
            assert CONFIGS[config].drop_path == pytest.approx(original["drop_path_rate"])
            assert CONFIGS[config].label_drop == original["cond_drop_rate"]


def test_vqvae_encode():
    expected, images, model = golden("vqvae_encode"), inputs("vqvae", "img", (2, 3, 64, 64)), vqvae()
    features = model.encoder(images)
    close(features, expected["enc"])
    f = model.quant_conv(features)
    close(f, expected["f"])
    stages = list(model.quantize.stages(f))
    close(torch.stack([f_hat for _, f_hat in stages]), expected["f_hat_stages"])
    assert torch.equal(model.encode(images), expected["ids"])
    close(model.decode(expected["ids"]), expected["recon"], atol=1e-4)


def test_vqvae_decode():
    expected, ids, model = golden("vqvae_decode"), formula_codes(), vqvae()
    assert torch.equal(ids, expected["ids"])
    sums = torch.stack(list(model.quantize.partial_sums(ids)))
    close(sums, expected["f_hat_stages"])
    close(model.decode_latent(sums[-1]), expected["decoder_raw"], atol=1e-4)
    close(model.decode(ids), expected["image"], atol=1e-4)
    close(model.quantize.teacher_input(ids), expected["var_input"])


def test_phi_tables():
    expected = golden("vqvae_tables")
    for scales in (4, 10, 14):
        assert phi_table(scales) == expected[f"phi_index_{scales}_stages"].tolist()


RESIZED = {4: inputs("vqvae", "resample", (1, 2, 4, 4)), 16: inputs("vqvae", "resample16", (1, 1, 16, 16))}


@pytest.mark.parametrize("small, large", [(3, 4), (13, 16)])
def test_area_resize(small, large):
    quantizer = Quantizer((small, large), 4, 2)
    expected = golden("vqvae_tables")[f"area_{large}_to_{small}"]
    close(quantizer.tokens(RESIZED[large], 0), expected.flatten(2).mT)


@pytest.mark.parametrize("small, large", [(4, 6), (1, 3), (13, 16)])
def test_bicubic_resize(small, large):
    z = RESIZED[16 if large == 16 else 4][:, :, :small, :small]
    quantizer = Quantizer((small, large), 4, z.shape[1])
    for phi in quantizer.quant_resi["qresi_ls"]:  # make φ the identity
        torch.nn.init.dirac_(phi.weight)
        torch.nn.init.zeros_(phi.bias)
    close(quantizer.refine(z.flatten(2).mT, 0), golden("vqvae_tables")[f"bicubic_{small}_to_{large}"])


CASES = {
    "tf_plain": {},
    "tf_shared": {"shared_adaln": True},
    "tf_no_l2norm": {"l2_norm": False},
    "tf_scale_clamp": {},
}


@pytest.mark.parametrize("case", CASES)
def test_transformer(case):
    expected, model = golden(case), transformer(**CASES[case])
    if case == "tf_scale_clamp":
        for block in model.blocks:
            torch.nn.init.constant_(block.attn.scale_mul_1H11, 6.0)
    logits = model(LABELS, expected["var_input"])
    close(logits, expected["logits"])
    close(F.cross_entropy(logits.mT, expected["ids"], reduction="none"), expected["ce"])
    loss = code_loss(model, vqvae().quantize, expected["ids"], LABELS)
    close(loss, expected["loss"])
    loss.backward()
    names, gradients = zip(*[(name, p.grad) for name, p in model.named_parameters()])
    assert list(names) == expected["grad_names"]
    close(torch.stack([g.double().norm() for g in gradients]), expected["grad_norms"])


@pytest.mark.parametrize("case, cfg", [("ar_plain_cfg1.5", 1.5), ("ar_plain_cfg4", 4.0), ("ar_shared_cfg3", 3.0)])
def test_greedy_sampling(case, cfg):
    expected, model = golden(case), transformer(shared_adaln="shared" in case)
    probs = []

    def greedy(p, _):
        probs.append(p)
        return p.argmax(-1)

    ids, f_hat = sample_codes(model, vqvae().quantize, expected["labels"], Streams([0, 1]), cfg=cfg, draw=greedy)
    assert torch.equal(ids, expected["ids"])
    close(torch.cat(probs, dim=1).log(), expected["guided_logits"].log_softmax(-1))
    close(f_hat, expected["f_hat"])
    # top_k 1 leaves nothing to chance
    image = sample(model, vqvae(), expected["labels"], Streams([0, 1]), cfg=cfg, top_k=1)
    close(image, expected["image01"], atol=1e-4)
    difference = to_uint8(2 * image - 1).int() - expected["image_u8"].int()
    assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 1e-3


def test_sampling_with_the_original_random_numbers():
    expected, generator = golden("ar_seeded"), torch.Generator().manual_seed(5)

    def multinomial(probs, _):
        return torch.multinomial(probs.flatten(0, 1), 1, True, generator=generator).view(probs.shape[:2])

    ids, f_hat = sample_codes(
        transformer(),
        vqvae().quantize,
        expected["labels"],
        Streams([0, 1]),
        cfg=1.5,
        top_k=20,
        top_p=0.9,
        draw=multinomial,
    )
    assert torch.equal(ids, expected["ids"])
    close(f_hat, expected["f_hat"])


def test_filter():
    expected = golden("filter")
    logits = 3 * inputs("filter", "logits", (2, 3, 32))
    close(logits, expected["logits"])
    for k in (0, 1, 5, 32):
        for p in ("0", "0.3", "0.5", "0.95", "1"):
            close(filter_logits(logits, k, float(p)).softmax(-1), expected[f"k{k}_p{p}"])
    for k in (1, 5):
        close(filter_logits(logits.round(), k).softmax(-1), expected[f"ties_k{k}"])
    images = 2 * expected["u8_in"] - 1
    same = (images + 1) / 2 == expected["u8_in"]  # the original's input is in [0, 1], ours in [-1, 1]
    assert same.float().mean() > 0.5 and torch.equal(to_uint8(images[same]), expected["u8_out"][same])


def test_three_steps_of_fine_tuning():
    expected, model, ids = golden("train3"), transformer(), formula_codes()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    losses, norms = [], []
    for lr in expected["lrs"]:
        optimizer.param_groups[0]["lr"] = lr.item()
        optimizer.zero_grad()
        losses.append(code_loss(model, vqvae().quantize, ids, LABELS))
        losses[-1].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0))
        optimizer.step()
    losses.append(code_loss(model, vqvae().quantize, ids, LABELS))
    close(torch.stack(losses).double(), expected["losses"], rtol=1e-3)
    close(torch.stack(norms).double(), expected["grad_norms"], rtol=1e-3)
    assert list(before) == expected["names"]
    moved = torch.stack([(p - before[name]).double().norm() for name, p in model.named_parameters()])
    close(moved, expected["delta_norms"], rtol=1e-3)
