"""The training loop against four steps of EDM's."""

import json
from types import SimpleNamespace

import pytest
import torch
from edm_cases import golden, tiny_net
from torch.testing import assert_close

from edm.loss import loss_map
from neon.distributed import World
from neon.family import Recipe
from neon.selftrain import train
from neon.weights.checkpoint import load_weights

RECIPE = Recipe(batch=4, lr=1e-3, budget=16, snapshot=4, ramp=16, ema_halflife=50, clean_grads=True)


class Blank:
    """Four images' worth of data: the stored draws stand for the images too."""

    labels, shape = None, ()

    def __len__(self):
        return 4

    def images(self, indices):
        return torch.zeros(len(list(indices)), 3, 16, 16, dtype=torch.uint8)


def test_four_steps(tmp_path):
    g = golden("train_steps")
    steps = iter(range(4))

    def loss(net, images, _labels, _draws):
        k = next(steps)
        names = ("augmented", "augment_labels", "rnd_normal", "noise_unit")
        augmented, augment_labels, level, noise = (g[f"s{k}_{name}"] for name in names)
        labels = torch.eye(10)[k : k + 4]
        return loss_map(net, augmented, labels, augment_labels, level, noise).sum() / len(images)

    family = SimpleNamespace(
        check=lambda *_: None,
        draw=lambda *_, **__: None,
        loss=loss,
        weights=lambda model: model,
        metadata=lambda model: {},
    )
    net = tiny_net("cond")
    snapshots = train(family, net, Blank(), RECIPE, tmp_path, world=World(), raw=True)
    assert [path.name for path in snapshots] == [f"snapshot-{n:09d}.safetensors" for n in (4, 8, 12, 16)]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    parameters = [name for name, _ in net.named_parameters()]
    table = g["lr_beta_loss_netsq_emasq"].tolist()
    for k, (lr, beta, mean_loss, net_squares, ema_squares) in enumerate(table):
        ema = load_weights(snapshots[k])
        raw = load_weights(tmp_path / snapshots[k].name.replace("snapshot", "raw"))
        assert log[k]["images"] == 4 * (k + 1)
        assert log[k]["lr"] == pytest.approx(lr, rel=1e-12) and RECIPE.ema_beta() == pytest.approx(beta, rel=1e-12)
        assert log[k]["loss"] == pytest.approx(mean_loss, rel=1e-4)
        for state, squares in ((raw, net_squares), (ema, ema_squares)):
            total = sum(state[name].double().square().sum().item() for name in parameters)
            assert total == pytest.approx(squares, rel=1e-6)
        for state, name in ((raw, "net"), (ema, "ema")):
            assert_close(state["model.enc.16x16_conv.weight"], g[f"s{k}_{name}_conv_w"], rtol=0, atol=2e-4)
