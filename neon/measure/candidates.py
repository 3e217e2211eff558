"""A base and its self-trained snapshots, to be sampled and measured: any θ_r − w (θ_s − θ_r), merged in memory, or θ_r
guided by θ_s with that strength."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from neon import NeonError
from neon.family import Family
from neon.guidance import Guide, check_guidable
from neon.merge import is_finite, merge
from neon.weights.checkpoint import Weights, check_fits, check_same_key, load_into, open_weights
from neon.weights.summary import MergeSummary


@dataclass(frozen=True)
class Point:
    """One candidate: a snapshot of θ_s (None: the base itself), w, and the sampling options that are searched."""

    selftrained: str | None = None
    w: float = 0.0
    sampling: tuple[tuple[str, object], ...] = ()


class Candidates:
    """A base and its self-trained snapshots: any θ_r − w (θ_s − θ_r), written into one network.

    From the first merge on, θ_r and one θ_s stay on the network's device next to it; θ_neon is written into the network
    one tensor at a time. Raises NeonError if the base does not fit its family or is not finite.
    """

    by = "merge"

    def __init__(
        self,
        family: Family,
        base: str | Path,
        device: torch.device | str,
        precision: str = "float32",
        compile: bool = False,
        **options,
    ):
        self.family, self.base_path, self.precision = family, Path(base), precision
        self.device = torch.device(device)
        self.compiles, self._options = compile, options
        self.model = self._new()
        self._holds_base = True
        for name, tensor in self._held().items():
            if tensor.is_floating_point() and not family.is_buffer(name) and not is_finite(tensor):
                raise NeonError(f"{base}: {name} is not finite")
        self._read = lru_cache(maxsize=1)(self._read_selftrained)

    def _new(self) -> torch.nn.Module:
        """The base as its family loads it, compiled if it is to be."""
        model = self.family.load(self.base_path, device=self.device, precision=self.precision, **self._options)
        if self.compiles:
            model.compile()
        return model

    @cached_property
    def vae_sha256(self) -> str | None:
        """Of the autoencoder that the base decodes with; None if it makes pixels itself."""
        return self.family.metadata(self.model).get("vae_sha256")

    @cached_property
    def base(self) -> dict[str, torch.Tensor]:
        """θ_r as the file has it, on the network's device."""
        with open_weights(self.base_path) as base:
            check_fits(self.family.weights(self.model), base, self.base_path)
            return self._on_device(base)

    def load(self, selftrained: str | Path | None, w: float) -> torch.nn.Module:
        """The network with merged weights; w = 0 is the base. After a NeonError only the next load makes it whole."""
        if w and selftrained is None:
            raise NeonError(f"w = {w} needs a self-trained checkpoint")
        if w:
            self._write(merge(self.base, self._read(str(selftrained)), w, self.family.is_buffer))
        elif not self._holds_base:
            self._write(self.base.items())
        self._holds_base = not w
        return self.model

    def drift(self, selftrained: str | Path) -> float:
        """‖θ_s − θ_r‖₂ over what is merged, summed in float64. Raises NeonError as load does."""
        summary = MergeSummary({self.family.name: self.family.is_buffer})
        for _ in merge(self.base, self._read(str(selftrained)), -1.0, summary.is_buffer, summary.observe):
            pass
        return summary.drift.norm

    def _read_selftrained(self, path: str) -> dict[str, torch.Tensor]:
        with open_weights(self.base_path) as base, open_weights(path) as weights:
            check_same_key(base, weights, "write the one you mean as a file of its own: neon convert --key")
            return self._on_device(weights)

    def _on_device(self, weights: Weights) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in weights.items()}

    def _held(self) -> dict[str, torch.Tensor]:
        """The network's own tensors by name, to be written to."""
        return self.family.weights(self.model).state_dict()

    @torch.no_grad()
    def _write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy into the network, in its dtypes, each tensor as it comes."""
        self._holds_base, held = False, self._held()
        for name, tensor in tensors:
            held[name].copy_(tensor)


class Guided(Candidates):
    """The same points by guidance: θ_r samples, and θ_s next to it at every call of the network; see neon.guidance.

    w = 0 is the base alone. Raises NeonError also if a second network cannot guide the family's sampler.
    """

    by = "guidance"

    def __init__(self, family: Family, base: str | Path, device: torch.device | str, *args, **options):
        check_guidable(family)
        super().__init__(family, base, device, *args, **options)
        self._guide = Guide(family.weights(self.model), self.compiles)
        self._guided_by: str | None = None

    def load(self, selftrained: str | Path | None, w: float) -> torch.nn.Module:
        """The base, guided away from θ_s; w = 0 is the base. Raises NeonError for a θ_s that could not be merged."""
        if not math.isfinite(w):
            raise NeonError(f"w must be finite, not {w}")
        if w and selftrained is None:
            raise NeonError(f"w = {w} needs a self-trained checkpoint")
        if w and self._guided_by != str(selftrained):
            self._fill(str(selftrained))
        self._guide.set(w, self._second if w else None)
        return self.model

    @cached_property
    def _second(self) -> torch.nn.Module:
        """A network like the base's."""
        return self.family.weights(self._new())

    def _fill(self, selftrained: str) -> None:
        """Make the second network θ_s."""
        self._guided_by = None
        weights = self._read_selftrained(selftrained)
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not self.family.is_buffer(name) and not is_finite(tensor):
                raise NeonError(f"{name}: not finite in the self-trained model")
        load_into(self._second, weights, selftrained)
        self._guided_by = selftrained


BY = {kind.by: kind for kind in (Candidates, Guided)}


def by_of(row: Mapping[str, object]) -> str:
    """How the model of a row of results was made of θ_r and θ_s: a key of BY."""
    return row.get("by", Candidates.by)
