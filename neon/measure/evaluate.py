"""Sampler → features → statistics → metrics, in memory, over any number of processes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from neon import Diverged, NeonError
from neon.data import ImageSet
from neon.distributed import World
from neon.files import progress
from neon.measure import manifold, metrics
from neon.measure.aside import Aside
from neon.measure.features import Extractor, Features
from neon.measure.kept import Kept, joined
from neon.measure.metrics import InceptionScore, Moments, Reference
from neon.measure.mind import mind
from neon.sampling import shard

ALONE = World()
METRICS = ("fid", "is", "kid", "precision", "recall", "density", "coverage", "authpct", "mind")
SETS = {"auto": ("fid", "is", "kid"), "all": METRICS}  # of which those are measured that are possible
TITLES = {"authpct": "AuthPct", "mind": "MIND"}


# The Fréchet distance by the start of the extractor's name, where that is not Inception's: it is no FID.
DISTANCES = {"dinov2": "FD (DINOv2)", "lite0": "FD (EfficientNet-Lite0)", "cnn": "FD (classifier)"}


def title(metric: str, features: str = "") -> str:
    """'fid' → 'FID', 'recall' → 'recall'. features: the extractor's name; FID is of Inception, see DISTANCES."""
    kind = features.partition("-")[0]
    if metric == "fid" and kind in DISTANCES:
        return DISTANCES[kind]
    return TITLES.get(metric, metric.upper() if len(metric) < 4 else metric)


def parse_metrics(text: str, extractor: Extractor, reference: Reference) -> tuple[str, ...]:
    """'fid,is' → its parts; a name of SETS → those of its metrics that the extractor and the reference allow."""
    if text not in SETS:
        return tuple(text.split(","))
    allowed = {"fid": True, "is": bool(extractor.classes)}
    return tuple(m for m in SETS[text] if allowed.get(m, reference.features is not None))


