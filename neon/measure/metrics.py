"""How far generated images are from real ones, computed from their features.

All statistics are float64 and streaming, on the device of the features: a batch is added as soon as it
is sampled, ranks are combined at the end, images are never stored. Definitions and numbers are those of
torch-fidelity 0.4.0, the random subsets and permutations included. What looks at neighbours is in manifold.py, the
sliced distance in mind.py.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.special import stdtrit

from neon import Diverged, NeonError
from neon.archives import read_npz
from neon.files import atomic, regular, sha256

AllReduce = Callable[[torch.Tensor], object]  # sums a tensor over ranks in place, as torch.distributed.all_reduce does
BLOCK = 256  # columns at a time of a product of which half is known, by symmetry or zeros


class Moments:
    """Streaming mean and covariance of (n, d) features.

    n: int; mean: (d,) float64; m2: (d, d) float64, whose upper triangle is that of the sum of the outer products of
    the deviations from `mean`. Deviations are taken before they are multiplied (Chan et al. 1983), so a large offset
    costs no digits.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor) -> None:
        """Add a batch, (n, d)."""
        x = torch.as_tensor(features).to(self.mean)
        if len(x) == 0:
            return
        mean = x.mean(0)
        # The shift of the mean is one more row of deviations, so that the same products do it all.
        rows = torch.cat([x - mean, self._move(len(x), mean)[None]])
        for i, part in _blocks(rows):
            self.m2[i : i + BLOCK, i:].addmm_(part.T, rows[:, i:])

    def all_reduce(self, all_reduce: AllReduce) -> None:
        """Replace the moments of this rank by those of all ranks together; every rank must call it."""
        n = self.mean.new_tensor(self.n)
        all_reduce(n)
        mean = self.mean * (self.n / n.clamp(min=1))
        all_reduce(mean)
        shift = (self.mean - mean) * math.sqrt(self.n)
        self.m2.addr_(shift, shift)
        all_reduce(self.m2)
        self.n, self.mean = int(n), mean

    @property
    def cov(self) -> torch.Tensor:
        """Unbiased covariance, (d, d) float64. Raises NeonError for fewer than two images."""
        if self.n < 2:
            raise NeonError(f"a covariance needs at least two images, got {self.n}")
        upper = self.m2.triu() / (self.n - 1)
        return upper + upper.triu(1).T

    def _move(self, n: int, mean: torch.Tensor) -> torch.Tensor:
        """Take in n images around `mean`; returns the row whose outer product m2 gains from the shift."""
        total = self.n + n
        shift = mean - self.mean
        row = shift * math.sqrt(self.n * n / max(total, 1))
        self.mean = self.mean + shift * (n / max(total, 1))
        self.n = total
        return row


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of the real images.

    mu: (d,) float64; sigma: (d, d) float64; features: (m, d) float32 for what compares images, or None;
    sha256: of the file it was read from, or None; stored_root: `root` as that file has it, or None.
    """

    mu: torch.Tensor
    sigma: torch.Tensor
    features: torch.Tensor | None = None
    name: str = "reference"
    sha256: str | None = None
    stored_root: torch.Tensor | None = None

    @cached_property
    def root(self) -> torch.Tensor:
        """L, lower triangular, with L Lᵀ = sigma: (d, d) float64, for all models of a sweep. Raises NeonError."""
        if self.stored_root is not None:
            root, wrong = self.stored_root.tril(), "root is not one of sigma"
        else:
            root, wrong = _root(self.sigma).contiguous(), "sigma is no covariance matrix"
        probe = torch.randn(len(root), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(root)
        error = root @ (root.T @ probe) - self.sigma @ probe
        if not error.norm() <= 1e-6 * self.sigma.norm():  # nor NaN; what was rounded to float32 is off by 1e-7
            raise NeonError(f"{self.name}: {wrong}")
        return root


def _root(sigma: torch.Tensor) -> torch.Tensor:
    """Cholesky's factor of sigma; a singular matrix, which has none to rounding, takes ten times as long."""
    root, failed = torch.linalg.cholesky_ex(sigma)
    if failed:
        values, vectors = _eigh(sigma)
        root = torch.linalg.qr((vectors * values.clamp(min=0).sqrt()).T, mode="r").R.T
    return root


