"""A rival that trains on real images too: Direct Discriminative Optimization (DDO, arXiv 2503.01103), a short version.

    python -m mini.ddo --family edm --base runs/base/edm/0 --real runs/data/train --fake runs/S/demo/euler10/0 \\
        --seed 0 --out runs/rivals/ddo/0

The model is its own discriminator: it says 'real' with probability σ(β r), where r = log p_θ(x) − log p_ref(x) and the
reference is the frozen base. It learns to say so of the training digits and not of the base's samples:

    loss = −log σ(β r(real)) − α log(1 − σ(β r(fake)))

VAR has the log-likelihood of an image's codes. EDM has bounds on it, and r is estimated from their difference: the
reference's denoising loss less the model's, summed over pixels, at one noise level with one noise, the same for both.
The level's weight is that of EDM's training, not that of the bound.

The snapshots are as those of `neon selftrain`, so `neon search -w -1` and `neon final` read them. DDO has no w: −1 is
its model. Images are counted in pairs: up to a snapshot of 6400 images the model has seen 6400 real and 6400 fakes.

In which respects it is short: one round, so the reference stays the base; the fakes are the S that Neon learns from,
made with the sampler that is evaluated and not with the base's plain one; the recipe (batch, optimizer, average) is
Neon's, without its ramp; α, β, the learning rate and the budget are from a search of a few points (CHOSEN).
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edm.loss import edm_loss
from neon.cli import command_line
from neon.cli.options import count, natural, rate
from neon.data import ImageSet
from neon.distributed import world
from neon.family import Family, Recipe, get_family
from neon.files import sha256
from neon.sampling import from_uint8
from neon.selftrain import snapshots, train


class Chosen(NamedTuple):
    """The options that a family is trained with if none are given."""

    alpha: float
    beta: float
    lr: float
    budget: int  # pairs
    snapshot: int


# Lowest FID against the training digits, on the search's images of the seeds 103 and 104, which are not reported. EDM:
# nine runs, 31 evaluations (α of 0.5 to 4, β of 0.02 to 0.3, two rates). VAR, at guidance 0.5: six runs, 15 evaluations
# (α of 0.5 and 1, β of 0.03 to 0.3, two rates). Only the chosen points were run on both seeds. EDM's FID rose again
# after 9600 pairs (seed 104); with a larger α or a smaller β after 6400 or sooner. VAR's chosen point was not measured
# later than 6400; with any other, FID was already higher there than after 3200.
CHOSEN = {"edm": Chosen(1.0, 0.1, 2e-4, 12800, 3200), "var": Chosen(1.0, 0.1, 5e-5, 6400, 3200)}


class Draws(NamedTuple):
    """The random numbers of a training step of N pairs."""

    real: tuple  # of the family
    fake: tuple
    chosen: Tensor  # (N,) int64, which of the fakes


def edm_likelihood(model, images: Tensor, labels: Tensor | None, draws: tuple) -> Tensor:
    """Minus the denoising loss of each image, (N,); images: uint8 (N, C, H, W)."""
    one_hot = F.one_hot(labels, model.label_dim).float() if model.label_dim else None
    return -edm_loss(model, from_uint8(images), one_hot, draws).flatten(1).sum(1)


def var_likelihood(model, images: Tensor, labels: Tensor, draws: tuple) -> Tensor:
    """Log-likelihood of the codes of each image, (N,); images: uint8 (N, C, S, S).

    Labels are dropped as in training, for the part of the network that guidance needs. Branches are not: the
    likelihood is that of the whole network.
    """
    ids = model.vqvae.encode(from_uint8(images))
    kept = draws.dropped._replace(branches=None)
    logits = model.transformer(labels, model.vqvae.quantize.teacher_input(ids), kept)
    return -F.cross_entropy(logits.mT, ids, reduction="none").sum(1)


LIKELIHOODS: dict[str, Callable[..., Tensor]] = {"edm": edm_likelihood, "var": var_likelihood}


def ddo_loss(real: Tensor, fake: Tensor, alpha: float, beta: float) -> Tensor:
    """Mean over pairs of log-likelihood ratios (N,) each; log 2 · (1 + α) where they are 0."""
    return (F.softplus(-beta * real) + alpha * F.softplus(beta * fake)).mean()


class Discriminating:
    """A family whose loss is DDO's, for neon.selftrain.train: it reads the real images, and this draws the fakes.

    reference: another copy of the model that is trained, in eval mode, which stays as it is.
    """

    def __init__(self, family: Family, reference: torch.nn.Module, fakes: ImageSet):
        self.family, self.reference, self.labels = family, reference, fakes.labels
        family.check(reference, fakes.shape, fakes.labels)
        self.fakes = fakes.images(range(len(fakes)))
        self.weights, self.metadata, self.check = family.weights, family.metadata, family.check

    def draw(self, model, n: int, generator: torch.Generator, *, images, alpha: float, beta: float, **options) -> Draws:
        real = self.family.draw(model, n, generator, images=images, **options)
        fake = self.family.draw(model, n, generator, images=images, **options)
        chosen = torch.randint(len(self.fakes), (n,), generator=generator, device=generator.device)
        return Draws(real, fake, chosen)

    def loss(self, model, images: Tensor, labels: Tensor | None, draws: Draws, *, alpha: float, beta: float) -> Tensor:
        """images: real, uint8 (N, C, H, W)."""
        self.family.weights(model).eval()  # with dropout, θ would differ from the reference at θ = reference too
        chosen = draws.chosen.cpu()
        fakes = self.fakes[chosen].to(images.device)
        of_fakes = None if self.labels is None else self.labels[chosen].to(images.device)
        real = self.ratio(model, images, labels, draws.real)
        return ddo_loss(real, self.ratio(model, fakes, of_fakes, draws.fake), alpha, beta)

    def ratio(self, model, images: Tensor, labels: Tensor | None, draws: tuple) -> Tensor:
        """log p_θ − log p_ref of each image, (N,), both with the same random numbers."""
        likelihood = LIKELIHOODS[self.family.name]
        with torch.no_grad():
            reference = likelihood(self.reference, images, labels, draws)
        return likelihood(model, images, labels, draws) - reference


def recipe_of(family: Family, alpha: float, beta: float, **changes) -> Recipe:
    """The family's recipe of Neon on digits with a constant learning rate and DDO's loss; changes: of its fields."""
    recipe = family.recipes["digits"]
    loss = {**recipe.loss, "alpha": alpha, "beta": beta}
    return dataclasses.replace(recipe, ramp=0, loss=loss, **changes)


def run(args) -> list[Path]:
    """Train and return the snapshots. Raises NeonError for sets or files that do not fit."""
    family, base = get_family(args.family), snapshots(args.base)[-1]
    given = {name: value for name in Chosen._fields if (value := getattr(args, name)) is not None}
    recipe = recipe_of(family, **CHOSEN[args.family]._replace(**given)._asdict())
    real, fakes = ImageSet(args.real), ImageSet(args.fake)
    loading = {"vae_ckpt": args.vae_ckpt} if args.vae_ckpt else {}
    with world("cpu") as here:
        model, reference = (family.load(base, device=here.device, **recipe.network, **loading) for _ in range(2))
        origin = {"base": sha256(base), "fakes": len(fakes)}
        if (record := Path(args.fake, "generate.json")).exists():
            origin["fake"] = sha256(record)
        ddo = Discriminating(family, reference, fakes)
        options = {"micro_batch": args.micro_batch, "replace": args.replace, "origin": origin}
        return train(ddo, model, real, recipe, args.out, world=here, seed=args.seed, **options)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="mini.ddo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--family", required=True, choices=LIKELIHOODS)
    p.add_argument("--base", required=True, help="where it starts, and the reference: a file, or a training folder")
    p.add_argument("--real", required=True, help="image set of the training digits")
    p.add_argument("--fake", required=True, help="image set that the base made")
    p.add_argument("--vae_ckpt", help="VAR's VQVAE (default: the one that the base names)")
    p.add_argument("--seed", type=natural, default=0, help="of the order of images and all random numbers (default 0)")
    p.add_argument("--out", required=True, help="folder for snapshots and state; an interrupted run resumes")
    p.add_argument("--replace", action="store_true", help="delete another run that is there")
    p.add_argument("--micro_batch", type=count, help="pairs per forward pass")
    defaults = "; ".join(
        f"{name}: {', '.join(f'{k} {v}' for k, v in c._asdict().items())}" for name, c in CHOSEN.items()
    )
    changes = p.add_argument_group("what was chosen on fresh seeds", f"defaults: {defaults}")
    changes.add_argument("--alpha", type=rate, help="weight of the fakes")
    changes.add_argument("--beta", type=rate, help="steepness of the discriminator in the log-likelihood ratio")
    changes.add_argument("--lr", type=rate, help="learning rate, constant")
    changes.add_argument("--budget", type=count, help="pairs in all")
    changes.add_argument("--snapshot", type=count, help="pairs between snapshots")
    return p


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(1)  # sums in one order
    written = run(args)
    print(f"{len(written)} snapshots in {args.out}; each real image counted had one fake next to it")


if __name__ == "__main__":
    command_line(main)
