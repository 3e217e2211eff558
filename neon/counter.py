"""Random numbers by a counter: Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) in plain PyTorch.

A number is a function of its image's seed, of how many draws that image had before, and of its place in the draw. So a
batch is one computation, not one for each image, and every device makes the same numbers: integers and uniforms to the
bit, normals and exponentials to the rounding of log and cos in float64.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from neon import NeonError
from neon.sampling import Streams

WORD = 0xFFFFFFFF
MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
AT_ONCE = 2**22  # numbers made at a time: their int64 words and intermediates take some 150 MB


def philox(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Four words from four words of counter and two of key: int64 tensors in [0, 2^32) that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [c0, c1, c2, c3]


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a · b. int64 wraps around, which keeps all 64 bits of the product."""
    product = a * b
    return (product >> 32) & WORD, product & WORD


class Counted(Streams):
    """Streams whose numbers are counted, not kept as the state of a generator. Seeds are taken modulo 2^64."""

    def __init__(self, seeds: torch.Tensor | Sequence[int], device: torch.device | str = "cpu"):
        super().__init__(seeds, device)
        self.draws = 0

    @property
    def generators(self) -> list[torch.Generator]:
        raise NeonError("this sampler draws from torch's generators: leave out --streams counter")

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._draw(shape, dtype, _normals)

    def rand(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        digits = {torch.float64: 32, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
        return self._draw(shape, dtype, lambda words: (words >> (32 - digits)).double() / 2**digits)

    def randint(self, high: int) -> torch.Tensor:
        """Also: high is at most 2^31; a value's probability is 1 / high to 2^-32."""
        return self._draw((), torch.int64, lambda words: words * high >> 32)

    def exponential(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._draw(shape, dtype, lambda words: -_inside(words).log())

    def _draw(self, shape: Sequence[int], dtype: torch.dtype, of) -> torch.Tensor:
        """(N, *shape) of the dtype. of: words (n, 4 blocks) int64 → as many numbers."""
        count = math.prod(shape)
        out = torch.empty(len(self), count, dtype=dtype, device=self.device)
        for rows, words in self._words(count):
            out[rows] = of(words)[:, :count].to(dtype)
        self.draws += 1
        return out.view(len(self), *shape)

    def _words(self, count: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Of some images at a time, at least `count` words each, (n, 4 blocks) int64 in [0, 2^32)."""
        seeds = torch.as_tensor(self.seeds, dtype=torch.int64, device=self.device)[:, None]
        block = torch.arange(-(-count // 4), device=self.device)[None]
        zero = torch.zeros_like(block)
        at_a_time = max(AT_ONCE // max(count, 1), 1)
        for start in range(0, len(self), at_a_time):
            rows = slice(start, start + at_a_time)
            key = seeds[rows] & WORD, (seeds[rows] >> 32) & WORD
            words = philox((block, zero + self.draws, zero, zero), key)
            yield rows, torch.stack(words, -1).flatten(1)


def _inside(words: torch.Tensor) -> torch.Tensor:
    """Uniform in (0, 1), float64."""
    return (words.double() + 0.5) / 2**32


def _normals(words: torch.Tensor) -> torch.Tensor:
    """Two of every two words (Box and Muller 1958), float64, up to 6.7 in size."""
    u, v = _inside(words).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)
