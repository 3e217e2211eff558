"""GMO (arXiv 2609.35512, docs/gmo.md): samples for S in which the generator's leading direction weighs more.

The sampler is a map g from noise z to outputs s (pixels or latents), J its Jacobian at z. Of every image by itself:
power iteration finds the leading triple (u, v, σ) of J, Hutchinson's estimate its energy E = ‖J‖²_F.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from neon import Diverged, NeonError
from neon.family import Family, noise_map_of
from neon.sampling import Streams, new_streams

# What a product costs in passes of the sampler, at most. J v computes the outputs again with their derivative: two, and
# three of convolutions, for PyTorch also multiplies by the derivative of their weights, which is 0. Jᵀ w goes back
# through outputs that are kept.
JVP, VJP = 3, 1
CONTROLS = ("noise",)


@dataclass(frozen=True)
class Modification:
    """What becomes of the samples. Raises NeonError unless alpha is in [0, 1], the counts are positive and the control
    is one of CONTROLS or ''."""

    alpha: float  # the share of J's trailing energy that moves to the leading direction; 0 changes nothing
    iterations: int = 20  # of the power iteration
    probes: int = 20  # of Hutchinson's estimate
    control: str = ""  # 'noise': Gaussian noise of the same RMS per image, in place of the modification

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise NeonError(f"--gmo must lie between 0 and 1, not {self.alpha}")
        if self.iterations < 1 or self.probes < 1:
            raise NeonError("--gmo needs at least one iteration and one probe")
        if self.control not in ("", *CONTROLS):
            raise NeonError(f"unknown control {self.control!r} of --gmo (know {', '.join(CONTROLS)})")

    def identity(self) -> dict[str, object]:
        """JSON values, by the names of the options."""
        return {
            "gmo": self.alpha,
            "gmo_iterations": self.iterations,
            "gmo_probes": self.probes,
            "gmo_control": self.control or None,
        }

    @property
    def products(self) -> int:
        """With J or its transpose, of an image."""
        return 2 * self.iterations + self.probes + 1 if self.alpha else 0

    @property
    def passes(self) -> int:
        """The work of an image, in plain passes of the sampler."""
        return 1 + JVP * (self.iterations + 1) + VJP * (self.iterations + self.probes) if self.alpha else 1

    def __str__(self) -> str:
        """What is done and what it costs, one line."""
        what = "its control, noise of the same RMS" if self.control else "modified samples"
        cost = f"{self.products} products with the Jacobian an image, about {self.passes} passes in place of 1"
        return f"GMO at alpha = {self.alpha:g}: " + (f"{what}; {cost}" if self.alpha else "samples as they are")


def modification(options: Mapping[str, object]) -> Modification | None:
    """Of the options gmo, gmo_iterations, gmo_probes and gmo_control among these, None is not given; None without gmo.

    Raises NeonError if the others are given without gmo, and as Modification does.
    """
    names = {"gmo_iterations": "iterations", "gmo_probes": "probes", "gmo_control": "control"}
    given = {names[name]: options[name] for name in names if options.get(name) is not None}
    if options.get("gmo") is not None:
        return Modification(float(options["gmo"]), **given)
    if given:
        raise NeonError("--gmo_iterations, --gmo_probes and --gmo_control need --gmo")
    return None


class Jacobian:
    """Products with J of `map` at z (N, …), and with its transpose, row by row: output i depends on noise i alone.

    `map` runs once with its graph kept, for all products with the transpose. Raises NeonError if no gradient comes out.
    """

    def __init__(self, map: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor):
        self.map, self.z = map, z.detach()
        with torch.enable_grad():
            self._z = self.z.clone().requires_grad_()
            self._value = map(self._z)
        if not self._value.requires_grad:
            raise NeonError("noise_map: no gradient reaches the outputs; is there a torch.no_grad in it?")
        self.value = self._value.detach()

    def times(self, v: torch.Tensor) -> torch.Tensor:
        """J v, like the outputs; v: like z. Forward differentiation, which keeps nothing."""
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(self.map(forward_ad.make_dual(self.z, v))).tangent

    def transposed(self, w: torch.Tensor) -> torch.Tensor:
        """Jᵀ w, like z; w: like the outputs."""
        return torch.autograd.grad(self._value, self._z, w, retain_graph=True)[0]


class Spectrum(NamedTuple):
    """All that is needed of J to modify N outputs, at any alpha."""

    s: torch.Tensor  # (N, …) the outputs as they are
    jz: torch.Tensor  # (N, …) J z
    u: torch.Tensor  # (N, …) of unit norm: the leading direction of the outputs
    along: torch.Tensor  # (N,) vᵀz, float64, as the two below
    sigma: torch.Tensor  # (N,) the leading singular value
    energy: torch.Tensor  # (N,) ‖J‖²_F

    def modified(self, alpha: float) -> torch.Tensor:
        """s̃ (N, …): σ becomes σ̃ = √((1−α)σ² + αE), the other singular values √(1−α) of themselves, s − J z stays."""
        keep = math.sqrt(1 - alpha)
        raised = ((1 - alpha) * self.sigma**2 + alpha * self.energy).sqrt()
        lead = ((raised - keep * self.sigma) * self.along).to(self.s.dtype)
        return self.s - (1 - keep) * self.jz + _rows(lead, self.s) * self.u


def spectrum(jacobian: Jacobian, streams: Streams, iterations: int, probes: int) -> Spectrum:
    """streams: one per image, for the start vector and then the probes.

    E is the mean of ‖Jᵀε‖² over standard normal ε, which has the mean and the variance of ‖Jε‖² and costs less.
    """
    z, s = jacobian.z, jacobian.value
    v, _ = _unit(streams.randn(z.shape[1:], z.dtype))
    for _ in range(iterations):
        u, _ = _unit(jacobian.times(v))
        v, sigma = _unit(jacobian.transposed(u))
    found = [_norm(jacobian.transposed(streams.randn(s.shape[1:], s.dtype))).square() for _ in range(probes)]
    along = (v.double() * z.double()).flatten(1).sum(1)
    return Spectrum(s, jacobian.times(z), u, along, sigma, torch.stack(found).mean(0))


def same_rms(change: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The noise (N, …), each image scaled to the RMS of its change (N, …)."""
    return noise * _rows((_norm(change) / _norm(noise)).to(noise.dtype), noise)


