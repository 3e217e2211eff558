import pytest
import torch
from edm_cases import digits_net, golden, tiny_net
from fill import fill_parameters, inputs
from torch.testing import assert_close

from edm.augment import augment
from edm.loss import draw, edm_loss, loss_map


def test_loss_and_gradients():
    net, g = tiny_net("cond").train(), golden("loss")
    out = loss_map(net, g["images"], g["class_labels"], None, g["rnd_normal"], g["noise_unit"])
    assert_close(out, g["loss_map"], rtol=1e-4, atol=1e-4)
    loss = out.sum() / 4
    assert_close(loss, g["loss_scalar"], rtol=1e-4, atol=0)
    loss.backward()
    norms = {name: p.grad.double().norm().item() for name, p in net.named_parameters() if p.grad is not None}
    for name, expected in zip(g["param_names"], g["grad_norms"].tolist(), strict=True):
        if expected != expected:
            assert name not in norms
        else:
            assert norms[name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total == pytest.approx(g["grad_norm_total"].item(), rel=1e-4)
    assert_close(net.model.dec["16x16_aux_conv"].bias.grad, g["grad_out_conv_bias"], rtol=1e-3, atol=1e-3)


def test_order_of_draws():
    net = fill_parameters(digits_net(augment_dim=9)).eval()
    images, labels = inputs("loss", "x", (3, 1, 8, 8)), torch.eye(10)[:3]
    with torch.no_grad():
        out = edm_loss(net, images, labels, draw((3, 1, 8, 8), torch.Generator().manual_seed(3), 0.5))
        generator = torch.Generator().manual_seed(3)
        level = torch.randn(3, 1, 1, 1, generator=generator)
        augmented, augment_labels = augment(images, generator, 0.5)
        noise = torch.randn(3, 1, 8, 8, generator=generator)
        assert torch.equal(out, loss_map(net, augmented, labels, augment_labels, level, noise))

        plain = edm_loss(net, images, labels, draw((3, 1, 8, 8), torch.Generator().manual_seed(3)))
        generator.manual_seed(3)
        level, noise = (torch.randn(shape, generator=generator) for shape in ((3, 1, 1, 1), (3, 1, 8, 8)))
        assert torch.equal(plain, loss_map(net, images, labels, None, level, noise))


def test_perfect_denoiser_has_no_loss():
    images = inputs("loss", "x", (3, 1, 8, 8))
    assert not edm_loss(lambda *_: images, images, None, draw((3, 1, 8, 8), torch.Generator().manual_seed(0))).any()


def test_weight_balances_noise_levels():
    """Leaving the noise in costs σ² per pixel, times the weight: 1 + σ²/σ_data² in the mean."""
    images = torch.zeros(1, 1, 100, 100)
    for level in (-2.0, 0.0, 1.0):
        sigma = torch.tensor(1.2 * level - 1.2).exp()
        noise = inputs("loss", "noise", images.shape)
        out = loss_map(lambda x, *_: x, images, None, None, torch.full((1, 1, 1, 1), level), noise)
        assert_close(out.mean(), 1 + (sigma / 0.5) ** 2, rtol=0.05, atol=0)
