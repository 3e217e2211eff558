"""Dropout whose masks belong to images, not to forward passes.

PyTorch draws a mask for a whole batch, so an image's mask depends on which images share its forward pass. Here every
image of a training step has its own random stream (neon.sampling.Streams), and its masks are drawn from that stream:
micro-batches and processes share a step without changing it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from neon.sampling import Streams, new_streams

_streams: Streams | None = None  # of the images in the forward pass that runs now


@contextmanager
def masks_of(seeds: torch.Tensor, device: torch.device | str) -> Iterator[None]:
    """Inside, row i of whatever `dropout` is given belongs to the image with stream seeds[i]; seeds: (n,) int64."""
    with drawn_from(new_streams(seeds, device)):
        yield


@contextmanager
def drawn_from(streams: Streams | None) -> Iterator[None]:
    """Inside, masks are drawn from these streams, as `copied` gives them."""
    global _streams
    outer, _streams = _streams, streams
    try:
        yield
    finally:
        _streams = outer


def copied() -> Streams | None:
    """The streams of the masks to come, so that they can be drawn twice; None outside of `masks_of`."""
    return None if _streams is None else _streams.copy()


def dropout(x: torch.Tensor, p: float, training: bool = True) -> torch.Tensor:
    """Zero each value of x (n, …) with probability p and scale the others by 1 / (1 − p), as F.dropout does.

    Outside of `masks_of` it is F.dropout.
    """
    if not training or p == 0:
        return x
    if _streams is None:
        return F.dropout(x, p)
    kept = _streams.rand(x.shape[1:]) >= p
    return torch.where(kept, x / (1 - p), 0)


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout with the masks of `dropout`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p, self.training)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, p: float, training: bool
) -> torch.Tensor:
    """F.scaled_dot_product_attention whose weights are dropped with probability p while training.

    q (n, heads, tokens, d), k and v (n, heads, others, d); mask: added to the logits. The fused kernels draw their own
    masks, so with dropout the weights are formed.
    """
    if not training or p == 0 or _streams is None:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p if training else 0.0)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return dropout(weights, p) @ v