def streams_of(seeds: torch.Tensor, device: torch.device | str) -> Streams:
    """Of the images of these seeds: all random numbers of GMO.

    Their own seeds are the first 32 bits of SHA-256 of 'gmo SEED', for the streams of SEED itself made the noise z.
    """
    digests = (hashlib.sha256(f"gmo {seed}".encode()).digest() for seed in seeds.tolist())
    return new_streams([int.from_bytes(digest[:4], "big") for digest in digests], device)


@torch.no_grad()
def images(family: Family, model: nn.Module, change: Modification, seeds: torch.Tensor, **sampling) -> torch.Tensor:
    """One modified image per seed, uint8 (N, C, H, W), on the model's device. Image i depends on seeds[i] only.

    sampling: all fields of the family's Sampling. Raises NeonError if its sampler is no map of its noise, Diverged.
    """
    labels = family.labels(model, seeds)
    if not change.alpha:
        return family.sample(model, seeds, labels, **sampling)
    sampler = noise_map_of(family)(model, seeds, labels, **sampling)
    streams = streams_of(seeds, sampler.noise.device)
    with differentiable(model):
        found = spectrum(Jacobian(sampler.map, sampler.noise), streams, change.iterations, change.probes)
    outputs = found.modified(change.alpha)
    if change.control:
        outputs = found.s + same_rms(outputs - found.s, streams.randn(outputs.shape[1:], outputs.dtype))
    finite = outputs.flatten(1).isfinite().all(1)
    if not finite.all():
        raise Diverged(f"GMO: {int((~finite).sum())} of {len(finite)} outputs are not finite")
    return sampler.finish(outputs)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, the model can be differentiated both ways at the least memory.

    Weights ask for no gradient, so that layers need not keep their inputs. Attention is made of products: its fused
    kernels know no forward derivative.
    """
    asking = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in asking:
            p.requires_grad_(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for p in asking:
            p.requires_grad_(True)


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Of each image, (N,) float64."""
    return x.double().flatten(1).norm(dim=1)


def _unit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image divided by its norm, and the norms (N,) float64; zeros stay zeros."""
    norm = _norm(x)
    return x / _rows(norm.clamp(min=torch.finfo(x.dtype).tiny).to(x.dtype), x), norm


def _rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N,) → (N, 1, …), to go with `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
