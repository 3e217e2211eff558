"""Train VAR's tokenizer on the digits: reconstruction plus the quantizer's loss. All seeds share it."""

import argparse
from pathlib import Path

import torch

from neon.data import ImageSet
from neon.weights.checkpoint import save_safetensors
from VAR.configs import CONFIGS
from VAR.loss import vqvae_loss
from VAR.vqvae import VQVAE

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and heldout/")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    train, heldout = (ImageSet(args.data / name) for name in ("train", "heldout"))
    train, heldout = (s.images(range(len(s))).float() / 127.5 - 1 for s in (train, heldout))
    model = VQVAE(CONFIGS["digits"])
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for _ in range(args.steps):
        loss = vqvae_loss(model, train[torch.randint(len(train), (args.batch,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        ids = model.encode(heldout)
        error = (model.decode(ids) - heldout).square().mean().sqrt() * 127.5
    used = ids.unique().numel()
    save_safetensors(args.out, model.state_dict())
    codes = model.quantize.embedding.num_embeddings
    print(f"held-out digits: error {error:.1f} of 255 levels (r.m.s.), {used} of {codes} codes used")
