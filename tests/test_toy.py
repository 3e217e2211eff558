"""The closed forms of the toy, against sampling, SciPy and the library's own statistics."""

import math
from pathlib import Path

import pandas as pd
import papermill
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import dblquad
from torch.testing import assert_close

from mini import toy
from neon.measure.metrics import Reference, frechet_distance

ROOT = Path(__file__).parents[1]
COVARIANCES = st.tuples(*[st.floats(0.2, 3)] * 2, st.floats(-0.9, 0.9))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.tuples(*[st.floats(-2, 2)] * 2), COVARIANCES)
def test_frechet_is_that_of_the_metrics(mean, parts):
    s, r, correlation = parts
    cov = torch.tensor([[s * s, correlation * s * r], [correlation * s * r, r * r]], dtype=torch.float64)
    mean = torch.tensor(mean, dtype=torch.float64)
    wanted = frechet_distance(mean, cov, Reference(torch.zeros(2, dtype=torch.float64), toy.TARGET))
    assert float(toy.frechet(mean, cov)) == pytest.approx(wanted, rel=1e-6, abs=1e-7)


def test_frechet_along_the_axes_of_the_target():
    """The target's axes have variances 3 and 1; matrices that share them are as far apart as their roots."""
    axes = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64) / math.sqrt(2)
    cov = axes @ torch.diag(torch.tensor([12.0, 4.0], dtype=torch.float64)) @ axes.T
    assert float(toy.frechet(torch.zeros(2).double(), cov)) == pytest.approx(3 + 1)
    assert float(toy.frechet(torch.tensor([3.0, 4.0]).double(), toy.TARGET)) == pytest.approx(25)


def test_fit_and_moments_of_the_autoregressive_gaussian():
    """The likelihood's maximum reproduces the sample's mean and covariance, and is one."""
    data = toy.real_data(3, 500, generator()).double() + 1
    theta = toy.ar_fit(data)
    mean, cov = toy.ar_moments(theta, tau=1)
    assert_close(mean, data.mean(1))
    assert_close(cov, torch.stack([torch.cov(x.T, correction=0) for x in data]))
    at_rest = {name: p.clone().requires_grad_() for name, p in theta.items()}
    toy.ar_loss(at_rest, data).sum().backward()
    assert all(p.grad.abs().max() < 1e-10 for p in at_rest.values())


def test_loss_is_the_likelihood():
    theta = {
        name: torch.tensor([0.1 * i], dtype=torch.float64) for i, name in enumerate(["m", "log_s", "a", "b", "log_r"])
    }

    def density(y, x):
        point = torch.tensor([[[x, y]]], dtype=torch.float64)
        return math.exp(-float(toy.ar_loss(theta, point))) / (2 * math.pi)

    total, _ = dblquad(density, -9, 9, -12, 12, epsabs=1e-3)
    assert total == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.6])
def test_samples_have_the_moments(tau):
    theta = toy.ar_fit(toy.real_data(1, 1000, generator(1)))
    x = toy.ar_sample(theta, 400_000, tau, generator(2))[0]
    mean, cov = toy.ar_moments(theta, tau)
    assert_close(x.mean(0), mean[0], rtol=0, atol=0.01)
    assert_close(torch.cov(x.T), cov[0], rtol=0, atol=0.02)
    first = x[x[:, 0].sub(1).abs() < 0.05, 1]  # the temperature acts on each conditional
    assert first.var() == pytest.approx(tau * float((2 * theta["log_r"]).exp()), rel=0.05)


def exact_predictor(monkeypatch):
    """E[noise | x, t] for data from N(0, TARGET), in place of the network."""

    def predict(theta, x, t):
        share = toy.alpha_bar((t[0, 0, 0] * toy.TIMES).double())
        cov = share * toy.TARGET + (1 - share) * torch.eye(2)
        return ((1 - share).sqrt() * (x.double() @ torch.linalg.inv(cov))).float()

    monkeypatch.setattr(toy, "predict", predict)
    return {"0.weight": torch.zeros(1, 3, 1)}


