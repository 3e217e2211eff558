"""Features kept on disk: an evaluation is extended to more images, or compared with another, without sampling again."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from neon import NeonError
from neon.archives import read_npz
from neon.distributed import World
from neon.files import atomic
from neon.measure.features import Features

ALONE = World()


@dataclass(frozen=True)
class Kept:
    """The features of one model's images, in one .npz file: seeds (n,) int64, features (n, d), logits (n, classes).

    4 bytes a number: 82 MB for 10 000 images and Inception's 2048 features, 40 MB more with its logits.
    """

    path: Path
    logits: bool = False  # kept, too

    def read(self, seeds: torch.Tensor, world: World = ALONE) -> Features | None:
        """Of the first of the seeds, as many as are kept; None if there are none. The same on every rank.

        Raises NeonError if the file holds something else.
        """
        return world.gather(self._read(seeds) if world.rank == 0 else None)[0]

    def _read(self, seeds: torch.Tensor) -> Features | None:
        if not self.path.exists():
            return None
        kept, features, logits = self._arrays()
        n = min(len(kept), len(seeds))
        if not torch.equal(kept[:n], seeds[:n]) or (self.logits and logits is None):
            return None
        return Features(features[:n], logits[:n] if self.logits else None)

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All seeds and features that are kept. Raises NeonError if there are none."""
        if not self.path.exists():
            raise NeonError(f"{self.path}: the features are not kept any more; measure again")
        return self._arrays()[:2]

    def _arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        try:
            found = {name: torch.from_numpy(array) for name, array in read_npz(self.path).items()}
        except NeonError:
            raise NeonError(f"{self.path}: not features that were kept; delete it") from None
        seeds, features, logits = (found.get(name) for name in ("seeds", "features", "logits"))
        whole = seeds is not None and seeds.dtype == torch.int64 and seeds.ndim == 1
        if not whole or features is None or not _rows_of(features, seeds) or not _rows_of(logits, seeds):
            raise NeonError(f"{self.path}: not features that were kept; delete it")
        return seeds, features, logits

    def write(self, seeds: torch.Tensor, own: Features, world: World = ALONE) -> None:
        """Keep the features of all seeds; own: those of this rank, which follow those of the ranks before."""
        parts = [part for part in world.gather(own) if len(part.features)]
        if world.rank == 0:
            arrays = {"seeds": seeds.numpy(), "features": torch.cat([part.features for part in parts]).numpy()}
            if self.logits:
                arrays["logits"] = torch.cat([part.logits for part in parts]).numpy()
            with atomic(self.path) as partial, open(partial, "wb") as file:
                np.savez(file, **arrays)
        world.barrier()


def _rows_of(values: torch.Tensor | None, seeds: torch.Tensor) -> bool:
    """Is there a row of float32 for every seed, or nothing?"""
    return values is None or (values.dtype == torch.float32 and values.ndim == 2 and len(values) == len(seeds))


def joined(parts: list[Features], dim: int) -> Features:
    """One after the other; of no images if there are no parts."""
    if not parts:
        return Features(torch.empty(0, dim), None)
    logits = None if parts[0].logits is None else torch.cat([part.logits for part in parts])
    return Features(torch.cat([part.features for part in parts]), logits)


def folder_of(rows: str | Path) -> Path:
    """Where the features of a file of rows are kept: x.jsonl → x.features."""
    return Path(rows).with_suffix(".features")
