"""Sampling: K passes, one a scale, with guidance that grows over the scales."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from neon import Diverged, NeonError
from neon.sampling import Streams
from VAR.transformer import Transformer
from VAR.vqvae import Quantizer


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """logits (…, V) with −inf for what may not be drawn: all below the k-th largest, then the tail of mass 1 − p.

    Ties with the k-th largest stay. 0 turns either filter off. Raises NeonError for values out of range.
    """
    if not 0 <= top_k <= logits.shape[-1]:
        raise NeonError(f"top_k must lie between 0 and the {logits.shape[-1]} codes, not {top_k}")
    if not 0 <= top_p <= 1:
        raise NeonError(f"top_p must lie between 0 and 1, not {top_p}")
    if top_k:
        kth = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p:
        ascending, order = logits.sort(dim=-1)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[..., -1] = False  # the largest always stays
        logits = logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
    return logits


def race(probs: Tensor, streams: Streams) -> Tensor:
    """Draw from each distribution: probs (B, n, V) → ids (B, n).

    The code whose exponential clock of rate p rings first. An image's draws depend on its stream alone, and a
    small change of probs changes few draws, so models compared on the same seeds share most of their noise.
    """
    return (probs / streams.exponential(probs.shape[1:]).to(probs.device)).argmax(-1)


def smooth_vectors(logits: Tensor, streams: Streams, codes: Tensor, progress: float) -> Tensor:
    """Average of the codes (V, c) under Gumbel-softmax weights that sharpen as progress goes from 0 to 1; (B, n, c)."""
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    gumbel = -streams.exponential(logits.shape[1:]).to(logits.device).log()
    return ((logits * (1 + progress) + gumbel) / temperature).softmax(-1) @ codes


@torch.no_grad()
def sample_codes(
    transformer: Transformer,
    quantizer: Quantizer,
    labels: Tensor | None,
    streams: Streams,
    *,
    cfg: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    temperature: float = 1.0,
    more_smooth: bool = False,
    draw: Callable[[Tensor, Streams], Tensor] = race,
) -> tuple[Tensor, Tensor]:
    """Draw the codes of len(streams) images: ids (B, L) int64 and f̂ (B, c, P, P) float32.

    labels: (B,) int64, negative for "no class"; None draws them from the streams. cfg = 0 is no guidance; scale k
    uses cfg·k/(K−1). Logits are divided by temperature. draw(probs (B, n, V), streams) → ids (B, n).
    more_smooth: f̂ is made of smooth_vectors instead of the drawn codes. Raises NeonError for impossible options,
    Diverged if logits are not finite.
    """
    classes, sides = transformer.config.classes, quantizer.sides
    if temperature <= 0:
        raise NeonError(f"temperature must be positive, not {temperature}")
    if labels is None:
        labels = streams.randint(classes)
    if labels.max() >= classes:
        raise NeonError(f"labels must be below {classes}, not {labels.max()}")
    labels = labels.to(transformer.pos_start.device)
    labels = torch.where(labels < 0, classes, labels)
    if cfg:
        labels = torch.cat([labels, torch.full_like(labels, classes)])
    s = transformer.class_emb(labels)

    codes = quantizer.embedding.weight
    f_hat = codes.new_zeros(len(streams), codes.shape[1], sides[-1], sides[-1])
    inputs = codes.new_zeros(len(streams), 0, codes.shape[1])
    cache, drawn, finite = [None] * transformer.config.depth, [], torch.ones((), dtype=torch.bool, device=s.device)
    for k in range(len(sides)):
        progress = k / max(len(sides) - 1, 1)
        logits = transformer.next_scale(s, inputs.repeat(2 if cfg else 1, 1, 1), k, cache)
        if cfg:
            conditional, unconditional = logits.chunk(2)
            weight = cfg * progress
            logits = (1 + weight) * conditional - weight * unconditional
        finite &= logits.isfinite().all()
        logits = filter_logits(logits / temperature, top_k, top_p)
        ids = draw(logits.softmax(-1), streams)
        vectors = smooth_vectors(logits, streams, codes, progress) if more_smooth else F.embedding(ids, codes)
        f_hat = f_hat + quantizer.refine(vectors, k)
        drawn.append(ids)
        if k + 1 < len(sides):
            inputs = quantizer.tokens(f_hat, k + 1)
    if not finite:  # codes can be drawn from NaN, too
        raise Diverged("the transformer's logits are not finite")
    return torch.cat(drawn, dim=1), f_hat
