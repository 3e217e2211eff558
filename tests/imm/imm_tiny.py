"""The small IMM network of the golden vectors, and how to read those."""

from pathlib import Path

import numpy as np
import torch
from fill import fill_parameters

from imm.network import IMMPrecond

GOLDEN = Path(__file__).parents[1] / "golden" / "imm"
TINY = {
    "model_type": "DiT",
    "img_resolution": 8,
    "img_channels": 4,
    "label_dim": 10,
    "num_classes": 10,
    "patch_size": 2,
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 4,
}


def golden(stem: str) -> dict:
    """The arrays of one file: numbers as tensors, texts as numpy arrays."""
    with np.load(GOLDEN / f"{stem}.npz") as data:
        return {key: torch.from_numpy(a) if a.dtype.kind in "fiu" else a for key, a in data.items()}


def tiny(**options) -> IMMPrecond:
    """The net `tiny` of golden/imm/README.md with its deterministic weights."""
    return fill_parameters(IMMPrecond(**(TINY | options)))


def near(got, want, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
