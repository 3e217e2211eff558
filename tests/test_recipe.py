"""Learning rate and averaging as functions of the images seen, against closed forms."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neon.family import Recipe

PLAIN = Recipe(batch=10, lr=2e-3, budget=1000, snapshot=100)


def rates(recipe):
    return [recipe.lr_at(images) for images in range(0, recipe.budget, recipe.batch)]


def test_constant_by_default():
    assert rates(PLAIN) == [2e-3] * 100


def test_linear_ramp_starts_at_zero():
    lr = rates(replace(PLAIN, ramp=200))
    assert lr[0] == 0.0 and lr[10] == pytest.approx(1e-3, rel=1e-12) and lr[20:] == [2e-3] * 80
    assert lr[:20] == pytest.approx([2e-3 * i / 20 for i in range(20)], rel=1e-12)


def test_ramp_longer_than_the_budget():
    assert rates(replace(PLAIN, ramp=10_000))[-1] == pytest.approx(2e-3 * 0.099, rel=1e-12)
    assert rates(replace(PLAIN, ramp=10_000, anneal="linear")) == rates(replace(PLAIN, ramp=10_000))


@pytest.mark.parametrize("ramp", [0, 100, 300])
def test_linear_anneal_ends_at_the_budget(ramp):
    lr = replace(PLAIN, ramp=ramp, anneal="linear").lr_at
    assert lr(ramp) == 2e-3 and lr(1000) == pytest.approx(0, abs=1e-18)
    assert lr((ramp + 1000) / 2) == pytest.approx(1e-3, rel=1e-12)
    assert lr(ramp / 2) == pytest.approx(1e-3 if ramp else 2e-3, rel=1e-12)


@given(st.sampled_from(["none", "linear"]), st.integers(0, 1000))
@settings(deadline=None)
def test_rises_to_lr_then_never_rises_again(anneal, ramp):
    lr = rates(replace(PLAIN, ramp=ramp, anneal=anneal))
    top = lr.index(max(lr))
    assert all(0 <= x <= 2e-3 for x in lr)
    assert lr[: top + 1] == sorted(lr[: top + 1]) and lr[top:] == sorted(lr[top:], reverse=True)
    assert (top - 1) * 10 < ramp or ramp == 0


def test_average():
    assert PLAIN.ema_beta() is None
    assert replace(PLAIN, ema_decay=0.999).ema_beta() == 0.999
    beta = replace(PLAIN, ema_halflife=70.0).ema_beta()
    assert beta**7 == pytest.approx(0.5, rel=1e-12)  # 7 steps of 10 images
    half = replace(PLAIN, batch=20, ema_halflife=70.0).ema_beta()
    assert half == pytest.approx(beta**2, rel=1e-12)


def test_first_steps_of_the_original_edm_schedule():
    """Batch 4, ramp 16 images, half-life 50 images: the golden run's columns lr and beta."""
    golden = np.load(Path(__file__).parent / "golden" / "edm" / "train_steps.npz")["lr_beta_loss_netsq_emasq"]
    recipe = Recipe(batch=4, lr=1e-3, budget=10**6, snapshot=100, ramp=16, ema_halflife=50)
    assert [recipe.lr_at(4 * i) for i in range(4)] == pytest.approx(golden[:, 0].tolist(), rel=1e-12)
    assert [recipe.ema_beta()] * 4 == pytest.approx(golden[:, 1].tolist(), rel=1e-12)
