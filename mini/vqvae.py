"""Train VAR's tokenizer on the digits: reconstruction plus the quantizer's loss. All seeds share it."""

import argparse
from pathlib import Path

import torch

from neon.data import ImageSet
from neon.files import progress
from neon.weights.checkpoint import save_safetensors
from VAR.configs import CONFIGS
from VAR.loss import vqvae_loss
from VAR.vqvae import VQVAE


def main(
    config: str = "digits",
    train: str = "train",
    held: str = "heldout",
    what: str = "digits",
    device: str = "cpu",
    steps: int | None = None,
) -> None:
    """The command. config: of CONFIGS; train, held: names in --data; what: the images; steps: if not given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {train} and {held}")
    parser.add_argument("--steps", type=int, required=steps is None, default=steps)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    images, heldout = (ImageSet(args.data / name) for name in (train, held))
    images, heldout = (s.images(range(len(s))).float() / 127.5 - 1 for s in (images, heldout))
    model = VQVAE(CONFIGS[config]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    with progress(args.steps * args.batch, "img", "tokenizer") as bar:
        for _ in range(args.steps):
            loss = vqvae_loss(model, images[torch.randint(len(images), (args.batch,))].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(args.batch)
    parts = [part.to(device) for part in heldout.split(1000)]
    with torch.no_grad():
        ids = [model.encode(part) for part in parts]
        errors = [(model.decode(codes) - part).square().mean((1, 2, 3)) for codes, part in zip(ids, parts)]
    error, used = torch.cat(errors).mean().sqrt() * 127.5, torch.cat(ids).unique().numel()
    save_safetensors(args.out, model.cpu().state_dict())
    codes = model.quantize.embedding.num_embeddings
    print(f"held-out {what}: error {error:.1f} of 255 levels (r.m.s.), {used} of {codes} codes used")


if __name__ == "__main__":
    main()