def test_the_scaled_score_seeks_modes_or_spreads(monkeypatch):
    """With the exact score: fine steps and ζ = 1 reach the target; 1.1 falls short of its variance, 0.9 exceeds it."""
    theta = exact_predictor(monkeypatch)
    monkeypatch.setattr(toy, "STEPS", 500)
    noise = toy.even_noise(2048)
    spread = {zeta: torch.cov(toy.ddim(theta, noise, zeta)[0].T.double()) for zeta in (0.9, 1.0, 1.1)}
    assert_close(spread[1.0], toy.TARGET, rtol=0.03, atol=0.03)
    assert toy.trace(spread[1.1]) < 0.8 * toy.trace(toy.TARGET) < 1.2 * toy.trace(toy.TARGET) < toy.trace(spread[0.9])
    assert_close(toy.ddim_moments(theta, 1.1)[1][0], spread[1.1], rtol=1e-3, atol=1e-3)
    assert toy.frechet(*toy.ddim_moments(theta, 1.0)) < 0.01 < toy.frechet(*toy.ddim_moments(theta, 1.1))


def test_seeds_are_trained_side_by_side():
    """Two seeds at once are each what one alone is."""
    data = toy.real_data(2, 50, generator())
    start = toy.noise_predictor(2, generator(1))

    def loss(theta, rows):
        return (toy.predict(theta, data[rows], data[rows, :, :1]) - 1).square().mean((1, 2))

    both, squares = toy.train(lambda theta: loss(theta, slice(2)), start, 5, 1e-2)
    second = {name: p[1:] for name, p in start.items()}
    alone, alone_squares = toy.train(lambda theta: loss(theta, slice(1, 2)), second, 5, 1e-2)
    for name, p in alone.items():
        assert_close(p, both[name][1:], rtol=1e-4, atol=1e-6)
        assert_close(alone_squares[name], squares[name][1:], rtol=1e-4, atol=1e-9)
        assert not torch.equal(p, second[name])


def test_cosine():
    a = {"x": torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "y": torch.tensor([[0.0], [0.0]])}
    b = {"x": torch.tensor([[0.0, 2.0], [6.0, 8.0]]), "y": torch.tensor([[0.0], [1.0]])}
    flat = {"x": torch.ones(2, 2), "y": torch.full((2, 1), 1e30)}
    assert_close(toy.cosine(a, b, flat), torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(toy.cosine(a, {name: -g for name, g in a.items()}, flat), torch.tensor([-1.0, -1.0]).double())
    skewed = {"x": torch.tensor([[1.0, 16.0]] * 2), "y": torch.ones(2, 1)}  # by hand: (9 − 4) / (9 + 4)
    c = {"x": torch.tensor([[3.0, 4.0], [3.0, 4.0]]), "y": torch.zeros(2, 1)}
    d = {"x": torch.tensor([[3.0, -4.0], [3.0, -4.0]]), "y": torch.zeros(2, 1)}
    assert_close(toy.cosine(c, d, skewed), torch.full((2,), 5 / 13, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """In small; what it writes is what the pipeline's stage promises."""
    few = {"seeds": 2, "ar_seeds": 4, "epochs": 20, "fine_tunes": [2, 4], "gradient_samples": 100}
    notebook = ROOT / "notebooks" / "toy_gaussian.ipynb"
    papermill.execute_notebook(
        notebook, tmp_path / "toy_gaussian.ipynb", {"results": str(tmp_path), **few}, progress_bar=False
    )
    stage = yaml.safe_load((ROOT / "mini" / "dvc.yaml").read_text())["stages"]["toy"]
    promised = {Path(name).name for out in stage["outs"] for name in out}
    assert {file.name for file in tmp_path.iterdir()} == promised
    table = pd.read_csv(tmp_path / "toy.csv")
    assert len(table) == 2 * 2 * 2 + 2 * 3 * 2 and table[["positive", "negative"]].sum(axis=1).le(1 + 1e-6).all()
