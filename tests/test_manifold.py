"""Neighbours and slices: by hand, against loops over points, and against the distances as they were computed before."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch_fidelity.metric_prc import prc_features_to_metric

from neon import NeonError
from neon.measure import manifold
from neon.measure.manifold import AroundReal, around_real, recall
from neon.measure.mind import directions, mind


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def looped(real, generated, k):
    """The four definitions and recall, one pair of points at a time."""
    real, generated = real.numpy(), generated.numpy()

    def others(points, i):
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)

    balls = [others(real, i)[k - 1] for i in range(len(real))]
    held = [[np.linalg.norm(y - x) <= ball for x, ball in zip(real, balls)] for y in generated]
    authentic = []
    for y in generated:
        gaps = [np.linalg.norm(y - x) for x in real]
        nearest = int(np.argmin(gaps))
        authentic.append(gaps[nearest] > others(real, nearest)[0])
    back = [others(generated, j)[k - 1] for j in range(len(generated))]
    found = [any(np.linalg.norm(x - y) <= ball for y, ball in zip(generated, back)) for x in real]
    return AroundReal(
        float(np.mean([any(row) for row in held])),
        float(np.sum(held)) / (k * len(generated)),
        float(np.mean(np.any(held, axis=0))),
        100 * float(np.mean(authentic)),
    ), float(np.mean(found))


def test_by_hand():
    """Real images at 0, 1, 3, 7; with k = 1 the balls reach 1, 1, 2 and 4 far."""
    real = column(0, 1, 3, 7)
    # 0.5 is in the balls of 0 and 1; 10 in that of 7; 20 in none; 3 in those of 3 and 7.
    generated = column(0.5, 10, 20, 3)
    found = around_real(real, generated, k=1)
    assert found.precision == 3 / 4
    assert found.density == (2 + 1 + 0 + 2) / 4
    assert found.coverage == 1
    assert around_real(real, column(20, 10, 10), k=1).coverage == 1 / 4
    # Gaps to the nearest real image and from there to the next: 0.5 and 1, 3 and 4, 13 and 4, 0 and 2.
    assert found.authpct == 25
    # Of 0.5, 3, 10, 20 the balls reach 2.5, 2.5, 7 and 10 far, which holds all real images.
    assert recall(real, generated, k=1) == 1
    assert recall(real, column(20, 21), k=1) == 0


@pytest.mark.parametrize("k", [1, 3, 5])
def test_against_loops(k, monkeypatch):
    """Also in blocks of which the last is not full."""
    monkeypatch.setattr(manifold, "ROWS", 7)
    real, generated = normal(40, 3, seed=1), 0.8 * normal(25, 3, seed=2) + 0.4
    near, back = looped(real, generated, k)
    assert around_real(real, generated, k) == pytest.approx(near, abs=1e-12)
    assert recall(real, generated, k) == back
    assert all(0 < value < 100 for value in (*near, back))


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_recall_are_bit_for_bit_what_they_were(shift, dtype):
    real, generated = normal(1500, 32, seed=1).to(dtype), (normal(1100, 32, seed=2) * 0.9 + shift).to(dtype)

    def inside(points, around, k=5):
        radii = torch.cat([torch.cdist(part, around).kthvalue(k + 1).values for part in around.split(1024)])
        within = [(torch.cdist(part, around) <= radii).any(1) for part in points.split(1024)]
        return int(torch.cat(within).sum()) / len(points)

    x, y = real.double(), generated.double()
    assert around_real(real, generated).precision == inside(y, x)
    assert recall(real, generated) == inside(x, y)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_recall_are_those_of_torch_fidelity(k, shift, dtype):
    real, generated = normal(1500, 32, seed=1).to(dtype), (normal(1100, 32, seed=2) * 0.9 + shift).to(dtype)
    expected = prc_features_to_metric(generated, real, prc_neighborhood=k, verbose=False)
    found, back = around_real(real, generated, k).precision, recall(real, generated, k)
    # counts of images, so that their float32 quotients do not matter
    assert round(found * 1100, 9) == round(expected["precision"] * 1100, 3)
    assert round(back * 1500, 9) == round(expected["recall"] * 1500, 3)
    assert 0 < found < 1 and 0 < back < 1


def test_a_known_picture():
    """Real: two clusters. Generated: tightly in one of them, and some far away."""
    real = torch.cat([normal(100, 2), normal(100, 2) + 50])
    generated = torch.cat([normal(60, 2, seed=3) * 0.1, normal(40, 2, seed=4) * 0.1 - 1000])
    found = around_real(real, generated)
    assert found.precision == 0.6 and found.coverage < 0.5
    assert found.density > 0.6  # the middle of the cluster is in more balls than k
    assert recall(real, generated) < 0.5


@settings(max_examples=20, deadline=None)
@given(n=st.integers(7, 60), dim=st.integers(1, 40), offset=st.sampled_from([0.0, 1e4]), seed=st.integers(0, 9))
def test_a_set_covers_itself(n, dim, offset, seed):
    x = normal(n, dim, seed=seed) + offset
    found = around_real(x, x)
    assert (found.precision, found.coverage, recall(x, x)) == (1, 1, 1)
    assert found.density >= 1 and found.authpct == 0  # each is in its own ball and those of whose neighbour it is


def test_copies_are_not_authentic():
    real = normal(200, 8)
    copies, fresh = real[:30] + 1e-3, normal(30, 8, seed=7) + 10
    assert around_real(real, torch.cat([copies, fresh])).authpct == 50


def test_comparisons_need_enough_images_of_one_kind():
    for compare in (around_real, recall):
        with pytest.raises(NeonError, match="k = 5 needs more than 5 images, got 5 real and 9 generated"):
            compare(normal(5, 4), normal(9, 4))
    for compare in (around_real, recall, mind):
        with pytest.raises(NeonError, match="features of 4 and of 3 dimensions"):
            compare(normal(9, 4), normal(9, 3))


def test_no_matrix_of_all_pairs(monkeypatch):
    """What is computed at a time has ROWS rows, however many images there are."""
    sizes, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: sizes.append((len(a), len(b))) or cdist(a, b))
    around_real(normal(2500, 2), normal(1500, 2, seed=1))
    assert sum(rows for rows, _ in sizes) == 2500 + 1500  # each pair once
    assert max(rows for rows, _ in sizes) == 1024
    sizes.clear()
    recall(normal(2500, 2), normal(1500, 2, seed=1))
    assert sum(rows for rows, _ in sizes) == 2500 + 1500 and max(rows for rows, _ in sizes) == 1024


# ---- MIND


def test_mind_by_hand():
    """In one dimension every direction is ±1: three times the mean square of differences of equal rank."""
    assert mind(column(5, 0, 1), column(2, 0, 7)) == pytest.approx(3 * (0 + 1 + 4) / 3)


def test_mind_is_the_best_transport_of_each_projection():
    """Found by an assignment of points, without sorting; more real images than generated ones: a part of them."""
    x, y = normal(30, 6, seed=1), 1.2 * normal(30, 6, seed=2) + 0.3
    costs = []
    for u in directions(100, 6, torch.Generator().manual_seed(4)).numpy():
        pairs = (x.numpy() @ u)[:, None] - (y.numpy() @ u)[None]
        costs.append((pairs**2)[linear_sum_assignment(pairs**2)].mean())
    assert mind(x, y, projections=100, seed=4) == pytest.approx(3 * 6 * np.mean(costs), rel=1e-9)


def test_mind_of_a_shift_is_three_times_its_square():
    """E (u·δ)² = |δ|² / d; the mean over 1000 directions is off by 5 % or so."""
    x = normal(500, 12)
    shift = normal(12, seed=3)
    assert mind(x + shift, x) == pytest.approx(3 * float(shift @ shift), rel=0.15)
    assert mind(x, x.flip(0)) < 1e-25


def test_mind_of_sets_of_different_size():
    """Images of the larger set are drawn, always the same ones; either set may be the larger."""
    x, y = normal(400, 4), normal(900, 4, seed=1)
    assert mind(x, y) == mind(x, y) and mind(x, y) != mind(x, y[:400])
    assert mind(x, y) == pytest.approx(mind(normal(400, 4, seed=2), normal(400, 4, seed=3)), abs=0.2)
    assert 0 < mind(y, x) < 0.5 < mind(y + 1, x)
