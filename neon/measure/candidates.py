"""A base and its self-trained snapshots, merged in memory: any θ_r − w (θ_s − θ_r), to be sampled and measured."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from neon import NeonError
from neon.family import Family
from neon.merge import is_finite, merge
from neon.weights.checkpoint import check_same_key, load_weights, open_weights


@dataclass(frozen=True)
class Point:
    """One candidate: a snapshot of θ_s (None: the base itself), w, and the sampling options that are searched."""

    selftrained: str | None = None
    w: float = 0.0
    sampling: tuple[tuple[str, object], ...] = ()


class Candidates:
    """A base and its self-trained snapshots: any θ_r − w (θ_s − θ_r), loaded into one network."""

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
        self.model = family.load(base, device=device, precision=precision, **options)
        if compile:
            self.model.compile()
        self._read = lru_cache(maxsize=1)(self._read_selftrained)

    @cached_property
    def vae_sha256(self) -> str | None:
        """Of the autoencoder that the base decodes with; None if it makes pixels itself."""
        return self.family.metadata(self.model).get("vae_sha256")

    @cached_property
    def base(self) -> dict[str, torch.Tensor]:
        state = load_weights(self.base_path)
        for name, tensor in state.items():
            if tensor.is_floating_point() and not self.family.is_buffer(name) and not is_finite(tensor):
                raise NeonError(f"{self.base_path}: {name} is not finite")
        return state

    def _read_selftrained(self, path: str | Path) -> dict[str, torch.Tensor]:
        with open_weights(self.base_path) as base, open_weights(path) as weights:
            check_same_key(base, weights, "write the one you mean as a file of its own: neon convert --key")
            return dict(weights.items())

    def load(self, selftrained: str | Path | None, w: float) -> torch.nn.Module:
        """The network with merged weights; w = 0 or no snapshot is the base."""
        if w and selftrained is None:
            raise NeonError(f"w = {w} needs a self-trained checkpoint")
        state = dict(merge(self.base, self._read(selftrained), w, self.family.is_buffer)) if w else self.base
        self.family.weights(self.model).load_state_dict(state)
        return self.model
