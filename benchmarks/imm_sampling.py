"""Latents per second of IMM sampling, by steps, precision and way of guidance, and what decoding them costs.

    python benchmarks/imm_sampling.py [--depth 28] [--batch 8] [--rounds 3]

Weights are initial values: speed does not depend on them. Variants take turns in every round, and a ratio is the median
over rounds, so that a machine that slows down or is shared slows all of them.
"""

import argparse
import statistics
import tempfile

import torch
from diffusers import AutoencoderKL
from timing import seconds

from imm import family
from imm.autoencoder import StableDiffusionVAE
from imm.latents import decode
from imm.sampler import sample
from neon.distributed import world
from neon.precision import autocast
from neon.sampling import Streams

STABLE_DIFFUSION = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}


def in_two_passes(net):
    """net.forward that evaluates the guided network's two branches one after the other instead of as one batch."""
    once = net.forward

    def jump(x, t, s, rows, cfg=None):
        without, given = once(x, t, s), once(x, t, s, rows)
        return without + cfg * (given - without)

    return jump


def variants(depth: int, device: torch.device, compiled: bool):
    """name → (network, steps, precision), all of the same initial weights."""

    def build():
        torch.manual_seed(0)
        return family.IMMPrecond(**family.networks["imagenet256"], depth=depth).to(device).eval()

    net, slow = build(), build()
    slow.forward = in_two_passes(slow)
    yield "float32", (net, 8, "float32")
    yield "float32, guidance in two passes", (slow, 8, "float32")
    half = "float16" if device.type == "cuda" else "bfloat16"
    yield half, (net, 8, half)
    if compiled:
        fast = family.IMM(build(), None)
        fast.compile()
        yield f"{half}, compile", (fast.net, 8, half)
    for steps in (4, 2, 1):
        yield f"float32, {steps} steps", (net, steps, "float32")


def stable_diffusion(device: torch.device) -> StableDiffusionVAE:
    """A VAE of the released size with initial weights."""
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKL(**STABLE_DIFFUSION).save_pretrained(folder)
        return StableDiffusionVAE(folder).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=28, help="blocks; the released network has 28")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_compile", action="store_true", help="skip torch.compile, which needs a C++ compiler")
    args = parser.parse_args()
    with world() as here, torch.no_grad():
        device, seeds = here.device, torch.arange(args.batch)
        runs = dict(variants(args.depth, device, not args.no_compile))
        times = {name: [] for name in runs}
        for round in range(-1, args.rounds):  # round -1 warms up
            for name, (net, steps, precision) in runs.items():

                def run(net=net, steps=steps, precision=precision):
                    with autocast(device, precision):
                        sample(net, Streams(seeds, device), seeds, steps=steps, cfg=1.8)

                elapsed = seconds(run, device)
                if round >= 0:
                    times[name].append(elapsed)
        first = times["float32"]
        where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"IMM, {args.depth} blocks, 8 steps, cfg 1.8, batch {args.batch}, {where}, torch {torch.__version__}")
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(first, values))
            print(f"{name:34s}{args.batch / statistics.median(values):9.3f} latents/s{ratio:7.2f}×")
        vae, latents = stable_diffusion(device), torch.randn(args.batch, 4, 32, 32, device=device)
        ratio = seconds(lambda: decode(vae, latents), device) / statistics.median(first)
        print(f"decoding in float32 takes {ratio:.2f} times as long as sampling in 8 steps")


if __name__ == "__main__":
    main()
