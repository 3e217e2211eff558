"""MIND, the Monge inception distance (Berthet et al. 2026, arXiv 2605.06797): a sliced Wasserstein distance."""

import torch

from neon.measure.metrics import in_float64

DIRECTIONS = 64  # at a time: with 50 000 images 26 MB of projections


def mind(features: torch.Tensor, real: torch.Tensor, projections: int = 1000, seed: int = 0) -> float:
    """3 d times the mean over random unit directions of the squared 2-Wasserstein distance of the projections.

    features (n, d) generated, real (m, d). In one dimension the best transport joins what has the same rank, so sets
    of one size are needed: of the larger one min(n, m) images are drawn at random. The value has a positive bias that
    falls with their number: compare at one n. float64, on the device of `features`; 2 projections (n + m) d operations
    and a sort of each projection. Raises NeonError.
    """
    x, y = in_float64(features, real)
    generator = torch.Generator().manual_seed(seed)
    u = directions(projections, x.shape[1], generator).to(x)
    size = min(len(x), len(y))
    x, y = (z[torch.randperm(len(z), generator=generator)[:size].to(z.device)] if len(z) > size else z for z in (x, y))
    total = sum(float(_gaps(part, x, y).square().sum()) for part in u.split(DIRECTIONS))
    return 3 * x.shape[1] * total / (projections * size)


def directions(n: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Random unit vectors, (n, dim) float64, the same for every device."""
    u = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return u / u.norm(dim=1, keepdim=True)


def _gaps(u: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Differences of projections of the same rank, (directions, images)."""
    return (u @ x.T).sort(1).values - (u @ y.T).sort(1).values
