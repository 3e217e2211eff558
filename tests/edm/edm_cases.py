"""The tiny networks and stored arrays that the golden tests of EDM share."""

from pathlib import Path

import numpy as np
import torch
from fill import fill_parameters

from edm.network import EDMPrecond

GOLDEN = Path(__file__).parents[1] / "golden" / "edm"

TINY = {
    "cond": {"img_resolution": 16, "label_dim": 10, "channel_mult": [2, 2, 2]},
    "uncond": {"img_resolution": 16, "label_dim": 0, "channel_mult": [2, 2, 2]},
    "ffhq": {"img_resolution": 32, "label_dim": 0, "channel_mult": [1, 2, 2, 2]},
}


def golden(name):
    """Arrays of a golden file: numbers as tensors, names as they are."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: value if value.dtype.kind == "U" else torch.from_numpy(value) for key, value in file.items()}


def tiny_net(name):
    net = EDMPrecond(
        **TINY[name],
        use_fp16=False,
        model_type="SongUNet",
        embedding_type="positional",
        encoder_type="standard",
        decoder_type="standard",
        channel_mult_noise=1,
        resample_filter=[1, 1],
        augment_dim=9,
        dropout=0.0,
        num_blocks=2,
        img_channels=3,
        model_channels=16,
        attn_resolutions=[8],
    )
    return fill_parameters(net).eval()


def digits_net(**options):
    """The smallest useful configuration, for 8x8 images of one channel."""
    options = {"label_dim": 10, "attn_resolutions": [4], "augment_dim": 0, "dropout": 0.0, **options}
    return EDMPrecond(8, 1, model_channels=16, channel_mult=[1, 2], num_blocks=1, **options)
