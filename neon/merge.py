"""Neon in one screen: θ_neon = θ_r − w (θ_s − θ_r) = (1 + w) θ_r − w θ_s   (arXiv 2510.03597, Eq. 1).

θ_r is the trained base, θ_s the same network after a brief fine-tune on its own samples, w > 0 the strength of the
reversal. w = 0 is the base, w = −1 is the self-trained model.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from neon import NeonError


def merge_tensor(base: torch.Tensor, selftrained: torch.Tensor, w: float) -> torch.Tensor:
    """θ_r − w (θ_s − θ_r), computed in at least float32 and returned in base's dtype and on its device.

    The difference form loses nothing when θ_s ≈ θ_r, where (1 + w) θ_r − w θ_s cancels; it also returns a tensor that
    is equal on both sides (a buffer) unchanged.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    reference = base.to(wide)
    drift = selftrained.to(base.device, wide) - reference
    return (reference - w * drift).to(base.dtype)


def merge(
    base: Mapping[str, torch.Tensor],
    selftrained: Mapping[str, torch.Tensor],
    w: float,
    is_buffer: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, merged tensor) in base's order, one at a time.

    Learned parameters are merged. Taken from the base as they are: tensors that are not floating point, tensors for
    which is_buffer(name), and all of them if w = 0. Raises NeonError, naming the tensor, if names or shapes differ,
    if a weight is not finite before or after (an infinity that is the same on both sides is a mask, hence a buffer),
    or if w is not finite.
    """
    if not math.isfinite(w):
        raise NeonError(f"w must be finite, not {w}")
    check_same_names(base, selftrained)
    for name in base:
        old, new = base[name], selftrained[name]
        if old.shape != new.shape:
            raise NeonError(
                f"{name}: shape {tuple(old.shape)} in the base, {tuple(new.shape)} in the self-trained model"
            )
        if not old.is_floating_point() or is_buffer(name):
            yield name, old
            continue
        check_finite(name, old, new)
        if w == 0 or old.isinf().any():
            yield name, old
            continue
        merged = merge_tensor(old, new, w)
        if not merged.isfinite().all():
            raise NeonError(f"{name}: not finite after merging with w = {w} in {old.dtype}")
        yield name, merged


def check_same_names(base: Mapping, selftrained: Mapping) -> None:
    for ours, theirs, side in ((base, selftrained, "self-trained model"), (selftrained, base, "base")):
        missing = [name for name in ours if name not in theirs]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise NeonError(f"{missing[0]}{more}: missing in the {side}")


def check_finite(name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    for tensor, side in ((old, "base"), (new, "self-trained model")):
        if not tensor.isfinite().all() and (tensor.isnan().any() or not torch.equal(old, new)):
            raise NeonError(f"{name}: not finite in the {side}")
