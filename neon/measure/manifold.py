"""Fidelity, diversity and copying, by nearest neighbours among the features of real and of generated images.

Real images fill a region: the union of a ball around each of them that reaches to its k-th nearest neighbour. Generated
images are compared with these balls, and for recall the other way round. All counts are exact, in float64. Distances
are computed for ROWS images against all others at a time: no (n, n) matrix is kept.
"""

from typing import NamedTuple

import torch

from neon import NeonError
from neon.measure.metrics import in_float64

ROWS = 1024  # images at a time: with 50 000 others 0.4 GB of distances


class AroundReal(NamedTuple):
    """How generated images lie among real ones.

    precision: fraction of generated images in at least one ball (Kynkäänniemi et al. 2019); density: number of balls
    that a generated image is in, mean over images, divided by k, so that it may exceed 1; coverage: fraction of balls
    that hold at least one generated image (both Naeem et al. 2020); authpct: per cent of generated images that are
    farther from their nearest real image than this one is from its nearest other real image (Alaa et al. 2022).
    """

    precision: float
    density: float
    coverage: float
    authpct: float


def around_real(real: torch.Tensor, generated: torch.Tensor, k: int = 5) -> AroundReal:
    """Of features (n, d), (m, d), from one pass over the distances: n·n of real images, m·n between the two.

    A point on the border of a ball is in it. Raises NeonError.
    """
    real, generated = _checked(real, generated, k)
    nearest, radii = _reach(real, k)
    inside, balls, authentic, covered = 0, 0, 0, torch.zeros_like(radii, dtype=torch.bool)
    for block in generated.split(ROWS):
        distances = torch.cdist(block, real)
        within, closest = distances <= radii, distances.min(1)
        inside += int(within.any(1).sum())
        balls += int(within.sum())
        covered |= within.any(0)
        authentic += int((closest.values > nearest[closest.indices]).sum())
    m = len(generated)
    return AroundReal(inside / m, balls / (k * m), int(covered.sum()) / len(real), 100 * authentic / m)


def recall(real: torch.Tensor, generated: torch.Tensor, k: int = 5) -> float:
    """The fraction of real images in at least one ball around a generated one (Kynkäänniemi et al. 2019).

    Costs m·m + n·m distances. Raises NeonError.
    """
    real, generated = _checked(real, generated, k)
    radii = _reach(generated, k)[1]
    return sum(int((torch.cdist(block, generated) <= radii).any(1).sum()) for block in real.split(ROWS)) / len(real)


def _checked(real: torch.Tensor, generated: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    real, generated = in_float64(real, generated)
    if min(len(real), len(generated)) <= k:
        raise NeonError(f"k = {k} needs more than {k} images, got {len(real)} real and {len(generated)} generated")
    return real, generated


def _reach(points: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances of each point to its nearest other point and to its k-th nearest, (n,) each."""
    # The nearest of all is the point itself, hence k + 1.
    found = [torch.cdist(block, points).topk(k + 1, largest=False).values[:, [1, k]] for block in points.split(ROWS)]
    return torch.cat(found).unbind(1)
