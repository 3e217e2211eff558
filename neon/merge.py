"""Neon in one screen: θ_neon = θ_r − w (θ_s − θ_r) = (1 + w) θ_r − w θ_s   (arXiv 2510.03597, Eq. 1).

θ_r is the trained base, θ_s the same network after a brief fine-tune on its own samples, w > 0 the strength of the
reversal. w = 0 is the base, w = −1 is the self-trained model.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from neon import Diverged, NeonError

EQUAL = "equal on both sides"  # a reason to keep the base's tensor


def merge_tensor(base: torch.Tensor, selftrained: torch.Tensor, w: float) -> torch.Tensor:
    """θ_r − w (θ_s − θ_r), computed in at least float32 and returned in base's dtype and on its device.

    The difference form loses nothing when θ_s ≈ θ_r, where (1 + w) θ_r − w θ_s cancels.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    reference = base.to(wide)
    drift = selftrained.to(base.device, wide) - reference
    return drift.mul_(-w).add_(reference).to(base.dtype)


def merge_modules(base: torch.nn.Module, selftrained: torch.nn.Module, w: float) -> dict[str, torch.Tensor]:
    """The merged state dict of two modules of one architecture, for load_state_dict; buffers are the base's.

    Raises NeonError as merge does. Tensors taken from the base share its memory.
    """
    buffers = dict(base.named_buffers(remove_duplicate=False))  # all names of a buffer that has several
    return dict(merge(base.state_dict(), selftrained.state_dict(), w, buffers.__contains__))


@torch.no_grad()
def merge(
    base: Mapping[str, torch.Tensor],
    selftrained: Mapping[str, torch.Tensor],
    w: float,
    is_buffer: Callable[[str], bool] = lambda name: False,
    observe: Callable[[str, torch.Tensor, torch.Tensor, str | None], None] = lambda *seen: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, merged tensor) in base's order, one at a time.

    Learned parameters are merged; the rest is taken from the base as it is, see reason_to_keep. With w = 0 all of it
    is. observe(name, θ_r's tensor, θ_s's tensor, reason to keep or None) is called before each is yielded.
    Raises NeonError, naming the tensor, if names or shapes differ or a weight is not finite, and if w is not finite;
    Diverged if the merge alone overflows.
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
        reason = reason_to_keep(name, old, new, is_buffer)
        observe(name, old, new, reason)
        merged = merge_tensor(old, new, w) if w and not reason else old
        if not reason and not is_finite(merged):
            if is_finite(old) and is_finite(new):
                raise Diverged(f"{name}: not finite in the merge with w = {w} in {old.dtype}")
            raise NeonError(f"{name}: not finite in the {'self-trained model' if is_finite(old) else 'base'}")
        yield name, merged


def reason_to_keep(name: str, old: torch.Tensor, new: torch.Tensor, is_buffer: Callable[[str], bool]) -> str | None:
    """Why θ_neon has the base's tensor: 'buffer', 'not floating point', 'equal on both sides'; None: it is merged."""
    if is_buffer(name):
        return "buffer"
    if not (old.is_floating_point() or old.is_complex()):
        return "not floating point"
    both = torch.promote_types(old.dtype, new.dtype)
    equal = torch.equal(old.to(both), new.to(old.device, both))  # frozen layers, and masks with their infinities
    return EQUAL if equal else None


def check_same_names(base: Mapping, selftrained: Mapping) -> None:
    for ours, theirs, side in ((base, selftrained, "self-trained model"), (selftrained, base, "base")):
        missing = [name for name in ours if name not in theirs]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise NeonError(f"{missing[0]}{more}: missing in the {side}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Ten times faster than tensor.isfinite().all(): NaN propagates into both extremes."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in tensor.aminmax())
