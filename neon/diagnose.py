"""Does self-training, or its reversal, lower the loss on real images? Asked before any self-training; and by which w?

At θ_r let r_d be the gradient of the training loss on real images and r_s that on the model's own samples S.
Self-training moves θ by about −η P r_s, where P is the optimizer's preconditioner; Neon moves it by +w η P r_s. The
loss on real images changes by +w η s, with s = ⟨r_d, P r_s⟩. So s < 0 speaks for Neon, s > 0 for self-training.

Both gradients are means over batches. The k-th batch of real images and the k-th of S have the same random numbers,
so only products of different batches are free of bias: no number here has a product of a batch with itself or with its
partner. The batches are run through twice, first for their sums and then for the products with these sums. So a few
gradients are held at a time, not all.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.special import ndtri, stdtrit

from neon import NeonError
from neon.dropout import masks_of
from neon.family import Family, Recipe, rows_of
from neon.measure.candidates import Candidates
from neon.selftrain import seed_step

LEVEL = 0.95  # of every interval
RESAMPLES = 4000
STEP = 0.1  # in w, of the differences along θ_s − θ_r
FEWEST = 4  # batches
NEON, SELF_TRAINING, UNKNOWN = "Neon should help", "self-training should help", "cannot tell"

Gradient = list[torch.Tensor]  # one float32 tensor for each parameter


class Images(Protocol):
    """What is asked of a set of images; neon.data.ImageSet has it."""

    shape: tuple[int, ...]  # (C, H, W)
    labels: torch.Tensor | None  # int64 (n,)

    def __len__(self) -> int: ...

    def images(self, indices: Iterable[int]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Sampled:
    """Images in memory: uint8 (n, C, H, W), and int64 (n,) or None."""

    pixels: torch.Tensor
    labels: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Iterable[int]) -> torch.Tensor:
        return self.pixels[list(indices)]


@dataclass(frozen=True)
class Sizes:
    """How many images are used for what."""

    batches: int  # of real images, and of S
    batch: int  # images of each
    squares: int  # batches of S for the second moment of the optimizer
    squares_batch: int  # images of each
    apart: bool  # these are other images of S than those of r_s


def sizes_of(recipe: Recipe, real: int, synthetic: int | None, batches: int, images: int | None = None) -> Sizes:
    """Batches as large as the recipe's if there are so many images, else of a part of it.

    images: of each set, at most (default: all, up to `batches` of the recipe's). synthetic: None for as many as it
    takes. The second moment is of the recipe's batches, of images that r_s does not have if S has enough of them.
    Raises NeonError.
    """
    if batches < FEWEST:
        raise NeonError(f"{batches} batches give no interval: at least {FEWEST}")
    if images and images > real:
        raise NeonError(f"{images} images are asked for, there are {real} real ones")
    least = min(images or real, real, *([] if synthetic is None else [synthetic]))
    if least < batches:
        raise NeonError(f"{batches} batches of {least} images: at least {batches} images are needed")
    batch = _divisor(recipe.batch, least // batches)
    if synthetic is None:
        return Sizes(batches, batch, batches, recipe.batch, apart=True)
    left = (synthetic - batches * batch) // recipe.batch
    if left >= max(batches // 4, 2):
        return Sizes(batches, batch, min(batches, left), recipe.batch, apart=True)
    whole = _divisor(recipe.batch, synthetic)
    return Sizes(batches, batch, min(batches, synthetic // whole), whole, apart=False)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`: some losses take images in groups, which divide a batch."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def needed(sizes: Sizes) -> int:
    """Images of S."""
    own = sizes.batches * sizes.batch
    return own + sizes.squares * sizes.squares_batch if sizes.apart else own


class Gradients:
    """Gradients of the training loss at the weights that the model has now, as a step of self-training computes them.

    Float32 without autocast, with the recipe's dropout. All random numbers depend on the seed and the step alone: the
    same step of two sets has the same noise, levels, times and dropout masks.
    """

    def __init__(
        self,
        family: Family,
        model: torch.nn.Module,
        recipe: Recipe,
        device: torch.device,
        *,
        seed: int,
        repeats: int,
        micro_batch: int | None = None,
        seen: Callable[[int], None] = lambda images: None,
    ):
        """repeats: times that each image is visited, each with new random numbers; seen(n): n more images are done."""
        self.family, self.model, self.recipe, self.device, self.seed = family, model, recipe, device, seed
        self.repeats, self.micro_batch, self.seen = repeats, micro_batch, seen
        self.network = family.weights(model).train().requires_grad_(True)
        self.params = list(self.network.parameters())
        self.generator = torch.Generator(device)

    def __call__(self, data: Images, step: int, indices: Sequence[int], repeats: int | None = None) -> Gradient:
        """Of the mean loss of these images. Raises NeonError if it is not finite."""
        repeats = repeats or self.repeats
        self.network.zero_grad(set_to_none=True)
        pixels, labels = data.images(indices), None if data.labels is None else data.labels[list(indices)]
        for visit in range(repeats):
            self._visit(pixels, labels, step * repeats + visit, 1 / repeats)
            self.seen(len(indices))
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.network.zero_grad(set_to_none=True)
        if not all(g.isfinite().all() for g in found):
            raise NeonError("the gradient of the loss is not finite")
        return found

    def _visit(self, pixels: torch.Tensor, labels: torch.Tensor | None, step: int, share: float) -> None:
        """Add `share` of the gradient of the mean loss."""
        n, options = len(pixels), self.recipe.loss
        streams = seed_step(self.generator, self.seed, step, n, 0)
        draws = self.family.draw(self.model, n, self.generator, images=lambda: pixels, **options)
        for start in range(0, n, self.micro_batch or n):
            part = slice(start, min(start + (self.micro_batch or n), n))
            x = pixels[part].to(self.device)
            y = None if labels is None else labels[part].to(self.device)
            with masks_of(streams[part], self.device):
                loss = self.family.loss(self.model, x, y, rows_of(draws, part.start, part.stop, n), **options)
            (loss * (share * len(x) / n)).backward()


# ---------------------------------------------------------------- before self-training


def alignment(gradients: Gradients, real: Images, synthetic: Images, sizes: Sizes, seed: int) -> dict:
    """s and the cosine with their intervals, and the verdict.

    's', 'cosine': in the metric of the recipe's optimizer; 'plain_s', 'plain_cosine': without a preconditioner. Each
    has _lo and _hi. A cosine is None where a norm cannot be told from 0. 'still': the share of weights that no batch of
    S moves; they are left out.
    """
    own = _batches(len(real), sizes.batches, sizes.batch, seed, 0)
    of_s = _batches(len(synthetic), 1, needed(sizes), seed, 1)[0]
    other = of_s[: sizes.batches * sizes.batch].reshape(sizes.batches, sizes.batch)
    rest = of_s[other.size :] if sizes.apart else _batches(len(synthetic), 1, len(synthetic), seed, 1)[0]
    squares = rest[: sizes.squares * sizes.squares_batch].reshape(sizes.squares, sizes.squares_batch)
    pairs = list(zip(own.tolist(), other.tolist()))

    scale = preconditioner(gradients, synthetic, squares.tolist(), first_step=sizes.batches)
    still = sum(int((p == 0).sum()) for p in scale) / sum(p.numel() for p in scale)
    sums = [
        _sum(gradients(data, k, pair[at]) for k, pair in enumerate(pairs)) for at, data in enumerate((real, synthetic))
    ]
    rows = np.stack(
        [_others(gradients(real, k, a), gradients(synthetic, k, b), *sums, scale) for k, (a, b) in enumerate(pairs)]
    )
    found = {"still": still}
    for prefix, columns in (("", rows[:, :3]), ("plain_", rows[:, 3:])):
        found |= {prefix + name: value for name, value in _summary(columns, seed).items()}
    return found | {"verdict": verdict(found["s_lo"], found["s_hi"])}


def preconditioner(gradients: Gradients, data: Images, batches: Sequence[Sequence[int]], first_step: int) -> Gradient:
    """Adam's 1 / (√v + eps), v the mean square of the batches' gradients; 0 where v = 0, as Adam moves nothing there.

    One visit to each image, as in training. first_step: of the random numbers.
    """
    v = [torch.zeros_like(p) for p in gradients.params]
    for k, indices in enumerate(batches):
        for mean, g in zip(v, gradients(data, first_step * gradients.repeats + k, indices, repeats=1)):
            mean.addcmul_(g, g, value=1 / len(batches))
    return [torch.where(mean > 0, 1 / (mean.sqrt() + gradients.recipe.eps), 0) for mean in v]


def verdict(low: float, high: float) -> str:
    """From the interval of s."""
    return NEON if high < 0 else SELF_TRAINING if low > 0 else UNKNOWN


def pseudo_values(rows: np.ndarray) -> np.ndarray:
    """Jackknife pseudo-values of the mean product of two different batches; their mean is this mean.

    rows: (K, …), for each batch the sum of its products with the others, so that every product is there twice.
    """
    n, total = len(rows), rows.sum(0) / 2
    return total / (n - 1) - (total - rows) / (n - 2)


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Of the mean of values (K,): see `bounds`."""
    return bounds(values.mean(), values[_resampled(len(values), seed)].mean(1), len(values))


def bounds(estimate: float, again: np.ndarray, n: int) -> tuple[float, float]:
    """Percentiles of the resampled estimates, moved away from the estimate as Student's t of n − 1 degrees is wider
    than the normal distribution: percentiles alone are too narrow for few batches. NaN are left out; ±∞ may be there.
    """
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    wider = stdtrit(n - 1, tails[1]) / ndtri(tails[1]) * (n / (n - 1)) ** 0.5
    low, high = np.quantile(again[~np.isnan(again)], tails, method="nearest")
    return float(estimate + (low - estimate) * wider), float(estimate + (high - estimate) * wider)


def _batches(n: int, batches: int, batch: int, seed: int, stream: int) -> np.ndarray:
    """Indices of different images in a random order, (batches, batch)."""
    return np.random.default_rng([seed, stream]).permutation(n)[: batches * batch].reshape(batches, batch)


def _sum(gradients: Iterable[Gradient]) -> Gradient:
    total: Gradient = []
    for gradient in gradients:
        total = [t.add_(g) for t, g in zip(total, gradient)] or gradient
    return total


def _others(x: Gradient, y: Gradient, all_x: Gradient, all_y: Gradient, scale: Gradient) -> np.ndarray:
    """Products with the other batches, summed: ⟨x, y'⟩ + ⟨x', y⟩, 2⟨x, x'⟩, 2⟨y, y'⟩ with `scale`, and without."""
    rest_x, rest_y = ([total - own for total, own in zip(*pair)] for pair in ((all_x, x), (all_y, y)))
    pairs = [(x, rest_y), (rest_x, y)], [(x, rest_x)] * 2, [(y, rest_y)] * 2
    return np.array([sum(inner(a, b, by) for a, b in pair) for by in (scale, None) for pair in pairs])


def inner(a: Gradient, b: Gradient, scale: Gradient | None = None) -> float:
    """Σ a b scale, summed in float64."""
    scales = scale or [None] * len(a)
    return sum(float(((x if p is None else x * p).double() * y).sum()) for x, y, p in zip(a, b, scales))


def _summary(rows: np.ndarray, seed: int) -> dict[str, float | None]:
    """rows (K, 3): of s and both squared norms, as pseudo_values takes them."""
    values = pseudo_values(rows)
    low, high = interval(values[:, 0], seed)
    found = {"s": float(values[:, 0].mean()), "s_lo": low, "s_hi": high}
    cosine = _cosine(values.mean(0))
    if not np.isfinite(cosine):
        return found | dict.fromkeys(("cosine", "cosine_lo", "cosine_hi"))
    ends = bounds(cosine, _cosine(values[_resampled(len(values), seed)].mean(1)), len(values))
    low, high = np.clip(ends, -1, 1)
    return found | {"cosine": float(cosine), "cosine_lo": float(low), "cosine_hi": float(high)}


def _cosine(means: np.ndarray) -> np.ndarray:
    """(…, 3): s and both squared norms → cosines in [−1, 1]; NaN where an unbiased square of a norm is not positive."""
    squares = means[..., 1] * means[..., 2]
    positive = (means[..., 1] > 0) & (means[..., 2] > 0)
    return np.clip(means[..., 0] / np.sqrt(np.where(positive, squares, np.nan)), -1, 1)


def _resampled(n: int, seed: int) -> np.ndarray:
    """Indices of batches drawn with replacement, (RESAMPLES, n); the same for every statistic."""
    return np.random.default_rng([seed, 2]).integers(n, size=(RESAMPLES, n))


# ---------------------------------------------------------------- after self-training


def predicted_w(
    gradients: Gradients, candidates: Candidates, snapshot: str, real: Images, sizes: Sizes, seed: int
) -> dict:
    """Where the loss on real images is lowest along θ_r − w (θ_s − θ_r), by its slope and curvature at w = 0.

    Both are central differences of gradients at w = ±STEP, with the same random numbers: networks whose attention has
    no second derivative do, too. 'w' is None where the curvature is not positive, and its interval is everything; a
    resample without a minimum counts as ±infinity, the side to which the loss falls. Raises NeonError if the snapshot
    does not fit.
    """
    batches = _batches(len(real), sizes.batches, sizes.batch, seed, 0).tolist()
    candidates.load(None, 0.0)
    at_base = [p.detach().clone() for p in gradients.params]
    candidates.load(snapshot, -1.0)
    drift = [p.detach() - start for p, start in zip(gradients.params, at_base)]
    del at_base
    if not any(d.any() for d in drift):
        raise NeonError(f"{snapshot}: the same weights as the base, there is no direction")
    slopes = np.zeros((len(batches), 2))
    for column, w in enumerate((-STEP, STEP)):
        candidates.load(snapshot, w)
        slopes[:, column] = [-inner(gradients(real, k, batch), drift) for k, batch in enumerate(batches)]
    candidates.load(None, 0.0)
    slope, curvature = slopes.mean(1), (slopes[:, 1] - slopes[:, 0]) / (2 * STEP)
    again = _resampled(len(batches), seed)
    minima = _minimum(slope[again].mean(1), curvature[again].mean(1))
    w = float(_minimum(slope.mean(), curvature.mean()))
    found = {"slope": float(slope.mean()), "curvature": float(curvature.mean())}
    if not np.isfinite(w):
        return found | {"w": None, "w_lo": -math.inf, "w_hi": math.inf}
    low, high = bounds(w, minima, len(batches))
    return found | {"w": w, "w_lo": low, "w_hi": high}


def _minimum(slope: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Of a parabola; where it has none, −∞ or ∞."""
    safe = np.where(curvature > 0, curvature, 1)
    return np.where(curvature > 0, -slope / safe, np.where(slope > 0, -np.inf, np.inf))
