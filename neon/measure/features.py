"""What the metrics see of an image: feature extractors.

An extractor turns a batch of images into features and, if it is a classifier, logits.
"""

import importlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from neon import Missing, NeonError
from neon.fetch import fetch
from neon.files import sha256
from neon.weights.checkpoint import torch_load

# What `--features NAME[:ARGUMENT]` may name: a function (argument, device) → Extractor, imported when it is asked for.
EXTRACTORS = {
    "inception": "neon.measure.features:inception",
    "dinov2": "neon.measure.dinov2:dinov2",
    "lite0": "neon.measure.lite0:lite0",
    "digits": "mini.features:digits",
    "cnn": "fashion.features:cnn",
}
SPECS = "inception, inception:PATH, inception:random, dinov2:PATH, lite0, lite0:PATH, digits:PATH, cnn:PATH"


class Features(NamedTuple):
    features: torch.Tensor  # (N, d) float32
    logits: torch.Tensor | None  # (N, classes) float32


@dataclass(frozen=True)
class Extractor:
    """Call with uint8 images (N, 3, H, W) on any device → Features on `device`. Raises NeonError for other input.

    name: of its kind and weights; dim: of the features; classes: of the logits, or None.
    """

    name: str
    dim: int
    classes: int | None
    device: torch.device
    module: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise NeonError(f"images must be uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        return Features(*self.module(images.to(self.device)))


def load_extractor(spec: str, device: torch.device | str = "cpu") -> Extractor:
    """One of SPECS → extractor. Raises NeonError."""
    kind, _, argument = spec.partition(":")
    if kind not in EXTRACTORS:
        raise NeonError(f"no feature extractor {spec!r}; choose from: {SPECS}")
    module, _, function = EXTRACTORS[kind].partition(":")
    return getattr(importlib.import_module(module), function)(argument or None, device)


def inception(weights_path: str | os.PathLike | None = None, device: torch.device | str = "cpu") -> Extractor:
    """torch-fidelity's `inception-v3-compat`: features '2048', logits 'logits_unbiased' (1008), images of any size.

    weights_path: a file in torch-fidelity's format; None for the published weights, downloaded once to torch's
    hub directory; 'random' for seeded random weights, whose numbers mean nothing but need no file.
    Raises NeonError if the weights cannot be had.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    random = weights_path == "random"
    path = None if random else Path(weights_path or _download_inception())
    state = None if random else load_state(path, "InceptionV3")

    class Inception(FeatureExtractorInceptionV3):
        """The constructor would unpickle any file: give it an empty one, and here what was read safely."""

        def load_state_dict(self, _empty):
            return super().load_state_dict(state) if state is not None else _randomize(self)

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    name, layers = "inception-v3-compat", ["2048", "logits_unbiased"]
    try:
        with torch.random.fork_rng(devices=[]):  # building a network must not move the global stream
            module = Inception(name, layers, feature_extractor_weights_path=empty)
    except (RuntimeError, AttributeError, TypeError):
        raise NeonError(f"{path} does not hold the weights of torch-fidelity's InceptionV3") from None
    version = "random" if random else sha256(path)[:8]
    return Extractor(f"{name}-{version}", 2048, 1008, torch.device(device), module.to(device))


def _download_inception() -> Path:
    """The published weights where torch-fidelity itself keeps them, downloaded if missing and checked by their name."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    path = Path(torch.hub.get_dir(), "checkpoints", URL.rpartition("/")[2])
    try:
        fetch(URL, path, digest=path.stem.rpartition("-")[2])
    except NeonError as error:
        raise NeonError(f"{error}, or give inception:PATH") from None
    return path


def load_state(path: Path, network: str) -> dict[str, torch.Tensor]:
    """What torch.save wrote, without running anything in it. Raises NeonError; network: its name there."""
    try:
        return torch_load(path)
    except Missing:
        raise NeonError(f"no {network} weights at {path}") from None
    except NeonError as error:
        raise NeonError(f"{path} is not a file of PyTorch weights ({error})") from None


def _randomize(module: nn.Module) -> None:
    """Weights that keep activations of order one, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)
