"""A classifier of small grey images, such as 8×8 digits, whose features the mini scale measures with.

It is trained on the training images alone.

The second features, which check the first ones, are trained on the held-out images, narrower and with another seed.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from neon import NeonError
from neon.data import ImageSet
from neon.files import regular, sha256
from neon.measure.features import Extractor, Features
from neon.weights.checkpoint import SafetensorsWeights, check_fits, load_into, save_safetensors
from neon.weights.network import MOST, recorded


class DigitsCNN(nn.Module):
    """Classifier of grey images, whose `dim` features before the last layer serve the metrics of the mini scale.

    uint8 (N, 3, side, side), of which the first channel is read → Features: (N, dim) and (N, 10) float32. side: a
    multiple of 4.
    """

    def __init__(self, dim: int = 64, side: int = 8):
        super().__init__()
        self.side = side
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * (side // 4) ** 2, dim)),
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, images: torch.Tensor) -> Features:
        side, (height, width) = self.side, images.shape[2:]
        if (height, width) != (side, side):
            raise NeonError(f"the digits extractor reads {side}x{side} images, not {height}x{width}")
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
    """Train on uint8 (N, 3, side, side) images and int64 (N,) labels in 0..9, shifted by up to a pixel.

    The same arguments give the same weights on one machine.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side = images.shape[-1]
        model = DigitsCNN(dim, side)
    # (N, 3, 3, 3, side, side): all nine shifts of each image, as views of its padded copy.
    shifts = F.pad(images, (1, 1, 1, 1)).unfold(2, side, 1).unfold(3, side, 1)
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
    metadata |= {"side": str(model.side)} if model.side != 8 else {}  # files of digits stay as they were
    save_safetensors(path, model.state_dict(), metadata)  # equal weights are equal files, whose digest names them


def digits(path: str | os.PathLike | None, device: torch.device | str = "cpu") -> Extractor:
    """Extractor from a file of `save_digits_cnn`. Raises NeonError for any other file, or none."""
    if path is None:
        raise NeonError("the digits extractor is a file: --features digits:PATH")
    path = Path(path)
    wrong = NeonError(f"{path} does not hold a DigitsCNN; make one with train_digits_cnn and save_digits_cnn")
    try:
        path = regular(path)
    except NeonError as error:
        raise NeonError(f"cannot read the digits extractor {error}") from None
    try:
        with SafetensorsWeights(path) as weights, recorded(weights, path, "DigitsCNN"):
            dim, side = int(weights.metadata["dim"]), int(weights.metadata.get("side", 8))
            if weights.metadata["model"] != "DigitsCNN" or not (0 < dim <= MOST and 4 <= side <= 1024):
                raise wrong
            with torch.device("meta"):
                model = DigitsCNN(dim, side)
            check_fits(model, weights, path)
            load_into(model.to_empty(device="cpu"), weights, path)
    except NeonError:
        raise wrong from None
    model.eval().to(device)
    return Extractor(f"digits-{sha256(path)[:8]}", model.head.in_features, 10, torch.device(device), model)


def main(train: str = "train", held: str = "heldout", epochs: int = 20, what: str = "digits") -> None:
    """The command. train, held: names in --data; what: the images, in words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {train} and {held}")
    parser.add_argument("--on", choices=[train, held], default=train, help="which of them to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dim", type=int, default=64, help="of the features")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order
    other = {train: held, held: train}[args.on]
    sets = {name: ImageSet(args.data / name) for name in (args.on, other)}
    pixels = {name: images.images(range(len(images))).expand(-1, 3, -1, -1) for name, images in sets.items()}
    model = train_digits_cnn(pixels[args.on], sets[args.on].labels, seed=args.seed, dim=args.dim, epochs=args.epochs)
    with torch.no_grad():
        logits = torch.cat([model(part).logits for part in pixels[other].split(1000)])
    accuracy = (logits.argmax(1) == sets[other].labels).float().mean().item()
    save_digits_cnn(model, args.out)
    print(f"trained on {args.on}; accuracy on the {len(sets[other])} {what} of {other}: {accuracy:.1%}")


if __name__ == "__main__":
    main()
