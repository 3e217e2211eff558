"""xAR sampling against the original's numbers (golden/xar/README.md), and what must not change an image."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_parameters, inputs

from neon import NeonError
from neon.sampling import Streams
from xAR.configs import NETWORKS
from xAR.family import new_transformer
from xAR.network import XAR, to_cells
from xAR.sampler import cell_guidance, drift, sample, time_grid

GOLDEN = Path(__file__).parents[1] / "golden" / "xar"


def golden(case):
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def time_ids(t):
    return (1000 * t.float()).trunc().long()


class Recorded:
    """The recorded draws of a golden case in place of random streams."""

    def __init__(self, case, images, steps):
        self.images = images
        self.draws = []
        for cell in range(4):
            self.draws.append(inputs(case, f"latent{cell}", (images, 64, 16)))
            self.draws += [inputs(case, f"eps{cell}_{n}", (images, 64, 16)) for n in range(steps - 1)]

    def __len__(self):
        return self.images

    def randn(self, shape, dtype=torch.float32):
        draw = self.draws.pop(0)
        assert draw.shape[1:] == tuple(shape)
        return draw.to(dtype)


def digits(seed=0):
    torch.manual_seed(seed)
    return new_transformer(NETWORKS["digits"]).eval()


@pytest.mark.parametrize(
    ("case", "images", "steps", "cfg"), [("sample_s4_cfg2.7", 2, 4, 2.7), ("sample_s3_cfg1", 1, 3, 1.0)]
)
def test_against_the_original(case, images, steps, cfg):
    expected = golden(case)
    model = fill_parameters(XAR(dim=32, depth=2, heads=2)).eval()
    calls, streams = [], Recorded(case, images, steps)
    model.register_forward_hook(lambda _, args, out: calls.append((args, out[:, -64:])))
    tokens = sample(model, streams, expected["labels"], cfg=cfg, steps=steps)

    assert not streams.draws
    torch.testing.assert_close(tokens, expected["tokens"], rtol=1e-4, atol=1e-4)
    cells = torch.stack(to_cells(tokens, 8).split(64, 1)).double()
    torch.testing.assert_close(cells, expected["cells"], rtol=1e-4, atol=1e-4)
    assert [args[0].shape[1] for args, _ in calls] == expected["calls"][:, 1].tolist()
    assert [time_ids(args[1][0, -1]).item() for args, _ in calls] == expected["time_ids"].tolist()
    for (_, velocity), both in zip(calls, expected["velocities"]):  # the original always computes both halves
        torch.testing.assert_close(velocity, both[: len(velocity)], rtol=1e-4, atol=1e-4)
    doubled = [len(velocity) == 2 * images for _, velocity in calls]
    assert doubled == [cfg > 1 and cell > 0 for cell in expected["calls"][:, 0].tolist()]


def test_tables():
    expected = golden("tables")
    for steps in (3, 4, 40, 50):
        grid = time_grid(steps)
        torch.testing.assert_close(grid, expected[f"grid_{steps}"], rtol=1e-15, atol=0)
        assert time_ids(grid[:-1]).tolist() == expected[f"grid_ids_{steps}"].tolist()
    guidance = torch.tensor(cell_guidance(2.7, 4), dtype=torch.float64)
    torch.testing.assert_close(guidance, expected["cfg_per_cell_2.7"])
    v, x = (inputs("tables", name, (2, 5, 16)).double() for name in "vx")
    for i, t in enumerate([1.0, 0.36]):
        torch.testing.assert_close(drift(v[i], x[i], t), v[i] - t * expected["score"][i])


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 5])
def test_cache_equals_full_recomputation(cfg, steps):
    """The clean cells' cached keys and values stand for the clean cells themselves, at time 0."""
    model, labels, seeds = digits(), torch.tensor([3, 9]), [11, 12]
    cached = sample(model, Streams(seeds), labels, cfg=cfg, steps=steps)

    streams, clean = Streams(seeds), torch.empty(2, 0, 4, dtype=torch.float64)
    with torch.no_grad():
        for cell, gamma in enumerate(cell_guidance(cfg, 4)):
            x = streams.randn((4, 4)).double()
            for t, t_next in pairwise(time_grid(steps).tolist()):
                sequence = torch.cat([clean, x], 1).float()
                times = torch.tensor([[0.0] * cell + [t]] * 2)
                with_label, without = (model(sequence, times, y)[:, -4:].double() for y in (labels, labels * 0 + 10))
                v = without + gamma * (with_label - without)
                x = x + drift(v, x, t) * (t_next - t)
                if t_next:
                    x = x + (2 * t) ** 0.5 * (t - t_next) ** 0.5 * streams.randn((4, 4), torch.float64)
            clean = torch.cat([clean, x], 1)
    torch.testing.assert_close(to_cells(cached, 2), clean.float(), rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch():
    model, seeds, labels = digits(), [5, 6, 7, 5], torch.tensor([0, 4, 9, 1])
    together = sample(model, Streams(seeds), labels, cfg=2.0, steps=4)
    for part in ([0], [1], [2], [3], [2, 0], [3, 1, 2]):
        some = sample(model, Streams([seeds[i] for i in part]), labels[part], cfg=2.0, steps=4)
        torch.testing.assert_close(some, together[part], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[3]).abs().max() > 0.01  # the same seed with another label


def test_the_first_cell_is_never_guided():
    model, labels = digits(), torch.tensor([2])
    plain, guided = (to_cells(sample(model, Streams([1]), labels, cfg=cfg, steps=3), 2) for cfg in (1.0, 4.0))
    torch.testing.assert_close(plain[:, :4], guided[:, :4])
    assert all((plain - guided)[:, i : i + 4].abs().max() > 1e-3 for i in (4, 8, 12))


def test_no_label_is_the_last_row():
    model = digits()
    seen = []
    model.register_forward_hook(lambda _, args, out: seen.append(args[2]))
    sample(model, Streams([1, 2]), None, steps=2)
    assert all(labels.tolist() == [10, 10] for labels in seen)


def test_autocast_keeps_the_state_in_full_precision():
    model, labels = digits(), torch.tensor([2, 3])
    full = sample(model, Streams([1, 2]), labels, cfg=2.0, steps=4)
    with torch.autocast("cpu", torch.bfloat16):
        low = sample(model, Streams([1, 2]), labels, cfg=2.0, steps=4)
    assert low.dtype == torch.float32
    assert 0 < (low - full).abs().max() < 0.2


@pytest.mark.parametrize(
    ("labels", "options"),
    [([0], {"steps": 1}), ([0], {"cfg": 0.5}), ([0], {"cfg": float("nan")}), ([0, 1], {}), ([10], {}), ([-1], {})],
)
def test_refuses(labels, options):
    with pytest.raises(NeonError):
        sample(digits(), Streams([0]), torch.tensor(labels), **options)
