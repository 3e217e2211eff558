import math

import pytest
import torch
from edm_cases import golden
from fill import inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from edm.augment import Draws, augment, draw, reflected, translation, warp
from edm.augment import apply as apply_draws

# Draws and augmentation labels of each transform, in order.
TRANSFORMS = {
    "xflip": (["xflip", "xflip_gate"], [0]),
    "yflip": (["yflip", "yflip_gate"], [1]),
    "scale": (["scale", "scale_gate"], [2]),
    "rotate": (["rotate", "rotate_gate"], [3, 4]),
    "aniso": (["aniso", "aniso_angle", "aniso_gate", "aniso_angle_gate"], [5, 6]),
    "translate": (["translate", "translate_gate"], [7, 8]),
}


def nothing(n):
    """Draws that transform nothing: every gate is shut."""
    draws = draw(n, torch.Generator().manual_seed(0))._asdict()
    return Draws(**{name: torch.ones_like(v) if "gate" in name else torch.zeros_like(v) for name, v in draws.items()})


@pytest.mark.parametrize("name", ["p012", "p015", "p1"])
def test_pipeline(name):
    g = golden(f"augment_{name}")
    draws = Draws(*(value for key, value in g.items() if key.startswith("draw_")))
    images, labels = apply_draws(g["images"], draws, g["p"].item())
    assert_close(labels, g["labels"])
    assert_close(images, g["out"], rtol=0, atol=1e-4)

    again = draw(len(g["images"]), torch.Generator().manual_seed(g["seed"].item()))
    for field, mine, stored in zip(Draws._fields, again, draws):
        assert mine.dtype == stored.dtype and torch.equal(mine, stored), field


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_transform(name):
    g = golden("augment_single")
    fields, columns = TRANSFORMS[name]
    stored = [value for key, value in g.items() if key.startswith(f"{name}_draw")]
    draws = nothing(len(g["images"]))._replace(**dict(zip(fields, stored, strict=True)))
    images, labels = apply_draws(g["images"], draws, 1.0)
    assert_close(labels[:, columns], g[f"{name}_labels"])
    others = [column for column in range(9) if column not in columns]
    assert not labels[:, others].any()
    assert_close(images, g[f"{name}_out"], rtol=0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(8, 20), st.integers(8, 20)),
    seed=st.integers(0, 2**32),
    p=st.sampled_from([0.0, 0.12, 1.0]),
)
def test_any_batch(n, channels, size, seed, p):
    images = torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    out, labels = augment(images, torch.Generator().manual_seed(seed), p)
    assert out.shape == images.shape and labels.shape == (n, 9)
    assert out.isfinite().all() and out.abs().max() < 3
    assert out.dtype == labels.dtype == torch.float32
    if p == 0:
        assert not labels.any()


def test_gates_open_with_probability_p():
    _, labels = augment(torch.zeros(4000, 1, 8, 8), torch.Generator().manual_seed(0), 0.12)
    happened = (labels != 0).double().mean(0)
    expected = torch.tensor([0.5, 0.06, *[0.12] * 7], dtype=torch.float64)
    # The stretch's second label vanishes where its angle is dropped.
    expected[6] = 0.06
    assert_close(happened, expected, rtol=0, atol=4 * math.sqrt(0.25 / 4000))


def test_shut_gates_change_nothing_but_rounding():
    x = torch.linspace(-1, 1, 16)
    images = (x[:, None] * x).expand(2, 1, 16, 16)
    assert_close(apply_draws(images, nothing(2), 0.12)[0], images, rtol=0, atol=1e-5)


def test_warp_moves_content_by_whole_pixels():
    """Pixels fetched from two columns to the right and one row up: content moves left and down."""
    images = inputs("warp", "x", (1, 2, 6, 6)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = torch.nn.functional.avg_pool2d(images, 5, 1, 2)  # smooth
    shift = translation(2.0, -1.0)[None]
    out = warp(images, shift, reflected(shift, 24, 24))
    assert_close(out[:, :, 4:-4, 4:-4], images[:, :, 3:-5, 6:-2], rtol=0, atol=1e-3)