def load_reference(path: str | os.PathLike) -> Reference:
    """Read the statistics of ADM, EDM or `save_reference`: npz with `mu` (d,), `sigma` (d, d), maybe `features` (m, d)
    and `root` (d, d), see Reference.

    Other entries are ignored. Raises NeonError for anything but finite statistics of matching shapes, and for a root
    that is not one of sigma.
    """
    try:
        path = regular(path)
    except NeonError as error:
        raise NeonError(f"cannot read reference statistics {error}") from None
    try:
        arrays = read_npz(path, ("mu", "sigma", "features", "root"))
    except NeonError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise NeonError(f"{path} is not an npz file of reference statistics, mu and sigma ({reason})") from None
    arrays = {key: torch.from_numpy(array.astype(np.float64)) for key, array in arrays.items()}

    for key in ("mu", "sigma"):
        if key not in arrays:
            raise NeonError(f"{path} has no entry {key!r}: not reference statistics")
    mu, sigma, features, root = (arrays.get(key) for key in ("mu", "sigma", "features", "root"))
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise NeonError(f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} do not fit together")
    if features is not None and features.shape[1:] != mu.shape:
        raise NeonError(f"{path}: features {tuple(features.shape)} and mu {tuple(mu.shape)} do not fit together")
    if root is not None and root.shape != sigma.shape:
        raise NeonError(f"{path}: root {tuple(root.shape)} and sigma {tuple(sigma.shape)} do not fit together")
    for key, array in arrays.items():
        if not array.isfinite().all():
            raise NeonError(f"{path}: {key} is not finite")
    reference = Reference(mu, sigma, None if features is None else features.float(), path.name, sha256(path), root)
    if root is not None:
        _ = reference.root  # refuses a wrong one
    return reference


