"""Which images are made, by whom, from which random numbers.

An image is named by its seed. Each seed owns a random stream, so image i is the same whatever the
batch it is made in and however many processes share the work.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property

import torch

from neon import Diverged, NeonError


class Streams:
    """One random generator per image; every draw returns one row per image.

    seeds: (N,) int64, taken modulo 2^32. The numbers depend on the device type: CUDA and CPU generators
    give different streams for the same seed (as in EDM, whose samples are made with CUDA generators).
    The meta device has no generator: its tensors have no values to draw.
    """

    def __init__(self, seeds: torch.Tensor | Sequence[int], device: torch.device | str = "cpu"):
        self.seeds, self.device = seeds, torch.device(device)

    @cached_property
    def generators(self) -> list[torch.Generator]:
        device = "cpu" if self.device.type == "meta" else self.device
        return [torch.Generator(device).manual_seed(int(seed) % 2**32) for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def copy(self) -> "Streams":
        """Streams that will draw what these would draw next."""
        other = copy(self)
        if "generators" in vars(self):  # something was drawn
            other.generators = [generator.clone_state() for generator in self.generators]
        return other

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normals, (N, *shape)."""
        return self._stack(torch.randn, shape, dtype)

    def rand(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Uniforms in [0, 1), (N, *shape)."""
        return self._stack(torch.rand, shape, dtype)

    def randint(self, high: int) -> torch.Tensor:
        """Integers in [0, high), (N,) int64."""
        return torch.stack([torch.randint(high, (), generator=g, device=self.device) for g in self.generators])

    def exponential(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Exp(1) noise, (N, *shape)."""
        out = torch.empty(len(self), *shape, dtype=dtype, device=self.device)
        for row, generator in zip(out, self.generators):
            row.exponential_(generator=generator)
        return out

    def _stack(self, draw, shape, dtype):
        out = torch.empty(len(self), *shape, dtype=dtype, device=self.device)
        for row, generator in zip(out, self.generators):
            draw(row.shape, generator=generator, dtype=dtype, device=self.device, out=row)
        return out


_kind = "torch"  # of the streams that are made now


def new_streams(seeds: torch.Tensor | Sequence[int], device: torch.device | str = "cpu") -> Streams:
    """Streams of the kind in force: 'torch', a generator for each image, as EDM's released code has, which made all
    published numbers; 'counter' inside of `drawn_by`, which costs a GPU less and is the same on every device."""
    if _kind == "torch":
        return Streams(seeds, device)
    from neon.counter import Counted

    return Counted(seeds, device)


@contextmanager
def drawn_by(kind: str) -> Iterator[None]:
    """Inside, `new_streams` makes streams of that kind: 'torch' or 'counter'."""
    global _kind
    outer, _kind = _kind, kind
    try:
        yield
    finally:
        _kind = outer


def start(
    seeds: torch.Tensor | Sequence[int],
    shape: Sequence[int],
    classes: int = 0,
    labels: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor | None, Streams]:
    """What each seed draws first: noise (N, *shape) float32, then a class (N,) if the model has any.

    Also returns the streams, for what is drawn later: it does not depend on whether labels are given, for the class is
    drawn all the same. The classes are None for an unconditional model. Raises NeonError if labels do not go with the
    seeds or the model.
    """
    if labels is not None and not classes:
        raise NeonError("this network is unconditional: sample it without class labels")
    if labels is not None and len(labels) != len(seeds):
        raise NeonError(f"{len(seeds)} seeds but {len(labels)} class labels")
    if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise NeonError(f"class labels must lie in 0..{classes - 1}")
    streams = new_streams(seeds, device)
    noise = streams.randn(shape)
    drawn = streams.randint(classes) if classes else None
    return noise, drawn if labels is None else labels.to(device), streams


def to_uint8(images: torch.Tensor, nearest: bool = False) -> torch.Tensor:
    """Images (N, …) of any float dtype, about [-1, 1] → uint8. Each family keeps the rule of its published numbers.

    By default the fraction of a level is cut off, in float32 (VAR, xAR, IMM); the released code does that in the
    decoder's float16, which moves 4 % of the pixels by one level. nearest: half a level is added first, in float64
    (EDM). Raises Diverged if a pixel is not finite: it would become black and show as a slightly worse FID.
    """
    finite = images.isfinite().reshape(len(images), -1).all(1)
    if not finite.all():
        raise Diverged(f"{int((~finite).sum())} of {len(images)} images have pixels that are not finite")
    if nearest:
        return (127.5 * images.double() + 128).clamp(0, 255).to(torch.uint8)
    return ((images.float() + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 → float32 in [-1, 1], as networks of pixels are trained on."""
    return images.float() / 127.5 - 1


def parse_seeds(text: str) -> torch.Tensor:
    """'0-4', '1,3,8-10' → (N,) int64, in the order written. Raises NeonError."""
    ranges = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise NeonError(f"not a list of seeds: {text!r} (write 0-49999 or 1,2,5-9)") from None
        if high < low:
            raise NeonError(f"empty range of seeds: {part.strip()!r}")
        if high >= 2**63 or high - low >= 2**31:
            raise NeonError(f"seeds out of range: {part.strip()!r}")
        ranges.append(torch.arange(low, high + 1))
    return torch.cat(ranges)


def whole_batches(sample: Callable[[torch.Tensor], torch.Tensor], batch: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same images, made `batch` at a time: fewer seeds are filled up with repeats, whose images are dropped.

    So a compiled network meets one shape and is compiled once. sample: seeds (b,) → (b, …).
    """

    def filled_up(seeds: torch.Tensor) -> torch.Tensor:
        return sample(seeds[torch.arange(batch) % len(seeds)])[: len(seeds)]

    return lambda seeds: sample(seeds) if len(seeds) >= batch else filled_up(seeds)


def part_of(n: int, rank: int, world_size: int) -> slice:
    """The part of range(n) that a rank works on: parts differ by one at most, and some are empty if n < world_size."""
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


def shard(n: int, rank: int, world_size: int, batch: int) -> list[slice]:
    """The batches of rank: contiguous slices of at most `batch` that cover its part of range(n)."""
    part = part_of(n, rank, world_size)
    return [slice(i, min(i + batch, part.stop)) for i in range(part.start, part.stop, batch)]
