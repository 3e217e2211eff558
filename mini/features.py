"""Train the digits classifier whose features the mini scale measures with, on the training images alone."""

import argparse
from pathlib import Path

import torch

from neon.data import ImageSet
from neon.features import save_digits_cnn, train_digits_cnn

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and heldout/")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    train, heldout = (ImageSet(args.data / name) for name in ("train", "heldout"))
    rgb = {s: s.images(range(len(s))).expand(-1, 3, -1, -1) for s in (train, heldout)}
    model = train_digits_cnn(rgb[train], train.labels)
    with torch.no_grad():
        accuracy = (model(rgb[heldout]).logits.argmax(1) == heldout.labels).float().mean().item()
    save_digits_cnn(model, args.out)
    print(f"accuracy on {len(heldout)} held-out digits: {accuracy:.1%}")