def save_reference(reference: Reference, path: str | os.PathLike) -> None:
    """Write what `load_reference` reads, whole or not at all. Equal statistics give equal bytes. Raises NeonError."""
    arrays = {"mu": reference.mu, "sigma": reference.sigma, "features": reference.features, "root": reference.root}
    arrays = {key: array.numpy(force=True) for key, array in arrays.items() if array is not None}
    with atomic(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


@dataclass(frozen=True, eq=False)
class Frechet:
    """The FID of a model, and how its images move it.

    value: the FID; mu (d,) float64: mean of the model's features; shift (d,) float64: mu minus the reference's;
    slope (d, d) float32, lower triangular: xᵀ slope x = xᵀ (I - L (Lᵀ S L)^(-1/2) Lᵀ) x for all x, with S the model's
    covariance and L Lᵀ the reference's.
    """

    value: float
    mu: torch.Tensor
    shift: torch.Tensor
    slope: torch.Tensor

    def influence(self, features: torch.Tensor) -> torch.Tensor:
        """By how much each image moves the FID of its set, to first order and up to a constant: (n,) float64.

        Their standard deviation over sqrt(n) is the sampling error of the FID (delta method). features (n, d) are
        images of the model. The derivative of FID is 2 shift for the mean and, by the symmetric matrix that slope is
        half of, for S; directions without variance are left out. The large product is taken in float32 (or
        TensorFloat-32, where that is allowed), which moves the standard deviation by less than 1e-4 of itself.
        """
        return torch.cat([self._influence(part.to(self.mu) - self.mu) for part in features.split(1024)])

    def _influence(self, x: torch.Tensor) -> torch.Tensor:
        """Of images with deviations x (b, d) float64 from the mean."""
        result, x = 2 * x @ self.shift, x.float()
        for i, columns in _blocks(self.slope):
            result += ((x[:, i:] @ columns[i:]) * x[:, i : i + BLOCK]).sum(1)
        return result


def frechet(mu: torch.Tensor, sigma: torch.Tensor, reference: Reference) -> Frechet:
    """FID: |mu1 - mu2|² + tr(S1 + S2 - 2 sqrtm(S1 S2)) between a model's moments and the reference, and its slope.

    mu (d,), sigma (d, d) are taken in float64; the work is done on the device of sigma. Raises NeonError.
    """
    mu, sigma = mu.double(), sigma.double()
    values, vectors = _eigh(_cross(mu, sigma, reference))
    varies = values > 1e-10 * values[-1]
    vectors = vectors.float()[:, varies] * (values[varies] ** -0.25).float()
    slope = _slope(reference.root.to(vectors), vectors)
    return Frechet(_distance(mu, sigma, reference, values), mu, mu - reference.mu.to(mu), slope)


def _slope(root: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Lower triangular, with the quadratic form of I - A Aᵀ, A = root @ vectors: the lower half counts twice."""
    a = torch.cat([rows[:, : i + BLOCK] @ vectors[: i + BLOCK] for i, rows in _blocks(root, 0)])
    slope = torch.zeros_like(root)
    for i, rows in _blocks(a, 0):
        slope[i:, i : i + BLOCK] = -2 * a[i:] @ rows.T
    slope.tril_().diagonal().div_(2).add_(1)
    return slope


def frechet_distance(mu: torch.Tensor, sigma: torch.Tensor, reference: Reference) -> float:
    """frechet(…).value alone, at a third of the cost."""
    mu, sigma = mu.double(), sigma.double()
    return _distance(mu, sigma, reference, torch.linalg.eigvalsh(_cross(mu, sigma, reference)))


def _cross(mu: torch.Tensor, sigma: torch.Tensor, reference: Reference) -> torch.Tensor:
    """The lower triangle of Lᵀ S1 L, L Lᵀ = S2, which is symmetric and has the eigenvalues of S1 S2: (d, d)."""
    if len(mu) != len(reference.mu):
        raise NeonError(f"features have {len(mu)} dimensions, the reference {reference.name} has {len(reference.mu)}")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise Diverged("the features are not finite, so there is no Fréchet distance")
    root, cross = reference.root.to(sigma), torch.zeros_like(sigma)
    product = torch.cat([sigma[:, i:] @ columns[i:] for i, columns in _blocks(root)], dim=1)
    for i, columns in _blocks(root):
        cross[i : i + BLOCK, : i + BLOCK] = columns[i:].T @ product[i:, : i + BLOCK]
    return cross


def _distance(mu: torch.Tensor, sigma: torch.Tensor, reference: Reference, values: torch.Tensor) -> float:
    """FID, given the eigenvalues of S1 S2; rounding may push zeros below zero."""
    mu2, sigma2 = reference.mu.to(mu), reference.sigma.to(mu)
    return float((mu - mu2).square().sum() + sigma.trace() + sigma2.trace() - 2 * values.clamp(min=0).sqrt().sum())


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.linalg.eigh, which on a CPU takes a fifth longer than numpy's."""
    if matrix.device.type == "cpu":
        return tuple(map(torch.from_numpy, np.linalg.eigh(matrix.numpy())))
    return torch.linalg.eigh(matrix)


def _blocks(matrix: torch.Tensor, dim: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
    """BLOCK columns (dim 0: rows) at a time, with the number of the first."""
    return zip(range(0, matrix.shape[dim], BLOCK), matrix.split(BLOCK, dim))


class InceptionScore:
    """Streaming inception score of n images, shuffled into `splits` parts: exp E KL(p(y|x) || p(y)) of each part.

    sums: (splits, classes + 2) float64: sum of p, sum of p log p, number of images. Sums of ranks add up.
    """

    def __init__(self, n: int, classes: int, device: torch.device | str = "cpu", splits: int = 10, seed: int = 2020):
        if n < splits:
            raise NeonError(f"an inception score over {splits} splits needs at least {splits} images, got {n}")
        bounds = np.arange(splits + 1) * n // splits
        order = np.random.RandomState(seed).permutation(n)  # the stream of torch-fidelity
        split_of = np.empty(n, dtype=np.int64)
        split_of[order] = np.repeat(np.arange(splits), np.diff(bounds))
        self.split_of = torch.from_numpy(split_of).to(device)  # (n,), the part that image i belongs to
        self.parts = torch.arange(splits, device=device)
        self.sums = torch.zeros(splits, classes + 2, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, indices: torch.Tensor) -> None:
        """Add a batch: logits (b, classes), indices (b,) in range(n), each image once."""
        log_p = logits.to(self.sums).log_softmax(1)
        p = log_p.exp()
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], dim=1)
        # A product with one-hot rows, for index_add_ on CUDA adds in no fixed order, and F.one_hot waits for the GPU.
        own = self.split_of[indices.to(self.split_of.device, non_blocking=True)]
        member = (own[:, None] == self.parts).to(self.sums)
        self.sums += member.T @ rows

    def all_reduce(self, all_reduce: AllReduce) -> None:
        """Replace the sums of this rank by those of all ranks together; every rank must call it."""
        all_reduce(self.sums)

    def score(self) -> tuple[float, float]:
        """Mean and (biased) standard deviation over splits. Raises NeonError unless every image was seen once."""
        sum_p, sum_plogp, counts = self.sums[:, :-2], self.sums[:, -2], self.sums[:, -1]
        sizes = self.split_of.bincount().to(counts)
        if not torch.equal(counts, sizes):
            raise NeonError(f"inception score: saw {int(counts.sum())} images, not each of {len(self.split_of)} once")
        marginal = sum_p / sizes[:, None]
        scores = (sum_plogp / sizes - torch.special.xlogy(marginal, marginal).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def kid(
    features: torch.Tensor, real: torch.Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Kernel distance (Binkowski et al. 2018): unbiased MMD² with kernel (x·y / d + 1)³, mean and std over subsets.

    features (n, d) generated, real (m, d); computed in float64 on the device of `features`. Raises NeonError.
    """
    x, y = in_float64(features, real)
    if min(len(x), len(y)) < subset_size:
        raise NeonError(f"KID subsets of {subset_size} need as many images, got {len(x)} generated and {len(y)} real")

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    rng = np.random.RandomState(seed)  # the stream of torch-fidelity
    values = []
    for _ in range(subsets):
        a, b = (z[torch.from_numpy(rng.choice(len(z), subset_size, replace=False)).to(z.device)] for z in (x, y))
        within = sum(k.sum() - k.trace() for k in (kernel(a, a), kernel(b, b)))
        values.append(float(within / (subset_size * (subset_size - 1)) - 2 * kernel(a, b).mean()))
    return float(np.mean(values)), float(np.std(values))


def in_float64(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both on the device of a, in float64: in float32 (or worse, TF32) differences of large products lose digits."""
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    if a.shape[1] != b.shape[1]:
        raise NeonError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions cannot be compared")
    return a, b.to(a.device)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean over seeds and half-width of its Student t-interval; for a paired comparison pass the differences.

    A single value has no known spread: half-width inf. Raises NeonError for no values.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise NeonError("an interval needs at least one value")
    if x.size == 1:
        return float(x.mean()), math.inf
    return float(x.mean()), float(stdtrit(x.size - 1, (1 + level) / 2) * x.std(ddof=1) / math.sqrt(x.size))
