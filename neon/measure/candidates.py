"""A base and its self-trained snapshots, merged in memory: any θ_r − w (θ_s − θ_r), to be sampled and measured."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from neon import NeonError
from neon.family import Family
from neon.merge import is_finite, merge
from neon.weights.checkpoint import Weights, check_fits, check_same_key, open_weights
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
        self.model = family.load(base, device=device, precision=precision, **options)
        self._holds_base = True
        for name, tensor in self._held().items():
            if tensor.is_floating_point() and not family.is_buffer(name) and not is_finite(tensor):
                raise NeonError(f"{base}: {name} is not finite")
        if compile:
            self.model.compile()
        self._read = lru_cache(maxsize=1)(self._read_selftrained)

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