@dataclass(frozen=True)
class Evaluation:
    """What makes numbers of two models comparable: the images' names (hence noise), features, reference and metrics."""

    seeds: torch.Tensor  # (n,) int64
    extractor: Extractor
    reference: Reference
    metrics: tuple[str, ...] = ("fid", "is")
    batch: int = 64  # images per forward pass and process; changes nothing but speed
    world: World = ALONE

    def __post_init__(self):
        unknown = [m for m in self.metrics if m not in METRICS]
        if unknown:
            raise NeonError(f"unknown metric {unknown[0]!r} (know {', '.join(METRICS)})")
        if self.extractor.dim != len(self.reference.mu):
            found, wanted = self.extractor.dim, len(self.reference.mu)
            raise NeonError(f"features have {found} dimensions, the reference {self.reference.name} has {wanted}")
        if "is" in self.metrics and not self.extractor.classes:
            raise NeonError(f"an inception score needs classes, which {self.extractor.name} does not have")
        if self.compares_features and self.reference.features is None:
            raise NeonError(
                f"{self.reference.name} has no features, which {', '.join(self.compares_features)} compare with"
            )

    @property
    def compares_features(self) -> tuple[str, ...]:
        return tuple(m for m in self.metrics if m not in ("fid", "is"))

    def identity(self) -> dict:
        """What the numbers depend on besides the model, JSON values."""
        seeds = self.seeds.tolist()
        return {
            "n": len(seeds),
            "seeds": f"{seeds[0]}-{seeds[-1]}" if seeds == list(range(seeds[0], seeds[-1] + 1)) else seeds,
            "features": self.extractor.name,
            "reference": self.reference.sha256,
            "metrics": list(self.metrics),
        }

    @torch.no_grad()
    def __call__(
        self,
        sample: Callable[[torch.Tensor], torch.Tensor],
        desc: str = "evaluate",
        keep: Kept | None = None,
    ) -> dict[str, float]:
        """Metrics of the images that `sample` makes: seeds (b,) → uint8 (b, 1 or 3, H, W).

        Every rank gets the same result. 'fid' adds 'fid_se', its sampling error at this n, 'is' adds 'is_std' over its
        splits, 'kid' adds 'kid_std' over its subsets, 'precision' and 'recall' add each other. keep: images whose
        features are kept there are not sampled, the features of all are kept. Raises Diverged on every rank if it is
        raised on one.
        """
        n, extractor, world = len(self.seeds), self.extractor, self.world
        known = keep.read(self.seeds, world) if keep else None
        done = len(known.features) if known else 0
        moments = Moments(extractor.dim, extractor.device)
        scores = InceptionScore(n, extractor.classes, extractor.device) if "is" in self.metrics else None
        seen: list[Features] = []
        aside = Aside(extractor.device)

        def take(found: Features, indices: torch.Tensor) -> None:
            moments.update(found.features)
            if scores is not None:
                scores.update(found.logits, indices)
            logits = aside.to_host(found.logits) if scores is not None else None
            seen.append(Features(aside.to_host(found.features), logits))

        failure = None
        with progress(n, "img", desc, world.rank, done) as bar:
            if known and world.rank == 0:
                with aside.after():
                    take(known, torch.arange(done))
            try:
                for part in shard(n - done, world.rank, world.size, self.batch):
                    indices = torch.arange(done, n)[part]
                    images = sample(self.seeds[indices])
                    with aside.after(images):
                        take(extractor(images.expand(-1, 3, -1, -1)), indices)
                    bar.update(len(images) * world.size)
            except Diverged as error:  # the other ranks wait for this one
                failure = str(error)
        aside.wait()
        if failures := [text for text in world.gather(failure) if text]:
            raise Diverged(failures[0])
        if world.size > 1:
            moments.all_reduce(dist.all_reduce)
            if scores is not None:
                scores.all_reduce(dist.all_reduce)
        own = joined(seen, extractor.dim)
        if keep and done < n:
            keep.write(self.seeds, own, world)
        result = {}
        if "fid" in self.metrics:
            fid = metrics.frechet(moments.mean, moments.cov, self.reference)
            influence = torch.cat(world.gather(fid.influence(own.features).cpu()))
            result |= {"fid": fid.value, "fid_se": float(influence.std() / n**0.5)}
        if scores is not None:
            result["is"], result["is_std"] = scores.score()
        if self.compares_features:
            generated = torch.cat(world.gather(own.features)).to(extractor.device)
            real = self.reference.features.to(extractor.device)
            result |= self._compared(generated, real)
        return result

    def _compared(self, generated: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
        """The metrics that compare features (n, d) with those of real images (m, d)."""
        wanted, found = set(self.metrics), {}
        if wanted & {"precision", "recall"}:  # neither says much alone
            wanted |= {"precision", "recall"}
        if "kid" in wanted:
            found["kid"], found["kid_std"] = metrics.kid(
                generated, real, subset_size=min(1000, len(generated), len(real))
            )
        if wanted & set(manifold.AroundReal._fields):
            near = manifold.around_real(real, generated)._asdict()
            found |= {m: near[m] for m in METRICS if m in near.keys() & wanted}
        if "recall" in wanted:
            found["recall"] = manifold.recall(real, generated)
        if "mind" in wanted:
            found["mind"] = mind(generated, real)
        return found


def reference_of(
    images: ImageSet,
    extractor: Extractor,
    batch: int = 256,
    keep: int = 50_000,
    published: Reference | None = None,
    world: World = ALONE,
) -> Reference:
    """Statistics of all images, with the features of `keep` of them, drawn at random (the same on every machine).

    published: take mu and sigma from there; then only the kept images are read. Raises NeonError if the features have
    another number of dimensions.
    """
    if published and len(published.mu) != extractor.dim:
        raise NeonError(f"features have {extractor.dim} dimensions, {published.name} has {len(published.mu)}")
    kept = torch.from_numpy(np.random.default_rng(0).permutation(len(images))[:keep]).sort().values
    chosen = kept if published else torch.arange(len(images))
    is_kept = torch.isin(chosen, kept)
    moments, features = Moments(extractor.dim, extractor.device), []
    with progress(len(chosen), "img", "reference", world.rank) as bar:
        for part in shard(len(chosen), world.rank, world.size, batch):
            found = extractor(images.images(chosen[part].tolist()).expand(-1, 3, -1, -1)).features
            moments.update(found)
            features.append(found[is_kept[part]].cpu())
            bar.update(len(found) * world.size)
    if world.size > 1:
        moments.all_reduce(dist.all_reduce)
    own = torch.cat(features) if features else torch.empty(0, extractor.dim)
    mu, sigma = (published.mu, published.sigma) if published else (moments.mean, moments.cov)
    return Reference(mu, sigma, torch.cat(world.gather(own)))
