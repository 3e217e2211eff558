"""What the metrics see of an image: feature extractors.

An extractor turns a batch of images into features and, if it is a classifier, logits.
"""

import http.client
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from neon import NeonError
from neon.io import atomic, sha256

SPECS = "inception, inception:PATH, inception:random, digits:PATH"


class Features(NamedTuple):
    features: torch.Tensor  # (N, d) float32
    logits: torch.Tensor | None  # (N, classes) float32


@dataclass(frozen=True)
class Extractor:
    """Call with uint8 images (N, 3, H, W) on any device → Features on `device`. Raises NeonError for other input.

    name: tells kinds and weights apart; dim: of the features; classes: of the logits, or None.
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
    """'inception' | 'inception:PATH' | 'inception:random' | 'digits:PATH' → extractor. Raises NeonError."""
    kind, _, path = spec.partition(":")
    if kind == "inception":
        return inception(path or None, device)
    if kind == "digits" and path:
        return digits(path, device)
    raise NeonError(f"no feature extractor {spec!r}; choose from: {SPECS}")


# ---- InceptionV3


def inception(weights_path: str | os.PathLike | None = None, device: torch.device | str = "cpu") -> Extractor:
    """torch-fidelity's `inception-v3-compat`: features '2048', logits 'logits_unbiased' (1008), images of any size.

    weights_path: a file in torch-fidelity's format; None for the published weights, downloaded once to torch's
    hub directory; 'random' for seeded random weights, whose numbers mean nothing but need no file.
    Raises NeonError if the weights cannot be had.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    random = weights_path == "random"
    path = None if random else Path(weights_path or _download_inception())
    state = None if random else _load_state(path)

    class Inception(FeatureExtractorInceptionV3):
        """The constructor would unpickle any file: give it an empty one, and here what was read safely."""

        def load_state_dict(self, _empty):
            return super().load_state_dict(state) if state is not None else _randomize(self)

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    name, layers = "inception-v3-compat", ["2048", "logits_unbiased"]
    try:
        with torch.random.fork_rng(devices=[]):  # the weights a constructor draws are not for others to notice
            module = Inception(name, layers, feature_extractor_weights_path=empty)
    except (RuntimeError, AttributeError, TypeError):
        raise NeonError(f"{path} does not hold the weights of torch-fidelity's InceptionV3") from None
    version = "random" if random else sha256(path)[:8]
    return Extractor(f"{name}-{version}", 2048, 1008, torch.device(device), module.to(device))


def _download_inception() -> Path:
    """The published weights where torch-fidelity itself keeps them; fetched if they are not there."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    path = Path(torch.hub.get_dir(), "checkpoints", URL.rpartition("/")[2])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=path.stem.rpartition("-")[2])
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise NeonError(
                f"cannot download the InceptionV3 weights ({error}); fetch {URL} elsewhere and give inception:PATH"
            ) from None
    return path


def _load_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise NeonError(f"no InceptionV3 weights at {path}") from None
    except Exception:  # torch.load raises whatever a broken file provokes
        raise NeonError(f"{path} is not a file of PyTorch weights") from None


def _randomize(module: nn.Module) -> None:
    """Weights that keep activations of order one, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)


# ---- a classifier of 8x8 digits


class DigitsCNN(nn.Module):
    """Classifier of grey 8x8 digits, whose `dim` features before the last layer serve the metrics of the mini scale.

    uint8 (N, 3, 8, 8), of which the first channel is read → Features: (N, dim) and (N, 10) float32.
    """

    def __init__(self, dim: int = 64):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 2 * 2, dim)),
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, images: torch.Tensor) -> Features:
        if images.shape[2:] != (8, 8):
            raise NeonError(f"the digits extractor reads 8x8 images, not {images.shape[2]}x{images.shape[3]}")
        features = self.trunk(images[:, :1].float() / 127.5 - 1)
        return Features(features, self.head(F.relu(features)))


def train_digits_cnn(
    images: torch.Tensor,
    labels: torch.Tensor,
    seed: int = 0,
    epochs: int = 20,
    batch: int = 64,
    lr: float = 3e-3,
    dim: int = 64,
) -> DigitsCNN:
    """Train on uint8 (N, 3, 8, 8) images and int64 (N,) labels in 0..9, shifted by up to a pixel; seconds on a CPU.

    The same arguments give the same weights on one machine.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsCNN(dim)
    # (N, 3, 3, 3, 8, 8): all nine shifts of each image, as views of its padded copy.
    shifts = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(batch):
            dy, dx = torch.randint(3, (2, len(index)), generator=generator)
            loss = F.cross_entropy(model(shifts[index, :, dy, dx]).logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def save_digits_cnn(model: DigitsCNN, path: str | os.PathLike) -> None:
    """Write what `digits` reads, whole or not at all."""
    metadata = {"format": "pt", "model": "DigitsCNN", "dim": str(model.head.in_features)}
    data = safetensors.torch.save({key: x.contiguous() for key, x in model.state_dict().items()}, metadata)
    with atomic(path) as partial:
        partial.write_bytes(data)


def digits(path: str | os.PathLike, device: torch.device | str = "cpu") -> Extractor:
    """Extractor from a file of `save_digits_cnn`. Raises NeonError for any other file."""
    path = Path(path)
    wrong = NeonError(f"{path} does not hold a DigitsCNN; make one with train_digits_cnn and save_digits_cnn")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise NeonError(f"cannot read the digits extractor {path}: {error.strerror or error}") from None
    except SafetensorError:
        raise wrong from None
    if metadata.get("model") != "DigitsCNN":
        raise wrong
    try:
        model = DigitsCNN(int(metadata["dim"]))
        model.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError):
        raise wrong from None
    model.eval().to(device)
    return Extractor(f"digits-{sha256(path)[:8]}", model.head.in_features, 10, torch.device(device), model)
