"""Networks and velocities that the tests of flow matching share."""

import json
from pathlib import Path

import numpy as np
import torch
from fill import fill_parameters

from flow.network import UNet

GOLDEN = Path(__file__).parents[1] / "golden" / "flow"
MANIFEST = json.loads((GOLDEN / "manifest_cifar10.json").read_text())
SMALL = {"dim": [3, 8, 8], "num_channels": 128, "num_res_blocks": 1, "attention_resolutions": [4]}


def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "unet.npz") as file:
        return {name: torch.from_numpy(array) for name, array in file.items()}


def filled(**options) -> UNet:
    return fill_parameters(UNet(**options)).eval()


def gaussian_velocity(mean, std):
    """The velocity of the flow from N(0, 1) to N(mean, std²), independent in every coordinate (exact)."""

    def velocity(x, t, labels=None):
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity
